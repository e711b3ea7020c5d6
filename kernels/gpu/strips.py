"""Strips of channels: how a sample is cut into them, and what a warpgroup does in one.

This module is the vocabulary of channelwise.py. A sample (pixels, channels) is cut into
strips of channels, a strip's pixels into blocks, and a block's pixels into warpgroups.
A warpgroup loads one *line* at a time: as many pixels as it takes for every lane to
hold some of the strip's channels.

Mosaic GPU has no masked loads. A strip whose width is not a power of two is split into
*chunks* that lie side by side or overlap. Overlapping chunks are harmless, because sums
run down the pixels. If a warpgroup's pixels do not fill whole lines, its last line
overlaps the line before it, and the pixels seen twice are left out of the sums. No
warpgroup touches the pixels of another one.
"""

import dataclasses
import functools
import itertools
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
SECTOR = 32  # bytes: the least that the L2 cache fetches
MAX_CLUSTER = 8  # blocks: what every GPU supports
# Per block that loads x. Two blocks of this size fit an SM at 128 registers per thread.
MAX_WARPGROUPS = 2
MAX_CHUNKS = 8  # per strip: each chunk adds its own code
VALUES = 2  # most values per channel that are summed together

# Blocks of one sample that fill a GPU of 132 multiprocessors.
ENOUGH = 128


# --- how the work is cut --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """How a sample is cut. It does not depend on the number of samples.

    Attributes:
      pixels: pixels of a sample.
      group: channels of a group.
      width: channels of a strip. If `resident`, these are whole groups.
      strips: strips of a sample.
      chunks: chunks that cover the strip's channels.
      lanes: lanes of a warp that share a pixel.
      warps: warps of a warpgroup that hold pixels of their own: 4 or fewer.
      line: pixels of a line.
      warpgroups: warpgroups of a block.
      blocks: blocks that share a strip. If `resident`, they form a cluster.
      resident: whether the pixels stay on the chip.
      at_once: elements of each array that a lane loads before it uses the first one.
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
    def clustered(self) -> bool:
        """Whether a strip's blocks form a cluster."""
        return self.resident and self.blocks > 1

    @property
    def places(self) -> int:
        """Sums per channel for which a block has room in shared memory.

        A cluster sums twice. No barrier says when all warps have read the first sums.
        """
        return VALUES * (1 + self.clustered)

    @property
    def line_shape(self) -> tuple[int, ...]:
        """(warps, pixels per warp), or (warps,) if the latter is 1."""
        in_warp = self.line // self.warps
        return (self.warps,) if in_warp == 1 else (self.warps, in_warp)

    @property
    def lines(self) -> int:
        """Lines that it takes to hold a warpgroup's pixels."""
        return pl.cdiv(pl.cdiv(self.pixels, self.workers), self.line)

    @property
    def lines_at_once(self) -> int:
        """Lines that a lane loads before it uses the first one.

        Depending on `at_once`, these are 16 to 256 bytes of each array. In the
        benchmark's cases, an SM runs 384 to 768 threads, which have 30 to 192 KB of
        loads in flight together (compiled for an H100). Bandwidth times latency asks
        for 10 KB (H100: 3.35 TB/s * 375 ns / 132) to 14 KB (H200), more under load.
        """
        columns = sum(chunk.vector for chunk in self.chunks)
        lines = max(self.at_once // columns, 1)
        # Strips of 5 * 2^n channels have 10 columns per lane. Where those make three
        # lines, four leave no rest, for which the code would be there again.
        return 4 if lines == 3 and columns == 10 and self.lines % 4 == 0 else lines

    def for_merge(self) -> "Config":
        """Returns the config for merging a strip's blocks.

        One warpgroup takes the blocks as its pixels and reads the result of each.
        """
        line = _line(self.blocks, self.lanes)
        return dataclasses.replace(
            self,
            pixels=self.blocks,
            line=line,
            warps=min(WARPS, line),
            warpgroups=1,
            blocks=1,
        )

    def shared(self, kept: Sequence[int]) -> int:
        """Returns the bytes of shared memory that a block takes.

        Args:
          kept: bytes per element of each array that is kept.
        """
        pixels = self.warpgroups * self.lines * self.line
        arrays = [4 * self.places * self.warpgroups * WARPS * self.pitch]
        arrays += [4 * 2 * VALUES * self.width] * (self.group > 1)
        arrays += [
            pixels * self.lanes * chunk.vector * size
            for size in kept
            for chunk in self.chunks
        ]
        barriers = 8 * (1 + self.clustered)
        return sum(pl.cdiv(nbytes, KB) * KB for nbytes in arrays) + barriers

    @property
    def pitch(self) -> int:
        """Padded width of a strip in shared memory.

        Mosaic requires whole chunks, so this is a multiple of the widest one.
        """
        chunk = self.lanes * max(chunk.vector for chunk in self.chunks)
        return pl.cdiv(self.width, chunk) * chunk

    def first(self, worker: Any) -> Any:
        """Returns the worker's first pixel. The last worker ends with the sample."""
        each, remainder = divmod(self.pixels, self.workers)
        if not remainder:
            return worker * each
        minimum = min if isinstance(worker, int) else jnp.minimum
        return worker * each + minimum(worker, remainder)

    def count(self, block: Any) -> Any:
        """Returns the number of pixels of a block."""
        first = block * self.warpgroups
        return self.first(first + self.warpgroups) - self.first(first)

    def __str__(self) -> str:
        pixels = pl.cdiv(self.pixels, self.blocks)
        of = "" if self.blocks == 1 else f" of {self.pixels}"
        return f"{self.width} channels of {pixels}{of} pixels"


def resident(
    view: Geometry,
    itemsize: int,
    kept: Sequence[int],
    shared: int,
    *,
    cluster: int,
    one_sample: bool,
    load: int,
) -> Config | None:
    """Cuts a sample into strips that stay in a cluster's shared memory, if they fit.

    Times on an H200, in microseconds for 160 MB of x. A copy takes 76, and moving three
    tensors takes 111.

      Size of a strip's blocks:
        16 x 16 x 1280, float32, backward: one block of 80 KB with 2 warpgroups 138, two
          of 40 KB 154, four of 20 KB 183.
        32 x 32 x 640, bfloat16: two of 80 KB 142, four of 40 KB 154, eight of 20 KB
          215.
        8 x 8 x 1280, bfloat16: blocks of 20 KB 131, of 10 KB 206.
      Bytes per pixel of a strip, in float32:
        64 x 64 x 512: 128 bytes 104, 64 bytes 117.
        64 x 64 x 320: 160 bytes 114, 80 bytes 155, two reads 118.
      Two reads instead:
        Forward: 152 for 32 x 32 x 640, 134 for 16 x 16 x 1280.
        Backward: 192 for 64 x 64 x 320 (clusters of 8: 210), 214 for 32 x 32 x 640
          (clusters of 2: 216, of 4: 219 to 281), 198 for 16 x 16 x 1280.

    Args:
      view: sizes of x[N, S, G, K].
      itemsize: bytes per element of the widest array that is loaded or stored.
      kept: bytes per element of each array that is kept.
      shared: bytes of shared memory that a block may have.
      cluster: most blocks that may share a strip.
      one_sample: whether there is one sample whatever the batch. Its blocks then have
        the GPU to themselves, so the cut prefers many blocks to large ones.
      load: most bytes that a lane may load at once.
    """
    # At least two blocks fit an SM, so that one loads while the other accumulates or
    # stores. An SM has 1 KB more than a block may have, and CUDA takes 1 KB per block.
    limit = (shared - KB) // 2
    large = (32 if one_sample else 96) * KB
    pixel = sum(kept)  # bytes of a channel
    configs = []
    for width in _multiples(view.k, view.g):
        strip = width * view.s * pixel
        if strip > cluster * limit:
            break
        blocks = min(pl.next_power_of_2(pl.cdiv(strip, large)), cluster)
        while blocks <= cluster:
            warpgroups = min(pl.cdiv(strip // blocks, 64 * KB), MAX_WARPGROUPS)
            config = _config(
                view, width, itemsize, warpgroups, blocks, resident=True, load=load
            )
            if config.shared(kept) <= limit and len(config.chunks) <= MAX_CHUNKS:
                configs.append(config)
                break
            blocks *= 2

    if one_sample:
        # Half a line of the L1 cache per pixel; one sector if that makes more blocks.
        small = [c for c in configs if c.width * view.s * pixel <= c.blocks * large]
        best = (_narrowest(configs, 2, itemsize), _narrowest(small, 1, itemsize))
        return max(
            filter(None, best),
            key=lambda c: (min(c.strips * c.blocks, ENOUGH), c.blocks == 1),
            default=None,
        )
    # One warpgroup works through a strip's groups, up to four at a time, so a strip of
    # more than two sectors may have only a few groups.
    few_groups = [
        c
        for c in configs
        if c.group == 1 or c.width <= 8 * c.group or c.width * itemsize <= 2 * SECTOR
    ]
    wide = [c for c in few_groups if c.width * view.s * itemsize >= 20 * KB]
    wide = wide or few_groups[-1:]
    return _narrowest(wide, 4, itemsize) or _narrowest(wide, 2, itemsize)


def _narrowest(configs: Sequence[Config], sectors: int, itemsize: int) -> Config | None:
    """Returns the narrowest config with at least `sectors` sectors per pixel, if any.

    Whole sectors are preferred.
    """
    wide = [c for c in configs if c.width * itemsize >= sectors * SECTOR]
    wide = wide or [c for c in configs if c.strips == 1]
    whole = [c for c in wide if c.width * itemsize % SECTOR == 0]
    return next(iter(whole or wide), None)


def in_two_reads(
    view: Geometry, itemsize: int, shared: int, *, arrays: int, load: int
) -> tuple[Config, Config] | None:
    """Cuts a sample whose pixels are read twice, and the results of its blocks.

    The second config is for the kernel that combines these results.

    Args:
      view: sizes of x[N, S, G, K].
      itemsize: bytes per element of the widest array that is loaded.
      shared: bytes of shared memory that a block may have.
      arrays: number of arrays that are loaded.
      load: most bytes that a lane may load at once.
    """
    # 128 bytes per pixel, or the nearest width that divides the channels.
    widths = [
        width
        for width in _multiples(1, view.features)
        if width * itemsize >= SECTOR or width == view.features
    ]
    width = min(
        widths, key=lambda width: (abs(math.log2(width * itemsize / 128)), width)
    )
    # A block has at least 512 pixels, so that its sums are below 1 % of what it reads.
    # If one sample can fill the GPU, there are at most 12 blocks for each of 132 SMs:
    # whether 2, 3 or 4 of them are resident, the last wave is full. A block may have as
    # few as 256 pixels if that gives each SM one.
    strips = view.features // width
    full_blocks = min(view.s // 512, 12 * 132 // strips)
    blocks = max(full_blocks, min(view.s // 256, ENOUGH // strips), 1)
    # Each warpgroup has 16 KB or more of loads in flight. For x alone in 16 bits, one
    # warpgroup per block keeps as much in flight and has half as much to reduce: it
    # takes 45 to 48 us for 160 MB on an H200, two take 52.
    warpgroups = 1 if arrays * itemsize == 2 else MAX_WARPGROUPS
    config = _config(
        view, width, itemsize, warpgroups, blocks, resident=False, load=load
    )
    whole_groups = (width for width in _multiples(view.k, view.g) if width >= 32)
    combine_config = _config(
        dataclasses.replace(view, s=blocks),
        width=next(whole_groups, view.features),
        itemsize=4,
        warpgroups=4 if blocks > 64 else 1,
        blocks=1,
        resident=True,
        load=16,
    )
    both = (config, combine_config)
    fit = all(c.shared(()) <= shared and len(c.chunks) <= MAX_CHUNKS for c in both)
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
    """Builds a config, with fewer warpgroups and blocks if the pixels are too few."""
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
    """Returns the columns per lane, few enough to occupy at least two lanes.

    jax 0.11 cannot store an array that is replicated over all lanes of all warps.
    """
    return min(math.gcd(columns, widest), max(columns // 2, 1))


def _line(pixels: int, lanes: int) -> int:
    """Returns the pixels of a line, if a warpgroup has `pixels` pixels or one more."""
    return min(WARPS * LANES // lanes, power_of_two(pixels))


def _multiples(of: int, count: int) -> Iterator[int]:
    """Yields the strip widths that divide `count` groups of `of` channels evenly."""
    return (of * m for m in range(1, count + 1) if count % m == 0)


# --- values of a strip's channels -----------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Columns:
    """One array for each chunk of a strip. Arithmetic goes chunk by chunk.

    An array holds a line, (warps, pixels per warp, columns), or one value per channel,
    (columns,), or (groups, columns). Values per channel are broadcast over the pixels
    of a line. An operand that is no `Columns` has one value per group, or is a scalar.
    """

    def __init__(self, arrays: Sequence[Any], layouts: Sequence[Any]):
        self.arrays = tuple(arrays)
        self.layouts = tuple(layouts)  # layouts of a line, one per chunk

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.arrays, self.layouts

    @classmethod
    def tree_unflatten(cls, layouts: Any, arrays: Any) -> "Columns":
        return cls(arrays, layouts)

    def map(self, function: Callable[..., Any], *others: "Columns") -> "Columns":
        arrays = zip(self.arrays, *(other.arrays for other in others), strict=True)
        return Columns(list(itertools.starmap(function, arrays)), self.layouts)

    def float32(self) -> "Columns":
        return self.map(lambda array: array.astype(jnp.float32))

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> "Columns":
        others = (
            other.arrays if isinstance(other, Columns) else [other] * len(self.arrays)
        )
        axis = -1 if isinstance(other, Columns) else 0
        arrays = [
            operation(*_broadcast_together(a, b, axis, layout))
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
    """Returns the sum of the values, added in their order."""
    return functools.reduce(operator.add, values)


def _broadcast_together(a: Any, b: Any, axis: int, layout: Any) -> tuple[Any, Any]:
    """Broadcasts the smaller array to the larger one's shape; leaves scalars alone.

    `axis` is the axis of the larger one that the smaller one has.
    """
    ndim_a, ndim_b = jnp.ndim(a), jnp.ndim(b)
    if ndim_a == ndim_b or not ndim_a or not ndim_b:
        return a, b
    small, large = (a, b) if ndim_a < ndim_b else (b, a)
    spread = lax.broadcast_in_dim(small, large.shape, (axis % large.ndim,))
    spread = plgpu.layout_cast(spread, layout)
    return (spread, b) if ndim_a < ndim_b else (a, spread)


# --- inside a kernel ------------------------------------------------------------------


def scratch_types(config: Config, kept: dict[str, Any]) -> dict[str, Any]:
    """Returns the shared memory and the barriers of a block, which `Part` uses.

    Args:
      config: how a sample is cut.
      kept: dtypes of the arrays that `Part.keep` keeps, by name.
    """
    warps = config.warpgroups * WARPS
    types: dict[str, Any] = {
        "sums": plgpu.SMEM((config.places, warps, config.pitch), jnp.float32),
        "in_block": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    if config.group > 1:
        types["groups"] = plgpu.SMEM((2 * VALUES, config.width), jnp.float32)
    if config.clustered:
        types["in_cluster"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=config.warpgroups
        )
    for name, dtype in kept.items():
        for i, chunk in enumerate(config.chunks):
            columns = config.lanes * chunk.vector
            shape = (config.warpgroups, config.lines, *config.line_shape, columns)
            types[f"{name}_{i}"] = plgpu.SMEM(shape, dtype)
    return types


class Part:
    """One warpgroup's pixels of one strip of one sample.

    Attributes:
      config: how the sample is cut.
      sample, strip, block: indices of the sample, the strip and the block.
      samples: number of samples.
      warpgroup: index of the warpgroup in its block; a Python 0 if it is the only one.
      pixels: number of pixels of the block.
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
        # First one and number of the warpgroup's pixels.
        self._first = config.first(worker)
        self._count = config.first(worker + 1) - self._first
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
        """Number of lines that are whole for every warpgroup."""
        return self.config.pixels // self.config.workers // self.config.line

    def index(self, line: int) -> Columns:
        """Returns the number of each pixel of a line in the sample."""
        first = self._first + self._start(line)
        return self._positions_in_line().map(lambda place: first + place)

    def load(self, ref: Any, line: Any, *which: Any) -> Columns:
        """Loads a line of ref[sample, pixels, *which, channels], in ref's dtype."""
        first = self._first + self._start(line)
        at = (self.sample, pl.ds(first, self.config.line), *which)
        arrays = [
            memory.load_as(ref, (*at, columns), shape, layout)
            for columns, shape, layout in zip(
                self._columns(), self._shapes, self._layouts, strict=True
            )
        ]
        return Columns(arrays, self._layouts)

    def store(self, ref: Any, line: Any, value: Columns) -> None:
        """Stores a line to ref[sample, pixels, channels]."""
        first = self._first + self._start(line)
        at = (self.sample, pl.ds(first, self.config.line))
        for columns, array in zip(self._columns(), value.arrays, strict=True):
            memory.store_as(ref, (*at, columns), array)

    def over_lines[T](
        self,
        step: Callable[[Sequence[Any], T], T],
        start: T,
        last: Callable[[Sequence[int], T], T] | None = None,
    ) -> T:
        """Runs step(lines, carry) over all lines, `config.lines_at_once` at a time.

        Whole lines run in a loop, as long as they fill a step. One more step takes the
        lines that remain, if any.

        Args:
          step: takes the lines and the carry, and returns the next carry.
          start: initial carry.
          last: replacement of `step` for the step after the loop.
        """
        at_once = self.config.lines_at_once
        steps = self.whole_lines // at_once

        def in_loop(i: Any, carry: T) -> T:
            return step([i * at_once + j for j in range(at_once)], carry)

        carry = lax.fori_loop(0, steps, in_loop, start)
        # Whole lines too few for a step, and at most one ragged line.
        rest = range(steps * at_once, self.config.lines)
        return (last or step)(rest, carry) if rest else carry

    def keep(self, name: str, line: Any, value: Columns) -> None:
        """Keeps a line unchanged in shared memory. Each lane reads what it wrote."""
        at = (self.warpgroup, line)
        for i, array in enumerate(value.arrays):
            memory.store(self._scratch[f"{name}_{i}"], at, array)

    def kept(self, name: str, line: Any) -> Columns:
        """Returns a line that `keep` stored, in float32."""
        at = (self.warpgroup, line)
        arrays = [
            memory.load(self._scratch[f"{name}_{i}"], at, layout)
            for i, layout in enumerate(self._layouts)
        ]
        return Columns(arrays, self._layouts)

    def zero_repeats(self, line: Any, value: Columns) -> Columns:
        """Zeroes the pixels of a ragged line that the line before it also has."""
        if self._is_whole(line):
            return value
        masked = [
            jnp.where(is_new, array, 0.0)
            for is_new, array in zip(self._new(line).arrays, value.arrays, strict=True)
        ]
        return Columns(masked, self._layouts)

    def counted(self, line: Any) -> Any:
        """Returns 1 for pixels of the line that no line before it has, else 0."""
        if self._is_whole(line):
            return 1.0
        return self._new(line).map(lambda is_new: jnp.where(is_new, 1.0, 0.0))

    def _is_whole(self, line: Any) -> bool:
        """Returns whether the line is whole for every warpgroup; in a loop, all are."""
        return not isinstance(line, int) or line < self.whole_lines

    def _start(self, line: Any) -> Any:
        """Returns the line's first pixel, relative to the warpgroup's."""
        if self._is_whole(line):
            return line * self.config.line
        return jnp.minimum(line * self.config.line, self._count - self.config.line)

    def _new(self, line: int) -> Columns:
        """Returns the mask of a ragged line's pixels that no line before it has."""
        repeated = line * self.config.line - self._start(line)
        return self._positions_in_line().map(lambda place: place >= repeated)

    def _positions_in_line(self) -> Columns:
        """Returns the number of each pixel in its line."""
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
        """Returns a line of zeros."""
        arrays = [
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            for shape, layout in zip(self._shapes, self._layouts, strict=True)
        ]
        return Columns(arrays, self._layouts)

    # Channels.

    def _columns(self) -> list[pl.Slice]:
        """Returns the strip's chunks as slices of the sample's channels."""
        first = self.strip * self.config.width
        return [pl.ds(first + here.start, here.size) for here in self._columns_here]

    def load_channels(self, ref: Any, *at: Any) -> Columns:
        """Loads ref[*at, channels of the strip] in float32."""
        return self._load_channels(ref, at, self._columns())

    def _load_here(self, scratch: Any, *at: Any) -> Columns:
        """Loads scratch[*at], which has only the channels of this strip."""
        return self._load_channels(scratch, at, self._columns_here)

    def _load_channels(
        self, ref: Any, at: Sequence[Any], columns: Sequence[pl.Slice]
    ) -> Columns:
        arrays = [
            memory.load(ref, (*at, chunk), layout)
            for chunk, layout in zip(columns, self._channel_layouts, strict=True)
        ]
        return Columns(arrays, self._layouts)

    def store_channels(self, ref: Any, value: Columns, *at: Any) -> None:
        """Stores value to ref[*at, channels of the strip], by one warpgroup."""

        @self.one_warpgroup
        def _() -> None:
            for columns, array in zip(self._columns(), value.arrays, strict=True):
                memory.store(ref, (*at, columns), array)

    def one_warpgroup(self, do: Callable[[], None]) -> None:
        """Runs `do` in the block's first warpgroup only."""
        if isinstance(self.warpgroup, int):
            do()
        else:
            pl.when(self.warpgroup == 0)(do)

    def one_block(self, do: Callable[[], None]) -> None:
        """Runs `do` in the first block of a cluster; without one, in every block."""
        if self.config.clustered:
            pl.when(self.block == 0)(do)
        else:
            do()

    # Sums.

    def sum_pixels(self, *terms: Columns) -> list["Sums"]:
        """Reduces lines over all pixels of the block, channel by channel.

        Each warp reduces its own pixels by shuffles and leaves its sums in shared
        memory, where `total` sums them.
        """
        sums = self._scratch["sums"]  # (places, warps of the block, channels)
        warps = self.config.warps
        first_warp = self.warpgroup * warps  # of this warpgroup
        first_place, self._places = self._places, self._places + len(terms)
        for place, term in enumerate(terms, first_place):
            for columns, array in zip(self._columns_here, term.arrays, strict=True):
                at = (place, pl.ds(first_warp, warps), columns)
                if array.ndim == 3:
                    array = memory.sum_lanes(array, 1)
                memory.store(sums, at, array)
        self.block_barrier()
        # A part that merges blocks (`for_merge`) has one warpgroup: each warpgroup of
        # the block has read all of the cluster's blocks for itself.
        first = 0 if self.config.warpgroups > 1 else first_warp
        count = self.config.warpgroups * warps
        return [Sums(place, first, count) for place in range(first_place, self._places)]

    def total(self, sums: "Sums") -> Columns:
        """Returns the total of the warps' sums, channel by channel."""
        of_warp = functools.partial(self._load_here, self._scratch["sums"], sums.place)
        return lax.fori_loop(
            1,
            sums.count,
            lambda i, total: total + of_warp(sums.first + i),
            of_warp(sums.first),
        )

    def block_barrier(self) -> None:
        """Waits for all warpgroups of the block."""
        plgpu.barrier_arrive(self._scratch["in_block"])
        plgpu.barrier_wait(self._scratch["in_block"])

    def exchange(self, values: Sequence[Columns], partials: Any) -> "Part":
        """Exchanges values per channel with the other blocks of the cluster.

        They meet in `partials`, (samples, blocks, values, channels).

        Returns:
          A part that reads `partials`. Its pixels are the blocks of this strip, and
          each warpgroup reads all of them.
        """
        for i, value in enumerate(values):
            self.store_channels(partials, value, self.sample, self.block, i)
        # Each warp stores all values, so it does not matter which one tells a block.
        self.one_warpgroup(memory.fence)
        plgpu.barrier_arrive(self._scratch["in_cluster"])
        plgpu.barrier_wait(self._scratch["in_cluster"])
        memory.fence()
        part = Part(
            self.config.for_merge(),
            self.sample,
            self.strip,
            0,
            self.warpgroup,
            self._scratch,
            self.samples,
        )
        part._places = self._places  # the earlier places are in use
        return part

    # Groups.

    def by_group(
        self, formula: Callable[..., Sequence[Any]], *terms: Columns, results: int
    ) -> list[Columns]:
        """Returns formula(groups, *terms), broadcast over the channels of each group.

        Args:
          formula: function that takes values per channel and returns values per group;
            `groups` is an `EachChannel` or `Groups`.
          terms: up to two values per channel. A second call must have at least one: its
            barrier waits for the warpgroups that still read the first call's results.
          results: number of values that the formula returns, up to two.
        """
        if self.config.group == 1:
            return list(formula(EachChannel(self), *terms))
        scratch = self._scratch["groups"]  # (places, channels of the strip)
        terms_at, results_at = 0, VALUES  # first places

        @self.one_warpgroup
        def _() -> None:
            for place, term in enumerate(terms, terms_at):
                for columns, array in zip(self._columns_here, term.arrays, strict=True):
                    memory.store(scratch, (place, columns), array)

        if terms:
            self.block_barrier()

        @self.one_warpgroup
        def _() -> None:
            in_strip = self.config.width // self.config.group
            at_once = math.gcd(in_strip, WARPS)
            for first in range(0, in_strip, at_once):
                groups = Groups(self, first, at_once)
                values = formula(groups, *groups.terms(scratch, terms_at, len(terms)))
                groups.spread(scratch, results_at, values)

        self.block_barrier()
        return [self._load_here(scratch, results_at + i) for i in range(results)]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Place in shared memory where a warpgroup finds the sums of the warps.

    Attributes:
      place: index of the sum.
      first, count: first warp, and number of warps.
    """

    place: int
    first: Any
    count: int


class EachChannel:
    """Groups of one channel each: a value of the group is a value of its channel."""

    def __init__(self, part: Part):
        self._part = part

    def sum(self, term: Columns) -> Columns:
        """Returns the sum over the channels of each group: the term itself."""
        return term

    def load(self, ref: Any) -> Columns:
        """Loads the sample's values from ref (samples, groups)."""
        return self._part.load_channels(ref, self._part.sample)

    def store(self, ref: Any, value: Columns) -> None:
        """Stores the sample's values to ref (samples, groups), by one block."""
        self._part.one_block(
            lambda: self._part.store_channels(ref, value, self._part.sample)
        )


class Groups:
    """One group of the strip, or several: one per warp of a warpgroup.

    A value of one group is a scalar, and its channels are (columns,). Values of several
    groups are (groups,), and their channels (groups, columns).
    """

    def __init__(self, part: Part, first: int, count: int):
        config = part.config
        groups_per_strip = config.width // config.group
        self._part = part
        self._shape = (count,) if count > 1 else ()
        number = part.strip * groups_per_strip + first
        self._numbers = pl.ds(number, count) if count > 1 else number
        self._channels = pl.ds(first * config.group, count * config.group)
        vector = _vector(config.group, 4)
        lanes = min(LANES, power_of_two(config.group // vector))
        self._chunks = memory.cut(config.group, lanes, vector)
        self._columns: list[tuple[Any, ...]] = [
            (*map(slice, self._shape), pl.ds(chunk.start, lanes * chunk.vector))
            for chunk in self._chunks
        ]
        self._layouts = [
            _layout(lanes, chunk.vector, *self._shape) for chunk in self._chunks
        ]

    def terms(self, scratch: Any, first: int, count: int) -> list[Columns]:
        """Loads scratch[place, channels of the groups] for `count` places."""
        shape = (*self._shape, self._part.config.group)
        terms = []
        for place in range(first, first + count):
            at = (place, self._channels)
            arrays = [
                memory.load_as(scratch, at, shape, layout, columns)
                for columns, layout in zip(self._columns, self._layouts, strict=True)
            ]
            terms.append(Columns(arrays, self._layouts))
        return terms

    def spread(self, scratch: Any, first: int, values: Sequence[jax.Array]) -> None:
        """Broadcasts values to scratch[place, channels of the groups]."""
        shape = (*self._shape, self._part.config.group)
        for place, value in enumerate(values, first):
            for columns, layout in zip(self._columns, self._layouts, strict=True):
                whole = (*self._shape, columns[-1].size)
                spread = lax.broadcast_in_dim(value, whole, range(len(self._shape)))
                spread = plgpu.layout_cast(spread, layout)
                at = (place, self._channels)
                memory.store_as(scratch, at, spread, shape, columns)

    def sum(self, term: Columns) -> jax.Array:
        """Returns the sum over the channels of each group."""
        last = len(self._shape)
        sums = []
        for chunk, array, layout in zip(
            self._chunks, term.arrays, self._layouts, strict=True
        ):
            if chunk.seen:
                column = plgpu.broadcasted_iota(
                    jnp.int32, array.shape, last, layout=layout
                )
                array = jnp.where(column >= chunk.seen, array, 0.0)
            sums.append(memory.sum_lanes(array, last))
        return add(sums)

    def load(self, ref: Any) -> jax.Array:
        """Loads the groups' values from ref (samples, groups)."""
        at = (self._part.sample, self._numbers)
        if not self._shape:
            return ref[at]
        return memory.load(ref, at, self._layouts[0].reduce((1,)))

    def store(self, ref: Any, value: jax.Array) -> None:
        """Stores the groups' values to ref (samples, groups), by one block."""
        at = (self._part.sample, self._numbers)
        self._part.one_block(lambda: memory.store(ref, at, value))


def _layout(lanes: int, vector: int, *pixels: int) -> Any:
    """Returns the layout over a warpgroup of (*pixels, columns).

    `pixels` is (), (warps,) or (warps, pixels per warp). If there are fewer pixels than
    warps and lanes have room for, several of them hold the same values.

    Lanes are tiled in pairs. Otherwise Mosaic moves values of 4 bytes, of 8 times 4
    lanes, by `ldmatrix` and `stmatrix`, which require the 16 bytes of every 4 lanes to
    be aligned. In groups of 10 channels they are not.
    """
    warps, in_warp = (*pixels, 1, 1)[:2]
    tiles = [(*pixels, lanes * vector)]
    pairs = lanes % 4 == 0
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
