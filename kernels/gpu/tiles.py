"""Tiles of rows: how rows are divided among threads, and what a warpgroup does in one.

The vocabulary of rowwise.py. A row is a list of *chunks*, each `lanes * vector` columns
wide, held in registers by some lanes of a warp, by whole warpgroups, or by the blocks
of a cluster. A *tile* is the rows that a warpgroup works on at once.

There are no masked loads in Mosaic GPU. Where the columns do not come out even, the
last chunk of a row, or of a warpgroup's part of it, starts early and overlaps the
chunk before it; columns that are seen twice are left out of the sums. Ragged rows are
handled the same way: the last tile overlaps the one before it. No two warpgroups write
the same element.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels.dispatch import Call, present
from fusednorm.kernels.geometry import LONGEST_ROW, power_of_two
from fusednorm.kernels.gpu import memory
from fusednorm.kernels.gpu.memory import LANES, WARPS, Chunk

# Tiles whose dscale and dbias are accumulated in registers before their sum moves to
# shared memory. On an H200, accumulating all 85 tiles of a block in one go gave dbias
# 1.6 times the rounding error of XLA's.
IN_A_ROW = 16

# The blocks of a cluster run on one GPC, of up to 18 multiprocessors (NVIDIA's "H100
# Tensor Core GPU Architecture"; a B200 is taken to have as many). Of an H100's 132, at
# most 31 clusters of 4 or 15 of 8 were resident at once, with a block on each (NVIDIA's
# CUTLASS, issue 1921), and that differs from chip to chip. One cluster too many would
# be a second wave. So the grid has as many as if all GPCs but the last were full: 29 of
# 4, 14 of 8.
OF_GPC = 18

# Shared memory of a block: two levels of dscale and dbias sums over 12288 features
# (RMSNorm has 16384 features and no dbias), and the barriers and buffers in which row
# sums meet.
SUMS_BYTES = 2 * 2 * 4 * 12288
OTHER_BYTES = 1024


# --- how the work is cut --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """How a backward divides its rows among threads and registers.

    Attributes:
      columns: columns of a row that a lane should hold.
      threads: threads per multiprocessor, in persistent blocks.
      ahead: registers per thread available for the dscale and dbias accumulators plus
        the next tile. The next tile is prefetched only if both fit.
      smem: bytes of shared memory that hold the accumulators instead, and the scale if
        it fits; 0 to keep them in registers.
    """

    columns: int
    threads: int
    ahead: int
    smem: int = 0


def share(
    features: int,
    itemsize: int,
    *,
    center: bool,
    slopes: bool,
    beside: bool,
    own: bool,
    smem: int,
) -> Share:
    """Returns the share of a backward, chosen from measurements.

    Blocks that do not fit in the register file would run in a second wave, so `threads`
    follows from the register count of the compiled code, which `make aot` checks.

    Times on an H200 for 160 MB of x, where a copy of the same traffic takes 111 us.
    They are for LayerNorm (RMSNorm for 128 features in bfloat16, 2048 in float32, and
    7168), measured when all tiles of a block were accumulated in registers:

      features  dtype     us; with other shares
            64  bfloat16  124; 16 columns on 512 threads 150
           128  float32   116; 896 threads 122, 16 columns on 512 125
           128  bfloat16  117; 896 threads 120
           512  bfloat16  not measured; 4 columns on 1280 threads 150
           768  float32   112; 512 threads and the next tile 126
          1024  bfloat16  not measured; 8 columns on 768 threads 141
          2048  float32   116; 16 columns on 512 threads 121
          2048  bfloat16  132 (LayerNorm); 8 columns on 512 threads 149
          4096  both      116 to 125; 16 columns on 512 threads 117 to 141
          7168  bfloat16  123; without the next tile 161
         12288  bfloat16  202 on a cluster, where each row waits for two barriers and
                          the L2 cache; without the next tile 257

    Longer rows therefore keep the accumulators in shared memory, where it has room for
    12288 features (RMSNorm: 16384). The registers this frees go to the row, which then
    needs half as many blocks, mostly one and no cluster. An H100 multiprocessor has 48
    KB of loads in flight instead of 24 (12288 features, bfloat16). Accumulating costs
    16 * features bytes of shared memory traffic at 128 bytes per cycle, 1536 cycles per
    row, while HBM needs 3600 cycles for the row (H200). Not measured yet.

    RMSNorm of 512 features in bfloat16 does not load the next tile early: with 136
    registers per thread it would leave room for three blocks per multiprocessor.
    Without it, 96 registers leave room for the four that `threads` asks for.

    Args:
      features: length of a row.
      itemsize: bytes per element of the widest array of x's size that is read.
      center: whether the mean or dbias takes part.
      slopes: whether there is an activation; its slope and z take registers.
      beside: whether another array of x's size is read besides x and dy.
      own: whether examples of several rows have their own scale, which takes registers
        too. `beside` and `own` are not measured: their shares are those without them,
        as far as the registers suffice.
      smem: bytes of shared memory of a block.
    """
    narrow = itemsize == 2
    room = smem - OTHER_BYTES
    if features > 8192 and room >= SUMS_BYTES:
        ahead = 0 if slopes or own or not narrow else 28 if beside else 32
        columns = 24 if center or slopes else 32
        if center and slopes and own and features > 12288:
            columns = 16  # of 24, up to 176 bytes would spill (20483 features)
        return Share(columns=columns, threads=512, ahead=ahead, smem=room)
    if slopes:  # a long row takes 4 warpgroups, for which 384 threads are no block
        many = 384 if (beside or own) and features <= 2048 else 512
        return Share(columns=8, threads=many, ahead=36)
    if features <= 256:
        held = max(64, pl.next_power_of_2(features))  # by 8 lanes or more
        ragged = 3 / 4 * held < features < held  # a third chunk, or columns seen twice
        if own:
            many = 768 - 128 * (ragged + (center and features > 32))
        elif beside or (center and ragged):
            many = 768
        else:
            many = 896 if center or features < 128 else 1024
        return Share(columns=8, threads=many if narrow else min(many, 640), ahead=0)
    if features <= 512:
        crowded = (own and (center or beside)) or (center and beside and not narrow)
        return Share(columns=16, threads=384 if crowded else 512, ahead=24)
    beside = beside or own
    if features <= 1024:
        if narrow:  # a row's sums cost as many instructions as in rows twice as long
            return Share(columns=32, threads=256, ahead=100)
        many = 768 if beside else 1024
        return Share(columns=8, threads=many if features <= 768 else 768, ahead=0)
    if features <= 2048:
        if narrow:
            return Share(columns=16, threads=384, ahead=64)
        return Share(columns=8, threads=512, ahead=56)
    if features <= 4096:
        return Share(columns=32, threads=256, ahead=100)
    return Share(columns=16, threads=512, ahead=40 if beside else 56)


def columns_of_long(features: int, more: int, streamed: int) -> int:
    """Returns the columns per lane of a forward whose rows take whole warpgroups.

    A warpgroup holds as many columns as its registers allow. The fewer threads share a
    row, the fewer registers go to per-thread overhead, and the more rows are in flight.
    By the registers of the compiled code, blocks per H100 multiprocessor and the loads
    of each, in bfloat16, with at most 64 columns and with these:

        LayerNorm of 12288      2 of 24 KB    3 of 24 KB
        RMSNorm of 12288        2 of 24 KB    4 of 24 KB
        LayerNorm of 15360      1 of 30 KB    3 of 30 KB
        LayerNorm of 20480      1 of 40 KB    2 of 40 KB

    Not measured on a chip, but the cost of few loads in flight is: see
    `rowwise.forward`.

    Args:
      features: length of a row.
      more: how many arrays of x's size are read besides x.
      streamed: how many of them stay in registers, like x, until y is computed. A
        thread of four warpgroups has 128 registers: 64 columns of both spill.
    """
    columns = (160, 96, 64)[min(more, 2)]
    if features <= WARPS * LANES * columns:
        return columns
    return 32 if streamed and features > LONGEST_ROW // 4 else 64


@dataclasses.dataclass(frozen=True)
class Config:
    """How rows of one length and dtype are divided, whatever their number.

    Attributes:
      features: length of a row.
      lanes: lanes of a warpgroup that share a row: 2 to 32, all in one warp, or 128.
      warpgroups: warpgroups of a block that share a row, side by side.
      cluster: blocks that share a row, side by side.
      rows: rows that a warpgroup works on at once.
      width: columns of a part. A row has warpgroups * cluster parts; the last one may
        be narrower.
      chunks: chunks of one part.
    """

    features: int
    lanes: int
    warpgroups: int
    cluster: int
    rows: int
    width: int
    chunks: tuple[Chunk, ...]

    @property
    def long(self) -> bool:
        """Whether a row takes whole warpgroups."""
        return self.lanes == WARPS * LANES

    def registers(self, rows: int, itemsize: int) -> int:
        """Returns the registers per thread that hold a tile of `rows` rows.

        Two 16-bit values share a register if a lane loads them together.
        """
        each = sum(pl.cdiv(chunk.vector * itemsize, 4) for chunk in self.chunks)
        return each * max(rows * self.lanes // (WARPS * LANES), 1)

    def shape(self, chunk: Chunk, rows: int) -> tuple[int, int]:
        """Returns a chunk's shape for `rows` rows; a long row has a line per warp."""
        if self.long:
            return WARPS, LANES * chunk.vector
        return rows, self.lanes * chunk.vector

    def kept_bytes(self, rows: int) -> int:
        """Returns the shared memory that a block's part of a tile takes in float32."""
        each = [math.prod(self.shape(chunk, rows)) for chunk in self.chunks]
        return 4 * self.warpgroups * sum(each)

    @property
    def parts(self) -> int:
        """Warpgroups that share a row, over all blocks of its cluster."""
        return self.warpgroups * self.cluster

    def beyond(self, chunk: Chunk) -> int:
        """Returns how many columns of the last part's chunk lie past the row's end."""
        end = (self.parts - 1) * self.width + chunk.start + self.lanes * chunk.vector
        return max(end - self.features, 0)

    def __str__(self) -> str:
        if not self.long:
            return f"{self.rows} rows of {self.features} features"
        whole = "1 row" if self.cluster == 1 else f"1 of {self.cluster} parts of a row"
        return f"{whole} of {self.features} features"

    @property
    def why(self) -> str:
        """Why the row's length led to this division, in words."""
        if not self.long:
            return f"{self.lanes} lanes hold a row; its sums need no barrier"
        hold = "a warpgroup holds"
        if self.parts > 1:
            hold = f"{self.parts} warpgroups hold"
        where = "device" if self.cluster > 1 else "shared"
        return f"{hold} a row; its sums meet in {where} memory"


def configure(
    features: int,
    itemsize: int,
    *,
    per_lane: int,
    of_long: int,
    in_warp: int,
    fill: bool = False,
) -> Config:
    """Divides rows of `features` columns.

    Args:
      features: length of a row, at least 2.
      itemsize: bytes per element of the widest array that is loaded or stored.
      per_lane: columns that a lane should hold.
      of_long: columns that a lane should hold of a row that takes whole warpgroups.
      in_warp: length of the longest row that one warp should hold.
      fill: whether a lane should hold columns of several rows if rows are short.
    """
    # 16 bytes is the widest load, and every row must start at a multiple of it.
    vector = math.gcd(features, 16 // itemsize)
    # 8 lanes of 16 bytes fill a 128-byte line; fewer lanes per row would make one load
    # touch many lines.
    threads = max(8, pl.next_power_of_2(pl.cdiv(features, per_lane)))
    if threads > LANES:
        long = max(WARPS * LANES, pl.next_power_of_2(pl.cdiv(features, of_long)))
        threads = LANES if features <= in_warp else long
    lanes = min(threads, WARPS * LANES)
    while lanes * vector > features:  # a chunk must fit
        if 2 < lanes <= LANES:
            lanes //= 2
        else:
            vector //= 2

    parts = threads // (WARPS * LANES) or 1
    warpgroups = min(parts, 4)  # of 128 registers a thread
    cluster = parts // warpgroups
    width = pl.cdiv(features, parts * vector) * vector
    while lanes * vector > features - (parts - 1) * width:  # in the last part too
        vector //= 2
    chunks = memory.cut(width, lanes, vector)
    rows = WARPS * LANES // lanes
    if fill and rows > 1:
        rows *= power_of_two(max(per_lane * lanes // features, 1))
    return Config(features, lanes, warpgroups, cluster, rows, width, tuple(chunks))


def share_out(
    features: int, itemsize: int, *, smem: int, **kind: bool
) -> tuple[Share, Config]:
    """Returns a backward's share and config. The arguments are those of `share`."""
    work = share(features, itemsize, smem=smem, **kind)
    columns, in_smem = work.columns, work.smem > 0
    # Mosaic reduces rows over warps with at most 4 columns per lane. And in shared
    # memory, adjacent 16-byte accesses of lanes have no bank conflicts.
    four = features <= LANES * columns or in_smem
    config = configure(
        features,
        4 if four else itemsize,
        per_lane=columns,
        of_long=columns if features <= LONGEST_ROW // 2 or in_smem else 16,
        in_warp=LANES * columns,
    )
    return work, config


def grid(
    config: Config, rows: int, examples: int, processors: int, threads: int
) -> tuple[int, int, int]:
    """Returns (tile, tiles, blocks) of a persistent grid: rows per tile, whole tiles
    per example, and blocks per example.

    The grid has as many blocks as are resident with `threads` threads per
    multiprocessor, where a cluster counts as one block. It has fewer where a block
    would get fewer than 32 rows, because its partial sums would exceed a tenth of its
    traffic; but every multiprocessor gets work. A block works on one example. The grid
    has more blocks than are resident where the busiest multiprocessor would otherwise
    have over a tenth more of them than the mean. DiT-XL/2, for instance, has 271
    samples: with one block each, some of 132 multiprocessors get three and most two;
    with four blocks each, nine and eight.
    """
    tile = min(config.rows, power_of_two(rows))
    tiles = rows // tile
    block = WARPS * LANES * config.warpgroups
    assert threads >= block, "no block of the grid would be resident"
    here = threads // block  # blocks of one multiprocessor
    full, rest = divmod(processors, OF_GPC)
    resident = full * (OF_GPC * here // config.cluster)
    resident += rest * here // config.cluster
    least = pl.cdiv(processors, examples)
    most = max(min(max(rows // 32, least // config.cluster), tiles), 1)
    blocks = max(min(resident // examples, most), 1)
    if examples > 1:
        clusters = max(processors // config.cluster, 1)

        def busiest(blocks: int) -> float:
            """Returns the most blocks of one multiprocessor, over the mean."""
            mean = examples * blocks / clusters
            return math.ceil(mean) / mean

        choices = range(blocks, most + 1)
        even = (count for count in choices if busiest(count) <= 1.1)
        blocks = next(even, None) or min(choices, key=busiest)
    return tile, tiles, blocks


def sums_twice(tiles: int, blocks: int) -> bool:
    """Returns whether sums over `IN_A_ROW` tiles move to shared memory.

    They do where a block has that many whole tiles; a ragged one may follow. With fewer
    tiles there may be fewer rows than warps, and warps that hold the same row would add
    to one sum without synchronization.
    """
    return pl.cdiv(tiles, blocks) >= IN_A_ROW


# --- where rows lie -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """The position of a row, or of the first row of a tile.

    Attributes:
      at: index along the first axis of an array of rows.
      number: index among all rows; no two rows share one.
      group: group of the row's channels, where groups lie side by side; else None.
    """

    at: Any
    number: Any
    group: Any = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Sets of rows; the rows of one example share scale, bias, dscale and dbias.

    Attributes:
      count: number of examples.
      rows: rows of each example.
      groups: whether an example is one group of channels in each of `rows` rows; if
        not, its rows are consecutive.
    """

    count: int
    rows: int
    groups: bool

    @classmethod
    def of(cls, call: Call, features: int) -> "Examples":
        """Returns the examples of a call whose rows have `features` columns."""
        count = call.row_groups * math.prod(call.x.shape[: call.param_axes])
        return cls(count, call.x.size // features // count, call.row_groups > 1)

    def row(self, example: Any, index: Any) -> Row:
        """Returns the position of an example's `index`-th row."""
        number = example * self.rows + index
        return Row(index, number, example) if self.groups else Row(number, number)

    def of_program(self, blocks: int) -> tuple[Any, Any]:
        """Returns (example, block) of this program; an example has `blocks` blocks.

        Programs that run at the same time work on adjacent memory.
        """
        # The grid has one axis, since the second axis of a grid is limited to 65535.
        program = lax.axis_index("block")
        if self.count == 1:
            return 0, program
        if self.groups:
            return lax.rem(program, self.count), lax.div(program, self.count)
        return lax.div(program, blocks), lax.rem(program, blocks)

    def by_rows(
        self, features: int, **operands: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Returns the operands that are given, as (rows, columns).

        A scale or bias of all rows keeps its shape; that of groups becomes (groups,
        features).
        """
        rows = (-1, self.count * features if self.groups else features)
        shared = (self.count, features) if self.groups else (features,)

        def shape(name: str, array: jax.Array) -> tuple[int, ...]:
            return shared if name in ("scale", "bias") and array.ndim == 1 else rows

        given = present(**operands)
        return {
            name: array.reshape(shape(name, array)) for name, array in given.items()
        }

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        """Shape of an array with one number per row."""
        if self.groups:
            return self.rows, self.count
        return (self.count * self.rows,)


# --- what is in registers -------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Values:
    """A tile's values in registers, one array per chunk, with elementwise arithmetic.

    The other operand of +, - and * is `Values`, a number, or a statistic. A statistic
    has one value per row and is broadcast over the columns.
    """

    chunks: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.chunks)

    def __getitem__(self, number: int) -> Any:
        return self.chunks[number]

    def map(self, function: Callable[..., Any], *others: "Values") -> "Values":
        chunks = zip(self.chunks, *(other.chunks for other in others), strict=True)
        return Values(tuple(itertools.starmap(function, chunks)))

    def astype(self, dtype: Any) -> "Values":
        return self.map(lambda chunk: chunk.astype(dtype))

    def float32(self) -> "Values":
        return self.astype(jnp.float32)

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Values":
        if isinstance(other, Values):
            return self.map(operation, other)
        if not isinstance(other, jax.Array):
            return self.map(lambda chunk: operation(chunk, other))
        return self.map(lambda chunk: operation(chunk, across(other, chunk)))

    def __add__(self, other: Any) -> "Values":
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> "Values":
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> "Values":
        return self._with(other, operator.mul)


def across(statistic: jax.Array, chunk: jax.Array) -> jax.Array:
    """Broadcasts a statistic over the columns of a chunk."""
    return lax.broadcast_in_dim(statistic, chunk.shape, range(statistic.ndim))


def _layout(lanes: int, vector: int, rows: int) -> Any:
    """Lays (rows, lanes * vector) over a warpgroup: rows over warps, then over lanes.

    With fewer rows than the warpgroup has room for, warps and lanes hold copies of a
    row. So the columns of a row are always on the same lanes, and its sums are always
    taken in the same order.
    """
    rows = min(rows, WARPS * LANES // lanes)
    warps = min(rows, WARPS)
    in_warp = rows // warps
    # The tiles split (rows, columns) into (warps, 1, rows per warp, pairs of lanes, 2,
    # vector); the second and third axes are absent where a warp has one row. Without
    # pairs, Mosaic would move single columns by `stmatrix`, where lanes write each
    # other's values.
    pairs = lanes % 4 == 0
    last = -3 if pairs else -2  # the axis of lanes, or of pairs
    tiles: list[tuple[int, ...]] = [(rows, lanes * vector)]
    warp_dims: list[Any] = [last - 1]
    lane_dims: list[Any] = [last, -2] if pairs else [last]
    if in_warp > 1:
        tiles.append((in_warp, lanes * vector))
        warp_dims = [last - 3]
        lane_dims.insert(0, last - 1)
    if pairs:
        tiles.append((2 * vector,))
    if warps == 1:
        warp_dims = []
    if warps < WARPS:
        warp_dims.insert(0, plgpu.Replicated(WARPS // warps))
    if lanes * in_warp < LANES:
        lane_dims.insert(0, plgpu.Replicated(LANES // (lanes * in_warp)))
    return plgpu.Layout.TILED(
        plgpu.Tiling((*tiles, (vector,))),
        warp_dims=tuple(warp_dims),
        lane_dims=tuple(lane_dims),
        vector_dim=-1,
    )


class Part:
    """One warpgroup's part of a tile, inside a kernel: its loads, sums and stores.

    In a tile of short rows, a chunk is (rows, columns) and a statistic (rows,). In a
    long row, a chunk is (4, columns), one line per warp, and a statistic ().

    Attributes:
      config: how rows are divided.
      rows: rows of the tile.
      index: index of this part in its row; the Python int 0 where it is the only one.
    """

    def __init__(self, config: Config, rows: int, scratch: dict[str, Any]):
        self.config = config
        self.rows = rows
        self.index: Any = 0
        self._block: Any = 0
        self._warpgroup: Any = 0
        if config.cluster > 1:
            self._block = lax.axis_index("cluster")
        if config.warpgroups > 1:
            self._warpgroup = lax.axis_index("warpgroup")
        if config.parts > 1:
            self.index = self._block * config.warpgroups + self._warpgroup
        self._scratch = scratch

    # Where a chunk lies.

    def _columns(self, chunk: Chunk, *, skip: int = 0, group: Any = None) -> pl.Slice:
        """Returns the chunk's columns, counted without the first `skip` ones."""
        start = chunk.start - skip
        first = self.index * self.config.width + start - self._earlier(chunk)
        if group is not None:
            first = group * self.config.features + first
        return pl.ds(first, self.config.lanes * chunk.vector)

    def _from_chunk(
        self, ref: Any, chunk: Chunk, group: Any = None
    ) -> tuple[Any, pl.Slice]:
        """Returns ref without its first `chunk.start` columns, and the chunk's columns.

        The start is then an immediate of the access. Added to what the program computes
        in int32, it would give each chunk an address of its own: six instructions, and
        two registers. LayerNorm of 13824 bfloat16 features with a residual takes 125
        registers forward, and would take 153; of 25745 it would spill. Parameters and
        totals have addresses of their own all the same: with immediates the backward of
        12288 features with a scale of each sample spills.
        """
        *lines, columns = ref.shape
        rest = pl.ds(chunk.start, columns - chunk.start)
        here = self._columns(chunk, skip=chunk.start, group=group)
        return ref.at[(*map(slice, lines), rest)], here

    def _earlier(self, chunk: Chunk) -> Any:
        """Returns how many columns early the chunk starts, to end within the row."""
        if not (beyond := self.config.beyond(chunk)):
            return 0
        return jnp.where(self.index == self.config.parts - 1, beyond, 0)

    def _layout(self, chunk: Chunk) -> Any:
        if self.config.long:
            return _layout(LANES, chunk.vector, WARPS)
        return _layout(self.config.lanes, chunk.vector, self.rows)

    def _shape(self, chunk: Chunk) -> tuple[int, int]:
        return self.config.shape(chunk, self.rows)

    # Chunks.

    def load(self, ref: Any, row: Row) -> Values:
        """Loads the tile that starts at `row`, in the dtype of ref."""

        def load_chunk(chunk: Chunk) -> jax.Array:
            here, columns = self._from_chunk(ref, chunk, row.group)
            layout = self._layout(chunk)
            if self.config.long:
                return memory.load_as(
                    here, (row.at, columns), self._shape(chunk), layout
                )
            rows = pl.ds(row.at, self.rows)
            return memory.load(here, (rows, columns), layout, ref.dtype)

        return self._of_chunks(load_chunk)

    def _of_chunks(self, function: Callable[[Chunk], Any]) -> Values:
        return Values(tuple(map(function, self.config.chunks)))

    def store(self, ref: Any, row: Row, values: Values) -> None:
        """Stores the tile that starts at `row`."""
        for chunk, value in zip(self.config.chunks, values, strict=True):
            self.store_chunk(ref, row, chunk, value)

    def store_chunk(self, ref: Any, row: Row, chunk: Chunk, value: jax.Array) -> None:
        """Stores one chunk of the tile that starts at `row`."""
        here, columns = self._from_chunk(ref, chunk, row.group)
        if self.config.long:
            memory.store_as(here, (row.at, columns), value)
        else:
            memory.store(here, (pl.ds(row.at, self.rows), columns), value)

    def load_params(self, ref: Any, example: Any, examples: int) -> Values:
        """Loads the example's scale or bias, broadcast over the rows of the tile.

        Args:
          ref: (features,), or (n, features) where examples / n consecutive examples
            share each row.
          example: index of the example.
          examples: number of examples.
        """
        return self._of_chunks(
            lambda chunk: self.load_param(ref, chunk, example, examples)
        )

    def load_param(
        self, ref: Any, chunk: Chunk, example: Any, examples: int
    ) -> jax.Array:
        """Loads one chunk of `load_params`."""
        at: tuple[Any, ...] = (self._columns(chunk),)
        if len(ref.shape) > 1:
            at = (lax.div(example, examples // ref.shape[0]), *at)
        if self.config.long:
            shape, layout = self._shape(chunk), self._layout(chunk)
            return memory.load_as(ref, at, shape, layout).astype(jnp.float32)
        row = memory.load(ref, at, self._layout(chunk).reduce(0))
        return lax.broadcast_in_dim(row, self._shape(chunk), (1,))

    def store_total(self, ref: Any, line: Any, values: Values) -> None:
        """Stores the sum over the tile's rows to a line of ref."""
        for chunk, value in zip(self.config.chunks, values, strict=True):
            columns = self._columns(chunk)
            if self.config.long:
                memory.store_as(ref, (line, columns), value)
            elif self.rows == 1:
                memory.store(ref, (pl.ds(line, 1), columns), value)
            else:
                memory.store(ref, (line, columns), jnp.sum(value, axis=0))

    def keep(self, name: str, values: Values) -> None:
        """Stores float32 values in shared memory; each lane reads its own back."""
        for i, value in enumerate(values):
            memory.store(self._scratch[f"{name}_{i}"], (self._warpgroup,), value)

    def kept(self, name: str) -> Values:
        """Loads the values that `keep` stored under this name."""
        layouts = enumerate(map(self._layout, self.config.chunks))
        return Values(
            tuple(
                memory.load(self._scratch[f"{name}_{i}"], (self._warpgroup,), layout)
                for i, layout in layouts
            )
        )

    @property
    def zeros(self) -> Values:
        def zeros(chunk: Chunk) -> jax.Array:
            array = jnp.zeros(self._shape(chunk), jnp.float32)
            return plgpu.layout_cast(array, self._layout(chunk))

        return self._of_chunks(zeros)

    def rows_from(self, first: Any, values: Values) -> Values:
        """Replaces the tile's rows before row `first` with zeros."""
        pairs = zip(self.config.chunks, values, strict=True)
        return Values(
            tuple(
                jnp.where(self._iota(chunk, 0) >= first, value, 0.0)
                for chunk, value in pairs
            )
        )

    def _iota(self, chunk: Chunk, axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(
            jnp.int32, self._shape(chunk), axis, layout=self._layout(chunk)
        )

    # Statistics.

    def load_statistic(self, ref: Any, row: Row) -> jax.Array:
        """Loads the statistic of a long row, or of all rows of the tile at `row`."""
        at = self._statistic(row)
        if self.config.long:
            return ref[at]
        layout = self._layout(self.config.chunks[0]).reduce(1)
        return memory.load(ref, at, layout)

    def store_statistic(self, ref: Any, row: Row, value: jax.Array) -> None:
        at = self._statistic(row)

        def write() -> None:
            if self.config.long:
                ref[at] = value
            else:
                memory.store(ref, at, value)

        write() if self.config.parts == 1 else pl.when(self.index == 0)(write)

    def _statistic(self, row: Row) -> tuple[Any, ...]:
        rows = row.at if self.config.long else pl.ds(row.at, self.rows)
        return (rows,) if row.group is None else (rows, row.group)

    def squares(self, values: Values) -> Values:
        """Returns the squares of values, for `sums`.

        Where a lane has several columns, they are summed before lanes add anything.
        """

        def square(chunk: Chunk, value: jax.Array) -> jax.Array:
            return memory.square(value) if chunk.vector == 1 else value * value

        return Values(tuple(map(square, self.config.chunks, values)))

    def sums(self, *terms: Values, row: Row, place: Any) -> list[jax.Array]:
        """Sums each of the terms over whole rows and returns a statistic for each.

        Args:
          terms: values of the tile.
          row: the current row.
          place: first of the slots, one per term, in which the sums of a long row's
            warps meet. Consecutive calls for one long row, or for two, must use
            different slots.
        """
        own = [self._sum(values) for values in terms]
        if not self.config.long:
            return own
        in_block = self._scratch["sums"]
        for i, warps in enumerate(own):  # (4,)
            memory.store(
                in_block, (place + i, pl.ds(self._warpgroup * WARPS, WARPS)), warps
            )
        self._meet("in_block")
        count = self.config.warpgroups * WARPS
        totals = [_total(in_block, (place + i,), count) for i in range(len(own))]
        if self.config.cluster > 1:
            in_cluster = self._scratch["of_blocks"]

            @pl.when(self._warpgroup == 0)
            def _() -> None:
                for i, total in enumerate(totals):
                    in_cluster[row.number, place + i, self._block] = total
                memory.fence()

            self._meet("in_cluster")
            memory.fence()
            count = self.config.cluster
            totals = [
                _total(in_cluster, (row.number, place + i), count)
                for i in range(len(own))
            ]
        return totals

    def _meet(self, barrier: str) -> None:
        plgpu.barrier_arrive(self._scratch[barrier])
        plgpu.barrier_wait(self._scratch[barrier])

    def _sum(self, values: Values) -> jax.Array:
        """Sums over the columns of this part, each counted once: (rows,) or (4,)."""
        alike: dict[int, Any] = {}  # by vector width: chunks of the same layout
        for chunk, value in zip(self.config.chunks, values, strict=True):
            # Start from 0.0, for the reason given in `memory.sum_lanes`. Adding the 0.0
            # there, at the end, would cost a register, and the backward of 12288
            # features has none to spare.
            before = alike.get(chunk.vector, 0.0)
            alike[chunk.vector] = before + self._once(chunk, value)
        return functools.reduce(jnp.add, [jnp.sum(v, axis=1) for v in alike.values()])

    def _once(self, chunk: Chunk, value: jax.Array) -> jax.Array:
        """Replaces the columns that another chunk counts with zeros."""
        if not chunk.seen and not self.config.beyond(chunk):
            return value
        first = chunk.seen + self._earlier(chunk)
        column = self._iota(chunk, 1)
        if self.config.long:
            column = column + self._iota(chunk, 0) * (LANES * chunk.vector)
        return jnp.where(column >= first, value, 0.0)


def _total(ref: Any, at: tuple[Any, ...], count: int) -> jax.Array:
    """Returns ref[*at, 0] + ... + ref[*at, count - 1], added in this order."""
    return functools.reduce(jnp.add, [ref[*at, i] for i in range(count)])


# --- sums over rows -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums of dscale and dbias over a block's tiles, accumulated in up to two levels.

    The first level sums up to `IN_A_ROW` consecutive tiles, in registers or in shared
    memory. The second level, where there is one, sums the results of the first in
    shared memory.

    Attributes:
      part: the warpgroup's part of the tile.
      names: names of the sums.
      in_smem: whether the first level is in shared memory.
      twice: whether there is a second level.
    """

    part: Part
    names: Sequence[str]
    in_smem: bool
    twice: bool

    @staticmethod
    def scratch_names(
        names: Sequence[str], *, in_smem: bool, twice: bool
    ) -> tuple[str, ...]:
        """Returns the names of the sums that need room in shared memory."""
        first = [_in_a_row(name) for name in names if in_smem]
        return (*first, *[name for name in names if twice])

    def begin(self) -> dict[str, Values]:
        """Zeroes the first level and returns the part of it that a loop carries."""
        if not self.in_smem:
            return dict.fromkeys(self.names, self.part.zeros)
        for name in self.names:
            self.part.keep(_in_a_row(name), self.part.zeros)
        return {}

    def add(self, carried: Any, terms: Mapping[str, Values]) -> Any:
        """Adds one tile's terms to the first level."""
        if not self.in_smem:
            return {name: total + terms[name] for name, total in carried.items()}
        for name in self.names:
            self._add(_in_a_row(name), terms[name])
        return carried

    def end(self, carried: dict[str, Any]) -> dict[str, Values]:
        """Returns the sums of the first level."""
        if not self.in_smem:
            return carried
        return {name: self.part.kept(_in_a_row(name)) for name in self.names}

    def _add(self, name: str, terms: Values) -> None:
        self.part.keep(name, self.part.kept(name) + terms)

    def over_tiles(
        self,
        count: Any,
        load: Callable[[Any], Any],
        load_statistics: Callable[[Any], Any],
        step: Callable[[Any, Any, Any], Any],
        *,
        ahead: bool,
    ) -> dict[str, Values]:
        """Returns the sums over a block's tiles, by name.

        Args:
          count: number of tiles of the block.
          load: load(i) loads the arrays of x's size that `step` needs of tile i.
          load_statistics: load_statistics(i) loads the rest.
          step: step(i, carried, loaded) adds the terms of tile i to `carried`.
          ahead: whether tile i + 1 is loaded while tile i is computed.
        """

        def load_tile(i: Any) -> tuple[Any, Any]:
            return load(i), load_statistics(i)

        def load_next(i: Any, tile: tuple[Any, Any]) -> tuple[Any, Any]:
            """Loads tile i, or the statistics of the last tile again if i is none."""
            loaded = lax.cond(i < count, lambda: load(i), lambda: tile[0])
            # In the branch, the compiler would move a long row's statistics to uniform
            # registers, and wait for them there.
            return loaded, load_statistics(jnp.minimum(i, count - 1))

        def sum_run(first: Any, number: Any, tile: Any) -> tuple[Any, Any]:
            """Sums `number` consecutive tiles. `tile` is the first, loaded if `ahead`.

            Returns the sums, and the tile after these, loaded if `ahead`.
            """

            def add_tile(j: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                sums, tile = carry
                i = first + j
                following = load_next(i + 1, tile) if ahead else None
                loaded, statistics = tile if ahead else load_tile(i)
                return step(i, sums, loaded | statistics), following

            sums, tile = lax.fori_loop(0, number, add_tile, (self.begin(), tile))
            return self.end(sums), tile

        tile = load_tile(0) if ahead else None
        if not self.twice:
            return sum_run(0, count, tile)[0]

        def add_run(n: Any, tile: Any) -> Any:
            first = n * IN_A_ROW
            sums, tile = sum_run(first, jnp.minimum(count - first, IN_A_ROW), tile)
            for name, total in sums.items():
                self._add(name, total)
            return tile

        for name in self.names:
            self.part.keep(name, self.part.zeros)
        lax.fori_loop(0, (count + IN_A_ROW - 1) // IN_A_ROW, add_run, tile)
        return {name: self.part.kept(name) for name in self.names}


def _in_a_row(name: str) -> str:
    """Returns the name of a first-level sum in shared memory."""
    return f"{name}_in_a_row"
