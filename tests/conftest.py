"""Configures every test: 8 virtual CPU devices."""

import os
from collections.abc import Callable, Iterator
from typing import Any

# Size of XLA's thread pool on a CPU, read when jax makes its devices. The interpreters
# hold one thread per warpgroup of a block and per block of a cluster, up to 8 in these
# tests. With a pool for two cores they would deadlock.
os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))

import jax
import pytest

from tests import interpreters

# Must be set before jax makes its devices. Tests that need one device take the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """Compiles with few optimizations, for tests that compile a lot of code.

    They must compare only with results that are compiled the same way.
    """
    with interpreters.quickly_compiled():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option with which `make aot-baseline` records what `make aot` checks."""
    parser.addoption("--renew-baseline", action="store_true")


@pytest.fixture(scope="session")
def no_worse(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], None]]:
    """Provides a function that checks a measurement against the baseline.

    With `--renew-baseline` the function records the measurement instead.
    """
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
    """Provides the futures of all compilations that the tests of `make aot` request."""
    from tests import compilers

    with compilers.begin(request.session.items) as begun:
        yield begun


@pytest.fixture
def found(begun: dict[Any, Any], cell: Any) -> Any:
    """Provides the measurement of the cell's workload on the cell's chip."""
    return begun[cell].result()
