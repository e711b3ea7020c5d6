"""The normalizations in plain jax.numpy: the definition of a correct result.

Every kernel is checked against these functions, and every call that no kernel takes
runs them. The functions themselves are checked against float64 NumPy and against flax.
"""

from fusednorm.reference.activation import ACTIVATIONS, activate, slope, times_slope
from fusednorm.reference.norm import (
    add,
    apply,
    backward,
    before_activation,
    forward,
    input_gradient,
    is_per_element,
    moments_tangent,
    tangent,
)
from fusednorm.reference.spec import Norm, TunedFor, at_least_float32
from fusednorm.reference.statistics import moments, over_devices

__all__ = [
    "ACTIVATIONS",
    "Norm",
    "TunedFor",
    "activate",
    "add",
    "apply",
    "at_least_float32",
    "backward",
    "before_activation",
    "forward",
    "input_gradient",
    "is_per_element",
    "moments",
    "moments_tangent",
    "over_devices",
    "slope",
    "tangent",
    "times_slope",
]
