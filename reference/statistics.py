"""Mean and variance, on one device or combined over several.

XLA's compilers differ in what makes them read x only once, so that there is a form for
each (`TunedFor`). In all of them the variance is centred where the mean is far from 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fusednorm.reference import reduce
from fusednorm.reference.chunks import chunks_of, in_chunks, is_narrow
from fusednorm.reference.reduce import Count
from fusednorm.reference.spec import Norm, TunedFor

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

# So many times as many of x's rows in 16 bits, whose sums are slower. Forward of a
# LayerNorm of 197 x 192 in bfloat16 1.9 and 1.2, 197 x 384 2.2 and 1.0, 128 x 512 0.8
# and 0.9, 16 x 4096 in float16 1.4 and 1.2; but 128 x 1024 (256 KB) 1.1 and 1.2.
_SMALL_NARROW_ROWS = 3


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
    count = reduce.count(norm, x, mask)
    if not norm.center:
        return count, None, _add_up(_squares, norm, x, tuned_for, mask)
    estimates = tuned_for == "gpu" and mask is None
    if estimates and (few := _a_few(norm, *(addends or [x]))) is not None:
        return count, *_centred_at_estimate(norm, x, few)
    if tuned_for == "tpu" or (tuned_for == "cpu" and not _is_small(norm, x)):
        return count, *_centred_if_far(norm, x, mask, count, tuned_for)
    mean = reduce.divided(_sum_of_x(norm, x, mask), count)
    if tuned_for == "gpus":
        mean = lax.optimization_barrier(mean)
    return count, mean, _squares(norm, x, mask, mean)


def _sum_of_x(norm: Norm, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return reduce.total(norm, x.astype(norm.compute_dtype), mask)


def _squares(
    norm: Norm, x: jax.Array, mask: jax.Array | None, mean: jax.Array | None = None
) -> jax.Array:
    """Returns the sum of |x - mean|^2, or of |x|^2."""
    return reduce.total(norm, reduce.abs_squared(reduce.centred(norm, x, mean)), mask)


def _add_up(
    sums: Callable[..., Any], norm: Norm, x: jax.Array, tuned_for: TunedFor, *args: Any
) -> Any:
    """Returns sums(norm, x, *args), for a CPU in chunks if x has 16 bits."""
    chunked = tuned_for == "cpu" and is_narrow(norm, x)
    chunks = chunks_of(norm, x, 0) if chunked else None
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
        mean = reduce.divided(sum_x, count)
        # The product has one use, so that it becomes part of an FMA in every branch.
        m2 = about_0 - reduce.abs_squared(mean) * reduce.factor(count)
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
        part = reduce.divisor(size, 32)
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
    n, k = reduce.count(norm, x, None), reduce.count(norm, few, None)
    estimate = reduce.divided(reduce.total(norm, few.astype(norm.compute_dtype)), k)
    centred = reduce.centred(norm, x, estimate)
    terms = [centred, reduce.abs_squared(centred)]
    sums = reduce.sums_over(terms, norm.reduction_axes, in_parts=True)
    total, squares = (reduce.groups(norm, each) for each in sums)
    shift = reduce.divided(total, n)
    # s is rounded. If x is constant, only the rounding of s is left, squared.
    m2 = squares - reduce.abs_squared(shift) * reduce.factor(n)
    return estimate + shift, jnp.maximum(m2, 0)


def _is_small(norm: Norm, x: jax.Array) -> bool:
    nbytes = math.prod(x.shape) * x.dtype.itemsize
    narrow_rows = x.ndim - 1 in norm.reduction_axes and is_narrow(norm, x)
    most = _SMALL_BYTES * (_SMALL_NARROW_ROWS if narrow_rows else 1)
    return isinstance(nbytes, int) and nbytes <= most  # else symbolic, or large


def variance(count: Count, m2: jax.Array) -> jax.Array:
    """Returns m2 / count, or 1 where nothing was counted.

    Nothing is counted if the mask is all false, or if the batch is empty.
    """
    if isinstance(count, int):
        return m2 / reduce.factor(count) if count else jnp.ones_like(m2)
    var = reduce.divided(m2, count)
    return jnp.where(jnp.asarray(count, var.dtype) > 0, var, 1)


def combine(
    norm: Norm, count: Count, mean: jax.Array | None, m2: jax.Array
) -> tuple[Count, jax.Array | None, jax.Array]:
    """Merges each device's `moments` over `axis_names` (Chan et al. 1983, eq. 2.1).

    Each device is weighted by its count, and the squares are shifted to the common mean
    before they are added. The result is that of one device with all the data.

    Args:
      norm: the normalization.
      count, mean, m2: results of `moments` on this device.

    Returns:
      The same three, over all devices that combine.
    """
    if not norm.axis_names:
        return count, mean, m2
    weight = jnp.asarray(reduce.factor(count), m2.dtype)
    total = reduce.across(norm, count if isinstance(count, int) else weight)
    if mean is None:
        return total, None, reduce.across(norm, m2)
    common = reduce.divided(reduce.across(norm, mean * weight), total)
    shift = reduce.abs_squared(mean - common) * weight
    return total, common, reduce.across(norm, m2 + shift)


def over_devices(
    norm: Norm, x: jax.Array, mean: jax.Array | None, var: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Combines the mean and var of each device's x over all devices that combine."""
    count = reduce.count(norm, x, None)
    count, mean, m2 = combine(norm, count, mean, var * reduce.factor(count))
    return mean, variance(count, m2)
