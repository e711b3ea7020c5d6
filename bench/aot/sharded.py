"""Compiles norm layers, forward and backward, for several devices that are not here.

Counts the kernels of one device, and the bytes that cross devices.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.aot import hlo
from bench.aot.chips import Chip, Gpu, devices
from bench.aot.compile import compile_for
from bench.aot.measure import norm_of
from bench.aot.whole import Pass, Whole, forward_backward, pure
from bench.cases import Case

# What decides how arrays are sharded: their types ("Explicit"), XLA ("Auto"), or a
# `jax.shard_map`.
Mode = Literal["Explicit", "Auto", "shard_map"]
MODES: tuple[Mode, ...] = ("Explicit", "Auto")  # in the tables

# Class, and shape of x on 8 devices; `grown` gives the shape for more.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": (nnx.LayerNorm, (64, 512, 1024)),  # (batch, tokens, features)
    "RMSNorm": (nnx.RMSNorm, (64, 512, 1024)),
    "GroupNorm": (nnx.GroupNorm, (16, 32, 32, 512)),  # (batch, height, width, channels)
    "InstanceNorm": (nnx.InstanceNorm, (16, 32, 32, 256)),
    "BatchNorm": (nnx.BatchNorm, (64, 16, 16, 512)),
}
GROUP_SIZE = 16  # channels: 32 groups of 512, flax's default

# Specs of x, by its rank, and of the parameters. FSDP gathers the parameters where they
# are used.
SHARDINGS: dict[str, tuple[Callable[[int], P], P]] = {
    "data": (lambda ndim: P("d"), P()),
    "fsdp": (lambda ndim: P("d"), P("d")),
    "sequence": (lambda ndim: P(None, "d"), P()),
    "tensor": (lambda ndim: P(*[None] * (ndim - 1), "d"), P("d")),
}


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A compiled layer, as one device runs it.

    Attributes:
      kernels: our kernels.
      collectives: opcode and bytes of each collective, see `hlo.collectives`.
    """

    kernels: tuple[hlo.Kernel, ...]
    collectives: tuple[tuple[str, int], ...]

    @property
    def crossing(self) -> int:
        """Bytes of the arrays that cross devices."""
        return sum(nbytes for _, nbytes in self.collectives)

    @property
    def operations(self) -> dict[str, int]:
        """Number of collectives by opcode."""
        return dict(collections.Counter(opcode for opcode, _ in self.collectives))


def topology(chip: Chip, count: int) -> str:
    """Returns a topology of `count` devices: hosts of 8 GPUs, or a near-square slice.

    Args:
      chip: a GPU, or a TPU whose slices have two dimensions.
      count: a multiple of 8 GPUs, or a power of two TPUs.
    """
    if isinstance(chip, Gpu):
        return f"1x{count // 8}x8"
    rows = 2 ** ((count.bit_length() - 1) // 2)
    return f"{chip.name}:{rows}x{count // rows}"


def grown(shape: tuple[int, ...], sharding: str, count: int) -> tuple[int, ...]:
    """Scales a shape for 8 devices to `count` devices.

    The sharded axis grows, so that each device holds as much as one of the 8 does.
    """
    of_x, _ = SHARDINGS[sharding]
    axis = of_x(len(shape)).index("d")
    return *shape[:axis], shape[axis] * count // 8, *shape[axis + 1 :]


def dtype_of(chip: Chip) -> Any:
    """Returns the dtype of x and y for a chip.

    A TPU gets float32, because for bfloat16 flax accumulates dscale and dbias in
    bfloat16 there, while ours cross the devices in float32.
    """
    return jnp.bfloat16 if isinstance(chip, Gpu) else jnp.float32


def layer(
    chip: Chip,
    name: str,
    shape: tuple[int, ...],
    on: str,
    sharding: str,
    mode: Mode,
    *,
    fused: bool,
) -> Sharded:
    """Compiles the forward and backward of one layer for several devices.

    Args:
      chip: the devices' kind.
      name: the layer's name in `LAYERS`.
      shape: the global shape of x.
      on: the devices' topology.
      sharding: a name in `SHARDINGS`.
      mode: what decides how arrays are sharded. Under `jax.shard_map`, a layer whose
        statistics cross devices gets the mapped axis as its `axis_name`.
      fused: whether to compile our layer, rather than flax's.

    Raises:
      Exception: flax's layer cannot determine how its arrays are sharded, in explicit
        mode; or what `compile_for` raises.
    """
    kind, _ = LAYERS[name]
    dtype = dtype_of(chip)
    options: dict[str, Any] = {"dtype": dtype, "rngs": nnx.Rngs(0)}
    if kind is nnx.GroupNorm:
        options |= {"num_groups": None, "group_size": GROUP_SIZE}
    of_x, of_params = SHARDINGS[sharding]
    reduced = norm_of(kind, shape, "float32").reduction_axes
    if mode == "shard_map" and of_x(len(shape)).index("d") in reduced:
        options["axis_name"] = "d"
    norm = kind(shape[-1], **options)
    if fused:
        fusednorm.fuse(norm)
    found = devices(chip, on)
    kinds = (AxisType.Explicit if mode == "Explicit" else AxisType.Auto,)
    mesh = jax.make_mesh((len(found),), ("d",), axis_types=kinds, devices=found)

    x = placed(mesh, of_x(len(shape)), jax.ShapeDtypeStruct(shape, dtype))
    params = placed(mesh, of_params, nnx.state(norm, nnx.Param))
    function = step(norm)
    if mode == "shard_map":
        specs = of_params, of_x(len(shape))
        function = step(
            norm, lambda f: jax.shard_map(f, in_specs=specs, out_specs=specs[1])
        )
    elif mode == "Auto":
        function = keeping(function, params, x)
    elif sharding == "fsdp":
        function = gathering(function)
    # In auto mode no mesh need be known.
    context = contextlib.nullcontext() if mode == "Auto" else jax.set_mesh(mesh)
    with context:
        text = compile_for(chip, function, params, x, x).hlo
    ours = tuple(kernel for kernel in hlo.kernels(text) if kernel.ours)
    return Sharded(ours, tuple(hlo.collectives(text)))


def layer_on_four(
    chip: Chip, case: Case, tensor_bytes: float, which: Pass, fused: bool
) -> Whole:
    """Compiles the norm layer of a case for four GPUs, each with a part of the samples.

    XLA partitions the program (auto mode).

    Args:
      chip: the GPUs' kind.
      case, which: see `whole.layer`.
      tensor_bytes: bytes of the part of x that a GPU has.
      fused: whether to compile our layer, rather than flax's.

    Returns:
      What one GPU does.
    """
    samples, *sample = case.shape(4 * tensor_bytes)
    dtype = jnp.dtype(case.dtype)
    norm = case.norm(sample[-1], dtype=dtype, rngs=nnx.Rngs(0))
    function, params = pure(norm, fused=fused)
    mesh = Mesh(devices(chip, "1x1x4"), ("d",))
    x = placed(mesh, P("d"), jax.ShapeDtypeStruct((samples // 4 * 4, *sample), dtype))
    params = placed(mesh, P(), params)
    if which == "forward":
        return Whole.of(compile_for(chip, function, params, x))
    return Whole.of(compile_for(chip, forward_backward(function), params, x, x))


def placed(mesh: Any, spec: P, arrays: Any) -> Any:
    """Returns shapes and dtypes of a pytree of arrays, all sharded alike."""

    def of(a: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(of, arrays)


def step(
    norm: Any, spread: Callable[..., Any] = lambda forward: forward
) -> Callable[..., Any]:
    """Returns a function that runs the forward and backward of a layer.

    Args:
      norm: the layer.
      spread: a transformation of the forward.

    Returns:
      A function of the parameters, x and dy. It returns y and the gradients of the
      parameters and x.
    """
    graph, _, *rest = nnx.split(norm, nnx.Param, ...)

    def of(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params, *rest, copy=True)(x)

        y, vjp = jax.vjp(spread(forward), params, x)
        return y, *vjp(dy)

    return of


def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `step`'s function for FSDP in explicit mode: gathers the parameters first.

    In that mode the gather is up to the user.
    """

    def of(params: Any, *others: Any) -> Any:
        def gathered(params: Any) -> Any:
            return jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params)

        whole, vjp = jax.vjp(gathered, params)
        y, dparams, dx = function(whole, *others)
        return y, *vjp(dparams), dx

    return of


def keeping(function: Callable[..., Any], params: Any, x: Any) -> Callable[..., Any]:
    """Wraps `step`'s function to shard each gradient as its parameter or x is.

    An optimizer keeps them that way. In auto mode XLA would choose their shardings, and
    differently for our layer and flax's.
    """

    def of(*args: Any) -> Any:
        y, dparams, dx = function(*args)
        like = jax.tree.map(lambda a: a.sharding, (x, params, x))
        return jax.lax.with_sharding_constraint((y, dparams, dx), like)

    return of
