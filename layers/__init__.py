"""The layers of flax.nnx on fused kernels, and what swaps them into a model."""

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
