"""Evaluates a function of arrays on one part of an axis at a time, for a CPU.

XLA's CPU code materializes arrays of x's size between two of its loops: 16-bit
numbers as float32, and in a backward the terms that are summed along the last axis.
Each call allocates this memory anew, and the system maps it page by page, which takes
more time than all the arithmetic. The arrays of one chunk stay in the cache. Code
that materializes none takes 1.1 times as long in chunks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fusednorm.reference.spec import Norm

# Maximum size of a chunk of x in `compute_dtype`. Forward and backward time of a
# LayerNorm of 16384 x 128 in float32, over flax's: 0.66 with a quarter of this size,
# 0.65 with half, 0.67 with it, 0.93 in one piece. GroupNorm of 4096 x 128, 2 MiB: 1.5
# with half of it, 1.1 in one piece.
CHUNK_BYTES = 2**21


def chunks_of(norm: Norm, x: jax.Array, param_axes: int) -> tuple[int, int] | None:
    """Returns the axis to cut x along and the size of a chunk; None for a single chunk.

    Args:
      norm: the normalization.
      x: the array.
      param_axes: number of leading axes along which scale or bias vary, or dscale and
        dbias keep separate entries.
    """
    axes = [axis for axis in range(param_axes, x.ndim) if axis not in norm.feature_axes]
    if not (axes and isinstance(x.size, int) and x.size):  # symbolic in an export
        return None
    nbytes = x.size * norm.compute_dtype.itemsize
    # The outermost axis makes chunks that are contiguous: BatchNorm of 16 x 64 x 4096
    # in bfloat16, channels first, takes 0.25 of flax's time, and 0.41 cut along 4096.
    short = [axis for axis in axes if nbytes <= CHUNK_BYTES * x.shape[axis]]
    axis = short[0] if short else max(axes, key=lambda axis: x.shape[axis])
    size = max(CHUNK_BYTES * x.shape[axis] // nbytes, 1)
    return (axis, size) if size < x.shape[axis] else None


def is_narrow(norm: Norm, *arrays: jax.Array) -> bool:
    """Tells whether some array has a narrower dtype than the arithmetic."""
    return any(a.dtype.itemsize < norm.compute_dtype.itemsize for a in arrays)


# The most numbers along an axis that are accumulated one by one. XLA's CPU code
# accumulates up to a few hundred numbers in sequence, and more in a tree. When each
# chunk of 256 rows was one sum, dscale of 1465 float32 rows of 2048 features had 1.8
# times flax's rounding error.
IN_A_ROW = 32


def in_chunks(
    fn: Callable[..., Any],
    operands: Sequence[jax.Array | None],
    like: jax.Array,
    axis: int,
    size: int,
) -> Any:
    """Computes fn(*operands) from one chunk of an axis at a time.

    A result that has the length of its chunk along the axis is concatenated with those
    of the other chunks. Any other result is summed over the chunks.

    Args:
      fn: function of arrays. Any of its arguments may be None.
      operands: arrays or None. Those of the rank of `like` that are as long as `like`
        along the axis are cut.
      like: an array with the axis.
      axis: the axis to cut.
      size: maximum size of a chunk. A size down to half of it is used if it divides the
        axis evenly.

    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> in_chunks(lambda x: (x.sum(1, keepdims=True), x.sum(0)), [x], x, axis=0, size=2)
    (Array([[ 1.],
           [ 5.],
           [ 9.],
           [13.],
           [17.]], dtype=float32), Array([20., 25.], dtype=float32))
    """
    length = like.shape[axis]
    even = (s for s in range(size, size // 2, -1) if length % s == 0)
    chunk = next(even, size)
    if length <= chunk:
        return fn(*operands)
    is_cut = [
        a is not None and a.ndim == like.ndim and a.shape[axis] == length
        for a in operands
    ]
    in_axes = [axis if cut else None for cut in is_cut]

    def of_chunk(start: Any, size: int) -> Any:
        """Returns fn of the parts of one chunk, stacked on a new leading axis."""
        part = next(n for n in range(IN_A_ROW, 0, -1) if size % n == 0)

        def split(a: Any) -> jax.Array:
            cut = lax.dynamic_slice_in_dim(a, start, size, axis)
            before, behind = cut.shape[:axis], cut.shape[axis + 1 :]
            return cut.reshape(*before, size // part, part, *behind)

        pairs = zip(operands, is_cut, strict=True)
        return jax.vmap(fn, in_axes)(*[split(a) if cut else a for a, cut in pairs])

    whole = jax.eval_shape(fn, *operands)
    count, rest = divmod(length, chunk)
    first = jax.eval_shape(lambda: of_chunk(0, chunk))
    is_cut_too = jax.tree.map(lambda w, f: w.shape != f.shape[1:], whole, first)

    def room(result: Any, cut: bool) -> jax.Array:
        sums = (count + (rest > 0), *result.shape)  # one per chunk
        return jnp.zeros(result.shape if cut else sums, result.dtype)

    def put(number: Any, results: Any, size: int) -> Any:
        start = number * chunk

        def into(all_: jax.Array, parts: jax.Array, cut: bool) -> jax.Array:
            if cut:  # put the parts back in place of the axis
                one = lax.collapse(jnp.moveaxis(parts, 0, axis), axis, axis + 2)
                return lax.dynamic_update_slice_in_dim(all_, one, start, axis)
            return lax.dynamic_update_index_in_dim(all_, parts.sum(0), number, 0)

        return jax.tree.map(into, results, of_chunk(start, size), is_cut_too)

    results = jax.tree.map(room, whole, is_cut_too)
    results = lax.fori_loop(0, count, lambda i, r: put(i, r, chunk), results)
    if rest:
        results = put(count, results, rest)
    return jax.tree.map(lambda r, cut: r if cut else r.sum(0), results, is_cut_too)
