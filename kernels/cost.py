"""Cost estimates by which XLA schedules a kernel beside other work."""

import math
from collections.abc import Iterable
from typing import Any

from jax.experimental import pallas as pl

OPERATIONS = 10  # per element; a rough value will do: kernels are bound by memory


def estimate(arrays: Iterable[Any]) -> pl.CostEstimate:
    """Estimates a kernel's cost: each array moves to or from device memory once.

    Args:
      arrays: operands and results, each with a shape and a dtype, or None.
    """
    present = [array for array in arrays if array is not None]
    return pl.CostEstimate(
        flops=OPERATIONS * sum(math.prod(array.shape) for array in present),
        bytes_accessed=sum(
            math.prod(array.shape) * array.dtype.itemsize for array in present
        ),
        transcendentals=0,
    )
