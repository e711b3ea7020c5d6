"""Normalization over any axes, forward and backward, in plain jax.numpy.

Formulas, over the elements that share one mean (a row, a group, a channel):

    mean  = sum(x) / n                       n elements that the mask lets in
    var   = sum((x - mean)^2) / n            centred: no cancellation at large means
    rstd  = 1 / sqrt(var + epsilon)
    x_hat = (x - mean) * rstd
    z     = x_hat * scale + bias             + shortcut, where something is added
    y     = act(z)                           z itself without an activation

    dz     = dy * act'(z)
    w      = dz * scale
    c1     = sum(w * x_hat) / n
    c2     = sum(w) / n
    dx     = rstd * (w - c2 - x_hat * c1)
    dscale = sum(dz * x_hat),  dbias = sum(dz)    over all that share one scale
    dshortcut = dz

RMSNorm leaves the mean out: mean = 0 and c2 = 0. activation.py has act and act'.

Sources: Ioffe and Szegedy 2015 (arXiv:1502.03167), section 3, for the backward with
batch statistics; Ba et al. 2016 (arXiv:1607.06450), eq. 3 and 4; Zhang and Sennrich
2019 (arXiv:1910.07467), eq. 4; Wu and He 2018 (arXiv:1803.08494), eq. 1 to 3; Chan,
Golub and LeVeque 1983 (The American Statistician 37:3), eq. 2.1, for `combine`.

Every function keeps the caller's rank and holds to the caller's axes, so that an array
sharded over devices stays sharded: flattening it to rows would gather it. A statistic
has the rank of x, with size 1 along the axes that were reduced (and one entry a group
along the last axis, where channels are grouped).
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fusednorm.reference.activation import activate, slope
from fusednorm.reference.chunks import in_chunks

# How many elements one statistic counts: a number where the shape tells, an array where
# a mask or other devices have a say.
Count = int | jax.Array

# Whose code the reference goes out of its way for, where one device has all of x.
Sparing = Literal["cpu", "tpu"] | None


@dataclasses.dataclass(frozen=True)
class Norm:
    """What one normalization does to an array, whatever the array's size.

    Attributes:
      reduction_axes: axes of x that share one mean and variance; sorted, none negative.
        With `num_groups` the last axis is not among them: it is split instead.
      feature_axes: axes of x along which scale and bias vary; sorted, none negative.
      num_groups: None, or the number of groups into which the last axis is split, each
        with its own mean and variance (the last axis is the only feature axis then).
      center: whether the mean is subtracted; False is RMSNorm.
      epsilon: added to the variance, inside the square root: a float, or where the
        program computes it an array without axes.
      dtype: dtype of y. Arithmetic is at least float32, and wider where `dtype` is.
      activation: None, or the name of one of `activation.ACTIVATIONS`.
      scale_offset: what is added to the scale, if there is one: 1 where it is kept as
        its distance from 1.
      over: mapped axes (of a mesh, or of `jax.vmap`) over which the statistics are
        combined too: x is one device's part.
      groups: None, or which devices of these axes combine, as for `jax.lax.psum`.
      one_scale: whether all that combine are known to have the same scale.
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
        """Dtype of the arithmetic and the statistics: `dtype`, float32 at least."""
        return at_least_float32(self.dtype)

    def weight(self, scale: Any) -> Any:
        """scale + scale_offset, of a scale in `compute_dtype`."""
        return scale + self.scale_offset if self.scale_offset else scale

    def statistic_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the mean and the variance of an x of `shape`."""
        reduced = [
            1 if axis in self.reduction_axes else n for axis, n in enumerate(shape)
        ]
        if self.num_groups is not None:
            reduced[-1] = self.num_groups
        return tuple(reduced)

    def behind(self, new_axes: int) -> "Norm":
        """The same normalization of an array with `new_axes` more leading axes."""
        return dataclasses.replace(
            self,
            reduction_axes=tuple(axis + new_axes for axis in self.reduction_axes),
            feature_axes=tuple(axis + new_axes for axis in self.feature_axes),
        )


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of arithmetic on floats or complex numbers of a dtype."""
    # jax promotes float8 to nothing by itself, and may be told to promote nothing.
    if dtype.itemsize == 1:
        return jnp.dtype("float32")
    return np.promote_types(dtype, np.float32)


# --- statistics and what they are of --------------------------------------------------
# Arrays keep x's rank and its channels whole: split into groups of 10, as a UNet's are,
# channels would give a CPU loops of 10. Only sums, by then small, are split.


def _reshape(a: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Splits or joins axes. Where types say that an axis is sharded (explicit mode),
    the first of those that it becomes is."""
    sharding = jax.typeof(a).sharding
    if not any(sharding.spec):
        return a.reshape(shape)
    # Elements from an axis on tell which of the new ones begins where it does.
    pairs = zip(_begins(a.shape), sharding.spec, strict=True)
    split = {begin: names for begin, names in pairs if names is not None}
    if not split.keys() <= set(_begins(shape)):
        return a.reshape(shape)  # jax says what it cannot do
    entries = [split.get(begin) for begin in _begins(shape)]
    placed = jax.sharding.PartitionSpec(*entries)
    return lax.reshape(a, tuple(shape), out_sharding=sharding.update(spec=placed))


def _begins(shape: Sequence[int]) -> list[int]:
    """Elements from each axis on; 0 for one of size 1, which begins nothing."""
    return [
        math.prod(shape[axis:]) if size > 1 else 0 for axis, size in enumerate(shape)
    ]


def _channels(norm: Norm, statistic: jax.Array, x: Any) -> jax.Array:
    """A statistic, shaped to broadcast against x: (..., G) -> (..., C) for groups."""
    if norm.num_groups is None:
        return statistic
    *lead, groups = statistic.shape
    each = jnp.broadcast_to(
        jnp.expand_dims(statistic, -1), (*statistic.shape, x.shape[-1] // groups)
    )
    return _reshape(each, (*lead, x.shape[-1]))


def _groups(norm: Norm, per_channel: jax.Array) -> jax.Array:
    """(..., C) -> (..., G), summed over the channels of a group."""
    if norm.num_groups is None:
        return per_channel
    *lead, channels = per_channel.shape
    groups = norm.num_groups
    return jnp.sum(_reshape(per_channel, (*lead, groups, channels // groups)), -1)


def _about(norm: Norm, x: jax.Array, mean: jax.Array | None) -> jax.Array:
    """x - mean, in `norm.compute_dtype`."""
    x = x.astype(norm.compute_dtype)
    return x if mean is None else x - _channels(norm, mean, x)


def _spread(norm: Norm, param: jax.Array, x: Any) -> jax.Array:
    """A scale or bias (..., features), shaped to broadcast against x.

    Leading axes, if any, belong to x's leading axes: those of each sample or row, and
    `jax.vmap` over the parameters.
    """
    lead = param.shape[:-1]
    shape = [1] * x.ndim
    shape[: len(lead)] = lead
    for axis in norm.feature_axes:
        shape[axis] = x.shape[axis]
    return _reshape(param, shape).astype(norm.compute_dtype)


def _weight(norm: Norm, scale: jax.Array | None, x: Any) -> Any:
    """What x_hat is multiplied by, shaped to broadcast against x."""
    return 1 if scale is None else norm.weight(_spread(norm, scale, x))


def _pixel_axes(norm: Norm, own: int = 0) -> list[int]:
    """S of x[N, S, G, K]: reduced axes that are no features, from the own-th on."""
    axes = norm.reduction_axes
    return [axis for axis in axes if axis not in norm.feature_axes and axis >= own]


def _sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sum(x, axis=tuple(axes), keepdims=True) if axes else x


def _total(norm: Norm, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """A statistic: the sums of what shares a mean, of what the mask lets in."""
    return _groups(norm, _sum(_masked(x, mask), norm.reduction_axes))


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    # A 0 without axes: jax asks that arrays of one shape are sharded alike.
    return x if mask is None else jnp.where(mask, x, 0)


def _divided(total: jax.Array, count: Count) -> jax.Array:
    """total / count, and 0 where nothing was counted."""
    if isinstance(count, int):
        return total / max(count, 1)
    count = jnp.asarray(count, total.real.dtype)
    return total / jnp.maximum(count, jnp.ones_like(count))


def _across(norm: Norm, total: Any) -> Any:
    """The total over all devices that combine; of an int too."""
    if not norm.over:
        return total
    return lax.psum(total, norm.over, axis_index_groups=norm.groups)


def _mean(norm: Norm, total: jax.Array, count: Count) -> jax.Array:
    """Of all devices that combine, from what was added up on each."""
    return _divided(_across(norm, total), count)


def _count(norm: Norm, x: jax.Array, mask: jax.Array | None) -> Count:
    """Elements per statistic here: like a statistic, where it is an array."""
    if mask is not None:
        ones = jnp.broadcast_to(mask, x.shape)
        return _total(norm, ones.astype(norm.compute_dtype))
    count: Count = 1 if norm.num_groups is None else x.shape[-1] // norm.num_groups
    for axis in norm.reduction_axes:
        count = count * x.shape[axis]
    return count


def _abs_squared(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


# --- chunks, for a CPU ----------------------------------------------------------------
# Between two of its loops XLA's CPU code leaves arrays of x's size: 16 bits as float32,
# and in a backward what is added up along the last axis. New memory in each call, which
# the system gives page by page, they take more time than all arithmetic; of a chunk
# they stay in the cache. What leaves none takes 1.1 times as long in chunks.

# Of x in `compute_dtype`. Times of LayerNorm of 16384 x 128, float32, forward and
# backward, of flax's: with a quarter of it 0.66, with half 0.65, so 0.67, in one piece
# 0.93. GroupNorm of 4096 x 128, 2 MiB: with half of it 1.5, in one piece 1.1.
CHUNK_BYTES = 2**21


def _chunks(norm: Norm, x: jax.Array, own: int) -> tuple[int, int] | None:
    """(axis, size) of chunks of x, or None if it is one.

    Args:
      norm: what to normalize over.
      x: the array.
      own: leading axes along which scale or bias vary, or add up by themselves.
    """
    axes = [axis for axis in range(own, x.ndim) if axis not in norm.feature_axes]
    if not (axes and isinstance(x.size, int) and x.size):  # none in an export for any
        return None
    axis = max(axes, key=lambda axis: x.shape[axis])
    row_bytes = x.size // x.shape[axis] * norm.compute_dtype.itemsize
    size = max(CHUNK_BYTES // row_bytes, 1)
    return (axis, size) if size < x.shape[axis] else None


def _is_narrow(norm: Norm, *arrays: jax.Array) -> bool:
    """Whether the arithmetic is on wider numbers than some array has."""
    return any(a.dtype.itemsize < norm.compute_dtype.itemsize for a in arrays)


# --- forward --------------------------------------------------------------------------


# Up to mean^2 = 4 var the sum of squares about 0 serves: taking n * mean^2 from it
# loses about three binary digits of the variance, less than the 16 roundings that tests
# allow.
_NEAR = 4


def moments(
    norm: Norm,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    sparing: Sparing = None,
) -> tuple[Count, jax.Array | None, jax.Array]:
    """Count, mean and centred sum of squares of x, of what is here.

    Args:
      norm: what to normalize over.
      x: any shape; any float or complex dtype.
      mask: None, or bool of x's rank that broadcasts to x: which elements count.
      sparing: centre the squares only if some mean is far from 0, and only its own.
        XLA's CPU code then sums x and x^2 side by side, 1.3 times as fast as one after
        the other, in chunks if they have 16 bits; its TPU code adds up both where x is
        made. Not for GPUs, where a branch costs more, nor where XLA partitions x.

    Returns:
      count: elements in each statistic; an int, or with a mask an array like `mean`.
      mean: statistic in `norm.compute_dtype`, 0 where nothing counts; None without
        centring.
      m2: sum of |x - mean|^2, real.
    """
    count = _count(norm, x, mask)
    chunked = sparing == "cpu" and _is_narrow(norm, x)
    chunks = _chunks(norm, x, 0) if chunked else None

    def total(x: jax.Array, mask: Any) -> jax.Array:
        return _total(norm, x.astype(norm.compute_dtype), mask)

    def squares(x: jax.Array, mask: Any, mean: Any = None) -> jax.Array:
        return _total(norm, _abs_squared(_about(norm, x, mean)), mask)

    def both(x: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
        return total(x, mask), squares(x, mask)

    def add_up(sums: Callable[..., Any], *operands: Any) -> Any:
        return in_chunks(sums, operands, x, *chunks) if chunks else sums(*operands)

    if not norm.center:
        return count, None, add_up(squares, x, mask)
    if not sparing:
        mean = _divided(total(x, mask), count)
        return count, mean, squares(x, mask, mean)
    sum_x, about_0 = add_up(both, x, mask)
    mean = _divided(sum_x, count)
    square = _abs_squared(mean) * count
    about_0 = about_0 - square
    far = square > _NEAR * about_0

    def centred() -> jax.Array:
        # In a branch, from x itself: what a branch is given is kept in memory.
        return jnp.where(far, add_up(squares, x, mask, mean), about_0)

    return count, mean, lax.cond(jnp.any(far), centred, lambda: about_0)


def variance(count: Count, m2: jax.Array) -> jax.Array:
    """m2 / count, and 1 where nothing was counted: a mask all false, an empty batch."""
    if isinstance(count, int):
        return m2 / count if count else jnp.ones_like(m2)
    var = _divided(m2, count)
    return jnp.where(jnp.asarray(count, var.dtype) > 0, var, 1)


def combine(
    norm: Norm, count: Count, mean: jax.Array | None, m2: jax.Array
) -> tuple[Count, jax.Array | None, jax.Array]:
    """Merges each device's `moments` over `norm.over` (Chan et al. 1983, eq. 2.1).

    Devices weigh in with their counts, and the squares are moved to the common mean
    before they are added. So the result is that of one device with all the data.

    Args:
      norm: what was normalized over.
      count, mean, m2: as `moments` returned them on this device.

    Returns:
      The same three, over all devices that combine.
    """
    if not norm.over:
        return count, mean, m2
    weight = jnp.asarray(count, m2.dtype)
    total = _across(norm, count if isinstance(count, int) else weight)
    if mean is None:
        return total, None, _across(norm, m2)
    common = _divided(_across(norm, mean * weight), total)
    shift = _abs_squared(mean - common) * weight
    return total, common, _across(norm, m2 + shift)


def over_devices(
    norm: Norm, x: jax.Array, mean: jax.Array | None, var: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """mean and var of all devices that combine, from those of each one's x."""
    count = _count(norm, x, None)
    count, mean, m2 = combine(norm, count, mean, var * count)
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
    """y = act((x - mean) * rsqrt(var + epsilon) * scale + bias + shortcut).

    Args:
      norm: what was normalized over.
      x: any shape.
      mean, var: statistics as `moments` and `variance` return them; mean may be None.
      scale, bias: shape (features,), or None; with leading axes of x before it where
        they vary along these.
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
    """z = x_hat * scale + bias + shortcut, in `norm.compute_dtype`."""
    factor = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
    if scale is not None:
        factor = factor * norm.weight(_spread(norm, scale, x))
    z = _about(norm, x, mean) * factor
    if bias is not None:
        z = z + _spread(norm, bias, x)
    if shortcut is not None:
        z = z + shortcut.astype(norm.compute_dtype)
    return z


def add(x: jax.Array, residual: jax.Array, *, sparing: Sparing = None) -> jax.Array:
    """h = x + residual, rounded to the dtype that the two promote to.

    In half precision XLA may leave out a rounding that is followed by arithmetic in
    float32: a backward would then find another h than the forward normalized.

    Args:
      x, residual: of one shape.
      sparing: of "cpu", let a barrier keep the rounding, as XLA's CPU code does it, and
        not one by name, which takes more: sum and RMSNorm of 1464 x 4096 in bfloat16
        1.03 against 1.3 times flax's time. Where XLA makes one loop of sum and norm a
        barrier would break it up.
    """
    h = x + residual
    if jnp.finfo(h.dtype).bits >= 32:
        return h
    if sparing == "cpu":
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
    sparing: Sparing = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Normalizes x.

    Args:
      norm: what to normalize over.
      x: any shape.
      scale, bias, shortcut: as for `apply`; any real dtype.
      mask: None, or bool of x's rank that broadcasts to x: the elements that the
        statistics are taken from. All elements are normalized.
      sparing: as for `moments`.

    Returns:
      y: x's shape, `norm.dtype`.
      mean: statistic in `norm.compute_dtype`, or None without centring.
      var: statistic. It is what the backward keeps: rstd = rsqrt(var + epsilon) follows
        from it, while var would not follow from rstd where var is far below epsilon.
    """
    here = moments(norm, x, mask, sparing=sparing)
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
    """The derivative of y along the arguments that end in _dot; None is a zero.

    z_dot = scale * rstd * (x_dot - mean(x_dot) - x_hat * mean(x_hat * x_dot))
            + scale_dot * x_hat + bias_dot + shortcut_dot
    y_dot = act'(z) * z_dot

    `bias` and `shortcut` matter to an activation alone.

    Linear in its first four arguments; `backward` is its transpose.
    """
    dtype = norm.compute_dtype
    rstd = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
    x_hat = _about(norm, x, mean) * rstd

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
        z_dot = z_dot * slope(norm.activation, z)
    return z_dot.astype(norm.dtype)


def moments_tangent(
    norm: Norm,
    x_dot: jax.Array,
    x: jax.Array,
    mean: jax.Array | None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """The derivatives of mean and var along x_dot.

    mean_dot = mean(x_dot),  var_dot = 2 * mean((x - mean) * x_dot)
    """
    count = _across(norm, _count(norm, x, mask))
    step = x_dot.astype(norm.compute_dtype)
    mean_dot = None
    if mean is not None:
        mean_dot = _mean(norm, _total(norm, step, mask), count)
    moved = _total(norm, _about(norm, x, mean) * step, mask)
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
    sparing: Sparing = None,
) -> tuple[Any, Any, Any, jax.Array]:
    """Gradients of <dy, y> with respect to x, scale, bias and shortcut.

    Args:
      norm: what was normalized over.
      dy: cotangent of y, x's shape.
      x: the input.
      scale: that of the forward, or None for ones.
      bias, shortcut: likewise, or None for zeros; they matter to an activation alone.
      mean, var: statistics of the forward.
      mask: that of the forward.
      dh: cotangent of x itself, where it goes on beside the norm; dx is added to it.
      own_params: how many leading axes of x keep a dscale and dbias of their own,
        rather than add up into one.
      wanted: which of dx, dscale and dbias; the others may be None.
      sparing: of "cpu", find sums in chunks, or of small arrays compute dz, c1 and c2
        once each. XLA's CPU code otherwise repeats what made dz, such as an
        activation's derivative, in each of the loops below; and it makes one loop of a
        row's sums and dx: GroupNorm of 1024 x 256 in 32 groups 2.0 against 1.2 times
        flax's time.

    Returns:
      dx: x's shape, in x's dtype.
      dscale, dbias: shape (*leading, features), in `norm.compute_dtype`: the sums over
        what is here. Of a scale of x's shape nothing adds up, and dscale has its shape
        and dtype.
      dshortcut: x's shape, in the shortcut's dtype, or dy's without one.
    """
    given = dy, x, scale, bias, mean, var, shortcut
    dz = before_activation(norm, *given)
    own = max([own_params, *(p.ndim - 1 for p in (scale, bias) if p is not None)])
    pixel_axes = _pixel_axes(norm)
    of_rows = not pixel_axes or x.ndim - 1 in pixel_axes
    chunked = sparing and (of_rows or _is_narrow(norm, x, dy))
    chunks = _chunks(norm, x, own) if chunked else None
    if sparing and not chunks:
        dz = lax.optimization_barrier(dz)
    if chunks:
        sums = _backward_sums_in_chunks(norm, given, own_params, wanted, *chunks)
    else:
        sums = _backward_sums(norm, dz, x, scale, mean, var, own_params)
    dx, dscale, dbias = None, sums.get("dscale"), sums.get("dbias")
    if wanted[0]:
        totals = [sums[name] for name in ("c1", "c2")[: 1 + norm.center]]
        if sparing:
            totals = lax.optimization_barrier(totals)
        count = _across(norm, _count(norm, x, mask))
        c1, *rest = [_mean(norm, total, count) for total in totals]
        c2 = rest[0] if rest else None
        dx = input_gradient(norm, dz, x, scale, mean, var, c1, c2, mask, dh)
    if scale is not None and each_its_own(scale, x):
        rstd = _channels(norm, lax.rsqrt(var + norm.epsilon), x)
        each = dz.astype(norm.compute_dtype) * (_about(norm, x, mean) * rstd)
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
) -> dict[str, jax.Array]:
    """n * c1, n * c2 (if centred), dscale and dbias, of what is here."""
    dtype = norm.compute_dtype
    # Without what scale or bias varies along.
    pixel_axes = _pixel_axes(
        norm, max(own_params, 0 if scale is None else scale.ndim - 1)
    )
    other_axes = [axis for axis in norm.reduction_axes if axis not in pixel_axes]

    rstd = lax.rsqrt(var + norm.epsilon)
    wide_dz = dz.astype(dtype)

    # Down the pixels first: these two sums per channel serve all that follows.
    sum_dz = _sum(wide_dz, pixel_axes)
    sum_dz_centred = _sum(wide_dz * _about(norm, x, mean), pixel_axes)

    weight = _weight(norm, scale, x)
    sums = {"c1": _groups(norm, _sum(weight * sum_dz_centred, other_axes)) * rstd}
    if norm.center:
        sums["c2"] = _groups(norm, _sum(weight * sum_dz, other_axes))

    # Pixels, by now of size 1, are summed again: XLA's CPU code adds up (samples, 1) in
    # a tree and (samples,) in a chain, with 1.2 times the error for 32 samples.
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
    """Those of `_backward_sums` that are wanted, by `in_chunks`.

    Args:
      norm: what to normalize over.
      given: dy, x, scale, bias, mean, var and shortcut of `backward`.
      own_params, wanted: as for `backward`.
      axis, size: as `_chunks` has them.
    """
    wants = dict(zip(("dx", "dscale", "dbias"), wanted, strict=True))
    wants |= {"c1": wants["dx"], "c2": wants["dx"]}

    def sums(*operands: Any) -> dict[str, jax.Array]:
        _, x, scale, _, mean, var, _ = operands
        dz = before_activation(norm, *operands)
        if norm.activation is not None:
            dz = lax.optimization_barrier(dz)  # or each sum computes its derivative
        found = _backward_sums(norm, dz, x, scale, mean, var, own_params)
        return {name: total for name, total in found.items() if wants[name]}

    return in_chunks(sums, given, given[1], axis, size)


def each_its_own(param: Any, x: Any) -> bool:
    """Whether each element of x has its own scale or bias."""
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
    """dz = dy * act'(z), in `norm.compute_dtype`; dy itself without an activation.

    Arguments are those of `backward`.
    """
    if norm.activation is None:
        return dy
    z = _affine(norm, x, mean, var, scale, bias, shortcut)
    return dy.astype(norm.compute_dtype) * slope(norm.activation, z)


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
    """dx = rstd * (w - c2 - x_hat * c1) + dh, w = dz * scale: the elementwise end of
    `backward`.

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
    # with rstd drawn out of x_hat
    through_statistics = _about(norm, x, mean) * _channels(norm, rstd * c1, x)
    if c2 is not None:
        through_statistics = through_statistics + _channels(norm, c2, x)
    through_statistics = _masked(through_statistics, mask)
    dx = weight * dz.astype(dtype) - through_statistics
    dx = _channels(norm, rstd, x) * dx
    if dh is not None:
        dx = dx + dh.astype(dtype)
    return dx.astype(x.dtype)
