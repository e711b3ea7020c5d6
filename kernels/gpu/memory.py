"""What the kernels of NVIDIA GPUs share: chunks of columns, and access to memory."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels.cost import estimate

WARPS = 4  # in a warpgroup, which is one thread to Pallas
LANES = 32  # in a warp

_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


# --- columns -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Columns of one row that its lanes load together, `vector` a lane.

    Attributes:
      start: first column, counted from the first of the part.
      vector: consecutive columns of a lane, one load.
      seen: so many of its first columns lie in the chunk before too.
    """

    start: int
    vector: int
    seen: int = 0


def cut(width: int, lanes: int, vector: int) -> list[Chunk]:
    """Covers columns [0, width); `lanes * vector` are no more than these.

    What `lanes * vector` leaves over is one narrower chunk that begins earlier, if it
    sees no more than a sixteenth of the columns twice; else narrower chunks side by
    side, each of which costs another sum over lanes.
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
        if covering == 1 or seen <= min(width // 16, start):
            chunks.append(Chunk(start - seen, covering, seen))
            break
        vector = covering // 2
    return chunks


# --- memory --------------------------------------------------------------------------


def load(ref: Any, at: Any, layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """ref[at] in that dtype."""
    value = plgpu.load(ref.at[at], layout=layout, optimized=False)
    return value.astype(dtype)


def store(ref: Any, at: Any, value: jax.Array) -> None:
    """ref[at] = value, in the dtype of ref."""
    value = value.astype(ref.dtype)
    if hasattr(plgpu, "store"):
        plgpu.store(ref.at[at], value, optimized=False)
    else:  # jax 0.11
        ref[at] = value


# The interpreter cannot reshape a reference: there, tests put functions in the place of
# the next two that reshape the value.


def load_as(ref: Any, at: Any, shape: Sequence[int], layout: Any) -> jax.Array:
    """ref[at] in its own dtype, in another shape of the same order."""
    return plgpu.load(ref.at[at].reshape(*shape), layout=layout, optimized=False)


def store_as(ref: Any, at: Any, value: jax.Array) -> None:
    """ref[at] = value, which has another shape of the same order."""
    store(ref.at[at].reshape(value.shape), ..., value)


def sum_lanes(value: jax.Array, axis: int) -> jax.Array:
    """The sum over an axis, the same on all lanes that hold it.

    It is added up by a butterfly: each lane adds another one's to its own. LLVM would
    make one FMA of the sum and a product before it, which rounds a lane's own product
    with the sum, and another lane's before: the lanes' sums would differ in the last
    bit, and which of them is stored would be left to chance. The 0 keeps them apart.
    """
    return jnp.sum(value + 0.0, axis=axis)


@plgpu.inline_mgpu()
def fence(_: Any) -> None:
    """Orders device memory for other multiprocessors.

    A barrier of a cluster orders shared memory alone: its arrive is a release for the
    own block.
    """
    mosaic.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)


# --- the rest ------------------------------------------------------------------------


def cost(arrays: Sequence[Any]) -> dict[str, Any]:
    """What `plgpu.kernel` takes to tell XLA of a kernel: nothing in jax 0.11."""
    return {"cost_estimate": estimate(arrays)} if _TAKES_COST else {}


def sum_over_blocks(*partials: jax.Array) -> Sequence[jax.Array]:
    """(examples, blocks, features) -> (examples, features), all in one kernel.

    XLA would make a kernel of each `jnp.sum`.
    """

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = tuple(jnp.zeros((), p.dtype) for p in partials)
    return lax.reduce(partials, zeros, add, (1,))
