"""How a TPU's rowwise kernels cut an array into blocks and chunks.

XLA lays the last two axes of an array in memory into tiles of 8 sublanes times 128
lanes, and chooses as these two those that leave least of the tiles empty
(`order_of_axes`). So the features, which are normalized over, lie in one of two ways:

    AcrossLanes      x[examples, slabs, rows, features]    768 features
    DownSublanes     x[examples, slabs, features, rows]    384 rows of 64 features, for
                                                           64 of 128 lanes were empty

Each is a class with the same methods, by which the kernels in rowwise.py are written
once. A chunk is [rows, features] in one and [features, rows] in the other; what has one
number a row, or one a feature, has size 1 along the other axis.

The features of one array lie in the one way, and those of another, of more rows, in the
other. A row's result is the same to the bit, for both sum its features in one order:

    total[i] = x[i] + x[i + 128] + x[i + 256] + ...    for i < 128
    total[i] += total[i + 64],  then 32, 16, 8, 4, 2, 1

Features that fill whole tiles of 128 lanes never lie down the sublanes, and need not:
they are left to the chip's own sum over lanes.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

# x + NOTHING is x, to the bit; 0 would make 0 of -0.
NOTHING = -0.0


# --- in memory ------------------------------------------------------------------------


def order_of_axes(shape: Sequence[int], itemsize: int, first: int) -> tuple[int, ...]:
    """Axes in the order in which XLA has them in memory, from slowest to fastest.

    The fastest fills lanes, the one before it sublanes. XLA takes those two that make
    the array least after padding, and of several such the last axes. Found so by
    compiling for v4, v5e, v5p, v6e and 7x: 1200 arrays of 2 to 4 axes of 1 to 2880,
    float32, bfloat16 and float16, as arguments of a program; and between matrix
    products, where features are among the two. A kernel that asks for another order has
    x and y copied.

    Args:
      shape: of x, features last.
      itemsize: bytes of an element.
      first: how many leading axes stay in front; and the features are among the last
        two. XLA holds itself to neither.
    """
    features = len(shape) - 1

    def padded(pair: tuple[int, int]) -> int:
        sublane, lane = pair
        tile = SUBLANES
        while tile // 2 >= max(shape[sublane], 4 // itemsize):
            tile //= 2
        rest = math.prod(shape) // (shape[sublane] * shape[lane])
        return rest * round_up(shape[sublane], tile) * round_up(shape[lane], LANES)

    axes = range(features, first - 1, -1)
    pairs = [
        (sublane, lane)
        for lane, sublane in itertools.permutations(axes, 2)
        if features in (sublane, lane)
    ]
    if not pairs:
        return tuple(range(len(shape)))
    last_two = min(pairs, key=padded)
    others = [axis for axis in range(len(shape)) if axis not in last_two]
    return (*others, *last_two)


def inverse(order: Sequence[int]) -> list[int]:
    """The order that a transpose by `order` is undone with."""
    return sorted(range(len(order)), key=lambda axis: order[axis])


# --- features across the lanes --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AcrossLanes:
    """How the view x[examples, slabs, rows, features] is cut.

    Attributes:
      examples: parts of the array with a dscale and dbias of their own.
      slabs: parts of an example.
      rows: rows of a slab.
      features: length of a row.
      block_rows: rows in VMEM at a time; a power of two.
      chunk_rows: rows in registers at a time; a power of two.
    """

    examples: int
    slabs: int
    rows: int
    features: int
    block_rows: int
    chunk_rows: int

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Of x, y, dy and dx."""
        return self.examples, self.slabs, self.rows, self.features

    @property
    def lanes(self) -> int:
        """Features, and what fills their last tile: garbage."""
        return round_up(self.features, LANES)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.examples, self.slabs, pl.cdiv(self.rows, self.block_rows)

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, dy and dx."""
        return pl.BlockSpec(
            (None, None, self.block_rows, self.lanes),
            lambda example, slab, block: (example, slab, block, 0),
        )

    def __str__(self) -> str:
        return f"{self.block_rows} rows of {self.features} features"

    # --- one number a feature ---

    @property
    def of_param(self) -> pl.BlockSpec:
        """For scale and bias [1, features], fetched once."""
        return _of_param(self.lanes)

    @property
    def of_param_gradient(self) -> pl.BlockSpec:
        """For dscale and dbias [examples, 1, features]."""
        return _of_param_gradient(self.lanes)

    @property
    def kept_param(self) -> None:
        """No scratch for scale or bias: they lie as x does."""
        return None

    def keep_param(self, kept: Any, row: jax.Array) -> None:
        raise NotImplementedError("scale and bias lie as x does")

    def for_chunk(self, param: jax.Array) -> jax.Array:
        """[1, lanes], as it is."""
        return param

    @property
    def kept_sum(self) -> Any:
        """Scratch in which dscale or dbias adds up."""
        return pltpu.VMEM((SUBLANES, self.lanes), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """A chunk -> [SUBLANES, lanes]: adds whole registers alone."""
        rows, lanes = value.shape
        return jnp.sum(value.reshape(rows // SUBLANES, SUBLANES, lanes), 0)

    def finish_sum(self, total: Any, result: Any) -> None:
        """[SUBLANES, lanes] -> [1, lanes]."""
        result[...] = jnp.sum(total[...], 0, keepdims=True)

    # --- one number a row ---

    def sum_features(self, value: jax.Array) -> jax.Array:
        """A chunk -> [chunk_rows, 1]."""
        if self.features % LANES == 0:
            return jnp.sum(value, -1, keepdims=True)
        parts = [value[:, i : i + LANES] for i in range(0, self.lanes, LANES)]
        lane = lax.broadcasted_iota(jnp.int32, parts[-1].shape, 1)
        parts[-1] = jnp.where(lane < self.features % LANES, parts[-1], NOTHING)
        total = functools.reduce(operator.add, parts)  # [chunk_rows, LANES]
        # Down the sublanes to be halved, and back. Halved by rotations of lanes, a step
        # of 64 rows of 760 features took 717 cycles on a v5e instead of 467.
        return _halve(total.T).T[:, :1]

    # A statistic is [examples, slabs, 1, rows], its rows along the lanes: 4 bytes a
    # row. As [rows, 1], the shape it has outside, a block of it fills 128 lanes with
    # one number: 512 bytes a row, as much as 256 features in bfloat16.

    @property
    def of_statistic(self) -> pl.BlockSpec:
        lanes = max(self.block_rows, LANES)  # serves one block, or several in turn
        blocks = lanes // self.block_rows
        return pl.BlockSpec(
            (None, None, 1, lanes),
            lambda example, slab, block: (example, slab, 0, lax.div(block, blocks)),
        )

    def put_statistic(self, ref: Any, index: Any, column: jax.Array) -> None:
        """Puts [chunk_rows, 1] into its lanes of [1, lanes]."""
        for rows, tile, mine, diagonal in self._tiles_of(index):
            spread = jnp.where(diagonal, column[rows], 0)  # [tile_rows, LANES]
            row = jnp.sum(spread, 0, keepdims=True)  # [1, LANES]
            ref[:, tile] = jnp.where(mine, row, ref[:, tile])

    def get_statistic(self, ref: Any, index: Any) -> jax.Array:
        """Reads back [chunk_rows, 1]."""
        columns = [
            jnp.sum(jnp.where(diagonal, ref[:, tile], 0), 1, keepdims=True)
            for _, tile, _, diagonal in self._tiles_of(index)
        ]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, 0)

    def _tiles_of(self, index: Any) -> Iterator[tuple[slice, Any, Any, jax.Array]]:
        """Where a chunk's statistics are, tile by tile of LANES.

        Yields:
          rows: those of the chunk that have their statistic in this tile.
          tile: the lanes of the tile.
          mine: bool [1, LANES], which of them these rows have.
          diagonal: bool [tile_rows, LANES], which lane each row has.
        """
        tile_rows = min(self.chunk_rows, LANES)
        for start in range(0, self.chunk_rows, tile_rows):
            row = pl.program_id(2) * self.block_rows + index * self.chunk_rows + start
            row = lax.rem(row, max(self.block_rows, LANES))
            first = lax.rem(row, LANES)
            tile = pl.ds(pl.multiple_of(row - first, LANES), LANES)
            shape = tile_rows, LANES
            own = lax.broadcasted_iota(jnp.int32, shape, 1) - first
            diagonal = own == lax.broadcasted_iota(jnp.int32, shape, 0)
            mine = (own[:1] >= 0) & (own[:1] < tile_rows)
            yield slice(start, start + tile_rows), tile, mine, diagonal

    # --- chunks ---

    def for_each_chunk(self, chunk: Callable[[Any], None]) -> None:
        """Calls chunk(index) for the chunks of this block that have rows."""
        left = self.rows - pl.program_id(2) * self.block_rows
        rows = jnp.minimum(left, self.block_rows)
        chunks = lax.div(rows + self.chunk_rows - 1, self.chunk_rows)
        lax.fori_loop(0, chunks, lambda index, _: chunk(index), None)

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        return pl.ds(
            pl.multiple_of(index * self.chunk_rows, self.chunk_rows), self.chunk_rows
        )

    def is_inside(self, index: Any) -> jax.Array:
        """bool [chunk_rows, 1]: whether the array has this row."""
        first = pl.program_id(2) * self.block_rows + index * self.chunk_rows
        row = lax.broadcasted_iota(jnp.int32, (self.chunk_rows, 1), 0)
        return first + row < self.rows


# --- features down the sublanes -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DownSublanes:
    """How the view x[examples, slabs, features, rows] is cut.

    Attributes:
      examples, slabs, rows, features: as those of `AcrossLanes`.
      block_slabs: slabs in VMEM at a time.
      block_rows: rows of each in VMEM at a time; a multiple of chunk_rows.
      chunk_rows: rows in registers at a time; a multiple of LANES.
    """

    examples: int
    slabs: int
    rows: int
    features: int
    block_slabs: int
    block_rows: int
    chunk_rows: int

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Of x, y, dy and dx."""
        return self.examples, self.slabs, self.features, self.rows

    @property
    def sublanes(self) -> int:
        """Features, and what fills their last register: garbage."""
        return round_up(self.features, SUBLANES)

    @property
    def grid(self) -> tuple[int, int, int]:
        slab_blocks = pl.cdiv(self.slabs, self.block_slabs)
        return self.examples, slab_blocks, pl.cdiv(self.rows, self.block_rows)

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, dy and dx."""
        return pl.BlockSpec(
            (None, self.block_slabs, self.sublanes, self.block_rows),
            lambda example, slab, block: (example, slab, 0, block),
        )

    def __str__(self) -> str:
        return f"{self.block_slabs * self.block_rows} rows of {self.features} features"

    # --- one number a feature ---

    @property
    def of_param(self) -> pl.BlockSpec:
        """For scale and bias [1, features], fetched once."""
        return _of_param(round_up(self.features, LANES))

    @property
    def of_param_gradient(self) -> pl.BlockSpec:
        """For dscale and dbias [examples, 1, features]."""
        return _of_param_gradient(round_up(self.features, LANES))

    @property
    def kept_param(self) -> Any:
        """Scratch for scale or bias, each number in all lanes of its sublane."""
        return pltpu.VMEM((self.sublanes, LANES), jnp.float32)

    def keep_param(self, kept: Any, row: jax.Array) -> None:
        """Puts [1, features] into scratch."""
        kept[...] = memory.as_column(row, self.sublanes)

    def for_chunk(self, param: jax.Array) -> jax.Array:
        """[sublanes, LANES] -> [sublanes, chunk_rows]."""
        return jnp.concatenate([param] * (self.chunk_rows // LANES), 1)

    @property
    def kept_sum(self) -> Any:
        """Scratch in which dscale or dbias adds up."""
        return pltpu.VMEM((self.sublanes, LANES), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """A chunk -> [sublanes, LANES]: adds whole registers alone."""
        tiles = [value[:, i : i + LANES] for i in range(0, self.chunk_rows, LANES)]
        return functools.reduce(operator.add, tiles)

    def finish_sum(self, total: Any, result: Any) -> None:
        """[sublanes, LANES] -> [1, features]."""
        result[...] = memory.as_row(jnp.sum(total[...], 1, keepdims=True))

    # --- one number a row ---

    def sum_features(self, value: jax.Array) -> jax.Array:
        """A chunk -> [1, chunk_rows]."""
        if self.features % SUBLANES:
            feature = lax.broadcasted_iota(jnp.int32, value.shape, 0)
            value = jnp.where(feature < self.features, value, NOTHING)
        total = value[:LANES]
        for start in range(LANES, self.sublanes, LANES):
            total = _add_to_first(total, value[start : start + LANES])
        return _halve(total)[:1]

    @property
    def of_statistic(self) -> pl.BlockSpec:
        """For mean and variance [examples, slabs, 1, rows]."""
        return pl.BlockSpec(
            (None, self.block_slabs, 1, self.block_rows),
            lambda example, slab, block: (example, slab, 0, block),
        )

    def put_statistic(self, ref: Any, index: Any, row: jax.Array) -> None:
        """Puts [1, chunk_rows]."""
        ref[self.place(index)] = row

    def get_statistic(self, ref: Any, index: Any) -> jax.Array:
        """Reads back [1, chunk_rows]."""
        return ref[self.place(index)]

    # --- chunks ---

    def for_each_chunk(self, chunk: Callable[[Any], None]) -> None:
        """Calls chunk(index) for the chunks of this block that have rows."""
        slabs = jnp.minimum(
            self.slabs - pl.program_id(1) * self.block_slabs, self.block_slabs
        )
        rows = jnp.minimum(
            self.rows - pl.program_id(2) * self.block_rows, self.block_rows
        )
        chunks = lax.div(rows + self.chunk_rows - 1, self.chunk_rows)

        def of_slab(slab: Any, _: None) -> None:
            lax.fori_loop(0, chunks, lambda i, _: chunk((slab, i)), None)

        lax.fori_loop(0, slabs, of_slab, None)

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        slab, number = index
        first = pl.multiple_of(number * self.chunk_rows, LANES)
        return slab, slice(None), pl.ds(first, self.chunk_rows)

    def is_inside(self, index: Any) -> jax.Array:
        """bool [1, chunk_rows]: whether the array has this row."""
        first = pl.program_id(2) * self.block_rows + index[1] * self.chunk_rows
        row = lax.broadcasted_iota(jnp.int32, (1, self.chunk_rows), 1)
        return first + row < self.rows


Blocks = AcrossLanes | DownSublanes


# --- both -----------------------------------------------------------------------------


def _halve(total: jax.Array) -> jax.Array:
    """Sums down the sublanes, which are up to LANES.

    Args:
      total: [sublanes, n]; sublanes without a feature hold `NOTHING`, or are left out.

    Returns:
      [SUBLANES, n], whose first sublane has the sums.
    """
    half = LANES // 2
    while half >= SUBLANES:
        total = _add_to_first(total[:half], total[half:])
        half //= 2
    while half >= 1:  # within registers: sublane i gets i + half
        total = total + pltpu.roll(total, SUBLANES - half, 0)
        half //= 2
    return total


def _add_to_first(total: jax.Array, more: jax.Array) -> jax.Array:
    """Adds to as many of the first sublanes as `more` has."""
    count = more.shape[0]
    if count == 0:
        return total
    if count == total.shape[0]:
        return total + more
    return jnp.concatenate([total[:count] + more, total[count:]], 0)


def _of_param(lanes: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, lanes), lambda example, slab, block: (0, 0))


def _of_param_gradient(lanes: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, lanes), lambda example, slab, block: (example, 0, 0))
