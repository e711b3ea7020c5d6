"""The kernels for NVIDIA GPUs, on Pallas Mosaic GPU."""

from typing import Any

from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import rowwise

# Where the code is compiled for a GPU that is elsewhere: those of an H100.
PROCESSORS = 132


def plan(call: Call, device: Any) -> Kernel | Fallback:
    """Chooses the kernel for one call.

    Args:
      call: one whose geometry and dtypes the kernels take; `dispatch` has looked.
      device: the GPU, or None where the code is compiled for one that is elsewhere.
    """
    processors = PROCESSORS
    if device is not None:
        # Mosaic GPU would end the process: LLVM cannot select `elect.sync`.
        if float(device.compute_capability) < 9.0:
            return Fallback(
                f"compute capability {device.compute_capability}: the kernels need 9.0 "
                "or newer"
            )
        processors = device.core_count
    assert call.geometry is not None
    if call.geometry.family == "rowwise":
        return rowwise.plan(call, processors)
    return Fallback("no channelwise kernel for NVIDIA GPUs yet")
