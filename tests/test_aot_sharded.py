"""Norms on several devices that are not here: the kernels are there, on each device's
part, and what crosses the devices is little.

Values are test_sharded.py's to check, on devices of a CPU.
"""

import math
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
from bench.aot.compile import compile_for
from bench.aot.measure import norm_of
from tests.compilers import some_slow

pytestmark = pytest.mark.aot

V5E = CHIPS["v5e"]
TOPOLOGY = {H100: "1x1x4", V5E: "v5e:2x4"}

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": (nnx.LayerNorm, (64, 512, 1024)),
    "RMSNorm": (nnx.RMSNorm, (64, 512, 1024)),
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


# In float32 on a TPU: in bfloat16 flax adds up dscale and dbias in bfloat16 there, and
# ours cross the devices in float32.
DTYPE = {H100: jnp.bfloat16, V5E: jnp.float32}


def compiled(chip: Chip, name: str, sharding: str, mode: str, *, fused: bool) -> Any:
    """Forward and backward of one layer on all devices: kernels of ours, and what
    crosses devices."""
    kind, shape = LAYERS[name]
    dtype = DTYPE[chip]
    layer = kind(shape[-1], dtype=dtype, rngs=nnx.Rngs(0))
    if fused:
        fusednorm.fuse(layer)
    on = devices(chip, TOPOLOGY[chip])
    kinds = (getattr(AxisType, mode),)
    mesh = jax.make_mesh((len(on),), ("d",), axis_types=kinds, devices=on)
    of_x, of_params = SHARDINGS[sharding]
    x = jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, of_x(len(shape)))
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
        found = compile_for(chip, function, params, x, x)
    return [k for k in hlo.kernels(found.hlo) if k.ours], hlo.collectives(found.hlo)


def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """In explicit mode the user says where the parameters are gathered."""

    def of(params: Any, *others: Any) -> Any:
        def gathered(params: Any) -> Any:
            return jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params)

        whole, vjp = jax.vjp(gathered, params)
        y, dparams, dx = function(whole, *others)
        return y, *vjp(dparams), dx

    return of


CELLS = [
    (chip, name, sharding, mode)
    for chip, mode in ((H100, "Explicit"), (H100, "Auto"), (V5E, "Explicit"))
    for name in LAYERS
    for sharding in SHARDINGS
    # Of images a TPU runs the reference.
    if chip == H100 or len(LAYERS[name][1]) == 3
]
CROSSING = {  # where statistics cross devices
    "LayerNorm": ("tensor",),
    "RMSNorm": ("tensor",),
    "GroupNorm": ("sequence",),
    "InstanceNorm": ("sequence",),
    "BatchNorm": ("data", "fsdp", "sequence"),
}
# Where flax raises: for the split of channels into groups, and for running statistics.
REFUSED = {("GroupNorm", "tensor", "Explicit"), ("BatchNorm", "tensor", "Explicit")}


def _is_quick(cell: Any) -> bool:
    chip, name, sharding, mode = cell
    number = list(LAYERS).index(name) + list(SHARDINGS).index(sharding)
    return chip == V5E or number % 2 == (mode == "Auto")


@pytest.mark.parametrize(
    "sharded",
    some_slow(CELLS, _is_quick),
    ids=lambda sharded: "-".join((sharded[0].name, *sharded[1:])),
)
def test_kernels_on_each_part(sharded: tuple[Chip, str, str, str]) -> None:
    """Forward and backward: what crosses the devices is what crosses with flax's layer,
    and centred squares, which flax has no psum for."""
    chip, layer, sharding, mode = sharded
    kernels, crossing = compiled(chip, layer, sharding, mode, fused=True)
    shape, parts = LAYERS[layer][1], len(devices(chip, TOPOLOGY[chip]))
    part = math.prod(shape) * jnp.dtype(DTYPE[chip]).itemsize / parts
    crosses = sharding in CROSSING[layer]
    # Of pixels that are read twice the kernels do the first read, two each way.
    twice = len(shape) > 3 and (crosses or layer == "BatchNorm")
    assert len(kernels) == (4 if twice else 2)
    tensors = 3 if crosses or twice else 5
    nbytes = sum(kernel.nbytes for kernel in kernels)
    assert tensors * part <= nbytes <= 1.1 * tensors * part

    def total(found: list[tuple[str, int]]) -> int:
        return sum(count for _, count in found)

    if (layer, sharding, mode) in REFUSED:
        assert crossing == []
        return
    _, theirs = compiled(chip, layer, sharding, mode, fused=False)
    kind, _ = LAYERS[layer]
    norm = norm_of(kind, shape, "float32")
    statistic = 4 * math.prod(norm.statistic_shape(shape))
    statistic //= 1 if crosses else parts
    centred_squares = statistic if crosses and norm.center else 0
    assert total(crossing) <= total(theirs) + centred_squares
    assert max((count for _, count in crossing), default=0) < part / 10
