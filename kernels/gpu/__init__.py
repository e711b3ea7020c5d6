"""The kernels for NVIDIA GPUs, on Pallas Mosaic GPU."""

from typing import Any

from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import channelwise, rowwise

# Multiprocessors of an H100, assumed when the code is compiled for an absent GPU.
PROCESSORS = 132

# Bytes of shared memory that a block may have: below compute capability 12.0, and from
# it on (NVIDIA's "CUDA C++ Programming Guide", section "Compute Capabilities").
SHARED, SMALLER_SHARED = 227 * 1024, 99 * 1024


def plan(call: Call, device: Any) -> Kernel | Fallback:
    """Chooses the kernel for one call.

    Args:
      call: call whose geometry and dtypes the kernels support; `dispatch` checks this.
      device: GPU that runs the code, or None if it is compiled for an absent one.
    """
    processors, shared = PROCESSORS, SHARED
    if device is not None:
        # Mosaic GPU would abort the process: LLVM cannot select `elect.sync`.
        if float(device.compute_capability) < 9.0:
            return Fallback(
                f"compute capability {device.compute_capability}: the kernels need 9.0 "
                "or newer"
            )
        processors = device.core_count
        if float(device.compute_capability) >= 12.0:
            shared = SMALLER_SHARED
    if call.view.family == "rowwise":
        return rowwise.plan(call, processors, shared)
    return channelwise.plan(call, shared)
