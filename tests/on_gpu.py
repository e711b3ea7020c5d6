"""The GPU's kernels, interpreted; see tests/interpreters.py."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels import gpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import rowwise
from tests.interpreters import interpret


def load_by_warps(ref: Any, at: Any, layout: Any) -> Any:
    """What the interpreter knows of rowwise._load_by_warps: the same by value."""
    value = rowwise._load(ref, at, None)
    return value.reshape(rowwise.WARPS, -1)


def store_by_warps(ref: Any, at: Any, value: Any) -> None:
    rowwise._store(ref, at, value.reshape(-1))


@contextlib.contextmanager
def mode() -> Iterator[None]:
    """Interprets; a race raises."""
    # Ignored is the fence of clusters: here all memory is in order.
    params = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    with (
        plgpu.force_gpu_interpret_mode(params),
        mock.patch.object(rowwise, "_load_by_warps", load_by_warps),
        mock.patch.object(rowwise, "_store_by_warps", store_by_warps),
    ):
        yield


def plan(call: Call, device: Any) -> Kernel | Fallback:
    # Two multiprocessors, so that a persistent block has more than one tile.
    with mock.patch.object(gpu, "PROCESSORS", 2):
        return interpret(gpu.plan, mode, call)
