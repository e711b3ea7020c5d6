"""Normalization over any axes, forward and backward, in plain jax.numpy.

Formulas, over the elements that share one mean (a row, a group, a channel):

    mean  = sum(x) / n                       n elements that the mask lets in
    var   = sum((x - mean)^2) / n            centred: no cancellation at large means
    rstd  = 1 / sqrt(var + epsilon)
    x_hat = (x - mean) * rstd
    z     = x_hat * scale + bias             + shortcut, if there is one
    y     = act(z)                           z itself without an activation

    dz     = dy * act'(z)
    w      = dz * scale
    c1     = sum(w * x_hat) / n
    c2     = sum(w) / n
    dx     = rstd * (w - c2 - x_hat * c1)
    dscale = sum(dz * x_hat),  dbias = sum(dz)    over elements that share one scale
    dshortcut = dz

RMSNorm omits the mean: mean = 0 and c2 = 0. activation.py defines act and act'.

Sources: Ioffe and Szegedy 2015 (arXiv:1502.03167), section 3, for the backward with
batch statistics; Ba et al. 2016 (arXiv:1607.06450), eq. 3 and 4; Zhang and Sennrich
2019 (arXiv:1910.07467), eq. 4; Wu and He 2018 (arXiv:1803.08494), eq. 1 to 3; Chan,
Golub and LeVeque 1983 (The American Statistician 37:3), eq. 2.1, for `combine`.

Every function keeps the caller's rank and axes, so that an array sharded over devices
stays sharded: flattening it to rows would gather it. A statistic has the rank of x,
with size 1 along the reduced axes. If channels are grouped, it has one entry per group
along the last axis.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fusednorm.reference.activation import activate, through
from fusednorm.reference.chunks import in_chunks

# Number of elements that one statistic counts: an int if the shape determines it, an
# array if it depends on a mask or on other devices.
Count = int | jax.Array

# Platform for which the reference takes the form that its compiler runs fastest: one
# device that holds all of x, or, for "gpus", several over which XLA partitions it.
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
      over: mapped axes (of a mesh, or of `jax.vmap`) over which the statistics are
        also combined. x is then one device's part.
      groups: None, or which devices of these axes combine, as in `jax.lax.psum`.
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
    over: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None
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


# --- statistics and what they are of --------------------------------------------------
# Arrays keep x's rank, and their channel axis stays whole. Split into groups of 10, as
# in a UNet, channels would give a CPU loops of 10. Only the sums, which are small by
# then, are split.


def _reshape(a: jax.Array, shape: Sequence[int]) -> jax.Array:
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
    if not split.keys() <= set(_begins(shape)):
        return a.reshape(shape)  # jax says what it cannot do
    entries = [split.get(begin) for begin in _begins(shape)]
    placed = jax.sharding.PartitionSpec(*entries)
    return lax.reshape(a, tuple(shape), out_sharding=sharding.update(spec=placed))


def _begins(shape: Sequence[int]) -> list[int]:
    """Counts the elements from each axis on; 0 for size 1, which begins nothing."""
    return [
        math.prod(shape[axis:]) if size > 1 else 0 for axis, size in enumerate(shape)
    ]


def _channels(norm: Norm, statistic: jax.Array, x: Any) -> jax.Array:
    """Shapes a statistic to broadcast against x: (..., G) -> (..., C) for groups."""
    if norm.num_groups is None:
        return statistic
    *lead, groups = statistic.shape
    each = jnp.broadcast_to(
        jnp.expand_dims(statistic, -1), (*statistic.shape, x.shape[-1] // groups)
    )
    return _reshape(each, (*lead, x.shape[-1]))


def _groups(norm: Norm, per_channel: jax.Array) -> jax.Array:
    """Sums over the channels of each group: (..., C) -> (..., G)."""
    if norm.num_groups is None:
        return per_channel
    *lead, channels = per_channel.shape
    groups = norm.num_groups
    return jnp.sum(_reshape(per_channel, (*lead, groups, channels // groups)), -1)


def _centred(norm: Norm, x: jax.Array, mean: jax.Array | None) -> jax.Array:
    """Returns x - mean, in `norm.compute_dtype`."""
    x = x.astype(norm.compute_dtype)
    return x if mean is None else x - _channels(norm, mean, x)


def _spread(norm: Norm, param: jax.Array, x: Any) -> jax.Array:
    """Shapes a scale or bias (..., features) to broadcast against x.

    Leading axes, if any, match x's leading axes. They come from parameters per sample
    or row, and from `jax.vmap` over the parameters.
    """
    lead = param.shape[:-1]
    shape = [1] * x.ndim
    shape[: len(lead)] = lead
    for axis in norm.feature_axes:
        shape[axis] = x.shape[axis]
    return _reshape(param, shape).astype(norm.compute_dtype)


def _weight(norm: Norm, scale: jax.Array | None, x: Any) -> Any:
    """Returns the factor of x_hat, shaped to broadcast against x."""
    return 1 if scale is None else norm.weight(_spread(norm, scale, x))


def _pixel_axes(norm: Norm, own: int = 0) -> list[int]:
    """Returns the axes of S in x[N, S, G, K]: reduced axes that are no feature axes.

    The first `own` axes of x are left out.
    """
    axes = norm.reduction_axes
    return [axis for axis in axes if axis not in norm.feature_axes and axis >= own]


def _sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sum(x, axis=tuple(axes), keepdims=True) if axes else x


# XLA's GPU code sums pixels in one block per sample and 32 channels. Where that makes
# fewer blocks than this, parts of the pixels are summed first, of about so many pixels
# at least.
_ENOUGH_BLOCKS = 1024
_LEAST_PIXELS = 64


def _sums(
    arrays: Sequence[jax.Array], axes: Sequence[int], *, in_parts: bool
) -> Sequence[jax.Array]:
    """Returns `_sum` of each of the arrays, which have one shape.

    `in_parts` is a form for a GPU, where in a few blocks the sums would not only be
    slow. XLA would also write x - mean, or its product with dz, to memory before it
    sums them: GroupNorm of 2 x 64 x 64 x 320 in bfloat16 then moves 16.1 tensors
    forward and backward, and in parts 8.2; flax's moves 17.0 (compiled for an A100).
    """
    shape = arrays[0].shape
    parts = _parts(shape, axes) if in_parts else {}
    if not parts:
        return [_sum(a, axes) for a in arrays]
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
    return [_sum(a, axes) for a in lax.optimization_barrier(sums)]


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
        parts[axis] = _divisor(shape[axis], left)
        left //= parts[axis]
    return parts if math.prod(parts.values()) >= max(wanted / 4, 2) else {}


def _divisor(size: int, most: int) -> int:
    """Returns the largest divisor of a size that is at most `most`, and at least 1."""
    return max((n for n in range(1, most + 1) if size % n == 0), default=1)


def _total(norm: Norm, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns a statistic: sums of the elements that share a mean and are unmasked."""
    return _groups(norm, _sum(_masked(x, mask), norm.reduction_axes))


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    # The 0 is a scalar: jax requires arrays of one shape to have the same sharding.
    return x if mask is None else jnp.where(mask, x, 0)


def _divided(total: jax.Array, count: Count) -> jax.Array:
    """Returns total / count, or 0 where nothing was counted."""
    if isinstance(count, int):
        return total / _factor(max(count, 1))
    count = jnp.asarray(count, total.real.dtype)
    return total / jnp.maximum(count, jnp.ones_like(count))


def _across(norm: Norm, total: Any) -> Any:
    """Returns the total, which may be an int, over all devices that combine."""
    if not norm.over:
        return total
    return lax.psum(total, norm.over, axis_index_groups=norm.groups)


def _mean(norm: Norm, total: jax.Array, count: Count) -> jax.Array:
    """Returns the mean over all devices that combine, from each one's `total`."""
    return _divided(_across(norm, total), count)


def _count(norm: Norm, x: jax.Array, mask: jax.Array | None) -> Count:
    """Counts the local elements per statistic: an int, or with a mask a statistic."""
    if mask is not None:
        ones = jnp.broadcast_to(mask, x.shape)
        return _total(norm, ones.astype(norm.compute_dtype))
    count: Count = 1 if norm.num_groups is None else x.shape[-1] // norm.num_groups
    for axis in norm.reduction_axes:
        count = count * x.shape[axis]
    return count


def _factor(count: Count) -> Any:
    """Returns a count as a factor; an int may be too large for an array of int32."""
    return float(count) if isinstance(count, int) else count


def _abs_squared(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


# --- chunks, for a CPU ----------------------------------------------------------------
# XLA's CPU code materializes arrays of x's size between two of its loops: 16-bit
# numbers as float32, and in a backward the terms that are summed along the last axis.
# Each call allocates this memory anew, and the system maps it page by page, which takes
# more time than all the arithmetic. The arrays of one chunk stay in the cache. Code
# that materializes none takes 1.1 times as long in chunks.

# Maximum size of a chunk of x in `compute_dtype`. Forward and backward time of a
# LayerNorm of 16384 x 128 in float32, over flax's: 0.66 with a quarter of this size,
# 0.65 with half, 0.67 with it, 0.93 in one piece. GroupNorm of 4096 x 128, 2 MiB: 1.5
# with half of it, 1.1 in one piece.
CHUNK_BYTES = 2**21


def _chunks(norm: Norm, x: jax.Array, own: int) -> tuple[int, int] | None:
    """Returns the axis to cut x along and the size of a chunk; None for a single chunk.

    Args:
      norm: the normalization.
      x: the array.
      own: number of leading axes along which scale or bias vary, or dscale and dbias
        keep separate entries.
    """
    axes = [axis for axis in range(own, x.ndim) if axis not in norm.feature_axes]
    if not (axes and isinstance(x.size, int) and x.size):  # symbolic in an export
        return None
    axis = max(axes, key=lambda axis: x.shape[axis])
    row_bytes = x.size // x.shape[axis] * norm.compute_dtype.itemsize
    size = max(CHUNK_BYTES // row_bytes, 1)
    return (axis, size) if size < x.shape[axis] else None


def _is_narrow(norm: Norm, *arrays: jax.Array) -> bool:
    """Tells whether some array has a narrower dtype than the arithmetic."""
    return any(a.dtype.itemsize < norm.compute_dtype.itemsize for a in arrays)


# --- forward --------------------------------------------------------------------------


# Up to mean^2 = 4 var the sum of squares about 0 is used. Subtracting n * mean^2 from
# it loses about three bits of the variance, less than the 16 roundings that tests
# allow.
_NEAR = 4

# Up to so many bytes of x, a second read hits the CPU's cache, while the branch takes
# two more small loops. Times relative to flax, with the branch and with two reads:
# LayerNorm of 8 x 768 in float32 1.09 and 1.02, GroupNorm of 2 x 4 x 4 x 1024 in
# bfloat16 (64 KB) 1.27 and 0.97; but in float32 (128 KB) 1.06 and 1.18, and of 4 x 14 x
# 14 x 32 (98 KB) 1.07 and 1.36.
_SMALL_BYTES = 2**16


def moments(
    norm: Norm,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    tuned_for: TunedFor = None,
    addends: Sequence[jax.Array] = (),
) -> tuple[Count, jax.Array | None, jax.Array]:
    """Returns count, mean and centred sum of squares of the local part of x.

    Args:
      norm: the normalization.
      x: any shape; any float or complex dtype.
      mask: None, or bool of x's rank that broadcasts to x: the elements that count.
      tuned_for: how to avoid a second read of x.
        "cpu", "tpu": centre the squares only if some mean is far from 0, and only for
          that mean. XLA's CPU code then sums x and x^2 side by side, 1.3 times as fast
          as one after the other, in chunks if x has 16 bits. Its TPU code accumulates
          both where x is produced.
        "gpu": centre at an estimate of the mean (`_centred_at_estimate`), since a
          branch costs more on a GPU.
        "gpus": read twice, but compute the mean only once. XLA's GPU code otherwise
          computes the mean of rows again wherever they are centred, also in a backward,
          for which it writes arrays of x's size: LayerNorm of 12288 float32 features
          moves 15.1 tensors forward and backward, and 9.1 with "gpus".
      addends: the arrays that x is the sum of, if it is one. The estimate is then made
        from them, so that XLA's GPU code can add them and sum x in one kernel.

    Returns:
      count: number of elements in each statistic; an int, or an array like `mean` if
        there is a mask.
      mean: statistic in `norm.compute_dtype`, 0 where nothing counts; None without
        centring.
      m2: sum of |x - mean|^2, real.
    """
    count = _count(norm, x, mask)
    if not norm.center:
        return count, None, _add_up(_squares, norm, x, tuned_for, mask)
    estimates = tuned_for == "gpu" and mask is None
    if estimates and (few := _a_few(norm, *(addends or [x]))) is not None:
        return count, *_centred_at_estimate(norm, x, few)
    if tuned_for == "tpu" or (tuned_for == "cpu" and not _is_small(x)):
        return count, *_centred_if_far(norm, x, mask, count, tuned_for)
    mean = _divided(_sum_of_x(norm, x, mask), count)
    if tuned_for == "gpus":
        mean = lax.optimization_barrier(mean)
    return count, mean, _squares(norm, x, mask, mean)


def _sum_of_x(norm: Norm, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return _total(norm, x.astype(norm.compute_dtype), mask)


def _squares(
    norm: Norm, x: jax.Array, mask: jax.Array | None, mean: jax.Array | None = None
) -> jax.Array:
    """Returns the sum of |x - mean|^2, or of |x|^2."""
    return _total(norm, _abs_squared(_centred(norm, x, mean)), mask)


def _add_up(
    sums: Callable[..., Any], norm: Norm, x: jax.Array, tuned_for: TunedFor, *args: Any
) -> Any:
    """Returns sums(norm, x, *args), for a CPU in chunks if x has 16 bits."""
    chunked = tuned_for == "cpu" and _is_narrow(norm, x)
    chunks = _chunks(norm, x, 0) if chunked else None
    of_norm = functools.partial(sums, norm)
    return in_chunks(of_norm, (x, *args), x, *chunks) if chunks else of_norm(x, *args)


def _centred_if_far(
    norm: Norm, x: jax.Array, mask: jax.Array | None, count: Count, tuned_for: TunedFor
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and m2 from sums about 0, or about the mean where it is far from 0.

    Only then x is read again, in a branch.
    """

    def sums(norm: Norm, x: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
        return _sum_of_x(norm, x, mask), _squares(norm, x, mask)

    sum_x, about_0 = _add_up(sums, norm, x, tuned_for, mask)

    def shifted(
        sum_x: jax.Array, about_0: jax.Array, count: Count
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the mean, m2 from the squares about 0, and where that is inexact."""
        mean = _divided(sum_x, count)
        # The product has one use, so that it becomes part of an FMA in every branch.
        m2 = about_0 - _abs_squared(mean) * _factor(count)
        far = about_0 > (1 + _NEAR) * m2
        return mean, m2, far | ~jnp.isfinite(about_0)

    # A branch recomputes what it needs from x and the sums, because its operands are
    # arrays in memory, and each would be a loop of its own.
    def centred() -> jax.Array:
        mean, m2, far = shifted(sum_x, about_0, count)
        return jnp.where(far, _add_up(_squares, norm, x, tuned_for, mask, mean), m2)

    def near() -> jax.Array:
        return shifted(sum_x, about_0, count)[1]

    mean, *_ = shifted(sum_x, about_0, count)
    statistics = sum_x, about_0, count
    if tuned_for == "cpu":
        statistics = _in_short_axes(*statistics)
    *_, far = shifted(*statistics)
    return mean, lax.cond(jnp.any(far), centred, near)


def _in_short_axes(*arrays: Any) -> tuple[Any, ...]:
    """Splits arrays of one shape into axes of at most 32, where factors allow it.

    A number among them stays as it is.

    XLA's CPU code makes one loop of an elementwise function and a sum over such axes,
    and three where an axis is longer. It runs up to 8 loops in sequence, and schedules
    more of them anew in each call: BatchNorm of 4 x 14 x 14 x 128 in float32 takes 1.1
    times flax's time with 8 loops, and took 2.0 with 10.
    """
    size: Any = arrays[0].size
    axes: list[int] = []
    while isinstance(size, int) and size > 32:  # it may be symbolic, in an export
        part = _divisor(size, 32)
        if part == 1:
            break
        axes.append(part)
        size //= part
    # The barrier keeps XLA from joining the axes again.
    return tuple(
        lax.optimization_barrier(a.reshape(*axes, size))
        if isinstance(a, jax.Array)
        else a
        for a in arrays
    )


# One of so many elements is read for an estimate of the mean.
_ESTIMATED_FROM = 32


def _a_few(norm: Norm, x: jax.Array, *others: jax.Array) -> jax.Array | None:
    """Returns 1 in `_ESTIMATED_FROM` elements, or more, of each statistic of the sum.

    None if no axis is reduced, or if sizes are symbolic, in an export.
    """
    sizes = {axis: x.shape[axis] for axis in norm.reduction_axes}
    if not all(isinstance(size, int) for size in sizes.values()):
        return None
    left = _ESTIMATED_FROM
    starts, ends, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for axis, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        part = max(min(size, left), 1)
        left //= part
        if axis == x.ndim - 1:  # adjacent elements share a sector of the memory
            ends[axis] = -(-size // part)
        else:
            # Not the first, which may be a border, and as many as from the first on.
            starts[axis] = min(part // 2, (size - 1) % part)
            strides[axis] = part
    if left == _ESTIMATED_FROM:
        return None
    few = [lax.slice(a, starts, ends, strides) for a in (x, *others)]
    return functools.reduce(jnp.add, few)


def _centred_at_estimate(
    norm: Norm, x: jax.Array, few: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and m2 from sums about s, the mean of k of the n elements.

        d = sum(x - s),   mean = s + d / n,   m2 = sum((x - s)^2) - d^2 / n

    By Cauchy and Schwarz k (s - mean)^2 <= m2, so that the first term of m2 is at most
    (1 + n / k) m2. The difference loses no bits where the k elements are like the
    others, and log2(1 + n / k) = 5 bits at most, whatever x is.
    """
    n, k = _count(norm, x, None), _count(norm, few, None)
    estimate = _divided(_total(norm, few.astype(norm.compute_dtype)), k)
    centred = _centred(norm, x, estimate)
    terms = [centred, _abs_squared(centred)]
    sums = _sums(terms, norm.reduction_axes, in_parts=True)
    total, squares = (_groups(norm, each) for each in sums)
    shift = _divided(total, n)
    # s is rounded. If x is constant, only the rounding of s is left, squared.
    m2 = squares - _abs_squared(shift) * _factor(n)
    return estimate + shift, jnp.maximum(m2, 0)


def _is_small(x: jax.Array) -> bool:
    nbytes = math.prod(x.shape) * x.dtype.itemsize
    return isinstance(nbytes, int) and nbytes <= _SMALL_BYTES  # else symbolic, or large


def variance(count: Count, m2: jax.Array) -> jax.Array:
    """Returns m2 / count, or 1 where nothing was counted.

    Nothing is counted if the mask is all false, or if the batch is empty.
    """
    if isinstance(count, int):
        return m2 / _factor(count) if count else jnp.ones_like(m2)
    var = _divided(m2, count)
    return jnp.where(jnp.asarray(count, var.dtype) > 0, var, 1)


def combine(
    norm: Norm, count: Count, mean: jax.Array | None, m2: jax.Array
) -> tuple[Count, jax.Array | None, jax.Array]:
    """Merges each device's `moments` over `norm.over` (Chan et al. 1983, eq. 2.1).

    Each device is weighted by its count, and the squares are shifted to the common mean
    before they are added. The result is that of one device with all the data.

    Args:
      norm: the normalization.
      count, mean, m2: results of `moments` on this device.

    Returns:
      The same three, over all devices that combine.
    """
    if not norm.over:
        return count, mean, m2
    weight = jnp.asarray(_factor(count), m2.dtype)
    total = _across(norm, count if isinstance(count, int) else weight)
    if mean is None:
        return total, None, _across(norm, m2)
    common = _divided(_across(norm, mean * weight), total)
    shift = _abs_squared(mean - common) * weight
    return total, common, _across(norm, m2 + shift)


def over_devices(
    norm: Norm, x: jax.Array, mean: jax.Array | None, var: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Combines the mean and var of each device's x over all devices that combine."""
    count = _count(norm, x, None)
    count, mean, m2 = combine(norm, count, mean, var * _factor(count))
    return mean, variance(count, m2)


def apply(
    norm: Norm,
    x: jax.Array,
    mean: jax.Array | None,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    shortcut: jax.Array | None = None,
) -> jax.Array:
    """Computes y = act((x - mean) * rsqrt(var + epsilon) * scale + bias + shortcut).

    Args:
      norm: the normalization.
      x: any shape.
      mean, var: statistics as `moments` and `variance` return them; mean may be None.
      scale, bias: shape (*leading, features), or None. `leading` are the leading axes
        of x along which they vary, if any.
      shortcut: x's shape, or None.

    Returns:
      Array of x's shape and dtype `norm.dtype`.
    """
    z = _affine(norm, x, mean, var, scale, bias, shortcut)
    return activate(norm.activation, z).astype(norm.dtype)


def _affine(
    norm: Norm,
    x: jax.Array,
    mean: jax.Array | None,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    shortcut: jax.Array | None,
) -> jax.Array:
    """Computes z = x_hat * scale + bias + shortcut, in `norm.compute_dtype`."""
    factor = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
    if scale is not None:
        factor = factor * norm.weight(_spread(norm, scale, x))
    z = _centred(norm, x, mean) * factor
    if bias is not None:
        z = z + _spread(norm, bias, x)
    if shortcut is not None:
        z = z + shortcut.astype(norm.compute_dtype)
    return z


def add(x: jax.Array, residual: jax.Array, *, tuned_for: TunedFor = None) -> jax.Array:
    """Computes h = x + residual, rounded to the dtype that the two promote to.

    In half precision XLA may drop a rounding that is followed by arithmetic in float32.
    A backward would then compute another h than the one that the forward normalized. An
    explicit rounding stays, and can be fused. It sets float16's subnormal numbers to 0,
    so there a barrier keeps XLA's own.

    Args:
      x, residual: arrays of the same shape.
      tuned_for: "cpu" lets an optimization barrier keep the rounding, as it does in
        XLA's CPU code, instead of an explicit rounding, which takes longer. A sum and
        RMSNorm of 1464 x 4096 in bfloat16 takes 1.03 times flax's time with the barrier
        and 1.3 with the rounding. Where XLA makes one loop of sum and norm, a barrier
        would break it up.
    """
    h = x + residual
    if jnp.finfo(h.dtype).bits >= 32:
        return h
    if tuned_for == "cpu" or h.dtype == jnp.float16:
        return lax.optimization_barrier(h)
    wide = x.astype(jnp.float32) + residual.astype(jnp.float32)
    to = jnp.finfo(h.dtype)
    return lax.reduce_precision(wide, to.nexp, to.nmant).astype(h.dtype)


def forward(
    norm: Norm,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None = None,
    shortcut: jax.Array | None = None,
    *,
    tuned_for: TunedFor = None,
    addends: Sequence[jax.Array] = (),
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes x.

    Args:
      norm: the normalization.
      x: any shape.
      scale, bias, shortcut: as for `apply`; any real dtype.
      mask: None, or bool of x's rank that broadcasts to x: the elements that enter the
        statistics. All elements are normalized.
      tuned_for, addends: as for `moments`.

    Returns:
      y: x's shape, `norm.dtype`.
      mean: statistic in `norm.compute_dtype`, or None without centring.
      var: statistic. The backward keeps it instead of rstd: rstd = rsqrt(var + epsilon)
        follows from var, but var does not follow from rstd where var is far below
        epsilon.
    """
    here = moments(norm, x, mask, tuned_for=tuned_for, addends=addends)
    count, mean, m2 = combine(norm, *here)
    var = variance(count, m2)
    return apply(norm, x, mean, var, scale, bias, shortcut), mean, var


# --- derivatives ----------------------------------------------------------------------


def tangent(
    norm: Norm,
    x_dot: jax.Array | None,
    scale_dot: jax.Array | None,
    bias_dot: jax.Array | None,
    shortcut_dot: jax.Array | None,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> jax.Array:
    """Returns the derivative of y along the arguments in _dot, where None is zero.

    z_dot = scale * rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot))
            + scale_dot * x_hat + bias_dot + shortcut_dot
    y_dot = act'(z) * z_dot

    `bias` and `shortcut` matter only if there is an activation. The function is linear
    in its first four arrays, and `backward` is its transpose.
    """
    dtype = norm.compute_dtype
    rstd = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
    x_hat = _centred(norm, x, mean) * rstd

    z_dot = jnp.zeros_like(x_hat)
    if x_dot is not None:
        count = _across(norm, _count(norm, x, mask))
        step = x_dot.astype(dtype)
        c1 = _mean(norm, _total(norm, x_hat * step, mask), count)
        inner = step - x_hat * _channels(norm, c1, x)
        if norm.center:
            c2 = _mean(norm, _total(norm, step, mask), count)
            inner = inner - _channels(norm, c2, x)
        z_dot = rstd * inner
        if scale is not None:
            z_dot = z_dot * norm.weight(_spread(norm, scale, x))
    if scale_dot is not None:
        z_dot = z_dot + x_hat * _spread(norm, scale_dot, x)
    if bias_dot is not None:
        z_dot = z_dot + _spread(norm, bias_dot, x)
    if shortcut_dot is not None:
        z_dot = z_dot + shortcut_dot.astype(dtype)
    if norm.activation is not None:
        z = _affine(norm, x, mean, var, scale, bias, shortcut)
        z_dot = through(norm.activation, z, z_dot)
    return z_dot.astype(norm.dtype)


def moments_tangent(
    norm: Norm,
    x_dot: jax.Array,
    x: jax.Array,
    mean: jax.Array | None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """Returns the derivatives of mean and var along x_dot.

    mean_dot = mean(x_dot),  var_dot = 2 * mean((x - mean) * x_dot)
    """
    count = _across(norm, _count(norm, x, mask))
    step = x_dot.astype(norm.compute_dtype)
    mean_dot = None
    if mean is not None:
        mean_dot = _mean(norm, _total(norm, step, mask), count)
    moved = _total(norm, _centred(norm, x, mean) * step, mask)
    return mean_dot, 2 * _mean(norm, moved, count)


def backward(
    norm: Norm,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: jax.Array | None = None,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
    *,
    own_params: int = 0,
    wanted: Sequence[bool] = (True, True, True),
    tuned_for: TunedFor = None,
) -> tuple[Any, Any, Any, jax.Array]:
    """Computes the gradients of <dy, y> with respect to x, scale, bias and shortcut.

    Args:
      norm: the normalization.
      dy: cotangent of y, x's shape.
      x: the input.
      scale: the forward's scale, or None for ones.
      bias, shortcut: those of the forward, or None for zeros; they matter only if there
        is an activation.
      mean, var: statistics of the forward.
      mask: the forward's mask.
      dh: cotangent of x from its other use beside the norm; dx is added to it.
      own_params: number of leading axes of x along which dscale and dbias keep separate
        entries instead of being summed.
      wanted: which of dx, dscale and dbias to compute; the others may be None.
      tuned_for: "cpu" computes sums in chunks, or for small arrays dz, c1 and c2 only
        once. XLA's CPU code otherwise recomputes dz, for example an activation's
        derivative, in each of the loops below, and makes one loop of a row's sums and
        dx. GroupNorm of 1024 x 256 in 32 groups then takes 2.0 times flax's time,
        against 1.2. "gpu" sums pixels in parts (`_sums`).

    Returns:
      dx: x's shape, in x's dtype.
      dscale, dbias: shape (*leading, features), in `norm.compute_dtype`: sums over the
        local part of x. For a scale of x's shape nothing is summed, and dscale has that
        scale's shape and dtype.
      dshortcut: x's shape, in the shortcut's dtype, or in dy's without a shortcut.
    """
    given = dy, x, scale, bias, mean, var, shortcut
    dz = before_activation(norm, *given)
    own = max([own_params, *(p.ndim - 1 for p in (scale, bias) if p is not None)])
    pixel_axes = _pixel_axes(norm)
    of_rows = not pixel_axes or x.ndim - 1 in pixel_axes
    on_cpu = tuned_for == "cpu"
    chunked = on_cpu and (of_rows or _is_narrow(norm, x, dy))
    chunks = _chunks(norm, x, own) if chunked else None
    if on_cpu and not chunks:
        dz = lax.optimization_barrier(dz)
    if chunks:
        sums = _backward_sums_in_chunks(norm, given, own_params, wanted, *chunks)
    else:
        sums = _backward_sums(
            norm, dz, x, scale, mean, var, own_params, in_parts=tuned_for == "gpu"
        )
    dx, dscale, dbias = None, sums.get("dscale"), sums.get("dbias")
    if wanted[0]:
        totals = [sums[name] for name in ("c1", "c2")[: 1 + norm.center]]
        if on_cpu:
            totals = lax.optimization_barrier(totals)
        count = _across(norm, _count(norm, x, mask))
        c1, *rest = [_mean(norm, total, count) for total in totals]
        c2 = rest[0] if rest else None
        dx = input_gradient(norm, dz, x, scale, mean, var, c1, c2, mask, dh)
    if scale is not None and is_per_element(scale, x):
        rstd = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
        each = dz.astype(norm.compute_dtype) * (_centred(norm, x, mean) * rstd)
        dscale = each.astype(scale.dtype)
    dshortcut = dz.astype(dy.dtype if shortcut is None else shortcut.dtype)
    return dx, dscale, dbias, dshortcut


def _backward_sums(
    norm: Norm,
    dz: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    own_params: int,
    *,
    in_parts: bool = False,
) -> dict[str, jax.Array]:
    """Returns n * c1, n * c2 (if centred), dscale and dbias of the local part.

    `in_parts` says how pixels are summed, as in `_sums`.
    """
    dtype = norm.compute_dtype
    # Pixel axes along which neither scale nor bias varies.
    pixel_axes = _pixel_axes(
        norm, max(own_params, 0 if scale is None else scale.ndim - 1)
    )
    other_axes = [axis for axis in norm.reduction_axes if axis not in pixel_axes]

    rstd = lax.rsqrt(var + norm.epsilon)
    wide_dz = dz.astype(dtype)

    # Sum over the pixels first: all that follows needs only these two sums per channel.
    terms = [wide_dz, wide_dz * _centred(norm, x, mean)]
    sum_dz, sum_dz_centred = _sums(terms, pixel_axes, in_parts=in_parts)

    weight = _weight(norm, scale, x)
    sums = {"c1": _groups(norm, _sum(weight * sum_dz_centred, other_axes)) * rstd}
    if norm.center:
        sums["c2"] = _groups(norm, _sum(weight * sum_dz, other_axes))

    # Pixel axes have size 1 by now but are summed again. XLA's CPU code accumulates
    # (samples, 1) in a tree, and (samples,) in a chain, with 1.2 times the rounding
    # error for 32 samples.
    sharing = [a for a in range(own_params, x.ndim) if a not in norm.feature_axes]
    params_shape = (
        *x.shape[:own_params],
        math.prod(x.shape[axis] for axis in norm.feature_axes),
    )
    of_scale = sum_dz_centred * _channels(norm, rstd, x)
    sums["dscale"] = _reshape(_sum(of_scale, sharing), params_shape)
    sums["dbias"] = _reshape(_sum(sum_dz, sharing), params_shape)
    return sums


def _backward_sums_in_chunks(
    norm: Norm,
    given: tuple[Any, ...],
    own_params: int,
    wanted: Sequence[bool],
    axis: int,
    size: int,
) -> dict[str, jax.Array]:
    """Computes the wanted results of `_backward_sums` with `in_chunks`.

    Args:
      norm: the normalization.
      given: dy, x, scale, bias, mean, var and shortcut of `backward`.
      own_params, wanted: as for `backward`.
      axis, size: as `_chunks` returns them.
    """
    wants = dict(zip(("dx", "dscale", "dbias"), wanted, strict=True))
    wants |= {"c1": wants["dx"], "c2": wants["dx"]}

    def sums(*operands: Any) -> dict[str, jax.Array]:
        _, x, scale, _, mean, var, _ = operands
        dz = before_activation(norm, *operands)
        if norm.activation is not None:
            dz = lax.optimization_barrier(dz)  # else each sum recomputes the slope
        found = _backward_sums(norm, dz, x, scale, mean, var, own_params)
        return {name: total for name, total in found.items() if wants[name]}

    return in_chunks(sums, given, given[1], axis, size)


def is_per_element(param: Any, x: Any) -> bool:
    """Tells whether a scale or bias has a separate entry for each element of x."""
    return len(param.shape) > 1 and param.shape == x.shape


def before_activation(
    norm: Norm,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    shortcut: jax.Array | None = None,
) -> jax.Array:
    """Computes dz = dy * act'(z), in `norm.compute_dtype`.

    Without an activation, dz is dy itself. Arguments are those of `backward`.
    """
    if norm.activation is None:
        return dy
    z = _affine(norm, x, mean, var, scale, bias, shortcut)
    return through(norm.activation, z, dy.astype(norm.compute_dtype))


def input_gradient(
    norm: Norm,
    dz: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    c1: jax.Array,
    c2: jax.Array | None,
    mask: jax.Array | None = None,
    dh: jax.Array | None = None,
) -> jax.Array:
    """Computes dx = rstd * (w - c2 - x_hat * c1) + dh, where w = dz * scale.

    This is the elementwise end of `backward`.

    Args:
      norm, x, scale, mean, var, mask, dh: as for `backward`.
      dz: cotangent of z.
      c1: mean(w * x_hat), a statistic.
      c2: mean(w), or None without centring.

    Returns:
      Array of x's shape and dtype.
    """
    dtype = norm.compute_dtype
    rstd = lax.rsqrt(var + norm.epsilon)
    weight = _weight(norm, scale, x)
    # x_hat * c1, with x_hat's rstd multiplied into c1
    through_statistics = _centred(norm, x, mean) * _channels(norm, rstd * c1, x)
    if c2 is not None:
        through_statistics = through_statistics + _channels(norm, c2, x)
    through_statistics = _masked(through_statistics, mask)
    dx = weight * dz.astype(dtype) - through_statistics
    dx = _channels(norm, rstd, x) * dx
    if dh is not None:
        dx = dx + dh.astype(dtype)
    return dx.astype(x.dtype)
