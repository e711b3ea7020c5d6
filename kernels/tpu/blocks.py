"""Blocks and chunks into which a TPU's rowwise kernels cut an array.

XLA stores the last two axes of an array in memory in tiles of 8 sublanes by 128 lanes.
It picks the two axes that leave the least of those tiles empty (`order_of_axes`). The
features, which the norm reduces over, therefore have one of two layouts:

    AcrossLanes      x[examples, slabs, rows, features]    768 features
    DownSublanes     x[examples, slabs, features, rows]    384 rows of 64 features:
                                                           across the lanes, 64 of
                                                           128 would be empty

Each layout is a class. Both classes have the same methods, so rowwise.py defines each
kernel once for both. A chunk is [rows, features] across the lanes and [features, rows]
down the sublanes. A value per row is replicated over registers that span LANES (or
SUBLANES) features, so `broadcast` only repeats registers. A third class, `Turned`,
takes rows of up to 128 features that lie across the lanes and transposes them in
registers.

The same features may lie across the lanes in one array and down the sublanes in another
that has more rows. A row's result is bitwise the same in both, because both sum its
features in one order:

    total[i] = x[i] + x[i + 128] + x[i + 256] + ...    for i < 128
    total[i] += total[i + 64],  then 32, 16, 8, 4, 2, 1

Features that fill whole tiles of 128 lanes never lie down the sublanes, so
`AcrossLanes` need not keep this order for them: it leaves the last step to the chip's
own sum over lanes.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

# Up to this many features, a chunk's pieces are unrolled in the code. Longer rows take
# a loop with this many features per turn. Cycles over cycles of HBM traffic, compiled
# for a 7x, bfloat16 backward: RMSNorm of 7168 features takes 1.10 with 2048 per turn
# and 0.98 with 4096 per turn; LayerNorm of 12288 takes 1.35 and 1.29. (On a v5e the
# longer turn takes up to 30 % more, but the ratio is at most 0.5 there.)
UNROLLED = 4096

# Chunks whose dscale and dbias are accumulated before they are added to the example's.
# Rounding error over that of XLA's code for a v5e (simulated, in the order of sums that
# its schedule has), in one level and in two: 30 011 rows of 768 bfloat16 features 1.3
# and 0.6; 65 539 rows of 4096 2.2 and 0.6, in float32 3.4 and 0.7; 2^20 rows of 768 2.9
# and 0.5.
IN_A_ROW = 32

# x + NEGATIVE_ZERO is x bitwise, whereas adding 0 would turn -0 into 0.
NEGATIVE_ZERO = -0.0


# --- in memory ------------------------------------------------------------------------


def order_of_axes(shape: Sequence[int], itemsize: int, leading: int) -> tuple[int, ...]:
    """Returns the axes in the order in which XLA stores them, from slowest to fastest.

    The fastest axis fills lanes, the one before it sublanes. XLA picks the two axes
    that make the array smallest after padding, and on a tie the last ones. This rule
    was found by compiling for v4, v5e, v5p, v6e and 7x: 1200 arrays of 2 to 4 axes of 1
    to 2880, in float32, bfloat16 and float16, as arguments of a program, and arrays
    between matrix products, where the features are among the last two axes. If a kernel
    asks for another order, XLA copies x and y.

    Args:
      shape: shape of x, features last.
      itemsize: bytes per element.
      leading: number of axes that stay in front. The features are always among
        the last two axes. XLA itself observes neither restriction.
    """
    features = len(shape) - 1

    def padded_size(pair: tuple[int, int]) -> int:
        sublane, lane = pair
        tile = SUBLANES
        while tile // 2 >= max(shape[sublane], 4 // itemsize):
            tile //= 2
        rest = math.prod(shape) // (shape[sublane] * shape[lane])
        return rest * round_up(shape[sublane], tile) * round_up(shape[lane], LANES)

    axes = range(features, leading - 1, -1)
    pairs = [
        (sublane, lane)
        for lane, sublane in itertools.permutations(axes, 2)
        if features in (sublane, lane)
    ]
    if not pairs:
        return tuple(range(len(shape)))
    last_two = min(pairs, key=padded_size)
    others = [axis for axis in range(len(shape)) if axis not in last_two]
    return (*others, *last_two)


def inverse(order: Sequence[int]) -> list[int]:
    """Returns the order that undoes a transpose by `order`."""
    return sorted(range(len(order)), key=lambda axis: order[axis])


# --- chunks and pieces ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of a chunk's features.

    Attributes:
      number: index of the piece; inside a loop, its index in the loop's first turn.
      width: features of each preceding piece.
      turn: turn of the loop, which begins after piece 0 and covers UNROLLED features
        per turn; None outside a loop.
    """

    number: int
    width: int
    turn: Any = None

    def cut(self, ref: Any, axis: int, size: int) -> Any:
        """Returns the part of `ref` that holds the piece's features, `size` of them
        along `axis`."""
        before = (slice(None),) * axis
        start = self.number * self.width
        if self.turn is not None:  # one address for the turn's pieces
            first = pl.multiple_of(self.width + self.turn * UNROLLED, LANES)
            ref = ref.at[*before, pl.ds(first, UNROLLED)]
            start -= self.width
        return ref.at[*before, pl.ds(start, size)]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Base class of the layouts: how blocks are cut, fetched and worked through.

    Attributes:
      vmem: bytes of VMEM that a kernel needs.
      examples: parts of the array with a scale, bias, dscale or dbias of their own.
      slabs: parts of an example.
      rows: rows of a slab.
      features: length of a row.
      block_rows: rows of a slab in VMEM at a time; a multiple of chunk_rows.
      chunk_rows: rows that are normalized together.
      block_slabs: slabs in VMEM at a time.
      cores: cores that share an example. Each has blocks of the example's slabs, or of
        its rows if there is only one slab.
      example_cores: cores that each have examples of their own; 1 where cores share
        examples.
      groups: number of groups that take turns with a scale and bias of their own, as
        heads do. Adjacent rows take turns, or adjacent examples where memory has the
        rows of a group together. The value is 1 where rows or examples share a scale
        and bias, or each example has its own.
      period: number of rows after which groups that take turns repeat in whole
        registers. A chunk has a multiple of `period` rows. The value is 1 where all
        rows of a chunk share a scale and bias.
    """

    vmem: int
    examples: int
    slabs: int
    rows: int
    features: int
    block_rows: int
    chunk_rows: int
    _: dataclasses.KW_ONLY
    block_slabs: int = 1
    cores: int = 1
    example_cores: int = 1
    groups: int = 1
    period: int = 1

    # --- blocks ---

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks of an example, along its slabs and along their rows."""
        slabs = pl.cdiv(self.slabs, self.block_slabs)
        return slabs, pl.cdiv(self.rows, self.block_rows)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Grid of the kernel: cores, then per core examples, blocks of slabs and blocks
        of rows."""
        slabs, rows = self.blocks
        if slabs > 1:
            slabs = pl.cdiv(slabs, self.cores)
        elif self.cores > 1:
            rows = round_up(pl.cdiv(rows, self.cores), self.consecutive_blocks)
        examples = self.examples // self.example_cores
        return self.cores * self.example_cores, examples, slabs, rows

    @property
    def consecutive_blocks(self) -> int:
        """Consecutive blocks that one core must have, since they write one block of
        statistics."""
        return 1

    def shared_by(self, cores: int) -> Self:
        """Returns these blocks distributed over `cores` cores.

        Each core gets blocks of every example. If an example has too few blocks, the
        cores divide the examples evenly. If the examples do not divide evenly, one core
        gets everything.
        """
        shared = dataclasses.replace(self, cores=cores)
        first = shared.block_at(cores - 1, 0, 0)  # the last core's first block
        if all(i < n for i, n in zip(first, self.blocks, strict=True)):
            return shared
        if self.examples % cores == 0:
            return dataclasses.replace(self, example_cores=cores)
        return self

    def example_at(self, core: Any, example: Any) -> Any:
        """Returns the index, over all cores, of the example that a grid step has."""
        if self.example_cores > 1:
            example += core * (self.examples // self.example_cores)
        return example

    def block_at(self, core: Any, slab: Any, row: Any) -> tuple[Any, Any]:
        """Returns which of the example's blocks a grid step has. The last core's last
        blocks may lie past the end and have no rows."""
        if self.cores > 1:
            _, _, slabs, rows = self.grid
            if self.blocks[0] > 1:
                slab += core * slabs
            else:
                row += core * rows
        return slab, row

    @property
    def block_number(self) -> tuple[Any, Any]:
        """Which of the example's blocks this grid step has."""
        return self.block_at(*map(pl.program_id, (0, 2, 3)))

    def spec(self, shape: Sequence[Any], at: Callable[..., Any]) -> pl.BlockSpec:
        """Returns the spec of blocks of `shape` with the block indices at(example,
        slab, row)."""

        def index(core: Any, example: Any, *block: Any) -> Any:
            slab, row = self.block_at(core, *block)
            if self.cores > 1:  # past the end, the last block again: no new fetch
                slabs, rows = self.blocks
                row = jnp.where(slab < slabs, jnp.minimum(row, rows - 1), rows - 1)
                slab = jnp.minimum(slab, slabs - 1)
            return at(self.example_at(core, example), slab, row)

        return pl.BlockSpec(tuple(shape), index)

    @property
    def statistic_view(self) -> tuple[int, int, int, int]:
        """Shape in which kernels see mean, variance, c1 and c2."""
        return self.examples, self.slabs, 1, self.rows

    @property
    def lanes(self) -> int:
        """Lanes of a row that holds one value per feature: the features, plus the
        garbage that fills their last tile."""
        return round_up(self.features, LANES)

    def in_tiles(self, count: int) -> bool:
        """Returns whether `count` arrays of one value per feature, together, are
        [features / LANES, LANES].

        So one array lies in HBM as [features] does, while XLA would need a kernel of a
        microsecond to make it one row: if it has 16 bits, or no multiple of 1024
        features. As rows of several arrays, tiles would be padded to SUBLANES.
        """
        return count == self.period == 1 and self.features % LANES == 0

    def param_spec(self, count: int) -> pl.BlockSpec:
        """Returns the spec of scale or bias [count, period, features], fetched once.

        Each of the `count` entries serves an equal number of consecutive examples. If
        examples take turns, it serves every count-th example. One entry may lie
        `in_tiles`.
        """
        if self.in_tiles(count):
            return pl.BlockSpec((self.features // LANES, LANES), lambda *_: (0, 0))

        def index(core: Any, example: Any, *_: Any) -> Any:
            if count == 1:
                return 0, 0, 0
            example = self.example_at(core, example)
            if self.groups > 1:
                return lax.rem(example, count), 0, 0
            return lax.div(example, self.examples // count), 0, 0

        return pl.BlockSpec((None, self.period, self.lanes), index)

    @property
    def param_gradient_view(self) -> tuple[int, int, int, int]:
        """Shape of the partial dscale and dbias, which `sum_partials` sums."""
        shape = self.period, self.features
        if self.in_tiles(self.examples):
            shape = self.features // LANES, LANES
        return self.cores, self.examples, *shape

    @property
    def param_gradient_spec(self) -> pl.BlockSpec:
        """Spec of the partial dscale and dbias."""

        def index(core: Any, example: Any, *_: Any) -> Any:
            sharer = core if self.cores > 1 else 0
            return sharer, self.example_at(core, example), 0, 0

        *_, rows, lanes = self.param_gradient_view
        return pl.BlockSpec((None, None, rows, round_up(lanes, LANES)), index)

    def sum_partials(self, partials: jax.Array, count: int) -> jax.Array:
        """Sums the partial dscale or dbias of all cores, and of the examples or rows
        that share one.

        Args:
          partials: [cores, examples, period, features], or `in_tiles`.
          count: number of results, each of an equal number of consecutive examples.
        """
        if self.cores > 1:
            partials = partials.sum(0)
        if self.groups > 1:
            return partials.reshape(-1, self.groups, self.features).sum(0)
        if count < self.examples:
            partials = partials.reshape(count, -1, self.features).sum(1)
        return partials

    @property
    def chunks_in_a_row(self) -> int:
        """Chunks whose dscale and dbias are accumulated in one run."""
        return IN_A_ROW

    @property
    def steps_in_a_row(self) -> int:
        """Steps of a run: those that have these chunks, or 1 if one has more."""
        return max(self.chunks_in_a_row // self.chunks_of_block, 1)

    # --- chunks ---

    @property
    def chunks_of_block(self) -> int:
        """Chunks of a block that lies inside the array."""
        slab_chunks = pl.cdiv(min(self.rows, self.block_rows), self.chunk_rows)
        return slab_chunks * min(self.slabs, self.block_slabs)

    @property
    def rows_of_slab(self) -> Any:
        """Rows in each of this block's slabs."""
        _, row = self.block_number
        rows = jnp.minimum(self.rows - row * self.block_rows, self.block_rows)
        return jnp.maximum(rows, 0) if self.cores > 1 else rows

    @property
    def chunks_of_slab(self) -> Any:
        """Chunks with rows in each of this block's slabs."""
        return lax.div(self.rows_of_slab + self.chunk_rows - 1, self.chunk_rows)

    @property
    def whole_chunks(self) -> Any:
        """Chunks of this block, which lies in one slab, that have all their rows."""
        whole = lax.div(self.rows_of_slab, self.chunk_rows)
        return jnp.minimum(whole, self.chunks)  # 0 where a core has no slab

    @property
    def chunks(self) -> Any:
        """Chunks of this block that have rows."""
        slab, _ = self.block_number
        if self.cores == 1 or self.slabs == 1:
            return self.chunks_of_slab
        return jnp.where(slab < self.slabs, self.chunks_of_slab, 0)

    @property
    def is_ragged(self) -> bool:
        """Whether a chunk may have fewer rows than it has room for."""
        return self.rows % self.chunk_rows > 0

    @property
    def chunks_per_turn(self) -> int:
        """Chunks per turn of the loop."""
        raise NotImplementedError

    @property
    def looks_ahead(self) -> bool:
        """Whether a turn of the loop prepares the statistics of the next turn's
        chunk."""
        return False

    @property
    def piece_width(self) -> int:
        """Features per piece."""
        return LANES

    @property
    def padded_features(self) -> int:
        """Features plus the garbage that fills their last tile or register."""
        raise NotImplementedError

    @property
    def pieces(self) -> int:
        """Pieces per chunk, each of `piece_width` features; the last one has the
        remainder."""
        return pl.cdiv(self.padded_features, self.piece_width)

    def _size(self, piece: Piece) -> int:
        """Returns the features of a piece."""
        if piece.number == self.pieces - 1 and piece.turn is None:
            return self.padded_features - piece.number * self.piece_width
        return self.piece_width

    def place(self, index: Any) -> Any:
        """Returns where a chunk lies in a block."""
        raise NotImplementedError

    def part(self, ref: Any, piece: Piece) -> Any:
        """Returns the part of `ref` that holds the piece's features."""
        raise NotImplementedError

    def for_each_chunk(
        self,
        chunk: Callable[[Any, int, bool, Any], None],
        *,
        masks: bool,
        statistics: Callable[[Any], Any] = lambda _: None,
    ) -> None:
        """Calls chunk(index, slot, masked, statistics) for each chunk of this block
        that has rows.

        Each chunk of a turn has a slot of its own.

        Args:
          chunk: function that works on one chunk.
          masks: whether the function must know, by `masked`, that a chunk's last rows
            may be garbage. A mask costs one operation per element, so if only one chunk
            may have garbage, that chunk has code of its own.
          statistics: (index) -> the chunk's statistics. With `looks_ahead` it is called
            one turn early, and once more than there are chunks.
        """
        masks = masks and self.is_ragged
        # Whether only the last chunk may have garbage.
        only_last = masks and self.block_slabs == 1
        count = self.chunks_per_turn
        turns = lax.div(self.whole_chunks if only_last else self.chunks, count)

        ahead = self.looks_ahead  # then count is 1

        def turn(number: Any, loaded: Any) -> Any:
            for slot in range(count):
                index = number * count + slot
                current = loaded if ahead else statistics(index)
                chunk(index, slot, masks and not only_last, current)
            return statistics(number + 1) if ahead else None

        lax.fori_loop(0, turns, turn, statistics(0) if ahead else None)
        if count > 1 or only_last:

            def single(index: Any, _: None) -> None:
                chunk(index, 0, masks, statistics(index))

            lax.fori_loop(turns * count, self.chunks, single, None)

    def reader(self, ref: Any, index: Any) -> Callable[[Piece], jax.Array]:
        """Returns a function that reads a piece of a chunk, in float32, from VMEM. Each
        call loads again, because the registers cannot hold all pieces."""
        place = self.place(index)
        return lambda piece: memory.load(self.part(ref, piece), place)

    @property
    def kept_chunks(self) -> Any:
        """Scratch for `keep`, or None."""
        return None

    def keep(
        self, ref: Any, slot: int, compute: Callable[[Piece], jax.Array]
    ) -> tuple[Callable[[Piece, jax.Array], None], Callable[[Piece], jax.Array]]:
        """Returns functions that keep a value from one pass over a chunk to the next.

        Args:
          ref: scratch [chunks_per_turn, chunk_rows, lanes] float32, or None.
          slot: index of the chunk in its turn.
          compute: (piece) -> the value.

        Returns:
          put(piece, value), get(piece). Without scratch, put does nothing and get
          recomputes the value.
        """

        def put(piece: Piece, value: jax.Array) -> None:
            if ref is not None:
                self.part(ref, piece)[slot] = value

        def get(piece: Piece) -> jax.Array:
            return compute(piece) if ref is None else self.part(ref, piece)[slot]

        return put, get

    def write(self, ref: Any, index: Any, piece: Piece, value: jax.Array) -> None:
        """Writes a piece of a chunk."""
        memory.store(self.part(ref, piece), self.place(index), value)

    def over_pieces(self, step: Callable[[Piece, Any], Any]) -> Any:
        """Runs carry = step(piece, carry) over a chunk's pieces and returns the last
        carry.

        The carry is None at first. A few pieces are unrolled in the code; if there are
        more, a loop runs several per turn. The number of the last piece is always
        static.
        """
        width = self.piece_width
        carry = step(Piece(0, width), None)
        next_piece = 1
        turn_pieces = UNROLLED // width
        if self.pieces > turn_pieces:
            turns = (self.pieces - 2) // turn_pieces

            def over_turn(turn: Any, carry: Any) -> Any:
                for number in range(1, 1 + turn_pieces):
                    carry = step(Piece(number, width, turn), carry)
                return carry

            carry = lax.fori_loop(0, turns, over_turn, carry)
            next_piece = 1 + turns * turn_pieces
        for number in range(next_piece, self.pieces):
            carry = step(Piece(number, width), carry)
        return carry


# --- features across the lanes --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AcrossLanes(Chunks):
    """Layout with the features across the lanes: x[examples, slabs, rows, features].

    The rows of a block and of a chunk are powers of two.

    Attributes:
      piece_width: features per piece. A tile of 16-bit values in memory is 8 rows by
        128 features, which is half a register; two adjacent tiles fill one. (Between
        two matrix products a 7x may have tiles of 16 rows, which fill one.)
      chunks_per_turn: chunks per turn of the loop.
      keeps: whether there is scratch for `keep`. It spares 16-bit values a second
        conversion, which costs more than to store and load them in 32 bits.
    """

    piece_width: int = LANES
    chunks_per_turn: int = 1
    keeps: bool = False

    @property
    def kept_chunks(self) -> Any:
        """Scratch for `keep`, or None."""
        if not self.keeps:
            return None
        shape = self.chunks_per_turn, self.chunk_rows, self.lanes
        return pltpu.VMEM(shape, jnp.float32)

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Shape in which kernels see x, y and every other array of x's size."""
        return self.examples, self.slabs, self.rows, self.features

    @property
    def rows_spec(self) -> pl.BlockSpec:
        """Spec of x, y and every other array of x's size."""
        return self.spec(
            (None, None, self.block_rows, self.lanes),
            lambda example, slab, row: (example, slab, row, 0),
        )

    def __str__(self) -> str:
        return f"{self.block_rows} rows of {self.features} features"

    # --- one value per feature ---

    def kept_param(self, count: int) -> Any:
        """Scratch for scale or bias, of which there are `count`; None if they lie as x
        does already."""
        if not self.in_tiles(count):
            return None
        return pltpu.VMEM((1, self.lanes), jnp.float32)

    def keep_param(self, kept: Any, tiles: jax.Array) -> None:
        """Copies a scale or bias `in_tiles` to its scratch."""
        kept[...] = memory.row_of(tiles)

    def param(self, ref: Any, kept: Any, piece: Piece) -> jax.Array:
        """Returns the scale or bias of a piece: [1, its lanes], which broadcasts, or
        [chunk_rows, its lanes] if rows take turns."""
        value = memory.load(self.part(ref if kept is None else kept, piece))
        if self.period == 1:
            return value
        return jnp.concatenate([value] * (self.chunk_rows // self.period), 0)

    @property
    def kept_sum(self) -> Any:
        """Scratch that accumulates dscale or dbias."""
        return pltpu.VMEM((max(SUBLANES, self.period), self.lanes), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """Sums a piece to [SUBLANES or period, its lanes], by adding whole registers
        only."""
        rows = max(SUBLANES, self.period)
        return jnp.sum(value.reshape(-1, rows, value.shape[1]), 0)

    def add_sum(self, run: Any, result: Any) -> None:
        """Adds [SUBLANES or period, lanes] to [period, lanes], or `in_tiles`."""
        if self.period > 1:
            result[...] += run[...]
        elif self.in_tiles(self.examples):
            result[...] += memory.tiles_of(jnp.sum(run[...], 0, keepdims=True))
        else:
            result[...] += jnp.sum(run[...], 0, keepdims=True)

    # --- one value per row: in all lanes of its sublane ---

    @property
    def row_values_shape(self) -> tuple[int, int]:
        """Shape of one value per row of a chunk."""
        return self.chunk_rows, LANES

    def broadcast(self, value: jax.Array, piece: Piece) -> jax.Array:
        """Repeats the registers of one value per row for a piece: [chunk_rows, its
        lanes]."""
        return jnp.concatenate([value] * (self._size(piece) // LANES), 1)

    def sum_features(self, total: jax.Array) -> jax.Array:
        """Sums the lanes of each row."""
        if self.features % LANES == 0:
            total = jnp.sum(total, 1, keepdims=True)
        else:
            # Transpose, halve down the sublanes and transpose back. With lane rotations
            # instead, a step of 64 rows of 760 features took 717 cycles on a v5e
            # instead of 467.
            total = _halve(total.T).T[:, :1]
        return jnp.broadcast_to(total, self.row_values_shape)

    @property
    def looks_ahead(self) -> bool:
        """Whether a turn of the loop prepares the statistics of the next turn's chunk.

        A backward waits about 130 cycles until it has rstd on all lanes, with nothing
        else to do. RMSNorm of 4096 bfloat16 features takes 1.02 of its HBM traffic's
        time without looking ahead, and 0.94 with it (7x). A block of one turn would
        look ahead in vain, and several chunks per turn wait together anyway.
        """
        turns = min(self.rows, self.block_rows) // self.chunk_rows
        return self.chunks_per_turn == 1 and turns > 1

    # A statistic is [examples, slabs, 1, rows], with its rows along the lanes: 4 bytes
    # per row. In the shape that it has outside the kernel, [rows, 1], each number would
    # fill 128 lanes of a block: 512 bytes per row, as much as 256 features in bfloat16.

    @property
    def consecutive_blocks(self) -> int:
        """Consecutive blocks that one core must have, since they write one block of
        statistics."""
        return max(LANES // self.block_rows, 1)

    @property
    def statistic_spec(self) -> pl.BlockSpec:
        blocks = self.consecutive_blocks
        return self.spec(
            (None, None, 1, blocks * self.block_rows),
            lambda example, slab, row: (example, slab, 0, lax.div(row, blocks)),
        )

    def put_statistic(self, ref: Any, index: Any, column: jax.Array) -> None:
        """Writes a chunk's statistic [chunk_rows, LANES] to its lanes of [1, lanes]."""
        for rows, tile, inside, diagonal in self._row_tiles(index):
            spread = jnp.where(diagonal, column[rows], 0)  # [tile_rows, LANES]
            row = jnp.sum(spread, 0, keepdims=True)  # [1, LANES]
            ref[:, tile] = jnp.where(inside, row, ref[:, tile])

    def get_statistic(
        self, ref: Any, index: Any, f: Callable[[jax.Array], jax.Array] = lambda s: s
    ) -> jax.Array:
        """Returns f(statistic) of a chunk: [chunk_rows, LANES]."""
        columns = [
            jnp.sum(jnp.where(diagonal, f(ref[:, tile]), 0), 1, keepdims=True)
            for _, tile, _, diagonal in self._row_tiles(index)
        ]
        return jnp.broadcast_to(jnp.concatenate(columns, 0), self.row_values_shape)

    def _row_tiles(self, index: Any) -> Iterator[tuple[slice, Any, Any, jax.Array]]:
        """Yields where a chunk's statistics lie, one tile of LANES at a time.

        Yields:
          rows: rows of the chunk with their statistic in this tile.
          tile: lanes of the tile.
          inside: bool [1, LANES], which of the tile's lanes belong to these rows.
          diagonal: bool [tile_rows, LANES], which lane belongs to each row.
        """
        tile_rows = min(self.chunk_rows, LANES)
        for start in range(0, self.chunk_rows, tile_rows):
            _, block = self.block_number
            row = block * self.block_rows + index * self.chunk_rows + start
            row = lax.rem(row, max(self.block_rows, LANES))
            first = lax.rem(row, LANES)
            tile = pl.ds(pl.multiple_of(row - first, LANES), LANES)
            shape = tile_rows, LANES
            lane_row = lax.broadcasted_iota(jnp.int32, shape, 1) - first
            diagonal = lane_row == lax.broadcasted_iota(jnp.int32, shape, 0)
            inside = (lane_row[:1] >= 0) & (lane_row[:1] < tile_rows)
            yield slice(start, start + tile_rows), tile, inside, diagonal

    # --- chunks ---

    @property
    def padded_features(self) -> int:
        return self.lanes

    def part(self, ref: Any, piece: Piece) -> Any:
        """Returns the part of `ref` that holds the piece's lanes."""
        return piece.cut(ref, ref.ndim - 1, self._size(piece))

    def place(self, index: Any) -> Any:
        """Returns where a chunk lies in a block."""
        first = pl.multiple_of(index * self.chunk_rows, self.chunk_rows)
        return pl.ds(first, self.chunk_rows)

    def add(
        self,
        totals: Sequence[jax.Array] | None,
        values: Sequence[jax.Array],
        piece: Piece,
    ) -> list[jax.Array]:
        """Adds a piece's values to the totals of the preceding pieces, LANES features
        at a time."""
        for start in range(0, self._size(piece), LANES):
            terms = [value[:, start : start + LANES] for value in values]
            count = self.features - piece.number * self.piece_width - start
            if piece.turn is None and count < LANES:
                lane = lax.broadcasted_iota(jnp.int32, terms[0].shape, 1)
                terms = [jnp.where(lane < count, term, NEGATIVE_ZERO) for term in terms]
            totals = terms if totals is None else [*map(operator.add, totals, terms)]
        assert totals is not None
        return list(totals)

    def is_inside(self, index: Any) -> jax.Array:
        """Returns bool [chunk_rows, 1]: whether the array has each row of the chunk."""
        first = self.block_number[1] * self.block_rows + index * self.chunk_rows
        row = lax.broadcasted_iota(jnp.int32, (self.chunk_rows, 1), 0)
        return first + row < self.rows


# --- features down the sublanes -------------------------------------------------------


class DownSublanes(Chunks):
    """Layout with the features down the sublanes: x[examples, slabs, features, rows].

    The rows of a chunk are a multiple of LANES.
    """

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Shape in which kernels see x, y and every other array of x's size."""
        return self.examples, self.slabs, self.features, self.rows

    @property
    def sublanes(self) -> int:
        """Features plus the garbage that fills their last register."""
        return round_up(self.features, SUBLANES)

    @property
    def rows_spec(self) -> pl.BlockSpec:
        """Spec of x, y and every other array of x's size."""
        return self.spec(
            (None, self.block_slabs, self.sublanes, self.block_rows),
            lambda example, slab, row: (example, slab, 0, row),
        )

    def __str__(self) -> str:
        return f"{self.block_slabs * self.block_rows} rows of {self.features} features"

    # --- one value per feature ---

    @property
    def kept_rows(self) -> int:
        """Rows for which scratch keeps scale and bias, and accumulates dscale and
        dbias."""
        return max(LANES, self.period)

    def kept_param(self, count: int) -> Any:
        """Scratch for scale or bias. Each number fills all lanes of its sublane, or if
        rows take turns, the lanes of its rows."""
        return pltpu.VMEM((self.sublanes, self.kept_rows), jnp.float32)

    def keep_param(self, kept: Any, rows: jax.Array) -> None:
        """Copies a scale or bias [period, features] to its scratch."""
        if self.period > 1:
            kept[...] = rows.T[: self.sublanes]
        else:
            kept[...] = memory.as_column(rows, self.sublanes)

    def param(self, ref: Any, kept: Any, piece: Piece) -> jax.Array:
        """Returns the scale or bias of a piece: [its sublanes, chunk_rows]."""
        return jnp.concatenate(
            [self.part(kept, piece)[...]] * (self.chunk_rows // self.kept_rows), 1
        )

    @property
    def kept_sum(self) -> Any:
        """Scratch that accumulates dscale or dbias."""
        return pltpu.VMEM((self.sublanes, self.kept_rows), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """Sums a piece to [its sublanes, kept_rows], by adding whole registers only."""
        rows = self.kept_rows
        tiles = [value[:, i : i + rows] for i in range(0, self.chunk_rows, rows)]
        return functools.reduce(operator.add, tiles)

    @property
    def chunks_in_a_row(self) -> int:
        """Chunks whose dscale and dbias are accumulated in one run.

        A run's sums still lie on kept_rows lanes. For rows of 64 features, adding them
        up takes 5 % of the cycles of a step of 21 chunks (v5e).
        """
        return 4 * IN_A_ROW

    def add_sum(self, run: Any, result: Any) -> None:
        """Adds [sublanes, kept_rows] to [period, features]."""
        if self.period > 1:
            padding = self.lanes - self.sublanes
            result[...] += jnp.pad(run[...], ((0, padding), (0, 0))).T
        else:
            result[...] += memory.as_row(jnp.sum(run[...], 1, keepdims=True))

    # --- one value per row: in all sublanes of its lane ---

    @property
    def row_values_shape(self) -> tuple[int, int]:
        """Shape of one value per row of a chunk."""
        return SUBLANES, self.chunk_rows

    def broadcast(self, value: jax.Array, piece: Piece) -> jax.Array:
        """Repeats the registers of one value per row for a piece: [its sublanes,
        chunk_rows]."""
        return jnp.concatenate([value] * (self._size(piece) // SUBLANES), 0)

    def sum_features(self, total: jax.Array) -> jax.Array:
        """Sums the sublanes of each row."""
        return _halve(total)

    @property
    def statistic_spec(self) -> pl.BlockSpec:
        """Spec of mean and variance [examples, slabs, 1, rows]."""
        return self.spec(
            (None, self.block_slabs, 1, self.block_rows),
            lambda example, slab, row: (example, slab, 0, row),
        )

    def put_statistic(self, ref: Any, index: Any, row: jax.Array) -> None:
        """Writes a chunk's statistic, the first sublane of [SUBLANES, chunk_rows]."""
        slab, first = self._slab_and_row(index)
        ref[slab, :, pl.ds(first, self.chunk_rows)] = row[:1]

    def get_statistic(
        self, ref: Any, index: Any, f: Callable[[jax.Array], jax.Array] = lambda s: s
    ) -> jax.Array:
        """Returns f(statistic) of a chunk: [SUBLANES, chunk_rows]."""
        slab, first = self._slab_and_row(index)
        row = f(ref[slab, :, pl.ds(first, self.chunk_rows)])
        return jnp.broadcast_to(row, self.row_values_shape)

    # --- chunks ---

    turn_registers = 168  # registers that the chunks of one turn would fill

    @property
    def chunks_per_turn(self) -> int:
        """Chunks per turn of the loop. Small chunks wait for their sums together.

        A turn has somewhat fewer chunks than it could if that leaves no chunk of a
        block to be done alone.

        A block of 21 chunks of 384 rows of 64 bfloat16 features, forward, compiled for
        a v6e, takes 1.05 of its HBM traffic's time with 4 chunks per turn, 1.00 with 7
        and 1.01 with all of them.
        """
        registers = self.sublanes // SUBLANES * (self.chunk_rows // LANES)
        chunks = self.chunks_of_block
        most = max(min(chunks, self.turn_registers // registers), 1)
        even = max(n for n in range(1, most + 1) if chunks % n == 0)
        return even if 2 * even > most else most

    @property
    def chunks(self) -> Any:
        """Chunks of this block that have rows."""
        slab, _ = self.block_number
        slabs = jnp.minimum(self.slabs - slab * self.block_slabs, self.block_slabs)
        if self.cores > 1:
            slabs = jnp.maximum(slabs, 0)
        return slabs * self.chunks_of_slab

    def _slab_and_row(self, index: Any) -> tuple[Any, Any]:
        """Returns the slab and the row at which a chunk begins in a block."""
        slab: Any = 0
        if self.block_slabs > 1:
            slab_chunks = self.chunks_of_slab
            slab, index = lax.div(index, slab_chunks), lax.rem(index, slab_chunks)
        return slab, pl.multiple_of(index * self.chunk_rows, LANES)

    @property
    def padded_features(self) -> int:
        return self.sublanes

    def part(self, ref: Any, piece: Piece) -> Any:
        """Returns the part of `ref` that holds the piece's sublanes."""
        return piece.cut(ref, ref.ndim - 2, self._size(piece))

    def place(self, index: Any) -> Any:
        """Returns where a chunk lies in a block."""
        slab, row = self._slab_and_row(index)
        return slab, slice(None), pl.ds(row, self.chunk_rows)

    def add(
        self,
        totals: Sequence[jax.Array] | None,
        values: Sequence[jax.Array],
        piece: Piece,
    ) -> list[jax.Array]:
        """Adds a piece's values to the totals of the preceding pieces, element by
        element."""
        if piece.number == self.pieces - 1 and self.features % SUBLANES:
            feature = lax.broadcasted_iota(jnp.int32, values[0].shape, 0)
            count = self.features - piece.number * LANES
            values = [
                jnp.where(feature < count, value, NEGATIVE_ZERO) for value in values
            ]
        return list(values if totals is None else map(_add_to_first, totals, values))

    def is_inside(self, index: Any) -> jax.Array:
        """Returns bool [1, chunk_rows]: whether the array has each row of the chunk."""
        _, block = self.block_number
        first = block * self.block_rows + self._slab_and_row(index)[1]
        row = lax.broadcasted_iota(jnp.int32, (1, self.chunk_rows), 1)
        return first + row < self.rows


# --- features across the lanes, turned in registers -----------------------------------


class Turned(DownSublanes):
    """Layout of up to LANES features across the lanes, transposed in registers.

    The view is x[examples, slabs, rows, features]. If a row is one register wide, each
    value per row costs as much as the row's features, and each sum costs the cycles of
    a sum over lanes. So tiles of 128 rows are transposed as they are read and written,
    and everything else works as in `DownSublanes`.

    Cycles of a step over cycles of its HBM traffic, LayerNorm of 128 features, compiled
    for a v6e, transposed instead of not:

    - bfloat16: 1.26 instead of 2.25 forward, 1.07 instead of 2.12 backward
    - float32: 0.64 instead of 1.15 forward, 0.66 instead of 1.10 backward
    """

    # One chunk is transposed while another is computed.
    turn_registers = 512

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Shape in which kernels see x, y and every other array of x's size."""
        return self.examples, self.slabs, self.rows, self.features

    @property
    def rows_spec(self) -> pl.BlockSpec:
        """Spec of x, y and every other array of x's size."""
        return self.spec(
            (None, self.block_slabs, self.block_rows, LANES),
            lambda example, slab, row: (example, slab, row, 0),
        )

    def place(self, index: Any) -> Any:
        """Returns where a chunk lies in a block."""
        slab, row = self._slab_and_row(index)
        return slab, pl.ds(row, self.chunk_rows)

    def reader(self, ref: Any, index: Any) -> Callable[[Piece], jax.Array]:
        """Returns a function that reads a chunk and transposes it once. It transposes
        values in their dtype in memory, so that 16-bit values move two at a time."""
        place = self.place(index)

        def transposed(_: Piece) -> jax.Array:
            return memory.widened(ref[place].T)[: self.sublanes]

        return functools.cache(transposed)

    def write(self, ref: Any, index: Any, _: Piece, value: jax.Array) -> None:
        """Transposes a chunk back and writes it."""
        padding = LANES - self.sublanes
        if padding:
            value = jnp.pad(value, ((0, padding), (0, 0)))
        transposed = memory.narrowed(value, ref.dtype).T
        memory.store_narrowed(ref, self.place(index), transposed)


Blocks = AcrossLanes | DownSublanes  # Turned is a DownSublanes


# --- both -----------------------------------------------------------------------------


def _halve(total: jax.Array) -> jax.Array:
    """Sums down up to LANES sublanes.

    Args:
      total: [sublanes, n]; sublanes without a feature hold `NEGATIVE_ZERO`, or are
        left out.

    Returns:
      [SUBLANES, n], with the sums in every sublane. The sublanes agree bitwise, because
      they differ only in which operand of an addition comes first.
    """
    half = LANES // 2
    while half >= SUBLANES:
        if total.shape[0] > half:
            total = _add_to_first(total[:half], total[half:])
        half //= 2
    while half >= 1:  # within registers: adds sublane i + half to sublane i
        total = total + pltpu.roll(total, SUBLANES - half, 0)
        half //= 2
    return total


def _add_to_first(total: jax.Array, value: jax.Array) -> jax.Array:
    """Adds `value` to the leading sublanes of `total`."""
    count = value.shape[0]
    if count == total.shape[0]:
        return total + value
    return jnp.concatenate([total[:count] + value, total[count:]], 0)
