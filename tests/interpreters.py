"""Runs the kernels on a CPU in Pallas' interpreters, behind `jax.pure_callback`.

While a test runs the kernels there, `dispatch.KERNELS` names tests/on_gpu.py or
tests/on_tpu.py for the CPU. The plan is the real one; only the launch is interpreted.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import fusednorm
from fusednorm.kernels import dispatch
from fusednorm.kernels.dispatch import Call, Fallback, Kernel

MODULES = {"mosaic_gpu": "tests.on_gpu", "mosaic_tpu": "tests.on_tpu"}

_one_at_a_time = threading.Lock()
runs: collections.Counter[str] = collections.Counter()  # launches, by kernel's name


@contextlib.contextmanager
def quickly_compiled(quickly: bool = True) -> Iterator[None]:
    """Turns off LLVM's optimizations, which take a third of these tests' time.

    The code runs only once.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, quickly)
    try:
        yield
    finally:
        jax.config.update(name, before)
        jax.clear_caches()


@contextlib.contextmanager
def interpreted(backend: str) -> Iterator[None]:
    """Makes the CPU run the kernels of `backend`."""
    jax.clear_caches()  # drop executables that were compiled without the kernels
    runs.clear()
    before = dict(dispatch.KERNELS)
    dispatch.KERNELS["cpu"] = (backend, MODULES[backend])
    try:
        with quickly_compiled():
            yield
    finally:
        dispatch.KERNELS.clear()
        dispatch.KERNELS.update(before)


def interpret(
    plan: Callable[[Call, Any], Kernel | Fallback],
    mode: Callable[[], contextlib.AbstractContextManager[None]],
    call: Call,
) -> Kernel | Fallback:
    """Returns what `plan` chooses for the newest device, with an interpreted launch.

    The launch runs under `mode`. The interpreters have ordered effects, which jit
    refuses under scan, remat and on several devices. Behind a pure callback all of
    these work.
    """
    kernel = plan(call, None)
    if isinstance(kernel, Fallback):
        return kernel
    launch = kernel.launch

    def run(*operands: Any, **named: Any) -> list[np.ndarray]:
        # Use a device that is not waiting for this callback. The lock is needed because
        # an interpreter has one memory for all running kernels.
        with _one_at_a_time, jax.default_device(jax.devices()[-1]), mode():
            runs[kernel.name] += 1
            return [np.asarray(result) for result in launch(*operands, **named)]

    def behind_callback(*operands: Any, **named: Any) -> list[jax.Array]:
        with mode():
            results = jax.eval_shape(launch, *operands, **named)
        return jax.pure_callback(run, results, *operands, **named)

    return dataclasses.replace(kernel, launch=behind_callback)


def kernels_of(backend: str) -> Any:
    """Returns the fixture `kernels`: a chip's kernels take every call, or raise."""

    @pytest.fixture
    def kernels() -> Iterator[None]:
        with interpreted(backend), fusednorm.use_backend(backend):
            yield

    return kernels


@pytest.fixture(params=["mosaic_gpu", "mosaic_tpu"])
def kernels_of_each_chip(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the kernels of each chip, which take every call or raise."""
    backend = request.param
    with interpreted(backend), fusednorm.use_backend(backend):
        yield backend


def fixtures_of_variants(
    variants: Sequence[str], set_variant: Callable[..., str]
) -> tuple[Any, Any]:
    """Returns the fixtures `variant` and `every_variant`.

    Tests that ask for `variant` run with the first variant in `make test`, and with the
    others in `make test-slow`.

    Args:
      variants: the parameters of the fixtures.
      set_variant: the fixtures' function, which takes `request`.
    """
    first, *others = variants
    slow = [pytest.param(other, marks=pytest.mark.slow) for other in others]
    return (
        pytest.fixture(params=[first, *slow], name="variant")(set_variant),
        pytest.fixture(params=variants, name="every_variant")(set_variant),
    )
