"""How a TPU's rowwise kernels cut an array into blocks and chunks.

XLA lays the last two axes of an array in memory into tiles of 8 sublanes times 128
lanes, and chooses as these two those that leave least of the tiles empty
(`order_of_axes`). So the features, which are normalized over, lie in one of two ways:

    AcrossLanes      x[examples, slabs, rows, features]    768 features
    DownSublanes     x[examples, slabs, features, rows]    384 rows of 64 features, for
                                                           64 of 128 lanes were empty

Each is a class with the same methods, by which the kernels in rowwise.py are written
once. A chunk is [rows, features] in one and [features, rows] in the other. What has one
number a row fills the registers of LANES (or SUBLANES) features with it, so that no
step broadcasts it. A third class, `Turned`, has rows of up to 128 features across the
lanes, and transposes them in registers.

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
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

# Features of a chunk whose pieces stand one behind the other in the code; of more, as
# many as one turn of a loop does. Cycles over those of HBM traffic, compiled for a 7x,
# bfloat16 backward: RMSNorm of 7168 features with 2048 1.10, with 4096 0.98, LayerNorm
# of 12288 1.35 and 1.29. (A v5e has up to 30 % more, to 0.5.)
UNROLLED = 4096

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


# --- chunks and pieces ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some features of a chunk.

    Attributes:
      number: of the piece; in a loop its number in the loop's first turn.
      width: features of each piece before it.
      group: the turn of the loop, UNROLLED features each, behind piece 0; or None.
    """

    number: int
    width: int
    group: Any = None

    def of(self, ref: Any, axis: int, size: int) -> Any:
        """The piece's features of a ref, which lie on that axis."""

        def cut(ref: Any, start: Any, size: int) -> Any:
            return ref.at[(slice(None),) * axis + (pl.ds(start, size),)]

        if self.group is None:
            return cut(ref, self.number * self.width, size)
        first = pl.multiple_of(self.width + self.group * UNROLLED, LANES)
        group = cut(ref, first, UNROLLED)  # one address for all its pieces
        return cut(group, (self.number - 1) * self.width, size)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """What all ways of lying share.

    Attributes:
      vmem: bytes that a kernel needs.
      cores: that share an example: each has blocks of its slabs, or where there is one,
        of its rows.
      examples: parts of the array with a scale, bias, dscale or dbias of their own.
      slabs: parts of an example.
      rows: rows of a slab.
      features: length of a row.
      block_rows: rows of a slab in VMEM at a time; a multiple of chunk_rows.
      chunk_rows: rows that are normalized together.
      apart: cores each of which has examples of its own; 1 where they share them.
      groups: that have a scale and bias in turn, as heads do: of rows, or where other
        rows lie between, of examples; 1 where rows, or examples, share or have one.
      period: of rows in turn, after how many the groups repeat in whole registers. A
        chunk has a multiple of them; 1 where all its rows share a scale and bias.
    """

    vmem: int
    cores: int
    examples: int
    slabs: int
    rows: int
    features: int
    block_rows: int
    chunk_rows: int
    apart: int = dataclasses.field(default=1, kw_only=True)
    groups: int = dataclasses.field(default=1, kw_only=True)
    period: int = dataclasses.field(default=1, kw_only=True)

    # --- blocks ---

    @property
    def blocks(self) -> tuple[int, int]:
        """Of an example: of its slabs, of their rows."""
        return self.slabs, pl.cdiv(self.rows, self.block_rows)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Cores, and a core's examples and blocks of slabs and of rows."""
        slabs, rows = self.blocks
        if slabs > 1:
            slabs = pl.cdiv(slabs, self.cores)
        elif self.cores > 1:
            rows = round_up(pl.cdiv(rows, self.cores), self.blocks_together)
        return self.cores * self.apart, self.examples // self.apart, slabs, rows

    @property
    def blocks_together(self) -> int:
        """That one core must have: they write one block of statistics."""
        return 1

    def shared_by(self, cores: int) -> Self:
        """By so many cores: each gets blocks of every example, or where there are too
        few, as many examples as the others, or one gets all."""
        shared = dataclasses.replace(self, cores=cores)
        first = shared.block_at(cores - 1, 0, 0)  # of the last core
        if all(i < n for i, n in zip(first, self.blocks, strict=True)):
            return shared
        if self.examples % cores == 0:
            return dataclasses.replace(self, apart=cores)
        return self

    def example_at(self, core: Any, example: Any) -> Any:
        """Which of all examples a step has."""
        if self.apart > 1:
            example += core * (self.examples // self.apart)
        return example

    def block_at(self, core: Any, slab: Any, row: Any) -> tuple[Any, Any]:
        """Which of the example's blocks a step has; the last core's last ones may be
        too many, and have no rows."""
        if self.cores > 1:
            _, _, slabs, rows = self.grid
            if self.blocks[0] > 1:
                slab += core * slabs
            else:
                row += core * rows
        return slab, row

    @property
    def block_number(self) -> tuple[Any, Any]:
        """That of this step."""
        return self.block_at(*map(pl.program_id, (0, 2, 3)))

    def spec(self, shape: Sequence[Any], at: Callable[..., Any]) -> pl.BlockSpec:
        """Of blocks that are at(example, slab, row), by their numbers."""

        def index(core: Any, example: Any, *block: Any) -> Any:
            slab, row = self.block_at(core, *block)
            if self.cores > 1:  # one too many is the last one, and not fetched again
                slabs, rows = self.blocks
                row = jnp.where(slab < slabs, jnp.minimum(row, rows - 1), rows - 1)
                slab = jnp.minimum(slab, slabs - 1)
            return at(self.example_at(core, example), slab, row)

        return pl.BlockSpec(tuple(shape), index)

    @property
    def param_lanes(self) -> int:
        """Of a row of one number a feature."""
        return round_up(self.features, LANES)

    def of_param(self, count: int) -> pl.BlockSpec:
        """For scale or bias [count, period, features], each for as many examples one
        behind the other, or of the groups' for every count-th; fetched once."""

        def index(core: Any, example: Any, *_: Any) -> Any:
            if count == 1:
                return 0, 0, 0
            example = self.example_at(core, example)
            if self.groups > 1:
                return lax.rem(example, count), 0, 0
            return lax.div(example, self.examples // count), 0, 0

        return pl.BlockSpec((None, self.period, self.param_lanes), index)

    @property
    def of_param_gradient(self) -> pl.BlockSpec:
        """For dscale and dbias [cores, examples, period, features]."""

        def index(core: Any, example: Any, *_: Any) -> Any:
            sharer = core if self.cores > 1 else 0
            return sharer, self.example_at(core, example), 0, 0

        return pl.BlockSpec((None, None, self.period, self.param_lanes), index)

    def add_parts(self, parts: jax.Array | None, count: int) -> jax.Array | None:
        """dscale or dbias: those of all cores, and of examples that share one, or of a
        group's.

        Args:
          parts: [cores, examples, period, features], or None.
          count: of the results, each for as many examples one behind the other.
        """
        if parts is None:
            return None
        if self.cores > 1:
            parts = parts.sum(0)
        if self.groups > 1:
            return parts.reshape(-1, self.groups, self.features).sum(0)
        if count < self.examples:
            parts = parts.reshape(count, -1, self.features).sum(1)
        return parts

    # --- chunks ---

    @property
    def slabs_of_block(self) -> int:
        """In VMEM at a time."""
        return 1

    @property
    def rows_of_slab(self) -> Any:
        """Of this block's slabs."""
        _, row = self.block_number
        rows = jnp.minimum(self.rows - row * self.block_rows, self.block_rows)
        return jnp.maximum(rows, 0) if self.cores > 1 else rows

    @property
    def chunks_of_slab(self) -> Any:
        """Of this block's slabs, that have rows."""
        return lax.div(self.rows_of_slab + self.chunk_rows - 1, self.chunk_rows)

    @property
    def whole_chunks(self) -> Any:
        """Those of this block, which is one slab's, that have all their rows."""
        whole = lax.div(self.rows_of_slab, self.chunk_rows)
        return jnp.minimum(whole, self.chunks)  # 0 where a core has no slab

    @property
    def chunks(self) -> Any:
        """Of this block, that have rows."""
        slab, _ = self.block_number
        if self.cores == 1 or self.slabs == 1:
            return self.chunks_of_slab
        return jnp.where(slab < self.slabs, self.chunks_of_slab, 0)

    @property
    def is_ragged(self) -> bool:
        """Whether a chunk may have less rows than it has room for."""
        return self.rows % self.chunk_rows > 0

    @property
    def together(self) -> int:
        """Chunks that one turn of the loop does."""
        return 1

    @property
    def looks_ahead(self) -> bool:
        """Whether a turn finds the statistics of the next one's chunks."""
        return False

    @property
    def piece_width(self) -> int:
        """Features of a piece."""
        return LANES

    @property
    def filled(self) -> int:
        """Features, and what fills their last tile or register: garbage."""
        raise NotImplementedError

    @property
    def pieces(self) -> int:
        """Of so many features each, the last one of what there is."""
        return pl.cdiv(self.filled, self.piece_width)

    def _size(self, piece: Piece) -> int:
        is_last = piece.number == self.pieces - 1 and piece.group is None
        left = self.filled - (self.pieces - 1) * self.piece_width
        return left if is_last else self.piece_width

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        raise NotImplementedError

    def part(self, ref: Any, piece: Piece) -> Any:
        """The features of a piece."""
        raise NotImplementedError

    def for_each_chunk(
        self,
        chunk: Callable[[Any, int, bool, Any], None],
        *,
        masks: bool,
        given: Callable[[Any], Any] = lambda _: None,
    ) -> None:
        """Calls chunk(index, slot, masked, told) for the chunks of this block that have
        rows.

        Of the chunks of one turn each has a slot of its own.

        Args:
          chunk: what is done to one.
          masks: whether it must know, by `masked`, that a chunk may have garbage in its
            last rows. A mask costs each element an operation, so one chunk that may
            have some has code of its own.
          given: (index) -> what the chunk is told; found in the turn before if
            `looks_ahead`, and once more than there are chunks.
        """
        masks = masks and self.is_ragged
        apart = masks and self.slabs_of_block == 1
        count = self.together
        turns = lax.div(self.whole_chunks if apart else self.chunks, count)

        ahead = self.looks_ahead  # then count is 1

        def turn(number: Any, told: Any) -> Any:
            for i in range(count):
                index = number * count + i
                now = told if ahead else given(index)
                chunk(index, i, masks and not apart, now)
            return given(number + 1) if ahead else None

        lax.fori_loop(0, turns, turn, given(0) if ahead else None)
        if count > 1 or apart:

            def alone(index: Any, _: None) -> None:
                chunk(index, 0, masks, given(index))

            lax.fori_loop(turns * count, self.chunks, alone, None)

    def reader(self, ref: Any, index: Any) -> Callable[[Piece], jax.Array]:
        """Reads pieces of a chunk, in float32, from VMEM whenever they are wanted:
        the registers do not hold them all."""
        here = self.place(index)
        return lambda piece: memory.load(self.part(ref, piece), here)

    @property
    def kept_chunks(self) -> Any:
        """Scratch for `keep`, or None."""
        return None

    def keep(
        self, ref: Any, slot: int, compute: Callable[[Piece], jax.Array]
    ) -> tuple[Callable[[Piece, jax.Array], None], Callable[[Piece], jax.Array]]:
        """How a number is kept from one pass over a chunk to the next.

        Args:
          ref: scratch [together, chunk_rows, lanes] float32, or None.
          slot: which of the chunks of one turn this is.
          compute: of a piece.

        Returns:
          put(piece, value), get(piece); without scratch put does nothing, and get
          computes anew.
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
        """carry = step(piece, carry) for a chunk's pieces; the carry is None at first.

        Few pieces stand one behind the other in the code; of many a loop has some at a
        time. The last one's number is always known.
        """
        width = self.piece_width
        carry = step(Piece(0, width), None)
        begun = 1
        of_turn = UNROLLED // width
        if self.pieces > of_turn:
            groups = (self.pieces - 2) // of_turn

            def of_group(group: Any, carry: Any) -> Any:
                for number in range(1, 1 + of_turn):
                    carry = step(Piece(number, width, group), carry)
                return carry

            carry = lax.fori_loop(0, groups, of_group, carry)
            begun = 1 + groups * of_turn
        for number in range(begun, self.pieces):
            carry = step(Piece(number, width), carry)
        return carry


# --- features across the lanes --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AcrossLanes(Chunks):
    """How the view x[examples, slabs, rows, features] is cut.

    Rows of a block, and of a chunk, are powers of two.

    Attributes:
      piece_width: features of a piece. Of 16 bits each, memory has tiles of 8 rows
        times 128 features, which are half a register: two side by side are one.
      together: chunks that one turn of the loop does.
      keeps: whether there is scratch for `keep`. It spares numbers of 16 bits a second
        conversion, which costs more than to store them in 32 and to load them.
    """

    piece_width: int = LANES
    together: int = 1
    keeps: bool = False

    @property
    def kept_chunks(self) -> Any:
        """Scratch for `keep`, or None."""
        if not self.keeps:
            return None
        return pltpu.VMEM((self.together, self.chunk_rows, self.lanes), jnp.float32)

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Of x, y, and all else of their size."""
        return self.examples, self.slabs, self.rows, self.features

    @property
    def lanes(self) -> int:
        """Features, and what fills their last tile: garbage."""
        return round_up(self.features, LANES)

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, and all else of their size."""
        return self.spec(
            (None, None, self.block_rows, self.lanes),
            lambda example, slab, row: (example, slab, row, 0),
        )

    def __str__(self) -> str:
        return f"{self.block_rows} rows of {self.features} features"

    # --- one number a feature ---

    @property
    def kept_param(self) -> None:
        """No scratch for scale or bias: they lie as x does."""
        return None

    def keep_param(self, kept: Any, row: jax.Array) -> None:
        raise NotImplementedError("scale and bias lie as x does")

    def param(self, ref: Any, kept: None, piece: Piece) -> jax.Array:
        """Of a piece: [1, its lanes], which broadcasts; or [chunk_rows, its lanes]."""
        value = memory.load(self.part(ref, piece))
        if self.period == 1:
            return value
        return jnp.concatenate([value] * (self.chunk_rows // self.period), 0)

    @property
    def kept_sum(self) -> Any:
        """Scratch in which dscale or dbias adds up."""
        return pltpu.VMEM((max(SUBLANES, self.period), self.lanes), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """A piece -> [SUBLANES or period, its lanes]: adds whole registers alone."""
        rows = max(SUBLANES, self.period)
        return jnp.sum(value.reshape(-1, rows, value.shape[1]), 0)

    def finish_sum(self, total: Any, result: Any) -> None:
        """[SUBLANES or period, lanes] -> [period, lanes]."""
        if self.period > 1:
            result[...] = total[...]
        else:
            result[...] = jnp.sum(total[...], 0, keepdims=True)

    # --- one number a row: in all lanes of its sublane ---

    @property
    def of_rows_shape(self) -> tuple[int, int]:
        """Of one number for each row of a chunk."""
        return self.chunk_rows, LANES

    def widen(self, value: jax.Array, piece: Piece) -> jax.Array:
        """For a piece: [chunk_rows, its lanes], the same registers again."""
        return jnp.concatenate([value] * (self._size(piece) // LANES), 1)

    def meet(self, total: jax.Array) -> jax.Array:
        """Sums the lanes of each row."""
        if self.features % LANES == 0:
            total = jnp.sum(total, 1, keepdims=True)
        else:
            # Down the sublanes to be halved, and back. Halved by rotations of lanes, a
            # step of 64 rows of 760 features took 717 cycles on a v5e instead of 467.
            total = _halve(total.T).T[:, :1]
        return jnp.broadcast_to(total, self.of_rows_shape)

    @property
    def looks_ahead(self) -> bool:
        """Whether a turn finds the statistics of the next one's chunks.

        About 130 cycles pass until a backward has rstd on all lanes, and nothing else
        to do: RMSNorm of 4096 bfloat16 features 1.02 of its HBM traffic's time, ahead
        0.94 (7x). Not where a block is one turn, which looks ahead in vain; and
        several chunks wait together as it is.
        """
        turns = min(self.rows, self.block_rows) // self.chunk_rows
        return self.together == 1 and turns > 1

    # A statistic is [examples, slabs, 1, rows], its rows along the lanes: 4 bytes a
    # row. As [rows, 1], the shape it has outside, a block of it fills 128 lanes with
    # one number: 512 bytes a row, as much as 256 features in bfloat16.

    @property
    def blocks_together(self) -> int:
        """That one core must have: they write one block of statistics."""
        return max(LANES // self.block_rows, 1)

    @property
    def of_statistic(self) -> pl.BlockSpec:
        blocks = self.blocks_together
        return self.spec(
            (None, None, 1, blocks * self.block_rows),
            lambda example, slab, row: (example, slab, 0, lax.div(row, blocks)),
        )

    def put_statistic(self, ref: Any, index: Any, column: jax.Array) -> None:
        """Puts [chunk_rows, LANES] into its lanes of [1, lanes]."""
        for rows, tile, mine, diagonal in self._tiles_of(index):
            spread = jnp.where(diagonal, column[rows], 0)  # [tile_rows, LANES]
            row = jnp.sum(spread, 0, keepdims=True)  # [1, LANES]
            ref[:, tile] = jnp.where(mine, row, ref[:, tile])

    def get_statistic(
        self, ref: Any, index: Any, of: Callable[[jax.Array], jax.Array] = lambda s: s
    ) -> jax.Array:
        """Reads back [chunk_rows, LANES], of numbers or a function of them."""
        columns = [
            jnp.sum(jnp.where(diagonal, of(ref[:, tile]), 0), 1, keepdims=True)
            for _, tile, _, diagonal in self._tiles_of(index)
        ]
        return jnp.broadcast_to(jnp.concatenate(columns, 0), self.of_rows_shape)

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
            _, block = self.block_number
            row = block * self.block_rows + index * self.chunk_rows + start
            row = lax.rem(row, max(self.block_rows, LANES))
            first = lax.rem(row, LANES)
            tile = pl.ds(pl.multiple_of(row - first, LANES), LANES)
            shape = tile_rows, LANES
            own = lax.broadcasted_iota(jnp.int32, shape, 1) - first
            diagonal = own == lax.broadcasted_iota(jnp.int32, shape, 0)
            mine = (own[:1] >= 0) & (own[:1] < tile_rows)
            yield slice(start, start + tile_rows), tile, mine, diagonal

    # --- chunks ---

    @property
    def filled(self) -> int:
        return self.lanes

    def part(self, ref: Any, piece: Piece) -> Any:
        """The lanes of a piece."""
        return piece.of(ref, ref.ndim - 1, self._size(piece))

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        first = pl.multiple_of(index * self.chunk_rows, self.chunk_rows)
        return pl.ds(first, self.chunk_rows)

    def add(
        self,
        totals: Sequence[jax.Array] | None,
        values: Sequence[jax.Array],
        piece: Piece,
    ) -> list[jax.Array]:
        """Adds a piece's to those of the pieces before, LANES features at a time."""
        for start in range(0, self._size(piece), LANES):
            terms = [value[:, start : start + LANES] for value in values]
            left = self.features - piece.number * self.piece_width - start
            if piece.group is None and left < LANES:
                lane = lax.broadcasted_iota(jnp.int32, terms[0].shape, 1)
                terms = [jnp.where(lane < left, term, NOTHING) for term in terms]
            totals = terms if totals is None else [*map(operator.add, totals, terms)]
        assert totals is not None
        return list(totals)

    def is_inside(self, index: Any) -> jax.Array:
        """bool [chunk_rows, 1]: whether the array has this row."""
        first = self.block_number[1] * self.block_rows + index * self.chunk_rows
        row = lax.broadcasted_iota(jnp.int32, (self.chunk_rows, 1), 0)
        return first + row < self.rows


# --- features down the sublanes -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DownSublanes(Chunks):
    """How the view x[examples, slabs, features, rows] is cut.

    Rows of a chunk are a multiple of LANES.

    Attributes:
      block_slabs: slabs in VMEM at a time.
    """

    block_slabs: int

    @property
    def slabs_of_block(self) -> int:
        """In VMEM at a time."""
        return self.block_slabs

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Of x, y, and all else of their size."""
        return self.examples, self.slabs, self.features, self.rows

    @property
    def sublanes(self) -> int:
        """Features, and what fills their last register: garbage."""
        return round_up(self.features, SUBLANES)

    @property
    def blocks(self) -> tuple[int, int]:
        """Of an example: of its slabs, of their rows."""
        slabs = pl.cdiv(self.slabs, self.block_slabs)
        return slabs, pl.cdiv(self.rows, self.block_rows)

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, and all else of their size."""
        return self.spec(
            (None, self.block_slabs, self.sublanes, self.block_rows),
            lambda example, slab, row: (example, slab, 0, row),
        )

    def __str__(self) -> str:
        return f"{self.block_slabs * self.block_rows} rows of {self.features} features"

    # --- one number a feature ---

    @property
    def kept_rows(self) -> int:
        """Whose scale and bias are kept, and whose dscale and dbias add up."""
        return max(LANES, self.period)

    @property
    def kept_param(self) -> Any:
        """Scratch for scale or bias, each number in all lanes of its sublane."""
        return pltpu.VMEM((self.sublanes, self.kept_rows), jnp.float32)

    def keep_param(self, kept: Any, rows: jax.Array) -> None:
        """Puts [period, features] into scratch."""
        if self.period > 1:
            kept[...] = rows.T[: self.sublanes]
        else:
            kept[...] = memory.as_column(rows, self.sublanes)

    def param(self, ref: Any, kept: Any, piece: Piece) -> jax.Array:
        """Of a piece: [its sublanes, chunk_rows]."""
        return jnp.concatenate(
            [self.part(kept, piece)[...]] * (self.chunk_rows // self.kept_rows), 1
        )

    @property
    def kept_sum(self) -> Any:
        """Scratch in which dscale or dbias adds up."""
        return pltpu.VMEM((self.sublanes, self.kept_rows), jnp.float32)

    def sum_rows(self, value: jax.Array) -> jax.Array:
        """A chunk -> [sublanes, kept_rows]: adds whole registers alone."""
        rows = self.kept_rows
        tiles = [value[:, i : i + rows] for i in range(0, self.chunk_rows, rows)]
        return functools.reduce(operator.add, tiles)

    def finish_sum(self, total: Any, result: Any) -> None:
        """[sublanes, kept_rows] -> [period, features]."""
        if self.period > 1:
            more = self.param_lanes - self.sublanes
            result[...] = jnp.pad(total[...], ((0, more), (0, 0))).T
        else:
            result[...] = memory.as_row(jnp.sum(total[...], 1, keepdims=True))

    # --- one number a row: in all sublanes of its lane ---

    @property
    def of_rows_shape(self) -> tuple[int, int]:
        """Of one number for each row of a chunk."""
        return SUBLANES, self.chunk_rows

    def widen(self, value: jax.Array, piece: Piece) -> jax.Array:
        """For a piece: [its sublanes, chunk_rows], the same registers again."""
        return jnp.concatenate([value] * (self._size(piece) // SUBLANES), 0)

    def meet(self, total: jax.Array) -> jax.Array:
        """Sums the sublanes of each row."""
        return _halve(total)

    @property
    def of_statistic(self) -> pl.BlockSpec:
        """For mean and variance [examples, slabs, 1, rows]."""
        return self.spec(
            (None, self.block_slabs, 1, self.block_rows),
            lambda example, slab, row: (example, slab, 0, row),
        )

    def put_statistic(self, ref: Any, index: Any, row: jax.Array) -> None:
        """Puts the first of [SUBLANES, chunk_rows]."""
        slab, first = self._slab_and_row(index)
        ref[slab, :, pl.ds(first, self.chunk_rows)] = row[:1]

    def get_statistic(
        self, ref: Any, index: Any, of: Callable[[jax.Array], jax.Array] = lambda s: s
    ) -> jax.Array:
        """Reads back [SUBLANES, chunk_rows], of numbers or a function of them."""
        slab, first = self._slab_and_row(index)
        row = of(ref[slab, :, pl.ds(first, self.chunk_rows)])
        return jnp.broadcast_to(row, self.of_rows_shape)

    # --- chunks ---

    turn_registers = 168  # that the chunks of one turn of the loop would fill

    @property
    def together(self) -> int:
        """Chunks that one turn of the loop does: small ones wait for their sums
        together. If need be fewer, that none of a block is left to be done alone.

        A block of 21 chunks of 384 rows of 64 bfloat16 features, forward, compiled for
        a v6e: with 4 together 1.05 of its HBM traffic's time, with 7 1.00, with all
        1.01.
        """
        registers = self.sublanes // SUBLANES * (self.chunk_rows // LANES)
        of_slab = pl.cdiv(min(self.rows, self.block_rows), self.chunk_rows)
        chunks = of_slab * min(self.slabs, self.block_slabs)
        most = max(min(chunks, self.turn_registers // registers), 1)
        even = max(n for n in range(1, most + 1) if chunks % n == 0)
        return even if 2 * even > most else most

    @property
    def chunks(self) -> Any:
        """Of this block, that have rows."""
        slab, _ = self.block_number
        slabs = jnp.minimum(self.slabs - slab * self.block_slabs, self.block_slabs)
        if self.cores > 1:
            slabs = jnp.maximum(slabs, 0)
        return slabs * self.chunks_of_slab

    def _slab_and_row(self, index: Any) -> tuple[Any, Any]:
        """Where a chunk begins, in a block."""
        slab: Any = 0
        if self.block_slabs > 1:
            of_slab = self.chunks_of_slab
            slab, index = lax.div(index, of_slab), lax.rem(index, of_slab)
        return slab, pl.multiple_of(index * self.chunk_rows, LANES)

    @property
    def filled(self) -> int:
        return self.sublanes

    def part(self, ref: Any, piece: Piece) -> Any:
        """The sublanes of a piece."""
        return piece.of(ref, ref.ndim - 2, self._size(piece))

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        slab, row = self._slab_and_row(index)
        return slab, slice(None), pl.ds(row, self.chunk_rows)

    def add(
        self,
        totals: Sequence[jax.Array] | None,
        values: Sequence[jax.Array],
        piece: Piece,
    ) -> list[jax.Array]:
        """Adds a piece's to those of the pieces before, place by place."""
        if piece.number == self.pieces - 1 and self.features % SUBLANES:
            feature = lax.broadcasted_iota(jnp.int32, values[0].shape, 0)
            left = self.features - piece.number * LANES
            values = [jnp.where(feature < left, value, NOTHING) for value in values]
        return list(values if totals is None else map(_add_to_first, totals, values))

    def is_inside(self, index: Any) -> jax.Array:
        """bool [1, chunk_rows]: whether the array has this row."""
        _, block = self.block_number
        first = block * self.block_rows + self._slab_and_row(index)[1]
        row = lax.broadcasted_iota(jnp.int32, (1, self.chunk_rows), 1)
        return first + row < self.rows


# --- features across the lanes, turned in registers -----------------------------------


class Turned(DownSublanes):
    """How the view x[examples, slabs, rows, features] is cut, of up to LANES features.

    Where a row is one register wide, each number of a row costs as much as its
    features, and each sum the cycles of a sum over lanes. So tiles of 128 rows are
    transposed as they are read and written, and all else is as down the sublanes.
    Cycles of a step over those of its HBM traffic, compiled for a v6e, LayerNorm of 128
    features: bfloat16 1.26 forward, 1.07 backward instead of 2.25 and 2.12; float32
    0.64, 0.66 instead of 1.15 and 1.10.
    """

    # One chunk is transposed while another is computed.
    turn_registers = 512

    @property
    def view(self) -> tuple[int, int, int, int]:
        """Of x, y, and all else of their size."""
        return self.examples, self.slabs, self.rows, self.features

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, and all else of their size."""
        return self.spec(
            (None, self.block_slabs, self.block_rows, LANES),
            lambda example, slab, row: (example, slab, row, 0),
        )

    def place(self, index: Any) -> Any:
        """Where a chunk is, in a block."""
        slab, row = self._slab_and_row(index)
        return slab, pl.ds(row, self.chunk_rows)

    def reader(self, ref: Any, index: Any) -> Callable[[Piece], jax.Array]:
        """Reads a chunk, and transposes it once, as it lies in memory: numbers of 16
        bits two at a time."""
        here = self.place(index)

        def transposed(_: Piece) -> jax.Array:
            return memory.widened(ref[here].T)[: self.sublanes]

        return functools.cache(transposed)

    def write(self, ref: Any, index: Any, _: Piece, value: jax.Array) -> None:
        """Writes a chunk, transposed back."""
        more = LANES - self.sublanes
        if more:
            value = jnp.pad(value, ((0, more), (0, 0)))
        turned = memory.narrowed(value, ref.dtype).T
        memory.store_narrowed(ref, self.place(index), turned)


Blocks = AcrossLanes | DownSublanes  # of which Turned is one


# --- both -----------------------------------------------------------------------------


def _halve(total: jax.Array) -> jax.Array:
    """Sums down the sublanes, which are up to LANES.

    Args:
      total: [sublanes, n]; sublanes without a feature hold `NOTHING`, or are left out.

    Returns:
      [SUBLANES, n], each of whose sublanes has the sums: to the bit, for they differ in
      which operand of an addition is the first.
    """
    half = LANES // 2
    while half >= SUBLANES:
        if total.shape[0] > half:
            total = _add_to_first(total[:half], total[half:])
        half //= 2
    while half >= 1:  # within registers: sublane i gets i + half
        total = total + pltpu.roll(total, SUBLANES - half, 0)
        half //= 2
    return total


def _add_to_first(total: jax.Array, more: jax.Array) -> jax.Array:
    """Adds to as many of the first sublanes as `more` has."""
    count = more.shape[0]
    if count == total.shape[0]:
        return total + more
    return jnp.concatenate([total[:count] + more, total[count:]], 0)
