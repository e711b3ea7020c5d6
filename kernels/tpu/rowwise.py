"""Norms of contiguous rows on a TPU: forward and backward, each in one kernel.

    x_hat = (x - mean) * rstd,  y = x_hat * scale + bias
    dx = rstd * (w - c2 - x_hat * c1),  w = dy * scale,
        c1 = sum(w * x_hat) / features,  c2 = sum(w) / features
    dscale = sum(dy * x_hat),  dbias = sum(dy)  over the rows

A row's mean and variance are taken over its own features; RMSNorm leaves out mean and
c2. With a residual, h = x + residual takes the place of x, and its cotangent dh is
added to dx. A shortcut is added to y before an activation. The product dy * act'(z)
then takes the place of dy, and it is the shortcut's gradient. reference/norm.py cites
the sources of the formulas.

Scale and bias belong to one of the following:

- All rows.
- An *example*: a run of consecutive rows, which also has its own sums for dscale and
  dbias.
- One row, scale only. The scale is then read like x, and its gradient dy * x_hat is
  written like dx.
- A head. If memory has the heads in front of the rows, they are examples. Otherwise
  rows take turns: the kernel keeps scale, bias and their gradients for a *period* of
  rows, after which the heads repeat in whole registers.

The kernels see the array as x[examples, slabs, rows, features], or with features before
rows if XLA stores it so. blocks.py has both layouts and all that a kernel needs from
them. A grid step has a block of whole rows in VMEM, while Pallas fetches the next block
and writes back the last one. So each element passes through HBM once: the forward reads
x and writes y, the backward reads x and dy and writes dx. The same holds for every
other array of x's size. Each statistic adds 4 bytes per row, and parameters and their
gradients add their own size once.

When a row is sharded over several devices (`Call.half`), these kernels compute only the
statistics, or c1 and c2, of the local part. The elementwise rest is left to XLA, which
reads x a second time.

Inside a block, a loop takes one chunk of rows per turn, or several small ones together.
It passes over a chunk two or three times, for the sums and to normalize, in pieces of
128 or 256 features. Each pass reads VMEM again, because the registers hold only a few
pieces and the sums. A whole chunk in registers would spill, and a chunk small enough to
fit would have too little work to cover the wait for a sum over lanes. A pass leaves the
values that it computes from 16 bits in VMEM for the next pass, centred and in float32.
Chunks past the last row are skipped. Garbage in a chunk's last rows stays in those rows
and is kept out of dscale and dbias. The operations on a row and their order depend only
on features and dtypes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fusednorm.kernels import cost
from fusednorm.kernels.activation import activate, slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry, power_of_two
from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.blocks import (
    UNROLLED,
    AcrossLanes,
    Blocks,
    DownSublanes,
    Piece,
    Turned,
    inverse,
    order_of_axes,
)
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, round_up

# Maximum rows per block: one MiB of 128 bfloat16 features. Down the sublanes, where 64
# features fill their registers, the limit is the same number of elements.
MOST_ROWS = 4096

# VMEM that a kernel gets without asking for more: all that a v4 has, and what XLA keeps
# free on every other chip. The blocks of all operands take half of it.
VMEM_BYTES = 16 * 2**20
BLOCKS_BYTES = VMEM_BYTES // 2

# Per operation and bytes of the narrowest dtype: vector registers that a chunk would
# fill in float32, and the minimum rows of a chunk. A chip has 64 registers, but a chunk
# is worked through in pieces, which do fit. Fewer rows have too little work to cover
# the wait for the sums over lanes; more rows spill their per-row values. Cycles over
# cycles of HBM traffic, LayerNorm, compiled for a 7x:
#     768 features in bfloat16     forward: 1.60 with 256 registers, 1.44 with 512
#                                  backward: 1.51 with 128 and 1.76 with 256
#                  in float32      forward: 0.99 with 64 and 0.81 with 128
#                                  backward: 0.88 and 0.78
#     12288 features in bfloat16, minimum rows
#                                  forward: 1.50 with 64 and 1.36 with 128
#                                  backward: 1.44 with 32 and 1.36 with 64
REGISTERS = {
    ("forward", 2): (512, 128),
    ("backward", 2): (128, 64),
    ("forward", 4): (128, 32),
    ("backward", 4): (128, 32),
}

# Registers that the chunks of one turn of a loop would fill: small chunks wait for
# their sums together. Cycles as above, 2048 features, with 200, 300, and 500 registers:
# bfloat16 backward 1.60, 1.26, and no room in VMEM for the spills; float32 forward
# 1.00, 0.72, and no room either.
TURN_REGISTERS = 300

# Registers per chunk, as in REGISTERS, for features down the sublanes.
DOWN_REGISTERS = {"forward": 256, "backward": 128}

# Registers per chunk, as in REGISTERS, for features that `Turned` transposes. The first
# and last transposes overlap with no other work, so larger chunks pay off. Cycles as
# above, RMSNorm of 128 features, bfloat16, forward: 1.25 with 256 registers and 1.12
# with 512; backward: with 256 it is 1.34, with 512 it is 1.25. In float32 larger chunks
# spill. With one chunk per turn, LayerNorm's backward takes 1.08 in chunks of 128, 1.02
# in chunks of 256, but 0.97 and 0.99 with 512 registers of chunks per turn.
TURNED_REGISTERS = {
    ("forward", 2): 512,
    ("backward", 2): 512,
    ("forward", 4): 512,
    ("backward", 4): 128,
}

# VMEM for statistics, for Mosaic itself and for spilled registers, which take up to 2
# MiB with 256 features in float32.
OTHER_BYTES = 4 * 2**20

# Minimum bytes of a slab that is worth a step of its own (0.35 us). Smaller slabs are
# joined, for which XLA copies an array whose rows do not fill their tiles. A smaller
# example with its own scale or bias is not worth a step either, but cannot be joined to
# others.
SLAB_BYTES = 64 * 2**10


# --- forward --------------------------------------------------------------------------


def _forward_kernel(
    x_ref: Any,  # a block, [block_rows, lanes] or as `DownSublanes` or `Turned` cut it
    scale_ref: Any,  # [period or 1, lanes], or a block if `scales_each`, or None
    bias_ref: Any,  # [period or 1, lanes], or None
    residual_ref: Any,  # a block, or None
    shortcut_ref: Any,  # a block, or None
    y_ref: Any,  # a block, or None if only statistics are wanted
    h_ref: Any,  # x + residual: a block, or None
    mean_ref: Any,  # float32, one per row of a block, or None
    var_ref: Any,  # like mean_ref
    scale_kept: Any,  # [sublanes, kept_rows] float32, or None
    bias_kept: Any,  # like scale_kept
    centred_kept: Any,  # chunks of one turn, float32, or None
    *,
    center: bool,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
    scales_each: bool,
    blocks: Blocks,
) -> None:
    """Computes those outputs among y, h, mean and variance that have a ref."""
    per_feature = 1 / blocks.features
    _keep_params([(scale_ref, scale_kept), (bias_ref, bias_kept)], blocks)

    def chunk(index: Any, slot: int, _: bool, __: None) -> None:
        read = blocks.reader(x_ref, index)
        read_shortcut = blocks.reader(shortcut_ref, index)
        read_scale = _scale_reader(scale_ref, scale_kept, index, scales_each, blocks)
        if residual_ref is not None:
            read_x, read_residual = read, blocks.reader(residual_ref, index)

            def add_residual(piece: Piece, _: None) -> None:
                h = read_x(piece) + read_residual(piece)
                blocks.write(h_ref, index, piece, h)

            # Normalize h as rounded, because that is what a backward reads.
            blocks.over_pieces(add_residual)
            read = blocks.reader(h_ref, index)

        put_x, get_x = blocks.keep(centred_kept, slot, read)

        def add_up(piece: Piece, totals: Any) -> list[jax.Array]:
            x = read(piece)
            put_x(piece, x)
            return blocks.add(totals, [x], piece)

        def read_centred(piece: Piece) -> jax.Array:
            return get_x(piece) - blocks.widen(mean, piece) if center else read(piece)

        put_centred, get_centred = blocks.keep(centred_kept, slot, read_centred)

        def add_up_centred(piece: Piece, totals: Any) -> list[jax.Array]:
            x = read_centred(piece)
            put_centred(piece, x)
            return blocks.add(totals, [x * x, x][: 1 + center], piece)

        def normalize(piece: Piece, _: None) -> None:
            y = get_centred(piece)
            if center:
                y = y - blocks.widen(shift, piece)
            y = y * blocks.widen(rstd, piece)
            if scale_ref is not None:
                y = y * weight(read_scale(piece))
            if bias_ref is not None:
                y = y + blocks.param(bias_ref, bias_kept, piece)
            if shortcut_ref is not None:
                y = y + read_shortcut(piece)
            blocks.write(y_ref, index, piece, activate(activation, y))

        with jax.named_scope("statistics"):
            if center:
                # Compute the mean, and later correct it by the mean of x - mean. A
                # float32 sum of large numbers is off by several rounding errors, the
                # sum of the differences by none.
                (total,) = blocks.over_pieces(add_up)
                mean = blocks.sum_features(total) * per_feature
            squares, *rest = blocks.over_pieces(add_up_centred)
            var = blocks.sum_features(squares) * per_feature
            if center:
                shift = blocks.sum_features(rest[0]) * per_feature
                var = jnp.maximum(var - shift * shift, 0)
        if y_ref is not None:
            rstd = lax.rsqrt(var + epsilon)
            with jax.named_scope("normalize"):
                blocks.over_pieces(normalize)
        if mean_ref is not None:
            blocks.put_statistic(mean_ref, index, mean + shift)
        if var_ref is not None:
            blocks.put_statistic(var_ref, index, var)

    blocks.for_each_chunk(chunk, masks=False)


# --- backward -------------------------------------------------------------------------


def _backward_kernel(
    dy_ref: Any,  # a block, [block_rows, lanes] or as `DownSublanes` or `Turned` cut it
    x_ref: Any,  # a block, or None if only dbias is wanted
    scale_ref: Any,  # [period or 1, lanes], or a block if `scales_each`, or None
    bias_ref: Any,  # [period or 1, lanes], or None; for an activation
    mean_ref: Any,  # float32, one per row of a block, or None
    var_ref: Any,  # like mean_ref
    dh_ref: Any,  # a block, or None
    shortcut_ref: Any,  # a block, or None; for an activation
    dx_ref: Any,  # a block, or None
    dscale_ref: Any,  # [period or 1, lanes] float32, a block if `scales_each`, or None
    dbias_ref: Any,  # [period or 1, lanes] float32, or None
    dshortcut_ref: Any,  # a block, or None
    c1_ref: Any,  # float32, one per row of a block, or None
    c2_ref: Any,  # same shape and dtype, or None
    scale_kept: Any,  # [sublanes, kept_rows] float32, or None
    bias_kept: Any,  # like scale_kept
    centred_kept: Any,  # chunks of one turn, float32, or None
    weighted_kept: Any,  # like centred_kept
    dscale_sum: Any,  # float32, [SUBLANES or period, lanes] or [sublanes, kept_rows]
    dbias_sum: Any,  # like dscale_sum; each is None or accumulates over steps
    *,
    center: bool,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
    scales_each: bool,
    blocks: Blocks,
) -> None:
    """Computes those outputs among dx, dscale, dbias, dshortcut, c1 and c2 that have a
    ref."""
    per_feature = 1 / blocks.features
    sums = [
        (total, result)
        for total, result in ((dscale_sum, dscale_ref), (dbias_sum, dbias_ref))
        if total is not None
    ]

    _keep_params([(scale_ref, scale_kept), (bias_ref, bias_kept)], blocks)

    @pl.when(_is_first_step())
    def _() -> None:
        for total, _ in sums:
            total[...] = jnp.zeros_like(total)

    def statistics(index: Any) -> tuple[Any, Any]:
        """Returns mean and rstd of each row of a chunk."""
        mean: Any = None
        rstd: Any = None
        if x_ref is not None:
            rstd = blocks.get_statistic(
                var_ref, index, lambda v: lax.rsqrt(v + epsilon)
            )
        if mean_ref is not None:
            mean = blocks.get_statistic(mean_ref, index)
        return mean, rstd

    def chunk(index: Any, slot: int, masked: bool, given: tuple[Any, Any]) -> None:
        mean, rstd = given
        inside = blocks.is_inside(index) if masked else None
        read_x, read_dy = blocks.reader(x_ref, index), blocks.reader(dy_ref, index)
        read_dh = blocks.reader(dh_ref, index)
        read_shortcut = blocks.reader(shortcut_ref, index)
        read_scale = _scale_reader(scale_ref, scale_kept, index, scales_each, blocks)

        def read_centred(piece: Piece) -> jax.Array:
            x = read_x(piece)
            return x if mean is None else x - blocks.widen(mean, piece)

        def read_dz(piece: Piece) -> jax.Array:
            dy = read_dy(piece)
            if activation is None:
                return dy
            z = read_centred(piece) * blocks.widen(rstd, piece)
            if scale_ref is not None:
                z = z * weight(read_scale(piece))
            if bias_ref is not None:
                z = z + blocks.param(bias_ref, bias_kept, piece)
            if shortcut_ref is not None:
                z = z + read_shortcut(piece)
            return dy * slope(activation, z)

        def weigh(dz: jax.Array, piece: Piece) -> jax.Array:
            return dz if scale_ref is None else dz * weight(read_scale(piece))

        def compute_weighted(piece: Piece) -> jax.Array:
            return weigh(read_dz(piece) * blocks.widen(rstd, piece), piece)

        put_centred, get_centred = blocks.keep(centred_kept, slot, read_centred)
        put_weighted, get_weighted = blocks.keep(weighted_kept, slot, compute_weighted)

        def add_rows(total: Any, value: jax.Array, piece: Piece) -> None:
            if inside is not None:  # rows past the last one are garbage
                value = jnp.where(inside, value, 0)
            blocks.part(total, piece)[...] += blocks.sum_rows(value)

        def add_up(piece: Piece, totals: Any) -> list[jax.Array]:
            dz = read_dz(piece)
            if dbias_sum is not None:
                add_rows(dbias_sum, dz, piece)
            if dshortcut_ref is not None:
                blocks.write(dshortcut_ref, index, piece, dz)
            if x_ref is None:
                return []
            centred = read_centred(piece)
            rstd_dz = dz * blocks.widen(rstd, piece)
            of_scale = rstd_dz * centred
            if dscale_sum is not None:
                add_rows(dscale_sum, of_scale, piece)
            elif dscale_ref is not None:
                blocks.write(dscale_ref, index, piece, of_scale)
            if dx_ref is None and c1_ref is None:
                return []
            weighted = weigh(rstd_dz, piece)  # rstd * w
            put_centred(piece, centred)
            put_weighted(piece, weighted)
            terms = [weighted * centred]
            if center:
                terms.append(weighted if c2_ref is None else weigh(dz, piece))
            return blocks.add(totals, terms, piece)

        def store_dx(piece: Piece, _: None) -> None:
            dx = get_weighted(piece) - get_centred(piece) * blocks.widen(factor, piece)
            for rstd_c2 in rest:
                dx = dx - blocks.widen(rstd_c2, piece)
            if dh_ref is not None:
                dx = dx + read_dh(piece)
            blocks.write(dx_ref, index, piece, dx)

        totals = blocks.over_pieces(add_up)
        means = [blocks.sum_features(total) * per_feature for total in totals]
        for ref, mean_of_row in zip((c1_ref, c2_ref), means, strict=False):
            if ref is not None:
                blocks.put_statistic(ref, index, mean_of_row)
        if dx_ref is not None:
            c1, *rest = means  # the rest: rstd * c2
            factor = rstd * rstd * c1
            blocks.over_pieces(store_dx)

    blocks.for_each_chunk(chunk, masks=bool(sums), given=statistics)

    @pl.when(_is_last_step(blocks))
    def _() -> None:
        for total, result in sums:
            blocks.finish_sum(total, result)


# --- both -----------------------------------------------------------------------------


def _keep_params(pairs: Sequence[tuple[Any, Any]], blocks: Blocks) -> None:
    """Copies scale and bias to their scratch, if they have any."""
    kept = [(ref, scratch) for ref, scratch in pairs if scratch is not None]
    if kept:

        @pl.when(_is_first_step())
        def _() -> None:
            for ref, scratch in kept:
                blocks.keep_param(scratch, memory.load(ref))


def _scale_reader(
    ref: Any, kept: Any, index: Any, each: bool, blocks: Blocks
) -> Callable[[Piece], jax.Array]:
    """Returns a function that reads a piece of a chunk's scale: each row's own, or the
    one that rows share."""
    if each:
        return blocks.reader(ref, index)
    return lambda piece: blocks.param(ref, kept, piece)


def _is_first_step() -> jax.Array:
    """Returns whether this step is the core's first one of an example."""
    return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)


def _is_last_step(blocks: Blocks) -> jax.Array:
    *_, slabs, rows = blocks.grid
    return (pl.program_id(2) == slabs - 1) & (pl.program_id(3) == rows - 1)


# --- the launch -----------------------------------------------------------------------


def forward(
    call: Call,
    blocks: Blocks,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
    residual: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes y, and h if there is a residual. With `call.statistics` it also returns
    mean (if centred) and var. With `call.half` it returns everything but y.

    Args:
      call: one that `plan` takes.
      blocks: how x is cut.
      x: any shape; float32, bfloat16 or float16, as are all operands that follow.
      scale, bias: shape (features,) after the leading axes of x along which they vary,
        or None.
      mask: None.
      residual, shortcut: x's shape, or None.
    """
    norm = call.norm
    view = blocks.view
    h_shape = None
    if residual is not None:
        h_shape = memory.result(x, view, memory.kept_as(call.sum_dtype))
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    statistic = (
        memory.result(x, row_of_statistics, jnp.float32) if call.statistics else None
    )
    y, h, *statistics = _pallas_call(
        functools.partial(
            _forward_kernel,
            center=norm.center,
            epsilon=norm.epsilon,
            activation=norm.activation,
            weight=norm.weight,
            scales_each=call.scales_each,
            blocks=blocks,
        ),
        name="rowwise_forward",
        blocks=blocks,
        operands=[
            _rows(x, blocks),
            (_rows if call.scales_each else _param)(scale, blocks),
            _param(bias, blocks),
            _rows(residual, blocks),
            _rows(shortcut, blocks),
        ],
        results=[
            (
                None if call.half else memory.result(x, view, norm.dtype),
                blocks.rows_spec,
            ),
            (h_shape, blocks.rows_spec),
            (statistic if norm.center else None, blocks.statistic_spec),
            (statistic, blocks.statistic_spec),
        ],
        scratch=[
            None if scale is None or call.scales_each else blocks.kept_param,
            None if bias is None else blocks.kept_param,
            None if call.half else blocks.kept_chunks,
        ],
    )
    if h is not None and h.dtype == jnp.int16:
        h = lax.bitcast_convert_type(h, jnp.float16)
    shapes = [x.shape, x.shape, *[norm.statistic_shape(x.shape)] * 2]
    return _present([y, h, *statistics], shapes)


def backward(
    call: Call,
    blocks: Blocks,
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
    """Computes those gradients among dx, dscale, dbias and dshortcut that are wanted.
    With `call.half` it returns c1 and c2 (if centred) in place of dx.

    Args:
      call: one that `plan` takes.
      blocks: how x is cut.
      dy, x: of one shape, each float32, bfloat16 or float16.
      scale: shape (features,) after the leading axes of x along which it varies, or
        None.
      bias: like scale; for an activation.
      mean, var: the forward's statistics, float32.
      mask: None.
      dh: x's shape, or None.
      shortcut: x's shape, or None; for an activation.

    Returns:
      dx in x's shape and dtype; dscale and dbias in float32 of shape (features,) after
      the leading axes of x that `call.own_params` counts, or dscale in the shape and
      dtype of a scale of x's shape; dshortcut in the shortcut's shape and dtype.
    """
    dx, dscale, dbias, dshortcut = call.wanted
    reads_x = _reads_x(call)
    scale_given = scale if _reads_scale(call) else None
    view = blocks.view
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    param = memory.result(
        x, (blocks.cores, blocks.examples, blocks.period, blocks.features), jnp.float32
    )
    of_scale = param if dscale else None, blocks.of_param_gradient
    if dscale and call.scales_each:
        assert scale is not None
        of_scale = memory.result(x, view, scale.dtype), blocks.rows_spec
    of_shortcut = None
    if dshortcut:
        assert shortcut is not None
        of_shortcut = memory.result(x, view, shortcut.dtype)
    if mean is not None:
        mean = mean.reshape(row_of_statistics)
    whole = dx and not call.half
    inner = None
    if dx and call.half:
        inner = memory.result(x, row_of_statistics, jnp.float32)
    *results, c1, c2 = _pallas_call(
        functools.partial(
            _backward_kernel,
            center=call.norm.center,
            epsilon=call.norm.epsilon,
            activation=call.norm.activation,
            weight=call.norm.weight,
            scales_each=call.scales_each,
            blocks=blocks,
        ),
        name="rowwise_backward",
        blocks=blocks,
        operands=[
            _rows(dy, blocks),
            _rows(x if reads_x else None, blocks),
            (_rows if call.scales_each else _param)(scale_given, blocks),
            _param(bias, blocks),
            (mean if reads_x else None, blocks.statistic_spec),
            (
                var.reshape(row_of_statistics) if reads_x else None,
                blocks.statistic_spec,
            ),
            _rows(dh, blocks),
            _rows(shortcut, blocks),
        ],
        results=[
            (memory.result(x, view, x.dtype) if whole else None, blocks.rows_spec),
            of_scale,
            (param if dbias else None, blocks.of_param_gradient),
            (of_shortcut, blocks.rows_spec),
            (inner, blocks.statistic_spec),
            (inner if call.norm.center else None, blocks.statistic_spec),
        ],
        scratch=[
            None if scale_given is None or call.scales_each else blocks.kept_param,
            None if bias is None else blocks.kept_param,
            *[blocks.kept_chunks if whole else None] * 2,
            *[
                blocks.kept_sum if n in call.summed else None
                for n in ("dscale", "dbias")
            ],
        ],
    )
    found = dict(zip(call.wants, results, strict=True))
    shapes = dict.fromkeys(found, x.shape)
    own = x.shape[: call.own_params]
    for name in call.summed:
        found[name] = blocks.add_parts(found[name], math.prod(own))
        shapes[name] = (*own, blocks.groups * blocks.features)
    statistic_shape = call.norm.statistic_shape(x.shape)
    return _present(
        [c1, c2, *found.values()], [*[statistic_shape] * 2, *shapes.values()]
    )


def _rows(array: jax.Array | None, blocks: Blocks) -> tuple[Any, pl.BlockSpec]:
    """Returns an operand of x's size and its block spec."""
    return None if array is None else array.reshape(blocks.view), blocks.rows_spec


def _param(param: jax.Array | None, blocks: Blocks) -> tuple[Any, pl.BlockSpec]:
    """Returns scale or bias as [n, period, features], each entry for an equal number of
    examples, and its block spec."""
    if param is None:
        return None, blocks.param_spec(1)
    # With shape [features], Pallas would ask which TPU it compiles for: `memory.row`.
    rows = param.reshape(-1, 1, blocks.features)
    if blocks.period > 1:
        rows = jnp.tile(
            rows.reshape(1, -1, blocks.features), (1, blocks.period // len(rows), 1)
        )
    return rows, blocks.param_spec(len(rows))


def _present(
    arrays: Sequence[jax.Array | None], shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """Returns the arrays that are not None, each in its shape."""
    pairs = zip(arrays, shapes, strict=True)
    return [array.reshape(shape) for array, shape in pairs if array is not None]


def _pallas_call(
    kernel: Callable[..., None],
    *,
    name: str,
    blocks: Blocks,
    operands: Sequence[tuple[jax.Array | None, pl.BlockSpec]],
    results: Sequence[tuple[jax.ShapeDtypeStruct | None, pl.BlockSpec]],
    scratch: Sequence[Any],
) -> tuple[jax.Array | None, ...]:
    """Runs a kernel over operands, results and scratch. None stays None, and so does
    its ref."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=blocks.grid,
        in_specs=tuple(None if array is None else spec for array, spec in operands),
        out_shape=tuple(shape for shape, _ in results),
        out_specs=tuple(None if shape is None else spec for shape, spec in results),
        scratch_shapes=tuple(scratch),
        compiler_params=memory.compiler_params(
            blocks.grid, max(blocks.vmem, VMEM_BYTES)
        ),
        cost_estimate=cost.estimate(array for array, _ in (*operands, *results)),
    )(*[memory.bits(array) for array, _ in operands])


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, view: Geometry, chip: memory.Chip) -> Kernel | Fallback:
    """Chooses blocks for a call whose view has S = 1."""
    vmem, blocks_bytes = max(chip.vmem, VMEM_BYTES), max(chip.blocks, BLOCKS_BYTES)
    chip = dataclasses.replace(chip, vmem=vmem, blocks=blocks_bytes)
    natural = tuple(range(call.x.ndim))
    order = natural
    if call.norm.reduction_axes == natural[-1:]:  # neither groups nor several axes
        order = order_of_axes(call.x.shape, call.x.dtype.itemsize, call.own)
    groups, own = call.row_groups, call.own
    if groups > 1 and order != natural:
        # The groups lie in front of the rows: each group of a sample is an example.
        own = len(order) - 2
        axes = call.norm.feature_axes[:-1]
        if order[own - len(axes) : own] != axes:
            return _in_groups(
                groups, "some groups do not lie in front of the rows in memory"
            )
    down = None
    if order[-1] != natural[-1]:
        down = down_sublanes(_transposed(call, order), chip, groups, own)
        if down is None:
            order, own = natural, call.own
    call = _transposed(call, order)
    blocks = down or across_lanes(call, view, chip, groups, own)
    if isinstance(blocks, Fallback):
        return blocks
    blocks = blocks.shared_by(chip.cores)
    lie = "features down the sublanes" if down else "rows are contiguous"
    if isinstance(blocks, Turned):
        lie += ", transposed in registers"
    launch: Callable[..., list[jax.Array]]
    launch = forward if call.op == "forward" else backward
    launch = functools.partial(launch, call, blocks)
    if order != natural:
        launch = functools.partial(_launch_transposed, launch, order)
    return Kernel(
        backend="mosaic_tpu",
        name=f"rowwise {call.op}{call.half_name}",
        launch=launch,
        block=str(blocks),
        why=f"{lie}; {blocks.chunk_rows} rows at a time",
        bytes_moved=bytes_moved(call, blocks),
        unless_named=_not_worth_it(call, blocks),
    )


def _in_groups(groups: int, why: str) -> Fallback:
    return Fallback(f"scale differs from row to row, in {groups} groups: {why}")


def _not_worth_it(call: Call, blocks: Blocks) -> str:
    """Returns why the reference is expected to be faster, or ""."""
    rows = blocks.slabs * blocks.rows
    size = rows * blocks.features * call.x.dtype.itemsize
    in_turn = blocks.groups > 1 and blocks.period == 1
    if not (_params_differ(call) or in_turn) or size >= SLAB_BYTES:
        return ""
    return (
        f"only {rows} rows of {blocks.features} features share a scale and bias: too "
        "few for a step of the kernel, so the reference is expected to be faster"
    )


def _transposed(call: Call, order: Sequence[int]) -> Call:
    """Returns the call for an x, and other arrays of its size, with axes in `order`."""

    def transposed(operand: Any) -> Any:
        if operand is None:
            return None
        shape = tuple(operand.shape[axis] for axis in order)
        return jax.ShapeDtypeStruct(shape, operand.dtype)

    norm = dataclasses.replace(
        call.norm,
        reduction_axes=tuple(order.index(axis) for axis in call.norm.reduction_axes),
        feature_axes=tuple(order.index(axis) for axis in call.norm.feature_axes),
    )
    names = ["x", "dy", "addend", "shortcut", *["scale"] * call.scales_each]
    arrays = {name: transposed(getattr(call, name)) for name in names}
    return dataclasses.replace(call, norm=norm, **arrays)


def _launch_transposed(
    launch: Callable[..., list[jax.Array]],
    order: Sequence[int],
    *operands: jax.Array | None,
    **beside: jax.Array,
) -> list[jax.Array]:
    """Launches with arrays of x's rank transposed to `order`, and transposes results
    back."""
    # No bias has x's rank here: its leading axes stay in front, so none can move.
    back = inverse(order)

    def transpose(array: Any, axes: Sequence[int]) -> Any:
        if array is None or array.ndim != len(order):
            return array
        return lax.transpose(array, axes)

    results = launch(
        *[transpose(operand, order) for operand in operands],
        **{name: transpose(array, order) for name, array in beside.items()},
    )
    return [transpose(result, back) for result in results]


def across_lanes(
    call: Call, view: Geometry, chip: memory.Chip, groups: int, own: int
) -> AcrossLanes | Turned | Fallback:
    """Chooses the blocks for features across the lanes.

    Block and chunk sizes follow from features, groups, dtypes and the chip, except that
    few rows make a chunk smaller. The rest follows from the shape.

    Args:
      call: the call, its arrays as they lie in memory.
      view: view of x before it was transposed.
      chip: chip with the VMEM to use.
      groups: number of row groups, each with a scale and bias of its own.
      own: leading axes along which scale, bias or their gradients vary.
    """
    features = view.k
    lanes = round_up(features, LANES)
    streamed = _streamed(call)
    itemsizes = [dtype.itemsize for dtype in streamed]
    least = SUBLANES * 4 // min(itemsizes)  # rows per register

    row_bytes = 2 * lanes * sum(itemsizes)
    block_rows = power_of_two(max(chip.blocks // row_bytes, 1))
    block_rows = min(max(block_rows, least), MOST_ROWS)
    narrow = min(itemsizes) == 2
    register = SUBLANES * LANES
    kind = call.op, 2 if narrow else 4
    registers, least_rows = REGISTERS[kind]
    if lanes == LANES:
        registers = TURNED_REGISTERS[kind]
    chunk_rows = max(registers * register // lanes, least_rows)
    chunk_rows = min(power_of_two(chunk_rows), block_rows)
    period = 1
    if groups > 1 and own == 0:
        if call.x.shape[-1] != features:
            return _in_groups(groups, "the groups share the lanes")
        period = math.lcm(groups, LANES if lanes == LANES else SUBLANES)
        if lanes == LANES:
            chunk_rows -= chunk_rows % period
        if chunk_rows == 0 or chunk_rows % period:
            return _in_groups(
                groups, "no whole number of groups fills a chunk's registers"
            )
    # Values per feature: for each row of a period, two buffers each for scale, bias (in
    # a backward only before an activation) and results; then the accumulators of dscale
    # and dbias.
    of_feature = (6 + 2 * call.slopes if call.op == "backward" else 4) * period
    of_feature += 2 * max(SUBLANES, period) * (call.op == "backward")
    if period > 1 and lanes == LANES:  # scale and bias once more, transposed
        of_feature += 2 * period
    need = block_rows * row_bytes + lanes * of_feature * 4 + OTHER_BYTES
    if need > chip.vmem:
        return Fallback(
            f"{features} features: {block_rows} rows take {need:,} bytes of VMEM, a "
            f"kernel may use {chip.vmem:,}"
        )

    examples = math.prod(call.x.shape[:own])
    rows = view.n * view.g // examples
    slabs = 1
    # Joining axes before the last is free if the second to last fills its tiles.
    if call.x.ndim - own > 2 and call.x.shape[-1] == features:
        inner = call.x.shape[-2]
        slab_bytes = inner * features * call.x.dtype.itemsize
        if inner % least and slab_bytes >= SLAB_BYTES:
            rows, slabs = inner, rows // inner
            if period > 1 and inner % groups:
                return _in_groups(groups, "the groups span several axes")
    if lanes > LANES:
        chunk_rows = min(chunk_rows, max(pl.next_power_of_2(rows), least, period))
        together = 1
        if lanes <= UNROLLED:
            chunks = min(rows, block_rows) // chunk_rows
            together = max(
                min(chunks, TURN_REGISTERS * register // (chunk_rows * lanes)), 1
            )
        kept = (1 if call.op == "forward" else 2) * together * chunk_rows * lanes * 4
        keeps = narrow and need + kept <= chip.vmem
        return AcrossLanes(
            vmem=need + kept * keeps,
            cores=1,
            examples=examples,
            slabs=slabs,
            rows=rows,
            features=features,
            block_rows=block_rows,
            chunk_rows=chunk_rows,
            piece_width=2 * LANES if narrow else LANES,
            together=together,
            keeps=keeps,
            groups=groups,
            period=period,
        )
    chunk_rows = min(chunk_rows, round_up(rows, max(LANES, period)))
    block_rows -= block_rows % chunk_rows
    return Turned(
        vmem=need,
        cores=1,
        examples=examples,
        slabs=slabs,
        rows=rows,
        features=features,
        block_slabs=1,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        groups=groups,
        period=period,
    )


def down_sublanes(
    call: Call, chip: memory.Chip, groups: int, own: int
) -> DownSublanes | None:
    """Chooses the blocks for features down the sublanes; None if VMEM has no room.

    The block is as large as features and dtypes allow. VMEM has room for at least 128
    rows of a few thousand features on a v4, and of about ten thousand on other chips.
    Beyond that the answer is None, XLA copies x and y for `AcrossLanes`, and the
    traffic is twice flax's bytes. The reference would copy nothing, but its result for
    a row would not be bitwise the one in an array of another size, where XLA has the
    features across the lanes.

    Args:
      call: a call with an x of shape (..., features, rows), as are all arrays of its
        size.
      chip, groups, own: same as for `across_lanes`.
    """
    *leading, features, rows = call.x.shape
    examples = math.prod(leading[:own])
    slabs = math.prod(leading[own:])
    sublanes = round_up(features, SUBLANES)
    tile = sublanes * LANES  # elements of LANES rows
    tile_bytes = 2 * tile * sum(dtype.itemsize for dtype in _streamed(call))
    tile_bytes += 2 * 2 * SUBLANES * LANES * 4  # mean and variance, as whole registers
    most = min(chip.blocks // tile_bytes, MOST_ROWS * LANES // tile)
    most = max(most, 1)
    # Scale and bias; or scale, dscale and dbias, plus bias before an activation.
    kept = (3 + (call.norm.activation is not None)) * tile * 4
    need = most * tile_bytes + kept + OTHER_BYTES
    if need > chip.vmem:
        return None

    # From here on, sizes are in tiles of LANES rows.
    registers = sublanes // SUBLANES
    tiles, chunk = pl.cdiv(rows, LANES), DOWN_REGISTERS[call.op] // registers
    chunk = min(max(chunk, 1), most)
    if tiles <= most:  # all rows of a slab in one block, in equal chunks
        chunks = pl.cdiv(tiles, chunk)
        chunk = pl.cdiv(tiles, chunks)
    else:
        chunks = most // chunk
    block_rows = chunks * chunk * LANES
    return DownSublanes(
        vmem=need,
        cores=1,
        examples=examples,
        slabs=slabs,
        rows=rows,
        features=features,
        block_slabs=min(max(most * LANES // block_rows, 1), slabs),
        block_rows=block_rows,
        chunk_rows=chunk * LANES,
        groups=groups,
    )


def _params_differ(call: Call) -> bool:
    """Returns whether examples have their own scale or bias, not only their own
    sums."""
    return dataclasses.replace(call, own_params=0).own > 0


def _streamed(call: Call) -> list[jnp.dtype]:
    """Returns the dtypes of the arrays of x's size that the kernel reads or writes."""
    own_scale = [call.scale] if call.scales_each and _reads_scale(call) else []
    others = [a for a in (call.addend, call.shortcut, *own_scale) if a is not None]
    beside = [a.dtype for a in others]
    if call.op == "forward":
        written = [] if call.half else [call.norm.dtype]
        written += [] if call.addend is None else [call.sum_dtype]
        return [call.x.dtype, *beside, *written]
    assert call.dy is not None
    dx, dscale, _, dshortcut = call.wanted
    streamed = [call.dy.dtype, *beside]
    streamed += [call.x.dtype] * (_reads_x(call) + (dx and not call.half))
    if dscale and call.scales_each:
        assert call.scale is not None
        streamed.append(call.scale.dtype)
    if dshortcut:
        assert call.shortcut is not None
        streamed.append(call.shortcut.dtype)
    return streamed


def _reads_x(call: Call) -> bool:
    """Returns whether a backward reads x. dbias alone needs x only for an activation's
    slope."""
    dx, dscale, *_ = call.wanted
    return dx or dscale or call.slopes


def _reads_scale(call: Call) -> bool:
    """Returns whether the kernel reads the scale, if there is one. dscale and dbias
    alone do not need it."""
    dx, *_ = call.wanted
    return call.op == "forward" or dx or call.slopes


def bytes_moved(call: Call, blocks: Blocks) -> int:
    """Returns the bytes read from and written to HBM."""
    rows = blocks.examples * blocks.slabs * blocks.rows
    total = rows * blocks.features * sum(d.itemsize for d in _streamed(call))
    statistics = 4 * rows * (2 if call.norm.center else 1)
    scale = None if call.scales_each or not _reads_scale(call) else call.scale
    params = [p for p in (scale, call.bias) if p is not None]
    total += sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
    if call.op == "forward":
        return total + statistics * call.statistics
    # Partial sums of several cores, or of examples or rows that share one result, are
    # written, read and summed.
    sums = math.prod(call.x.shape[: call.own_params]) * blocks.groups
    parts = blocks.cores * blocks.examples * blocks.period
    sums += 2 * parts if parts > sums else 0
    total += len(call.summed) * sums * blocks.features * 4
    # With `call.half` the kernel writes c1 and c2, which XLA subtracts.
    return total + statistics * (_reads_x(call) + (call.half and call.wanted[0]))
