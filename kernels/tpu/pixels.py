"""How a TPU's channelwise kernels cut an array into blocks, chunks and places.

XLA lays the last two axes of an array in memory into tiles of 8 sublanes times 128
lanes (`blocks.order_of_axes`). Channels are one of the two, and some of a sample's
pixels the other one:

    AcrossLanes      x[examples, samples, slabs, rows, channels]    1280 channels
    DownSublanes     x[examples, samples, slabs, channels, rows]    256 rows of 32

A sample's pixels are slabs * rows. Each way of lying is a class with the same methods,
by which the kernels in channelwise.py are written once.

A *block* is what Pallas brings into VMEM for one step: some pixels of a *unit*, which
is one strip of channels of one sample, or of several samples where they are small. A
*chunk* is what registers hold of a block at a time: [slabs, tiles, *places], where
places are the sublanes and lanes of a register, or of several side by side for several
channels. Sums run over slabs and tiles, so they add whole registers, place by place;
sublanes (or lanes) come together when a unit is complete, and then the channels of a
group.
"""

import dataclasses
import functools
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

# Chunks that a turn of a loop has, so that one is computed while another is waited for.
# Cycles over those of HBM traffic, GroupNorm of 16384 pixels of 512 channels, bfloat16,
# forward, with 1, 2, 4 and 8: compiled for a 7x 1.71, 1.53, 1.47, 1.46, for a v6e 0.97,
# 0.91, 0.87, 0.82; for a v5e with 4 0.47, with 8 0.54, for then numbers spill.
AT_ONCE = 4

Block = tuple[Any, Any]  # numbers: of the slabs, of the rows


@dataclasses.dataclass(frozen=True)
class Cut:
    """What both ways of lying share.

    Attributes:
      cores: that share the units: each has some that follow each other.
      examples: parts of the array with a dscale and dbias of their own.
      samples: of an example.
      slabs, rows: a sample's pixels.
      channels: of a pixel.
      group: channels of a group.
      strip: channels of a unit: all, or as many whole groups as fill tiles.
      unit: samples that make a unit together.
      block_slabs, block_rows: pixels of each of them in VMEM at a time.
      chunk_slabs, chunk_rows, chunk_channels: of one of them, in registers at a time;
        of slabs a divisor, of the block's and of all.
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
        """Of a sample."""
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
        """By so many cores, if each of them gets a unit, or by one."""
        shared = dataclasses.replace(self, cores=cores)
        of_others = (cores - 1) * shared.units_of_core
        return shared if of_others < self.units else self

    @property
    def units_of_core(self) -> int:
        """Of each; the last one may have fewer."""
        return pl.cdiv(self.units, self.cores)

    @property
    def is_even(self) -> bool:
        """Whether each core has as many."""
        return self.units % self.cores == 0

    def units_in(self, core: Any) -> Any:
        if self.is_even:
            return self.units_of_core
        left = self.units - core * self.units_of_core
        return jnp.minimum(left, self.units_of_core)

    @property
    def visited(self) -> np.ndarray:
        """bool [cores, examples, strips]: of which of them a core has units."""
        unit = np.arange(self.units)
        found = np.zeros((self.cores, self.examples * self.strips), bool)
        found[unit // self.units_of_core, unit // self.sets] = True
        return found.reshape(self.cores, self.examples, self.strips)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a unit: of its slabs, of its rows."""
        slab_blocks = pl.cdiv(self.slabs, self.block_slabs)
        return slab_blocks, pl.cdiv(self.rows, self.block_rows)

    @property
    def blocks(self) -> int:
        """Of a unit."""
        return math.prod(self.grid)

    def number(self, block: Block) -> Any:
        """Of a block in its unit."""
        return block[0] * self.grid[1] + block[1]

    def place_of(self, unit: Any) -> tuple[Any, Any, Any]:
        """A unit's example, strip and set: its samples are the last to change, so that
        the units that share a dscale follow each other."""
        rest, of_strip = _divide(unit, self.sets)
        return *_divide(rest, self.strips), of_strip

    def samples_in(self, unit: Any) -> Any:
        """Of the unit: the last one of a strip may have fewer."""
        if self.samples % self.unit == 0:
            return self.unit
        _, _, of_strip = self.place_of(unit)
        return jnp.minimum(self.samples - of_strip * self.unit, self.unit)

    def is_first(self, unit: Any) -> Any:
        """Of those of a strip of an example that a core has."""
        _, _, of_strip = self.place_of(unit)
        if self.cores == 1:
            return of_strip == 0
        return (of_strip == 0) | (lax.rem(unit, self.units_of_core) == 0)

    def spec(self, where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """For arrays of the view.

        Args:
          where: a step of the grid -> the unit and the block that it works on.
        """

        def index(*step: Any) -> tuple[Any, ...]:
            unit, slab, row = where(*step)
            example, strip, of_strip = self.place_of(unit)
            return example, of_strip, *self.in_order(slab, row, strip)

        return pl.BlockSpec((None, self.unit, *self.block), index)

    def spec_of_params(self, where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """For scale and bias, [1, channels]."""

        def index(*step: Any) -> tuple[Any, ...]:
            return 0, self.place_of(where(*step)[0])[1]

        return pl.BlockSpec((1, self.lanes), index)

    def spec_of_gradients(self, where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """For dscale and dbias, [cores, examples, 1, channels]."""

        def index(core: Any, *step: Any) -> tuple[Any, ...]:
            example, strip, _ = self.place_of(where(core, *step)[0])
            return core, example, 0, strip

        return pl.BlockSpec((None, None, 1, self.lanes), index)

    def spec_of_statistics(self, where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """For what each channel of each sample has, [examples * sets, unit,
        channels]."""

        def index(*step: Any) -> tuple[Any, ...]:
            example, strip, of_strip = self.place_of(where(*step)[0])
            return example * self.sets + of_strip, 0, strip

        return pl.BlockSpec((None, self.unit, self.lanes), index)

    @property
    def lanes(self) -> int:
        """A strip's channels, and what fills their last tile: garbage."""
        return round_up(self.strip, LANES)

    def __str__(self) -> str:
        samples = "" if self.unit == 1 else f"{self.unit} samples of "
        pixels = min(self.block_slabs, self.slabs) * min(self.block_rows, self.rows)
        of = "" if pixels == self.pixels else f" of {self.pixels}"
        return f"{samples}{self.strip} channels of {pixels}{of} pixels"

    # --- chunks ---

    def over_chunks(
        self, block: Block, step: Callable[[Sequence[Any], int, Any], Any], carry: Any
    ) -> Any:
        """carry = step([(slab, row), ...], rows, carry) for the block's chunks, several
        at a time.

        Of a chunk that is the array's last, the step is told that it has fewer rows.
        """
        slabs: Any = self.block_slabs // self.chunk_slabs
        if self.slabs % self.block_slabs:
            last = self.grid[0] - 1
            left = self.slabs % self.block_slabs // self.chunk_slabs
            slabs = jnp.where(block[0] == last, left, slabs)
        whole = self.block_rows // self.chunk_rows
        more = self.rows % self.chunk_rows
        in_last = (self.rows - (self.grid[1] - 1) * self.block_rows) // self.chunk_rows
        is_last = block[1] == self.grid[1] - 1

        def of_slabs(slabs: Sequence[Any], carry: Any) -> Any:
            def of_rows(rows: Sequence[Any], carry: Any) -> Any:
                chunks = [(slab, row) for slab in slabs for row in rows]
                return step(chunks, self.chunk_rows, carry)

            def of_last(carry: Any) -> Any:
                carry = loop(in_last, rows_at_once, of_rows, carry)
                if more:
                    carry = step([(slab, in_last) for slab in slabs], more, carry)
                return carry

            if self.grid[1] == 1:
                return of_last(carry)

            def of_whole(carry: Any) -> Any:
                return loop(whole, rows_at_once, of_rows, carry)

            if in_last == whole:
                return of_whole(carry)
            return lax.cond(is_last, of_last, of_whole, carry)

        rows_at_once, slabs_at_once, *_ = self.at_once
        return loop(slabs, slabs_at_once, of_slabs, carry)

    @property
    def at_once(self) -> list[int]:
        """How many chunks, in each direction: of rows, slabs, tiles, samples."""
        left, found = AT_ONCE, []
        for count in (
            pl.cdiv(min(self.rows, self.block_rows), self.chunk_rows),
            min(self.slabs, self.block_slabs) // self.chunk_slabs,
            self.tiles,
            self.unit,
        ):
            found.append(min(count, left))
            left //= found[-1]
        return found

    def add_registers(self, chunk: jax.Array, rows: int) -> jax.Array:
        """[slabs, tiles, *places] -> [*places]: sums of the pixels of a chunk, of which
        so many rows are pixels.

        In pairs, pairs of pairs, and so on, for an addition waits for the one it
        depends on.
        """
        size = chunk.shape[self.pixel_axis]
        whole, more = divmod(rows, size)
        found = []
        if whole:
            found = [chunk[:, :whole].reshape(-1, *chunk.shape[2:])]
        if more:
            found += [jnp.where(self.first_places(more), chunk[:, whole], 0)]
        parts = found[0] if len(found) == 1 else jnp.concatenate(found, 0)
        while (count := parts.shape[0]) > 1:
            half = count // 2
            pairs = parts[:half] + parts[half : 2 * half]
            if count % 2:
                pairs = jnp.concatenate([pairs, parts[2 * half :]], 0)
            parts = pairs
        return parts[0]

    def count(self, rows: int) -> jax.Array:
        """[*places]: pixels of a chunk, of which so many rows are pixels."""
        shape = self.chunk_shape
        whole, more = divmod(rows, shape[self.pixel_axis])
        count = jnp.full(shape[2:], self.chunk_slabs * whole, jnp.float32)
        if more:
            count = jnp.where(self.first_places(more), count + self.chunk_slabs, count)
        return count

    def first_places(self, count: Any) -> jax.Array:
        """bool, [*places]: those of the first pixels."""
        axis = self.pixel_axis - 2
        return lax.broadcasted_iota(jnp.int32, self.chunk_shape[2:], axis) < count

    def sum_groups(self, value: jax.Array) -> jax.Array:
        """Of channels: each gets the sum of its group."""
        return sum_groups(value, self.strip, self.group)

    def merge_groups(self, mean: jax.Array, m2: jax.Array) -> tuple[Any, Any]:
        """Of channels: each gets the mean of its group, and the sum of squares about
        it."""
        return merge_groups(mean, m2, self.pixels, self.strip, self.group)

    # --- in the order of a way of lying ---

    @property
    def view(self) -> tuple[int, ...]:
        """Of x, y, dy and dx."""
        of_sample = self.in_order(self.slabs, self.rows, self.channels)
        return self.examples, self.samples, *of_sample

    @property
    def block(self) -> tuple[int, int, int]:
        """Of one sample in VMEM."""
        return self.in_order(self.block_slabs, self.block_rows, self.padded)

    def at(self, sample: Any, chunk: Any, tile: Any) -> tuple[Any, ...]:
        """Where in a block a chunk is."""
        slab, row = chunk
        return sample, *self.in_order(
            _slice(slab, self.chunk_slabs),
            _slice(row, self.chunk_rows),
            _slice(tile, self.chunk_channels),
        )

    @property
    def tiles(self) -> int:
        """Chunks side by side that have a strip's channels."""
        return self.padded // self.chunk_channels

    # --- what a way of lying has of its own ---

    pixel_axis = -1  # of a chunk, on which pixels lie

    def in_order(self, slabs: Any, rows: Any, channels: Any) -> tuple[Any, Any, Any]:
        """As they lie, from slowest to fastest."""
        raise NotImplementedError

    @property
    def padded(self) -> int:
        """A strip's channels, and what fills their last tile: garbage."""
        raise NotImplementedError

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        """[slabs, tiles, *places]."""
        raise NotImplementedError

    @property
    def places(self) -> tuple[int, int]:
        """Of all channels of a strip."""
        raise NotImplementedError

    @property
    def values(self) -> tuple[int, ...]:
        """What all channels of a strip have: [unit, *values]."""
        raise NotImplementedError


def _divide(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and rest."""
    if by == 1:
        return number, 0
    if isinstance(number, int):
        return divmod(number, by)
    return lax.div(number, by), lax.rem(number, by)


def loop(
    count: Any, at_once: int, step: Callable[[Sequence[Any], Any], Any], carry: Any
) -> Any:
    """carry = step([i, i + 1, ...], carry): so many at once.

    So is the rest; one by one where the program computes how many they are.
    """

    def of_group(group: Any, carry: Any) -> Any:
        return step([group * at_once + i for i in range(at_once)], carry)

    groups, rest = _divide(count, at_once)
    carry = _for(groups, of_group, carry)
    if isinstance(rest, int):
        return step([*range(count - rest, count)], carry) if rest else carry
    return _for(rest, lambda i, carry: step([groups * at_once + i], carry), carry)


def _for(count: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    if isinstance(count, int) and count < 2:
        return step(0, carry) if count else carry
    return lax.fori_loop(0, count, step, carry)


# --- channels across the lanes --------------------------------------------------------


class AcrossLanes(Cut):
    """x[examples, samples, slabs, rows, channels]: pixels lie down the sublanes."""

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

    def as_places(self, value: jax.Array) -> jax.Array:
        """[slabs, rows, channels] -> a chunk; no register is touched."""
        return value.reshape(self.chunk_shape)

    def as_block(self, chunk: jax.Array) -> jax.Array:
        """Back."""
        return chunk.reshape(self.chunk_slabs, self.chunk_rows, self.chunk_channels)

    def places_at(self, sample: Any, tile: Any) -> tuple[Any, ...]:
        """Where in [unit, *places], or [unit, *values], a chunk's are."""
        return sample, slice(None), _slice(tile, self.chunk_channels)

    # What channels have, of each sample: [unit, lanes].

    @property
    def values(self) -> tuple[int, ...]:
        return 1, self.lanes

    def keep(self, values_ref: Any, value: jax.Array) -> None:
        """[unit, *values] = of channels."""
        values_ref[:, 0] = jnp.broadcast_to(value, (self.unit, self.lanes))

    def by_place(self, places_ref: Any) -> Iterator[jax.Array]:
        """[unit, *places] -> of each place that a channel has, what channels have."""
        return (places_ref[:, place] for place in range(SUBLANES))

    @property
    def counts(self) -> list[Any]:
        """Pixels of a sample that come to each place."""
        whole, more = divmod(self.rows, SUBLANES)
        return [self.slabs * (whole + (place < more)) for place in range(SUBLANES)]

    def meet(self, of_places: Iterable[jax.Array]) -> jax.Array:
        """The sum over each channel's places."""
        return _add(of_places)

    def from_row(self, row: jax.Array) -> jax.Array:
        """[unit or 1, lanes] -> of channels."""
        return row

    def to_row(self, value: jax.Array) -> jax.Array:
        """Of channels -> [unit, lanes]."""
        return value


# --- channels down the sublanes -------------------------------------------------------


class DownSublanes(Cut):
    """x[examples, samples, slabs, channels, rows]: pixels lie along the lanes."""

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

    def as_places(self, value: jax.Array) -> jax.Array:
        """[slabs, channels, rows] -> a chunk; no register is touched."""
        tiles = [
            value[:, None, :, start : start + LANES]
            for start in range(0, self.chunk_rows, LANES)
        ]
        return jnp.concatenate(tiles, 1)

    def as_block(self, chunk: jax.Array) -> jax.Array:
        """Back."""
        return jnp.concatenate([chunk[:, i] for i in range(chunk.shape[1])], -1)

    def places_at(self, sample: Any, tile: Any) -> tuple[Any, ...]:
        """Where in [unit, *places], or [unit, *values], a chunk's are."""
        return sample, _slice(tile, self.chunk_channels), slice(None)

    # What channels have, of each sample: [unit, sublanes, LANES], each number in all
    # lanes of its sublane.

    @property
    def values(self) -> tuple[int, ...]:
        return self.places

    def keep(self, values_ref: Any, value: jax.Array) -> None:
        """[unit, *values] = of channels."""
        values_ref[...] = jnp.broadcast_to(value, values_ref.shape)

    def by_place(self, places_ref: Any) -> Iterator[jax.Array]:
        """[unit, *places] -> the same: places lie along the lanes."""
        yield places_ref[...]

    @property
    def counts(self) -> list[Any]:
        """Pixels of a sample that come to each place."""
        whole, more = divmod(self.rows, LANES)
        place = lax.broadcasted_iota(jnp.int32, self.places, 1)
        return [(self.slabs * (whole + (place < more))).astype(jnp.float32)]

    def meet(self, of_places: Iterable[jax.Array]) -> jax.Array:
        """The sum over each channel's places."""
        [lanes] = of_places
        return jnp.broadcast_to(jnp.sum(lanes, 2, keepdims=True), lanes.shape)

    def from_row(self, row: jax.Array) -> jax.Array:
        """[unit or 1, lanes] -> of channels."""
        samples = range(row.shape[0])
        return jnp.stack(
            [memory.as_column(row[i : i + 1], self.padded) for i in samples]
        )

    def to_row(self, value: jax.Array) -> jax.Array:
        """Of channels -> [unit, lanes]."""
        samples = range(value.shape[0])
        return jnp.concatenate([memory.as_row(value[i]) for i in samples], 0)


AnyCut = AcrossLanes | DownSublanes


def _slice(number: Any, size: int) -> Any:
    if isinstance(number, int):
        return slice(number * size, (number + 1) * size)
    return pl.ds(pl.multiple_of(number * size, size), size)


# --- groups ---------------------------------------------------------------------------

# Channels of a group from which on each group's sum is taken by itself. Sums of fewer
# meet by rotations of lanes, which all groups share, but of which each takes about a
# hundred cycles. Cycles by sums over those by rotations, compiled: forward of 8x8
# pixels, 1024 channels, groups of 4, 8, 16, 20, 40: for a 7x 1.35, 1.01, 0.85, 0.83,
# 0.69, for a v5e 3.15, 1.74, 1.04, 1.04, 0.79.
LEAST_SUMMED = 16


def sum_groups(value: jax.Array, channels: int, group: int) -> jax.Array:
    """Sums over each group of neighbouring channels, which all get the sum.

    By masks, and not as a product with a matrix of zeros and ones, for a NaN or an
    infinity times zero would reach all other groups.

    Args:
      value: channels on axis 1, the last of which may be garbage.
      channels: how many are none.
      group: channels of a group.
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
    """Mean, and sum of squares about it, of each group, which all its channels get.

    Args:
      mean: of each channel, on axis 1, the last of which may be garbage.
      m2: likewise, sums of squares about it.
      pixels: that each of them is of.
      channels: how many are none.
      group: channels of a group.
    """
    if group == 1 or _is_summed(channels, group):
        total = sum_groups(mean, channels, group) * (1 / group)
        apart = mean - total
        return total, sum_groups(m2 + apart * apart * pixels, channels, group)
    # Both at once: the squares would wait for the mean of the whole group.
    for width, count in _windows(group):
        means = _neighbours(mean, width, count, ahead=True)
        mean = _add(means) * (1 / count)
        apart = _add([(each - mean) * (each - mean) for each in means])
        m2 = _add(_neighbours(m2, width, count, ahead=True))
        m2 = m2 + apart * (width * pixels)
    return _from_first(mean, channels, group), _from_first(m2, channels, group)


def _is_summed(channels: int, group: int) -> bool:
    """Whether each group's sum is taken by itself."""
    return group == channels or group >= LEAST_SUMMED


def _sums(value: jax.Array, channels: int, group: int) -> jax.Array:
    """`sum_groups`, a sum across lanes (or down sublanes) for each group."""
    size = LANES if value.ndim == 2 else SUBLANES  # channels of a register
    channel = lax.broadcasted_iota(jnp.int32, value[:, :size].shape, 1)
    sums = [jnp.zeros(channel.shape, value.dtype)] * (value.shape[1] // size)
    for begin in range(0, channels, group):
        end = begin + group
        inside = {
            i: (channel >= begin - i * size) & (channel < end - i * size)
            for i in range(begin // size, pl.cdiv(end, size))
        }
        parts = [
            jnp.where(mask, value[:, i * size : (i + 1) * size], 0)
            for i, mask in inside.items()
        ]
        total = jnp.sum(_add(parts), 1, keepdims=True)
        for i, mask in inside.items():
            sums[i] = jnp.where(mask, total, sums[i])
    return jnp.concatenate(sums, 1)


def _from_first(value: jax.Array, channels: int, group: int) -> jax.Array:
    """To each channel what the first one of its group has."""
    channel = lax.broadcasted_iota(jnp.int32, value.shape, 1)
    quotient = jnp.floor((channel.astype(jnp.float32) + 0.5) * (1 / group))
    is_first = quotient.astype(jnp.int32) * group == channel
    is_first &= channel < channels
    # Looking back, a channel meets one such channel, and zeros.
    value = jnp.where(is_first, value, 0)
    for width, count in _windows(group):
        value = _add(_neighbours(value, width, count, ahead=False))
    return value


def _windows(size: int) -> Iterator[tuple[int, int]]:
    """(width, count): of how many channels a channel knows the sum, and how many of
    these become one: so many rotations of lanes can go at once."""
    width = 1
    for count in _factors(size):
        yield width, count
        width *= count


def _neighbours(
    value: jax.Array, width: int, count: int, *, ahead: bool
) -> list[jax.Array]:
    """What so many channels have: the own one and those after it, or before it, that
    are `width` apart."""
    length = value.shape[1]
    sign = -1 if ahead else 1
    others = [pltpu.roll(value, sign * i * width % length, 1) for i in range(1, count)]
    return [value, *others]


def _add(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, parts)


def _factors(number: int) -> list[int]:
    """Whose product it is: of up to 8 where it has such."""
    factors = []
    while number > 1:
        small = [n for n in range(2, 9) if number % n == 0]
        factor = max(small, default=number)
        factors.append(factor)
        number //= factor
    return factors
