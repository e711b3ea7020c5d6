"""A function of arrays, of a part of them at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def in_chunks(
    fn: Callable[..., Any],
    operands: Sequence[jax.Array | None],
    like: jax.Array,
    axis: int,
    size: int,
) -> Any:
    """fn(*operands), of so much of an axis at a time.

    What fn returns of a chunk is put behind that of the one before, where its length
    is the chunk's, and else added to it.

    Args:
      fn: of some arrays, or None in the place of one.
      operands: of which those are cut that have the rank of `like`, and its length.
      like: an array with the axis.
      axis: the axis.
      size: of a chunk at most; half of it at least, if that divides the axis evenly.

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
    size = next(even, size)
    if length <= size:
        return fn(*operands)

    def cut(operand: jax.Array | None, start: Any, size: int) -> jax.Array | None:
        if operand is None or operand.ndim != like.ndim:
            return operand
        if operand.shape[axis] != length:
            return operand
        return lax.dynamic_slice_in_dim(operand, start, size, axis)

    def add(start: Any, totals: Any, size: int) -> Any:
        def to(total: jax.Array, more: jax.Array) -> jax.Array:
            if total.shape == more.shape:
                return total + more
            return lax.dynamic_update_slice_in_dim(total, more, start, axis)

        found = fn(*[cut(operand, start, size) for operand in operands])
        return jax.tree.map(to, totals, found)

    whole = jax.eval_shape(fn, *operands)
    totals = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), whole)
    count, rest = divmod(length, size)
    totals = lax.fori_loop(0, count, lambda i, t: add(i * size, t, size), totals)
    return add(count * size, totals, rest) if rest else totals
