"""What every test runs under: 8 virtual CPU devices, and the backends of the suite."""

import os
from collections.abc import Callable, Iterator
from typing import Any

# Size of XLA's pool of threads on a CPU, read when jax makes its devices. The
# interpreters hold one for each warpgroup of a block and each block of a cluster, up to
# 8 in these tests; on two cores they would wait for each other for ever.
os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))

import jax
import pytest

import fusednorm
from tests import interpreters

# Before jax makes its devices. Tests that need one device take the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=["reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that the suite of test_suite.py runs against."""
    with fusednorm.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """For tests that compile much, and compare with what is compiled alike."""
    with interpreters.quickly_compiled():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make aot-baseline` records what `make aot` compares with."""
    parser.addoption("--renew-baseline", action="store_true")


@pytest.fixture(scope="session")
def no_worse(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], None]]:
    """Compares a measurement with what is recorded, or records it."""
    from bench.aot import gate

    if not request.config.getoption("--renew-baseline"):
        recorded = gate.load()

        def compare(found: Any) -> None:
            assert gate.grown(found, recorded) == []

        yield compare
    else:
        renewed: gate.Baseline = {}
        yield lambda found: gate.record(renewed, found)
        gate.save(renewed)


@pytest.fixture(scope="session")
def begun(request: pytest.FixtureRequest) -> Iterator[dict[Any, Any]]:
    """What the tests of `make aot` compile, by what they ask for."""
    from tests import compilers

    with compilers.begin(request.session.items) as begun:
        yield begun


@pytest.fixture
def found(begun: dict[Any, Any], cell: Any) -> Any:
    """What the cell's workload is on the cell's chip."""
    return begun[cell].result()
