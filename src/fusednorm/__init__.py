"""Drop-in fused normalization layers for flax.nnx, on NVIDIA GPUs, TPUs and CPUs.

    import fusednorm
    fusednorm.fuse(model)                          # an existing model, in place
    layer = fusednorm.LayerNorm(768, rngs=rngs)    # or our layers from the start

`fusednorm.explain(model, x)` tells which implementation runs, and why.
"""

from fusednorm.kernels import (
    batch_norm,
    batch_norm_inference,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    use_backend,
)
from fusednorm.layers import (
    BatchNorm,
    FuseReport,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    explain,
    fuse,
    fuse_neighbours,
    unfuse,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "FuseReport",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "batch_norm",
    "batch_norm_inference",
    "explain",
    "fuse",
    "fuse_neighbours",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "unfuse",
    "use_backend",
]
