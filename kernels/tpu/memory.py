"""What the kernels of TPUs share: chips, operands, rows and columns, float16."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU has for a kernel.

    Attributes:
      vmem: bytes that a kernel may have: of a core's VMEM three quarters.
      blocks: bytes for blocks of all operands together, two of each: one in use, one in
        flight. At the bandwidth of HBM they take 4 to 10 us, against about 0.35 us
        that a step costs by itself, and against what waits for the first of them.
      cores: that share the device's memory, and its kernels.
    """

    vmem: int
    blocks: int
    cores: int = 1


MIB = 2**20
_OLDER, _NEWER = Chip(12 * MIB, 4 * MIB), Chip(48 * MIB, 16 * MIB)

# By jax's name of the device. VMEM of a core, and bandwidth: Google Cloud's TPU pages;
# jax.experimental.pallas.tpu.get_tpu_info.
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
    """Of a jax device; of one that is not known, or elsewhere, the least: a v4's."""
    known = CHIPS.get(getattr(device, "device_kind", ""), _OLDER)
    return dataclasses.replace(known, cores=getattr(device, "num_cores", 1))


def compiler_params(grid: Sequence[int], vmem: int) -> pltpu.CompilerParams:
    """Of a kernel with one number of the first axis of its grid for each core."""
    semantics: list[Any] = ["parallel", *["arbitrary"] * (len(grid) - 1)]
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def row(param: jax.Array | None) -> jax.Array | None:
    """Scale or bias as [1, features]."""
    # As [features], Pallas would ask which TPU it compiles for, and stop where there is
    # none: `jax.export` on another machine.
    return None if param is None else param.reshape(1, -1)


def result(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Of a kernel; varies over the mesh axes that x varies over, in a shard_map."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


# --- rows and columns -----------------------------------------------------------------
# Numbers along the lanes, as HBM has them, and down the sublanes.


def as_column(row: jax.Array, sublanes: int) -> jax.Array:
    """[1, lanes] -> [sublanes, LANES], each number in all lanes of its sublane."""
    columns = []
    for tile, diagonal in _diagonals(sublanes):
        spread = jnp.where(diagonal, row[:, tile.start : tile.start + LANES], 0)
        column = jnp.sum(spread, 1, keepdims=True)
        columns.append(jnp.broadcast_to(column, diagonal.shape))
    return jnp.concatenate(columns, 0)


def as_row(column: jax.Array) -> jax.Array:
    """[sublanes, LANES or 1] -> [1, lanes]."""
    rows = [
        jnp.sum(jnp.where(diagonal, column[tile], 0), 0, keepdims=True)
        for tile, diagonal in _diagonals(column.shape[0])
    ]
    return jnp.concatenate(rows, 1)


def _diagonals(sublanes: int) -> Iterator[tuple[slice, jax.Array]]:
    """Sublanes, LANES at a time, and which lane each has in a row [1, LANES]."""
    for start in range(0, sublanes, LANES):
        stop = min(start + LANES, sublanes)
        shape = stop - start, LANES
        sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
        yield (
            slice(start, stop),
            sublane == lax.broadcasted_iota(jnp.int32, shape, 1),
        )


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


def bits(operand: jax.Array | None) -> jax.Array | None:
    """A float16 operand as int16."""
    if operand is None or operand.dtype != jnp.float16:
        return operand
    return lax.bitcast_convert_type(operand, jnp.int16)


def kept_as(dtype: Any) -> Any:
    """The dtype of what a kernel writes and reads again: of float16 its bits."""
    return jnp.int16 if dtype == jnp.float16 else dtype


def load(ref: Any, here: Any = slice(None)) -> jax.Array:
    """Rows of a ref, in float32."""
    return widened(ref[here])


def widened(value: jax.Array) -> jax.Array:
    """In float32, of what a ref holds."""
    if value.dtype == jnp.int16:
        return _from_float16(value.astype(jnp.int32))
    return value.astype(jnp.float32)


def store(ref: Any, here: Any, value: jax.Array) -> None:
    """Stores float32 rows in the dtype of the ref, rounded to nearest even."""
    store_narrowed(ref, here, narrowed(value, ref.dtype))


def narrowed(value: jax.Array, dtype: Any) -> jax.Array:
    """What a ref of this dtype holds of float32, rounded to nearest even."""
    if dtype in (jnp.int16, jnp.float16):
        return _to_float16(value).astype(jnp.int16)
    return value.astype(dtype)


def store_narrowed(ref: Any, here: Any, value: jax.Array) -> None:
    """Stores what `narrowed` returns for the dtype of the ref."""
    if ref.dtype == jnp.float16:  # int16 is scratch, or what is read again
        store_bits(ref, here, value)
    else:
        ref[here] = value


def store_bits(ref: Any, here: Any, bits: jax.Array) -> None:
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
