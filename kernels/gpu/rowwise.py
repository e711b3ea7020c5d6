"""LayerNorm and RMSNorm over contiguous rows, on Pallas Mosaic GPU.

    forward   y = act(z),  z = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dz * scale
              dscale = sum(dz * x_hat),  dbias = sum(dz)            over rows
              dz = dy * act'(z)

Of a row that lies on several devices (`Call.half`) these kernels find the statistics,
or the sums for dx, of what is here; the rest is elementwise, XLA's, and a second read.

With a residual h = x + residual takes the place of x, and to dx its cotangent dh is
added. A shortcut is added to z, and its gradient is dz. Scale and bias may be those of
an *example*, so many rows one behind the other; or each row has its own scale, which is
then read as x is, and its gradient dz * x_hat written as dx is. Groups of channels of
which each is normalized by itself, heads of a QK-norm with a scale of their own, are
examples too, whose rows lie side by side: those of a group are every G-th.

Each is one kernel that reads x (and dy, and all else of x's size) once: a row lies in
registers from its first sum to its last store. How many threads share a row depends on
its length:

    short   2 to 32 lanes of a warp; its sums are shuffles, there is no barrier
    long    1 to 4 warpgroups of a block; their warps' sums meet in shared memory
    longer  the blocks of a cluster too; their sums meet in device memory

A row is a list of *chunks*, each `lanes * vector` columns wide. There are no masked
loads in Mosaic GPU: where the columns do not come out even, the last chunk of a row, or
of a warpgroup's part of it, begins earlier and overlaps the one before it, and the
columns that come twice are left out of the sums. Ragged rows are treated alike: the
last tile overlaps the one before it. No warpgroup writes what another one does.

What a row's result is made of (lanes, chunks, the order of every sum) follows from the
features and dtypes alone, never from the number of rows: results are bitwise the same
in any batch. Over how many blocks dscale and dbias are added up follows from the number
of rows, and of examples that have their own.

Sources: layer normalization, Ba et al. 2016 (arXiv:1607.06450); RMS normalization,
Zhang and Sennrich 2019 (arXiv:1910.07467); the corrected two-pass variance, Chan, Golub
and LeVeque 1983.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels.activation import activate, slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, present
from fusednorm.kernels.geometry import LONGEST_ROW, power_of_two
from fusednorm.kernels.gpu import memory
from fusednorm.kernels.gpu.memory import LANES, WARPS, Chunk

# Tiles whose dscale and dbias are added up in registers; then their sum goes to shared
# memory. On an H200 all 85 tiles of a block in a row rounded dbias 1.6 times worse than
# XLA does.
IN_A_ROW = 16

# Of shared memory: the sums of dscale and dbias, in two levels, of the 12288 features
# of a block (RMSNorm's have 16384, and no dbias); and barriers, and where the sums of
# rows meet.
SUMS_BYTES = 2 * 2 * 4 * 12288
OTHER_BYTES = 1024


# --- how the work is cut --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """How a backward's rows are shared out among threads and registers.

    Attributes:
      columns: of a row that a lane should hold.
      threads: of a multiprocessor, in persistent blocks.
      ahead: registers of a thread for the sums of dscale and dbias and for the next
        tile, which is loaded while this one is worked on; with too few it is not.
      smem: bytes of shared memory in which these sums are instead, and the scale if it
        fits; or 0.
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
    """That of a backward, from measurements.

    Blocks that the registers do not hold would come in a second wave: threads follow
    from the compiled code's registers, which `make aot` checks.

    On an H200 the kernel took, of 160 MB of x, where copying as much as it moves takes
    111 us (LayerNorm; RMSNorm of 128 features in bfloat16, 2048 in float32, 7168; when
    all tiles of a block were added up in registers):

      features  dtype     us, and with other shares
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
         12288  bfloat16  202, on a cluster, of which each row waits for two barriers
                          and the L2 cache; without the next tile 257

    So where shared memory has room for the sums of rows of 12288 features (RMSNorm:
    16384), their registers go to the row: it needs half as many blocks, mostly one, and
    no cluster. An H100's multiprocessor has 48 KB of loads in flight then instead of 24
    (12288 features, bfloat16). Adding to the sums takes 16 * features bytes of shared
    memory's 128 a cycle, 1536 cycles a row, while HBM takes 3600 for it (H200). Not
    measured yet.

    Args:
      features: length of a row.
      itemsize: bytes of an element of the widest array of x's size that is read.
      center: whether mean or dbias come to it.
      slopes: whether through an activation, whose slope takes registers, and z.
      beside: whether more of x's size is read than x and dy.
      own: whether examples have their own scale, which takes registers too. Neither is
        measured: the shares are those without, as far as the registers hold them.
      smem: bytes of shared memory of a block.
    """
    narrow = itemsize == 2
    room = smem - OTHER_BYTES
    if features > 8192 and room >= SUMS_BYTES:
        ahead = 0 if slopes or own or not narrow else 28 if beside else 32
        columns = 24 if center else 32
        return Share(columns=columns, threads=512, ahead=ahead, smem=room)
    beside = beside or own
    if slopes:  # 384 threads are no block of the 4 warpgroups of a long row
        many = 384 if beside and features <= 2048 else 512
        return Share(columns=8, threads=many, ahead=36)
    if features <= 256:
        many = 896 if center or features < 128 else 1024
        many = 768 if beside else many
        return Share(columns=8, threads=many if narrow else 640, ahead=0)
    if features <= 512:
        return Share(columns=16, threads=512, ahead=36)
    if features <= 1024:
        if narrow:  # as many instructions for each row's sums as for rows twice as long
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


def columns_of_long(features: int, more: int) -> int:
    """That a lane of a forward should hold, of a row that takes whole warpgroups.

    A warpgroup holds as many as its registers have room for: the fewer threads hold a
    row, the fewer registers go to what each has of its own, and the more rows are on
    their way. By the compiled code's registers, blocks of an H100's multiprocessor and
    their loads, with 64 columns at most and with these, in bfloat16:

        LayerNorm of 12288      2 of 24 KB    3 of 24 KB
        RMSNorm of 12288        2 of 24 KB    4 of 24 KB
        LayerNorm of 15360      1 of 30 KB    3 of 30 KB
        LayerNorm of 20480      1 of 40 KB    2 of 40 KB

    Not measured on a chip; what few loads in flight cost is: see `forward`.

    Args:
      features: length of a row.
      more: how many arrays of x's size are read beside x.
    """
    columns = (160, 96, 64)[min(more, 2)]
    return columns if features <= WARPS * LANES * columns else 64


@dataclasses.dataclass(frozen=True)
class Config:
    """How rows of one length and dtype are cut. No function of their number.

    Attributes:
      features: length of a row.
      lanes: of a warpgroup that share a row: 2 to 32, all of one warp, or 128.
      warpgroups: of a block that share a row, side by side.
      cluster: blocks that share a row, side by side.
      rows: rows that a warpgroup works on at once.
      width: columns of a part, of which a row has warpgroups * cluster; the last one
        may have fewer.
      chunks: of one part.
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
        """That hold a tile of so many rows, in each thread.

        Two numbers of 16 bits share one if a lane loads them together.
        """
        each = sum(pl.cdiv(chunk.vector * itemsize, 4) for chunk in self.chunks)
        return each * max(rows * self.lanes // (WARPS * LANES), 1)

    def shape(self, chunk: Chunk, rows: int) -> tuple[int, int]:
        """Of a chunk of a tile of so many rows; of a long row, one line a warp."""
        if self.long:
            return WARPS, LANES * chunk.vector
        return rows, self.lanes * chunk.vector

    def kept_bytes(self, rows: int) -> int:
        """Of shared memory, that a block's part of a tile takes in float32."""
        each = [math.prod(self.shape(chunk, rows)) for chunk in self.chunks]
        return 4 * self.warpgroups * sum(each)

    @property
    def parts(self) -> int:
        """Warpgroups that share a row."""
        return self.warpgroups * self.cluster

    def beyond(self, chunk: Chunk) -> int:
        """Columns by which the chunk of the last part would be beyond the row."""
        end = (self.parts - 1) * self.width + chunk.start + self.lanes * chunk.vector
        return max(end - self.features, 0)

    def __str__(self) -> str:
        if not self.long:
            return f"{self.rows} rows of {self.features} features"
        whole = "1 row" if self.cluster == 1 else f"1 of {self.cluster} parts of a row"
        return f"{whole} of {self.features} features"

    @property
    def why(self) -> str:
        """What the row's length led to."""
        if not self.long:
            return f"{self.lanes} lanes hold a row, whose sums need no barrier"
        hold = "a warpgroup holds"
        if self.parts > 1:
            hold = f"{self.parts} warpgroups hold"
        where = "device" if self.cluster > 1 else "shared"
        return f"{hold} a row, whose sums meet in {where} memory"


def configure(
    features: int,
    itemsize: int,
    *,
    per_lane: int,
    of_long: int,
    in_warp: int,
    fill: bool = False,
) -> Config:
    """Cuts rows of `features`.

    Args:
      features: at least 2.
      itemsize: bytes of the widest of the arrays that are loaded and stored.
      per_lane: columns that a lane should hold.
      of_long: the same, of a row that takes whole warpgroups.
      in_warp: the longest row that one warp should hold.
      fill: whether a lane should hold columns of several rows, if they are short.
    """
    # 16 bytes is the widest load; all rows must start at a multiple of it.
    vector = math.gcd(features, 16 // itemsize)
    # 8 lanes of 16 bytes fill a line of 128. Fewer would ask for many lines at once.
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


# --- where rows lie -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a row is, or the first of a tile.

    Attributes:
      at: along the first axis of what has one row behind the other.
      number: among all rows, each of which has one.
      group: of the row's channels, in what has groups side by side; else None.
    """

    at: Any
    number: Any
    group: Any = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows that share a scale and bias, and the sums of dscale and dbias.

    Attributes:
      count: of examples.
      rows: of each.
      groups: whether they are the groups of `rows` rows of channels; else the rows of
        an example lie one behind the other.
    """

    count: int
    rows: int
    groups: bool

    @classmethod
    def of(cls, call: Call, features: int) -> "Examples":
        """Those of a call, of which a row has so many features."""
        count = call.row_groups * math.prod(call.x.shape[: call.own])
        return cls(count, call.x.size // features // count, call.row_groups > 1)

    def row(self, example: Any, index: Any) -> Row:
        """The index-th of an example."""
        number = example * self.rows + index
        return Row(index, number, example) if self.groups else Row(number, number)

    def of_program(self, blocks: int) -> tuple[Any, Any]:
        """(example, block) of the program at hand; an example has so many blocks.

        Those at work at one time have neighbours in memory, one behind the other or
        side by side.
        """
        # One axis: the second one of a grid would end at 65535.
        program = lax.axis_index("block")
        if self.count == 1:
            return 0, program
        if self.groups:
            return lax.rem(program, self.count), lax.div(program, self.count)
        return lax.div(program, blocks), lax.rem(program, blocks)

    def by_rows(
        self, features: int, **operands: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Those there are, as (rows, columns); a scale or bias of all rows as it is,
        and of groups as (groups, features)."""
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
        """Of one number for each row."""
        if self.groups:
            return self.rows, self.count
        return (self.count * self.rows,)


# --- what is in registers -------------------------------------------------------------


def _layout(lanes: int, vector: int, rows: int) -> Any:
    """Lays (rows, lanes * vector) over a warpgroup: rows over warps, then over lanes.

    With fewer rows than there is room for, warps and lanes hold the same row: how the
    columns of a row lie on its lanes, and so the order of its sums, stays.
    """
    rows = min(rows, WARPS * LANES // lanes)
    warps = min(rows, WARPS)
    in_warp = rows // warps
    # The tiles cut (rows, columns) into (warps, 1, rows in a warp, lanes, vector),
    # without the second and third where a warp has one row.
    tiles = [(rows, lanes * vector)]
    warp_dims: list[Any] = [-3]
    lane_dims: list[Any] = [-2]
    if in_warp > 1:
        tiles.append((in_warp, lanes * vector))
        warp_dims, lane_dims = [-5], [-3, -2]
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
    """One warpgroup's share of a tile, inside a kernel: what it loads, adds and stores.

    A chunk is (rows, columns) of a tile of short rows, and a statistic (rows,). Of a
    long row a chunk is (4, columns), one line a warp, and a statistic ().

    Attributes:
      config: how rows are cut.
      rows: rows of the tile.
      index: which part of a row this is; a Python 0 where there is one.
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

    @property
    def layouts(self) -> list[Any]:
        """Of the chunks."""
        return [self._layout(chunk) for chunk in self.config.chunks]

    def _columns(self, chunk: Chunk, group: Any = None) -> pl.Slice:
        first = self.index * self.config.width + chunk.start - self._earlier(chunk)
        if group is not None:
            first = group * self.config.features + first
        return pl.ds(first, self.config.lanes * chunk.vector)

    def _earlier(self, chunk: Chunk) -> Any:
        """Columns by which it begins earlier, lest it be beyond the row."""
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

    def load(self, ref: Any, row: Row) -> list[jax.Array]:
        """Row `row` and those after it, chunk by chunk, in the dtype of ref."""
        if self.config.long:
            return [
                memory.load_as(
                    ref,
                    (row.at, self._columns(chunk, row.group)),
                    self._shape(chunk),
                    self._layout(chunk),
                )
                for chunk in self.config.chunks
            ]
        rows = pl.ds(row.at, self.rows)
        return [
            memory.load(
                ref,
                (rows, self._columns(chunk, row.group)),
                self._layout(chunk),
                ref.dtype,
            )
            for chunk in self.config.chunks
        ]

    def store(self, ref: Any, row: Row, chunk: Chunk, value: jax.Array) -> None:
        """One chunk of row `row` and those after it."""
        columns = self._columns(chunk, row.group)
        if self.config.long:
            memory.store_as(ref, (row.at, columns), value)
        else:
            memory.store(ref, (pl.ds(row.at, self.rows), columns), value)

    def load_param(
        self, ref: Any, chunk: Chunk, example: Any, examples: int
    ) -> jax.Array:
        """Scale or bias of the example, alike on all rows of the chunk.

        Args:
          ref: (features,), or (n, features), each for examples / n of the examples.
        """
        at: tuple[Any, ...] = (self._columns(chunk),)
        if len(ref.shape) > 1:
            at = (lax.div(example, examples // ref.shape[0]), *at)
        if self.config.long:
            shape, layout = self._shape(chunk), self._layout(chunk)
            return memory.load_as(ref, at, shape, layout).astype(jnp.float32)
        row = memory.load(ref, at, self._layout(chunk).reduce(0))
        return lax.broadcast_in_dim(row, self._shape(chunk), (1,))

    def store_total(self, ref: Any, line: Any, chunk: Chunk, value: jax.Array) -> None:
        """The sum over the tile's rows, as one chunk of a line of ref."""
        columns = self._columns(chunk)
        if self.config.long:
            memory.store_as(ref, (line, columns), value)
        elif self.rows == 1:
            memory.store(ref, (pl.ds(line, 1), columns), value)
        else:
            memory.store(ref, (line, columns), jnp.sum(value, axis=0))

    def keep(self, name: str, values: Sequence[jax.Array]) -> None:
        """Keeps float32 chunks in shared memory; each lane reads what it wrote."""
        for i, value in enumerate(values):
            memory.store(self._scratch[f"{name}_{i}"], (self._warpgroup,), value)

    def kept(self, name: str) -> list[jax.Array]:
        """Those of this name."""
        return [
            memory.load(self._scratch[f"{name}_{i}"], (self._warpgroup,), layout)
            for i, layout in enumerate(self.layouts)
        ]

    def zeros(self, chunk: Chunk) -> jax.Array:
        zeros = jnp.zeros(self._shape(chunk), jnp.float32)
        return plgpu.layout_cast(zeros, self._layout(chunk))

    def rows_from(self, first: Any, chunk: Chunk, value: jax.Array) -> jax.Array:
        """Zeros for the rows of the tile before the first-th."""
        row = self._iota(chunk, 0)
        return jnp.where(row >= first, value, 0.0)

    def _iota(self, chunk: Chunk, axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(
            jnp.int32, self._shape(chunk), axis, layout=self._layout(chunk)
        )

    # Statistics.

    def across(self, statistic: jax.Array, like: jax.Array) -> jax.Array:
        """A statistic on every column of `like`."""
        return lax.broadcast_in_dim(statistic, like.shape, range(statistic.ndim))

    def load_statistic(self, ref: Any, row: Row) -> jax.Array:
        """That of row `row`, or of this and those after it."""
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

    def sums(
        self, *terms: Sequence[jax.Array], row: Row, place: Any
    ) -> list[jax.Array]:
        """Sums of chunks over whole rows: one statistic for each of the terms.

        Args:
          terms: values of each chunk.
          row: the row in hand.
          place: where the sums of a long row's warps meet: `place` and so many after it
            as there are terms. Another one than that of the call before.
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

    def _sum(self, values: Sequence[jax.Array]) -> jax.Array:
        """Over the columns of this part, each of them once: (rows,) or (4,)."""
        alike: dict[int, Any] = {}  # by vector: what lies alike on the lanes
        for chunk, value in zip(self.config.chunks, values, strict=True):
            # From 0 on, for the reason that `memory.sum_lanes` gives. Added there, at
            # the end, the 0 would take a register, and the backward of 12288 features
            # has none left.
            before = alike.get(chunk.vector, 0.0)
            alike[chunk.vector] = before + self._once(chunk, value)
        return functools.reduce(jnp.add, [jnp.sum(v, axis=1) for v in alike.values()])

    def _once(self, chunk: Chunk, value: jax.Array) -> jax.Array:
        """Zeros for columns that another chunk counts."""
        if not chunk.seen and not self.config.beyond(chunk):
            return value
        first = chunk.seen + self._earlier(chunk)
        column = self._iota(chunk, 1)
        if self.config.long:
            column = column + self._iota(chunk, 0) * (LANES * chunk.vector)
        return jnp.where(column >= first, value, 0.0)


def _float32(values: Sequence[jax.Array]) -> list[jax.Array]:
    return [value.astype(jnp.float32) for value in values]


def _total(ref: Any, at: tuple[Any, ...], count: int) -> jax.Array:
    """ref[at, 0] + ... + ref[at, count - 1], in this order."""
    return functools.reduce(jnp.add, [ref[*at, i] for i in range(count)])


# --- the kernels ----------------------------------------------------------------------


def forward(
    config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
    residual: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """y, of a sum that too, and with `call.statistics` mean (if centred) and var: one
    read of x. Half of it (`call.half`) is all but y.

    Bytes: x and y, once each, and what there is of the residual, the sum, the shortcut
    and a scale of each row; other scales and biases once a tile, from the caches; 4
    bytes a statistic. A cluster's blocks write 32 bytes a row more for each of its
    sums, a sector, of which LayerNorm has three and RMSNorm one, and read them from the
    L2 cache.

    The mean is corrected by the mean of what it leaves over, so that it is right to the
    last bit but one wherever it lies: x_hat keeps its digits at mean/std of 5000.

    Blocks are many and small, one tile each, rather than few and persistent: the next
    tile's loads are those of the next block, and an uneven tail of the grid costs one
    small block. A lane holds 17 to 160 columns (`columns_of_long`); by the registers of
    the compiled code that is 36 KB (96 features, bfloat16) to 224 KB of loads in flight
    on a multiprocessor, in two blocks or more up to 20480 features. Half of all traffic
    being loads, bandwidth times latency wants 9 KB (H100: 3.35 TB/s / 2 * 700 ns / 132)
    to 13 KB (H200), but a block loads for half of its time at best: on an H200 rows
    that left 24 KB in one block an SM (12288 features on 4 warpgroups) took 2.2 times
    as long as a copy, 42 KB in three blocks (7168) 1.14 times, 56 KB and more in five
    to nine at most 1.07.
    """
    norm, features = call.norm, config.features
    examples = Examples.of(call, features)
    rows = examples.rows
    tile = min(config.rows, power_of_two(rows))
    blocks = rows // tile  # of an example

    operands: dict[str, Any] = {"x": x, "scale": scale, "bias": bias}
    operands |= {"residual": residual, "shortcut": shortcut}
    inputs = examples.by_rows(features, **operands)
    shape = inputs["x"].shape
    outputs = {} if call.half else {"y": jax.ShapeDtypeStruct(shape, norm.dtype)}
    if residual is not None:
        outputs["h"] = jax.ShapeDtypeStruct(shape, call.sum_dtype)
    if call.statistics:
        statistic = jax.ShapeDtypeStruct(examples.statistic_shape, jnp.float32)
        outputs |= {"mean": statistic} if norm.center else {}
        outputs |= {"var": statistic}

    def body(ref: dict[str, Any], part: Part) -> None:
        example, block = examples.of_program(blocks)

        def step(i: Any, _: None) -> None:
            row = examples.row(example, jnp.minimum((block + i) * tile, rows - tile))
            centred = _float32(part.load(ref["x"], row))  # chunks
            # What is needed last is on its way while the sums are taken.
            own = {name: part.load(ref[name], row) for name in _streamed(call)}
            if "residual" in ref:
                beside = _float32(part.load(ref["residual"], row))
                # What is normalized is what a backward will read: rounded.
                hs = [
                    (c + r).astype(ref["h"].dtype)
                    for c, r in zip(centred, beside, strict=True)
                ]
                for chunk, h in zip(config.chunks, hs, strict=True):
                    part.store(ref["h"], row, chunk, h)
                centred = _float32(hs)
            if norm.center:
                (total,) = part.sums(centred, row=row, place=0)
                mean = total / features
                centred = [c - part.across(mean, c) for c in centred]
                squares = [c * c for c in centred]
                left, m2 = part.sums(centred, squares, row=row, place=1)
                left = left / features
                centred = [c - part.across(left, c) for c in centred]
                mean = mean + left
                # Rounding can make it negative: a constant row of 1e18 leaves 1e11.
                var = jnp.maximum(m2 / features - left * left, 0.0)
            else:
                (m2,) = part.sums([c * c for c in centred], row=row, place=0)
                mean, var = None, m2 / features
            rstd = lax.rsqrt(var + norm.epsilon)

            def param(name: str, number: int) -> jax.Array:
                if name in own:
                    return own[name][number].astype(jnp.float32)
                chunk = config.chunks[number]
                return part.load_param(ref[name], chunk, example, examples.count)

            for number, chunk in enumerate(config.chunks if "y" in ref else ()):
                y = centred[number] * part.across(rstd, centred[number])
                if "scale" in ref:
                    y = y * norm.weight(param("scale", number))
                for name in ("bias", "shortcut"):
                    if name in ref:
                        y = y + param(name, number)
                part.store(ref["y"], row, chunk, activate(norm.activation, y))
            for name, statistic in (("mean", mean), ("var", var)):
                if name in ref and statistic is not None:
                    part.store_statistic(ref[name], row, statistic)

        # The last block takes the ragged rows too, in a tile that overlaps its own.
        if rows % tile == 0:
            step(0, None)
        else:
            lax.fori_loop(0, jnp.where(block == blocks - 1, 2, 1), step, None)

    results = _launch(
        "fusednorm_rowwise_forward",
        body,
        config,
        tile=tile,
        blocks=examples.count * blocks,
        inputs=inputs,
        outputs=outputs,
        places=3,
    )
    shapes = {"y": x.shape, "h": x.shape}
    statistic_shape = norm.statistic_shape(x.shape)
    return [r.reshape(shapes.get(name, statistic_shape)) for name, r in results.items()]


def backward(
    config: Config,
    work: Share,
    call: Call,
    processors: int,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Those of dx, dscale, dbias and dshortcut that `call.wanted` names: one read of x
    and dy. Half of it (`call.half`) has c1 and c2 (if centred) in the place of dx.

    Bytes: x, dy and dx, once each, and what there is of dh, the shortcut, a scale of
    each row, and the gradients of the latter two; 4 bytes a statistic; for dscale and
    dbias that add up each 8 * features a block, of which there are as many as are
    resident (`_grid`). A cluster's blocks write 32 bytes a row more for each of two
    sums (RMSNorm: one).

    A block is persistent: it takes every blocks-th tile, and adds up dscale and dbias
    of its rows in registers, 1 to 32 columns a lane, or those of long rows in shared
    memory (`share`); and the sums of some tiles each (`IN_A_ROW`) in shared memory. The
    sum over blocks is one more small kernel of XLA's, in a fixed order. No atomics.
    Loads in flight are 10 KB (1128 features, bfloat16) to 128 KB a multiprocessor,
    where bandwidth times latency wants 12 (H100) to 17 KB (H200).
    """
    norm, features = call.norm, config.features
    examples = Examples.of(call, features)
    rows = examples.rows
    tile, tiles, blocks = _grid(config, rows, examples.count, processors, work.threads)
    want = call.wants

    operands: dict[str, Any] = {"dy": dy, "x": x, "scale": scale, "bias": bias}
    operands |= {"dh": dh, "shortcut": shortcut}
    inputs = examples.by_rows(features, **operands)
    inputs |= {
        name: statistic.reshape(examples.statistic_shape)
        for name, statistic in present(mean=mean, var=var).items()
    }
    summed = call.summed
    partials = jax.ShapeDtypeStruct((examples.count * blocks, features), jnp.float32)
    inner_products = ("c1", "c2")[: 1 + norm.center] if want["dx"] and call.half else ()
    statistic = jax.ShapeDtypeStruct(examples.statistic_shape, jnp.float32)
    outputs = dict.fromkeys(inner_products, statistic) | dict.fromkeys(summed, partials)
    for name, like in (("dx", x), ("dscale", scale), ("dshortcut", shortcut)):
        if want[name] and name not in summed and not (name == "dx" and inner_products):
            assert like is not None
            outputs[name] = jax.ShapeDtypeStruct(inputs["x"].shape, like.dtype)
    loaded_at_once = ("dy", "x", *_streamed(call))
    held = 0 if work.smem else config.registers(tile, 4) * len(summed)
    sizes = [inputs[name].dtype.itemsize for name in loaded_at_once]
    next_tile = sum(config.registers(tile, size) for size in sizes)
    ahead = held + next_tile <= work.ahead
    levels = {
        "in_smem": work.smem > 0,
        "twice": _sums_twice(config, tiles, blocks),
    }
    kept = Totals.scratch_names(summed, **levels)
    if scale is not None and not call.scales_each:
        size = (len(kept) + 1) * config.kept_bytes(tile)
        kept = (*kept, "scale") if size <= work.smem else kept

    def body(ref: dict[str, Any], part: Part) -> None:
        example, block = examples.of_program(blocks)
        sums_of = Totals(part, summed, **levels)

        def params(name: str) -> list[jax.Array]:
            return [
                part.load_param(ref[name], chunk, example, examples.count)
                for chunk in config.chunks
            ]

        of_example: list[Any] = [1.0] * len(config.chunks)
        if "scale" in ref and not call.scales_each:
            of_example = [norm.weight(scale) for scale in params("scale")]
        if "scale" in kept:
            part.keep("scale", of_example)

        def first_row(i: Any) -> tuple[Any, Any]:
            """The block's i-th tile's, and the first that no tile before has."""
            after = jnp.minimum(block + i * blocks, tiles) * tile
            return jnp.minimum(after, rows - tile), after

        def load(i: Any) -> dict[str, Any]:
            row = examples.row(example, first_row(i)[0])
            loaded: dict[str, Any] = {n: part.load(ref[n], row) for n in loaded_at_once}
            for name in ("mean", "var"):
                if name in ref:
                    loaded[name] = part.load_statistic(ref[name], row)
            return loaded

        def step(i: Any, totals: Any, loaded: dict[str, Any]) -> Any:
            first, after = first_row(i)
            row = examples.row(example, first)
            dys, xs = _float32(loaded["dy"]), _float32(loaded["x"])
            rstd = lax.rsqrt(loaded["var"] + norm.epsilon)
            if norm.center:
                xs = [x - part.across(loaded["mean"], x) for x in xs]
            x_hats = [x * part.across(rstd, x) for x in xs]
            scales = part.kept("scale") if "scale" in kept else of_example
            if call.scales_each:
                scales = [norm.weight(scale) for scale in _float32(loaded["scale"])]
            if norm.activation is not None:  # from here on dy is dz
                zs = [x * scale for x, scale in zip(x_hats, scales, strict=True)]
                if "bias" in ref:
                    zs = [z + bias for z, bias in zip(zs, params("bias"), strict=True)]
                if "shortcut" in ref:
                    added = _float32(loaded["shortcut"])
                    zs = [z + more for z, more in zip(zs, added, strict=True)]
                slopes = [slope(norm.activation, z) for z in zs]
                dys = [dy * of_z for dy, of_z in zip(dys, slopes, strict=True)]

            more = {"dbias": dys, "dshortcut": dys}
            more["dscale"] = [dy * x for dy, x in zip(dys, x_hats, strict=True)]
            for name in ("dscale", "dshortcut"):
                if want[name] and name not in summed:
                    for chunk, value in zip(config.chunks, more[name], strict=True):
                        part.store(ref[name], row, chunk, value)
            if rows % tile:  # the ragged tile has rows that were added before
                for name in summed:  # alone: Mosaic lays out no index that nobody reads
                    more[name] = [
                        part.rows_from(after - first, chunk, term)
                        for chunk, term in zip(config.chunks, more[name], strict=True)
                    ]
            totals = sums_of.add(totals, more)

            if want["dx"]:
                # On its way while the sums are taken.
                dhs = part.load(ref["dh"], row) if "dh" in ref else None
                ws = [dy * scale for dy, scale in zip(dys, scales, strict=True)]
                terms = [[w * x_hat for w, x_hat in zip(ws, x_hats, strict=True)]]
                if norm.center:
                    terms.append(ws)
                # Two places in turn: a warp may still read the sums of the row before.
                sums = part.sums(*terms, row=row, place=2 * (i % 2))
                c1, *c2 = [total / features for total in sums]
                for name, mean in zip(inner_products, (c1, *c2), strict=False):
                    part.store_statistic(ref[name], row, mean)
                for i_chunk, chunk in enumerate(config.chunks if "dx" in ref else ()):
                    w, x_hat = ws[i_chunk], x_hats[i_chunk]
                    inner = w - x_hat * part.across(c1, w)
                    if norm.center:
                        inner = inner - part.across(c2[0], w)
                    dx = inner * part.across(rstd, w)
                    if dhs is not None:
                        dx = dx + dhs[i_chunk].astype(jnp.float32)
                    part.store(ref["dx"], row, chunk, dx)

            return totals

        # Tiles block, block + blocks, ...; the ragged one goes with the last whole one,
        # which it overlaps.
        count = (tiles - block + blocks - 1) // blocks
        if rows % tile:
            count = count + (block == (tiles - 1) % blocks)

        totals = sums_of.over_tiles(count, load, step, ahead=ahead)
        line = example * blocks + block
        for name, total in totals.items():
            for chunk, value in zip(config.chunks, total, strict=True):
                part.store_total(ref[name], line, chunk, value)

    results = _launch(
        "fusednorm_rowwise_backward",
        body,
        config,
        tile=tile,
        blocks=examples.count * blocks,
        inputs=inputs,
        outputs=outputs,
        places=4,
        kept=kept,
    )
    if summed:
        own = x.shape[: call.own_params]
        count = call.row_groups * math.prod(own)
        each = [results[name].reshape(count, -1, features) for name in summed]
        sums = memory.sum_over_blocks(*each)
        results |= {
            name: total.reshape(*own, -1)
            for name, total in zip(summed, sums, strict=True)
        }
    shapes = dict.fromkeys(("dx", "dscale", "dshortcut"), x.shape)
    shapes |= dict.fromkeys(inner_products, var.shape)
    shapes |= {name: results[name].shape for name in summed}
    order = (*inner_products, *(name for name in want if name in results))
    return [results[name].reshape(shapes[name]) for name in order]


@dataclasses.dataclass(frozen=True)
class Totals:
    """dscale and dbias of a block, which add up tile by tile, chunk by chunk.

    Of up to `IN_A_ROW` tiles in a row they are in registers, or in shared memory; the
    sums of several such, if there are, in shared memory.

    Attributes:
      part: whose.
      names: of the sums.
      in_smem: whether the first ones are in shared memory.
      twice: whether there are second ones.
    """

    part: Part
    names: Sequence[str]
    in_smem: bool
    twice: bool

    @staticmethod
    def scratch_names(
        names: Sequence[str], *, in_smem: bool, twice: bool
    ) -> tuple[str, ...]:
        """Names of what has room in shared memory."""
        first = [_in_a_row(name) for name in names if in_smem]
        return (*first, *[name for name in names if twice])

    def begin(self) -> dict[str, Sequence[jax.Array]]:
        """What a loop over tiles carries: zeros, but for those in shared memory."""
        if not self.in_smem:
            return dict.fromkeys(self.names, self._zeros)
        for name in self.names:
            self.part.keep(_in_a_row(name), self._zeros)
        return {}

    def add(self, carried: Any, more: Mapping[str, Sequence[jax.Array]]) -> Any:
        """With one tile's."""
        if not self.in_smem:
            return {n: _added(total, more[n]) for n, total in carried.items()}
        for name in self.names:
            self._add(_in_a_row(name), more[name])
        return carried

    def end(self, carried: dict[str, Any]) -> dict[str, Sequence[jax.Array]]:
        """Sums of the tiles in a row."""
        if not self.in_smem:
            return carried
        return {name: self.part.kept(_in_a_row(name)) for name in self.names}

    @property
    def _zeros(self) -> list[jax.Array]:
        return [self.part.zeros(chunk) for chunk in self.part.config.chunks]

    def _add(self, name: str, more: Sequence[jax.Array]) -> None:
        self.part.keep(name, _added(self.part.kept(name), more))

    def over_tiles(
        self,
        count: Any,
        load: Callable[[Any], Any],
        step: Callable[[Any, Any, Any], Any],
        *,
        ahead: bool,
    ) -> dict[str, Sequence[jax.Array]]:
        """The sums over a block's tiles, by name.

        Args:
          count: tiles of the block.
          load: what step(i, carried, loaded) needs of the i-th.
          step: adds the i-th tile's to what is carried.
          ahead: whether a tile is on its way while the one before it is worked on.
        """

        def in_a_row(first: Any, number: Any, following: Any) -> tuple[Any, Any]:
            """Of so many tiles, from the first-th on, which is on its way."""

            def one(j: Any, carry: Any) -> Any:
                i = first + j
                if not ahead:
                    return step(i, carry, load(i))
                carried, loaded = carry
                following = lax.cond(i + 1 < count, lambda: load(i + 1), lambda: loaded)
                return step(i, carried, loaded), following

            carried = self.begin()
            if not ahead:
                return self.end(lax.fori_loop(0, number, one, carried)), None
            carried, following = lax.fori_loop(0, number, one, (carried, following))
            return self.end(carried), following

        following = load(0) if ahead else None
        if not self.twice:
            return in_a_row(0, count, following)[0]

        def some(n: Any, following: Any) -> Any:
            first = n * IN_A_ROW
            number = jnp.minimum(count - first, IN_A_ROW)
            totals, following = in_a_row(first, number, following)
            for name, total in totals.items():
                self._add(name, total)
            return following

        for name in self.names:
            self.part.keep(name, self._zeros)
        lax.fori_loop(0, (count + IN_A_ROW - 1) // IN_A_ROW, some, following)
        return {name: self.part.kept(name) for name in self.names}


def _in_a_row(name: str) -> str:
    """Of the sums of a few tiles, in shared memory."""
    return f"{name}_in_a_row"


def _added(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _streamed(call: Call) -> tuple[str, ...]:
    """What each row has of its own, beside x, and is needed to find z."""
    scale = ("scale",) if call.scales_each else ()
    return scale if call.shortcut is None else (*scale, "shortcut")


def _sums_twice(config: Config, tiles: int, blocks: int) -> bool:
    """Whether sums over `IN_A_ROW` tiles go to shared memory: where a block has so
    many, which a ragged one may follow.

    With fewer tiles there may be fewer rows than warps, and warps that hold the same
    row would add to one sum without waiting for each other.
    """
    return _in_lines(config) and pl.cdiv(tiles, blocks) >= IN_A_ROW


def _in_lines(config: Config) -> bool:
    """Whether each lane reads from shared memory what it wrote there.

    Mosaic moves lanes of one column by `stmatrix`, for which others write.
    """
    return all(chunk.vector > 1 for chunk in config.chunks)


def _grid(
    config: Config, rows: int, examples: int, processors: int, threads: int
) -> tuple[int, int, int]:
    """(tile, tiles, blocks): rows of a tile, whole tiles of an example, and blocks that
    an example has in a persistent grid.

    As many blocks as are resident, of `threads` a multiprocessor. Fewer where that
    would leave a block less than 32 rows, whose partial sums would be over a tenth of
    what it moves; but no multiprocessor goes without work. A block has one example's
    rows: more than are resident where the busiest multiprocessor would have over a
    tenth more of them than the mean. Of DiT-XL/2's 271 samples, a block each, some of
    132 have three and most two; in four blocks each they have nine and eight.
    """
    tile = min(config.rows, power_of_two(rows))
    tiles = rows // tile
    block = WARPS * LANES * config.warpgroups
    assert threads >= block, "no block of the grid would be resident"
    resident = processors * (threads // block)
    least = pl.cdiv(processors, examples)
    most = max(min(max(rows // 32, least) // config.cluster, tiles), 1)
    blocks = max(min(resident // config.cluster // examples, most), 1)
    if examples > 1:
        clusters = max(processors // config.cluster, 1)

        def busiest(blocks: int) -> float:
            """Times the mean."""
            mean = examples * blocks / clusters
            return math.ceil(mean) / mean

        choices = range(blocks, most + 1)
        even = (count for count in choices if busiest(count) <= 1.1)
        blocks = next(even, None) or min(choices, key=busiest)
    return tile, tiles, blocks


def _launch(
    name: str,
    body: Callable[[dict[str, Any], Part], None],
    config: Config,
    *,
    tile: int,
    blocks: int,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    places: int,
    kept: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Runs body(references by name, part) on every part of every block.

    Args:
      places: in which sums of a long row meet.
      kept: names of what has room for a tile in shared memory.
    """
    scratch: dict[str, Any] = {
        f"{name}_{i}": plgpu.SMEM(
            (config.warpgroups, *config.shape(chunk, tile)), jnp.float32
        )
        for name in kept
        for i, chunk in enumerate(config.chunks)
    }
    mesh: dict[str, Any] = {}
    outputs = dict(outputs)
    if config.warpgroups > 1:
        mesh |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    if config.long:
        scratch["sums"] = plgpu.SMEM((places, config.warpgroups * WARPS), jnp.float32)
        scratch["in_block"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    if config.cluster > 1:
        mesh |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        scratch["in_cluster"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=config.warpgroups
        )
        # A line of 128 bytes for each sum of each row: none is written twice, so that
        # no first-level cache can hold an old one.
        rows = inputs["x"].size // config.features
        outputs["sums"] = jax.ShapeDtypeStruct((rows, places, 32), jnp.float32)

    def kernel(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip([*inputs, *outputs], refs, strict=True))
        body(ref, Part(config, tile, scratch | {"of_blocks": ref.get("sums")}))

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            # For sums over the warps of a warpgroup: those of dscale and dbias over
            # short rows. Mosaic gives all warpgroups of a block the same scratch, so
            # that sums of long rows must go another way.
            reduction_scratch_bytes=0 if config.long else 2048,
            # `sums` are read behind a barrier. Of all else that is written and read, a
            # lane reads what it wrote, and no other writes there (`_in_lines`).
            unsafe_no_auto_barriers=True,
        ),
        **memory.cost([*inputs.values(), *outputs.values()]),
        **mesh,
    )
    results = dict(zip(outputs, run(*inputs.values()), strict=True))
    results.pop("sums", None)
    return results


def _share_out(
    features: int, itemsize: int, *, smem: int, **kind: bool
) -> tuple[Share, Config]:
    """How a backward's work is shared out and cut; for the arguments see `share`."""
    work = share(features, itemsize, smem=smem, **kind)
    config = _cut(features, itemsize, work)
    if work.smem and not _in_lines(config):
        work = share(features, itemsize, smem=0, **kind)
        config = _cut(features, itemsize, work)
    return work, config


def _cut(features: int, itemsize: int, work: Share) -> Config:
    """How rows are cut of which a lane holds `work.columns`."""
    columns, in_smem = work.columns, work.smem > 0
    # Mosaic adds up rows over warps by 4 columns a lane at most; and in shared memory
    # 16 bytes a lane, side by side, meet in no bank.
    four = features <= LANES * columns or in_smem
    return configure(
        features,
        4 if four else itemsize,
        per_lane=columns,
        of_long=columns if features <= LONGEST_ROW // 2 or in_smem else 16,
        in_warp=LANES * columns,
    )


# --- which calls they take ------------------------------------------------------------


def plan(call: Call, processors: int, smem: int) -> Kernel | Fallback:
    """Chooses the kernel for one rowwise call.

    Args:
      call: one of geometry x[N, 1, G, K].
      processors: multiprocessors of the GPU.
      smem: bytes of shared memory of a block.
    """
    view = call.geometry
    assert view is not None
    features = view.k
    rows = view.n * view.g
    if features == 1:
        return Fallback("rows of one feature")
    if features > LONGEST_ROW:
        return Fallback(f"{features} features; kernels take at most {LONGEST_ROW}")
    statistics = 4 * rows * (1 + call.norm.center)
    x_size = call.x.dtype.itemsize
    each_row = [getattr(call, name).dtype.itemsize for name in _streamed(call)]
    if call.op == "forward":
        streamed = [x_size, call.norm.dtype.itemsize]
        if call.beside is not None:
            streamed += [call.beside.dtype.itemsize, call.sum_dtype.itemsize]
        streamed += each_row
        config = configure(
            features,
            max(streamed),
            per_lane=32,
            of_long=columns_of_long(
                features, len(each_row) + (call.beside is not None)
            ),
            in_warp=2048,
            fill=True,
        )
        launch = functools.partial(forward, config, call)
        if call.half:
            streamed.remove(call.norm.dtype.itemsize)
        moved = call.x.size * sum(streamed) + statistics * call.statistics
    else:
        assert call.dy is not None
        beside = each_row + (
            [] if call.beside is None else [call.beside.dtype.itemsize]
        )
        itemsize = max(x_size, call.dy.dtype.itemsize, *beside)
        work, config = _share_out(
            features,
            itemsize,
            center=call.norm.center or call.wants["dbias"],
            slopes=call.slopes,
            beside=bool(beside),
            own=call.own > 0 or call.row_groups > 1,
            smem=smem,
        )
        launch = functools.partial(backward, config, work, call, processors)
        examples = Examples.of(call, features)
        grid = _grid(config, examples.rows, examples.count, processors, work.threads)
        blocks = examples.count * grid[2]
        written = [
            getattr(call, name.removeprefix("d")).dtype.itemsize
            for name, want in call.wants.items()
            if want and name not in call.summed and not (name == "dx" and call.half)
        ]
        if call.half and call.wanted[0]:
            statistics *= 2  # it writes c1 and c2, of which dx is made
        moved = call.x.size * (
            x_size + call.dy.dtype.itemsize + sum(beside) + sum(written)
        )
        # Partial sums are written and read, the sum is written.
        results = call.row_groups * math.prod(call.x.shape[: call.own_params])
        sums = len(call.summed) * (2 * blocks + results)
        moved += statistics + 4 * features * sums
    for param in (None if call.scales_each else call.scale, call.bias):
        moved += 0 if param is None else param.size * param.dtype.itemsize
    return Kernel(
        backend="mosaic_gpu",
        name=f"rowwise {call.op}{call.half_name}",
        launch=launch,
        block=str(config),
        why=config.why,
        bytes_moved=moved,
    )
