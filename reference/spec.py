"""What a normalization is, without the arrays."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

# Platform for which the reference takes the form that its compiler runs fastest: one
# device that holds all of x; or several over which XLA partitions it, for "gpus", and
# for a BatchNorm on TPUs.
TunedFor = Literal["cpu", "gpu", "gpus", "tpu"] | None


@dataclasses.dataclass(frozen=True)
class Norm:
    """Description of one normalization, independent of the array's size.

    Attributes:
      reduction_axes: axes of x that share one mean and variance; sorted, none negative.
        If `num_groups` is set, the last axis is not among them: it is split instead.
      feature_axes: axes of x along which scale and bias vary; sorted, none negative.
      num_groups: None, or the number of groups into which the last axis is split, each
        with its own mean and variance (the last axis is then the only feature axis).
      center: whether the mean is subtracted; False is RMSNorm.
      epsilon: added to the variance, inside the square root. A float, or a scalar array
        if the program computes it.
      dtype: dtype of y. Arithmetic is at least float32, and wider if `dtype` is.
      activation: None, or a name in `activation.ACTIVATIONS`.
      scale_offset: number added to the scale, if there is one; 1 if the scale is stored
        as its distance from 1.
      axis_names: mapped axes (of a mesh, or of `jax.vmap`) over which the statistics
        are also combined. x is then one device's part.
      axis_index_groups: None, or which devices of these axes combine, as in
        `jax.lax.psum`.
      one_scale: whether all devices that combine are known to have the same scale.
    """

    reduction_axes: tuple[int, ...]
    feature_axes: tuple[int, ...]
    num_groups: int | None = None
    center: bool = True
    epsilon: Any = 1e-6
    dtype: Any = jnp.dtype("float32")
    activation: str | None = None
    scale_offset: float = 0.0
    axis_names: tuple[Hashable, ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    one_scale: bool = False

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of the arithmetic and the statistics: `dtype`, but at least float32."""
        return at_least_float32(self.dtype)

    def weight(self, scale: Any) -> Any:
        """Returns scale + scale_offset; `scale` is in `compute_dtype`."""
        return scale + self.scale_offset if self.scale_offset else scale

    def statistic_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the mean and variance of an x of shape `shape`."""
        reduced = [
            1 if axis in self.reduction_axes else n for axis, n in enumerate(shape)
        ]
        if self.num_groups is not None:
            reduced[-1] = self.num_groups
        return tuple(reduced)

    def with_leading_axes(self, new_axes: int) -> "Norm":
        """Returns the normalization for arrays with `new_axes` more leading axes."""
        return dataclasses.replace(
            self,
            reduction_axes=tuple(axis + new_axes for axis in self.reduction_axes),
            feature_axes=tuple(axis + new_axes for axis in self.feature_axes),
        )


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for arithmetic on float or complex numbers of `dtype`."""
    # jax does not promote float8 by itself, and may be told to promote nothing.
    if dtype.itemsize == 1:
        return jnp.dtype("float32")
    return np.promote_types(dtype, np.float32)
