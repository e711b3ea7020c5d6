"""Code that the TPU kernels share: chips, the launch, rows and columns, float16."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fusednorm.kernels import cost

LANES = 128  # lanes of a vector register
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """The resources that a TPU gives a kernel.

    Attributes:
      vmem: bytes of VMEM that a kernel may use: three quarters of a core's VMEM.
      blocks: bytes for the blocks of all operands together, two per operand: one in
        use, one in flight. At HBM bandwidth they take 4 to 12 us. That is long
        next to the fixed cost of a step, about 0.35 us, yet short enough to limit the
        wait for the first blocks.
      cores: cores that share the device's memory and its kernels.
    """

    vmem: int
    blocks: int
    cores: int = 1


MIB = 2**20
_OLDER, _NEWER = Chip(12 * MIB, 4 * MIB), Chip(48 * MIB, 16 * MIB)

# Keyed by jax's `device_kind`. Sources for VMEM per core and bandwidth: Google Cloud's
# TPU pages; jax.experimental.pallas.tpu.get_tpu_info.
CHIPS = {
    "TPU v5 lite": Chip(96 * MIB, 8 * MIB),
    "TPU v5e": Chip(96 * MIB, 8 * MIB),
    "TPU v5": _NEWER,
    "TPU v5p": _NEWER,
    "TPU v6 lite": Chip(96 * MIB, 16 * MIB),
    "TPU v6e": Chip(96 * MIB, 16 * MIB),
    "TPU7x": _NEWER,
}


def chip(device: Any) -> Chip:
    """Returns the resources of a jax device.

    An unknown device, or None for one that is elsewhere, gets the smallest: a v4's.
    """
    known = CHIPS.get(getattr(device, "device_kind", ""), _OLDER)
    return dataclasses.replace(known, cores=getattr(device, "num_cores", 1))


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def row(param: jax.Array | None) -> jax.Array | None:
    """Returns a scale or bias as [1, features]."""
    # For an operand [features] Pallas asks which TPU it compiles for. It fails where
    # there is none, for example in `jax.export` on another machine.
    return None if param is None else param.reshape(1, -1)


def result(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Describes a kernel's result.

    In a `shard_map` the result varies over the mesh axes that x varies over.
    """
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


# An operand (or None), or a result's shape and dtype (or None); and the spec of its
# blocks.
Blocked = tuple[Any, pl.BlockSpec]


def pallas_call(
    kernel: Callable[[dict[str, Any]], None],
    name: str,
    grid: tuple[int, ...],
    vmem: int,
    *,
    operands: dict[str, Blocked],
    results: dict[str, Blocked],
    scratch: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs kernel(refs by name) and returns its results by name. An operand, a result
    or scratch that is None has no ref.

    Args:
      kernel: the kernel.
      name: its name.
      grid: the grid, whose first axis counts the cores.
      vmem: bytes of VMEM that it needs.
      operands, results, scratch: what each ref is for, by name.
    """
    operands = {name: cut for name, cut in operands.items() if cut[0] is not None}
    results = {name: cut for name, cut in results.items() if cut[0] is not None}
    scratch = {name: kept for name, kept in scratch.items() if kept is not None}

    def body(*refs: Any) -> None:
        kernel(dict(zip((*operands, *results, *scratch), refs, strict=True)))

    arrays, in_specs = zip(*operands.values(), strict=True)
    shapes, out_specs = zip(*results.values(), strict=True)
    semantics: list[Any] = ["parallel", *["arbitrary"] * (len(grid) - 1)]
    computed = pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_shape=shapes,
        out_specs=out_specs,
        scratch_shapes=tuple(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem
        ),
        cost_estimate=cost.estimate((*arrays, *shapes)),
    )(*map(bits, arrays))
    return dict(zip(results, computed, strict=True))


# --- rows and columns -----------------------------------------------------------------
# Conversions between values along the lanes, the layout in HBM, and values down the
# sublanes.


def row_of(tiles: jax.Array) -> jax.Array:
    """Turns [tiles, LANES] into [1, lanes]."""
    return jnp.concatenate([tiles[i : i + 1] for i in range(len(tiles))], 1)


def tiles_of(row: jax.Array) -> jax.Array:
    """Turns [1, lanes] into [tiles, LANES], the inverse of `row_of`."""
    starts = range(0, row.shape[1], LANES)
    return jnp.concatenate([row[:, start : start + LANES] for start in starts], 0)


def as_column(row: jax.Array, sublanes: int) -> jax.Array:
    """Turns [1, lanes] into [sublanes, LANES], broadcast along the lanes."""
    columns = []
    for tile, diagonal in _diagonals(sublanes):
        spread = jnp.where(diagonal, row[:, tile.start : tile.start + LANES], 0)
        column = jnp.sum(spread, 1, keepdims=True)
        columns.append(jnp.broadcast_to(column, diagonal.shape))
    return jnp.concatenate(columns, 0)


def as_row(column: jax.Array) -> jax.Array:
    """Turns [sublanes, LANES or 1] into [1, lanes], the inverse of `as_column`."""
    rows = [
        jnp.sum(jnp.where(diagonal, column[tile], 0), 0, keepdims=True)
        for tile, diagonal in _diagonals(column.shape[0])
    ]
    return jnp.concatenate(rows, 1)


def _diagonals(sublanes: int) -> Iterator[tuple[slice, jax.Array]]:
    """Yields up to LANES sublanes at a time, and a mask of their diagonal.

    The mask [sublanes, LANES] marks the lane that each sublane has in a row [1, LANES].
    """
    for start in range(0, sublanes, LANES):
        stop = min(start + LANES, sublanes)
        shape = stop - start, LANES
        sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
        yield (
            slice(start, stop),
            sublane == lax.broadcasted_iota(jnp.int32, shape, 1),
        )


# --- float16 --------------------------------------------------------------------------
# Mosaic supports float16 on no TPU: it rejects float16 operands and has no float16
# vectors. So an operand of this dtype enters the kernel as its bits, and integer
# arithmetic converts it here. XLA fuses the bitcast into the operand's producer, or
# else makes an extra pass over the operand.
#
#     float16: sign 1 bit, exponent 5 (bias 15), mantissa 10
#     float32: sign 1 bit, exponent 8 (bias 127), mantissa 23

_MANTISSA = 23 - 10  # extra mantissa bits of float32
_REBIAS = (127 - 15) << 23
_SIGN = -(2**31)


def bits(operand: jax.Array | None) -> jax.Array | None:
    """Returns a float16 operand as int16, and any other operand unchanged."""
    if operand is None or operand.dtype != jnp.float16:
        return operand
    return lax.bitcast_convert_type(operand, jnp.int16)


def kept_as(dtype: Any) -> Any:
    """Returns the dtype of an array that a kernel writes and reads back.

    For float16 this is int16, its bits.
    """
    return jnp.int16 if dtype == jnp.float16 else dtype


def load(ref: Any, here: Any = slice(None)) -> jax.Array:
    """Loads part of a ref as float32."""
    return widened(ref[here])


def widened(value: jax.Array) -> jax.Array:
    """Converts what a ref holds to float32, from the bits of float16 if it is int16."""
    if value.dtype == jnp.int16:
        return _from_float16(value.astype(jnp.int32))
    return value.astype(jnp.float32)


def store(ref: Any, here: Any, value: jax.Array) -> None:
    """Stores float32 values in the ref's dtype, rounded to nearest even."""
    store_narrowed(ref, here, narrowed(value, ref.dtype))


def narrowed(value: jax.Array, dtype: Any) -> jax.Array:
    """Converts float32, rounded to nearest even, to what a ref of this dtype holds."""
    if dtype in (jnp.int16, jnp.float16):
        return _to_float16(value).astype(jnp.int16)
    return value.astype(dtype)


def store_narrowed(ref: Any, here: Any, value: jax.Array) -> None:
    """Stores a value that `narrowed` returned for the ref's dtype."""
    if ref.dtype == jnp.float16:  # int16 is scratch, or a result that is read back
        store_bits(ref, here, value)
    else:
        ref[here] = value


def store_bits(ref: Any, here: Any, bits: jax.Array) -> None:
    """Stores int16 bits into a float16 ref.

    Mosaic compiles no other store to this ref. Its interpreter does not support this
    one, so tests/on_tpu.py replaces it.
    """
    ref.at[here].bitcast(jnp.int16)[...] = bits


def _from_float16(bits: jax.Array) -> jax.Array:
    """Converts the bits of float16, in an int32 with the sign extended, to float32."""
    magnitude = bits & 0x7FFF
    # The exponent of infinities and NaNs goes from 31 to 255.
    rebias = jnp.where(magnitude >= 0x7C00, 2 * _REBIAS, _REBIAS)
    normal = lax.bitcast_convert_type((magnitude << _MANTISSA) + rebias, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 0x0400, subnormal, normal)
    value_bits = lax.bitcast_convert_type(value, jnp.int32) | (bits & _SIGN)
    return lax.bitcast_convert_type(value_bits, jnp.float32)


def _to_float16(value: jax.Array) -> jax.Array:
    """Returns the bits of the nearest float16, ties to even, as sign-extended int32."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    # Half of the last place kept, less one where that place is even. Adding it carries
    # into that place exactly where the value rounds up.
    half = (1 << (_MANTISSA - 1)) - 1 + ((magnitude >> _MANTISSA) & 1)
    normal = (magnitude + half - _REBIAS) >> _MANTISSA
    normal = jnp.minimum(normal, 0x7C00)  # infinity, and whatever rounds to it
    # Below 2^-14 float16's last place is 2^-24, as is float32's from 0.5 on. So this
    # addition rounds to it.
    shifted = lax.bitcast_convert_type(magnitude, jnp.float32) + 0.5
    subnormal = lax.bitcast_convert_type(shifted, jnp.int32) - 0x3F000000
    result = jnp.where(magnitude < 0x38800000, subnormal, normal)
    result = jnp.where(magnitude > 0x7F800000, 0x7E00, result)  # NaN
    return result | ((bits >> 31) << 15)
