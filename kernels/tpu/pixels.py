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
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

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
        self, block: Block, step: Callable[[Any, int, Any], Any], carry: Any
    ) -> Any:
        """carry = step((slab, row), rows, carry) for the block's chunks.

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

        def of_slab(slab: Any, carry: Any) -> Any:
            def of_rows(row: Any, carry: Any) -> Any:
                return step((slab, row), self.chunk_rows, carry)

            def of_last(carry: Any) -> Any:
                carry = _loop(in_last, of_rows, carry)
                return step((slab, in_last), more, carry) if more else carry

            if self.grid[1] == 1:
                return of_last(carry)
            if in_last == whole:
                return _loop(whole, of_rows, carry)
            return lax.cond(
                is_last, of_last, lambda carry: _loop(whole, of_rows, carry), carry
            )

        return _loop(slabs, of_slab, carry)

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


def _divide(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and rest."""
    if by == 1:
        return number, 0
    return lax.div(number, by), lax.rem(number, by)


def _loop(count: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
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

    def of_tile(self, tile: Any) -> tuple[Any, Any]:
        """Which of a strip's places they are."""
        return slice(None), _slice(tile, self.chunk_channels)

    # What channels have, of each sample: [unit, lanes].

    def meet(self, places: jax.Array) -> jax.Array:
        """Sums each channel's places: [unit, *places] -> of channels."""
        return jnp.sum(places, 1)

    def spread(self, value: jax.Array) -> jax.Array:
        """Of channels -> [unit, *places]."""
        return jnp.broadcast_to(value[:, None], (value.shape[0], *self.places))

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

    def of_tile(self, tile: Any) -> tuple[Any, Any]:
        """Which of a strip's places they are."""
        return _slice(tile, self.chunk_channels), slice(None)

    # What channels have, of each sample: [unit, sublanes, LANES], each number in all
    # lanes of its sublane.

    def meet(self, places: jax.Array) -> jax.Array:
        """Sums each channel's places: [unit, *places] -> of channels."""
        return jnp.broadcast_to(jnp.sum(places, 2, keepdims=True), places.shape)

    def spread(self, value: jax.Array) -> jax.Array:
        """Of channels -> [unit, *places]."""
        return value

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


def sum_groups(value: jax.Array, channels: int, group: int) -> jax.Array:
    """Sums over each group of neighbouring channels, which all get the sum.

    By rotations and masks, and not as a product with a matrix of zeros and ones, for a
    NaN or an infinity times zero would reach all other groups.

    Args:
      value: channels on axis 1, the last of which may be garbage.
      channels: how many are none.
      group: channels of a group.
    """
    if group == 1:
        return value
    channel = lax.broadcasted_iota(jnp.int32, value.shape, 1)
    if group == channels:
        total = jnp.sum(jnp.where(channel < channels, value, 0), 1, keepdims=True)
        return jnp.broadcast_to(total, value.shape)
    # The first channel of a group has the sum of those from it on; the others get it by
    # looking back, where they meet one such channel, and zeros.
    ahead = _window(value, group, ahead=True)
    quotient = jnp.floor((channel.astype(jnp.float32) + 0.5) * (1 / group))
    is_first = quotient.astype(jnp.int32) * group == channel
    is_first &= channel < channels
    return _window(jnp.where(is_first, ahead, 0), group, ahead=False)


def _window(value: jax.Array, size: int, *, ahead: bool) -> jax.Array:
    """Sums `size` channels: the own one and those after it, or before it.

    A rotation of lanes takes about a hundred cycles, and so many can go at once: sums
    of few, of these again few, and so on.
    """
    length = value.shape[1]
    width = 1  # the sum of so many
    for count in _factors(size):
        parts = [value]
        for distance in range(width, count * width, width):
            distance = length - distance if ahead else distance
            parts.append(pltpu.roll(value, distance % length, 1))
        value = functools.reduce(operator.add, parts)
        width *= count
    return value


def _factors(number: int) -> list[int]:
    """Whose product it is: of up to 8 where it has such."""
    factors = []
    while number > 1:
        small = [n for n in range(2, 9) if number % n == 0]
        factor = max(small, default=number)
        factors.append(factor)
        number //= factor
    return factors
