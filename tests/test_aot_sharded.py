"""Tests of norms compiled for several devices that are not here.

Each device must run the kernels on its part of x, and few bytes may cross devices.
test_sharded.py checks the values, on devices of a CPU.
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
    # Left out: images on a TPU, where the reference runs; in a shard_map, FSDP, where
    # users gather the parameters, and `IN_PARTS`, where they make layers of fewer
    # channels.
    if (chip == H100 or len(LAYERS[name][1]) == 3)
    and (mode, sharding) != ("shard_map", "fsdp")
    and (mode, sharding, name) not in IN_PARTS
]
CROSSING = {  # shardings where statistics cross devices
    "LayerNorm": ("tensor",),
    "RMSNorm": ("tensor",),
    "GroupNorm": ("sequence",),
    "InstanceNorm": ("sequence",),
    "BatchNorm": ("data", "fsdp", "sequence"),
}
# Where flax raises: GroupNorm splits sharded channels into groups, and BatchNorm's
# running statistics are constants of the program, on one device.
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
    """Forward and backward, no more bytes cross devices than with flax's layer.

    There are two exceptions. Our dscale crosses too, while flax derives it from sums
    that cross for dx anyway. And flax rounds parameters to `dtype` before it gathers
    them, or before it sums their gradients. For BatchNorm ours is below flax's.
    """
    chip, name, sharding, mode = sharded
    _, shape = LAYERS[name]
    itemsize = jnp.dtype(dtype_of(chip)).itemsize
    ours = layer(chip, name, shape, TOPOLOGY[chip], sharding, mode, fused=True)
    part = math.prod(shape) * itemsize / DEVICES[chip]
    crosses = sharding in CROSSING[name]
    # If pixels are read twice, two kernels per direction do the first read.
    twice = len(shape) > 3 and (crosses or name == "BatchNorm")
    assert len(ours.kernels) == (4 if twice else 2)
    tensors = 3 if crosses or twice else 5
    # Arrays on the chip count too: on a TPU, XLA may move one there ahead of the kernel
    # that reads it.
    nbytes = sum(kernel.arrays for kernel in ours.kernels)
    assert tensors * part <= nbytes <= 1.1 * tensors * part
    if (name, sharding, mode) in REFUSED:
        assert ours.collectives == ()
        return
    flax = layer(chip, name, shape, TOPOLOGY[chip], sharding, mode, fused=False)
    params = shape[-1] * (1 if name == "RMSNorm" else 2)
    rounds = sharding == "fsdp" or mode == "shard_map"
    rounded = params * (4 - itemsize) if rounds else 0
    # BatchNorm takes its sums for dx from dscale and dbias.
    shares = sharding == "tensor" or name == "BatchNorm"
    dscale = 4 * shape[-1] if crosses and not shares else 0
    assert ours.crossing <= flax.crossing + rounded + dscale
    assert max((count for _, count in ours.collectives), default=0) < part / 10


def test_a_group_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 groups on 8 devices, two devices share the channels of a group.

    The kernels do the first read of their part, and no more bytes cross devices than
    with flax's layer.
    """
    monkeypatch.setattr("bench.aot.sharded.GROUP_SIZE", 128)
    shape = (16, 32, 32, 512)
    given = H100, "GroupNorm", shape, "1x1x8", "tensor", "Auto"
    ours, flax = (layer(*given, fused=fused) for fused in (True, False))
    part = math.prod(shape) * 2 / 8
    assert 3 * part <= sum(kernel.arrays for kernel in ours.kernels) <= 3.3 * part
    assert 0 < ours.crossing <= flax.crossing
