"""What every test runs under: 8 virtual CPU devices, and the backends of the suite."""

from collections.abc import Iterator

import jax
import pytest

import fusednorm

# Before jax makes its devices. Tests that need one device take the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=["reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that the suite of test_suite.py runs against."""
    with fusednorm.use_backend(request.param):
        yield request.param
