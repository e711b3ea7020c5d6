"""Norms of contiguous rows on a TPU, forward and backward, each in one kernel.

    x_hat = (x - mean) * rstd,  y = x_hat * scale + bias
    dx = rstd * (w - c2 - x_hat * c1),  w = dy * scale,
        c1 = sum(w * x_hat) / features,  c2 = sum(w) / features
    dscale = sum(dy * x_hat),  dbias = sum(dy)  over the rows

One row's mean and variance are taken over its own features; RMSNorm leaves out mean
and c2. With a residual h = x + residual takes the place of x, and to dx its cotangent
dh is added. A shortcut is added to y, before an activation; then dy * act'(z) takes the
place of dy, and is the shortcut's gradient. For the sources of the formulas see
reference/norm.py.

Scale and bias are those of all rows, or of an example's: of so many one behind the
other, whose dscale and dbias add up by themselves. Or each row has its own scale, which
is then read as x is, and its gradient dy * x_hat written as dx is. Heads that have a
scale each are examples where memory has them in front of the rows; else rows take
turns, and scale, bias and their gradients are kept for a *period* of rows, after which
the heads repeat in whole registers.

The array is seen as x[examples, slabs, rows, features], or with features before rows
where XLA has it so in memory: blocks.py has both, and what a kernel asks of either. A
grid step has a block of rows in VMEM, whole rows; Pallas fetches the next block and
writes back the last one meanwhile. So HBM sees each element once: the forward reads x
and writes y, the backward reads x and dy and writes dx; and so it is with all else of
x's size. Statistics add 4 bytes a row each, parameters and their gradients once their
own size.

Of a row that lies on several devices (`Call.half`) these kernels find the statistics,
or c1 and c2, of what is here; the rest is elementwise, XLA's, and a second read.

Inside a block a loop takes a chunk of rows at a time, or small ones together, and goes
over it two or three times, 128 or 256 features (a piece) at a time: for sums, and to
normalize. Each time VMEM is read anew, for the registers hold a few pieces and the
sums; had they the whole chunk, they would spill, and a chunk small enough for them has
less to do than a sum over lanes is waited for. What a pass makes of 16 bits it leaves
in VMEM for the next one, centred and in float32. Chunks beyond the last row are left
out; garbage in a chunk's own last rows stays in these rows, and is kept out of dscale
and dbias. What is done to a row, and in which order, depends on features and dtypes
alone.
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

# Of a block; a MiB of 128 bfloat16 features. Down the sublanes, where 64 features fill
# their registers, as many elements.
MOST_ROWS = 4096

# VMEM for a kernel without asking for more: all that a v4 has, and what XLA keeps free
# on all others. Of that, blocks of all operands take half.
VMEM_BYTES = 16 * 2**20
BLOCKS_BYTES = VMEM_BYTES // 2

# Vector registers that a chunk would fill in float32, of 64 that there are, and rows of
# a chunk at least: by the bytes of the smallest numbers. A chunk is done in pieces, for
# which registers suffice; with fewer rows there is less to do than the sums over lanes
# are waited for, with more their numbers spill. Cycles over those of HBM traffic,
# compiled for a 7x, LayerNorm: of 768 features in bfloat16 forward with 256 registers
# 1.60, with 512 1.44; backward with 128 1.51, with 256 1.76; in float32 forward with 64
# 0.99, with 128 0.81, backward 0.88 and 0.78. Of 12288 in bfloat16, forward with 64
# rows at least 1.50, with 128 1.36; backward with 32 1.44, with 64 1.36.
REGISTERS = {
    ("forward", 2): (512, 128),
    ("backward", 2): (128, 64),
    ("forward", 4): (128, 32),
    ("backward", 4): (128, 32),
}

# That the chunks of one turn of a loop would fill: small ones wait for their sums
# together. As above, of 2048 features, with 200, 300, 500 registers: bfloat16 backward
# 1.60, 1.26, and no room in VMEM for what spills; float32 forward 1.00, 0.72, likewise.
TURN_REGISTERS = 300

# As REGISTERS, where a chunk's features lie down the sublanes.
DOWN_REGISTERS = {"forward": 256, "backward": 128}

# And where they are turned: transposing begins and ends with nothing else to do. As
# above, RMSNorm of 128 features, bfloat16, forward with 256 registers 1.25, with 512
# 1.12; backward with 256 1.34, with 512 1.25. In float32 more spill: LayerNorm's
# backward in chunks of 128, 256, of which a turn has one 1.08 and 1.02, and of which it
# has 512 registers 0.97 and 0.99.
TURNED_REGISTERS = {
    ("forward", 2): 512,
    ("backward", 2): 512,
    ("forward", 4): 512,
    ("backward", 4): 128,
}

# Of VMEM: statistics, what Mosaic has itself, and what registers spill: up to 2 MiB of
# 256 features in float32.
OTHER_BYTES = 4 * 2**20

# Below this size in bytes a slab is not worth a step of its own (0.35 us): the slabs
# are joined, for which XLA copies an array whose rows do not fill their tiles. Nor is
# an example with its own scale or bias, which cannot be joined to others.
SLAB_BYTES = 64 * 2**10


# --- forward --------------------------------------------------------------------------


def _forward_kernel(
    x_ref: Any,  # a block: [block_rows, lanes], or as `DownSublanes` or `Turned` cut
    scale_ref: Any,  # [1, lanes], or a block if `scales_each`, or None
    bias_ref: Any,  # [1, lanes], or None
    residual_ref: Any,  # a block, or None
    shortcut_ref: Any,  # likewise
    y_ref: Any,  # a block, or None: statistics alone are wanted
    h_ref: Any,  # a block, or None: x + residual
    mean_ref: Any,  # float32, of a block's rows, or None
    var_ref: Any,  # likewise
    scale_kept: Any,  # [sublanes, LANES] float32, or None
    bias_kept: Any,  # likewise
    centred_kept: Any,  # chunks, float32, or None
    *,
    center: bool,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
    scales_each: bool,
    blocks: Blocks,
) -> None:
    """Those of y, h, mean and variance that have a reference."""
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

            # What is normalized is what a backward will read: rounded.
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
                # The mean, and the mean of what it leaves: a float32 sum of large
                # numbers is off by several roundings, and that of the rest by none.
                (total,) = blocks.over_pieces(add_up)
                mean = blocks.meet(total) * per_feature
            squares, *rest = blocks.over_pieces(add_up_centred)
            var = blocks.meet(squares) * per_feature
            if center:
                shift = blocks.meet(rest[0]) * per_feature
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
    dy_ref: Any,  # a block: [block_rows, lanes], or as `DownSublanes` or `Turned` cut
    x_ref: Any,  # a block, or None where dbias alone is wanted
    scale_ref: Any,  # [1, lanes], or a block if `scales_each`, or None
    bias_ref: Any,  # [1, lanes], or None; for an activation
    mean_ref: Any,  # float32, of a block's rows, or None
    var_ref: Any,  # likewise
    dh_ref: Any,  # a block, or None
    shortcut_ref: Any,  # likewise, for an activation
    dx_ref: Any,  # a block, or None
    dscale_ref: Any,  # [1, lanes] float32, or a block if `scales_each`, or None
    dbias_ref: Any,  # [1, lanes] float32, or None
    dshortcut_ref: Any,  # a block, or None
    c1_ref: Any,  # float32, of a block's rows, or None
    c2_ref: Any,  # likewise
    scale_kept: Any,  # [sublanes, LANES] float32, or None
    bias_kept: Any,  # likewise
    centred_kept: Any,  # chunks, float32, or None
    weighted_kept: Any,  # likewise
    dscale_sum: Any,  # [SUBLANES, lanes] or [sublanes, LANES] float32, or None: kept
    dbias_sum: Any,  # likewise                                     from step to step
    *,
    center: bool,
    epsilon: float,
    activation: str | None,
    weight: Callable[[Any], Any],
    scales_each: bool,
    blocks: Blocks,
) -> None:
    """Those of dx, dscale, dbias, dshortcut, c1 and c2 that have a reference."""
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
        """mean and rstd of each row of a chunk."""
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
            if inside is not None:  # what is beyond the last row is garbage
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
        means = [blocks.meet(total) * per_feature for total in totals]
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
    """Puts scale and bias into scratch, where there is any for them."""
    kept = [(ref, scratch) for ref, scratch in pairs if scratch is not None]
    if kept:

        @pl.when(_is_first_step())
        def _() -> None:
            for ref, scratch in kept:
                blocks.keep_param(scratch, memory.load(ref))


def _scale_reader(
    ref: Any, kept: Any, index: Any, each: bool, blocks: Blocks
) -> Callable[[Piece], jax.Array]:
    """Reads pieces of a chunk's scale: of each of its rows, or one for all."""
    if each:
        return blocks.reader(ref, index)
    return lambda piece: blocks.param(ref, kept, piece)


def _is_first_step() -> jax.Array:
    """Of those that a core has of one example."""
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
    """y, of a sum that too, and with `call.statistics` mean (if centred) and var. Half
    of it (`call.half`) is all but y.

    Args:
      call: one that `plan` takes.
      blocks: how it cuts x.
      x: any shape; float32, bfloat16 or float16, as are all that follow.
      scale, bias: shape (features,), behind the leading axes of x along which they
        vary, or None.
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
            (None if call.half else memory.result(x, view, norm.dtype), blocks.of_rows),
            (h_shape, blocks.of_rows),
            (statistic if norm.center else None, blocks.of_statistic),
            (statistic, blocks.of_statistic),
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
    """Those of dx, dscale, dbias and dshortcut that are wanted. Half of it
    (`call.half`) has c1 and c2 (if centred) in the place of dx.

    Args:
      call: one that `plan` takes.
      blocks: how it cuts x.
      dy, x: of one shape, each float32, bfloat16 or float16.
      scale: shape (features,), behind the leading axes of x along which it varies, or
        None.
      bias: likewise, for an activation.
      mean, var: the forward's statistics, float32.
      mask: None.
      dh: x's shape, or None.
      shortcut: likewise, for an activation.

    Returns:
      dx in x's shape and dtype; dscale and dbias float32 of shape (features,), behind
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
        of_scale = memory.result(x, view, scale.dtype), blocks.of_rows
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
            (mean if reads_x else None, blocks.of_statistic),
            (var.reshape(row_of_statistics) if reads_x else None, blocks.of_statistic),
            _rows(dh, blocks),
            _rows(shortcut, blocks),
        ],
        results=[
            (memory.result(x, view, x.dtype) if whole else None, blocks.of_rows),
            of_scale,
            (param if dbias else None, blocks.of_param_gradient),
            (of_shortcut, blocks.of_rows),
            (inner, blocks.of_statistic),
            (inner if call.norm.center else None, blocks.of_statistic),
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
    """An operand of x's size, and how it is cut."""
    return None if array is None else array.reshape(blocks.view), blocks.of_rows


def _param(param: jax.Array | None, blocks: Blocks) -> tuple[Any, pl.BlockSpec]:
    """Scale or bias [n, period, features], each for as many examples, and how it is
    cut."""
    if param is None:
        return None, blocks.of_param(1)
    # As [features], Pallas would ask which TPU it compiles for; see `memory.row`.
    rows = param.reshape(-1, 1, blocks.features)
    if blocks.period > 1:
        rows = jnp.tile(
            rows.reshape(1, -1, blocks.features), (1, blocks.period // len(rows), 1)
        )
    return rows, blocks.of_param(len(rows))


def _present(
    arrays: Sequence[jax.Array | None], shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """Those that are not None, each in its shape."""
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
    """Runs a kernel over operands, results and scratch; None stays None, as its ref."""
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
    if call.norm.reduction_axes == natural[-1:]:  # no groups, nor several axes
        order = order_of_axes(call.x.shape, call.x.dtype.itemsize, call.own)
    groups, own = call.row_groups, call.own
    if groups > 1 and order != natural:
        # The groups lie in front of the rows: examples, as many as samples have.
        own = len(order) - 2
        axes = call.norm.feature_axes[:-1]
        if order[own - len(axes) : own] != axes:
            return _in_groups(groups, "not all lie in front of the rows in memory")
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
    lie = "features down the sublanes" if down else "rows lie contiguous"
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
    """Why the reference is expected to be faster, or ""."""
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
    """The call for an x, and all else of its size, with the axes in `order`."""

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
    names = ["x", "dy", "beside", "shortcut", *["scale"] * call.scales_each]
    arrays = {name: transposed(getattr(call, name)) for name in names}
    return dataclasses.replace(call, norm=norm, **arrays)


def _launch_transposed(
    launch: Callable[..., list[jax.Array]],
    order: Sequence[int],
    *operands: jax.Array | None,
    **beside: jax.Array,
) -> list[jax.Array]:
    """Launches with arrays of x's rank in `order`, as their results come back."""
    # A bias of x's rank is not met here: with its leading axes in front, none can move.
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
    """Block and chunk follow from features, groups and dtypes; the rest from the shape.

    Args:
      call: its arrays as they lie in memory.
      view: of x, before it was transposed.
      chip: that has VMEM.
      groups: of rows, each with a scale and bias of its own.
      own: leading axes along which scale, bias or their gradients vary.
    """
    features = view.k
    lanes = round_up(features, LANES)
    streamed = _streamed(call)
    itemsizes = [dtype.itemsize for dtype in streamed]
    least = SUBLANES * 4 // min(itemsizes)  # rows of one register

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
            return _in_groups(groups, "they share the lanes")
        period = math.lcm(groups, LANES if lanes == LANES else SUBLANES)
        if lanes == LANES:
            chunk_rows -= chunk_rows % period
        if chunk_rows == 0 or chunk_rows % period:
            return _in_groups(groups, "no number of them fills a chunk's registers")
    # Of each feature and row of a period: scale, bias (a backward's before an
    # activation alone) and results, two of each; and dscale and dbias.
    of_feature = (6 + 2 * call.slopes if call.op == "backward" else 4) * period
    of_feature += 2 * max(SUBLANES, period) * (call.op == "backward")
    if period > 1 and lanes == LANES:  # scale and bias once more, transposed
        of_feature += 2 * period
    need = block_rows * row_bytes + lanes * of_feature * 4 + OTHER_BYTES
    if need > chip.vmem:
        return Fallback(
            f"{features} features: {block_rows} rows take {need:,} bytes of VMEM, a "
            f"kernel has {chip.vmem:,}"
        )

    examples = math.prod(call.x.shape[:own])
    rows = view.n * view.g // examples
    slabs = 1
    # Joining axes before the last is free where the last but one fills its tiles.
    if call.x.ndim - own > 2 and call.x.shape[-1] == features:
        inner = call.x.shape[-2]
        slab_bytes = inner * features * call.x.dtype.itemsize
        if inner % least and slab_bytes >= SLAB_BYTES:
            rows, slabs = inner, rows // inner
            if period > 1 and inner % groups:
                return _in_groups(groups, "several axes make them")
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
    """The block is as large as features and dtypes allow; None where VMEM has no room.

    It has room for 128 rows at least of a few thousand features on a v4, of some ten
    thousand on others. Beyond XLA copies x and y for `AcrossLanes`, to twice flax's
    bytes. The reference would copy nothing, but does not give the bits that this
    row has in an array of other size, where XLA has features across the lanes.

    Args:
      call: one with an x of shape (..., features, rows), and all else of its size.
      chip, groups, own: as of `across_lanes`.
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
    # Scale and bias; or scale, dscale, dbias, and before an activation bias.
    kept = (3 + (call.norm.activation is not None)) * tile * 4
    need = most * tile_bytes + kept + OTHER_BYTES
    if need > chip.vmem:
        return None

    # In tiles of LANES rows.
    registers = sublanes // SUBLANES
    tiles, chunk = pl.cdiv(rows, LANES), DOWN_REGISTERS[call.op] // registers
    chunk = min(max(chunk, 1), most)
    if tiles <= most:  # a slab's rows all together, in chunks of one size
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
    """Whether examples have a scale or bias of their own, and not just the sums."""
    return dataclasses.replace(call, own_params=0).own > 0


def _streamed(call: Call) -> list[jnp.dtype]:
    """Dtypes of the arrays of x's size that the kernel reads or writes."""
    own_scale = [call.scale] if call.scales_each and _reads_scale(call) else []
    others = [a for a in (call.beside, call.shortcut, *own_scale) if a is not None]
    beside = [a.dtype for a in others]
    if call.op == "forward":
        written = [] if call.half else [call.norm.dtype]
        written += [] if call.beside is None else [call.sum_dtype]
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
    """Whether a backward reads x: dbias alone needs it for an activation's slope."""
    dx, dscale, *_ = call.wanted
    return dx or dscale or call.slopes


def _reads_scale(call: Call) -> bool:
    """Whether it takes the scale, if there is one: dscale and dbias alone do not."""
    dx, *_ = call.wanted
    return call.op == "forward" or dx or call.slopes


def bytes_moved(call: Call, blocks: Blocks) -> int:
    """Bytes read from and written to HBM."""
    rows = blocks.examples * blocks.slabs * blocks.rows
    total = rows * blocks.features * sum(d.itemsize for d in _streamed(call))
    statistics = 4 * rows * (2 if call.norm.center else 1)
    scale = None if call.scales_each or not _reads_scale(call) else call.scale
    params = [p for p in (scale, call.bias) if p is not None]
    total += sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
    if call.op == "forward":
        return total + statistics * call.statistics
    # Of several cores, or of examples or rows that share one: written, read, added up.
    sums = math.prod(call.x.shape[: call.own_params]) * blocks.groups
    parts = blocks.cores * blocks.examples * blocks.period
    sums += 2 * parts if parts > sums else 0
    total += len(call.summed) * sums * blocks.features * 4
    # A half writes what it subtracts, c1 and c2, for its other half.
    return total + statistics * (_reads_x(call) + (call.half and call.wanted[0]))
