"""Reduces arrays to statistics, and broadcasts statistics and parameters to arrays.

Arrays keep x's rank, and their channel axis stays whole. Split into groups of 10, as
in a UNet, channels would give a CPU loops of 10. Only the sums, which are small by
then, are split.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fusednorm.reference.spec import Norm

# Number of elements that one statistic counts: an int if the shape determines it, an
# array if it depends on a mask or on other devices.
Count = int | jax.Array


def reshape(a: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Splits or joins axes.

    If types say that an axis is sharded (explicit mode), the first of the axes that it
    is split into is sharded.
    """
    sharding = jax.typeof(a).sharding
    if not any(sharding.spec):
        return a.reshape(shape)
    # An old and a new axis begin at the same place if the same number of elements lies
    # from there on.
    pairs = zip(_begins(a.shape), sharding.spec, strict=True)
    split = {begin: names for begin, names in pairs if names is not None}
    begins = _begins(shape)
    if any(begin > 0 and begin not in begins for begin in split):
        return a.reshape(shape)  # jax says what it cannot do
    entries = [split.get(begin) for begin in begins]
    placed = jax.sharding.PartitionSpec(*entries)
    return lax.reshape(a, tuple(shape), out_sharding=sharding.update(spec=placed))


def _begins(shape: Sequence[int]) -> list[int]:
    """Counts the elements from each axis on; axes of size 1, which begin nothing, have
    the numbers -1, -2 and so on."""
    ones = itertools.count(-1, -1)
    return [
        math.prod(shape[axis:]) if size > 1 else next(ones)
        for axis, size in enumerate(shape)
    ]


def channels(norm: Norm, statistic: jax.Array, x: Any) -> jax.Array:
    """Shapes a statistic to broadcast against x: (..., G) -> (..., C) for groups."""
    if norm.num_groups is None:
        return statistic
    *lead, groups = statistic.shape
    each = jnp.broadcast_to(
        jnp.expand_dims(statistic, -1), (*statistic.shape, x.shape[-1] // groups)
    )
    return reshape(each, (*lead, x.shape[-1]))


def groups(norm: Norm, per_channel: jax.Array) -> jax.Array:
    """Sums over the channels of each group: (..., C) -> (..., G)."""
    if norm.num_groups is None:
        return per_channel
    *lead, channels = per_channel.shape
    groups = norm.num_groups
    return jnp.sum(reshape(per_channel, (*lead, groups, channels // groups)), -1)


def centred(norm: Norm, x: jax.Array, mean: jax.Array | None) -> jax.Array:
    """Returns x - mean, in `norm.compute_dtype`."""
    x = x.astype(norm.compute_dtype)
    return x if mean is None else x - channels(norm, mean, x)


def spread(norm: Norm, param: jax.Array, x: Any) -> jax.Array:
    """Shapes a scale or bias (..., features) to broadcast against x.

    Leading axes, if any, match x's leading axes. They come from parameters per sample
    or row, and from `jax.vmap` over the parameters.
    """
    lead = param.shape[:-1]
    shape = [1] * x.ndim
    shape[: len(lead)] = lead
    for axis in norm.feature_axes:
        shape[axis] = x.shape[axis]
    return reshape(param, shape).astype(norm.compute_dtype)


def weight(norm: Norm, scale: jax.Array | None, x: Any) -> Any:
    """Returns the factor of x_hat, shaped to broadcast against x."""
    return 1 if scale is None else norm.weight(spread(norm, scale, x))


def pixel_axes(norm: Norm, first: int = 0) -> list[int]:
    """Returns the axes of S in x[N, S, G, K]: reduced axes that are no feature axes.

    Axes of x before `first` are left out.
    """
    axes = norm.reduction_axes
    return [axis for axis in axes if axis not in norm.feature_axes and axis >= first]


def sum_over(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sum(x, axis=tuple(axes), keepdims=True) if axes else x


# XLA's GPU code sums pixels in one block per sample and 32 channels. Where that makes
# fewer blocks than this, parts of the pixels are summed first, of about so many pixels
# at least.
_ENOUGH_BLOCKS = 1024
_LEAST_PIXELS = 64


def sums_over(
    arrays: Sequence[jax.Array], axes: Sequence[int], *, in_parts: bool
) -> Sequence[jax.Array]:
    """Returns `sum_over` of each of the arrays, which have one shape.

    `in_parts` is a form for a GPU, where in a few blocks the sums would not only be
    slow. XLA would also write x - mean, or its product with dz, to memory before it
    sums them: GroupNorm of 2 x 64 x 64 x 320 in bfloat16 then moves 16.1 tensors
    forward and backward, and in parts 8.2; flax's moves 17.0 (compiled for an A100).
    """
    shape = arrays[0].shape
    parts = _parts(shape, axes) if in_parts else {}
    if not parts:
        return [sum_over(a, axes) for a in arrays]
    # Each axis is split into (parts, rest). Axes are not joined: in memory they may lie
    # in any order, as behind a convolution in float32.
    split: list[int] = []
    of_rest: list[int] = []
    for axis, size in enumerate(shape):
        if axis in parts:
            split.append(parts[axis])
            of_rest.append(len(split))
            size //= parts[axis]
        split.append(size)

    # One reduction of all arrays, so that what they share is read once.
    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, a, b))

    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    operands = tuple(a.reshape(split) for a in arrays)
    sums = lax.reduce(operands, zeros, add, of_rest)
    # The barrier keeps XLA from joining the two sums again.
    return [sum_over(a, axes) for a in lax.optimization_barrier(sums)]


def _parts(shape: Sequence[int], axes: Sequence[int]) -> dict[int, int]:
    """Returns the number of parts of each of the axes; {} for no parts."""
    along_last = len(shape) - 1 in axes  # many blocks anyway
    fixed = all(isinstance(size, int) and size for size in shape)  # else symbolic, or 0
    if along_last or not fixed:
        return {}
    pixels = math.prod(shape[axis] for axis in axes)
    blocks = math.ceil(math.prod(shape) / pixels / 32)
    wanted = min(_ENOUGH_BLOCKS // blocks, pixels // _LEAST_PIXELS)
    parts: dict[int, int] = {}
    left = wanted
    for axis in sorted(axes):
        parts[axis] = divisor(shape[axis], left)
        left //= parts[axis]
    return parts if math.prod(parts.values()) >= max(wanted / 4, 2) else {}


def divisor(size: int, most: int) -> int:
    """Returns the largest divisor of a size that is at most `most`, and at least 1."""
    return max((n for n in range(1, most + 1) if size % n == 0), default=1)


def total(norm: Norm, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns a statistic: sums of the elements that share a mean and are unmasked."""
    return groups(norm, sum_over(masked(x, mask), norm.reduction_axes))


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    # The 0 is a scalar: jax requires arrays of one shape to have the same sharding.
    return x if mask is None else jnp.where(mask, x, 0)


def divided(total: jax.Array, count: Count) -> jax.Array:
    """Returns total / count, or 0 where nothing was counted."""
    if isinstance(count, int):
        return total / factor(max(count, 1))
    count = jnp.asarray(count, total.real.dtype)
    return total / jnp.maximum(count, jnp.ones_like(count))


def across(norm: Norm, total: Any) -> Any:
    """Returns the total, which may be an int, over all devices that combine."""
    if not norm.axis_names:
        return total
    groups = norm.axis_index_groups
    return lax.psum(total, norm.axis_names, axis_index_groups=groups)


def mean(norm: Norm, total: jax.Array, count: Count) -> jax.Array:
    """Returns the mean over all devices that combine, from each one's `total`."""
    return divided(across(norm, total), count)


def count(norm: Norm, x: jax.Array, mask: jax.Array | None) -> Count:
    """Counts the local elements per statistic: an int, or with a mask a statistic."""
    if mask is not None:
        ones = jnp.broadcast_to(mask, x.shape)
        return total(norm, ones.astype(norm.compute_dtype))
    count: Count = 1 if norm.num_groups is None else x.shape[-1] // norm.num_groups
    for axis in norm.reduction_axes:
        count = count * x.shape[axis]
    return count


def factor(count: Count) -> Any:
    """Returns a count as a factor; an int may be too large for an array of int32."""
    return float(count) if isinstance(count, int) else count


def abs_squared(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)
