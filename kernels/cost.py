"""What XLA is told of a kernel, to schedule it beside other work."""

import math
from collections.abc import Iterable
from typing import Any

from jax.experimental import pallas as pl

OPERATIONS = 10  # on each element; whatever it is: kernels are bound by memory


def estimate(arrays: Iterable[Any]) -> pl.CostEstimate:
    """Each array crosses to device memory or from it once.

    Args:
      arrays: operands and results; anything with a shape and a dtype, or None.
    """
    found = [array for array in arrays if array is not None]
    return pl.CostEstimate(
        flops=OPERATIONS * sum(math.prod(array.shape) for array in found),
        bytes_accessed=sum(
            math.prod(array.shape) * array.dtype.itemsize for array in found
        ),
        transcendentals=0,
    )
