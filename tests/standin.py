"""A stand-in for a platform's kernels: the reference's formulas, with runs counted.

tests/test_dispatch.py registers it for the CPU. It proves which implementation is
chosen, and how often it runs, without any real kernel.
"""

import collections
from typing import Any

import jax
import numpy as np

from fusednorm import reference
from fusednorm.kernels.dispatch import Call, Fallback, Kernel

BACKEND = "mosaic_gpu"
calls: list[Call] = []  # every call that was planned
runs: collections.Counter[str] = collections.Counter()  # every launch that ran, by op


def plan(call: Call, device: Any) -> Kernel | Fallback:
    """Takes every call but one of 13 features."""
    assert device is not None
    calls.append(call)
    assert call.geometry is not None
    if call.geometry.features == 13:
        return Fallback("13 features bring bad luck")

    def count(_: Any) -> np.ndarray:
        runs[call.op] += 1
        return np.zeros((), "float32")

    def forward(x: Any, scale: Any, bias: Any) -> list[Any]:
        y, mean, var = reference.forward(call.norm, x, scale, bias)
        y = y + tick(x).astype(y.dtype)
        return [r for r in (y, mean, var) if r is not None] if call.statistics else [y]

    def backward(
        dy: Any, x: Any, scale: Any, bias: Any, mean: Any, var: Any
    ) -> list[Any]:
        gradients = reference.backward(
            call.norm, dy, x, scale, bias, mean, var, own_params=call.own_params
        )
        wanted = [g for g, want in zip(gradients, call.wanted, strict=True) if want]
        return [wanted[0] + tick(dy).astype(wanted[0].dtype), *wanted[1:]]

    def tick(operand: Any) -> jax.Array:
        zero = jax.ShapeDtypeStruct((), "float32")
        return jax.pure_callback(count, zero, operand.ravel()[0])

    launch = {"forward": forward, "backward": backward}[call.op]
    return Kernel(
        BACKEND,
        f"stand-in {call.op}",
        launch,
        block="all rows",
        why="it stands in for one",
        bytes_moved=2 * call.x.size * call.x.dtype.itemsize,
    )
