"""Interprets the GPU's kernels; see tests/interpreters.py."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels import gpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import memory
from tests.interpreters import interpret


def load_as(ref: Any, at: Any, shape: Sequence[int], layout: Any) -> Any:
    """Replaces memory.load_as, which the interpreter lacks: reshapes the loaded value.

    The result is the same.
    """
    return plgpu.load(ref.at[at], optimized=False).reshape(shape)


def store_as(ref: Any, at: Any, value: Any) -> None:
    memory.store(ref, at, value.reshape(ref.at[at].shape))


@contextlib.contextmanager
def mode() -> Iterator[None]:
    """Interprets the kernels that run in it, and raises on a race."""
    # "ignore" skips the fence of clusters: in the interpreter all memory is in order.
    params = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    with (
        plgpu.force_gpu_interpret_mode(params),
        mock.patch.object(memory, "load_as", load_as),
        mock.patch.object(memory, "store_as", store_as),
    ):
        yield


def plan(call: Call, device: Any) -> Kernel | Fallback:
    # Plan for two SMs, so that a persistent block has more than one tile.
    with mock.patch.object(gpu, "PROCESSORS", 2):
        return interpret(gpu.plan, mode, call)
