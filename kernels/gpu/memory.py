"""Code that the kernels for NVIDIA GPUs share: chunks of columns, and memory access."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels.cost import estimate
from fusednorm.kernels.dispatch import Call

WARPS = 4  # per warpgroup, which is one thread to Pallas
LANES = 32  # per warp

_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


# --- columns --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Columns of one row that its lanes load together, `vector` columns per lane.

    Attributes:
      start: first column, relative to the first column of the part.
      vector: consecutive columns that a lane loads at once.
      seen: number of leading columns that the chunk before also covers.
    """

    start: int
    vector: int
    seen: int = 0


def cut(width: int, lanes: int, vector: int) -> list[Chunk]:
    """Covers columns [0, width) with chunks; `lanes * vector` is at most `width`.

    Chunks of `lanes * vector` columns may leave a remainder. One narrower chunk that
    begins earlier covers it, if at most a sixteenth of the columns is seen twice, or
    fewer than `lanes`. Otherwise narrower chunks lie side by side,
    each of which costs another sum over lanes.
    """
    chunks: list[Chunk] = []
    start = 0
    while start < width:
        rest = width - start
        if rest >= lanes * vector:
            chunks.append(Chunk(start, vector))
            start += lanes * vector
            continue
        covering = pl.next_power_of_2(pl.cdiv(rest, lanes))
        seen = lanes * covering - rest
        if seen < lanes or seen <= min(width // 16, start):
            chunks.append(Chunk(start - seen, covering, seen))
            break
        vector = covering // 2
    return chunks


# --- memory ---------------------------------------------------------------------------


def load(ref: Any, at: Any, layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Loads ref[at] and converts it to `dtype`."""
    value = plgpu.load(ref.at[at], layout=layout, optimized=False)
    return value.astype(dtype)


def store(ref: Any, at: Any, value: jax.Array) -> None:
    """Stores value to ref[at], in ref's dtype."""
    value = value.astype(ref.dtype)
    if hasattr(plgpu, "store"):
        plgpu.store(ref.at[at], value, optimized=False)
    else:  # jax 0.11
        ref[at] = value


# The interpreter cannot reshape a reference. Tests that use it replace the next two
# functions with ones that reshape the value.


def load_as(
    ref: Any, at: Any, shape: Sequence[int], layout: Any, part: Any = ...
) -> jax.Array:
    """Loads ref[at], in its own dtype, as an array of another shape.

    The shape has the same order of elements. `part` indexes it, to load less.
    """
    here = ref.at[at].reshape(*shape).at[part]
    return plgpu.load(here, layout=layout, optimized=False)


def store_as(
    ref: Any, at: Any, value: jax.Array, shape: Sequence[int] = (), part: Any = ...
) -> None:
    """Stores value to ref[at], or to `part` of it, in another shape: see `load_as`."""
    store(ref.at[at].reshape(*(shape or value.shape)), part, value)


def sum_lanes(value: jax.Array, axis: int) -> jax.Array:
    """Returns the sum over an axis, bitwise the same on all lanes that hold it.

    The reduction is a butterfly: each lane adds another lane's value to its own. If the
    value is a product, LLVM would fuse it with this addition into one FMA. The lane's
    own product would then be rounded together with the sum, but the other lane's before
    it. The lanes' sums would differ in the last bit, and chance would decide which of
    them is stored. Adding 0 keeps the product and the sum apart, unless LLVM knows that
    the product is never -0.0: for squares, see `square`.
    """
    return jnp.sum(value + 0.0, axis=axis)


def square(value: Any) -> Any:
    """Returns value * value, as a product that `sum_lanes` keeps apart from the sum.

    LLVM removes the addition of 0 to x * x, but not to x * (x + 0.0), whose sign it
    does not know.
    """
    return value * (value + 0.0)


@plgpu.inline_mgpu()
def fence(_: Any) -> None:
    """Orders a warp's accesses to device memory, as other multiprocessors see them.

    A cluster barrier does not: its arrive is a release at the scope of its own block
    only. And only some lanes of a warp arrive, for all of it, so the lanes meet here.
    """
    mosaic.inline_ptx(
        "fence.acq_rel.gpu; bar.warp.sync 0xffffffff;", has_side_effects=True
    )


# --- the rest -------------------------------------------------------------------------


def cost(arrays: Sequence[Any]) -> dict[str, Any]:
    """Returns the arguments of `plgpu.kernel` that state its cost: none in jax 0.11."""
    return {"cost_estimate": estimate(arrays)} if _TAKES_COST else {}


def sum_partials(call: Call, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums those of dscale and dbias that are summed, over the blocks of an example.

    Each is (n, features), and n / examples consecutive ones belong to one example. All
    are summed in one kernel; XLA would make one per `jnp.sum`.
    """
    leading = call.x.shape[: call.own_params]
    examples = call.row_groups * math.prod(leading)
    partials = [results[name] for name in call.summed]
    sums = [p.reshape(examples, -1, p.shape[-1]) for p in partials]
    if sums and sums[0].shape[1] > 1:

        def add(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(x + y for x, y in zip(a, b, strict=True))

        zeros = [jnp.zeros((), jnp.float32) for _ in sums]
        sums = lax.reduce(sums, zeros, add, (1,))
    return {
        name: total.reshape(*leading, -1)
        for name, total in zip(call.summed, sums, strict=True)
    }
