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
from fusednorm.kernels import cost
from fusednorm.kernels.activation import activate, slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry, power_of_two
from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.blocks import inverse, order_of_axes
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up
from fusednorm.kernels.tpu.pixels import (
    AcrossLanes,
    AnyCut,
    Block,
    DownSublanes,
    loop,
)

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


def _forward_kernel(
    x_ref: Any,  # a block: [unit, slabs, rows, lanes] or [unit, slabs, sublanes, rows]
    scale_ref: Any,  # [1, lanes], or None
    bias_ref: Any,  # [1, lanes], or None
    shortcut_ref: Any,  # a block of the unit that is normalized, or None
    y_ref: Any,  # a block of the unit that is normalized, or None for statistics only
    mean_ref: Any,  # [unit, lanes] float32: each channel has its group's; or None
    var_ref: Any,  # [unit, lanes] float32: each channel has its group's; or None
    kept_x: Any,  # all blocks of a unit, or None
    seen: Any,  # [3, unit, *places] float32: count, mean, sum of squares about the mean
    found: Any,  # [3, unit, *values] float32: mean, rstd * scale, bias; or None
    *,
    cut: AnyCut,
    center: bool,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
) -> None:
    """Computes y, mean and variance, as far as they have a ref."""

    def add_up(block: Block, sample: Any, tile: Any) -> None:
        def step(chunks: Any, rows: int, before: Moments) -> Moments:
            def read(chunk: Any) -> jax.Array:
                here = cut.at(sample, chunk, tile)
                if kept_x is not None:
                    kept_x[cut.number(block), *here] = x_ref[here]
                return cut.as_places(memory.load(x_ref, here))

            return _add_chunks(cut, before, map(read, chunks), rows, center)

        at = cut.places_at(sample, tile)
        zero = jnp.zeros(cut.chunk_shape[2:], jnp.float32)
        first = zero
        if center:  # the first pixels are near enough to the mean
            first = cut.as_places(memory.load(x_ref, cut.at(sample, (0, 0), tile)))
            left = cut.rows - block[1] * cut.block_rows
            first = jnp.where(cut.first_places(left), first[0, 0], 0)
        of_block = cut.over_chunks(block, step, (zero, first, zero))
        if cut.blocks > 1:
            of_block = _merge(tuple(seen[i, *at] for i in range(3)), of_block)
        for i, value in enumerate(of_block):
            seen[i, *at] = value

    def complete(_: Any) -> None:
        means, m2s = (functools.partial(cut.by_place, seen.at[i]) for i in (1, 2))
        if center:
            of_places = zip(cut.counts, means(), strict=True)
            mean = cut.sum_places(n * mean for n, mean in of_places) * (1 / cut.pixels)
            m2 = cut.sum_places(
                m2 + n * ((of_place - mean) * (of_place - mean))
                for n, of_place, m2 in zip(cut.counts, means(), m2s(), strict=True)
            )
            mean, m2 = cut.merge_groups(mean, m2)
        else:
            m2 = cut.sum_groups(cut.sum_places(m2s()))
        var = m2 * (1 / (cut.pixels * cut.group))
        if mean_ref is not None:
            mean_ref[...] = cut.to_row(mean)
        if var_ref is not None:
            var_ref[...] = cut.to_row(var)
        if y_ref is not None:
            if center:
                cut.keep(found.at[0], mean)
            rstd = lax.rsqrt(var + epsilon)
            _keep_affine(cut, found, 1, rstd, scale_ref, bias_ref, weight)

    def normalize(block: Block, sample: Any, tile: Any) -> None:
        at = cut.places_at(sample, tile)
        source = x_ref if kept_x is None else kept_x.at[cut.number(block)]

        def step(chunks: Any, _: int, __: None) -> None:
            for chunk in chunks:
                mean, factor, bias = (found[i, *at] for i in range(3))
                here = cut.at(sample, chunk, tile)
                y = cut.as_places(memory.load(source, here))
                if center:
                    y = y - mean
                y = y * factor
                if bias_ref is not None:
                    y = y + bias
                if shortcut_ref is not None:
                    y = y + cut.as_places(memory.load(shortcut_ref, here))
                memory.store(y_ref, here, cut.as_block(activate(activation, y)))

        cut.over_chunks(block, step, None)

    _for_each_unit(
        cut,
        seen,
        add_up,
        complete,
        normalize if y_ref is not None else None,
        deferred=kept_x is not None,
    )


# Count, mean, and sum of squares about the mean, of some pixels, place by place.
# Without centring, the squares are about 0.
Moments = tuple[jax.Array, jax.Array, jax.Array]


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
        count = count + cut.count(rows)
        apart = x - mean if center else x
        s2 = s2 + cut.add_registers(apart * apart, rows)
        if center:
            s1 = s1 + cut.add_registers(apart, rows)
    if not center:
        return count, mean, m2 + s2
    shift = s1 / jnp.maximum(count, 1)
    return count, mean + shift, m2 + (s2 - s1 * shift)


def _merge(a: Moments, b: Moments) -> Moments:
    """Merges two sets of moments (Chan et al. 1983, eq. 2.1); a count may be 0."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    share = n_b / jnp.maximum(n, 1)
    apart = mean_b - mean_a
    return n, mean_a + apart * share, m2_a + m2_b + apart * apart * (n_a * share)


# --- backward -------------------------------------------------------------------------


def _backward_kernel(
    dy_ref: Any,  # a block: [unit, slabs, rows, lanes] or [unit, slabs, sublanes, rows]
    x_ref: Any,  # a block, like dy_ref
    scale_ref: Any,  # [1, lanes], or None
    bias_ref: Any,  # [1, lanes], for an activation; or None
    mean_ref: Any,  # [unit, lanes] float32: each channel has its group's; or None
    var_ref: Any,  # [unit, lanes] float32: each channel has its group's
    shortcut_ref: Any,  # a block, for an activation; or None
    dx_ref: Any,  # a block of the unit that is normalized, or None
    dz_ref: Any,  # a block, or None
    dscale_ref: Any,  # [1, lanes] float32, or None
    dbias_ref: Any,  # [1, lanes] float32, or None
    c1_ref: Any,  # [unit, lanes] float32: mean(w * x_hat); or None
    c2_ref: Any,  # [unit, lanes] float32: mean(w); or None
    kept_dy: Any,  # all blocks of a unit: dy, or dz if there is a shortcut; or None
    kept_x: Any,  # all blocks of a unit: x; or None
    center_at: Any,  # [unit, *values] float32: mean of the unit being summed; or None
    affine_at: Any,  # [2, unit, *values] float32: factor and bias of z; or None
    seen: Any,  # [2, unit, *places] float32: sum(dz * (x - mean)), sum(dz)
    found: Any,  # [4, or 6, unit, *values] float32: mean, factors of dx, affine_at
    *,
    cut: AnyCut,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
) -> None:
    """Computes dx, dz, dscale, dbias, c1 and c2, as far as they have a ref."""
    center = mean_ref is not None

    def begin() -> None:
        if center:
            cut.keep(center_at, cut.from_row(mean_ref[...]))
        if affine_at is not None:
            rstd = lax.rsqrt(cut.from_row(var_ref[...]) + epsilon)
            _keep_affine(cut, affine_at, 0, rstd, scale_ref, bias_ref, weight)

    def before_activation(
        dy: jax.Array, centred: jax.Array, affine: Any, here: Any
    ) -> jax.Array:
        """Returns dz = dy * act'(z)."""
        if activation is None:
            return dy
        factor, bias = affine
        z = centred * factor
        if bias_ref is not None:
            z = z + bias
        if shortcut_ref is not None:
            z = z + cut.as_places(memory.load(shortcut_ref, here))
        return dy * slope(activation, z)

    def add_up(block: Block, sample: Any, tile: Any) -> None:
        at = cut.places_at(sample, tile)
        mean = center_at[at] if center else None
        affine = None if affine_at is None else (affine_at[0, *at], affine_at[1, *at])

        def step(
            chunks: Any, rows: int, totals: Sequence[jax.Array]
        ) -> Sequence[jax.Array]:
            for chunk in chunks:
                here = cut.at(sample, chunk, tile)
                if kept_x is not None:
                    kept_x[cut.number(block), *here] = x_ref[here]
                    if shortcut_ref is None:
                        kept_dy[cut.number(block), *here] = dy_ref[here]
                x = cut.as_places(memory.load(x_ref, here))
                dy = cut.as_places(memory.load(dy_ref, here))
                centred = x if mean is None else x - mean
                dz = before_activation(dy, centred, affine, here)
                if dz_ref is not None:
                    memory.store(dz_ref, here, cut.as_block(dz))
                if kept_dy is not None and shortcut_ref is not None:
                    kept = kept_dy.at[cut.number(block)]
                    memory.store(kept, here, cut.as_block(dz))
                terms = dz * centred, dz
                totals = [
                    total + cut.add_registers(term, rows)
                    for total, term in zip(totals, terms, strict=True)
                ]
            return totals

        zero = jnp.zeros(cut.chunk_shape[2:], jnp.float32)
        for i, value in enumerate(cut.over_chunks(block, step, [zero, zero])):
            seen[i, *at] = value if cut.blocks == 1 else seen[i, *at] + value

    def complete(unit: Any) -> None:
        rstd = lax.rsqrt(cut.from_row(var_ref[...]) + epsilon)
        dscale, dbias = (cut.sum_places(cut.by_place(seen.at[i])) for i in range(2))
        dscale = dscale * rstd
        for ref, value in ((dscale_ref, dscale), (dbias_ref, dbias)):
            if ref is not None:
                _add_samples(cut, unit, ref, cut.to_row(value))
        scale: Any = 1.0
        if scale_ref is not None:
            scale = weight(cut.from_row(memory.load(scale_ref)))
        per_group = 1 / (cut.pixels * cut.group)
        c1 = cut.sum_groups(dscale * scale) * per_group
        c2 = cut.sum_groups(dbias * scale) * per_group
        for ref, mean in ((c1_ref, c1), (c2_ref, c2)):
            if ref is not None:
                ref[...] = cut.to_row(mean)
        if dx_ref is not None:
            if center:
                found[0] = center_at[...]
                cut.keep(found.at[3], rstd * c2)
            cut.keep(found.at[1], rstd * scale)
            cut.keep(found.at[2], rstd * rstd * c1)
            if affine_at is not None:
                found[4], found[5] = affine_at[0], affine_at[1]

    def store_dx(block: Block, sample: Any, tile: Any) -> None:
        at = cut.places_at(sample, tile)
        from_x = x_ref if kept_x is None else kept_x.at[cut.number(block)]
        from_dy = dy_ref if kept_dy is None else kept_dy.at[cut.number(block)]

        def step(chunks: Any, _: int, __: None) -> None:
            for chunk in chunks:
                mean, of_dy, of_x, rest = (found[i, *at] for i in range(4))
                here = cut.at(sample, chunk, tile)
                x = cut.as_places(memory.load(from_x, here))
                dy = cut.as_places(memory.load(from_dy, here))
                centred = x - mean if center else x
                affine = None
                if affine_at is not None:
                    affine = found[4, *at], found[5, *at]
                dz = dy
                if kept_dy is None or shortcut_ref is None:
                    dz = before_activation(dy, centred, affine, here)
                dx = dz * of_dy - centred * of_x
                if center:
                    dx = dx - rest
                memory.store(dx_ref, here, cut.as_block(dx))

        cut.over_chunks(block, step, None)

    _for_each_unit(
        cut,
        seen,
        add_up,
        complete,
        store_dx if dx_ref is not None else None,
        deferred=kept_x is not None,
        begin=begin,
    )


def _add_samples(cut: AnyCut, unit: Any, total: Any, rows: jax.Array) -> None:
    """Adds a unit's rows to `total`; a core's first unit of a strip overwrites it."""
    if cut.samples % cut.unit:
        sample = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(sample < cut.samples_in(unit), rows, 0)
    row = jnp.sum(rows, 0, keepdims=True)
    total[...] = jnp.where(cut.is_first(unit), row, total[...] + row)


# --- both -----------------------------------------------------------------------------


def _keep_affine(
    cut: AnyCut,
    kept: Any,
    first: int,
    rstd: Any,
    scale_ref: Any,
    bias_ref: Any,
    weight: Callable[[Any], Any],
) -> None:
    """Stores, from kept[first] on, the factor and bias that turn x - mean into z."""
    factor = rstd
    if scale_ref is not None:
        factor = factor * weight(cut.from_row(memory.load(scale_ref)))
    cut.keep(kept.at[first], factor)
    if bias_ref is not None:
        cut.keep(kept.at[first + 1], cut.from_row(memory.load(bias_ref)))


def _for_each_unit(
    cut: AnyCut,
    seen: Any,
    add_up: Callable[[Block, Any, Any], None],
    complete: Callable[[Any], None],
    finish: Callable[[Block, Any, Any], None] | None,
    *,
    deferred: bool,
    begin: Callable[[], None] | None = None,
) -> None:
    """Does the work of one grid step, which has one block.

    Args:
      cut: how the array is cut.
      seen: scratch for a unit's sums, set to zero before the first of several blocks.
      add_up: takes (block, sample, tile); adds each sample and tile to the sums.
      complete: takes (unit); runs after the unit's last block is added.
      finish: takes (block, sample, tile); stores a complete unit's results; or None.
      deferred: whether `finish` works on the previous unit, from its kept blocks.
      begin: runs before a unit's first block, or None.
    """
    core, turn = pl.program_id(0), pl.program_id(1)
    block = pl.program_id(2), pl.program_id(3)
    unit, units = core * cut.units_of_core + turn, cut.units_in(core)
    number = cut.number(block)

    def over(unit: Any, do: Callable[[Block, Any, Any], None]) -> None:
        *_, tiles_at_once, samples_at_once = cut.at_once

        def of_samples(samples: Sequence[Any], _: None) -> None:
            def of_tiles(tiles: Sequence[Any], _: None) -> None:
                for sample, tile in itertools.product(samples, tiles):
                    do(block, sample, tile)

            loop(cut.tiles, tiles_at_once, of_tiles, None)

        loop(cut.samples_in(unit), samples_at_once, of_samples, None)

    def gather() -> None:
        @pl.when(number == 0)
        def _() -> None:
            if cut.blocks > 1:
                seen[...] = jnp.zeros_like(seen)
            if begin is not None:
                begin()

        over(unit, add_up)

        @pl.when(number == cut.blocks - 1)
        def _() -> None:
            complete(unit)

    if deferred and finish is not None:
        # Finish the kept block before the next unit's block takes its place.
        pl.when((turn > 0) & (turn <= units))(lambda: over(unit - 1, finish))
        pl.when(turn < units)(gather)
        return

    def at_once() -> None:
        gather()
        if finish is not None:
            over(unit, finish)

    if cut.is_even:
        at_once()
    else:
        pl.when(turn < units)(at_once)


# --- the launch -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """A mapping of a call's arrays to a kernel's.

    Attributes:
      call: the call.
      order: x's axes in memory order, from slowest to fastest.
      cut: how the array in that order is cut.
      whole: whether the kernel normalizes; otherwise XLA does.
      vmem: bytes of VMEM that the kernel needs.
    """

    call: Call
    order: tuple[int, ...]
    cut: AnyCut
    whole: bool
    vmem: int

    @property
    def deferred(self) -> bool:
        """Whether blocks are kept, and normalized once their unit is complete."""
        return self.whole and self.cut.blocks > 1

    def forward(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        mask: None = None,
        shortcut: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Computes y, and with `call.statistics` also mean (if centred) and var.

        Bytes: x, the shortcut and y once each (with two reads, x once more), plus 4
        bytes per statistic of each channel.

        Args:
          x: any shape; float32, bfloat16 or float16, like the other arrays.
          scale, bias: shape (channels,), or None.
          mask: None.
          shortcut: x's shape, or None.
        """
        norm, statistics = self.call.norm, self.call.statistics
        if not self.whole:
            *mean, var = self.moments(x)
            mean_or_none = mean[0] if mean else None
            y = reference.apply(norm, x, mean_or_none, var, scale, bias, shortcut)
            return [y, *mean, var] if statistics else [y]
        y, mean, var = self._forward(x, scale, bias, shortcut, statistics=statistics)
        found = [self._from_view(y), self._of_groups(mean), self._of_groups(var)]
        return [array for array in found if array is not None]

    def moments(self, x: jax.Array, *others: None) -> list[jax.Array]:
        """Computes mean (if centred) and var in the statistics' shape; reads x once."""
        _, *found = self._forward(x, None, None, None, statistics=True)
        of_groups = map(self._of_groups, found)
        return [array for array in of_groups if array is not None]

    def _forward(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        shortcut: jax.Array | None,
        *,
        statistics: bool,
    ) -> Any:
        cut, norm = self.cut, self.call.norm
        x = self._to_view(x)
        beside = None if shortcut is None else self._to_view(shortcut)
        y = memory.result(x, cut.view, norm.dtype) if self.whole else None
        statistic = self._of_channels_like(x) if statistics else None
        return self._pallas_call(
            functools.partial(
                _forward_kernel,
                cut=cut,
                center=norm.center,
                epsilon=norm.epsilon,
                activation=norm.activation,
                weight=norm.weight,
            ),
            "channelwise_forward",
            operands=[
                (x, cut.spec),
                (memory.row(scale), cut.spec_of_params),
                (memory.row(bias), cut.spec_of_params),
                (beside, cut.spec),
            ],
            results=[
                (y, cut.spec),
                (statistic if norm.center else None, cut.spec_of_statistics),
                (statistic, cut.spec_of_statistics),
            ],
            finished=[beside, y],
            kept=[x.dtype],
            scratch=[
                pltpu.VMEM((3, cut.unit, *cut.places), jnp.float32),
                self._values(3) if self.whole else None,
            ],
        )

    def backward(
        self,
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
        """Computes the wanted gradients among dx, dscale, dbias and dshortcut.

        Bytes: x, dy and dx once each (with two reads, x once more, and dy or, in its
        place, dz); the shortcut and its gradient; 4 bytes per statistic of each
        channel. XLA adds dh to dx, which moves dh, and with one read dx twice more.

        Args:
          dy, x: the same shape; each float32, bfloat16 or float16.
          scale: shape (channels,), or None.
          bias: shape (channels,), for an activation; or None.
          mean, var: the forward's statistics, float32.
          mask: None.
          dh: x's shape, or None.
          shortcut: x's shape, for an activation; or None.

        Returns:
          dx in x's shape and dtype; dscale and dbias in float32, of shape (channels,)
          after the leading axes of x that `call.own_params` counts; dshortcut in the
          shortcut's shape and dtype.
        """
        wants_dx, wants_dscale, wants_dbias, wants_dshortcut = self.call.wanted
        operands = (dy, x, scale, bias, mean, var)
        dx, dz, dscale, dbias, c1, c2 = self._backward(*operands, shortcut)
        if dz is not None:
            dz = self._from_view(dz)
        elif not self.whole:
            dz = reference.before_activation(self.call.norm, *operands, shortcut)
        found = []
        if wants_dx:
            if self.whole:
                dx = self._from_view(dx)
                if dh is not None:
                    dx = dx.astype(jnp.float32) + dh.astype(jnp.float32)
                found = [dx.astype(x.dtype)]
            else:
                found = [
                    reference.input_gradient(
                        self.call.norm, dz, x, scale, mean, var, c1, c2, dh=dh
                    )
                ]
        if wants_dscale:
            found.append(dscale)
        if wants_dbias:
            found.append(dbias)
        if wants_dshortcut:
            assert shortcut is not None
            found.append(dz.astype(shortcut.dtype))
        return found

    def sums(
        self,
        dy: jax.Array,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        mean: jax.Array | None,
        var: jax.Array,
        mask: None = None,
        shortcut: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Computes the sums of a backward; reads x and dy once.

        Returns:
          c1 and c2 (if centred) in the statistics' shape, if dx is wanted; then dscale
          and dbias, as far as they are wanted.
        """
        operands = (dy, x, scale, bias, mean, var)
        *_, dscale, dbias, c1, c2 = self._backward(*operands, shortcut)
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
    ) -> Any:
        cut, norm = self.cut, self.call.norm
        wants_dx, wants_dscale, wants_dbias, _ = self.call.wanted
        slopes = self.call.slopes
        beside = None if shortcut is None else self._to_view(shortcut)
        dy, x = self._to_view(dy), self._to_view(x)
        gradient = memory.result(
            x, (cut.cores, cut.examples, 1, cut.channels), jnp.float32
        )
        inner = self._of_channels_like(x) if wants_dx and not self.whole else None
        dx = memory.result(x, cut.view, self.call.x.dtype) if self.whole else None
        dz = None
        if (dtype := _dz_dtype(self.call, whole=self.whole)) is not None:
            dz = memory.result(x, cut.view, dtype)

        dx, dz, dscale, dbias, c1, c2 = self._pallas_call(
            functools.partial(
                _backward_kernel,
                cut=cut,
                epsilon=norm.epsilon,
                activation=norm.activation,
                weight=norm.weight,
            ),
            "channelwise_backward",
            operands=[
                (dy, cut.spec),
                (x, cut.spec),
                (memory.row(scale) if wants_dx or slopes else None, cut.spec_of_params),
                (memory.row(bias), cut.spec_of_params),
                (self._of_channels(mean), cut.spec_of_statistics),
                (self._of_channels(var), cut.spec_of_statistics),
                (beside, cut.spec),
            ],
            results=[
                (dx, cut.spec),
                (dz, cut.spec),
                (gradient if wants_dscale else None, cut.spec_of_gradients),
                (gradient if wants_dbias else None, cut.spec_of_gradients),
                (inner, cut.spec_of_statistics),
                (inner if norm.center else None, cut.spec_of_statistics),
            ],
            finished=[dx],
            kept=[self.call.dy_kept, x.dtype],
            scratch=[
                self._values() if norm.center else None,
                self._values(2) if slopes else None,
                pltpu.VMEM((2, cut.unit, *cut.places), jnp.float32),
                self._values(4 + 2 * slopes) if self.whole else None,
            ],
        )
        params = map(self._of_params, (dscale, dbias))
        return dx, dz, *params, self._of_groups(c1), self._of_groups(c2)

    def _of_params(self, of_cores: jax.Array | None) -> jax.Array | None:
        """Returns dscale or dbias, after the axes of x that keep one of their own."""
        if of_cores is None:
            return None
        own = self.call.x.shape[: self.call.own_params]
        return self._add_cores(of_cores).reshape(*own, self.cut.channels)

    def _add_cores(self, of_cores: jax.Array) -> jax.Array:
        """Reduces dscale or dbias over the cores to [examples, 1, channels]."""
        if self.cut.cores == 1:
            return of_cores
        visited = self.cut.visited
        if not visited.all():  # a core leaves the others unwritten
            visited = visited.repeat(self.cut.strip, -1)[:, :, None]
            of_cores = jnp.where(visited, of_cores, 0)
        return of_cores.sum(0)

    def _pallas_call(
        self,
        kernel: Callable[..., None],
        name: str,
        *,
        operands: Sequence[tuple[jax.Array | None, Any]],
        results: Sequence[tuple[jax.ShapeDtypeStruct | None, Any]],
        finished: Sequence[Any],
        kept: Sequence[Any],
        scratch: Sequence[Any],
    ) -> Any:
        """Runs a kernel over operands, results and scratch; None stays None.

        Args:
          operands, results: each with the method that makes its block spec.
          finished: the operands and results that belong to a complete unit.
          kept: dtypes of the arrays whose blocks stay in VMEM; their scratch comes
            before the rest.
        """
        cut = self.cut

        def now(core: Any, turn: Any, *block: Any) -> tuple[Any, ...]:
            """Returns the unit and the block of a step.

            For a turn before a core's first unit, or after its last one, this is the
            nearest block, so that nothing is moved.
            """
            first = core * cut.units_of_core
            if cut.is_even and not self.deferred:
                return first + turn, *block
            last = cut.units_in(core) - 1
            nearest = [
                jnp.where(turn < 0, 0, jnp.where(turn > last, n - 1, i))
                for n, i in zip(cut.grid, block, strict=True)
            ]
            return first + jnp.clip(turn, 0, last), *nearest

        def before(core: Any, turn: Any, *block: Any) -> tuple[Any, ...]:
            return now(core, turn - 1, *block)

        def spec_of(array: Any, spec: Any) -> Any:
            if array is None:
                return None
            is_finished = any(array is one for one in finished)
            return spec(before if self.deferred and is_finished else now)

        keep = [
            pltpu.VMEM((cut.blocks, cut.unit, *cut.block), memory.kept_as(dtype))
            if self.deferred
            else None
            for dtype in kept
        ]
        grid = (cut.cores, cut.units_of_core + self.deferred, *cut.grid)
        return pl.pallas_call(
            kernel,
            name=name,
            grid=grid,
            in_specs=tuple(itertools.starmap(spec_of, operands)),
            out_shape=tuple(shape for shape, _ in results),
            out_specs=tuple(itertools.starmap(spec_of, results)),
            scratch_shapes=(*keep, *scratch),
            compiler_params=memory.compiler_params(grid, self.vmem + SPILLED_BYTES),
            cost_estimate=cost.estimate(array for array, _ in (*operands, *results)),
        )(*[memory.bits(array) for array, _ in operands])

    # Conversions of x, y, dy and dx, and of values per channel.

    def _to_view(self, array: jax.Array) -> jax.Array:
        return lax.transpose(array, self.order).reshape(self.cut.view)

    def _from_view(self, array: jax.Array) -> jax.Array:
        shape = [self.call.x.shape[axis] for axis in self.order]
        return lax.transpose(array.reshape(shape), inverse(self.order))

    def _values(self, *count: int) -> Any:
        """Returns scratch for values per channel of a unit."""
        return pltpu.VMEM((*count, self.cut.unit, *self.cut.values), jnp.float32)

    def _of_channels_like(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        cut = self.cut
        shape = (cut.examples * cut.sets, cut.unit, cut.channels)
        return memory.result(x, shape, jnp.float32)

    def _of_groups(self, of_channels: jax.Array | None) -> jax.Array | None:
        """Picks one value per group from values per channel, in statistics' shape."""
        if of_channels is None:
            return None
        cut = self.cut
        shape = (cut.examples, cut.sets * cut.unit, cut.channels)
        of_groups = of_channels.reshape(shape)[:, : cut.samples, :: cut.group]
        return of_groups.reshape(self.call.norm.statistic_shape(self.call.x.shape))

    def _of_channels(self, of_groups: jax.Array | None) -> jax.Array | None:
        """Broadcasts statistics per group to [examples * sets, unit, channels]."""
        if of_groups is None:
            return None
        cut = self.cut
        shape = (cut.examples, cut.samples, cut.channels // cut.group, 1)
        of_groups = jnp.broadcast_to(
            of_groups.reshape(shape), (*shape[:-1], cut.group)
        ).reshape(cut.examples, cut.samples, cut.channels)
        more = cut.sets * cut.unit - cut.samples
        of_groups = jnp.pad(of_groups, ((0, 0), (0, more), (0, 0)))
        return of_groups.reshape(cut.examples * cut.sets, cut.unit, cut.channels)


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, view: Geometry, chip: memory.Chip) -> Kernel | Fallback:
    """Chooses the cut and the variant for a call whose view has S > 1.

    Args:
      call: the call.
      view: its view x[N, S, G, K].
      chip: the chip to plan for.
    """
    for name, param in (("scale", call.scale), ("bias", call.bias)):
        if param is not None and len(param.shape) > 1:
            return Fallback(
                f"no kernel for TPUs yet for a channelwise norm whose {name} differs "
                f"from sample to sample: it has shape {param.shape}, a shared one is "
                f"({view.features},)"
            )
    shape = _in_memory(call, view)
    cuts = [
        _cut(call, shape, view, strip, chip.blocks)
        for strip in _strips(shape, view, chip.cores)
    ]
    fit = (_fit(call, cut, chip.vmem, whole=True) for cut in cuts)
    one_read = call.wanted[0] and not call.half
    kept = next(filter(None, fit), None) if one_read else None
    whole = kept is not None
    fits = kept or _fit(call, cuts[0], chip.vmem, whole=False)
    if fits is None:
        least = _vmem(call, dataclasses.replace(cuts[0], unit=1), whole=False)
        return Fallback(
            f"{view.features} channels: a block takes {least:,} bytes of VMEM, a "
            f"kernel may use {chip.vmem:,}"
        )
    cut = cast(AnyCut, fits.shared_by(chip.cores))
    launch = Launch(call, shape.order, cut, whole, _vmem(call, cut, whole=whole))
    size = view.s * cut.strip * call.kept_bytes / 2**20
    lie = "down the sublanes" if shape.down else "across the lanes"
    variant, why = "", f"a unit of {size:.1f} MiB stays in VMEM: one read"
    run: Callable[..., list[jax.Array]]
    run = launch.forward if call.op == "forward" else launch.backward
    if call.half:
        run = launch.moments if call.op == "forward" else launch.sums
        variant = call.half_name
        why = "statistics cross devices: XLA normalizes in a second read"
    elif not call.wanted[0]:
        variant, why = ", sums", "only sums are wanted: one read"
    elif not whole:
        variant = ", two reads"
        why = (
            f"a unit of {size:.1f} MiB does not fit in VMEM: two reads, the second by "
            "XLA, which fuses the normalization with what follows"
        )
    elif cut.blocks == 1:
        why = "a block holds whole samples: one read"
    return Kernel(
        backend="mosaic_tpu",
        name=f"channelwise {call.op}{variant}",
        launch=run,
        block=str(cut),
        why=f"channels {lie}; {why}",
        bytes_moved=_bytes_moved(call, cut, whole=whole),
        unless_named=BETWEEN_CONVOLUTIONS
        if _is_of_images(call)
        else (COPIED if shape.copied else ""),
    )


def _is_of_images(call: Call) -> bool:
    """Returns whether x has several axes of pixels, like a convolution's output."""
    return len(call.x.shape) - call.own_params > 3


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The memory layout of an array.

    Attributes:
      order: its axes, from slowest to fastest.
      examples, samples, slabs, rows: sizes, as in `Cut`.
      down: whether channels lie down the sublanes, and rows along the lanes.
      is_one: whether an example is one sample whatever its size, as in BatchNorm.
      copied: whether the order differs from XLA's, so that XLA copies the array.
    """

    order: tuple[int, ...]
    examples: int
    samples: int
    slabs: int
    rows: int
    down: bool
    is_one: bool
    copied: bool = False


def _in_memory(call: Call, view: Geometry) -> _Shape:
    shape, own = call.x.shape, call.own_params
    last = len(shape) - 1
    examples = math.prod(shape[:own])
    samples = view.n // examples
    reduced = [axis for axis in range(own, last) if axis in call.norm.reduction_axes]
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
        and math.prod(shape[own:first]) == samples
    )
    if not simple:  # only the view tells the axes apart
        return _Shape(natural, examples, samples, 1, view.s, down=False, is_one=False)
    xla_order = order_of_axes(shape, call.x.dtype.itemsize, first)
    order = _with_full_sublanes(xla_order, shape, first)
    down = order[-1] != last
    axis = order[-1] if down else order[-2]
    rows = shape[axis] if axis >= first else 1
    slabs = view.s // rows
    if not down and rows % SUBLANES == 0:  # joined slabs fill the same tiles
        slabs, rows = 1, view.s
    is_one = set(range(own, last)) <= set(call.norm.reduction_axes)
    copied = order != xla_order
    return _Shape(order, examples, samples, slabs, rows, down, is_one, copied)


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


def _strips(shape: _Shape, view: Geometry, cores: int) -> list[int]:
    """Returns widths of strips, from all channels down: whole groups and whole tiles.

    A single sample is split into at least one strip per core, if it has that many.
    """
    widths = [view.features]
    least = math.lcm(view.k, LANES)
    if not shape.down and view.features % least == 0:
        count = view.features // least
        widths += [least * n for n in range(count - 1, 0, -1) if count % n == 0]
    most = view.features // cores if shape.is_one else view.features
    return [width for width in widths if width <= most] or widths


def _cut(
    call: Call, shape: _Shape, view: Geometry, strip: int, blocks_bytes: int
) -> AnyCut:
    streamed = [dtype.itemsize for dtype in _streamed(call)]
    packed = SUBLANES * 4 // min(streamed)  # sublanes of one register
    if shape.down:
        rows_tile, channels_tile = LANES, packed
    else:
        rows_tile, channels_tile = packed, LANES
    channels = round_up(strip, channels_tile)
    rows = round_up(shape.rows, rows_tile)

    # Rows of a chunk: a divisor of the array's rows, unless that is too small.
    chunk = REGISTERS[call.op] * SUBLANES * LANES
    chunk_channels = WIDE if min(streamed) == 2 and channels % WIDE == 0 else LANES
    if shape.down:
        chunk_channels = _divisor(channels, channels_tile, LANES // 2)
    most_rows = max(chunk // chunk_channels, rows_tile)
    chunk_rows = _divisor(rows, rows_tile, most_rows)
    if 2 * chunk_rows < min(most_rows, rows):
        chunk_rows = round_up(_even_part(rows, most_rows), rows_tile)

    # Samples and pixels of a block.
    most = max(blocks_bytes // (2 * sum(streamed)), 1)  # elements
    slabs, unit = shape.slabs, 1
    sample = slabs * rows * channels
    if sample <= most:
        unit = min(power_of_two(most // sample), MOST_SAMPLES)
    elif slabs > 1 and rows * channels <= most:
        slabs = _even_part(slabs, most // (rows * channels))
    else:
        slabs = 1
        rows = _even_part(rows, max(most // channels, chunk_rows))

    # Where rows are few, a chunk has several slabs, or more channels side by side.
    fits = chunk // (chunk_rows * chunk_channels)
    chunk_slabs = _divisor(shape.slabs, 1, min(fits, slabs))
    if not shape.down:
        fits = chunk // (chunk_rows * chunk_slabs)
        chunk_channels = _divisor(channels, channels_tile, fits)
    kind = DownSublanes if shape.down else AcrossLanes
    return kind(
        cores=1,
        examples=shape.examples,
        samples=shape.samples,
        slabs=shape.slabs,
        rows=shape.rows,
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


def _fit(call: Call, cut: AnyCut, vmem: int, *, whole: bool) -> AnyCut | None:
    """Halves a unit's samples until it fits `vmem`; None if one sample does not."""
    while _vmem(call, cut, whole=whole) > vmem:
        if cut.unit == 1:
            return None
        cut = dataclasses.replace(cut, unit=cut.unit // 2)
    return cut


def _vmem(call: Call, cut: AnyCut, *, whole: bool) -> int:
    """Returns the bytes of VMEM that a kernel needs."""
    block = cut.unit * math.prod(cut.block)
    need = 2 * block * sum(dtype.itemsize for dtype in _streamed(call, whole=whole))
    if whole and cut.blocks > 1:
        need += cut.blocks * block * call.kept_bytes
    # Scratch, and the values of `complete`: registers hold only a few of them.
    places = cut.unit * math.prod(cut.places) * 4
    values = cut.unit * math.prod(cut.values) * 4
    need += 3 * places + (5 + 4 * call.slopes + SPILLED) * values
    return need + OTHER_BYTES


def _read(call: Call, *, whole: bool = True) -> list[jnp.dtype]:
    """Returns the dtypes of the arrays of x's size that the kernel reads.

    Args:
      whole: whether the kernel normalizes.
    """
    arrays = [call.x, call.dy]
    if whole or call.op == "backward":
        arrays.append(call.shortcut)
    return [array.dtype for array in arrays if array is not None]


def _streamed(call: Call, *, whole: bool = True) -> list[jnp.dtype]:
    """Returns the dtypes of all arrays of x's size that the kernel reads or writes."""
    written = []
    if whole:
        written.append(call.norm.dtype if call.op == "forward" else call.x.dtype)
    if (dtype := _dz_dtype(call, whole=whole)) is not None:
        written.append(dtype)
    return [*_read(call, whole=whole), *written]


def _dz_dtype(call: Call, *, whole: bool) -> jnp.dtype | None:
    """Returns the dtype in which a backward writes dz, or None if it does not.

    In one read, dz is dshortcut. In two reads, XLA reads dz in the place of dy, if dy's
    dtype holds it without rounding.
    """
    if call.shortcut is None or not call.wanted[3]:
        return None
    if whole:
        return call.shortcut.dtype
    assert call.dy is not None
    return call.dy.dtype if call.dy_kept == call.dy.dtype else None


def _bytes_moved(call: Call, cut: AnyCut, *, whole: bool) -> int:
    """Returns the bytes read from and written to HBM."""
    wants_dx, wants_dscale, wants_dbias, wants_dshortcut = call.wanted
    x_size, size = call.x.dtype.itemsize, math.prod(call.x.shape)
    each = sum(dtype.itemsize for dtype in _read(call))
    if call.half:
        pass
    elif call.op == "forward":
        each += call.norm.dtype.itemsize + (0 if whole else x_size)
    elif wants_dx:
        each += x_size
        if not whole:  # x again, and dy, or dz in its place
            assert call.dy is not None
            each += x_size + call.dy.dtype.itemsize
    if call.shortcut is not None:
        each += call.shortcut.dtype.itemsize * wants_dshortcut
        again = call.op == "backward" and wants_dx and not (whole or call.half)
        if again and _dz_dtype(call, whole=False) is None:
            each += call.shortcut.dtype.itemsize
    moved = size * each
    of_channels = 4 * cut.examples * cut.samples * cut.channels * (1 + call.norm.center)
    params = [p for p in (call.scale, call.bias) if p is not None]
    if call.op == "forward":
        moved += of_channels * (call.statistics or not whole)
    else:
        if call.addend is not None:
            moved += size * (call.addend.dtype.itemsize + 2 * x_size * whole)
        moved += of_channels * (2 if wants_dx and not whole else 1)
        params = params if wants_dx or call.slopes else []
        # Several cores write partial sums, which are read and reduced.
        sums = 1 if cut.cores == 1 else 2 * cut.cores + 1
        moved += 4 * (wants_dscale + wants_dbias) * sums * cut.examples * cut.channels
    return moved + sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
