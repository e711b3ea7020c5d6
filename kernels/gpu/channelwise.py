"""GroupNorm, InstanceNorm and BatchNorm, channels last, on Pallas Mosaic GPU.

On the view x[N, S, G, K] (samples, pixels, groups, channels of a group), with sums over
the pixels and channels of one group of one sample:

    forward   y = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dy * scale
              dscale = sum(dy * x_hat),  dbias = sum(dy)         over pixels and samples

A sample is cut into *strips* of channels, and a strip's pixels into blocks, so that all
multiprocessors have work whatever N and G are. Sums run down the pixels, channel by
channel; the channels of a group come together last. There are two variants:

    resident   The blocks of a strip are a cluster, and keep its pixels in shared memory
               from the first sum to the last store: x (and dy) is read once.
    two reads  `moments` reads x, and `combine` makes one mean and variance a group of
               what its blocks found. The normalization is left to XLA, which fuses it
               with what follows: it is elementwise, and a kernel could only tie. The
               backward does likewise. Blocks take the tensor from its end, so that its
               beginning, which XLA reads first, is what the L2 cache still holds.

What a sample's result is made of (strips, blocks, the order of every sum) follows from
S, G, K and the dtypes alone, never from N: results are bitwise the same in any batch.
Counts, means and centred squares of parts are merged by Chan's formula, in a fixed
order, without atomics.

Sources: group normalization, Wu and He 2018 (arXiv:1803.08494); instance normalization,
Ulyanov et al. 2016 (arXiv:1607.08022); batch normalization, Ioffe and Szegedy 2015
(arXiv:1502.03167); merging of moments, Chan, Golub and LeVeque 1983, equation 2.1.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm import reference
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry
from fusednorm.kernels.gpu import memory, rowwise
from fusednorm.kernels.gpu.memory import LANES, WARPS, Chunk
from fusednorm.reference import Norm

SECTOR = 32  # bytes: what the L2 cache fetches at least
MAX_CLUSTER = 8  # blocks: what every GPU can do

KB = 1024
PLACES = 4  # values of channels that a block holds in shared memory
MAX_CHUNKS = 8  # of a strip: each is code of its own

# Elements of a sample: less, and few of its strips have the 32 KB that fill a block.
SMALL = 2**20


# --- how the work is cut --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """How a sample is cut. No function of the number of samples.

    A warpgroup loads a *line* at once: so many pixels that all its lanes have some of
    the strip's channels.

    Attributes:
      pixels: of a sample.
      group: channels of a group.
      width: channels of a strip: of whole groups, if `grouped`.
      strips: of a sample.
      chunks: of the strip's channels.
      lanes: of a warp that share a pixel.
      warps: of a warpgroup that have pixels of their own: 4, or fewer.
      line: pixels of a line.
      warpgroups: of a block.
      blocks: that share a strip; those of a cluster, if resident.
      resident: whether the pixels stay in registers.
    """

    pixels: int
    group: int
    width: int
    strips: int
    chunks: tuple[Chunk, ...]
    lanes: int
    warps: int
    line: int
    warpgroups: int
    blocks: int
    resident: bool

    @property
    def workers(self) -> int:
        """Warpgroups that share a strip."""
        return self.blocks * self.warpgroups

    @property
    def lines(self) -> int:
        """Lines that hold a warpgroup's pixels."""
        return pl.cdiv(pl.cdiv(self.pixels, self.workers), self.line)

    @property
    def held(self) -> int:
        """Lines that a lane loads before it looks at the first: 32 elements of each
        array, or 64 to 128 bytes.

        With 512 threads or more on a multiprocessor these are 32 to 64 KB in flight,
        where bandwidth times latency wants 18 (H100: 3.35 TB/s * 700 ns / 132) to 25 KB
        (H200).
        """
        return max(32 // sum(chunk.vector for chunk in self.chunks), 1)

    def shared(self, kept: int) -> int:
        """Bytes of shared memory of a block.

        Args:
          kept: bytes of an element of all arrays that are kept.
        """
        places = PLACES * self.warpgroups * self.warps * self.pitch
        groups = 2 * PLACES * self.width * (self.group > 1)
        columns = sum(self.lanes * chunk.vector for chunk in self.chunks)
        pixels = self.warpgroups * self.lines * self.line
        return pixels * columns * kept + 4 * (places + groups) + 4 * KB

    @property
    def pitch(self) -> int:
        """Channels of a strip in shared memory, in whole chunks, as Mosaic wants it."""
        chunk = self.lanes * max(chunk.vector for chunk in self.chunks)
        return pl.cdiv(self.width, chunk) * chunk

    def first(self, worker: Any) -> Any:
        """The worker's first pixel; those of the last one end with the sample."""
        each, more = divmod(self.pixels, self.workers)
        if not more:
            return worker * each
        smaller = min if isinstance(worker, int) else jnp.minimum
        return worker * each + smaller(worker, more)

    def count(self, block: Any) -> Any:
        """Pixels of a block."""
        first = block * self.warpgroups
        return self.first(first + self.warpgroups) - self.first(first)

    def __str__(self) -> str:
        pixels = pl.cdiv(self.pixels, self.blocks)
        of = "" if self.blocks == 1 else f" of {self.pixels}"
        return f"{self.width} channels of {pixels}{of} pixels"


def resident(view: Geometry, itemsize: int, kept: int, shared: int) -> Config | None:
    """Cuts a sample whose strips stay in the shared memory of a cluster, if they fit.

    Args:
      view: x[N, S, G, K].
      itemsize: bytes of the widest of the arrays that are loaded and stored.
      kept: bytes of an element of all arrays that are kept.
      shared: bytes that a block may have.
    """
    # Pieces of a pixel are at least two sectors, of which the memory's bursts are made;
    # of a small sample one, for the sake of more blocks. Whole sectors if possible.
    least = SECTOR if view.s * view.features < SMALL else 2 * SECTOR
    found = []
    for width in _multiples(view.k, view.g):
        strip = width * view.s * kept
        if strip > MAX_CLUSTER * shared:
            break
        # Blocks of 32 KB or less where there can be so many: several fit an SM, and one
        # loads while another one computes and stores.
        blocks = min(pl.next_power_of_2(pl.cdiv(strip, 32 * KB)), MAX_CLUSTER)
        warpgroups = min(pl.next_power_of_2(pl.cdiv(strip // blocks, 16 * KB)), 4)
        config = _config(view, width, itemsize, warpgroups, blocks, resident=True)
        if config.shared(kept) <= shared and len(config.chunks) <= MAX_CHUNKS:
            found.append(config)
    enough = [c for c in found if c.width * itemsize >= least]
    aligned = [c for c in enough if c.width * itemsize % SECTOR == 0]
    best = (aligned or enough or found[-1:])[:1]
    if not best or best[0].width * itemsize < min(SECTOR, view.features * itemsize):
        return None
    return best[0]


def in_two_reads(view: Geometry, itemsize: int) -> tuple[Config, Config] | None:
    """Cuts a sample whose pixels are read twice, and what its blocks find.

    Args:
      view: x[N, S, G, K].
      itemsize: bytes of the widest of the arrays that are loaded.
    """
    # 128 bytes of a pixel, or as nearly so many as divides it.
    width = min(
        _multiples(1, view.features),
        key=lambda width: (abs(math.log2(width * itemsize / 128)), width),
    )
    # Blocks of 512 pixels or more, whose sums are 3 % of what they read or less; no
    # more than 4 on each of 132 multiprocessors where a sample alone can fill them.
    strips = view.features // width
    blocks = max(min(view.s // 512, 4 * 132 // strips), 1)
    config = _config(view, width, itemsize, 4, blocks, resident=False)
    groups = [width for width in _multiples(view.k, view.g) if width >= 32]
    last = _config(
        dataclasses.replace(view, s=blocks),
        groups[0] if groups else view.features,
        4,
        4 if blocks > 64 else 1,
        1,
        resident=True,
    )
    if max(len(config.chunks), len(last.chunks)) > MAX_CHUNKS:
        return None
    return config, last


def _config(
    view: Geometry,
    width: int,
    itemsize: int,
    warpgroups: int,
    blocks: int,
    *,
    resident: bool,
) -> Config:
    """Fewer warpgroups and blocks where there are fewer pixels."""
    warpgroups = min(warpgroups, view.s)
    blocks = min(blocks, view.s // warpgroups)
    vector = math.gcd(width, 16 // itemsize)  # 16 bytes is the widest load
    lanes = min(LANES, memory.power_of_2_below(width // vector))
    # No warpgroup has fewer pixels than a line.
    pixels = memory.power_of_2_below(view.s // (blocks * warpgroups))
    line = min(WARPS * LANES // lanes, pixels)
    return Config(
        pixels=view.s,
        group=view.k,
        width=width,
        strips=view.features // width,
        chunks=tuple(memory.cut(0, width, lanes, vector, spare=width // 16)),
        lanes=lanes,
        warps=min(WARPS, line),
        line=line,
        warpgroups=warpgroups,
        blocks=blocks,
        resident=resident,
    )


def _multiples(of: int, count: int) -> Iterator[int]:
    """Widths of strips that cut `count` groups of `of` channels without a rest."""
    return (of * m for m in range(1, count + 1) if count % m == 0)


# --- values of a strip's channels -----------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Columns:
    """One array for each chunk of a strip. Arithmetic goes chunk by chunk.

    An array is a line's, (warps, pixels, columns), or has one value for each channel,
    (columns,); that is the same on all pixels where the two meet. Of a tile of groups
    it is (groups, columns), and meets arrays (groups,).
    """

    def __init__(self, arrays: Sequence[Any], layouts: Sequence[Any]):
        self.arrays = tuple(arrays)
        self.layouts = tuple(layouts)  # of a line's or a tile's chunks

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.arrays, self.layouts

    @classmethod
    def tree_unflatten(cls, layouts: Any, arrays: Any) -> "Columns":
        return cls(arrays, layouts)

    def map(self, function: Callable[[Any], Any]) -> "Columns":
        return Columns([function(array) for array in self.arrays], self.layouts)

    def float32(self) -> "Columns":
        return self.map(lambda array: array.astype(jnp.float32))

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Columns":
        others = (
            other.arrays if isinstance(other, Columns) else [other] * len(self.arrays)
        )
        arrays = [
            operation(*_meet(a, b, layout))
            for a, b, layout in zip(self.arrays, others, self.layouts, strict=True)
        ]
        return Columns(arrays, self.layouts)

    def __add__(self, other: Any) -> "Columns":
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> "Columns":
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> "Columns":
        return self._with(other, operator.mul)

    def __truediv__(self, other: Any) -> "Columns":
        return self._with(other, operator.truediv)

    __radd__, __rmul__ = __add__, __mul__

    def __rtruediv__(self, other: Any) -> "Columns":
        return self._with(other, lambda a, b: b / a)


def _meet(a: Any, b: Any, layout: Any) -> tuple[Any, Any]:
    """Both of the larger one's shape."""
    ndim_a, ndim_b = jnp.ndim(a), jnp.ndim(b)
    if ndim_a == ndim_b or not ndim_a or not ndim_b:
        return a, b
    small, large = (a, b) if ndim_a < ndim_b else (b, a)
    # Channels are the last axis of a line, groups the first one of a tile.
    axis = 2 if large.ndim == 3 else 0
    spread = lax.broadcast_in_dim(small, large.shape, (axis,))
    spread = plgpu.layout_cast(spread, layout)
    return (spread, b) if ndim_a < ndim_b else (a, spread)


# --- inside a kernel ------------------------------------------------------------------


class Part:
    """One warpgroup's pixels of one strip of one sample.

    Attributes:
      config: how the sample is cut.
      sample, strip, block: which.
      pixels: of the block.
    """

    def __init__(
        self, config: Config, sample: Any, strip: Any, block: Any, scratch: Any
    ):
        self.config = config
        self.sample, self.strip, self.block = sample, strip, block
        self.pixels = config.count(block)
        self._warpgroup: Any = 0
        if config.warpgroups > 1:
            self._warpgroup = lax.axis_index("warpgroup")
        worker = block * config.warpgroups + self._warpgroup
        self._first = config.first(worker)
        self._own = config.first(worker + 1) - self._first  # pixels of this warpgroup
        self._scratch = scratch
        self._places = 0
        in_warp = config.line // config.warps
        self._shapes = [
            (config.warps, in_warp, config.lanes * chunk.vector)
            for chunk in config.chunks
        ]
        self._layouts = [
            _layout(config.lanes, chunk.vector, config.warps, in_warp)
            for chunk in config.chunks
        ]
        self._channel_layouts = [layout.reduce((0, 1)) for layout in self._layouts]

    # Lines.

    @property
    def whole_lines(self) -> int:
        """Those that are whole for every warpgroup."""
        return self.config.pixels // self.config.workers // self.config.line

    def index(self, line: int) -> Columns:
        """The pixel's number in the sample."""
        first = self._first + self._start(line)
        return self._places_in_line().map(lambda place: first + place)

    def load(self, ref: Any, line: Any, *which: Any) -> Columns:
        """One line of ref[sample, pixels, *which, channels], in its own dtype."""
        first = self._first + self._start(line)
        return Columns(
            [
                memory.load_as(
                    ref,
                    (self.sample, pl.ds(first, self.config.line), *which, columns),
                    shape,
                    layout,
                )
                for columns, shape, layout in zip(
                    self._columns(), self._shapes, self._layouts, strict=True
                )
            ],
            self._layouts,
        )

    def store(self, ref: Any, line: Any, value: Columns) -> None:
        """One line."""
        first = self._first + self._start(line)
        for columns, array in zip(self._columns(), value.arrays, strict=True):
            at = (self.sample, pl.ds(first, self.config.line), columns)
            memory.store_as(ref, at, array)

    def each_line(self, do: Callable[[Any], None]) -> None:
        """do(line) for all lines: whole ones in a loop, some at once."""
        held = self.config.held
        whole = self.whole_lines // held

        def step(i: Any, _: None) -> None:
            for j in range(held):
                do(i * held + j)

        lax.fori_loop(0, whole, step, None)
        for line in range(whole * held, self.config.lines):
            do(line)

    def keep(self, name: str, line: Any, value: Columns) -> None:
        """Keeps a line as it is, in shared memory; each lane reads what it wrote."""
        for i, array in enumerate(value.arrays):
            at = (self._warpgroup, line)
            memory.store(self._scratch[f"{name}_{i}"], at, array)

    def kept(self, name: str, line: Any) -> Columns:
        """A line in float32."""
        return Columns(
            [
                memory.load(self._scratch[f"{name}_{i}"], (self._warpgroup, line), a)
                for i, a in enumerate(self._layouts)
            ],
            self._layouts,
        )

    def once(self, line: Any, value: Columns) -> Columns:
        """Zeros for the pixels of a ragged line that the line before it has too."""
        if self._is_whole(line):
            return value
        mask = self._counts(line)
        return Columns(
            [
                jnp.where(here, array, 0.0)
                for here, array in zip(mask.arrays, value.arrays, strict=True)
            ],
            self._layouts,
        )

    def counted(self, line: Any) -> Any:
        """1 for pixels of the line that no line before it has, else 0."""
        if self._is_whole(line):
            return 1.0
        return self._counts(line).map(lambda here: jnp.where(here, 1.0, 0.0))

    def _is_whole(self, line: Any) -> bool:
        """Whether it is, for every warpgroup; of a line in a loop that is known."""
        return not isinstance(line, int) or line < self.whole_lines

    def _start(self, line: Any) -> Any:
        if self._is_whole(line):
            return line * self.config.line
        return jnp.minimum(line * self.config.line, self._own - self.config.line)

    def _counts(self, line: int) -> Columns:
        seen = line * self.config.line - self._start(line)
        return self._places_in_line().map(lambda place: place >= seen)

    def _places_in_line(self) -> Columns:
        """The pixel's number in its line."""
        places = []
        for shape, layout in zip(self._shapes, self._layouts, strict=True):
            iota = functools.partial(
                plgpu.broadcasted_iota, jnp.int32, shape, layout=layout
            )
            places.append(iota(0) * shape[1] + iota(1))
        return Columns(places, self._layouts)

    def zeros(self) -> Columns:
        """A line of them."""
        return Columns(
            [
                plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
                for shape, layout in zip(self._shapes, self._layouts, strict=True)
            ],
            self._layouts,
        )

    # Channels.

    def _columns(self, strip: Any = None) -> list[pl.Slice]:
        strip = self.strip if strip is None else strip
        return [
            pl.ds(strip * self.config.width + chunk.start, shape[-1])
            for chunk, shape in zip(self.config.chunks, self._shapes, strict=True)
        ]

    def load_channels(self, ref: Any, *at: Any) -> Columns:
        """ref[*at, channels of the strip] in float32."""
        return Columns(
            [
                memory.load(ref, (*at, columns), layout)
                for columns, layout in zip(
                    self._columns(), self._channel_layouts, strict=True
                )
            ],
            self._layouts,
        )

    def store_channels(self, ref: Any, value: Columns, *at: Any) -> None:
        """ref[*at, channels of the strip] = value, by one warpgroup of the block."""

        @self.one_warpgroup
        def _() -> None:
            for columns, array in zip(self._columns(), value.arrays, strict=True):
                memory.store(ref, (*at, columns), array)

    def one_warpgroup(self, do: Callable[[], None]) -> None:
        """Has the block's first warpgroup do it."""
        if self.config.warpgroups == 1:
            do()
        else:
            pl.when(self._warpgroup == 0)(do)

    def one_block(self, do: Callable[[], None]) -> None:
        """Has the first of the strip's blocks do it."""
        if self.config.blocks == 1 or not self.config.resident:
            do()
        else:
            pl.when(self.block == 0)(do)

    # Sums.

    def totals(self, *terms: Columns) -> list[Columns]:
        """Sums of lines over all pixels of the block, for each channel.

        In a warp they are shuffles; its warps meet in shared memory, and each reads
        what all of them found.
        """
        sums = self._scratch["sums"]  # (places, warps of the block, channels)
        warps = self.config.warps
        first, self._places = self._places, self._places + len(terms)
        for place, term in enumerate(terms, first):
            for columns, array in zip(self._columns(0), term.arrays, strict=True):
                rows = pl.ds(self._warpgroup * warps, warps)
                memory.store(sums, (place, rows, columns), jnp.sum(array, axis=1))
        self.meet()
        return [
            Columns(
                [
                    functools.reduce(
                        jnp.add,
                        [
                            memory.load(sums, (place, warp, columns), layout)
                            for warp in range(self.config.warpgroups * warps)
                        ],
                    )
                    for columns, layout in zip(
                        self._columns(0), self._channel_layouts, strict=True
                    )
                ],
                self._layouts,
            )
            for place in range(first, self._places)
        ]

    def meet(self) -> None:
        """Waits for all warpgroups of the block."""
        plgpu.barrier_arrive(self._scratch["in_block"])
        plgpu.barrier_wait(self._scratch["in_block"])

    def exchange(self, values: Sequence[Columns]) -> Iterator[list[Columns]]:
        """The values of each block of the cluster, first to last."""
        ref = self._scratch["partials"]  # (samples, blocks, values, channels)
        for i, value in enumerate(values):
            self.store_channels(ref, value, self.sample, self.block, i)
        self.one_warpgroup(memory.fence)
        plgpu.barrier_arrive(self._scratch["in_cluster"])
        plgpu.barrier_wait(self._scratch["in_cluster"])
        memory.fence()
        for block in range(self.config.blocks):
            yield [
                self.load_channels(ref, self.sample, block, i)
                for i in range(len(values))
            ]

    # Groups.

    def by_group(
        self,
        formula: Callable[..., Sequence[Any]],
        *terms: Columns,
        again: bool = False,
    ) -> list[Columns]:
        """formula(groups, *terms), spread over the channels of the strip.

        Args:
          formula: takes values of channels and returns up to two of groups; `groups`
            is an `EachChannel` or a `Tile`.
          terms: up to two.
          again: at a second call, which has scratch of its own.
        """
        if self.config.group == 1:
            return list(formula(EachChannel(self), *terms))
        scratch = self._scratch["groups"]  # (places, channels of the strip)
        given = 4 * again
        found = given + 2
        count = 0

        @self.one_warpgroup
        def _() -> None:
            for place, term in enumerate(terms, given):
                for columns, array in zip(self._columns(0), term.arrays, strict=True):
                    memory.store(scratch, (place, columns), array)

        if terms:
            self.meet()

        @self.one_warpgroup
        def _() -> None:
            nonlocal count
            for number in range(self.config.width // self.config.group):
                group = Group(self, number)
                results = formula(group, *group.terms(scratch, given, len(terms)))
                group.spread(scratch, found, results)
                count = len(results)

        self.meet()
        return [
            Columns(
                [
                    memory.load(scratch, (place, columns), layout)
                    for columns, layout in zip(
                        self._columns(0), self._channel_layouts, strict=True
                    )
                ],
                self._layouts,
            )
            for place in range(found, found + count)
        ]


class EachChannel:
    """Groups of one channel: what holds for a group holds for its channel."""

    def __init__(self, part: Part):
        self._part = part

    def sum(self, term: Columns) -> Columns:
        """Over the channels of each group."""
        return term

    def load(self, ref: Any) -> Columns:
        """Of ref, (samples, groups)."""
        return self._part.load_channels(ref, self._part.sample)

    def store(self, ref: Any, value: Columns) -> None:
        """To ref, (samples, groups), by one block."""
        self._part.one_block(
            lambda: self._part.store_channels(ref, value, self._part.sample)
        )


class Group:
    """One group of the strip, whose channels lie on the lanes of each warp."""

    def __init__(self, part: Part, number: int):
        config = part.config
        self._part = part
        self._number = part.strip * (config.width // config.group) + number
        self._first = number * config.group
        vector = math.gcd(config.group, 4)
        self._lanes = min(LANES, memory.power_of_2_below(config.group // vector))
        self._chunks = memory.cut(
            0, config.group, self._lanes, vector, spare=config.group // 16
        )
        self._layouts = [_layout(self._lanes, chunk.vector) for chunk in self._chunks]

    def _columns(self) -> list[pl.Slice]:
        return [
            pl.ds(self._first + chunk.start, self._lanes * chunk.vector)
            for chunk in self._chunks
        ]

    def terms(self, scratch: Any, first: int, count: int) -> list[Columns]:
        """scratch[place, channels of the group] for so many places."""
        return [
            Columns(
                [
                    memory.load(scratch, (place, columns), layout)
                    for columns, layout in zip(
                        self._columns(), self._layouts, strict=True
                    )
                ],
                self._layouts,
            )
            for place in range(first, first + count)
        ]

    def spread(self, scratch: Any, first: int, values: Sequence[jax.Array]) -> None:
        """scratch[place, channels of the group] = value."""
        for place, value in enumerate(values, first):
            for columns, layout in zip(self._columns(), self._layouts, strict=True):
                spread = lax.broadcast_in_dim(value, (columns.size,), ())
                spread = plgpu.layout_cast(spread, layout)
                memory.store(scratch, (place, columns), spread)

    def sum(self, term: Columns) -> jax.Array:
        """Over the channels of the group."""
        sums = []
        for chunk, array, layout in zip(
            self._chunks, term.arrays, self._layouts, strict=True
        ):
            if chunk.seen:
                column = plgpu.broadcasted_iota(
                    jnp.int32, array.shape, 0, layout=layout
                )
                array = jnp.where(column >= chunk.seen, array, 0.0)
            sums.append(jnp.sum(array))
        return _sum(sums)

    def load(self, ref: Any) -> jax.Array:
        """Of ref, (samples, groups)."""
        return ref[self._part.sample, self._number]

    def store(self, ref: Any, value: jax.Array) -> None:
        """To ref, (samples, groups), by one block."""

        def write() -> None:
            ref[self._part.sample, self._number] = value

        self._part.one_block(write)


def _layout(lanes: int, vector: int, *pixels: int) -> Any:
    """Lays (warps, pixels of a warp, columns), or columns alone, over a warpgroup.

    Where there are fewer pixels than warps and lanes have room for, several of them
    hold the same.
    """
    tiles = [(*pixels, lanes * vector)]
    if lanes > 1:
        tiles.append((vector,))
    warps, in_warp = pixels or (1, 1)
    minor = -1 if lanes == 1 else -2  # the axis before which the pixels' lie
    warp_dims = [plgpu.Replicated(WARPS // warps)] if warps < WARPS else []
    lane_dims = []
    if lanes * in_warp < LANES:
        lane_dims.append(plgpu.Replicated(LANES // (lanes * in_warp)))
    if warps > 1:
        warp_dims.append(minor - 2)
    if in_warp > 1:
        lane_dims.append(minor - 1)
    if lanes > 1:
        lane_dims.append(-2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tuple(tiles)),
        warp_dims=tuple(warp_dims),
        lane_dims=tuple(lane_dims),
        vector_dim=-1,
    )


# --- moments --------------------------------------------------------------------------

# Count, mean and sum of squares about it of some pixels; without centring the mean is
# None, and the squares are about 0.
Moments = tuple[Any, Any, Any]


def _sum(values: Iterable[Any]) -> Any:
    return functools.reduce(operator.add, values)


def _seen(
    part: Part, center: bool, lines: Sequence[Any], values: Sequence[Columns]
) -> Moments:
    """Of some lines, place by place in them: what each lane has seen."""
    count = _sum(part.counted(line) for line in lines)
    if not center:
        squares = [v * v for v in values]
        return count, None, _sum(map(part.once, lines, squares))
    mean = _sum(map(part.once, lines, values)) / _at_least_1(count)
    squares = [(v - mean) * (v - mean) for v in values]
    return count, mean, _sum(map(part.once, lines, squares))


def _all_seen(part: Part, center: bool, x: Any, *, keep: bool) -> Moments:
    """Of all of a warpgroup's lines, place by place: one read of x, which may be kept."""
    held = part.config.held

    def tile(lines: Sequence[Any]) -> Moments:
        xs = [part.load(x, line) for line in lines]
        if keep:
            for line, loaded in zip(lines, xs, strict=True):
                part.keep("x", line, loaded)
        return _seen(part, center, lines, [loaded.float32() for loaded in xs])

    def step(i: Any, running: Any) -> Any:
        before = (_float(i * held), *running)
        return _merge(before, tile([i * held + j for j in range(held)]))[1:]

    whole = part.whole_lines // held
    seen = lax.fori_loop(
        0, whole, step, (part.zeros() if center else None, part.zeros())
    )
    seen = (float(whole * held), *seen)
    rest = range(whole * held, part.config.lines)
    for first in rest[::held]:
        seen = _merge(seen, tile(rest[first - rest.start :][:held]))
    return seen


def _merge(a: Moments, b: Moments) -> Moments:
    """Of both together (Chan et al. 1983, eq. 2.1); a count may be 0."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if mean_a is None:
        return n, None, m2_a + m2_b
    share = n_b / _at_least_1(n)
    apart = mean_b - mean_a
    return n, mean_a + apart * share, m2_a + m2_b + apart * apart * (n_a * share)


def _of_block(part: Part, pixels: Any, seen: Moments) -> list[Columns]:
    """[mean, m2] or [m2] of the block's pixels, channel by channel."""
    count, mean, m2 = seen
    if mean is None:
        return part.totals(m2)
    (total,) = part.totals(mean * count)
    common = total / pixels
    apart = mean - common
    return [common, *part.totals(m2 + apart * apart * count)]


def _with_mean(values: Sequence[Any]) -> Sequence[Any]:
    """(mean or None, m2) of [mean, m2] or [m2]."""
    return values if len(values) == 2 else (None, *values)


def _at_least_1(n: Any) -> Any:
    if isinstance(n, Columns):
        return n.map(lambda array: jnp.maximum(array, 1.0))
    return max(n, 1.0) if isinstance(n, float) else jnp.maximum(n, 1.0)


def _rstd(var: Any, epsilon: float) -> Any:
    if isinstance(var, Columns):
        return var.map(lambda array: lax.rsqrt(array + epsilon))
    return lax.rsqrt(var + epsilon)


def _float(n: Any) -> Any:
    return float(n) if isinstance(n, int) else n.astype(jnp.float32)


def _group_statistics(
    norm: Norm, config: Config, ref: dict[str, Any]
) -> Callable[..., list[Any]]:
    """The formula by which the moments of channels become mean and rstd of groups.

    It writes mean and var to the references of these names, if there are such.
    """
    pixels, channels = config.pixels, config.group

    def formula(groups: Any, *of_channels: Any) -> list[Any]:
        *mean, m2 = of_channels
        if norm.center:
            mean = [groups.sum(mean[0]) / channels]
            apart = of_channels[0] - mean[0]
            m2 = m2 + apart * apart * pixels
        var = groups.sum(m2) / (pixels * channels)
        for name, value in zip(("var", "mean"), (var, *mean), strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return [*mean, _rstd(var, norm.epsilon)]

    return formula


# --- forward --------------------------------------------------------------------------


def forward(
    config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
) -> list[jax.Array]:
    """y, and with `call.statistics` mean (if centred) and var: resident, one read of x.

    Bytes: x and y, once each; scale and bias once a block, from the caches; 4 bytes a
    statistic. For a cluster of b blocks 8 * (b + b * b) bytes a channel of each sample
    more, almost all of them reads that hit the L2 cache.
    """
    norm = call.norm
    view = x.reshape(_shape(call))
    inputs = memory.present(x=view, scale=scale, bias=bias)
    outputs = {"y": jax.ShapeDtypeStruct(view.shape, norm.dtype)}
    if call.statistics:
        outputs |= _statistics(call, "mean", "var") if norm.center else {}
        outputs |= _statistics(call, "var")

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _all_seen(part, norm.center, ref["x"], keep=True)
        found = _of_block(part, _float(part.pixels), seen)
        if config.blocks > 1:
            parts = [
                (float(config.count(block)), *_with_mean(values))
                for block, values in enumerate(part.exchange(found))
            ]
            _, *merged = functools.reduce(_merge, parts)
            found = [value for value in merged if value is not None]
        *mean, rstd = part.by_group(_group_statistics(norm, config, ref), *found)

        scale = part.load_channels(ref["scale"]) if "scale" in ref else 1.0
        bias = part.load_channels(ref["bias"]) if "bias" in ref else 0.0
        factor = rstd * scale

        def normalize(line: Any) -> None:
            y = part.kept("x", line)
            if norm.center:
                y = y - mean[0]
            part.store(ref["y"], line, y * factor + bias)

        part.each_line(normalize)

    results = _launch(
        "fusednorm_channelwise_forward",
        body,
        config,
        inputs=inputs,
        outputs=outputs,
        exchanged=2,
        kept={"x": x.dtype},
    )
    return _as_call(call, results)


def forward_in_two_reads(
    config: Config,
    last: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
) -> list[jax.Array]:
    """y, and with `call.statistics` mean (if centred) and var: x is read twice.

    Bytes: x once for the moments; once more, and y, in XLA's code.
    """
    mean, var = moments(config, last, call, x)
    y = reference.apply(call.norm, x, mean, var, scale, bias)
    if not call.statistics:
        return [y]
    return [y, var] if mean is None else [y, mean, var]


def moments(
    config: Config, last: Config, call: Call, x: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """mean (None without centring) and var, in the statistics' shape: one read of x.

    Bytes: x; 4 bytes a statistic; 8 a channel for each block, written and read.
    """
    norm = call.norm
    samples, _, channels = _shape(call)
    names = ("mean", "m2") if norm.center else ("m2",)
    partials = jax.ShapeDtypeStruct(
        (samples, config.blocks, len(names), channels), jnp.float32
    )

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _all_seen(part, norm.center, ref["x"], keep=False)
        for i, value in enumerate(_of_block(part, _float(part.pixels), seen)):
            part.store_channels(ref["partials"], value, part.sample, part.block, i)

    found = _launch(
        "fusednorm_channelwise_moments",
        body,
        config,
        inputs={"x": x.reshape(_shape(call))},
        outputs={"partials": partials},
    )

    def combine(ref: dict[str, Any], part: Part) -> None:
        def of_blocks(line: int) -> Moments:
            blocks = part.once(line, part.index(line).map(_pixels_of(config)))
            values = [
                part.load(ref["partials"], line, i).float32() for i in range(len(names))
            ]
            return (blocks, *_with_mean(values))

        seen = functools.reduce(_merge, map(of_blocks, range(last.lines)))
        values = _of_block(part, config.pixels, seen)
        formula = _group_statistics(
            norm, dataclasses.replace(last, pixels=config.pixels), ref
        )
        part.by_group(formula, *values)

    outputs = _statistics(call, *(("mean", "var") if norm.center else ("var",)))
    found = _launch(
        "fusednorm_channelwise_combine",
        combine,
        last,
        inputs=found,
        outputs=outputs,
    )
    shape = norm.statistic_shape(x.shape)
    mean = found["mean"].reshape(shape) if norm.center else None
    return mean, found["var"].reshape(shape)


def _pixels_of(config: Config) -> Callable[[Any], Any]:
    """How many pixels a block has, as a function of its number."""
    return lambda block: config.count(block).astype(jnp.float32)


# --- launches -------------------------------------------------------------------------


def _shape(call: Call) -> tuple[int, int, int]:
    """Of x as the kernels see it: samples, pixels, channels."""
    view = call.geometry
    assert view is not None
    return view.n, view.s, view.g * view.k


def _statistics(call: Call, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    view = call.geometry
    assert view is not None
    shape = jax.ShapeDtypeStruct((view.n, view.g), jnp.float32)
    return dict.fromkeys(names, shape)


def _as_call(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    shapes = {"y": call.x.shape}
    statistic = call.norm.statistic_shape(call.x.shape)
    return [r.reshape(shapes.get(name, statistic)) for name, r in results.items()]


def _launch(
    name: str,
    body: Callable[[dict[str, Any], Part], None],
    config: Config,
    *,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    exchanged: int = 0,
    kept: dict[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Runs body(references by name, part) on every part of every block.

    Args:
      exchanged: values of a channel that the blocks of a cluster tell each other.
      kept: dtypes of what stays in shared memory, by name.
    """
    scratch: dict[str, Any] = {
        "sums": plgpu.SMEM(
            (PLACES, config.warpgroups * config.warps, config.pitch), jnp.float32
        ),
        "in_block": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    for array, dtype in (kept or {}).items():
        for i, chunk in enumerate(config.chunks):
            line = (config.warps, config.line // config.warps)
            columns = config.lanes * chunk.vector
            shape = (config.warpgroups, config.lines, *line, columns)
            scratch[f"{array}_{i}"] = plgpu.SMEM(shape, dtype)
    mesh: dict[str, Any] = {}
    outputs = dict(outputs)
    first = next(iter(inputs.values()))
    samples, channels = first.shape[0], first.shape[-1]
    if config.group > 1:
        scratch["groups"] = plgpu.SMEM((2 * PLACES, config.width), jnp.float32)
    if config.warpgroups > 1:
        mesh |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    programs = samples * config.strips
    if config.resident and config.blocks > 1:
        mesh |= {"cluster": (config.blocks,), "cluster_names": ("cluster",)}
        scratch["in_cluster"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=config.warpgroups
        )
        partials = (samples, config.blocks, exchanged, channels)
        outputs["partials"] = jax.ShapeDtypeStruct(partials, jnp.float32)
    elif not config.resident:
        programs *= config.blocks

    def kernel(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip([*inputs, *outputs], refs, strict=True))
        program = lax.axis_index("program")
        block: Any = 0
        if "in_cluster" in scratch:
            block = lax.axis_index("cluster")
            scratch["partials"] = ref["partials"]
        elif not config.resident:  # from the end: see the top
            program = programs - 1 - program
        rest, strip = lax.div(program, config.strips), lax.rem(program, config.strips)
        if not config.resident:
            rest, block = lax.div(rest, config.blocks), lax.rem(rest, config.blocks)
        body(ref, Part(config, rest, strip, block, scratch))

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            # What is read after it was written lies behind a barrier.
            unsafe_no_auto_barriers=True,
        ),
        **mesh,
    )
    results = dict(zip(outputs, run(*inputs.values()), strict=True))
    if config.resident:
        results.pop("partials", None)
    return results


# --- which calls they take ------------------------------------------------------------


def plan(call: Call, shared: int) -> Kernel | Fallback:
    """Chooses the kernels for one channelwise call.

    Args:
      call: one of geometry x[N, S, G, K], S > 1.
      shared: bytes of shared memory that a block may have.
    """
    view = call.geometry
    assert view is not None
    x_size, y_size = call.x.dtype.itemsize, call.norm.dtype.itemsize
    config = resident(view, max(x_size, y_size), x_size, shared)
    if config is not None:
        return Kernel(
            backend="mosaic_gpu",
            name=f"channelwise {call.op}",
            launch=functools.partial(forward, config, call),
            block=str(config),
        )
    configs = in_two_reads(view, x_size)
    if configs is None:
        return Fallback(f"no")
    return Kernel(
        backend="mosaic_gpu",
        name=f"channelwise {call.op}, two reads",
        launch=functools.partial(forward_in_two_reads, *configs, call),
        block=str(config),
    )
