"""A sample's strips of channels: how they are cut, and what a warpgroup does in one.

What channelwise.py is written in. A sample (pixels, channels) is cut into strips of
channels, a strip's pixels into blocks, and a block's into warpgroups. A warpgroup loads
a *line* at once: so many pixels that all its lanes have some of the strip's channels.

There are no masked loads in Mosaic GPU. The channels that make no power of two are in
*chunks* side by side or overlapping, which is harmless, for sums run down the pixels.
A warpgroup's last line overlaps the one before it where the pixels do not come out
even, and what comes twice is left out of the sums. No warpgroup touches another's.
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

from fusednorm.kernels.geometry import Geometry, power_of_two
from fusednorm.kernels.gpu import memory
from fusednorm.kernels.gpu.memory import LANES, WARPS, Chunk

KB = 1024
SECTOR = 32  # bytes: what the L2 cache fetches at least
MAX_CLUSTER = 8  # blocks: what every GPU can do
MAX_WARPGROUPS = 2  # of a block that loads x: of 128 registers a thread, two fit an SM
MAX_CHUNKS = 8  # of a strip: each is code of its own
PLACES = 4  # sums of channels that a block holds in shared memory

# Blocks of a sample: of the 132 multiprocessors of an H100, clusters of 8 fill 128.
ENOUGH = 128


# --- how the work is cut --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """How a sample is cut. No function of the number of samples.

    Attributes:
      pixels: of a sample.
      group: channels of a group.
      width: channels of a strip; of whole groups, if resident.
      strips: of a sample.
      chunks: of the strip's channels.
      lanes: of a warp that share a pixel.
      warps: of a warpgroup that have pixels of their own: 4, or fewer.
      line: pixels of a line.
      warpgroups: of a block.
      blocks: that share a strip; those of a cluster, if resident.
      resident: whether the pixels stay on the chip.
      at_once: elements of each array that a lane loads before it looks at the first.
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
    at_once: int = 32

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
        """Lines that a lane loads before it looks at the first: 16 to 256 bytes of each
        array, by `at_once`.

        All blocks of an SM, 384 to 768 threads in the benchmark's cases, then have 30
        to 192 KB in flight (compiled for an H100), where bandwidth times latency wants
        18 (H100: 3.35 TB/s * 700 ns / 132) to 25 KB (H200).
        """
        return max(self.at_once // sum(chunk.vector for chunk in self.chunks), 1)

    def of_blocks(self) -> "Config":
        """Cuts what the blocks of a strip found, which are the pixels of one
        warpgroup."""
        line = _line(self.blocks, self.lanes)
        return dataclasses.replace(
            self,
            pixels=self.blocks,
            line=line,
            warps=min(WARPS, line),
            warpgroups=1,
            blocks=1,
        )

    def shared(self, kept: int) -> int:
        """Bytes of shared memory of a block.

        Args:
          kept: bytes of an element of all arrays that are kept.
        """
        places = PLACES * self.warpgroups * WARPS * self.pitch
        groups = PLACES * self.width * (self.group > 1)
        columns = sum(self.lanes * chunk.vector for chunk in self.chunks)
        pixels = self.warpgroups * self.lines * self.line
        barriers = 4 * KB  # and what it takes to align each array
        return pixels * columns * kept + 4 * (places + groups) + barriers

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


def resident(
    view: Geometry,
    itemsize: int,
    kept: int,
    shared: int,
    *,
    cluster: int,
    alone: bool,
    load: int,
) -> Config | None:
    """Cuts a sample whose strips stay in the shared memory of a cluster, if they fit.

    Microseconds on an H200, of 160 MB of x, where a copy takes 76 (three tensors 111):

      blocks: 16 x 16 x 1280 in float32, backward: one of 80 KB and 2 warpgroups 138,
        two of 40 KB 154, four of 20 KB 183. 32 x 32 x 640 in bfloat16: two of 80 KB
        142, four of 40 KB 154, eight of 20 KB 215. 8 x 8 x 1280 in bfloat16: of 20 KB
        131, of 10 KB 206.
      pieces of a pixel: 64 x 64 x 512 in float32: of 128 bytes 104, of 64 bytes 117;
        of 80 bytes, 64 x 64 x 320, 155, of 160 114.
      two reads: 118 there, 152 of 32 x 32 x 640, 134 of 16 x 16 x 1280; backward 192 of
        64 x 64 x 320 (clusters of 8: 210), 214 of 32 x 32 x 640 (of 2: 216, of 4: 219
        to 281), 198 of 16 x 16 x 1280.

    Args:
      view: x[N, S, G, K].
      itemsize: bytes of the widest of the arrays that are loaded and stored.
      kept: bytes of an element of all arrays that are kept.
      shared: bytes that a block may have.
      cluster: blocks of a strip at most.
      alone: whether there is one sample whatever the batch: its blocks have the GPU for
        themselves, and are many rather than large.
      load: bytes of a lane's loads, at most.
    """
    # Two blocks at least fit an SM, so that one loads while another one adds up or
    # stores. It has 1 KB more than a block may have, and CUDA takes 1 KB of each.
    limit = (shared - KB) // 2
    large = (32 if alone else 96) * KB
    found = []
    for width in _multiples(view.k, view.g):
        strip = width * view.s * kept
        if strip > cluster * limit:
            break
        blocks = min(pl.next_power_of_2(pl.cdiv(strip, large)), cluster)
        while blocks <= cluster:
            warpgroups = min(pl.cdiv(strip // blocks, 64 * KB), MAX_WARPGROUPS)
            config = _config(
                view, width, itemsize, warpgroups, blocks, resident=True, load=load
            )
            if config.shared(kept) <= limit and len(config.chunks) <= MAX_CHUNKS:
                found.append(config)
                break
            blocks *= 2

    def narrowest(sectors: int, configs: Sequence[Config]) -> list[Config]:
        """Of so many sectors a pixel or more, whole ones if possible; at most one."""
        wide = [c for c in configs if c.width * itemsize >= sectors * SECTOR]
        wide = wide or [c for c in configs if c.strips == 1]
        return ([c for c in wide if c.width * itemsize % SECTOR == 0] or wide)[:1]

    if alone:  # half a line of the L1 cache; one sector where that makes more blocks
        small = [c for c in found if c.width * view.s * kept <= c.blocks * large]
        best = narrowest(2, found) + narrowest(1, small)
        return max(
            best,
            key=lambda c: (min(c.strips * c.blocks, ENOUGH), c.blocks == 1),
            default=None,
        )
    # A warpgroup goes over a strip's groups one by one.
    few = [
        c
        for c in found
        if c.group == 1 or c.width <= 8 * c.group or c.width * itemsize <= 2 * SECTOR
    ]
    large_enough = [c for c in few if c.width * view.s * itemsize >= 20 * KB]
    few = large_enough or few[-1:]
    return next(iter(narrowest(4, few) or narrowest(2, few)), None)


def in_two_reads(
    view: Geometry, itemsize: int, shared: int, *, arrays: int, load: int
) -> tuple[Config, Config] | None:
    """Cuts a sample whose pixels are read twice, and what its blocks find.

    Args:
      view: x[N, S, G, K].
      itemsize: bytes of the widest of the arrays that are loaded.
      shared: bytes of shared memory that a block may have.
      arrays: how many are loaded.
      load: bytes of a lane's loads, at most.
    """
    # 128 bytes of a pixel, or as nearly so many as divides it.
    widths = [
        width
        for width in _multiples(1, view.features)
        if width * itemsize >= SECTOR or width == view.features
    ]
    width = min(
        widths, key=lambda width: (abs(math.log2(width * itemsize / 128)), width)
    )
    # Blocks of 512 pixels or more, whose sums are below 1 % of what they read; no more
    # than 12 on each of 132 SMs where a sample alone can fill them: whether 2, 3 or 4
    # of them are resident, the last ones come in a full wave. Of 256 pixels or more
    # where that gives each SM one.
    strips = view.features // width
    many = min(view.s // 512, 12 * 132 // strips)
    blocks = max(many, min(view.s // 256, ENOUGH // strips), 1)
    # 16 KB or more of each warpgroup's loads in flight; of x alone in 16 bits one
    # warpgroup a block is as good for that, and has half as much to add up: on an H200
    # 45 to 48 us for 160 MB, with two 52.
    warpgroups = 1 if arrays * itemsize == 2 else MAX_WARPGROUPS
    config = _config(
        view, width, itemsize, warpgroups, blocks, resident=False, load=load
    )
    groups = [width for width in _multiples(view.k, view.g) if width >= 32]
    last = _config(
        dataclasses.replace(view, s=blocks),
        groups[0] if groups else view.features,
        4,
        4 if blocks > 64 else 1,
        1,
        resident=True,
        load=16,
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
    load: int,
) -> Config:
    """Fewer warpgroups and blocks where there are fewer pixels."""
    warpgroups = min(warpgroups, view.s)
    blocks = min(blocks, view.s // warpgroups)
    vector = _vector(width, load // itemsize)
    lanes = min(LANES, power_of_two(width // vector))
    line = _line(view.s // (blocks * warpgroups), lanes)
    return Config(
        pixels=view.s,
        group=view.k,
        width=width,
        strips=view.features // width,
        chunks=tuple(memory.cut(width, lanes, vector)),
        lanes=lanes,
        warps=min(WARPS, line),
        line=line,
        warpgroups=warpgroups,
        blocks=blocks,
        resident=resident,
    )


def _vector(columns: int, widest: int) -> int:
    """Columns of a lane, for two lanes or more: jax 0.11 cannot store what all lanes
    of all warps hold alike."""
    return min(math.gcd(columns, widest), max(columns // 2, 1))


def _line(pixels: int, lanes: int) -> int:
    """Pixels of a line, where a warpgroup has so many pixels or one more."""
    return min(WARPS * LANES // lanes, power_of_two(pixels))


def _multiples(of: int, count: int) -> Iterator[int]:
    """Widths of strips that cut `count` groups of `of` channels without a rest."""
    return (of * m for m in range(1, count + 1) if count % m == 0)


# --- values of a strip's channels -----------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Columns:
    """One array for each chunk of a strip. Arithmetic goes chunk by chunk.

    An array is a line's, (warps, pixels of a warp, columns), or has one value for each
    channel, (columns,), which holds for all pixels where the two meet.
    """

    def __init__(self, arrays: Sequence[Any], layouts: Sequence[Any]):
        self.arrays = tuple(arrays)
        self.layouts = tuple(layouts)  # of a line, chunk by chunk

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


def add(values: Iterable[Any]) -> Any:
    """Their sum, in their order."""
    return functools.reduce(operator.add, values)


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
      sample, strip, block: which one.
      samples: how many there are.
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
        samples: int,
    ):
        self.config = config
        self.samples = samples
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
        self._columns_here = [
            pl.ds(chunk.start, config.lanes * chunk.vector) for chunk in config.chunks
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

    def over_lines[T](
        self,
        step: Callable[[Sequence[Any], T], T],
        start: T,
        last: Callable[[Sequence[int], T], T] | None = None,
    ) -> T:
        """step(lines, carry) for all lines, some at once: whole ones in a loop.

        Args:
          step: returns the next carry.
          start: the first one.
          last: instead of `step` for the lines after the loop.
        """
        held = self.config.held
        whole = self.whole_lines // held

        def in_loop(i: Any, carry: T) -> T:
            return step([i * held + j for j in range(held)], carry)

        carry = lax.fori_loop(0, whole, in_loop, start)
        for first in range(whole * held, self.config.lines, held):
            lines = range(first, min(first + held, self.config.lines))
            carry = (last or step)(lines, carry)
        return carry

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

    def _columns(self) -> list[pl.Slice]:
        """Of the sample's channels."""
        first = self.strip * self.config.width
        return [pl.ds(first + here.start, here.size) for here in self._columns_here]

    def load_channels(self, ref: Any, *at: Any) -> Columns:
        """ref[*at, channels of the strip] in float32."""
        return self._load_channels(ref, at, self._columns())

    def _load_here(self, scratch: Any, *at: Any) -> Columns:
        """Of what has the channels of this strip alone."""
        return self._load_channels(scratch, at, self._columns_here)

    def _load_channels(
        self, ref: Any, at: Sequence[Any], columns: Sequence[pl.Slice]
    ) -> Columns:
        return Columns(
            [
                memory.load(ref, (*at, chunk), layout)
                for chunk, layout in zip(columns, self._channel_layouts, strict=True)
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
            for columns, array in zip(self._columns_here, term.arrays, strict=True):
                at = (place, pl.ds(own, warps), columns)
                if array.ndim == 3:
                    array = memory.sum_lanes(array, 1)
                memory.store(sums, at, array)
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
            self.config.of_blocks(),
            self.sample,
            self.strip,
            0,
            self.warpgroup,
            self._scratch,
            self.samples,
        )
        part._places = self._places  # those before are in use
        return part

    # Groups.

    def by_group(
        self, formula: Callable[..., Sequence[Any]], *terms: Columns
    ) -> list[Columns]:
        """formula(groups, *terms), spread over the channels of the strip.

        Args:
          formula: takes values of channels and returns up to two of groups; `groups`
            is an `EachChannel` or a `Group`.
          terms: of channels, up to two. At a second call there are some: until they
            have met, other warpgroups may still read what the first call found.
        """
        if self.config.group == 1:
            return list(formula(EachChannel(self), *terms))
        scratch = self._scratch["groups"]  # (places, channels of the strip)
        given, found = 0, 2
        count = 0

        @self.one_warpgroup
        def _() -> None:
            for place, term in enumerate(terms, given):
                for columns, array in zip(self._columns_here, term.arrays, strict=True):
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
        vector = _vector(config.group, 4)
        self._lanes = min(LANES, power_of_two(config.group // vector))
        self._chunks = memory.cut(config.group, self._lanes, vector)
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
            sums.append(memory.sum_lanes(array, 0))
        return add(sums)

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
    hold the same. Lanes of 4 bytes are taken as pairs: else Mosaic moves what 8 times 4
    of them hold by `ldmatrix` and `stmatrix`, which want each 4 lanes' 16 bytes to be
    aligned. Groups of 10 channels are not.
    """
    warps, in_warp = (*pixels, 1, 1)[:2]
    tiles = [(*pixels, lanes * vector)]
    pairs = lanes % 4 == 0 and vector <= 2
    if pairs:
        tiles.append((2 * vector,))
    if lanes > 1:
        tiles.append((vector,))
    last = -1 if lanes == 1 else -3 if pairs else -2  # the axis of lanes, or of pairs
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
    if pairs:
        lane_dims.append(-2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tuple(tiles)),
        warp_dims=tuple(warp_dims),
        lane_dims=tuple(lane_dims),
        vector_dim=-1,
    )
