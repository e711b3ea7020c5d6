"""The TPU's kernels, interpreted; see tests/interpreters.py."""

import functools
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels import tpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from tests.interpreters import interpret

MODE = functools.partial(
    pltpu.force_tpu_interpret_mode, pltpu.InterpretParams(detect_races=True)
)


def plan(call: Call, device: Any) -> Kernel | Fallback:
    return interpret(tpu.plan, MODE, call)
