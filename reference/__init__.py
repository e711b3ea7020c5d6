"""The normalizations in plain jax.numpy: the definition of right.

Every kernel is checked against these functions, and every call that no kernel takes
runs them. They themselves are checked against float64 NumPy and against flax.
"""

from fusednorm.reference.norm import (
    Norm,
    apply,
    backward,
    combine,
    forward,
    input_gradient,
    moments,
    moments_tangent,
    tangent,
    variance,
)

__all__ = [
    "Norm",
    "apply",
    "backward",
    "combine",
    "forward",
    "input_gradient",
    "moments",
    "moments_tangent",
    "tangent",
    "variance",
]
