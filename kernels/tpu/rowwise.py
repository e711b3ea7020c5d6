"""Norms of contiguous rows on a TPU, forward and backward, each in one kernel.

    x_hat = (x - mean) * rstd,  y = x_hat * scale + bias
    dx = rstd * (wdy - c2 - x_hat * c1),  wdy = dy * scale,
        c1 = sum(wdy * x_hat) / features,  c2 = sum(wdy) / features
    dscale = sum(dy * x_hat),  dbias = sum(dy)  over the rows

One row's mean and variance are taken over its own features; RMSNorm leaves out mean
and c2. For the sources of the formulas see reference/norm.py.

The array is seen as x[examples, slabs, rows, features], or with features before rows
where XLA has it so in memory: blocks.py has both, and what a kernel asks of either. A
grid step has a block of rows in VMEM, whole rows; Pallas fetches the next block and
writes back the last one meanwhile. So HBM sees each element once: the forward reads x
and writes y, the backward reads x and dy and writes dx. Statistics add 4 bytes a row
each, parameters and their gradients once their own size.

Inside a block a loop takes a chunk of rows at a time, as many as the registers hold.
Chunks beyond the last row are left out; garbage in a chunk's own last rows stays in
these rows, and is kept out of dscale and dbias. What is done to a row, and in which
order, depends on features and dtypes alone.
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

from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry
from fusednorm.kernels.tpu import memory
from fusednorm.kernels.tpu.blocks import (
    AcrossLanes,
    Blocks,
    DownSublanes,
    inverse,
    order_of_axes,
)
from fusednorm.kernels.tpu.memory import LANES, SUBLANES, power_of_two, round_up

# Blocks of all operands together, two of each: one in use, one in flight. At 0.8 to
# 3.7 TB/s a step takes from 5 us down to 1 us, against about 0.35 us of its own cost.
BLOCKS_BYTES = 8 * 2**20

# Of a block; a MiB of 128 bfloat16 features. Down the sublanes, where 64 features fill
# their registers, as many elements.
MOST_ROWS = 4096

# VMEM for a kernel without asking for more: all that a v4 has, and what XLA keeps free
# on all others. Rows that do not fit take the reference.
VMEM_BYTES = 16 * 2**20

# Elements of a chunk: 64 vector registers in float32, all that there are. With fewer
# the sums over lanes are waited for, with more registers spill. Cycles of a step over
# those of its HBM traffic, compiled for a v5e, bfloat16, 768 features: forward 1.11
# with 12 registers, 0.93 with 24, 0.68 with 48; backward 0.81, 0.72, 0.63, and 0.66
# with 96. And 128 features: forward 1.86 with 16, 1.73 with 32, 1.46 with 64, 1.59 with
# 128.
CHUNK = 64 * SUBLANES * LANES

# Float32 copies of a chunk that lie in VMEM where the registers do not hold it. Seen in
# compiled code of 24576 to 65536 features: forward 2, backward 4.3; with float16, whose
# conversion has values of its own, 4.8 and 6.2.
SPILLED, SPILLED_16 = 5, 7

# Below this size in bytes a slab is not worth a step of its own (0.35 us): the slabs
# are joined, for which XLA copies an array whose rows do not fill their tiles.
SLAB_BYTES = 64 * 2**10


# --- forward --------------------------------------------------------------------------


def _forward_kernel(
    x_ref: Any,  # a block: [block_rows, lanes], or [block_slabs, sublanes, block_rows]
    scale_ref: Any,  # [1, lanes], or None
    bias_ref: Any,  # [1, lanes], or None
    y_ref: Any,  # a block
    mean_ref: Any,  # float32, of a block's rows, or None
    var_ref: Any,  # likewise
    scale_kept: Any,  # [sublanes, LANES] float32, or None
    bias_kept: Any,  # likewise
    *,
    center: bool,
    epsilon: float,
    blocks: Blocks,
) -> None:
    """y, and mean and variance of each row."""
    per_feature = 1 / blocks.features
    _keep_params([(scale_ref, scale_kept), (bias_ref, bias_kept)], blocks)

    def chunk(index: Any) -> None:
        here = blocks.place(index)
        x = memory.load(x_ref, here)  # [chunk_rows, lanes], or [sublanes, chunk_rows]
        with jax.named_scope("statistics"):
            if center:
                # The mean, and the mean of what it leaves: a float32 sum of large
                # numbers is off by several roundings, and that of the rest by none.
                mean = blocks.sum_features(x) * per_feature
                x = x - mean
                shift = blocks.sum_features(x) * per_feature
                mean = mean + shift
                x = x - shift
            var = blocks.sum_features(x * x) * per_feature  # one a row
        with jax.named_scope("normalize"):
            y = x * lax.rsqrt(var + epsilon)
            if scale_ref is not None:
                y = y * _param(scale_ref, scale_kept, blocks)
            if bias_ref is not None:
                y = y + _param(bias_ref, bias_kept, blocks)
        memory.store(y_ref, here, y)
        if mean_ref is not None:
            blocks.put_statistic(mean_ref, index, mean)
        if var_ref is not None:
            blocks.put_statistic(var_ref, index, var)

    blocks.for_each_chunk(chunk)


# --- backward -------------------------------------------------------------------------


def _backward_kernel(
    dy_ref: Any,  # a block: [block_rows, lanes], or [block_slabs, sublanes, block_rows]
    x_ref: Any,  # a block, or None where dbias alone is wanted
    scale_ref: Any,  # [1, lanes], or None
    mean_ref: Any,  # float32, of a block's rows, or None
    var_ref: Any,  # likewise
    dx_ref: Any,  # a block, or None
    dscale_ref: Any,  # [1, lanes] float32, or None
    dbias_ref: Any,  # likewise
    scale_kept: Any,  # [sublanes, LANES] float32, or None
    dscale_sum: Any,  # [SUBLANES, lanes] or [sublanes, LANES] float32, or None: kept
    dbias_sum: Any,  # likewise                                     from step to step
    *,
    center: bool,
    epsilon: float,
    blocks: Blocks,
) -> None:
    """Those of dx, dscale and dbias that are wanted."""
    per_feature = 1 / blocks.features
    sums = [
        (total, result)
        for total, result in ((dscale_sum, dscale_ref), (dbias_sum, dbias_ref))
        if total is not None
    ]

    _keep_params([(scale_ref, scale_kept)], blocks)

    @pl.when(_is_first_step())
    def _() -> None:
        for total, _ in sums:
            total[...] = jnp.zeros_like(total)

    def chunk(index: Any) -> None:
        here = blocks.place(index)
        dy = memory.load(dy_ref, here)  # [chunk_rows, lanes], or [sublanes, chunk_rows]
        inside = blocks.is_inside(index)  # one a row
        if x_ref is not None:
            x_hat = memory.load(x_ref, here)
            if mean_ref is not None:
                x_hat = x_hat - blocks.get_statistic(mean_ref, index)
            rstd = lax.rsqrt(blocks.get_statistic(var_ref, index) + epsilon)
            x_hat = x_hat * rstd
        if dx_ref is not None:
            wdy = dy
            if scale_ref is not None:
                wdy = dy * _param(scale_ref, scale_kept, blocks)
            c1 = blocks.sum_features(wdy * x_hat) * per_feature
            dx = wdy - x_hat * c1
            if center:
                dx = dx - blocks.sum_features(wdy) * per_feature
            memory.store(dx_ref, here, dx * rstd)
        if dscale_sum is not None:
            dscale_sum[...] += blocks.sum_rows(jnp.where(inside, dy * x_hat, 0))
        if dbias_sum is not None:
            dbias_sum[...] += blocks.sum_rows(jnp.where(inside, dy, 0))

    blocks.for_each_chunk(chunk)

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


def _param(ref: Any, kept: Any, blocks: Blocks) -> jax.Array:
    """Scale or bias, that broadcasts to a chunk."""
    return blocks.for_chunk(memory.load(ref) if kept is None else kept[...])


def _is_first_step() -> jax.Array:
    """Of those of one example."""
    return (pl.program_id(1) == 0) & (pl.program_id(2) == 0)


def _is_last_step(blocks: Blocks) -> jax.Array:
    _, slabs, last = blocks.grid
    return (pl.program_id(1) == slabs - 1) & (pl.program_id(2) == last - 1)


# --- the launch -----------------------------------------------------------------------


def forward(
    call: Call,
    blocks: Blocks,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
) -> list[jax.Array]:
    """y, and with `call.statistics` mean (if centred) and var.

    Args:
      call: one that `plan` takes.
      blocks: how it cuts x.
      x: any shape; float32, bfloat16 or float16, as are all that follow.
      scale, bias: shape (features,), or None.
      mask: None.
    """
    norm = call.norm
    view = blocks.view
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    statistic = (
        memory.result(x, row_of_statistics, jnp.float32) if call.statistics else None
    )
    y, *statistics = _pallas_call(
        functools.partial(
            _forward_kernel, center=norm.center, epsilon=norm.epsilon, blocks=blocks
        ),
        name="rowwise_forward",
        blocks=blocks,
        operands=[
            (x.reshape(view), blocks.of_rows),
            (memory.row(scale), blocks.of_param),
            (memory.row(bias), blocks.of_param),
        ],
        results=[
            (memory.result(x, view, norm.dtype), blocks.of_rows),
            (statistic if norm.center else None, blocks.of_statistic),
            (statistic, blocks.of_statistic),
        ],
        scratch=[blocks.kept_param if p is not None else None for p in (scale, bias)],
    )
    shapes = [x.shape, *[norm.statistic_shape(x.shape)] * 2]
    return _present([y, *statistics], shapes)


def backward(
    call: Call,
    blocks: Blocks,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
) -> list[jax.Array]:
    """Those of dx, dscale and dbias that are wanted.

    Args:
      call: one that `plan` takes.
      blocks: how it cuts x.
      dy, x: of one shape, each float32, bfloat16 or float16.
      scale: shape (features,), or None.
      mean, var: the forward's statistics, float32.
      mask: None.

    Returns:
      dx in x's shape and dtype; dscale and dbias float32 of shape (features,), behind
      the leading axes of x that `call.own_params` counts.
    """
    if not any(call.wanted):
        return []
    dx, dscale, dbias = call.wanted
    reads_x = dx or dscale
    view = blocks.view
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    param = memory.result(x, (blocks.examples, 1, blocks.features), jnp.float32)
    total = blocks.kept_sum
    if mean is not None:
        mean = mean.reshape(row_of_statistics)
    results = _pallas_call(
        functools.partial(
            _backward_kernel,
            center=call.norm.center,
            epsilon=call.norm.epsilon,
            blocks=blocks,
        ),
        name="rowwise_backward",
        blocks=blocks,
        operands=[
            (dy.reshape(view), blocks.of_rows),
            (x.reshape(view) if reads_x else None, blocks.of_rows),
            (memory.row(scale) if dx else None, blocks.of_param),
            (mean if reads_x else None, blocks.of_statistic),
            (var.reshape(row_of_statistics) if reads_x else None, blocks.of_statistic),
        ],
        results=[
            (memory.result(x, view, x.dtype) if dx else None, blocks.of_rows),
            (param if dscale else None, blocks.of_param_gradient),
            (param if dbias else None, blocks.of_param_gradient),
        ],
        scratch=[
            blocks.kept_param if dx and scale is not None else None,
            total if dscale else None,
            total if dbias else None,
        ],
    )
    params = (*x.shape[: call.own_params], blocks.features)
    return _present(results, [x.shape, params, params])


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
    scratch: Sequence[Any] = (),
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
    )(*[memory.bits(array) for array, _ in operands])


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, view: Geometry, device: Any) -> Kernel | Fallback:
    """Chooses blocks for a call whose view has S = 1 and one set of parameters."""
    own, natural = call.own_params, tuple(range(call.x.ndim))
    order = natural
    if call.norm.reduction_axes == natural[-1:]:  # no groups, nor several axes
        order = order_of_axes(call.x.shape, call.x.dtype.itemsize, own)
    down = None
    if order[-1] != natural[-1]:
        down = down_sublanes(_transposed(call, order))
        order = order if down else natural
    call = _transposed(call, order)
    blocks = down or across_lanes(call, view)
    if isinstance(blocks, Fallback):
        return blocks
    launch: Callable[..., list[jax.Array]]
    launch = forward if call.op == "forward" else backward
    launch = functools.partial(launch, call, blocks)
    if order != natural:
        launch = functools.partial(_launch_transposed, launch, order)
    return Kernel(
        backend="mosaic_tpu",
        name=f"rowwise {call.op}",
        launch=launch,
        block=str(blocks),
        why=f"{'features down the sublanes' if down else 'rows lie contiguous'}; "
        f"{blocks.chunk_rows} rows at a time in registers",
        bytes_moved=bytes_moved(call, blocks),
    )


def _transposed(call: Call, order: Sequence[int]) -> Call:
    """The call for an x, and a dy, with its axes in `order`."""

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
    x, dy = transposed(call.x), transposed(call.dy)
    return dataclasses.replace(call, norm=norm, x=x, dy=dy)


def _launch_transposed(
    launch: Callable[..., list[jax.Array]],
    order: Sequence[int],
    *operands: jax.Array | None,
) -> list[jax.Array]:
    """Launches with x, dy, mean and var in `order`; y, dx, mean and var come back."""
    back = inverse(order)

    def transpose(array: Any, axes: Sequence[int]) -> Any:
        if array is None or array.ndim != len(order):
            return array
        return lax.transpose(array, axes)

    results = launch(*[transpose(operand, order) for operand in operands])
    return [transpose(result, back) for result in results]


def across_lanes(call: Call, view: Geometry) -> AcrossLanes | Fallback:
    """Block and chunk follow from features and dtypes; the rest from the shape."""
    features = view.k
    lanes = round_up(features, LANES)
    streamed = _streamed(call)
    itemsizes = [dtype.itemsize for dtype in streamed]
    least = SUBLANES * 4 // min(itemsizes)  # rows of one register

    row_bytes = 2 * lanes * sum(itemsizes)
    block_rows = power_of_two(max(BLOCKS_BYTES // row_bytes, 1))
    block_rows = min(max(block_rows, least), MOST_ROWS)
    chunk_rows = power_of_two(max(CHUNK // lanes, 1))
    chunk_rows = min(max(chunk_rows, least), block_rows)
    sums = 2 * SUBLANES * lanes * 4 if call.op == "backward" else 0
    need = block_rows * row_bytes + sums + _spilled(call, chunk_rows * lanes)
    if need > VMEM_BYTES:
        return Fallback(
            f"{features} features: {block_rows} rows take {need:,} bytes of VMEM, a "
            f"kernel has {VMEM_BYTES:,}"
        )

    examples = math.prod(call.x.shape[: call.own_params])
    rows = view.n * view.g // examples
    slabs = 1
    # Joining axes before the last is free where the last but one fills its tiles.
    if call.x.ndim - call.own_params > 2 and call.x.shape[-1] == features:
        inner = call.x.shape[-2]
        slab_bytes = inner * features * call.x.dtype.itemsize
        if inner % (4 * SUBLANES // 2) and slab_bytes >= SLAB_BYTES:
            rows, slabs = inner, rows // inner
    return AcrossLanes(examples, slabs, rows, features, block_rows, chunk_rows)


def down_sublanes(call: Call) -> DownSublanes | None:
    """The block is as large as features and dtypes allow; None where that is too small.

    Which it is from 2344 features on in float32, from 2984 in bfloat16 (backward), for
    the least block has 128 rows. XLA then copies x and y for `AcrossLanes`, to twice
    flax's bytes. The reference would copy nothing, but does not give the bits that this
    row has in an array of other size, where XLA has features across the lanes.

    Args:
      call: one with an x of shape (..., features, rows), and a dy.
    """
    *leading, features, rows = call.x.shape
    examples = math.prod(leading[: call.own_params])
    slabs = math.prod(leading[call.own_params :])
    sublanes = round_up(features, SUBLANES)
    tile = sublanes * LANES  # elements of LANES rows
    tile_bytes = 2 * tile * sum(dtype.itemsize for dtype in _streamed(call))
    tile_bytes += 2 * 2 * SUBLANES * LANES * 4  # mean and variance, as whole registers
    most = min(BLOCKS_BYTES // tile_bytes, MOST_ROWS * LANES // tile)
    most = max(most, 1)
    kept = 3 * tile * 4  # scale and bias; or scale, dscale and dbias
    if most * tile_bytes + kept + _spilled(call, tile) > VMEM_BYTES:
        return None

    # In tiles of LANES rows.
    tiles, chunk = pl.cdiv(rows, LANES), min(max(CHUNK // tile, 1), most)
    if tiles <= most:  # a slab's rows all together, in chunks of one size
        chunks = pl.cdiv(tiles, chunk)
        chunk = pl.cdiv(tiles, chunks)
    else:
        chunks = most // chunk
    block_rows = chunks * chunk * LANES
    return DownSublanes(
        examples=examples,
        slabs=slabs,
        rows=rows,
        features=features,
        block_slabs=min(max(most * LANES // block_rows, 1), slabs),
        block_rows=block_rows,
        chunk_rows=chunk * LANES,
    )


def _spilled(call: Call, chunk: int) -> int:
    """Bytes of VMEM for what registers do not hold of a chunk of so many elements."""
    if chunk <= CHUNK:
        return 0
    copies = SPILLED_16 if jnp.float16 in _streamed(call) else SPILLED
    return copies * chunk * 4


def _streamed(call: Call) -> list[jnp.dtype]:
    """Dtypes of the arrays of x's size that the kernel reads or writes."""
    if call.op == "forward":
        return [call.x.dtype, call.norm.dtype]
    assert call.dy is not None
    dx, dscale, _ = call.wanted
    streamed = [call.dy.dtype]
    streamed += [call.x.dtype] if dx or dscale else []
    return streamed + ([call.x.dtype] if dx else [])


def bytes_moved(call: Call, blocks: Blocks) -> int:
    """Bytes read from and written to HBM."""
    rows = blocks.examples * blocks.slabs * blocks.rows
    total = rows * blocks.features * sum(d.itemsize for d in _streamed(call))
    statistics = 4 * rows * (2 if call.norm.center else 1)
    params = [p for p in (call.scale, call.bias) if p is not None]
    if call.op == "forward":
        total += statistics * call.statistics
    else:
        dx, dscale, dbias = call.wanted
        total += statistics * (dx or dscale)
        params = params if dx else []
        total += (dscale + dbias) * blocks.examples * blocks.features * 4
    return total + sum(math.prod(p.shape) * p.dtype.itemsize for p in params)
