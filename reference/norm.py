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

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fusednorm.reference import reduce
from fusednorm.reference.activation import activate, times_slope
from fusednorm.reference.chunks import chunks_of, in_chunks, is_narrow
from fusednorm.reference.spec import Norm, TunedFor
from fusednorm.reference.statistics import combine, moments, variance

# --- forward --------------------------------------------------------------------------


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
    factor = reduce.channels(norm, lax.rsqrt(var + norm.epsilon), x)
    if scale is not None:
        factor = factor * norm.weight(reduce.spread(norm, scale, x))
    z = reduce.centred(norm, x, mean) * factor
    if bias is not None:
        z = z + reduce.spread(norm, bias, x)
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
    local = moments(norm, x, mask, tuned_for=tuned_for, addends=addends)
    count, mean, m2 = combine(norm, *local)
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
    rstd = reduce.channels(norm, lax.rsqrt(var + norm.epsilon), x)
    x_hat = reduce.centred(norm, x, mean) * rstd

    z_dot = jnp.zeros_like(x_hat)
    if x_dot is not None:
        count = reduce.across(norm, reduce.count(norm, x, mask))
        step = x_dot.astype(dtype)
        c1 = reduce.mean(norm, reduce.total(norm, x_hat * step, mask), count)
        inner = step - x_hat * reduce.channels(norm, c1, x)
        if norm.center:
            c2 = reduce.mean(norm, reduce.total(norm, step, mask), count)
            inner = inner - reduce.channels(norm, c2, x)
        z_dot = rstd * inner
        if scale is not None:
            z_dot = z_dot * norm.weight(reduce.spread(norm, scale, x))
    if scale_dot is not None:
        z_dot = z_dot + x_hat * reduce.spread(norm, scale_dot, x)
    if bias_dot is not None:
        z_dot = z_dot + reduce.spread(norm, bias_dot, x)
    if shortcut_dot is not None:
        z_dot = z_dot + shortcut_dot.astype(dtype)
    if norm.activation is not None:
        z = _affine(norm, x, mean, var, scale, bias, shortcut)
        z_dot = times_slope(norm.activation, z, z_dot)
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
    count = reduce.across(norm, reduce.count(norm, x, mask))
    step = x_dot.astype(norm.compute_dtype)
    mean_dot = None
    if mean is not None:
        mean_dot = reduce.mean(norm, reduce.total(norm, step, mask), count)
    moved = reduce.total(norm, reduce.centred(norm, x, mean) * step, mask)
    return mean_dot, 2 * reduce.mean(norm, moved, count)


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
        against 1.2. "gpu" sums pixels in parts (`reduce.sums_over`).

    Returns:
      dx: x's shape, in x's dtype.
      dscale, dbias: shape (*leading, features), in `norm.compute_dtype`: sums over the
        local part of x. For a scale of x's shape nothing is summed, and dscale has that
        scale's shape and dtype.
      dshortcut: x's shape, in the shortcut's dtype, or in dy's without a shortcut.
    """
    operands = dy, x, scale, bias, mean, var, shortcut
    dz = before_activation(norm, *operands)
    leads = [p.ndim - 1 for p in (scale, bias) if p is not None]
    on_cpu = tuned_for == "cpu"
    chunks = None
    if on_cpu and _gains_from_chunks(norm, x, dy):
        chunks = chunks_of(norm, x, max([own_params, *leads]))
    if on_cpu and not chunks:
        dz = lax.optimization_barrier(dz)
    if chunks:
        sums = _backward_sums_in_chunks(norm, operands, own_params, wanted, *chunks)
    else:
        sums = _backward_sums(
            norm, dz, x, scale, mean, var, own_params, in_parts=tuned_for == "gpu"
        )
    dx, dscale, dbias = None, sums.get("dscale"), sums.get("dbias")
    if wanted[0]:
        totals = [sums[name] for name in ("c1", "c2")[: 1 + norm.center]]
        if on_cpu:
            totals = lax.optimization_barrier(totals)
        count = reduce.across(norm, reduce.count(norm, x, mask))
        c1, *rest = [reduce.mean(norm, total, count) for total in totals]
        c2 = rest[0] if rest else None
        dx = input_gradient(norm, dz, x, scale, mean, var, c1, c2, mask, dh)
    if scale is not None and is_per_element(scale, x):
        rstd = reduce.channels(norm, lax.rsqrt(var + norm.epsilon), x)
        each = dz.astype(norm.compute_dtype) * (reduce.centred(norm, x, mean) * rstd)
        dscale = each.astype(scale.dtype)
    dshortcut = dz.astype(dy.dtype if shortcut is None else shortcut.dtype)
    return dx, dscale, dbias, dshortcut


def _gains_from_chunks(norm: Norm, x: jax.Array, dy: jax.Array) -> bool:
    """Returns whether a CPU's backward is faster in chunks.

    Times relative to flax, with and without: BatchNorm of 64 x 128 x 512 in float32,
    channels first, 1.5 and 0.84; LayerNorm over both axes of 128 x 128, 64 samples, 2.1
    and 1.0 in float32, 1.7 and 0.9 in bfloat16.
    """
    if not reduce.pixel_axes(norm):
        return len(norm.reduction_axes) <= 1
    return is_narrow(norm, x, dy)


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

    `in_parts` says how pixels are summed, as in `reduce.sums_over`.
    """
    dtype = norm.compute_dtype
    # Pixel axes along which neither scale nor bias varies.
    pixel_axes = reduce.pixel_axes(
        norm, max(own_params, 0 if scale is None else scale.ndim - 1)
    )
    other_axes = [axis for axis in norm.reduction_axes if axis not in pixel_axes]

    rstd = lax.rsqrt(var + norm.epsilon)
    wide_dz = dz.astype(dtype)

    # Sum over the pixels first: all that follows needs only these two sums per channel.
    terms = [wide_dz, wide_dz * reduce.centred(norm, x, mean)]
    sum_dz, sum_dz_centred = reduce.sums_over(terms, pixel_axes, in_parts=in_parts)

    weight = reduce.weight(norm, scale, x)

    def over_groups(per_channel: jax.Array) -> jax.Array:
        return reduce.groups(norm, reduce.sum_over(per_channel, other_axes))

    sums = {"c1": over_groups(weight * sum_dz_centred) * rstd}
    if norm.center:
        sums["c2"] = over_groups(weight * sum_dz)

    # Pixel axes have size 1 by now but are summed again. XLA's CPU code accumulates
    # (samples, 1) in a tree, and (samples,) in a chain, with 1.2 times the rounding
    # error for 32 samples.
    sharing = [a for a in range(own_params, x.ndim) if a not in norm.feature_axes]
    params_shape = (
        *x.shape[:own_params],
        math.prod(x.shape[axis] for axis in norm.feature_axes),
    )
    of_scale = sum_dz_centred * reduce.channels(norm, rstd, x)
    sums["dscale"] = reduce.reshape(reduce.sum_over(of_scale, sharing), params_shape)
    sums["dbias"] = reduce.reshape(reduce.sum_over(sum_dz, sharing), params_shape)
    return sums


def _backward_sums_in_chunks(
    norm: Norm,
    operands: tuple[Any, ...],
    own_params: int,
    wanted: Sequence[bool],
    axis: int,
    size: int,
) -> dict[str, jax.Array]:
    """Computes the wanted results of `_backward_sums` with `in_chunks`.

    Args:
      norm: the normalization.
      operands: dy, x, scale, bias, mean, var and shortcut of `backward`.
      own_params, wanted: as for `backward`.
      axis, size: as `chunks_of` returns them.
    """
    wants = dict(zip(("dx", "dscale", "dbias"), wanted, strict=True))
    wants |= {"c1": wants["dx"], "c2": wants["dx"]}

    def sums(*part: Any) -> dict[str, jax.Array]:
        _, x, scale, _, mean, var, _ = part
        dz = before_activation(norm, *part)
        if norm.activation is not None:
            dz = lax.optimization_barrier(dz)  # else each sum recomputes the slope
        totals = _backward_sums(norm, dz, x, scale, mean, var, own_params)
        return {name: total for name, total in totals.items() if wants[name]}

    return in_chunks(sums, operands, operands[1], axis, size)


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
    return times_slope(norm.activation, z, dy.astype(norm.compute_dtype))


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
    weight = reduce.weight(norm, scale, x)
    # x_hat * c1, with x_hat's rstd multiplied into c1
    centred = reduce.centred(norm, x, mean)
    through_statistics = centred * reduce.channels(norm, rstd * c1, x)
    if c2 is not None:
        through_statistics = through_statistics + reduce.channels(norm, c2, x)
    through_statistics = reduce.masked(through_statistics, mask)
    dx = weight * dz.astype(dtype) - through_statistics
    dx = reduce.channels(norm, rstd, x) * dx
    if dh is not None:
        dx = dx + dh.astype(dtype)
    return dx.astype(x.dtype)
