"""Norms on several devices that are not here: the kernels are there, on each device's
part, and what crosses the devices is little.

Values are test_sharded.py's to check, on devices of a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.aot import hlo
from bench.aot.chips import CHIPS, H100, Chip, devices
from bench.aot.compile import Compiled, compile_for

pytestmark = pytest.mark.aot

V5E = CHIPS["v5e"]
TOPOLOGY = {H100: "1x1x4", V5E: "v5e:2x4"}

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": (nnx.LayerNorm, (16, 512, 1024)),
    "RMSNorm": (nnx.RMSNorm, (16, 512, 1024)),
    "GroupNorm": (nnx.GroupNorm, (16, 32, 32, 512)),
    "InstanceNorm": (nnx.InstanceNorm, (16, 32, 32, 256)),
    "BatchNorm": (nnx.BatchNorm, (64, 16, 16, 512)),
}

# Of x, and of the parameters. In FSDP these are gathered where they are used.
SHARDINGS: dict[str, tuple[Callable[[int], P], P]] = {
    "data": (lambda ndim: P("d"), P()),
    "fsdp": (lambda ndim: P("d"), P("d")),
    "sequence": (lambda ndim: P(None, "d"), P()),
    "tensor": (lambda ndim: P(*[None] * (ndim - 1), "d"), P("d")),
}


def step(layer: Any) -> Callable[..., Any]:
    """y, dx and the gradients of the parameters."""
    graph, _, rest = nnx.split(layer, nnx.Param, ...)

    def of(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params, rest, copy=True)(x)

        y, vjp = jax.vjp(forward, params, x)
        return y, *vjp(dy)

    return of


def compiled(
    chip: Chip, name: str, sharding: str, mode: str, *, fused: bool
) -> Compiled:
    """Forward and backward of one layer on all devices."""
    kind, shape = LAYERS[name]
    layer = kind(shape[-1], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    if fused:
        fusednorm.fuse(layer)
    on = devices(chip, TOPOLOGY[chip])
    kinds = getattr(AxisType, mode)
    mesh = jax.make_mesh((len(on),), ("d",), axis_types=(kinds,), devices=on)
    of_x, of_params = SHARDINGS[sharding]
    x = jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, of_x(len(shape)))
    )
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, of_params)
        ),
        nnx.state(layer, nnx.Param),
    )
    function = step(layer)
    if sharding == "fsdp" and mode == "Explicit":
        function = gathering(function)
    with jax.set_mesh(mesh):
        return compile_for(chip, function, params, x, x)


def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Explicit mode wants the user to say where the parameters are gathered."""

    def of(params: Any, *others: Any) -> Any:
        whole, vjp = jax.vjp(
            lambda params: jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params),
            params,
        )
        y, dparams, dx = function(whole, *others)
        return y, *vjp(dparams), dx

    return of


def crossing(found: Compiled) -> list[tuple[str, int]]:
    return hlo.collectives(found.hlo)
