"""flax.nnx's norm layers on fused kernels, and `fuse`, which swaps them into a model.

`explain` tells which implementation each norm of a model gets, and `fuse_neighbours`
moves the operations around a norm into its kernels.
"""

from fusednorm.layers.explain import explain
from fusednorm.layers.fuse import FuseReport, fuse, unfuse
from fusednorm.layers.neighbours import fuse_neighbours
from fusednorm.layers.normalization import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "BatchNorm",
    "FuseReport",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "explain",
    "fuse",
    "fuse_neighbours",
    "unfuse",
]
