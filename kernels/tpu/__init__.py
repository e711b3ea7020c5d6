"""Kernels for TPUs, written in Pallas Mosaic TPU."""

from typing import Any

from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.tpu import channelwise, memory, rowwise


def plan(call: Call, device: Any) -> Kernel | Fallback:
    """Chooses the kernel for one call.

    Args:
      call: a call whose geometry and dtypes the kernels support; `dispatch` checks.
      device: the TPU, or None when compiling for a TPU that is elsewhere.
    """
    family = rowwise if call.view.family == "rowwise" else channelwise
    return family.plan(call, memory.chip(device))
