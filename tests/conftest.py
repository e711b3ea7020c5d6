"""What every test runs under: 8 virtual CPU devices, and the backends of the suite."""

import os
from collections.abc import Iterator

# Size of XLA's pool of threads on a CPU, read when jax makes its devices. The
# interpreters hold one for each warpgroup of a block and each block of a cluster, up to
# 8 in these tests; on two cores they would wait for each other for ever.
os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))

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
