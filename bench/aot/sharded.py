"""Norm layers on several devices that are not here: the kernels of one device, and what
crosses devices, forward and backward."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.aot import hlo
from bench.aot.chips import Chip, Gpu, devices
from bench.aot.compile import compile_for
from bench.aot.measure import norm_of

# Who says how arrays are sharded: their types, or XLA.
Mode = Literal["Explicit", "Auto", "shard_map"]
MODES: tuple[Mode, ...] = ("Explicit", "Auto")  # of the table

# Class, and shape of x. For 8 devices: see `grown`.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": (nnx.LayerNorm, (64, 512, 1024)),  # (batch, tokens, features)
    "RMSNorm": (nnx.RMSNorm, (64, 512, 1024)),
    "GroupNorm": (nnx.GroupNorm, (16, 32, 32, 512)),  # (batch, height, width, channels)
    "InstanceNorm": (nnx.InstanceNorm, (16, 32, 32, 256)),
    "BatchNorm": (nnx.BatchNorm, (64, 16, 16, 512)),
}
GROUP_SIZE = 16  # channels: 32 groups of 512, flax's default

# Of x, and of the parameters. In FSDP these are gathered where they are used.
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
      kernels: of ours.
      collectives: operation and bytes of each, as `hlo.collectives` has them.
    """

    kernels: tuple[hlo.Kernel, ...]
    collectives: tuple[tuple[str, int], ...]

    @property
    def crossing(self) -> int:
        """Bytes of the arrays that cross devices."""
        return sum(nbytes for _, nbytes in self.collectives)

    @property
    def operations(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(collections.Counter(opcode for opcode, _ in self.collectives))


def topology(chip: Chip, count: int) -> str:
    """Of so many devices: hosts of 8 GPUs; a slice of TPUs that is nearly a square.

    Args:
      chip: a GPU, or a TPU whose slices have two dimensions.
      count: of GPUs a multiple of 8, of TPUs a power of two.
    """
    if isinstance(chip, Gpu):
        return f"1x{count // 8}x8"
    rows = 2 ** ((count.bit_length() - 1) // 2)
    return f"{chip.name}:{rows}x{count // rows}"


def grown(shape: tuple[int, ...], sharding: str, count: int) -> tuple[int, ...]:
    """A shape for 8 devices as one for `count`, of which each has as much as of the 8:
    the sharded axis grows with them."""
    of_x, _ = SHARDINGS[sharding]
    axis = of_x(len(shape)).index("d")
    return *shape[:axis], shape[axis] * count // 8, *shape[axis + 1 :]


def dtype_of(chip: Chip) -> Any:
    """Of x and y. In bfloat16 flax adds up dscale and dbias in bfloat16 on a TPU, and
    ours cross the devices in float32."""
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
    """Forward and backward of one layer on several devices.

    Args:
      chip: the devices' kind.
      name: of the layer, in `LAYERS`.
      shape: of x, on all devices together.
      on: the devices' topology.
      sharding: in `SHARDINGS`.
      mode: who says how arrays are sharded. In a `jax.shard_map` statistics that cross
        devices have its axis as `axis_name`.
      fused: whether by our layer, or by flax's.

    Raises:
      Exception: flax's layer does not know how its arrays are sharded, in explicit
        mode; and what `compile_for` raises.
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

    def placed(spec: P) -> Callable[[Any], jax.ShapeDtypeStruct]:
        return lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
        )

    x = placed(of_x(len(shape)))(jax.ShapeDtypeStruct(shape, dtype))
    params = jax.tree.map(placed(of_params), nnx.state(norm, nnx.Param))
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
    with jax.set_mesh(mesh):
        text = compile_for(chip, function, params, x, x).hlo
    ours = tuple(kernel for kernel in hlo.kernels(text) if kernel.ours)
    return Sharded(ours, tuple(hlo.collectives(text)))


def step(
    norm: Any, spread: Callable[..., Any] = lambda forward: forward
) -> Callable[..., Any]:
    """A function of parameters, x and dy: y, and the gradients of parameters and x."""
    graph, _, *rest = nnx.split(norm, nnx.Param, ...)

    def of(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params, *rest, copy=True)(x)

        y, vjp = jax.vjp(spread(forward), params, x)
        return y, *vjp(dy)

    return of


def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """`step`'s, for FSDP: in explicit mode the user gathers the parameters."""

    def of(params: Any, *others: Any) -> Any:
        def gathered(params: Any) -> Any:
            return jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params)

        whole, vjp = jax.vjp(gathered, params)
        y, dparams, dx = function(whole, *others)
        return y, *vjp(dparams), dx

    return of


def keeping(function: Callable[..., Any], params: Any, x: Any) -> Callable[..., Any]:
    """`step`'s, whose gradients lie as the parameters and x do, as an optimizer has
    them. In auto mode XLA would choose, and not the same for ours as for flax's."""

    def of(*args: Any) -> Any:
        y, dparams, dx = function(*args)
        like = jax.tree.map(lambda a: a.sharding, (x, params, x))
        return jax.lax.with_sharding_constraint((y, dparams, dx), like)

    return of
