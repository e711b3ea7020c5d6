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
It passes over a chunk two to four times, to add the residual, for the sums and to
normalize, in pieces of 128 or 256 features. Each pass reads VMEM again, because the
registers hold only a few pieces and the sums. A whole chunk in registers would spill,
and a chunk small enough to fit would have too little work to cover the wait for a sum
over lanes. A pass leaves the float32 values that it computes from 16 bits in VMEM for
the next pass. Chunks past the last row are skipped. Garbage in a chunk's last rows
stays in those rows and is kept out of dscale and dbias. The operations on a row and
their order depend only on features and dtypes.
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

from fusednorm.kernels.activation import activate, times_slope
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
# with 512; backward: 1.34 and 1.25. In float32 larger chunks spill: the backward of
# LayerNorm takes 1.08 with 128 registers and 1.02 with 256 if a turn has one chunk, but
# 0.97 and 0.99 if a turn has as many as fill 512 registers.
TURNED_REGISTERS = {
    ("forward", 2): 512,
    ("backward", 2): 512,
    ("forward", 4): 512,
    ("backward", 4): 128,
}

# The same for a backward with more to keep in registers, a slope or another array.
# Cycles of LayerNorm's on a v6e, 160 000 rows of 128, with 512, 256 and 128 registers:
# with a residual 137, 136, 130 thousand; with gelu 480 and 474, and no room in VMEM for
# what 512 would spill; with gelu and a scale per row, room for 128 only.
CROWDED_REGISTERS = 128

# Elements of a vector register.
REGISTER = SUBLANES * LANES

# VMEM for statistics, for Mosaic itself and for spilled registers, which take up to 2
# MiB with 256 features in float32.
OTHER_BYTES = 4 * 2**20

# Minimum bytes of a slab that is worth a step of its own (0.35 us). Smaller slabs are
# joined, for which XLA copies an array whose rows do not fill their tiles. A smaller
# example with its own scale or bias is not worth a step either, but cannot be joined to
# others.
SLAB_BYTES = 64 * 2**10


# --- forward --------------------------------------------------------------------------

# A kernel's refs by name. An absent operand has none, and neither has a result that is
# not wanted.
Refs = dict[str, Any]

# Reads a piece of a chunk, in float32: [chunk_rows, its lanes], or down the sublanes
# [its sublanes, chunk_rows]. A value per row, for example its mean, is [chunk_rows,
# LANES] or [SUBLANES, chunk_rows], and `blocks.broadcast` repeats it for a piece.
Reader = Callable[[Piece], jax.Array]


def _forward_kernel(ref: Refs, call: Call, blocks: Blocks) -> None:
    """Computes those results among y, h, mean and var that have a ref.

    Shapes of the refs:
      x, residual, shortcut, y, h: a block, [block_rows, lanes] or as `DownSublanes` or
        `Turned` cut it.
      scale, bias: [period, lanes] or in tiles. A scale is a block if
        `call.scales_each`.
      mean, var: float32, one per row of a block.
      scale_kept, bias_kept: [sublanes, kept_rows] float32; from tiles, [1, lanes].
      centred_kept: chunks of one turn, float32.
    """
    _keep_params(ref, blocks)

    def chunk(index: Any, slot: int, *_: Any) -> None:
        _forward_chunk(ref, call, blocks, index, slot)

    blocks.for_each_chunk(chunk, masks=False)


def _forward_chunk(
    ref: Refs, call: Call, blocks: Blocks, index: Any, slot: int
) -> None:
    """Computes y = act(x_hat * scale + bias + shortcut) of one chunk."""
    norm = call.norm
    read = _readers(ref, call, blocks, index)
    if "residual" in ref:
        read["x"] = _add_residual(read, ref["h"], blocks, index)
    with jax.named_scope("statistics"):
        mean, mean_error, var, read_centred = _statistics(
            read["x"], ref.get("centred_kept"), blocks, slot, center=norm.center
        )
    if "y" in ref:
        rstd = lax.rsqrt(var + norm.epsilon)

        def normalize(piece: Piece, _: None) -> None:
            centred = read_centred(piece)
            if norm.center:
                centred = centred - blocks.broadcast(mean_error, piece)
            z = _affine(centred * blocks.broadcast(rstd, piece), piece, read)
            blocks.write(ref["y"], index, piece, activate(norm.activation, z))

        with jax.named_scope("normalize"):
            blocks.over_pieces(normalize)
    if "mean" in ref:
        blocks.put_statistic(ref["mean"], index, mean + mean_error)
    if "var" in ref:
        blocks.put_statistic(ref["var"], index, var)


def _add_residual(
    read: dict[str, Reader], h_ref: Any, blocks: Blocks, index: Any
) -> Reader:
    """Writes h = x + residual and returns its reader. The norm is of h as rounded,
    because that is what a backward reads."""

    def add_piece(piece: Piece, _: None) -> None:
        h = read["x"](piece) + read["residual"](piece)
        blocks.write(h_ref, index, piece, h)

    blocks.over_pieces(add_piece)
    return blocks.reader(h_ref, index)


def _statistics(
    read_x: Reader, kept: Any, blocks: Blocks, slot: int, *, center: bool
) -> tuple[Any, Any, jax.Array, Reader]:
    """Sums the features of each row of a chunk.

    A float32 sum of large numbers is off by several rounding errors, the sum of their
    differences from the mean by none. So the second pass also finds the mean's error.

    Returns:
      mean, mean_error: the sum of both is the row's mean. Each is None if not centred.
      var: variance, or mean of x * x if not centred.
      read_centred: reader of x - mean, or of x if not centred.
    """
    mean: Any = None
    put_x, get_x = blocks.keep(kept, slot, read_x)

    def sum_x(piece: Piece, totals: Any) -> list[jax.Array]:
        x = read_x(piece)
        put_x(piece, x)
        return blocks.add(totals, [x], piece)

    def center_x(piece: Piece) -> jax.Array:
        return get_x(piece) - blocks.broadcast(mean, piece) if center else read_x(piece)

    put_centred, get_centred = blocks.keep(kept, slot, center_x)

    def sum_squares(piece: Piece, totals: Any) -> list[jax.Array]:
        centred = center_x(piece)
        put_centred(piece, centred)
        terms = [centred * centred, centred] if center else [centred * centred]
        return blocks.add(totals, terms, piece)

    if not center:
        (squares,) = blocks.over_pieces(sum_squares)
        return None, None, _row_mean(squares, blocks), get_centred
    (total,) = blocks.over_pieces(sum_x)
    mean = _row_mean(total, blocks)
    squares, errors = blocks.over_pieces(sum_squares)
    var, mean_error = _row_mean(squares, blocks), _row_mean(errors, blocks)
    var = jnp.maximum(var - mean_error * mean_error, 0)
    return mean, mean_error, var, get_centred


# --- backward -------------------------------------------------------------------------


def _backward_kernel(ref: Refs, call: Call, blocks: Blocks) -> None:
    """Computes those results among dx, dscale, dbias, dshortcut, c1 and c2 that have a
    ref.

    Shapes of the refs:
      dy, x, dh, shortcut, dx, dshortcut: a block, [block_rows, lanes] or as
        `DownSublanes` or `Turned` cut it. If only dbias is wanted, x is absent.
      scale, bias: [period, lanes] or in tiles. A scale is a block if
        `call.scales_each`.
      mean, var, c1, c2: float32, one per row of a block.
      dscale, dbias: float32, [period, lanes] or in tiles. A dscale is a block if
        `call.scales_each`.
      scale_kept, bias_kept: [sublanes, kept_rows] float32; from tiles, [1, lanes].
      centred_kept, rstd_w_kept: chunks of one turn, float32.
      dscale_sum, dbias_sum: float32, accumulated over `blocks.IN_A_ROW` chunks or a
        step, whichever is longer: [SUBLANES or period, lanes] or [sublanes, kept_rows].
    """
    _keep_params(ref, blocks)

    @pl.when(_is_first_step())
    def _() -> None:
        for name in call.summed:
            for total in (ref[f"{name}_sum"], ref[name]):
                total[...] = jnp.zeros_like(total)

    def statistics(index: Any) -> tuple[Any, Any]:
        """Returns mean and rstd of each row of a chunk."""
        mean: Any = None
        rstd: Any = None
        if "var" in ref:
            rstd = blocks.get_statistic(
                ref["var"], index, lambda var: lax.rsqrt(var + call.norm.epsilon)
            )
        if "mean" in ref:
            mean = blocks.get_statistic(ref["mean"], index)
        return mean, rstd

    chunk = functools.partial(_backward_chunk, ref, call, blocks)
    blocks.for_each_chunk(chunk, masks=bool(call.summed), statistics=statistics)

    @pl.when(_ends_run(blocks))
    def _() -> None:
        for name in call.summed:
            run = ref[f"{name}_sum"]
            blocks.add_sum(run, ref[name])
            run[...] = jnp.zeros_like(run)


def _backward_chunk(
    ref: Refs,
    call: Call,
    blocks: Blocks,
    index: Any,
    slot: int,
    masked: bool,
    statistics: tuple[Any, Any],
) -> None:
    """Computes the gradients of one chunk: the sums in a first pass over its pieces, dx
    in a second one.

    With centred = x - mean, so that x_hat = centred * rstd, and w = dz * scale:

        c1 = mean(rstd * w * centred),  c2 = mean(w)
        dx = rstd * w - centred * rstd * rstd * c1 - rstd * c2
    """
    mean, rstd = statistics
    inside = blocks.is_inside(index) if masked else None
    read = _readers(ref, call, blocks, index)
    center_x, compute_dz = _through_activation(read, call, blocks, mean, rstd)

    def compute_rstd_w(piece: Piece) -> jax.Array:
        return _scaled(compute_dz(piece) * blocks.broadcast(rstd, piece), piece, read)

    put_centred, get_centred = blocks.keep(ref.get("centred_kept"), slot, center_x)
    put_rstd_w, get_rstd_w = blocks.keep(ref.get("rstd_w_kept"), slot, compute_rstd_w)

    def accumulate(name: str, value: jax.Array, piece: Piece) -> None:
        if inside is not None:  # rows past the last one are garbage
            value = jnp.where(inside, value, 0)
        blocks.part(ref[f"{name}_sum"], piece)[...] += blocks.sum_rows(value)

    def sum_piece(piece: Piece, totals: Any) -> list[jax.Array]:
        """Adds a piece to dscale, dbias and the sums over its features."""
        dz = compute_dz(piece)
        if "dbias" in call.summed:
            accumulate("dbias", dz, piece)
        if "dshortcut" in ref:
            blocks.write(ref["dshortcut"], index, piece, dz)
        if "x" not in ref:
            return []
        centred = center_x(piece)
        rstd_dz = dz * blocks.broadcast(rstd, piece)
        dscale = rstd_dz * centred  # dz * x_hat
        if "dscale" in call.summed:
            accumulate("dscale", dscale, piece)
        elif "dscale" in ref:
            blocks.write(ref["dscale"], index, piece, dscale)
        if not call.wants["dx"]:
            return []
        rstd_w = _scaled(rstd_dz, piece, read)
        put_centred(piece, centred)
        put_rstd_w(piece, rstd_w)
        terms = [rstd_w * centred]
        if call.norm.center:
            terms.append(_scaled(dz, piece, read) if call.half else rstd_w)
        return blocks.add(totals, terms, piece)

    totals = blocks.over_pieces(sum_piece)
    means = [_row_mean(total, blocks) for total in totals]
    if "c1" in ref:
        blocks.put_statistic(ref["c1"], index, means[0])
    if "c2" in ref:
        blocks.put_statistic(ref["c2"], index, means[1])
    if "dx" in ref:
        factor = rstd * rstd * means[0]

        def write_dx(piece: Piece, _: None) -> None:
            dx = get_rstd_w(piece)
            dx = dx - get_centred(piece) * blocks.broadcast(factor, piece)
            if call.norm.center:
                dx = dx - blocks.broadcast(means[1], piece)  # rstd * c2
            if "dh" in ref:
                dx = dx + read["dh"](piece)
            blocks.write(ref["dx"], index, piece, dx)

        blocks.over_pieces(write_dx)


def _through_activation(
    read: dict[str, Reader], call: Call, blocks: Blocks, mean: Any, rstd: Any
) -> tuple[Reader, Reader]:
    """Returns functions that compute a piece of x - mean, and of dz = dy * act'(z)."""
    activation = call.norm.activation

    def center_x(piece: Piece) -> jax.Array:
        x = read["x"](piece)
        return x - blocks.broadcast(mean, piece) if call.norm.center else x

    def compute_dz(piece: Piece) -> jax.Array:
        dy = read["dy"](piece)
        if activation is None:
            return dy
        x_hat = center_x(piece) * blocks.broadcast(rstd, piece)
        return times_slope(activation, _affine(x_hat, piece, read), dy)

    return center_x, compute_dz


# --- both -----------------------------------------------------------------------------


def _keep_params(ref: Refs, blocks: Blocks) -> None:
    """Copies scale and bias to their scratch, if they have any."""
    names = [name for name in ("scale", "bias") if f"{name}_kept" in ref]
    if names:

        @pl.when(_is_first_step())
        def _() -> None:
            for name in names:
                blocks.keep_param(ref[f"{name}_kept"], memory.load(ref[name]))


def _readers(ref: Refs, call: Call, blocks: Blocks, index: Any) -> dict[str, Reader]:
    """Returns readers of a chunk's operands. The scale's adds its offset to it."""
    streamed = ["x", "dy", "dh", "shortcut", *["scale"] * call.scales_each, "residual"]
    read = {name: blocks.reader(ref[name], index) for name in streamed if name in ref}
    for name in ("scale", "bias"):
        if name in ref and name not in read:
            kept = ref.get(f"{name}_kept")
            read[name] = functools.partial(blocks.param, ref[name], kept)
    if "scale" in read:
        stored = read["scale"]
        read["scale"] = lambda piece: call.norm.weight(stored(piece))
    return read


def _affine(x_hat: jax.Array, piece: Piece, read: dict[str, Reader]) -> jax.Array:
    """Returns a piece of z = x_hat * scale + bias + shortcut."""
    z = _scaled(x_hat, piece, read)
    for name in ("bias", "shortcut"):
        if name in read:
            z = z + read[name](piece)
    return z


def _scaled(value: jax.Array, piece: Piece, read: dict[str, Reader]) -> jax.Array:
    return value * read["scale"](piece) if "scale" in read else value


def _row_mean(total: jax.Array, blocks: Blocks) -> jax.Array:
    """Returns each row's mean, given the totals over its pieces."""
    return blocks.sum_features(total) * (1 / blocks.features)


def _is_first_step() -> jax.Array:
    """Returns whether this step is the core's first one of an example."""
    return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)


def _is_last_step(blocks: Blocks) -> jax.Array:
    *_, slabs, rows = blocks.grid
    return (pl.program_id(2) == slabs - 1) & (pl.program_id(3) == rows - 1)


def _ends_run(blocks: Blocks) -> jax.Array:
    """Returns whether the sums of these steps are added to the example's."""
    run = blocks.steps_in_a_row
    step = pl.program_id(2) * blocks.grid[3] + pl.program_id(3)
    return (lax.rem(step, run) == run - 1) | _is_last_step(blocks)


# --- the launch -----------------------------------------------------------------------


def forward(
    call: Call,
    blocks: Blocks,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
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
      residual, shortcut: x's shape, or None.
    """
    norm = call.norm
    results: dict[str, memory.Blocked] = {}
    if not call.half:
        results["y"] = memory.result(x, blocks.view, norm.dtype), blocks.rows_spec
    if residual is not None:
        h = memory.result(x, blocks.view, memory.kept_as(call.sum_dtype))
        results["h"] = h, blocks.rows_spec
    if call.statistics:
        statistic = memory.result(x, blocks.statistic_view, jnp.float32)
        names = ("mean", "var") if norm.center else ("var",)
        results |= dict.fromkeys(names, (statistic, blocks.statistic_spec))
    computed = memory.pallas_call(
        lambda ref: _forward_kernel(ref, call, blocks),
        "rowwise_forward",
        blocks.grid,
        max(blocks.vmem, VMEM_BYTES),
        operands={
            "x": _rows(x, blocks),
            "scale": (_rows if call.scales_each else _param)(scale, blocks),
            "bias": _param(bias, blocks),
            "residual": _rows(residual, blocks),
            "shortcut": _rows(shortcut, blocks),
        },
        results=results,
        scratch={
            **_kept_params(call, blocks, scale, bias),
            "centred_kept": None if call.half else blocks.kept_chunks,
        },
    )
    if "h" in computed and computed["h"].dtype == jnp.int16:
        computed["h"] = lax.bitcast_convert_type(computed["h"], jnp.float16)
    shapes = dict.fromkeys(("y", "h"), x.shape)
    shapes |= dict.fromkeys(("mean", "var"), norm.statistic_shape(x.shape))
    return [result.reshape(shapes[name]) for name, result in computed.items()]


def backward(
    call: Call,
    blocks: Blocks,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
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
      dh: x's shape, or None.
      shortcut: x's shape, or None; for an activation.

    Returns:
      dx in x's shape and dtype; dscale and dbias in float32 of shape (features,) after
      the leading axes of x that `call.own_params` counts, or dscale in the shape and
      dtype of a scale of x's shape; dshortcut in the shortcut's shape and dtype.
    """
    writes_c1_c2 = call.half and call.wants["dx"]  # instead of dx
    results: dict[str, memory.Blocked] = {}
    partials = memory.result(x, blocks.param_gradient_view, jnp.float32)
    for name, like in zip(call.wants, (x, scale, bias, shortcut), strict=True):
        if name in call.summed:
            results[name] = partials, blocks.param_gradient_spec
        elif call.wants[name] and not (name == "dx" and writes_c1_c2):
            assert like is not None
            results[name] = memory.result(x, blocks.view, like.dtype), blocks.rows_spec
    if writes_c1_c2:
        statistic = memory.result(x, blocks.statistic_view, jnp.float32)
        names = ("c1", "c2") if call.norm.center else ("c1",)
        results |= dict.fromkeys(names, (statistic, blocks.statistic_spec))
    reads_x = _reads_x(call)
    if not _reads_scale(call):
        scale = None
    if mean is not None:
        mean = mean.reshape(blocks.statistic_view)
    computed = memory.pallas_call(
        lambda ref: _backward_kernel(ref, call, blocks),
        "rowwise_backward",
        blocks.grid,
        max(blocks.vmem, VMEM_BYTES),
        operands={
            "dy": _rows(dy, blocks),
            "x": _rows(x if reads_x else None, blocks),
            "scale": (_rows if call.scales_each else _param)(scale, blocks),
            "bias": _param(bias, blocks),
            "mean": (mean if reads_x else None, blocks.statistic_spec),
            "var": (
                var.reshape(blocks.statistic_view) if reads_x else None,
                blocks.statistic_spec,
            ),
            "dh": _rows(dh, blocks),
            "shortcut": _rows(shortcut, blocks),
        },
        results=results,
        scratch={
            **_kept_params(call, blocks, scale, bias),
            "centred_kept": blocks.kept_chunks if "dx" in results else None,
            "rstd_w_kept": blocks.kept_chunks if "dx" in results else None,
            **{f"{name}_sum": blocks.kept_sum for name in call.summed},
        },
    )
    leading = x.shape[: call.own_params]
    for name in call.summed:
        computed[name] = blocks.sum_partials(computed[name], math.prod(leading))
    shapes = dict.fromkeys(("c1", "c2"), call.norm.statistic_shape(x.shape))
    shapes |= dict.fromkeys(call.wants, x.shape)
    shapes |= dict.fromkeys(call.summed, (*leading, blocks.groups * blocks.features))
    return [
        computed[name].reshape(shape)
        for name, shape in shapes.items()
        if name in computed
    ]


def _rows(array: jax.Array | None, blocks: Blocks) -> memory.Blocked:
    """Returns an operand of x's size and its block spec."""
    return None if array is None else array.reshape(blocks.view), blocks.rows_spec


def _param(param: jax.Array | None, blocks: Blocks) -> memory.Blocked:
    """Returns scale or bias as [n, period, features], each entry for an equal number of
    examples, or a single one in tiles; and its block spec."""
    if param is None:
        return None, blocks.param_spec(1)
    # With shape [features], Pallas would ask which TPU it compiles for: `memory.row`.
    if blocks.in_tiles(param.size // blocks.features):
        return param.reshape(-1, LANES), blocks.param_spec(1)
    rows = param.reshape(-1, 1, blocks.features)
    if blocks.period > 1:
        rows = jnp.tile(
            rows.reshape(1, -1, blocks.features), (1, blocks.period // len(rows), 1)
        )
    return rows, blocks.param_spec(len(rows))


def _kept_params(call: Call, blocks: Blocks, scale: Any, bias: Any) -> dict[str, Any]:
    """Returns the scratch for scale and bias, unless each row has its own scale."""
    shared = {"scale_kept": None if call.scales_each else scale, "bias_kept": bias}
    return {
        name: blocks.kept_param(param.size // blocks.features)
        for name, param in shared.items()
        if param is not None
    }


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, chip: memory.Chip) -> Kernel | Fallback:
    """Chooses blocks for a call whose view has S = 1."""
    view = call.view
    vmem, blocks_bytes = max(chip.vmem, VMEM_BYTES), max(chip.blocks, BLOCKS_BYTES)
    chip = dataclasses.replace(chip, vmem=vmem, blocks=blocks_bytes)
    natural = tuple(range(call.x.ndim))
    order = natural
    if call.norm.reduction_axes == natural[-1:]:  # neither groups nor several axes
        order = order_of_axes(call.x.shape, call.x.dtype.itemsize, call.param_axes)
    groups, param_axes = call.row_groups, call.param_axes
    if groups > 1 and order != natural:
        # The groups lie in front of the rows: each group of a sample is an example.
        param_axes = len(order) - 2
        axes = call.norm.feature_axes[:-1]
        if order[param_axes - len(axes) : param_axes] != axes:
            return _groups_fallback(
                groups, "some groups do not lie in front of the rows in memory"
            )
    down = None
    if order[-1] != natural[-1]:
        down = down_sublanes(_transposed(call, order), chip, groups, param_axes)
        if down is None:
            order, param_axes = natural, call.param_axes
    call = _transposed(call, order)
    blocks = down or across_lanes(call, view, chip, groups, param_axes)
    if isinstance(blocks, Fallback):
        return blocks
    blocks = blocks.shared_by(chip.cores)
    layout = "features down the sublanes" if down else "rows are contiguous"
    if isinstance(blocks, Turned):
        layout += ", transposed in registers"
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
        why=f"{layout}; {blocks.chunk_rows} rows at a time",
        bytes_moved=bytes_moved(call, blocks),
        unless_named=_not_worth_it(call, blocks),
    )


def _groups_fallback(groups: int, why: str) -> Fallback:
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
    **by_name: jax.Array,
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
        **{name: transpose(array, order) for name, array in by_name.items()},
    )
    return [transpose(result, back) for result in results]


def across_lanes(
    call: Call, view: Geometry, chip: memory.Chip, groups: int, param_axes: int
) -> AcrossLanes | Turned | Fallback:
    """Chooses the blocks for features across the lanes.

    Block and chunk sizes follow from features, groups, dtypes and the chip, except that
    few rows make a chunk smaller. The rest follows from the shape.

    Args:
      call: the call, its arrays as they lie in memory.
      view: view of x before it was transposed.
      chip: chip with the VMEM to use.
      groups: number of row groups, each with a scale and bias of its own.
      param_axes: leading axes along which scale, bias or their gradients vary.
    """
    features = view.k
    lanes = round_up(features, LANES)
    turned = lanes == LANES
    itemsizes = [dtype.itemsize for dtype in _streamed(call)]
    itemsize = min(itemsizes)
    register_rows = SUBLANES * 4 // itemsize

    row_bytes = 2 * lanes * sum(itemsizes)  # two buffers per array
    block_rows = power_of_two(max(chip.blocks // row_bytes, 1))
    block_rows = min(max(block_rows, register_rows), MOST_ROWS)
    crowded = call.op == "backward" and (call.slopes or len(itemsizes) > 3)
    chunk_rows = min(_chunk_rows(call.op, itemsize, lanes, crowded), block_rows)
    period = 1
    if groups > 1 and param_axes == 0:
        if call.x.shape[-1] != features:
            return _groups_fallback(groups, "the groups share the lanes")
        period = math.lcm(groups, LANES if turned else SUBLANES)
        if turned:
            chunk_rows -= chunk_rows % period
        if chunk_rows == 0 or chunk_rows % period:
            return _groups_fallback(
                groups, "no whole number of groups fills a chunk's registers"
            )
    vmem = block_rows * row_bytes + _params_bytes(call, lanes, period) + OTHER_BYTES
    if vmem > chip.vmem:
        return Fallback(
            f"{features} features: {block_rows} rows take {vmem:,} bytes of VMEM, a "
            f"kernel may use {chip.vmem:,}"
        )

    examples, slabs, rows = _slabs(call, view, param_axes, register_rows)
    if period > 1 and rows % groups:
        return _groups_fallback(groups, "the groups span several axes")
    cut = {"examples": examples, "slabs": slabs, "rows": rows}
    cut |= {"features": features, "groups": groups, "period": period}
    if turned:
        chunk_rows = min(chunk_rows, round_up(rows, max(LANES, period)))
        block_rows -= block_rows % chunk_rows
        return Turned(vmem=vmem, block_rows=block_rows, chunk_rows=chunk_rows, **cut)
    chunk_rows = min(chunk_rows, max(pl.next_power_of_2(rows), register_rows, period))
    chunks_per_turn = 1
    if lanes <= UNROLLED:
        chunks = min(rows, block_rows) // chunk_rows
        most = TURN_REGISTERS * REGISTER // (chunk_rows * lanes)
        chunks_per_turn = max(min(chunks, most), 1)
    kept_bytes = chunks_per_turn * chunk_rows * lanes * 4
    if call.op == "backward":
        kept_bytes *= 2
    keeps = itemsize == 2 and vmem + kept_bytes <= chip.vmem
    return AcrossLanes(
        vmem=vmem + kept_bytes * keeps,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        piece_width=2 * LANES if itemsize == 2 else LANES,
        chunks_per_turn=chunks_per_turn,
        keeps=keeps,
        **cut,
    )


def _chunk_rows(op: str, itemsize: int, lanes: int, crowded: bool) -> int:
    """Returns the rows of a chunk by the registers that it may fill."""
    registers, least_rows = REGISTERS[op, itemsize]
    if lanes == LANES:
        registers = CROWDED_REGISTERS if crowded else TURNED_REGISTERS[op, itemsize]
    return power_of_two(max(registers * REGISTER // lanes, least_rows))


def _params_bytes(call: Call, lanes: int, period: int) -> int:
    """Returns the VMEM for scale, bias and their gradients, each [period, lanes]."""
    # Two buffers each for scale, bias (in a backward only before an activation) and
    # results; then the accumulators of dscale and dbias.
    rows = 4 * period
    if call.op == "backward":
        rows = (6 + 2 * call.slopes) * period + 2 * max(SUBLANES, period)
    # Scale and bias once more: from tiles, which are whole registers, or transposed.
    if period == 1:
        lanes = round_up(lanes, REGISTER)
    if period == 1 or lanes == LANES:
        rows += 2 * period
    return rows * lanes * 4


def _slabs(
    call: Call, view: Geometry, param_axes: int, register_rows: int
) -> tuple[int, int, int]:
    """Returns the number of examples, of slabs per example and of rows per slab."""
    examples = math.prod(call.x.shape[:param_axes])
    rows = view.n * view.g // examples
    # Joining axes before the last is free if the second to last fills its tiles.
    if call.x.ndim - param_axes > 2 and call.x.shape[-1] == view.k:
        slab_rows = call.x.shape[-2]
        slab_bytes = slab_rows * view.k * call.x.dtype.itemsize
        if slab_rows % register_rows and slab_bytes >= SLAB_BYTES:
            return examples, rows // slab_rows, slab_rows
    return examples, 1, rows


def down_sublanes(
    call: Call, chip: memory.Chip, groups: int, param_axes: int
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
      chip, groups, param_axes: same as for `across_lanes`.
    """
    *leading, features, rows = call.x.shape
    examples = math.prod(leading[:param_axes])
    slabs = math.prod(leading[param_axes:])
    sublanes = round_up(features, SUBLANES)
    tile = sublanes * LANES  # elements of LANES rows
    tile_bytes = 2 * tile * sum(dtype.itemsize for dtype in _streamed(call))
    tile_bytes += 2 * 2 * SUBLANES * LANES * 4  # mean and variance, as whole registers
    most_tiles = max(min(chip.blocks // tile_bytes, MOST_ROWS * LANES // tile), 1)
    # Scale and bias; or scale, dscale and dbias, plus bias before an activation.
    kept_bytes = (3 + (call.norm.activation is not None)) * tile * 4
    vmem = most_tiles * tile_bytes + kept_bytes + OTHER_BYTES
    if vmem > chip.vmem:
        return None

    # From here on, sizes are in tiles of LANES rows.
    tiles = pl.cdiv(rows, LANES)
    chunk = min(max(DOWN_REGISTERS[call.op] * REGISTER // tile, 1), most_tiles)
    if tiles <= most_tiles:  # all rows of a slab in one block, in equal chunks
        chunks = pl.cdiv(tiles, chunk)
        chunk = pl.cdiv(tiles, chunks)
    else:
        chunks = most_tiles // chunk
    block_rows = chunks * chunk * LANES
    return DownSublanes(
        vmem=vmem,
        examples=examples,
        slabs=slabs,
        rows=rows,
        features=features,
        block_slabs=min(max(most_tiles * LANES // block_rows, 1), slabs),
        block_rows=block_rows,
        chunk_rows=chunk * LANES,
        groups=groups,
    )


def _params_differ(call: Call) -> bool:
    """Returns whether examples have their own scale or bias, not only their own
    sums."""
    return dataclasses.replace(call, own_params=0).param_axes > 0


def _streamed(call: Call) -> list[jnp.dtype]:
    """Returns the dtypes of the arrays of x's size that the kernel reads or writes."""
    scale = call.scale if call.scales_each and _reads_scale(call) else None
    read = [a.dtype for a in (call.addend, call.shortcut, scale) if a is not None]
    if call.op == "forward":
        written = [] if call.half else [call.norm.dtype]
        written += [] if call.addend is None else [call.sum_dtype]
        return [call.x.dtype, *read, *written]
    assert call.dy is not None
    wants = call.wants
    streamed = [call.dy.dtype, *read]
    streamed += [call.x.dtype] * (_reads_x(call) + (wants["dx"] and not call.half))
    if wants["dscale"] and call.scales_each:
        assert call.scale is not None
        streamed.append(call.scale.dtype)
    if wants["dshortcut"]:
        assert call.shortcut is not None
        streamed.append(call.shortcut.dtype)
    return streamed


def _reads_x(call: Call) -> bool:
    """Returns whether a backward reads x. dbias alone needs x only for an activation's
    slope."""
    return call.wants["dx"] or call.wants["dscale"] or call.slopes


def _reads_scale(call: Call) -> bool:
    """Returns whether the kernel reads the scale, if there is one. dscale and dbias
    alone do not need it."""
    return call.op == "forward" or call.wants["dx"] or call.slopes


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
    writes_c1_c2 = call.half and call.wants["dx"]
    return total + statistics * (_reads_x(call) + writes_c1_c2)
