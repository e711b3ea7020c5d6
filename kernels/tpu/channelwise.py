"""GroupNorm, InstanceNorm and BatchNorm on a TPU, channels last, forward and backward.

The kernels work on the view x[N, S, G, K] (samples, pixels, groups, channels of a
group). Means are taken over the pixels and channels of one group of one sample:

    forward   y = act(z),  z = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dz * scale
              dscale = sum(dz * x_hat),  dbias = sum(dz)         over pixels and samples
              dz = dy * act'(z)

A shortcut, of x's shape, is added to z, and its gradient is dz.

pixels.py explains the memory layouts and the cut: an array is cut into units (a strip
of channels of one sample, or of several small samples), and a unit into blocks, one per
grid step. There are three variants:

    one block     A unit is one block. One step computes its sums and statistics, and
                  normalizes it.
    kept          A unit's blocks stay in VMEM as they arrive, until its sums are
                  complete. While the next unit's blocks arrive and are summed, the kept
                  blocks are normalized and written out, each just before a new block
                  takes its place. So x (and dy) is read once, HBM reads and writes at
                  all times, and VMEM holds one unit instead of two.
    two reads     A unit does not fit VMEM, so the kernel computes only the sums. The
                  normalization is left to XLA, which fuses it with what follows.

When statistics cross devices (`Call.half`), there are two reads as well, and the kernel
does the first.

Chan's formula merges the means and centred squares of parts, in a fixed order. The
parts and their order depend only on S, G, K, the dtypes and the chip, never on N. So a
sample's result is the same to the bit in any batch.

Sources: group normalization, Wu and He 2018 (arXiv:1803.08494); instance normalization,
Ulyanov et al. 2016 (arXiv:1607.08022); batch normalization, Ioffe and Szegedy 2015
(arXiv:1502.03167); merging of moments, Chan, Golub and LeVeque 1983, equation 2.1.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm import reference
from fusednorm.kernels.activation import activate, times_slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry, power_of_two
from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.blocks import inverse, order_of_axes
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up
from fusednorm.kernels.tpu.pixels import AcrossLanes, AnyCut, Block, DownSublanes
from fusednorm.reference import Norm

MOST_SAMPLES = 8  # per unit: one sublane for the statistics of each

# Vector registers that a chunk fills in float32, out of 64. With more, registers spill.
# With fewer, there is too little work to hide the latency of the sums. Cycles relative
# to those of HBM traffic, compiled for a 7x, 16384 pixels of 512 channels, bfloat16, 4
# chunks at once: forward with 24 registers 1.39, with 40 1.36; backward with 24 1.30,
# with 40 1.57. With 26 registers the 199 images of resnet50_conv3, which XLA lays down
# the sublanes, are one chunk. With 24 they are two, and a v5e's VMEM has no room for
# their padding.
REGISTERS = {"forward": 40, "backward": 26}

# Channels of a chunk of 16-bit values, if they divide the strip's channels. Memory has
# tiles of 8 rows times 128 channels: one fills half a register, two adjacent ones fill
# a whole one. Relative cycles as above, for a v6e: forward 0.87 -> 0.80, backward
# 0.88 -> 0.74.
WIDE = 2 * LANES

# Forward traffic of two 3x3 convolutions and the layers between them, in units of one
# tensor of 200 x 28 x 28 x 512 in bfloat16, compiled for a v5e. BatchNorm and ReLU:
# 4.3 with flax's layer and with the reference, 8.3 with the kernel. GroupNorm and SiLU:
# 4.3, 4.3 and 11.2.
BETWEEN_CONVOLUTIONS = (
    "images, on a TPU: XLA fuses the sums into the convolution before and the rest "
    "into what follows, while a kernel reads and writes the tensor once more; a norm "
    "that stands alone moves less with the kernel, which "
    "fusednorm.use_backend('mosaic_tpu') runs"
)

COPIED = (
    "XLA puts fewer than 8 pixels of this array into a tile of a TPU's memory: x and "
    "y would be copied around a kernel, which fusednorm.use_backend('mosaic_tpu') "
    "runs"
)

SPILLED = 8  # values per channel of a unit that `complete` keeps in VMEM
OTHER_BYTES = 2**20  # VMEM for parameters, statistics, and Mosaic itself
# VMEM for spilled registers, which no plan counts. A plan may use three quarters of
# VMEM, and the remaining 4 MiB or more have room for the spill. It reaches 1.9 MiB
# (forward of 5 x 1024 x 8192 in bfloat16 and 32 groups, v5e).
SPILLED_BYTES = 3 * 2**20

# --- forward --------------------------------------------------------------------------

# A kernel's refs by name. An absent operand has none, and neither has a result that is
# not wanted, or scratch that is not needed.
Refs = dict[str, Any]


def _forward_kernel(ref: Refs, cut: AnyCut, norm: Norm) -> None:
    """Computes those of y, mean and var that have a ref.

    Shapes of the refs:
      x: a block, [unit, slabs, rows, lanes] or [unit, slabs, sublanes, rows].
      shortcut, y: a block of the unit that is normalized.
      scale, bias: [1, lanes].
      mean, var: [unit, lanes] float32; each channel has its group's.
      kept_x: [blocks, *block], all blocks of a unit.
      partials: [3, unit, *places] float32, `Moments` of a unit, place by place.
      coefficients: [3, unit, *values] float32: mean, rstd * scale, bias.
    """

    def accumulate(block: Block, sample: Any, tile: Any) -> None:
        at = cut.places_index(sample, tile)
        moments = _block_moments(ref, cut, norm.center, block, sample, tile)
        if cut.blocks > 1:
            moments = _merge(tuple(ref["partials"][i, *at] for i in range(3)), moments)
        for i, value in enumerate(moments):
            ref["partials"][i, *at] = value

    def complete(_: Any) -> None:
        mean, var = _statistics(cut, ref["partials"], norm.center)
        _store_row(ref, cut, "mean", mean)
        _store_row(ref, cut, "var", var)
        if "y" in ref:
            if norm.center:
                cut.store_values(ref["coefficients"].at[0], mean)
            rstd = lax.rsqrt(var + norm.epsilon)
            _store_affine(ref, cut, norm, ref["coefficients"], 1, rstd)

    normalize = functools.partial(_normalize, ref, cut, norm) if "y" in ref else None
    _run_step(ref, cut, accumulate, complete, normalize)


def _normalize(
    ref: Refs, cut: AnyCut, norm: Norm, block: Block, sample: Any, tile: Any
) -> None:
    """Stores y = act(x_hat * scale + bias + shortcut) of a block's sample and tile."""
    at = cut.places_index(sample, tile)
    x_source = _kept_or_new(ref, cut, block, "x")

    def normalize_chunks(chunks: Sequence[Any], *_: Any) -> None:
        for chunk in chunks:
            mean, factor, bias = (ref["coefficients"][i, *at] for i in range(3))
            index = cut.chunk_index(sample, chunk, tile)
            y = cut.load(x_source, index)
            if norm.center:
                y = y - mean
            y = y * factor
            if "bias" in ref:
                y = y + bias
            if "shortcut" in ref:
                y = y + cut.load(ref["shortcut"], index)
            cut.store(ref["y"], index, activate(norm.activation, y))

    cut.over_chunks(block, normalize_chunks, None)


# Count, mean, and sum of squares about the mean, of some pixels, place by place.
# Without centring, the squares are about 0.
Moments = tuple[jax.Array, jax.Array, jax.Array]


def _block_moments(
    ref: Refs, cut: AnyCut, center: bool, block: Block, sample: Any, tile: Any
) -> Moments:
    """Returns the moments, each [*places], of a block's chunks of one sample and tile.

    It also copies these chunks to `kept_x`, if there is one.
    """

    def load(chunk: Any) -> jax.Array:
        index = cut.chunk_index(sample, chunk, tile)
        _keep(ref, cut, block, index, "x")
        return cut.load(ref["x"], index)

    def add_chunks(chunks: Sequence[Any], rows: int, before: Moments) -> Moments:
        return _add_chunks(cut, before, map(load, chunks), rows, center)

    mean = zero = jnp.zeros(cut.chunk_shape[2:], jnp.float32)
    if center:  # the first pixels are near enough to the mean
        first = cut.load(ref["x"], cut.chunk_index(sample, (0, 0), tile))
        rows_left = cut.rows - block[1] * cut.block_rows
        mean = jnp.where(cut.first_places(rows_left), first[0, 0], 0)
    moments: Moments = cut.over_chunks(block, add_chunks, (zero, mean, zero))
    return moments


def _add_chunks(
    cut: AnyCut, before: Moments, chunks: Iterable[jax.Array], rows: int, center: bool
) -> Moments:
    """Adds chunks, each of `rows` rows, to the moments of the pixels before them.

    The chunks' sums are taken about the mean so far: s1 = sum(x - mean) and
    s2 = sum((x - mean)^2). Chan's formula then becomes

        mean += s1 / n,  m2 += s2 - s1 * s1 / n

    The subtraction from s2 is harmless. If the chunks are far from the mean so far, the
    merged mean is far from it too, and m2 is as large as the terms that cancel. Where
    no pixel came before, the mean may be any number near the pixels.
    """
    count, mean, m2 = before
    s1 = s2 = jnp.zeros_like(mean)
    for x in chunks:
        count = count + cut.count_pixels(rows)
        centred = x - mean if center else x
        s2 = s2 + cut.add_registers(centred * centred, rows)
        if center:
            s1 = s1 + cut.add_registers(centred, rows)
    if not center:
        return count, mean, m2 + s2
    shift = s1 / jnp.maximum(count, 1)
    return count, mean + shift, m2 + (s2 - s1 * shift)


def _merge(a: Moments, b: Moments) -> Moments:
    """Merges two sets of moments (Chan et al. 1983, eq. 2.1); a count may be 0.

    So delta is multiplied by counts before it is squared: the square of a mean of 2e19
    would be infinite, and infinity times 0 is NaN.
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    share = n_b / jnp.maximum(n, 1)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * (delta * (n_a * share))


def _statistics(cut: AnyCut, partials: Any, center: bool) -> tuple[Any, Any]:
    """Reduces a unit's moments to values per channel: its group's mean and variance.

    The mean is None without centring.
    """
    means, m2s = (functools.partial(cut.by_place, partials.at[i]) for i in (1, 2))
    if center:
        weighted = zip(cut.pixels_by_place, means(), strict=True)
        mean = cut.sum_places(n * each for n, each in weighted) * (1 / cut.pixels)
        moments = zip(cut.pixels_by_place, means(), m2s(), strict=True)
        m2 = cut.sum_places(
            m2 + (each - mean) * (n * (each - mean)) for n, each, m2 in moments
        )
        mean, m2 = cut.merge_groups(mean, m2)
    else:
        mean, m2 = None, cut.sum_groups(cut.sum_places(m2s()))
    return mean, m2 * (1 / (cut.pixels * cut.group))


# --- backward -------------------------------------------------------------------------


def _backward_kernel(ref: Refs, cut: AnyCut, norm: Norm) -> None:
    """Computes those of dx, dz, dscale, dbias, c1 and c2 that have a ref.

    Shapes of the refs:
      dy, x, shortcut, dz: a block, [unit, slabs, rows, lanes] or [unit, slabs,
        sublanes, rows].
      dx: a block of the unit that is normalized.
      scale, bias: [1, lanes]; bias, like shortcut, for an activation.
      mean, var: [unit, lanes] float32; each channel has its group's.
      dscale, dbias: [1, lanes] float32.
      c1, c2: [unit, lanes] float32: mean(w * x_hat) and mean(w).
      kept_x, kept_dy, kept_dz: [blocks, *block], all blocks of a unit. With a shortcut,
        dz is kept in the place of dy, because the shortcut is not kept.
      mean_values: [unit, *values] float32: mean of the unit being summed.
      affine_values: [2, unit, *values] float32: its factor and bias of z.
      partials: [2, unit, *places] float32: sum(dz * (x - mean)), sum(dz).
      coefficients: [4 or 6, unit, *values] float32: mean, a, b, c, affine.
    """
    _run_step(
        ref,
        cut,
        functools.partial(_accumulate_sums, ref, cut, norm),
        functools.partial(_complete_sums, ref, cut, norm),
        functools.partial(_store_dx, ref, cut, norm) if "dx" in ref else None,
        begin=functools.partial(_load_statistics, ref, cut, norm),
    )


def _load_statistics(ref: Refs, cut: AnyCut, norm: Norm) -> None:
    """Stores what the sums of a unit need in the form of values per channel."""
    if norm.center:
        cut.store_values(ref["mean_values"], cut.from_row(ref["mean"][...]))
    if "affine_values" in ref:
        rstd = lax.rsqrt(cut.from_row(ref["var"][...]) + norm.epsilon)
        _store_affine(ref, cut, norm, ref["affine_values"], 0, rstd)


def _accumulate_sums(
    ref: Refs, cut: AnyCut, norm: Norm, block: Block, sample: Any, tile: Any
) -> None:
    """Adds a block's sums of one sample and tile; stores dz and what is kept."""
    at = cut.places_index(sample, tile)
    mean: Any = ref["mean_values"][at] if norm.center else None
    affine = None
    if "affine_values" in ref:
        affine = ref["affine_values"][0, *at], ref["affine_values"][1, *at]

    def add_chunks(chunks: Sequence[Any], rows: int, sums: Any) -> Any:
        for chunk in chunks:
            index = cut.chunk_index(sample, chunk, tile)
            _keep(ref, cut, block, index, "x", "dy")
            x, dy = cut.load(ref["x"], index), cut.load(ref["dy"], index)
            centred = x - mean if norm.center else x
            dz = _before_activation(ref, cut, norm, affine, dy, centred, index)
            if "dz" in ref:
                cut.store(ref["dz"], index, dz)
            if "kept_dz" in ref:
                cut.store(ref["kept_dz"].at[cut.block_index(block)], index, dz)
            sums = [
                total + cut.add_registers(term, rows)
                for total, term in zip(sums, (dz * centred, dz), strict=True)
            ]
        return sums

    zero = jnp.zeros(cut.chunk_shape[2:], jnp.float32)
    partials = ref["partials"]
    for i, value in enumerate(cut.over_chunks(block, add_chunks, [zero, zero])):
        partials[i, *at] = value if cut.blocks == 1 else partials[i, *at] + value


def _complete_sums(ref: Refs, cut: AnyCut, norm: Norm, unit: Any) -> None:
    """Reduces a unit's sums to dscale, dbias, c1 and c2, and these to coefficients:

    dx = dz * a - (x - mean) * b - c,  a = rstd * scale, b = rstd^2 * c1, c = rstd * c2
    """
    partials = ref["partials"]
    rstd = lax.rsqrt(cut.from_row(ref["var"][...]) + norm.epsilon)
    dscale, dbias = (cut.sum_places(cut.by_place(partials.at[i])) for i in range(2))
    dscale = dscale * rstd
    _add_samples(ref, cut, unit, "dscale", dscale)
    _add_samples(ref, cut, unit, "dbias", dbias)
    scale: Any = 1.0
    if "scale" in ref:
        scale = norm.weight(cut.from_row(memory.load(ref["scale"])))
    per_group = 1 / (cut.pixels * cut.group)
    c1 = cut.sum_groups(dscale * scale) * per_group
    c2 = cut.sum_groups(dbias * scale) * per_group
    _store_row(ref, cut, "c1", c1)
    _store_row(ref, cut, "c2", c2)
    if "dx" in ref:
        coefficients = ref["coefficients"]
        if norm.center:
            coefficients[0] = ref["mean_values"][...]
            cut.store_values(coefficients.at[3], rstd * c2)
        cut.store_values(coefficients.at[1], rstd * scale)
        cut.store_values(coefficients.at[2], rstd * rstd * c1)
        if "affine_values" in ref:
            affine_values = ref["affine_values"]
            coefficients[4], coefficients[5] = affine_values[0], affine_values[1]


def _store_dx(
    ref: Refs, cut: AnyCut, norm: Norm, block: Block, sample: Any, tile: Any
) -> None:
    """Stores dx = dz * a - (x - mean) * b - c of a block's sample and tile."""
    at = cut.places_index(sample, tile)
    coefficients = ref["coefficients"]
    x_source = _kept_or_new(ref, cut, block, "x")
    dy_source = _kept_or_new(ref, cut, block, "dz" if "kept_dz" in ref else "dy")

    def store_chunks(chunks: Sequence[Any], *_: Any) -> None:
        for chunk in chunks:
            mean, a, b, c = (coefficients[i, *at] for i in range(4))
            index = cut.chunk_index(sample, chunk, tile)
            x, dy = cut.load(x_source, index), cut.load(dy_source, index)
            centred = x - mean if norm.center else x
            affine = None
            if "affine_values" in ref:
                affine = coefficients[4, *at], coefficients[5, *at]
            dz = dy
            if "kept_dz" not in ref:
                dz = _before_activation(ref, cut, norm, affine, dy, centred, index)
            dx = dz * a - centred * b
            if norm.center:
                dx = dx - c
            cut.store(ref["dx"], index, dx)

    cut.over_chunks(block, store_chunks, None)


def _before_activation(
    ref: Refs,
    cut: AnyCut,
    norm: Norm,
    affine: Any,
    dy: jax.Array,
    centred: jax.Array,
    index: Any,
) -> jax.Array:
    """Returns dz = dy * act'(z), z = centred * factor + bias + shortcut, of a chunk.

    dy, centred (x - mean) and dz are [slabs, tiles, *places]; `affine` is factor and
    bias, [*places], or None without an activation.
    """
    if norm.activation is None:
        return dy
    factor, bias = affine
    z = centred * factor
    if "bias" in ref:
        z = z + bias
    if "shortcut" in ref:
        z = z + cut.load(ref["shortcut"], index)
    return times_slope(norm.activation, z, dy)


def _add_samples(
    ref: Refs, cut: AnyCut, unit: Any, name: str, value: jax.Array
) -> None:
    """Adds a unit's values per channel to dscale or dbias, [1, lanes], if wanted.

    A core's first unit of a strip overwrites what is there.
    """
    if name not in ref:
        return
    rows = cut.to_row(value)  # [unit, lanes]
    if cut.samples % cut.unit:
        sample = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(sample < cut.samples_in(unit), rows, 0)
    row = jnp.sum(rows, 0, keepdims=True)
    ref[name][...] = jnp.where(cut.is_first(unit), row, ref[name][...] + row)


# --- both -----------------------------------------------------------------------------


def _keep(ref: Refs, cut: AnyCut, block: Block, index: Any, *names: str) -> None:
    """Copies a chunk of each array to the unit's kept blocks, if it has any."""
    for name in names:
        if f"kept_{name}" in ref:
            ref[f"kept_{name}"][cut.block_index(block), *index] = ref[name][index]


def _kept_or_new(ref: Refs, cut: AnyCut, block: Block, name: str) -> Any:
    """Returns the ref of a block as it was kept, or as it arrives if none is kept."""
    if f"kept_{name}" in ref:
        return ref[f"kept_{name}"].at[cut.block_index(block)]
    return ref[name]


def _store_row(ref: Refs, cut: AnyCut, name: str, value: jax.Array) -> None:
    """Stores values per channel as [unit, lanes], if there is a ref."""
    if name in ref:
        ref[name][...] = cut.to_row(value)


def _store_affine(
    ref: Refs, cut: AnyCut, norm: Norm, values_ref: Any, first: int, rstd: Any
) -> None:
    """Stores the factor and bias that turn x - mean into z, from values_ref[first]."""
    factor = rstd
    if "scale" in ref:
        factor = factor * norm.weight(cut.from_row(memory.load(ref["scale"])))
    cut.store_values(values_ref.at[first], factor)
    if "bias" in ref:
        bias = cut.from_row(memory.load(ref["bias"]))
        cut.store_values(values_ref.at[first + 1], bias)


def _run_step(
    ref: Refs,
    cut: AnyCut,
    accumulate: Callable[[Block, Any, Any], None],
    complete: Callable[[Any], None],
    normalize: Callable[[Block, Any, Any], None] | None,
    *,
    begin: Callable[[], None] | None = None,
) -> None:
    """Does the work of one grid step, which has one block.

    Args:
      ref: the refs. The partials are zeroed before the first of several blocks. If x
        is kept, `normalize` works on the previous unit, from its kept blocks.
      cut: how the array is cut.
      accumulate: takes (block, sample, tile); adds each sample and tile to the sums.
      complete: takes (unit); runs after the unit's last block is added.
      normalize: takes (block, sample, tile); stores a complete unit's results; or None.
      begin: runs before a unit's first block, or None.
    """
    core, turn = pl.program_id(0), pl.program_id(1)
    block = pl.program_id(2), pl.program_id(3)
    unit, units = core * cut.units_of_core + turn, cut.units_in(core)
    block_index = cut.block_index(block)

    def accumulate_block() -> None:
        @pl.when(block_index == 0)
        def _() -> None:
            if cut.blocks > 1:
                ref["partials"][...] = jnp.zeros_like(ref["partials"])
            if begin is not None:
                begin()

        cut.over_tiles(unit, functools.partial(accumulate, block))

        @pl.when(block_index == cut.blocks - 1)
        def _() -> None:
            complete(unit)

    def normalize_block(unit: Any) -> None:
        if normalize is not None:
            cut.over_tiles(unit, functools.partial(normalize, block))

    def do_both() -> None:
        accumulate_block()
        normalize_block(unit)

    if "kept_x" in ref:
        # Normalize the kept block before the next unit's block takes its place.
        pl.when((turn > 0) & (turn <= units))(lambda: normalize_block(unit - 1))
        pl.when(turn < units)(accumulate_block)
    elif cut.is_even:
        do_both()
    else:
        pl.when(turn < units)(do_both)


# --- the launch -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """A mapping of a call's arrays to a kernel's.

    Attributes:
      call: the call.
      order: x's axes in memory order, from slowest to fastest.
      cut: how the array in that order is cut.
      normalizes: whether the kernel normalizes; otherwise XLA does.
      vmem: bytes of VMEM that the kernel needs.
    """

    call: Call
    order: tuple[int, ...]
    cut: AnyCut
    normalizes: bool
    vmem: int

    @property
    def deferred(self) -> bool:
        """Whether blocks are kept, and normalized once their unit is complete."""
        return self.normalizes and self.cut.blocks > 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Grid of the kernel: cores, then per core units and their blocks."""
        return self.cut.cores, self.cut.units_of_core + self.deferred, *self.cut.grid

    def forward(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        shortcut: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Computes y, and with `call.statistics` also mean (if centred) and var.

        Bytes: x, the shortcut and y once each (with two reads, x once more), plus 4
        bytes per statistic of each channel.

        Args:
          x: any shape; float32, bfloat16 or float16, like the other arrays.
          scale, bias: shape (channels,), or None.
          shortcut: x's shape, or None.
        """
        if self.normalizes:
            y, mean, var = self._forward(x, scale, bias, shortcut)
        else:
            _, mean, var = self._forward(x)
            norm = self.call.norm
            y = reference.apply(norm, x, mean, var, scale, bias, shortcut)
        results = (y, mean, var) if self.call.statistics else (y,)
        return [array for array in results if array is not None]

    def moments(self, x: jax.Array, *params: None) -> list[jax.Array]:
        """Computes mean (if centred) and var in the statistics' shape; reads x once."""
        _, mean, var = self._forward(x)
        return [var] if mean is None else [mean, var]

    def _forward(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        shortcut: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Runs the forward kernel: y, mean and var, each None if it is not wanted."""
        cut, norm = self.cut, self.call.norm
        summed, normalized = self._summed, self._normalized
        x = self._to_view(x)
        if shortcut is not None:
            shortcut = self._to_view(shortcut)
        y = memory.result(x, cut.view, norm.dtype) if self.normalizes else None
        statistic = None
        if self.call.statistics or not self.normalizes:
            statistic = self._statistic_like(x)
        mean = statistic if norm.center else None
        found = memory.pallas_call(
            lambda ref: _forward_kernel(ref, cut, norm),
            "channelwise_forward",
            self.grid,
            self.vmem + SPILLED_BYTES,
            operands={
                "x": (x, cut.view_spec(summed)),
                "scale": (memory.row(scale), cut.param_spec(summed)),
                "bias": (memory.row(bias), cut.param_spec(summed)),
                "shortcut": (shortcut, cut.view_spec(normalized)),
            },
            results={
                "y": (y, cut.view_spec(normalized)),
                "mean": (mean, cut.statistic_spec(summed)),
                "var": (statistic, cut.statistic_spec(summed)),
            },
            scratch={
                "kept_x": self._kept_blocks(x.dtype),
                "partials": pltpu.VMEM((3, cut.unit, *cut.places), jnp.float32),
                "coefficients": self._values(3) if self.normalizes else None,
            },
        )
        statistics = map(self._per_group, (found.get("mean"), found.get("var")))
        return (self._from_view(found.get("y")), *statistics)

    def backward(
        self,
        dy: jax.Array,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        mean: jax.Array | None,
        var: jax.Array,
        dh: jax.Array | None = None,
        shortcut: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Computes the wanted gradients among dx, dscale, dbias and dshortcut.

        Bytes: x, dy and dx once each (with two reads, x once more, and dy or, in its
        place, dz); the shortcut and its gradient; 4 bytes per statistic of each
        channel. XLA adds dh to dx, which moves dh, and with one read dx twice more.

        Args:
          dy, x: the same shape; each float32, bfloat16 or float16.
          scale: shape (channels,), or None.
          bias: shape (channels,), for an activation; or None.
          mean, var: the forward's statistics, float32.
          dh: x's shape, or None.
          shortcut: x's shape, for an activation; or None.

        Returns:
          dx in x's shape and dtype; dscale and dbias in float32, of shape (channels,)
          after the leading axes of x that `call.own_params` counts; dshortcut in the
          shortcut's shape and dtype.
        """
        norm, wants = self.call.norm, self.call.wants
        operands = (dy, x, scale, bias, mean, var)
        dscale, dbias, c1, c2, dz, dx = self._backward(*operands, shortcut)
        if dz is None and not self.normalizes:
            dz = reference.before_activation(norm, *operands, shortcut)
        if self.normalizes:
            if dh is not None:
                dx = dx.astype(jnp.float32) + dh.astype(jnp.float32)
            dx = dx.astype(x.dtype)
        elif wants["dx"]:
            dx = reference.input_gradient(norm, dz, x, scale, mean, var, c1, c2, dh=dh)
        dshortcut = None
        if wants["dshortcut"]:
            assert shortcut is not None
            dshortcut = dz.astype(shortcut.dtype)
        gradients = (dx, dscale, dbias, dshortcut)
        return list(itertools.compress(gradients, self.call.wanted))

    def sums(
        self,
        dy: jax.Array,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        mean: jax.Array | None,
        var: jax.Array,
        shortcut: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Computes the sums of a backward; reads x and dy once.

        Returns:
          c1 and c2 (if centred) in the statistics' shape, if dx is wanted; then dscale
          and dbias, as far as they are wanted.
        """
        operands = (dy, x, scale, bias, mean, var)
        dscale, dbias, c1, c2, *_ = self._backward(*operands, shortcut)
        return [array for array in (c1, c2, dscale, dbias) if array is not None]

    def _backward(
        self,
        dy: jax.Array,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        mean: jax.Array | None,
        var: jax.Array,
        shortcut: jax.Array | None,
    ) -> tuple[Any, ...]:
        """Runs the backward kernel: dscale, dbias, c1, c2, dz and dx, or None for each.

        c1 and c2 are None with one read, dx with two reads; for dz see `_dz_dtype`.
        """
        cut, norm, slopes = self.cut, self.call.norm, self.call.slopes
        summed, normalized, wants = self._summed, self._normalized, self.call.wants
        if shortcut is not None:
            shortcut = self._to_view(shortcut)
        dy, x = self._to_view(dy), self._to_view(x)
        partials = (cut.cores, cut.examples, 1, cut.channels)
        dparam = memory.result(x, partials, jnp.float32), cut.gradient_spec(summed)
        c = self._statistic_like(x) if wants["dx"] and not self.normalizes else None
        dx = memory.result(x, cut.view, x.dtype) if self.normalizes else None
        dz_dtype = _dz_dtype(self.call, normalizes=self.normalizes)
        dz = None if dz_dtype is None else memory.result(x, cut.view, dz_dtype)
        scale_row = memory.row(scale) if wants["dx"] or slopes else None
        kept = "kept_dy" if shortcut is None else "kept_dz"
        coefficients = self._values(4 + 2 * slopes) if self.normalizes else None
        found = memory.pallas_call(
            lambda ref: _backward_kernel(ref, cut, norm),
            "channelwise_backward",
            self.grid,
            self.vmem + SPILLED_BYTES,
            operands={
                "dy": (dy, cut.view_spec(summed)),
                "x": (x, cut.view_spec(summed)),
                "scale": (scale_row, cut.param_spec(summed)),
                "bias": (memory.row(bias), cut.param_spec(summed)),
                "mean": (self._per_channel(mean), cut.statistic_spec(summed)),
                "var": (self._per_channel(var), cut.statistic_spec(summed)),
                "shortcut": (shortcut, cut.view_spec(summed)),
            },
            results={
                "dx": (dx, cut.view_spec(normalized)),
                "dz": (dz, cut.view_spec(summed)),
                **dict.fromkeys(self.call.summed, dparam),
                "c1": (c, cut.statistic_spec(summed)),
                "c2": (c if norm.center else None, cut.statistic_spec(summed)),
            },
            scratch={
                kept: self._kept_blocks(self.call.dy_kept),
                "kept_x": self._kept_blocks(x.dtype),
                "mean_values": self._values() if norm.center else None,
                "affine_values": self._values(2) if slopes else None,
                "partials": pltpu.VMEM((2, cut.unit, *cut.places), jnp.float32),
                "coefficients": coefficients,
            },
        )
        params = map(self._sum_cores, (found.get("dscale"), found.get("dbias")))
        means = map(self._per_group, (found.get("c1"), found.get("c2")))
        tensors = map(self._from_view, (found.get("dz"), found.get("dx")))
        return *params, *means, *tensors

    def _sum_cores(self, partials: jax.Array | None) -> jax.Array | None:
        """Reduces dscale or dbias [cores, examples, 1, channels] to its own shape.

        That is (channels,) after the leading axes of x that `call.own_params` counts.
        """
        if partials is None:
            return None
        if self.cut.cores > 1:
            visited = self.cut.visited
            if not visited.all():  # a core leaves the others unwritten
                visited = visited.repeat(self.cut.strip, -1)[:, :, None]
                partials = jnp.where(visited, partials, 0)
            partials = partials.sum(0)
        leading = self.call.x.shape[: self.call.own_params]
        return partials.reshape(*leading, self.cut.channels)

    # Grid steps: (core, turn, *block).

    def _summed(self, core: Any, turn: Any, *block: Any) -> tuple[Any, ...]:
        """Returns the unit and the block that a grid step adds to the sums.

        For a turn before a core's first unit, or after its last one, this is the
        nearest block, so that nothing is moved.
        """
        cut = self.cut
        first = core * cut.units_of_core
        if cut.is_even and not self.deferred:
            return first + turn, *block
        last = cut.units_in(core) - 1
        nearest = [
            jnp.where(turn < 0, 0, jnp.where(turn > last, n - 1, i))
            for n, i in zip(cut.grid, block, strict=True)
        ]
        return first + jnp.clip(turn, 0, last), *nearest

    def _normalized(self, core: Any, turn: Any, *block: Any) -> tuple[Any, ...]:
        """Returns the unit and the block that a grid step normalizes."""
        return self._summed(core, turn - 1 if self.deferred else turn, *block)

    # Scratch.

    def _kept_blocks(self, dtype: Any) -> Any:
        """Returns scratch for all blocks of a unit, or None if they are not kept."""
        if not self.deferred:
            return None
        shape = (self.cut.blocks, self.cut.unit, *self.cut.block)
        return pltpu.VMEM(shape, memory.kept_as(dtype))

    def _values(self, *count: int) -> Any:
        """Returns scratch for values per channel of a unit."""
        return pltpu.VMEM((*count, self.cut.unit, *self.cut.values), jnp.float32)

    # Conversions of x, y, dy and dx, and of values per channel.

    def _to_view(self, array: jax.Array) -> jax.Array:
        return lax.transpose(array, self.order).reshape(self.cut.view)

    def _from_view(self, array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        shape = [self.call.x.shape[axis] for axis in self.order]
        return lax.transpose(array.reshape(shape), inverse(self.order))

    def _statistic_like(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        """Describes mean, var, c1 or c2: [examples * sets, unit, channels]."""
        cut = self.cut
        shape = (cut.examples * cut.sets, cut.unit, cut.channels)
        return memory.result(x, shape, jnp.float32)

    def _per_group(self, values: jax.Array | None) -> jax.Array | None:
        """Picks one value per group from values per channel, in statistics' shape."""
        if values is None:
            return None
        cut = self.cut
        values = values.reshape(cut.examples, cut.sets * cut.unit, cut.channels)
        values = values[:, : cut.samples, :: cut.group]
        return values.reshape(self.call.norm.statistic_shape(self.call.x.shape))

    def _per_channel(self, statistic: jax.Array | None) -> jax.Array | None:
        """Broadcasts statistics per group to [examples * sets, unit, channels]."""
        if statistic is None:
            return None
        cut = self.cut
        groups = (cut.examples, cut.samples, cut.channels // cut.group)
        values = jnp.broadcast_to(
            statistic.reshape(*groups, 1), (*groups, cut.group)
        ).reshape(cut.examples, cut.samples, cut.channels)
        padding = cut.sets * cut.unit - cut.samples
        values = jnp.pad(values, ((0, 0), (0, padding), (0, 0)))
        return values.reshape(cut.examples * cut.sets, cut.unit, cut.channels)


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, chip: memory.Chip) -> Kernel | Fallback:
    """Chooses the cut and the variant for a call whose view has S > 1."""
    view = call.view
    for name, param in (("scale", call.scale), ("bias", call.bias)):
        if param is not None and len(param.shape) > 1:
            return Fallback(
                f"no kernel for TPUs yet for a channelwise norm whose {name} differs "
                f"from sample to sample: it has shape {param.shape}, a shared one is "
                f"({view.features},)"
            )
    layout = _layout(call, view)
    cuts = [
        _cut(call, layout, view, strip, chip.blocks)
        for strip in _strips(layout, view, chip.cores)
    ]
    fit = None
    if not call.sums_only:  # one read, in the widest strips that fit
        whole_units = (_fit(call, cut, chip.vmem, normalizes=True) for cut in cuts)
        fit = next(filter(None, whole_units), None)
    normalizes = fit is not None
    fit = fit or _fit(call, cuts[0], chip.vmem, normalizes=False)
    if fit is None:
        smallest = dataclasses.replace(cuts[0], unit=1)
        least = _vmem(call, smallest, normalizes=False)
        return Fallback(
            f"{view.features} channels: a block takes {least:,} bytes of VMEM, a "
            f"kernel may use {chip.vmem:,}"
        )
    cut = cast(AnyCut, fit.shared_by(chip.cores))
    vmem = _vmem(call, cut, normalizes=normalizes)
    launch = Launch(call, layout.order, cut, normalizes, vmem)
    run: Callable[..., list[jax.Array]]
    if call.op == "forward":
        run = launch.moments if call.half else launch.forward
    else:
        run = launch.sums if call.half else launch.backward
    variant, why = _variant(launch)
    direction = "down the sublanes" if layout.down else "across the lanes"
    unless_named = COPIED if layout.copied else ""
    if _is_of_images(call):
        unless_named = BETWEEN_CONVOLUTIONS
    return Kernel(
        backend="mosaic_tpu",
        name=f"channelwise {call.op}{variant}",
        launch=run,
        block=str(cut),
        why=f"channels {direction}; {why}",
        bytes_moved=_bytes_moved(call, cut, normalizes=normalizes),
        unless_named=unless_named,
    )


def _variant(launch: Launch) -> tuple[str, str]:
    """Returns the suffix of the kernel's name, and the reason for its variant."""
    call, cut = launch.call, launch.cut
    mib = cut.pixels * cut.strip * call.kept_bytes / 2**20
    if call.half:
        why = "statistics cross devices: XLA normalizes in a second read"
        return call.half_name, why
    if not call.wants["dx"]:
        return ", sums", "only sums are wanted: one read"
    if not launch.normalizes:
        return ", two reads", (
            f"a unit of {mib:.1f} MiB does not fit in VMEM: two reads, the second by "
            "XLA, which fuses the normalization with what follows"
        )
    if cut.blocks == 1:
        return "", "a block holds whole samples: one read"
    return "", f"a unit of {mib:.1f} MiB stays in VMEM: one read"


def _is_of_images(call: Call) -> bool:
    """Returns whether x has several axes of pixels, like a convolution's output."""
    return len(call.x.shape) - call.own_params > 3


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The memory layout of an array.

    Attributes:
      order: its axes, from slowest to fastest.
      examples, samples, slabs, rows: sizes, as in `Cut`.
      down: whether channels lie down the sublanes, and rows along the lanes.
      one_sample: whether an example is one sample whatever its size, as in BatchNorm.
      copied: whether the order differs from XLA's, so that XLA copies the array.
    """

    order: tuple[int, ...]
    examples: int
    samples: int
    slabs: int
    rows: int
    down: bool
    one_sample: bool = False
    copied: bool = False


def _layout(call: Call, view: Geometry) -> _Layout:
    shape, lead = call.x.shape, call.own_params
    last = len(shape) - 1
    examples = math.prod(shape[:lead])
    samples = view.n // examples
    reduced = [axis for axis in range(lead, last) if axis in call.norm.reduction_axes]
    # The first axis of pixels. The samples' axis stays before it even if it has size 1,
    # so that a single sample is cut like one of several.
    first = min(reduced, default=last)
    for axis in range(first, last):
        if shape[axis] > 1 and axis not in reduced:
            first = axis + 1
    natural = tuple(range(len(shape)))
    simple = (
        call.norm.feature_axes == (last,)
        and shape[-1] == view.features
        and math.prod(shape[lead:first]) == samples
    )
    if not simple:  # only the view tells the axes apart
        return _Layout(natural, examples, samples, 1, view.s, down=False)
    xla_order = order_of_axes(shape, call.x.dtype.itemsize, first)
    order = _with_full_sublanes(xla_order, shape, first)
    down = order[-1] != last
    axis = order[-1] if down else order[-2]
    rows = shape[axis] if axis >= first else 1
    slabs = view.s // rows
    if not down and rows % SUBLANES == 0:  # joined slabs fill the same tiles
        slabs, rows = 1, view.s
    one_sample = set(range(lead, last)) <= set(call.norm.reduction_axes)
    copied = order != xla_order
    return _Layout(order, examples, samples, slabs, rows, down, one_sample, copied)


def _with_full_sublanes(
    order: tuple[int, ...], shape: Sequence[int], first: int
) -> tuple[int, ...]:
    """Returns an order with 8 or more pixels along the sublanes, if an axis has them.

    Because 1500 is no multiple of 8, XLA puts one pixel into each tile of 1500 x 512
    float32. A kernel on that layout computes 20 to 35 times as long as it waits for
    memory (v5e, 7x: 1 x 1500 x 1280 in float32, 4 x 2 x 63 x 63 x 512 in bfloat16). The
    order returned here makes XLA copy x instead.
    """
    *_, sublane, lane = order
    if lane != len(shape) - 1 or shape[sublane] >= SUBLANES:
        return order
    full = [axis for axis in range(first, lane) if shape[axis] >= SUBLANES]
    if not full:
        return order
    others = [axis for axis in range(lane) if axis != full[-1]]
    return (*others, full[-1], lane)


def _strips(layout: _Layout, view: Geometry, cores: int) -> list[int]:
    """Returns widths of strips, from all channels down: whole groups and whole tiles.

    A single sample is split into at least one strip per core, if it has that many.
    """
    widths = [view.features]
    least = math.lcm(view.k, LANES)
    if not layout.down and view.features % least == 0:
        count = view.features // least
        widths += [least * n for n in range(count - 1, 0, -1) if count % n == 0]
    most = view.features // cores if layout.one_sample else view.features
    return [width for width in widths if width <= most] or widths


def _cut(
    call: Call, layout: _Layout, view: Geometry, strip: int, blocks_bytes: int
) -> AnyCut:
    """Cuts an array into strips of `strip` channels; all blocks take `blocks_bytes`."""
    itemsizes = [dtype.itemsize for dtype in _streamed(call)]
    packed = SUBLANES * 4 // min(itemsizes)  # sublanes of one register
    if layout.down:
        rows_tile, channels_tile = LANES, packed
    else:
        rows_tile, channels_tile = packed, LANES
    channels = round_up(strip, channels_tile)
    rows = round_up(layout.rows, rows_tile)

    # Rows of a chunk: a divisor of the array's rows, unless that is too small.
    chunk = REGISTERS[call.op] * SUBLANES * LANES  # elements
    chunk_channels = WIDE if min(itemsizes) == 2 and channels % WIDE == 0 else LANES
    if layout.down:
        chunk_channels = _divisor(channels, channels_tile, LANES // 2)
    most_rows = max(chunk // chunk_channels, rows_tile)
    chunk_rows = _divisor(rows, rows_tile, most_rows)
    if 2 * chunk_rows < min(most_rows, rows):
        chunk_rows = round_up(_even_part(rows, most_rows), rows_tile)

    block = max(blocks_bytes // (2 * sum(itemsizes)), 1)  # elements
    unit, slabs, rows = _block_size(layout.slabs, rows, channels, block, chunk_rows)

    # Where rows are few, a chunk has several slabs, or more channels side by side.
    most_slabs = min(chunk // (chunk_rows * chunk_channels), slabs)
    chunk_slabs = _divisor(layout.slabs, 1, most_slabs)
    if not layout.down:
        most_channels = chunk // (chunk_rows * chunk_slabs)
        chunk_channels = _divisor(channels, channels_tile, most_channels)
    kind = DownSublanes if layout.down else AcrossLanes
    return kind(
        cores=1,
        examples=layout.examples,
        samples=layout.samples,
        slabs=layout.slabs,
        rows=layout.rows,
        channels=view.features,
        group=view.k,
        strip=strip,
        unit=unit,
        block_slabs=round_up(slabs, chunk_slabs),
        block_rows=round_up(rows, chunk_rows),
        chunk_slabs=chunk_slabs,
        chunk_rows=chunk_rows,
        chunk_channels=chunk_channels,
    )


def _block_size(
    slabs: int, rows: int, channels: int, most: int, least_rows: int
) -> tuple[int, int, int]:
    """Returns the samples, slabs and rows of a block of up to `most` elements.

    A sample's strip has [slabs, rows, channels]. Part of a slab may have `least_rows`
    rows even if these are more elements.
    """
    slab = rows * channels
    if slabs * slab <= most:
        unit = min(power_of_two(most // (slabs * slab)), MOST_SAMPLES)
        return unit, slabs, rows
    if slabs > 1 and slab <= most:
        return 1, _even_part(slabs, most // slab), rows
    return 1, 1, _even_part(rows, max(most // channels, least_rows))


def _even_part(size: int, most: int) -> int:
    """Returns the largest part when `size` is cut into parts of up to `most`.

    The parts are as few as possible, and as equal as possible.
    """
    return pl.cdiv(size, pl.cdiv(size, most))


def _divisor(size: int, step: int, most: int) -> int:
    """Returns the largest multiple of `step` up to `most` that divides `size`.

    Without one it returns `step`.
    """
    multiples = range(step, max(most, step) + 1, step)
    return max(n for n in multiples if size % n == 0)


def _fit(call: Call, cut: AnyCut, vmem: int, *, normalizes: bool) -> AnyCut | None:
    """Halves a unit's samples until it fits `vmem`; None if one sample does not."""
    while _vmem(call, cut, normalizes=normalizes) > vmem:
        if cut.unit == 1:
            return None
        cut = dataclasses.replace(cut, unit=cut.unit // 2)
    return cut


def _vmem(call: Call, cut: AnyCut, *, normalizes: bool) -> int:
    """Returns the bytes of VMEM that a kernel needs."""
    block = cut.unit * math.prod(cut.block)
    streamed = _streamed(call, normalizes=normalizes)
    need = 2 * block * sum(dtype.itemsize for dtype in streamed)
    if normalizes and cut.blocks > 1:
        need += cut.blocks * block * call.kept_bytes
    # Scratch, and the values of `complete`: registers hold only a few of them.
    places = cut.unit * math.prod(cut.places) * 4
    values = cut.unit * math.prod(cut.values) * 4
    need += 3 * places + (5 + 4 * call.slopes + SPILLED) * values
    return need + OTHER_BYTES


def _read(call: Call, *, normalizes: bool = True) -> list[jnp.dtype]:
    """Returns the dtypes of the arrays of x's size that the kernel reads.

    Args:
      normalizes: whether the kernel normalizes.
    """
    arrays = [call.x, call.dy]
    if normalizes or call.op == "backward":
        arrays.append(call.shortcut)
    return [array.dtype for array in arrays if array is not None]


def _streamed(call: Call, *, normalizes: bool = True) -> list[jnp.dtype]:
    """Returns the dtypes of all arrays of x's size that the kernel reads or writes."""
    written = []
    if normalizes:
        written.append(call.norm.dtype if call.op == "forward" else call.x.dtype)
    if (dtype := _dz_dtype(call, normalizes=normalizes)) is not None:
        written.append(dtype)
    return [*_read(call, normalizes=normalizes), *written]


def _dz_dtype(call: Call, *, normalizes: bool) -> jnp.dtype | None:
    """Returns the dtype in which a backward writes dz, or None if it does not.

    In one read, dz is dshortcut. In two reads, XLA reads dz in the place of dy, if dy's
    dtype holds it without rounding.
    """
    if call.shortcut is None or not call.wants["dshortcut"]:
        return None
    if normalizes:
        return call.shortcut.dtype
    assert call.dy is not None
    return call.dy.dtype if call.dy_kept == call.dy.dtype else None


def _bytes_moved(call: Call, cut: AnyCut, *, normalizes: bool) -> int:
    """Returns the bytes read from and written to HBM."""
    wants = call.wants
    x_size, size = call.x.dtype.itemsize, math.prod(call.x.shape)
    streamed = _read(call)
    if call.op == "forward" and not call.half:
        streamed += [call.norm.dtype] if normalizes else [call.x.dtype, call.norm.dtype]
    elif wants["dx"] and not call.half:
        streamed.append(call.x.dtype)
        if not normalizes:  # x again, and dy, or dz in its place
            assert call.dy is not None
            streamed += [call.x.dtype, call.dy.dtype]
            if call.shortcut is not None and _dz_dtype(call, normalizes=False) is None:
                streamed.append(call.shortcut.dtype)
    if call.shortcut is not None and wants["dshortcut"]:
        streamed.append(call.shortcut.dtype)
    moved = size * sum(dtype.itemsize for dtype in streamed)
    statistics = 4 * cut.examples * cut.samples * cut.channels * (1 + call.norm.center)
    params = [p for p in (call.scale, call.bias) if p is not None]
    if call.op == "forward":
        moved += statistics * (call.statistics or not normalizes)
    else:
        if call.addend is not None:
            moved += size * (call.addend.dtype.itemsize + 2 * x_size * normalizes)
        moved += statistics * (2 if wants["dx"] and not normalizes else 1)
        params = params if wants["dx"] or call.slopes else []
        # Several cores write partial sums, which are read and reduced.
        sums = 1 if cut.cores == 1 else 2 * cut.cores + 1
        moved += 4 * len(call.summed) * sums * cut.examples * cut.channels
    return moved + sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
