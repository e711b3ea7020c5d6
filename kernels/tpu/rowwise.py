"""Norms of contiguous rows on a TPU, forward and backward, each in one kernel.

    x_hat = (x - mean) * rstd,  y = x_hat * scale + bias
    dx = rstd * (wdy - c2 - x_hat * c1),  wdy = dy * scale,
        c1 = sum(wdy * x_hat) / features,  c2 = sum(wdy) / features
    dscale = sum(dy * x_hat),  dbias = sum(dy)  over the rows

One row's mean and variance are taken over its own features; RMSNorm leaves out mean
and c2. For the sources of the formulas see reference/norm.py.

The array is seen as x[examples, slabs, rows, features]. A grid step has a block of rows
in VMEM, whole rows; Pallas fetches the next block and writes back the last one
meanwhile. So HBM sees each element once: the forward reads x and writes y, the backward
reads x and dy and writes dx. Statistics add 4 bytes a row each, parameters and their
gradients once their own size.

Inside a block a loop takes a chunk of rows at a time, as many as the registers hold.
Chunks beyond the last row are left out; garbage in a chunk's own last rows stays in
these rows, and is kept out of dscale and dbias. What is done to a row, and in which
order, depends on features and dtypes alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.geometry import Geometry

LANES = 128  # of a vector register
SUBLANES = 8

# Blocks of all operands together, two of each: one in use, one in flight. At 0.8 to
# 3.7 TB/s a step takes from 5 us down to 1 us, against about 0.35 us of its own cost.
BLOCKS_BYTES = 8 * 2**20

MOST_ROWS = 4096  # of a block; a MiB of 128 bfloat16 features

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
    x_ref: Any,  # [block_rows, features]
    scale_ref: Any,  # [1, features], or None
    bias_ref: Any,  # [1, features], or None
    y_ref: Any,  # [block_rows, features]
    mean_ref: Any,  # [1, max(block_rows, LANES)] float32, or None
    var_ref: Any,  # likewise
    *,
    center: bool,
    epsilon: float,
    blocks: "Blocks",
) -> None:
    """y, and mean and variance of each row."""
    per_feature = 1 / blocks.features

    def chunk(index: Any) -> None:
        here = blocks.rows_of(index)
        x = _load(x_ref, here)  # [chunk_rows, features]
        with jax.named_scope("statistics"):
            if center:
                # The mean, and the mean of what it leaves: a float32 sum of large
                # numbers is off by several roundings, and that of the rest by none.
                mean = jnp.sum(x, -1, keepdims=True) * per_feature
                x = x - mean
                shift = jnp.sum(x, -1, keepdims=True) * per_feature
                mean = mean + shift
                x = x - shift
            var = jnp.sum(x * x, -1, keepdims=True) * per_feature  # [chunk_rows, 1]
        with jax.named_scope("normalize"):
            y = x * lax.rsqrt(var + epsilon)
            if scale_ref is not None:
                y = y * _load(scale_ref)
            if bias_ref is not None:
                y = y + _load(bias_ref)
        _store(y_ref, here, y)
        if mean_ref is not None:
            blocks.put_statistic(mean_ref, index, mean)
        if var_ref is not None:
            blocks.put_statistic(var_ref, index, var)

    blocks.for_each_chunk(chunk)


# --- backward -------------------------------------------------------------------------


def _backward_kernel(
    dy_ref: Any,  # [block_rows, features]
    x_ref: Any,  # [block_rows, features], or None where dbias alone is wanted
    scale_ref: Any,  # [1, features], or None
    mean_ref: Any,  # [1, max(block_rows, LANES)] float32, or None
    var_ref: Any,  # likewise
    dx_ref: Any,  # [block_rows, features], or None
    dscale_ref: Any,  # [1, features] float32, or None
    dbias_ref: Any,  # likewise
    dscale_sum: Any,  # [SUBLANES, features] float32, or None: kept from step to step
    dbias_sum: Any,  # likewise
    *,
    center: bool,
    epsilon: float,
    blocks: "Blocks",
) -> None:
    """Those of dx, dscale and dbias that are wanted."""
    per_feature = 1 / blocks.features
    sums = [
        (total, result)
        for total, result in ((dscale_sum, dscale_ref), (dbias_sum, dbias_ref))
        if total is not None
    ]

    @pl.when(blocks.is_first_step())
    def _() -> None:
        for total, _ in sums:
            total[...] = jnp.zeros_like(total)

    def chunk(index: Any) -> None:
        here = blocks.rows_of(index)
        dy = _load(dy_ref, here)  # [chunk_rows, features]
        inside = blocks.is_inside(index)  # [chunk_rows, 1]
        if x_ref is not None:
            x_hat = _load(x_ref, here)
            if mean_ref is not None:
                x_hat = x_hat - blocks.get_statistic(mean_ref, index)
            rstd = lax.rsqrt(blocks.get_statistic(var_ref, index) + epsilon)
            x_hat = x_hat * rstd
        if dx_ref is not None:
            wdy = dy if scale_ref is None else dy * _load(scale_ref)
            c1 = jnp.sum(wdy * x_hat, -1, keepdims=True) * per_feature
            dx = wdy - x_hat * c1
            if center:
                dx = dx - jnp.sum(wdy, -1, keepdims=True) * per_feature
            _store(dx_ref, here, dx * rstd)
        if dscale_sum is not None:
            dscale_sum[...] += _sum_rows(jnp.where(inside, dy * x_hat, 0))
        if dbias_sum is not None:
            dbias_sum[...] += _sum_rows(jnp.where(inside, dy, 0))

    blocks.for_each_chunk(chunk)

    @pl.when(blocks.is_last_step())
    def _() -> None:
        for total, result in sums:
            result[...] = jnp.sum(total[...], 0, keepdims=True)


def _sum_rows(value: jax.Array) -> jax.Array:
    """[chunk_rows, features] -> [SUBLANES, features]: adds whole registers alone."""
    rows, features = value.shape
    return jnp.sum(value.reshape(rows // SUBLANES, SUBLANES, features), 0)


# --- blocks and chunks ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the view x[examples, slabs, rows, features] is cut.

    Attributes:
      examples: parts of the array with a dscale and dbias of their own.
      slabs: parts of an example.
      rows: rows of a slab.
      features: length of a row.
      block_rows: rows in VMEM at a time; a power of two.
      chunk_rows: rows in registers at a time; a power of two.
    """

    examples: int
    slabs: int
    rows: int
    features: int
    block_rows: int
    chunk_rows: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.examples, self.slabs, pl.cdiv(self.rows, self.block_rows)

    @property
    def of_rows(self) -> pl.BlockSpec:
        """For x, y, dy and dx."""
        return pl.BlockSpec(
            (None, None, self.block_rows, self.features),
            lambda example, slab, block: (example, slab, block, 0),
        )

    @property
    def of_param(self) -> pl.BlockSpec:
        """For scale and bias [1, features], fetched once.

        As [features], Pallas would ask which TPU it compiles for, and stop where there
        is none: `jax.export` on another machine.
        """
        return pl.BlockSpec((1, self.features), lambda example, slab, block: (0, 0))

    @property
    def of_param_gradient(self) -> pl.BlockSpec:
        """For dscale and dbias [examples, 1, features]."""
        return pl.BlockSpec(
            (None, 1, self.features), lambda example, slab, block: (example, 0, 0)
        )

    # A statistic is [examples, slabs, 1, rows], its rows along the lanes: 4 bytes a
    # row. As [rows, 1], the shape it has outside, a block of it fills 128 lanes with
    # one number: 512 bytes a row, as much as 256 features in bfloat16.

    @property
    def of_statistic(self) -> pl.BlockSpec:
        lanes = max(self.block_rows, LANES)  # serves one block, or several in turn
        blocks = lanes // self.block_rows
        return pl.BlockSpec(
            (None, None, 1, lanes),
            lambda example, slab, block: (example, slab, 0, lax.div(block, blocks)),
        )

    def put_statistic(self, ref: Any, index: Any, column: jax.Array) -> None:
        """Puts [chunk_rows, 1] into its lanes of [1, lanes]."""
        for rows, tile, mine, diagonal in self._tiles_of(index):
            spread = jnp.where(diagonal, column[rows], 0)  # [tile_rows, LANES]
            row = jnp.sum(spread, 0, keepdims=True)  # [1, LANES]
            ref[:, tile] = jnp.where(mine, row, ref[:, tile])

    def get_statistic(self, ref: Any, index: Any) -> jax.Array:
        """Reads back [chunk_rows, 1]."""
        columns = [
            jnp.sum(jnp.where(diagonal, ref[:, tile], 0), 1, keepdims=True)
            for _, tile, _, diagonal in self._tiles_of(index)
        ]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, 0)

    def _tiles_of(self, index: Any) -> Iterator[tuple[slice, Any, Any, jax.Array]]:
        """Where a chunk's statistics are, tile by tile of LANES.

        Yields:
          rows: those of the chunk that have their statistic in this tile.
          tile: the lanes of the tile.
          mine: bool [1, LANES], which of them these rows have.
          diagonal: bool [tile_rows, LANES], which lane each row has.
        """
        tile_rows = min(self.chunk_rows, LANES)
        for start in range(0, self.chunk_rows, tile_rows):
            row = pl.program_id(2) * self.block_rows + index * self.chunk_rows + start
            row = lax.rem(row, max(self.block_rows, LANES))
            first = lax.rem(row, LANES)
            tile = pl.ds(pl.multiple_of(row - first, LANES), LANES)
            shape = tile_rows, LANES
            own = lax.broadcasted_iota(jnp.int32, shape, 1) - first
            diagonal = own == lax.broadcasted_iota(jnp.int32, shape, 0)
            mine = (own[:1] >= 0) & (own[:1] < tile_rows)
            yield slice(start, start + tile_rows), tile, mine, diagonal

    def for_each_chunk(self, chunk: Callable[[Any], None]) -> None:
        """Calls chunk(index) for the chunks of this block that have rows."""
        left = self.rows - pl.program_id(2) * self.block_rows
        rows = jnp.minimum(left, self.block_rows)
        chunks = lax.div(rows + self.chunk_rows - 1, self.chunk_rows)
        lax.fori_loop(0, chunks, lambda index, _: chunk(index), None)

    def rows_of(self, index: Any) -> Any:
        """The rows of a chunk, in a block."""
        return pl.ds(
            pl.multiple_of(index * self.chunk_rows, self.chunk_rows), self.chunk_rows
        )

    def is_inside(self, index: Any) -> jax.Array:
        """bool [chunk_rows, 1]: whether the array has this row."""
        first = pl.program_id(2) * self.block_rows + index * self.chunk_rows
        row = lax.broadcasted_iota(jnp.int32, (self.chunk_rows, 1), 0)
        return first + row < self.rows

    def is_first_step(self) -> jax.Array:
        """Of those of one example."""
        return (pl.program_id(1) == 0) & (pl.program_id(2) == 0)

    def is_last_step(self) -> jax.Array:
        _, slabs, blocks = self.grid
        return (pl.program_id(1) == slabs - 1) & (pl.program_id(2) == blocks - 1)


def _power_of_two(most: int) -> int:
    """The largest power of two up to `most`."""
    return 1 << (most.bit_length() - 1)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# --- float16 --------------------------------------------------------------------------
# Mosaic knows no float16 on any TPU: it refuses a float16 operand, and has no vectors
# of it. So a float16 operand enters as its bits, and is converted here by integer
# arithmetic. XLA folds the bitcast into what made the operand, or else passes over it.
#
#     float16: sign 1 bit, exponent 5 (bias 15), mantissa 10
#     float32: sign 1 bit, exponent 8 (bias 127), mantissa 23

_MANTISSA = 23 - 10  # by how many bits the mantissa grows
_REBIAS = (127 - 15) << 23
_SIGN = -(2**31)


def _bits(operand: jax.Array | None) -> jax.Array | None:
    """A float16 operand as int16."""
    if operand is None or operand.dtype != jnp.float16:
        return operand
    return lax.bitcast_convert_type(operand, jnp.int16)


def _load(ref: Any, here: Any = slice(None)) -> jax.Array:
    """Rows of a ref, in float32."""
    value = ref[here]
    if value.dtype == jnp.int16:
        return _from_float16(value.astype(jnp.int32))
    return value.astype(jnp.float32)


def _store(ref: Any, here: Any, value: jax.Array) -> None:
    """Stores float32 rows in the dtype of the ref, rounded to nearest even."""
    if ref.dtype == jnp.float16:
        _store_bits(ref, here, _to_float16(value).astype(jnp.int16))
    else:
        ref[here] = value.astype(ref.dtype)


def _store_bits(ref: Any, here: Any, bits: jax.Array) -> None:
    """Stores int16 into a float16 ref: the one store of it that Mosaic compiles, and
    that its interpreter does not know (tests/on_tpu.py helps)."""
    ref.at[here].bitcast(jnp.int16)[...] = bits


def _from_float16(bits: jax.Array) -> jax.Array:
    """float32 of the float16 whose bits are given, as int32 with the sign extended."""
    magnitude = bits & 0x7FFF
    # Infinities and NaNs go from exponent 31 to 255.
    rebias = jnp.where(magnitude >= 0x7C00, 2 * _REBIAS, _REBIAS)
    normal = lax.bitcast_convert_type((magnitude << _MANTISSA) + rebias, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 0x0400, subnormal, normal)
    value_bits = lax.bitcast_convert_type(value, jnp.int32) | (bits & _SIGN)
    return lax.bitcast_convert_type(value_bits, jnp.float32)


def _to_float16(value: jax.Array) -> jax.Array:
    """Bits of the nearest float16, the even one of two, as int32 with the sign
    extended."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    # Half of the last place kept, less one where that place is even: carries if above.
    half = (1 << (_MANTISSA - 1)) - 1 + ((magnitude >> _MANTISSA) & 1)
    normal = (magnitude + half - _REBIAS) >> _MANTISSA
    normal = jnp.minimum(normal, 0x7C00)  # infinity, and all that rounds to it
    # Below 2^-14 the last place is 2^-24, as it is of float32 numbers from 0.5 on.
    shifted = lax.bitcast_convert_type(magnitude, jnp.float32) + 0.5
    subnormal = lax.bitcast_convert_type(shifted, jnp.int32) - 0x3F000000
    result = jnp.where(magnitude < 0x38800000, subnormal, normal)
    result = jnp.where(magnitude > 0x7F800000, 0x7E00, result)  # NaN
    return result | ((bits >> 31) << 15)


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
    view = blocks.examples, blocks.slabs, blocks.rows, blocks.features
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    statistic = _result(x, row_of_statistics, jnp.float32) if call.statistics else None
    y, *statistics = _pallas_call(
        functools.partial(
            _forward_kernel, center=norm.center, epsilon=norm.epsilon, blocks=blocks
        ),
        name="rowwise_forward",
        blocks=blocks,
        operands=[
            (x.reshape(view), blocks.of_rows),
            (_row(scale), blocks.of_param),
            (_row(bias), blocks.of_param),
        ],
        results=[
            (_result(x, view, norm.dtype), blocks.of_rows),
            (statistic if norm.center else None, blocks.of_statistic),
            (statistic, blocks.of_statistic),
        ],
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
    view = blocks.examples, blocks.slabs, blocks.rows, blocks.features
    row_of_statistics = (blocks.examples, blocks.slabs, 1, blocks.rows)
    param = _result(x, (blocks.examples, 1, blocks.features), jnp.float32)
    total = pltpu.VMEM((SUBLANES, blocks.features), jnp.float32)
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
            (_row(scale) if dx else None, blocks.of_param),
            (mean if reads_x else None, blocks.of_statistic),
            (var.reshape(row_of_statistics) if reads_x else None, blocks.of_statistic),
        ],
        results=[
            (_result(x, view, x.dtype) if dx else None, blocks.of_rows),
            (param if dscale else None, blocks.of_param_gradient),
            (param if dbias else None, blocks.of_param_gradient),
        ],
        scratch=[total if dscale else None, total if dbias else None],
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
    )(*[_bits(array) for array, _ in operands])


def _row(param: jax.Array | None) -> jax.Array | None:
    return None if param is None else param.reshape(1, -1)


def _result(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Of a kernel; varies over the mesh axes that x varies over, in a shard_map."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


# --- the plan -------------------------------------------------------------------------


def plan(call: Call, view: Geometry, device: Any) -> Kernel | Fallback:
    """Chooses blocks for a call whose view has S = 1 and one set of parameters."""
    order = _order_of_axes(call)
    if order is not None:
        call = _transposed(call, order)
    blocks = choose_blocks(call, view)
    if isinstance(blocks, Fallback):
        return blocks
    launch: Callable[..., list[jax.Array]]
    launch = forward if call.op == "forward" else backward
    launch = functools.partial(launch, call, blocks)
    if order is not None:
        launch = functools.partial(_launch_transposed, launch, order)
    return Kernel(
        backend="mosaic_tpu",
        name=f"rowwise {call.op}",
        launch=launch,
        block=f"{blocks.block_rows} rows of {blocks.features} features",
        why=f"rows lie contiguous; {blocks.chunk_rows} at a time in registers",
        bytes_moved=bytes_moved(call, blocks),
    )


def _order_of_axes(call: Call) -> tuple[int, ...] | None:
    """The order of x's axes in memory, as XLA will have it; None for their own.

    XLA gives the sublanes to an axis that fills them: of (264, 197, 768) to the first.
    A kernel that asks for the axes in their own order has x and y copied: 2.0 times
    the bytes of flax's forward, compiled for a v5e. In that order the transposes cost
    nothing, and to a row it is all the same.
    """
    leading = call.x.shape[:-1]
    if call.norm.reduction_axes != (len(leading),):
        return None  # groups, or several axes: not worth it
    if len(leading) < 2 or leading[-1] == 1:
        return None
    fills = [
        axis
        for axis in range(call.own_params, len(leading))
        if leading[axis] % SUBLANES == 0
    ]
    if not fills or fills[-1] == len(leading) - 1:
        return None
    others = [axis for axis in range(len(leading)) if axis != fills[-1]]
    return (*others, fills[-1], len(leading))


def _transposed(call: Call, order: Sequence[int]) -> Call:
    """The call for an x, and a dy, with its axes in `order`; the last stays."""

    def transposed(operand: Any) -> Any:
        if operand is None:
            return None
        shape = tuple(operand.shape[axis] for axis in order)
        return jax.ShapeDtypeStruct(shape, operand.dtype)

    return dataclasses.replace(call, x=transposed(call.x), dy=transposed(call.dy))


def _launch_transposed(
    launch: Callable[..., list[jax.Array]],
    order: Sequence[int],
    *operands: jax.Array | None,
) -> list[jax.Array]:
    """Launches with x, dy, mean and var in `order`; y, dx, mean and var come back."""
    back = sorted(range(len(order)), key=lambda axis: order[axis])

    def transpose(array: Any, axes: Sequence[int]) -> Any:
        if array is None or array.ndim != len(order):
            return array
        return lax.transpose(array, axes)

    results = launch(*[transpose(operand, order) for operand in operands])
    return [transpose(result, back) for result in results]


def choose_blocks(call: Call, view: Geometry) -> Blocks | Fallback:
    """Block and chunk follow from features and dtypes; the rest from the shape."""
    features = view.k
    lanes = _round_up(features, LANES)
    streamed = _streamed(call)
    itemsizes = [dtype.itemsize for dtype in streamed]
    least = SUBLANES * 4 // min(itemsizes)  # rows of one register

    row_bytes = 2 * lanes * sum(itemsizes)
    block_rows = _power_of_two(max(BLOCKS_BYTES // row_bytes, 1))
    block_rows = min(max(block_rows, least), MOST_ROWS)
    chunk_rows = _power_of_two(max(CHUNK // lanes, 1))
    chunk_rows = min(max(chunk_rows, least), block_rows)
    sums = 2 * SUBLANES * lanes * 4 if call.op == "backward" else 0
    spilled = 0
    if chunk_rows * lanes > CHUNK:
        copies = SPILLED_16 if jnp.float16 in streamed else SPILLED
        spilled = copies * chunk_rows * lanes * 4
    need = block_rows * row_bytes + sums + spilled
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
    return Blocks(examples, slabs, rows, features, block_rows, chunk_rows)


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
