"""The GPU's kernels, interpreted; see tests/interpreters.py."""

import functools
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels import gpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from tests.interpreters import interpret

MODE = functools.partial(
    plgpu.force_gpu_interpret_mode, plgpu.InterpretGPUParams(detect_races=True)
)


def plan(call: Call, device: Any) -> Kernel | Fallback:
    return interpret(gpu.plan, MODE, call)
