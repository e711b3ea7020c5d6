"""Interprets the GPU's kernels; see tests/interpreters.py."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels import gpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import memory
from tests.interpreters import interpret


def load_as(
    ref: Any, at: Any, shape: Sequence[int], layout: Any, part: Any = ...
) -> Any:
    """Replaces memory.load_as, which the interpreter lacks: reshapes the loaded value.

    The result is the same. A `part` is a slice of the last axis.
    """
    value = plgpu.load(ref.at[at], optimized=False).reshape(shape)
    if part is ...:
        return value
    *_, columns = part
    return lax.dynamic_slice_in_dim(value, columns.start, columns.size, -1)


def store_as(
    ref: Any, at: Any, value: Any, shape: Sequence[int] = (), part: Any = ...
) -> None:
    """Replaces memory.store_as: stores the whole of ref[at], of which `part` is new."""
    here = ref.at[at]
    if part is not ...:
        *_, columns = part
        whole = plgpu.load(here, optimized=False).reshape(shape)
        value = lax.dynamic_update_slice_in_dim(whole, value, columns.start, -1)
    memory.store(here, ..., value.reshape(here.shape))


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
