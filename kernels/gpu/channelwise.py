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
from fusednorm.kernels.gpu import memory
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
    def line_shape(self) -> tuple[int, ...]:
        """(warps, pixels of a warp), without the latter where it is 1."""
        in_warp = self.line // self.warps
        return (self.warps,) if in_warp == 1 else (self.warps, in_warp)

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

    def of_blocks(self, warpgroups: int) -> "Config":
        """Cuts what the blocks of a strip found: they are the pixels."""
        line = min(
            WARPS * LANES // self.lanes,
            memory.power_of_2_below(self.blocks // warpgroups),
        )
        return dataclasses.replace(
            self,
            pixels=self.blocks,
            line=line,
            warps=min(WARPS, line),
            warpgroups=warpgroups,
            blocks=1,
        )

    def shared(self, kept: int) -> int:
        """Bytes of shared memory of a block.

        Args:
          kept: bytes of an element of all arrays that are kept.
        """
        places = PLACES * self.warpgroups * WARPS * self.pitch
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


def in_two_reads(
    view: Geometry, itemsize: int, shared: int
) -> tuple[Config, Config] | None:
    """Cuts a sample whose pixels are read twice, and what its blocks find.

    Args:
      view: x[N, S, G, K].
      itemsize: bytes of the widest of the arrays that are loaded.
      shared: bytes of shared memory that a block may have.
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
    both = (config, last)
    fit = all(c.shared(0) <= shared and len(c.chunks) <= MAX_CHUNKS for c in both)
    return both if fit else None


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
    spread = lax.broadcast_in_dim(small, large.shape, (large.ndim - 1,))
    spread = plgpu.layout_cast(spread, layout)
    return (spread, b) if ndim_a < ndim_b else (a, spread)


# --- inside a kernel ------------------------------------------------------------------


class Part:
    """One warpgroup's pixels of one strip of one sample.

    Attributes:
      config: how the sample is cut.
      sample, strip, block: which.
      warpgroup: which of the block's; a Python 0 where there is one.
      pixels: of the block.
    """

    def __init__(
        self,
        config: Config,
        sample: Any,
        strip: Any,
        block: Any,
        warpgroup: Any,
        scratch: Any,
    ):
        self.config = config
        self.sample, self.strip, self.block = sample, strip, block
        self.warpgroup = warpgroup
        self.pixels = config.count(block)
        worker = block * config.warpgroups + (warpgroup if config.warpgroups > 1 else 0)
        self._first = config.first(worker)
        self._own = config.first(worker + 1) - self._first  # pixels of this warpgroup
        self._scratch = scratch
        self._places = 0
        pixels = config.line_shape
        self._shapes = [
            (*pixels, config.lanes * chunk.vector) for chunk in config.chunks
        ]
        self._layouts = [
            _layout(config.lanes, chunk.vector, *pixels) for chunk in config.chunks
        ]
        self._channel_layouts = [
            layout.reduce(tuple(range(len(pixels)))) for layout in self._layouts
        ]

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
            at = (self.warpgroup, line)
            memory.store(self._scratch[f"{name}_{i}"], at, array)

    def kept(self, name: str, line: Any) -> Columns:
        """A line in float32."""
        return Columns(
            [
                memory.load(self._scratch[f"{name}_{i}"], (self.warpgroup, line), a)
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
            place = iota(0)
            if len(shape) == 3:
                place = place * shape[1] + iota(1)
            places.append(place)
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

    def _load_here(self, scratch: Any, *at: Any) -> Columns:
        """Of what has the channels of this strip alone."""
        return Columns(
            [
                memory.load(scratch, (*at, columns), layout)
                for columns, layout in zip(
                    self._columns(0), self._channel_layouts, strict=True
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
        if isinstance(self.warpgroup, int):
            do()
        else:
            pl.when(self.warpgroup == 0)(do)

    def one_block(self, do: Callable[[], None]) -> None:
        """Has the first of the strip's blocks do it."""
        if self.config.blocks == 1 or not self.config.resident:
            do()
        else:
            pl.when(self.block == 0)(do)

    # Sums.

    def add_up(self, *terms: Columns) -> list["Sums"]:
        """Adds lines over all pixels of the block, for each channel.

        In a warp by shuffles; what its warps found meets in shared memory.
        """
        sums = self._scratch["sums"]  # (places, warps of the block, channels)
        warps = self.config.warps
        own = self.warpgroup * warps
        first, self._places = self._places, self._places + len(terms)
        for place, term in enumerate(terms, first):
            for columns, array in zip(self._columns(0), term.arrays, strict=True):
                at = (place, pl.ds(own, warps), columns)
                of_warps = jnp.sum(array, axis=1) if array.ndim == 3 else array
                memory.store(sums, at, of_warps)
        self.meet()
        begin = 0 if self.config.warpgroups > 1 else own  # one may work for itself
        count = self.config.warpgroups * warps
        return [Sums(place, begin, count) for place in range(first, self._places)]

    def total(self, sums: "Sums") -> Columns:
        """Of all that the block's warps found: for each channel."""
        found = functools.partial(self._load_here, self._scratch["sums"], sums.place)
        return lax.fori_loop(
            1,
            sums.count,
            lambda i, total: total + found(sums.first + i),
            found(sums.first),
        )

    def meet(self) -> None:
        """Waits for all warpgroups of the block."""
        plgpu.barrier_arrive(self._scratch["in_block"])
        plgpu.barrier_wait(self._scratch["in_block"])

    def exchange(self, values: Sequence[Columns]) -> "Part":
        """Tells the other blocks of the cluster, and hears from them.

        Returns:
          What reads "partials", the blocks of this strip as its pixels: each warpgroup
          all of them.
        """
        for i, value in enumerate(values):
            at = (self.sample, self.block, i)
            self.store_channels(self._scratch["partials"], value, *at)
        self.one_warpgroup(memory.fence)
        plgpu.barrier_arrive(self._scratch["in_cluster"])
        plgpu.barrier_wait(self._scratch["in_cluster"])
        memory.fence()
        part = Part(
            self.config.of_blocks(1),
            self.sample,
            self.strip,
            0,
            self.warpgroup,
            self._scratch,
        )
        part._places = self._places  # those before are in use
        return part

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
            self._load_here(scratch, place) for place in range(found, found + count)
        ]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Where in shared memory a warpgroup finds what the warps have added up.

    Attributes:
      place: which sum.
      first, count: of the warps.
    """

    place: int
    first: Any
    count: int


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
    """Lays columns, (warps, columns) or (warps, pixels of a warp, columns) over a
    warpgroup.

    Where there are fewer pixels than warps and lanes have room for, several of them
    hold the same.
    """
    warps, in_warp = (*pixels, 1, 1)[:2]
    tiles = [(*pixels, lanes * vector)]
    if lanes > 1:
        tiles.append((vector,))
    last = -1 if lanes == 1 else -2  # the axis of lanes, or of the vector
    warp_dims: list[Any] = [plgpu.Replicated(WARPS // warps)] if warps < WARPS else []
    if warps > 1:
        warp_dims.append(last - len(pixels))
    lane_dims: list[Any] = []
    if lanes * in_warp < LANES:
        lane_dims.append(plgpu.Replicated(LANES // (lanes * in_warp)))
    if in_warp > 1:
        lane_dims.append(last - 1)
    if lanes > 1:
        lane_dims.append(last)
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
    """Of all of a warpgroup's lines, place by place: one read of x."""
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


def _of_block(
    part: Part, pixels: Any, seen: Moments, to: Part | None = None
) -> list[Columns]:
    """[mean, m2] or [m2] of the block's pixels, channel by channel.

    Args:
      part: which saw them.
      pixels: how many they are.
      seen: what its lanes saw.
      to: the part whose lines the results are to meet, if another one.
    """
    to = to or part
    count, mean, m2 = seen
    if mean is None:
        return [to.total(sums) for sums in part.add_up(m2)]
    (total,) = part.add_up(mean * count)
    apart = mean - part.total(total) / pixels
    (squares,) = part.add_up(m2 + apart * apart * count)
    return [to.total(total) / pixels, to.total(squares)]


def _of_blocks(
    part: Part, config: Config, partials: Any, to: Part | None = None
) -> list[Columns]:
    """[mean, m2] or [m2] of all blocks' pixels, channel by channel.

    Args:
      part: the blocks, which are its pixels.
      config: how the pixels are cut into blocks.
      partials: (samples, blocks, 2 or 1, channels), what `_of_block` returned on each.
      to: as for `_of_block`.
    """

    def line_of(line: int) -> Moments:
        pixels = part.index(line).map(lambda block: _float(config.count(block)))
        *mean, m2 = (
            part.load(partials, line, i).float32() for i in range(partials.shape[2])
        )
        return part.once(line, pixels), *(mean or [None]), m2

    seen = functools.reduce(_merge, map(line_of, range(part.config.lines)))
    return _of_block(part, float(config.pixels), seen, to)


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
            blocks = part.exchange(found)
            found = _of_blocks(blocks, config, ref["partials"], to=part)
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
        values = _of_blocks(part, config, ref["partials"])
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


# --- backward -------------------------------------------------------------------------


def backward(
    config: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
) -> list[jax.Array]:
    """Those of dx, dscale and dbias that `call.wanted` names: resident, one read of x
    and dy.

    Bytes: x, dy and dx, once each; 4 bytes a statistic; for dscale and dbias each 4
    a channel of each sample, which XLA adds up. For a cluster of b blocks 8 * (b + b *
    b) bytes a channel of each sample more, almost all of them from the L2 cache.
    """
    norm = call.norm
    inputs = _gradient_inputs(call, dy, x, scale, mean, var)
    names = _summed(call)
    outputs: dict[str, Any] = {
        name: _of_each_sample(call) for name in names if _wants(call, name)
    }
    outputs["dx"] = jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)

    def body(ref: dict[str, Any], part: Part) -> None:
        *mean, rstd = part.by_group(_given_statistics(call, ref))
        seen = _gradients_seen(part, names, ref, mean, keep=True)
        found = [part.total(sums) for sums in part.add_up(*seen)]
        if config.blocks > 1:
            blocks = part.exchange(found)
            found = _sums_of_blocks(blocks, ref["partials"], to=part)
        terms = _store_gradients(part, names, ref, rstd, found)
        c1, *c2 = part.by_group(_inner_products(config, ref), *terms, again=True)
        scale = part.load_channels(ref["scale"]) if "scale" in ref else 1.0

        def store_dx(line: Any) -> None:
            x_hat = part.kept("x", line)
            if norm.center:
                x_hat = x_hat - mean[0]
            x_hat = x_hat * rstd
            inner = part.kept("dy", line) * scale - x_hat * c1
            if norm.center:
                inner = inner - c2[0]
            part.store(ref["dx"], line, inner * rstd)

        part.each_line(store_dx)

    results = _launch(
        "fusednorm_channelwise_backward",
        body,
        config,
        inputs=inputs,
        outputs=outputs,
        exchanged=len(names),
        kept={"x": x.dtype, "dy": dy.dtype},
    )
    return _wanted(call, results)


def backward_in_two_reads(
    config: Config,
    last: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
) -> list[jax.Array]:
    """Those of dx, dscale and dbias that `call.wanted` names: x and dy are read twice.

    Bytes: x and dy for their sums, 8 a channel for each block, written and read; for
    dx both once more, and dx, in XLA's code.
    """
    samples, _, channels = _shape(call)
    inputs = _gradient_inputs(call, dy, x, scale, mean, var)
    names = _summed(call)
    partials = (samples, config.blocks, len(names), channels)

    def body(ref: dict[str, Any], part: Part) -> None:
        mean = []
        if call.norm.center:
            mean.append(part.load_channels(ref["mean"], part.sample))
        seen = _gradients_seen(part, names, ref, mean, keep=False)
        for i, sums in enumerate(part.add_up(*seen)):
            at = (part.sample, part.block, i)
            part.store_channels(ref["partials"], part.total(sums), *at)

    # Strips are not of whole groups here.
    of_channels = (
        {"mean": jnp.repeat(inputs["mean"], call.geometry.k, 1)}
        if mean is not None
        else {}
    )
    found = _launch(
        "fusednorm_channelwise_sums",
        body,
        config,
        inputs={"dy": inputs["dy"], "x": inputs["x"], **of_channels},
        outputs={"partials": jax.ShapeDtypeStruct(partials, jnp.float32)},
    )

    outputs = {name: _of_each_sample(call) for name in names if _wants(call, name)}
    if call.wanted[0]:
        outputs |= _statistics(call, *(("c1", "c2") if call.norm.center else ("c1",)))

    def combine(ref: dict[str, Any], part: Part) -> None:
        *_, rstd = part.by_group(_given_statistics(call, ref))
        found = _sums_of_blocks(part, ref["partials"])
        terms = _store_gradients(part, names, ref, rstd, found)
        if call.wanted[0]:
            part.by_group(_inner_products(config, ref), *terms, again=True)

    results = _launch(
        "fusednorm_channelwise_combine",
        combine,
        last,
        inputs=found | {n: a for n, a in inputs.items() if n not in ("dy", "x")},
        outputs=outputs,
    )
    if call.wanted[0]:
        shape = call.norm.statistic_shape(x.shape)
        c1, c2 = (
            results[name].reshape(shape) if name in results else None
            for name in ("c1", "c2")
        )
        results["dx"] = reference.input_gradient(
            call.norm, dy, x, scale, mean, var, c1, c2
        )
    return _wanted(call, results)


def _summed(call: Call) -> tuple[str, ...]:
    """The sums that the backward takes: for dx both, without centring the first."""
    both = call.wanted[2] or (call.wanted[0] and call.norm.center)
    return ("dscale", "dbias") if both else ("dscale",)


def _wants(call: Call, name: str) -> bool:
    return dict(zip(("dx", "dscale", "dbias"), call.wanted, strict=True))[name]


def _gradient_inputs(
    call: Call, dy: jax.Array, x: jax.Array, scale: Any, mean: Any, var: jax.Array
) -> dict[str, jax.Array]:
    view = call.geometry
    assert view is not None
    return memory.present(
        dy=dy.reshape(_shape(call)),
        x=x.reshape(_shape(call)),
        scale=scale,
        mean=None if mean is None else mean.reshape(view.n, view.g),
        var=var.reshape(view.n, view.g),
    )


def _given_statistics(call: Call, ref: dict[str, Any]) -> Callable[..., list[Any]]:
    """The formula by which groups get mean (if centred) and rstd from the forward."""

    def formula(groups: Any) -> list[Any]:
        mean = [groups.load(ref["mean"])] if call.norm.center else []
        return [*mean, _rstd(groups.load(ref["var"]), call.norm.epsilon)]

    return formula


def _gradients_seen(
    part: Part,
    names: Sequence[str],
    ref: dict[str, Any],
    mean: Sequence[Columns],
    *,
    keep: bool,
) -> list[Columns]:
    """What each lane adds to the sums of these names, place by place in its lines.

    dscale still lacks the factor rstd.
    """
    held = part.config.held

    def tile(lines: Sequence[Any]) -> list[Columns]:
        loaded = [
            {name: part.load(ref[name], line) for name in ("dy", "x")} for line in lines
        ]
        sums = []
        for line, here in zip(lines, loaded, strict=True):
            if keep:
                for name, value in here.items():
                    part.keep(name, line, value)
            dy, x = here["dy"].float32(), here["x"].float32()
            centred = x - mean[0] if mean else x
            terms = {"dscale": dy * centred, "dbias": dy}
            sums.append([part.once(line, terms[name]) for name in names])
        return [_sum(terms) for terms in zip(*sums, strict=True)]

    def step(i: Any, running: Any) -> Any:
        found = tile([i * held + j for j in range(held)])
        return [a + b for a, b in zip(running, found, strict=True)]

    whole = part.whole_lines // held
    seen = lax.fori_loop(0, whole, step, [part.zeros() for _ in names])
    rest = range(whole * held, part.config.lines)
    for first in rest[::held]:
        found = tile(rest[first - rest.start :][:held])
        seen = [a + b for a, b in zip(seen, found, strict=True)]
    return seen


def _sums_of_blocks(part: Part, partials: Any, to: Part | None = None) -> list[Columns]:
    """Of what the blocks of a strip found; arguments as for `_of_blocks`."""
    sums = [
        _sum(
            part.once(line, part.load(partials, line, i).float32())
            for line in range(part.config.lines)
        )
        for i in range(partials.shape[2])
    ]
    return [(to or part).total(place) for place in part.add_up(*sums)]


def _store_gradients(
    part: Part,
    names: Sequence[str],
    ref: dict[str, Any],
    rstd: Columns,
    found: Sequence[Columns],
) -> list[Columns]:
    """Stores dscale and dbias of the sample where they are wanted.

    Returns:
      The terms of dx's inner products: both times scale.
    """
    scale = part.load_channels(ref["scale"]) if "scale" in ref else 1.0
    found = [found[0] * rstd, *found[1:]]
    for name, value in zip(names, found, strict=True):
        if name in ref:
            store = functools.partial(
                part.store_channels, ref[name], value, part.sample
            )
            part.one_block(store)
    return [value * scale for value in found]


def _inner_products(config: Config, ref: dict[str, Any]) -> Callable[..., list[Any]]:
    """The formula of c1 = mean(w * x_hat) and c2 = mean(w), w = dy * scale.

    It writes them to the references of these names, if there are such.
    """
    count = config.pixels * config.group

    def formula(groups: Any, *terms: Columns) -> list[Any]:
        found = [groups.sum(term) / count for term in terms]
        for name, value in zip(("c1", "c2"), found, strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return found

    return formula


def _wanted(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    """dx in x's shape, and the sums over the samples of each example."""
    found = [results["dx"].reshape(call.x.shape)] if call.wanted[0] else []
    names = [name for name in ("dscale", "dbias") if _wants(call, name)]
    samples, _, channels = _shape(call)
    lead = call.x.shape[: call.own_params]
    examples = math.prod(lead)
    each = [results[n].reshape(examples, samples // examples, channels) for n in names]
    if samples > examples:
        each = list(memory.sum_over_blocks(*each)) if each else []
    return found + [total.reshape(*lead, channels) for total in each]


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


def _of_each_sample(call: Call) -> jax.ShapeDtypeStruct:
    """Values of channels."""
    samples, _, channels = _shape(call)
    return jax.ShapeDtypeStruct((samples, channels), jnp.float32)


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
            (PLACES, config.warpgroups * WARPS, config.pitch), jnp.float32
        ),
        "in_block": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    for array, dtype in (kept or {}).items():
        for i, chunk in enumerate(config.chunks):
            columns = config.lanes * chunk.vector
            shape = (config.warpgroups, config.lines, *config.line_shape, columns)
            scratch[f"{array}_{i}"] = plgpu.SMEM(shape, dtype)
    mesh: dict[str, Any] = {}
    outputs = dict(outputs)
    first = next(iter(inputs.values()))  # an array of all samples and channels
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
        warpgroup: Any = 0
        if config.warpgroups > 1:
            warpgroup = lax.axis_index("warpgroup")
        body(ref, Part(config, rest, strip, block, warpgroup, scratch))

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
    sizes = [call.x.dtype.itemsize]
    if call.op == "forward":
        kept, widest = sizes[0], max(sizes[0], call.norm.dtype.itemsize)
    else:
        assert call.dy is not None
        sizes.append(call.dy.dtype.itemsize)
        kept, widest = sum(sizes), max(sizes)
    config = resident(view, widest, kept, shared) if call.wanted[0] else None
    combine = None
    if config is None:
        configs = in_two_reads(view, max(sizes), shared)
        if configs is None:
            return Fallback(
                f"{view.features} channels in groups of {view.k} cannot be cut into "
                f"strips of at most {MAX_CHUNKS} loads"
            )
        config, combine = configs
    launch: Callable[..., Any]
    if combine is None:
        launch = functools.partial(
            forward if call.op == "forward" else backward, config, call
        )
    else:
        launch = functools.partial(
            forward_in_two_reads if call.op == "forward" else backward_in_two_reads,
            config,
            combine,
            call,
        )
    return Kernel(
        backend="mosaic_gpu",
        name=f"channelwise {call.op}" + (", two reads" if combine else ""),
        launch=launch,
        block=str(config),
        why=_why(config, view, kept),
        bytes_moved=_bytes_moved(call, config),
    )


def _why(config: Config, view: Geometry, kept: int) -> str:
    """What the sample's size led to."""
    size = f"{config.width * view.s * kept / KB:.0f} KB"
    if not config.resident:
        return (
            "a group's pixels do not fit the shared memory of 8 blocks: they are read "
            "twice, and XLA normalizes, with what follows"
        )
    if config.blocks == 1:
        return f"the block keeps its {size} in shared memory: one read"
    return (
        f"{config.blocks} blocks of a cluster keep the {size} of {config.width} "
        "channels in shared memory: one read"
    )


def _bytes_moved(call: Call, config: Config) -> int:
    """Of device memory: tensors, parameters, statistics and partial sums."""
    samples, _, channels = _shape(call)
    size, x_size = call.x.size, call.x.dtype.itemsize
    view = call.geometry
    assert view is not None
    statistics = 4 * samples * view.g * (1 + call.norm.center)
    reads = 1 if config.resident else 1 + call.wanted[0]
    params = [p for p in (call.scale, call.bias) if p is not None]
    moved = sum(param.size * param.dtype.itemsize for param in params)
    exchanged = 4 * samples * channels * config.blocks * (config.blocks > 1)
    if call.op == "forward":
        names = 1 + call.norm.center
        moved += size * (reads * x_size + call.norm.dtype.itemsize)
        moved += statistics * call.statistics
    else:
        assert call.dy is not None
        names = len(_summed(call))
        moved += size * reads * (x_size + call.dy.dtype.itemsize)
        moved += size * x_size * call.wanted[0] + statistics
        examples = math.prod(call.x.shape[: call.own_params])
        moved += 4 * channels * sum(call.wanted[1:]) * (2 * samples + examples)
    return moved + 2 * names * exchanged
