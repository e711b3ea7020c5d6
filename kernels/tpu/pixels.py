"""How a TPU's channelwise kernels cut an array into blocks, chunks and places.

XLA splits the last two axes of an array in memory into tiles of 8 sublanes times 128
lanes (`blocks.order_of_axes`). The channels are one of the two axes, and some of a
sample's pixels are the other:

    AcrossLanes     x[examples, samples, slabs, rows, channels]  1280 channels
    DownSublanes    x[examples, samples, slabs, channels, rows]  256 rows of 32 channels

A sample has slabs * rows pixels. Each of the two layouts is a class. Both classes have
the same methods, so that channelwise.py writes each kernel once.

* A *unit* is one strip of channels of one sample, or of several small samples.
* A *block* is what Pallas brings into VMEM for one step: some pixels of a unit.
* A *chunk* is the part of a block that registers hold at a time: [slabs, tiles,
  *places]. The *places* are the sublanes and lanes of one register, or of several
  adjacent registers for more channels.

Sums run over slabs and tiles, so they add whole registers, place by place. When a unit
is complete, each channel's places, its sublanes (or lanes), are reduced, and then the
channels of each group.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

# Chunks per loop iteration: one is computed while another waits for its results.
# Cycles relative to those of the HBM traffic, compiled, for GroupNorm of 16384 pixels
# of 512 channels, bfloat16, forward, with 1, 2, 4 and 8 chunks: 7x 1.71, 1.53, 1.47,
# 1.46; v6e 0.97, 0.91, 0.87, 0.82. A v5e takes 0.47 with 4 and 0.54 with 8 because
# registers spill.
AT_ONCE = 4

Block = tuple[Any, Any]  # indices of a block, along the slabs and along the rows
ChunkStep = Callable[[Sequence[Any], int, Any], Any]  # see `Cut.over_chunks`
StepMap = Callable[..., tuple[Any, ...]]  # from (core, turn, *block), a grid step


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sizes of units, blocks and chunks, with the methods that both layouts share.

    Attributes:
      cores: cores that share the units; each takes a run of consecutive units.
      examples: parts of the array with a dscale and dbias of their own.
      samples: samples per example.
      slabs, rows: a sample has slabs * rows pixels.
      channels: channels per pixel.
      group: channels per group.
      strip: channels per unit: all, or whole groups that fill whole tiles.
      unit: samples per unit.
      block_slabs, block_rows: slabs and rows of each sample in VMEM at a time.
      chunk_slabs, chunk_rows, chunk_channels: slabs, rows and channels of one sample in
        registers at a time; chunk_slabs divides block_slabs and slabs.
    """

    cores: int
    examples: int
    samples: int
    slabs: int
    rows: int
    channels: int
    group: int
    strip: int
    unit: int
    block_slabs: int
    block_rows: int
    chunk_slabs: int
    chunk_rows: int
    chunk_channels: int

    # --- units and blocks ---

    @property
    def pixels(self) -> int:
        """Pixels of a sample."""
        return self.slabs * self.rows

    @property
    def strips(self) -> int:
        return self.channels // self.strip

    @property
    def sets(self) -> int:
        """Units of one strip of one example."""
        return pl.cdiv(self.samples, self.unit)

    @property
    def units(self) -> int:
        return self.examples * self.strips * self.sets

    def shared_by(self, cores: int) -> Self:
        """Returns the cut for `cores` cores, or itself if one would get no unit."""
        shared = dataclasses.replace(self, cores=cores)
        of_others = (cores - 1) * shared.units_of_core
        return shared if of_others < self.units else self

    @property
    def units_of_core(self) -> int:
        """Units per core; the last core may have fewer."""
        return pl.cdiv(self.units, self.cores)

    @property
    def is_even(self) -> bool:
        """Whether all cores have the same number of units."""
        return self.units % self.cores == 0

    def units_in(self, core: Any) -> Any:
        if self.is_even:
            return self.units_of_core
        left = self.units - core * self.units_of_core
        return jnp.minimum(left, self.units_of_core)

    @property
    def visited(self) -> np.ndarray:
        """Which cores have units of which strips: bool [cores, examples, strips]."""
        unit = np.arange(self.units)
        visited = np.zeros((self.cores, self.examples * self.strips), bool)
        visited[unit // self.units_of_core, unit // self.sets] = True
        return visited.reshape(self.cores, self.examples, self.strips)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a unit, along its slabs and along its rows."""
        slab_blocks = pl.cdiv(self.slabs, self.block_slabs)
        return slab_blocks, pl.cdiv(self.rows, self.block_rows)

    @property
    def blocks(self) -> int:
        """Number of blocks of a unit."""
        return math.prod(self.grid)

    def block_index(self, block: Block) -> Any:
        """Returns a block's index in its unit."""
        return block[0] * self.grid[1] + block[1]

    def position_of(self, unit: Any) -> tuple[Any, Any, Any]:
        """Returns a unit's example, strip and set.

        The set varies fastest, so that units that share a dscale are consecutive.
        """
        strip, set_index = _divide(unit, self.sets)
        return *_divide(strip, self.strips), set_index

    def samples_in(self, unit: Any) -> Any:
        """Returns the samples of a unit; the last unit of a strip may have fewer."""
        if self.samples % self.unit == 0:
            return self.unit
        _, _, set_index = self.position_of(unit)
        return jnp.minimum(self.samples - set_index * self.unit, self.unit)

    def is_first(self, unit: Any) -> Any:
        """Returns whether a unit is its core's first one of its example and strip."""
        _, _, set_index = self.position_of(unit)
        if self.cores == 1:
            return set_index == 0
        return (set_index == 0) | (lax.rem(unit, self.units_of_core) == 0)

    # Block specs. `unit_and_block` maps a grid step to (unit, *block), its work.

    def view_spec(self, unit_and_block: StepMap) -> pl.BlockSpec:
        """Returns the block spec of arrays of the view."""

        def index(*step: Any) -> tuple[Any, ...]:
            unit, slab, row = unit_and_block(*step)
            example, strip, set_index = self.position_of(unit)
            return example, set_index, *self.in_order(slab, row, strip)

        return pl.BlockSpec((None, self.unit, *self.block), index)

    def param_spec(self, unit_and_block: StepMap) -> pl.BlockSpec:
        """Returns the block spec of scale and bias, [1, channels]."""

        def index(*step: Any) -> tuple[Any, ...]:
            _, strip, _ = self.position_of(unit_and_block(*step)[0])
            return 0, strip

        return pl.BlockSpec((1, self.lanes), index)

    def gradient_spec(self, unit_and_block: StepMap) -> pl.BlockSpec:
        """Returns the block spec of dscale, dbias: [cores, examples, 1, channels]."""

        def index(core: Any, *step: Any) -> tuple[Any, ...]:
            example, strip, _ = self.position_of(unit_and_block(core, *step)[0])
            return core, example, 0, strip

        return pl.BlockSpec((None, None, 1, self.lanes), index)

    def statistic_spec(self, unit_and_block: StepMap) -> pl.BlockSpec:
        """Returns the block spec of statistics, [examples * sets, unit, channels]."""

        def index(*step: Any) -> tuple[Any, ...]:
            example, strip, set_index = self.position_of(unit_and_block(*step)[0])
            return example * self.sets + set_index, 0, strip

        return pl.BlockSpec((None, self.unit, self.lanes), index)

    @property
    def lanes(self) -> int:
        """A strip's channels, rounded up to whole LANES; the excess is garbage."""
        return round_up(self.strip, LANES)

    def __str__(self) -> str:
        samples = "" if self.unit == 1 else f"{self.unit} samples of "
        pixels = min(self.block_slabs, self.slabs) * min(self.block_rows, self.rows)
        of = "" if pixels == self.pixels else f" of {self.pixels}"
        return f"{samples}{self.strip} channels of {pixels}{of} pixels"

    # --- loops ---

    def over_tiles(self, unit: Any, step: Callable[[Any, Any], None]) -> None:
        """Runs step(sample, tile) for a unit's samples and the tiles of its strip."""
        *_, tiles_at_once, samples_at_once = self.at_once

        def over_samples(samples: Sequence[Any], _: None) -> None:
            def over_tiles(tiles: Sequence[Any], _: None) -> None:
                for sample, tile in itertools.product(samples, tiles):
                    step(sample, tile)

            _loop(self.tiles, tiles_at_once, over_tiles, None)

        _loop(self.samples_in(unit), samples_at_once, over_samples, None)

    def over_chunks(self, block: Block, step: ChunkStep, carry: Any) -> Any:
        """Runs carry = step([(slab, row), ...], rows, carry) over the block's chunks.

        Each call of `step` takes several chunks. `rows` is the number of rows of each,
        which is smaller for the last chunk of the array's rows.
        """
        slab_block, row_block = block
        slabs: Any = self.block_slabs // self.chunk_slabs
        if self.slabs % self.block_slabs:
            in_last = self.slabs % self.block_slabs // self.chunk_slabs
            slabs = jnp.where(slab_block == self.grid[0] - 1, in_last, slabs)
        is_last = row_block == self.grid[1] - 1
        over_rows = functools.partial(self._over_rows, is_last, step)
        _, slabs_at_once, *_ = self.at_once
        return _loop(slabs, slabs_at_once, over_rows, carry)

    def _over_rows(
        self, is_last: Any, step: ChunkStep, slabs: Sequence[Any], carry: Any
    ) -> Any:
        """Runs `over_chunks` in some slabs of a block.

        The last block along the rows may have fewer chunks, and the array's last chunk
        fewer rows.
        """
        full = self.block_rows // self.chunk_rows
        in_last = (self.rows - (self.grid[1] - 1) * self.block_rows) // self.chunk_rows
        tail = self.rows % self.chunk_rows
        rows_at_once, *_ = self.at_once

        def full_chunks(rows: Sequence[Any], carry: Any) -> Any:
            chunks = [(slab, row) for slab in slabs for row in rows]
            return step(chunks, self.chunk_rows, carry)

        def full_block(carry: Any) -> Any:
            return _loop(full, rows_at_once, full_chunks, carry)

        def last_block(carry: Any) -> Any:
            carry = _loop(in_last, rows_at_once, full_chunks, carry)
            if tail:
                carry = step([(slab, in_last) for slab in slabs], tail, carry)
            return carry

        if self.grid[1] == 1:
            return last_block(carry)
        if in_last == full:
            return full_block(carry)
        return lax.cond(is_last, last_block, full_block, carry)

    @property
    def at_once(self) -> list[int]:
        """Chunks per loop iteration, along each of rows, slabs, tiles and samples."""
        left, counts = AT_ONCE, []
        for chunks in (
            pl.cdiv(min(self.rows, self.block_rows), self.chunk_rows),
            min(self.slabs, self.block_slabs) // self.chunk_slabs,
            self.tiles,
            self.unit,
        ):
            counts.append(min(chunks, left))
            left //= counts[-1]
        return counts

    # --- chunks ---

    def add_registers(self, chunk: jax.Array, rows: int) -> jax.Array:
        """Sums the pixels of a chunk: [slabs, tiles, *places] -> [*places].

        Only the first `rows` rows of the chunk are pixels. The sum runs over pairs,
        pairs of pairs, and so on, because an addition waits for the one it depends on.
        """
        full, tail = divmod(rows, chunk.shape[self.pixel_axis])
        parts = []
        if full:
            parts = [chunk[:, :full].reshape(-1, *chunk.shape[2:])]
        if tail:
            parts += [jnp.where(self.first_places(tail), chunk[:, full], 0)]
        registers = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)
        while (count := registers.shape[0]) > 1:
            half = count // 2
            pairs = registers[:half] + registers[half : 2 * half]
            if count % 2:
                pairs = jnp.concatenate([pairs, registers[2 * half :]], 0)
            registers = pairs
        return registers[0]

    def count_pixels(self, rows: int) -> jax.Array:
        """Counts the pixels at each place of a chunk with `rows` rows: [*places]."""
        shape = self.chunk_shape
        full, tail = divmod(rows, shape[self.pixel_axis])
        count = jnp.full(shape[2:], self.chunk_slabs * full, jnp.float32)
        if tail:
            count = jnp.where(self.first_places(tail), count + self.chunk_slabs, count)
        return count

    def first_places(self, count: Any) -> jax.Array:
        """Returns a mask, bool [*places], of the places of the first `count` pixels."""
        axis = self.pixel_axis - 2
        return lax.broadcasted_iota(jnp.int32, self.chunk_shape[2:], axis) < count

    def sum_groups(self, value: jax.Array) -> jax.Array:
        """Gives each channel the sum of its group."""
        return sum_groups(value, self.strip, self.group)

    def merge_groups(self, mean: jax.Array, m2: jax.Array) -> tuple[Any, Any]:
        """Gives each channel its group's mean, and sum of squares about that mean."""
        return merge_groups(mean, m2, self.pixels, self.strip, self.group)

    # --- shapes and indices in memory order ---

    @property
    def view(self) -> tuple[int, ...]:
        """Shape of x, y, dy and dx."""
        of_sample = self.in_order(self.slabs, self.rows, self.channels)
        return self.examples, self.samples, *of_sample

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of a block of one sample in VMEM."""
        return self.in_order(self.block_slabs, self.block_rows, self.padded)

    def chunk_index(self, sample: Any, chunk: Any, tile: Any) -> tuple[Any, ...]:
        """Returns the index of a chunk in a block."""
        slab, row = chunk
        return sample, *self.in_order(
            _slice(slab, self.chunk_slabs),
            _slice(row, self.chunk_rows),
            _slice(tile, self.chunk_channels),
        )

    @property
    def tiles(self) -> int:
        """Chunks side by side that cover a strip's channels."""
        return self.padded // self.chunk_channels

    # --- what the two layouts define ---

    pixel_axis = -1  # the axis of a chunk, among its places, along which pixels lie

    def in_order(self, slabs: Any, rows: Any, channels: Any) -> tuple[Any, Any, Any]:
        """Puts the three into memory order, from slowest to fastest."""
        raise NotImplementedError

    @property
    def padded(self) -> int:
        """A strip's channels, rounded up to whole tiles; the excess is garbage."""
        raise NotImplementedError

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        """Shape of a chunk: [slabs, tiles, *places]."""
        raise NotImplementedError

    @property
    def places(self) -> tuple[int, int]:
        """Shape of the places of all channels of a strip."""
        raise NotImplementedError

    @property
    def values(self) -> tuple[int, ...]:
        """Shape of one value per channel of a strip; scratch is [unit, *values]."""
        raise NotImplementedError


def _divide(number: Any, by: int) -> tuple[Any, Any]:
    """Returns quotient and remainder."""
    if by == 1:
        return number, 0
    if isinstance(number, int):
        return divmod(number, by)
    return lax.div(number, by), lax.rem(number, by)


def _loop(
    count: Any, at_once: int, step: Callable[[Sequence[Any], Any], Any], carry: Any
) -> Any:
    """Runs carry = step([i, i + 1, ...], carry) for `count` indices, some per step.

    A step takes `at_once` of them. The rest share one more step, or take one step each
    if `count` is traced.
    """

    def full_step(number: Any, carry: Any) -> Any:
        return step([number * at_once + i for i in range(at_once)], carry)

    full_steps, rest = _divide(count, at_once)
    carry = _for(full_steps, full_step, carry)
    if isinstance(rest, int):
        return step([*range(count - rest, count)], carry) if rest else carry
    return _for(rest, lambda i, carry: step([full_steps * at_once + i], carry), carry)


def _for(count: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs carry = step(i, carry) for `count` indices."""
    if isinstance(count, int) and count < 2:
        return step(0, carry) if count else carry
    return lax.fori_loop(0, count, step, carry)


# --- channels across the lanes --------------------------------------------------------


class AcrossLanes(Cut):
    """x[examples, samples, slabs, rows, channels], pixels down the sublanes."""

    pixel_axis = 2

    def in_order(self, slabs: Any, rows: Any, channels: Any) -> tuple[Any, Any, Any]:
        return slabs, rows, channels

    @property
    def padded(self) -> int:
        return self.lanes

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        tiles = self.chunk_rows // SUBLANES
        return self.chunk_slabs, tiles, SUBLANES, self.chunk_channels

    @property
    def places(self) -> tuple[int, int]:
        return SUBLANES, self.lanes

    def load(self, ref: Any, index: Any) -> jax.Array:
        """Loads the chunk at a `chunk_index`: float32 [slabs, tiles, *places]."""
        # [slabs, rows, channels]; the reshape touches no register.
        return memory.load(ref, index).reshape(self.chunk_shape)

    def store(self, ref: Any, index: Any, chunk: jax.Array) -> None:
        """Stores a chunk [slabs, tiles, *places] at a `chunk_index`."""
        shape = self.chunk_slabs, self.chunk_rows, self.chunk_channels
        memory.store(ref, index, chunk.reshape(shape))

    def places_index(self, sample: Any, tile: Any) -> tuple[Any, ...]:
        """Returns a chunk's index in [unit, *places] or [unit, *values]."""
        return sample, slice(None), _slice(tile, self.chunk_channels)

    # Values per channel of each sample: [unit, lanes].

    @property
    def values(self) -> tuple[int, ...]:
        return 1, self.lanes

    def store_values(self, values_ref: Any, value: jax.Array) -> None:
        """Stores values per channel in [unit, *values]."""
        values_ref[:, 0] = jnp.broadcast_to(value, (self.unit, self.lanes))

    def by_place(self, places_ref: Any) -> Iterator[jax.Array]:
        """Yields, for each place of a channel, the values per channel at that place.

        The ref is [unit, *places].
        """
        return (places_ref[:, place] for place in range(SUBLANES))

    @property
    def pixels_by_place(self) -> list[Any]:
        """Pixels of a sample at each place, in the order of `by_place`."""
        full, tail = divmod(self.rows, SUBLANES)
        return [self.slabs * (full + (place < tail)) for place in range(SUBLANES)]

    def sum_places(self, of_places: Iterable[jax.Array]) -> jax.Array:
        """Sums over each channel's places."""
        return _add(of_places)

    def from_row(self, row: jax.Array) -> jax.Array:
        """Turns [unit or 1, lanes] into values per channel."""
        return row

    def to_row(self, value: jax.Array) -> jax.Array:
        """Turns values per channel into [unit, lanes]."""
        return value


# --- channels down the sublanes -------------------------------------------------------


class DownSublanes(Cut):
    """x[examples, samples, slabs, channels, rows], pixels along the lanes."""

    pixel_axis = 3

    def in_order(self, slabs: Any, rows: Any, channels: Any) -> tuple[Any, Any, Any]:
        return slabs, channels, rows

    @property
    def padded(self) -> int:
        return round_up(self.strip, self.chunk_channels)

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        tiles = self.chunk_rows // LANES
        return self.chunk_slabs, tiles, self.chunk_channels, LANES

    @property
    def places(self) -> tuple[int, int]:
        return self.padded, LANES

    def load(self, ref: Any, index: Any) -> jax.Array:
        """Loads the chunk at a `chunk_index`: float32 [slabs, tiles, *places]."""
        # The slices and their concatenation touch no register.
        value = memory.load(ref, index)  # [slabs, channels, rows]
        tiles = [
            value[:, None, :, start : start + LANES]
            for start in range(0, self.chunk_rows, LANES)
        ]
        return jnp.concatenate(tiles, 1)

    def store(self, ref: Any, index: Any, chunk: jax.Array) -> None:
        """Stores a chunk [slabs, tiles, *places] at a `chunk_index`."""
        tiles = [chunk[:, i] for i in range(chunk.shape[1])]
        memory.store(ref, index, jnp.concatenate(tiles, -1))

    def places_index(self, sample: Any, tile: Any) -> tuple[Any, ...]:
        """Returns a chunk's index in [unit, *places] or [unit, *values]."""
        return sample, _slice(tile, self.chunk_channels), slice(None)

    # Values per channel of each sample: [unit, sublanes, LANES], each value in all
    # lanes of its sublane.

    @property
    def values(self) -> tuple[int, ...]:
        return self.places

    def store_values(self, values_ref: Any, value: jax.Array) -> None:
        """Stores values per channel in [unit, *values]."""
        values_ref[...] = jnp.broadcast_to(value, values_ref.shape)

    def by_place(self, places_ref: Any) -> Iterator[jax.Array]:
        """Yields the ref [unit, *places] at once; the places stay along the lanes."""
        yield places_ref[...]

    @property
    def pixels_by_place(self) -> list[Any]:
        """Pixels of a sample at each place, in the order of `by_place`."""
        full, tail = divmod(self.rows, LANES)
        place = lax.broadcasted_iota(jnp.int32, self.places, 1)
        return [(self.slabs * (full + (place < tail))).astype(jnp.float32)]

    def sum_places(self, of_places: Iterable[jax.Array]) -> jax.Array:
        """Sums over each channel's places."""
        [lanes] = of_places
        return jnp.broadcast_to(jnp.sum(lanes, 2, keepdims=True), lanes.shape)

    def from_row(self, row: jax.Array) -> jax.Array:
        """Turns [unit or 1, lanes] into values per channel."""
        samples = range(row.shape[0])
        return jnp.stack(
            [memory.as_column(row[i : i + 1], self.padded) for i in samples]
        )

    def to_row(self, value: jax.Array) -> jax.Array:
        """Turns values per channel into [unit, lanes]."""
        samples = range(value.shape[0])
        return jnp.concatenate([memory.as_row(value[i]) for i in samples], 0)


AnyCut = AcrossLanes | DownSublanes


def _slice(number: Any, size: int) -> Any:
    if isinstance(number, int):
        return slice(number * size, (number + 1) * size)
    return pl.ds(pl.multiple_of(number * size, size), size)


# --- groups ---------------------------------------------------------------------------

# Groups of at least this many channels are summed one by one. Smaller groups are summed
# by rotations of lanes. All groups share a rotation, but each takes about a hundred
# cycles. Cycles with sums per group relative to those with rotations, compiled,
# for a forward of 8x8 pixels, 1024 channels, groups of 4, 8, 16, 20, 40: 7x 1.35, 1.01,
# 0.85, 0.83, 0.69; v5e 3.15, 1.74, 1.04, 1.04, 0.79.
LEAST_SUMMED = 16


def sum_groups(value: jax.Array, channels: int, group: int) -> jax.Array:
    """Gives each channel the sum over its group of adjacent channels.

    It uses masks. In a product with a matrix of zeros and ones, a NaN or an infinity
    times zero would reach all other groups.

    Args:
      value: values per channel on axis 1, the last of them possibly garbage.
      channels: number of channels that are not garbage.
      group: channels per group.
    """
    if group == 1:
        return value
    if _is_summed(channels, group):
        return _sums(value, channels, group)
    for width, count in _windows(group):
        value = _add(_neighbours(value, width, count, ahead=True))
    return _from_first(value, channels, group)


def merge_groups(
    mean: jax.Array, m2: jax.Array, pixels: int, channels: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """Gives each channel its group's mean, and sum of squares about that mean.

    Args:
      mean: means per channel on axis 1, the last of them possibly garbage.
      m2: sums of squares about these means, in the same order.
      pixels: pixels that each mean is taken over.
      channels: number of channels that are not garbage.
      group: channels per group.
    """
    if group == 1 or _is_summed(channels, group):
        group_mean = sum_groups(mean, channels, group) * (1 / group)
        delta = mean - group_mean
        return group_mean, sum_groups(m2 + delta * delta * pixels, channels, group)
    # Merge both at once: otherwise the squares would wait for the whole group's mean.
    for width, count in _windows(group):
        means = _neighbours(mean, width, count, ahead=True)
        mean = _add(means) * (1 / count)
        squares = _add([(each - mean) * (each - mean) for each in means])
        m2 = _add(_neighbours(m2, width, count, ahead=True))
        m2 = m2 + squares * (width * pixels)
    return _from_first(mean, channels, group), _from_first(m2, channels, group)


def _is_summed(channels: int, group: int) -> bool:
    """Returns whether each group is summed by itself."""
    return group == channels or group >= LEAST_SUMMED


def _sums(value: jax.Array, channels: int, group: int) -> jax.Array:
    """Does `sum_groups` by one sum across lanes (or down sublanes) per group."""
    size = LANES if value.ndim == 2 else SUBLANES  # channels per register
    channel = lax.broadcasted_iota(jnp.int32, value[:, :size].shape, 1)
    sums = [jnp.zeros(channel.shape, value.dtype)] * (value.shape[1] // size)
    for begin in range(0, channels, group):
        end = begin + group
        masks = {  # of each register that holds channels of the group
            i: (channel >= begin - i * size) & (channel < end - i * size)
            for i in range(begin // size, pl.cdiv(end, size))
        }
        parts = [
            jnp.where(mask, value[:, i * size : (i + 1) * size], 0)
            for i, mask in masks.items()
        ]
        total = jnp.sum(_add(parts), 1, keepdims=True)
        for i, mask in masks.items():
            sums[i] = jnp.where(mask, total, sums[i])
    return jnp.concatenate(sums, 1)


def _from_first(value: jax.Array, channels: int, group: int) -> jax.Array:
    """Gives each channel the value of its group's first channel."""
    channel = lax.broadcasted_iota(jnp.int32, value.shape, 1)
    quotient = jnp.floor((channel.astype(jnp.float32) + 0.5) * (1 / group))
    is_first = quotient.astype(jnp.int32) * group == channel
    is_first &= channel < channels
    # Looking back, each channel finds one first channel, and zeros.
    value = jnp.where(is_first, value, 0)
    for width, count in _windows(group):
        value = _add(_neighbours(value, width, count, ahead=False))
    return value


def _windows(size: int) -> Iterator[tuple[int, int]]:
    """Yields (width, count) for each round of rotations that sums `size` channels.

    Before the round each channel has a sum over `width` channels. The round adds
    `count` of these sums. Its rotations of lanes are independent, so they overlap.
    """
    width = 1
    for count in _factors(size):
        yield width, count
        width *= count


def _neighbours(
    value: jax.Array, width: int, count: int, *, ahead: bool
) -> list[jax.Array]:
    """Returns the values of `count` channels, `width` apart, for each channel.

    They are its own value, and those after it (`ahead`) or before it.
    """
    length = value.shape[1]
    sign = -1 if ahead else 1
    rolled = [pltpu.roll(value, sign * i * width % length, 1) for i in range(1, count)]
    return [value, *rolled]


def _add(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, parts)


def _factors(number: int) -> list[int]:
    """Splits a number into factors of up to 8 and a rest that has no more of them."""
    factors = []
    while number > 1:
        small = [n for n in range(2, 9) if number % n == 0]
        factor = max(small, default=number)
        factors.append(factor)
        number //= factor
    return factors
