"""The functional API: normalizations of plain arrays, for programs without NNX."""

from fusednorm.kernels.dispatch import use_backend
from fusednorm.kernels.functional import (
    batch_norm,
    batch_norm_inference,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

__all__ = [
    "batch_norm",
    "batch_norm_inference",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "use_backend",
]
