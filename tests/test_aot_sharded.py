"""Norms on several devices that are not here: the kernels are there, on each device's
part, and what crosses the devices is little.

Values are test_sharded.py's to check, on devices of a CPU.
"""

import math
from typing import Any

import jax.numpy as jnp
import pytest

from bench.aot.chips import CHIPS, H100, Chip
from bench.aot.sharded import LAYERS, SHARDINGS, Mode, dtype_of, layer
from tests.compilers import some_slow

pytestmark = pytest.mark.aot

V5E = CHIPS["v5e"]
TOPOLOGY = {H100: "1x1x4", V5E: "v5e:2x4"}
DEVICES = {H100: 4, V5E: 8}

IN_PARTS = [("shard_map", "tensor", name) for name in ("GroupNorm", "BatchNorm")]
CELLS = [
    (chip, name, sharding, mode)
    for chip, mode in (
        *((H100, "Explicit"), (H100, "Auto"), (V5E, "Explicit")),
        *((H100, "shard_map"), (V5E, "shard_map")),
    )
    for name in LAYERS
    for sharding in SHARDINGS
    # Of images a TPU runs the reference; in a shard_map FSDP is the user's, and so is a
    # layer of fewer channels.
    if (chip == H100 or len(LAYERS[name][1]) == 3)
    and (mode, sharding) != ("shard_map", "fsdp")
    and (mode, sharding, name) not in IN_PARTS
]
CROSSING = {  # where statistics cross devices
    "LayerNorm": ("tensor",),
    "RMSNorm": ("tensor",),
    "GroupNorm": ("sequence",),
    "InstanceNorm": ("sequence",),
    "BatchNorm": ("data", "fsdp", "sequence"),
}
# Where flax raises: for the split of channels into groups, and for running statistics
# that are constants of the program, on one device.
REFUSED = {("GroupNorm", "tensor", "Explicit"), ("BatchNorm", "tensor", "Explicit")}


def _is_quick(cell: Any) -> bool:
    chip, name, sharding, mode = cell
    number = list(LAYERS).index(name) + list(SHARDINGS).index(sharding)
    return chip == V5E or number % 2 == (mode != "Explicit")


@pytest.mark.parametrize(
    "sharded",
    some_slow(CELLS, _is_quick),
    ids=lambda sharded: "-".join((sharded[0].name, *sharded[1:])),
)
def test_kernels_on_each_part(sharded: tuple[Chip, str, str, Mode]) -> None:
    """Forward and backward: what crosses the devices is what crosses with flax's layer,
    but for dscale, which flax has from sums that cross for dx, and parameters, which
    flax rounds to `dtype` before they are gathered, or their gradients added up. Ours
    of BatchNorm is below flax's."""
    chip, name, sharding, mode = sharded
    _, shape = LAYERS[name]
    itemsize = jnp.dtype(dtype_of(chip)).itemsize
    ours = layer(chip, name, shape, TOPOLOGY[chip], sharding, mode, fused=True)
    part = math.prod(shape) * itemsize / DEVICES[chip]
    crosses = sharding in CROSSING[name]
    # Of pixels that are read twice the kernels do the first read, two each way.
    twice = len(shape) > 3 and (crosses or name == "BatchNorm")
    assert len(ours.kernels) == (4 if twice else 2)
    tensors = 3 if crosses or twice else 5
    # On a TPU XLA may have put one on the chip, ahead of the kernel that reads it.
    nbytes = sum(kernel.arrays for kernel in ours.kernels)
    assert tensors * part <= nbytes <= 1.1 * tensors * part
    if (name, sharding, mode) in REFUSED:
        assert ours.collectives == ()
        return
    flax = layer(chip, name, shape, TOPOLOGY[chip], sharding, mode, fused=False)
    params = shape[-1] * (1 if name == "RMSNorm" else 2)
    rounds = sharding == "fsdp" or mode == "shard_map"
    rounded = params * (4 - itemsize) if rounds else 0
    # BatchNorm has its sums for dx from dscale and dbias.
    shares = sharding == "tensor" or name == "BatchNorm"
    dscale = 4 * shape[-1] if crosses and not shares else 0
    assert ours.crossing <= flax.crossing + rounded + dscale
    assert max((count for _, count in ours.collectives), default=0) < part / 10


def test_a_group_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 devices have 4 groups' channels, two each group's: kernels do the first read of
    theirs, and what crosses is what crosses with flax's."""
    monkeypatch.setattr("bench.aot.sharded.GROUP_SIZE", 128)
    shape = (16, 32, 32, 512)
    given = H100, "GroupNorm", shape, "1x1x8", "tensor", "Auto"
    ours, flax = (layer(*given, fused=fused) for fused in (True, False))
    part = math.prod(shape) * 2 / 8
    assert 3 * part <= sum(kernel.arrays for kernel in ours.kernels) <= 3.3 * part
    assert 0 < ours.crossing <= flax.crossing
