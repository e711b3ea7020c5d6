"""Compiles functions for chips that are not here."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

from bench import memory
from bench.aot.chips import Chip, Gpu, Tpu, device, schedules, target
from fusednorm.kernels import dispatch

# Make Mosaic print the PTX of each kernel that it compiles, followed by ptxas' report.
_PRINT = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")


@dataclasses.dataclass(frozen=True)
class Registers:
    """ptxas' report of one Mosaic GPU kernel, and counts of instructions in its PTX.

    Attributes:
      kernel: the kernel's name.
      arch: the architecture, "sm_90a".
      registers: registers per thread.
      spilled: bytes per thread that spills store to and load from the stack.
      stack: stack bytes per thread.
      matrices: instructions that move matrices to or from shared memory (`ldmatrix`,
        `stmatrix`). Mosaic emits them for 4 bytes per lane, without checking that the
        16 bytes of each 4 lanes are aligned, which the hardware requires.
      uneven: FMAs whose addend another lane sent. In a reduction across lanes, each
        lane then rounds its own product together with the sum, but the other lane's
        product before it. The lanes end up with different sums.
      fences: fences that order a warp's accesses as other multiprocessors see them,
        with a barrier of the warp's lanes right behind.
    """

    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int
    matrices: int
    uneven: int
    fences: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function.

    Attributes:
      chip: the chip that it is compiled for.
      hlo: the optimized module as text.
      registers: one report per distinct Mosaic GPU kernel in the module.
      schedules: the schedule of each TPU kernel in the module, XLA's included, by the
        kernel's name. schedule.py reads the text.
      memory: bytes that a call allocates beyond its arguments.
    """

    chip: Chip
    hlo: str
    registers: tuple[Registers, ...]
    schedules: dict[str, str]
    memory: int


def compile_for(chip: Chip, function: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles `function` for one device, or for the devices of the arguments.

    Args:
      chip: the devices' kind.
      function: the function, which is traced with `args`.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s. Only the shape, the dtype and
        a NamedSharding matter.

    Raises:
      RuntimeError: the chip's compiler is not installed; or this process has already
        compiled for another GPU architecture. Mosaic caches kernels by their source
        alone, so it would return the code for that architecture.
    """
    if isinstance(chip, Gpu) and (others := _archs - {chip.arch}):
        raise RuntimeError(
            f"This process has compiled for {others.pop()}: compile for {chip.arch} "
            "in another one."
        )
    one = jax.sharding.SingleDeviceSharding(device(chip))

    def placed(a: Any) -> jax.ShapeDtypeStruct:
        given = getattr(a, "sharding", None)
        sharding = given if isinstance(given, jax.sharding.NamedSharding) else one
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    avals = jax.tree.map(placed, args)
    with dispatch.compiling_for(target(chip)):
        lowered = jax.jit(function).lower(*avals)
    if isinstance(chip, Gpu):
        _archs.add(chip.arch)
    # A call that XLA asks about is planned when it compiles.
    with dispatch.compiling_for(target(chip)), _ptxas_reports() as read:
        compiled = lowered.compile()
        hlo = compiled.as_text() or ""
        reports = list(parse_ptxas(read()))
    hashes = dict.fromkeys(re.findall(r'kernel_hash ?= ?"((?:[^"\\]|\\.)*)"', hlo))
    # Mosaic does not compile, or report, a kernel that it has compiled before.
    new = [key for key in hashes if key not in _reports]
    if len(new) != len(reports):
        raise RuntimeError(f"ptxas reports {len(reports)} of {len(new)} new kernels")
    _reports.update(zip(new, reports, strict=True))
    return Compiled(
        chip,
        hlo,
        registers=tuple(_reports[key] for key in hashes),
        schedules=dict(_take_schedules()) if isinstance(chip, Tpu) else {},
        memory=memory.beside_arguments(compiled),
    )


# The architectures that this process has compiled for, and ptxas' reports by the hash
# of the kernel.
_archs: set[str] = set()
_reports: dict[str, Registers] = {}


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[Callable[[], str]]:
    """Captures the standard output of this process, including its C++ code.

    Yields:
      A function that returns the text captured so far.
    """
    before = {name: os.environ.get(name) for name in _PRINT}
    os.environ.update(dict.fromkeys(_PRINT, "1"))
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile() as caught:
            os.dup2(caught.fileno(), 1)

            def read() -> str:
                caught.seek(0)
                return caught.read().decode(errors="replace")

            yield read
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_SCHEDULE = re.compile(r"\d+-(?P<kernel>.+)-\d+-packed-bundles-post-ra\.txt")


def _take_schedules() -> Iterator[tuple[str, str]]:
    """Yields the name and schedule of each kernel of the last compilation.

    Removes the few hundred files that the compilation wrote.
    """
    for path in sorted(schedules().iterdir()):
        if found := _SCHEDULE.fullmatch(path.name):
            yield found["kernel"], path.read_text()
        path.unlink()


_REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>[^']*)' for '(?P<arch>[^']*)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def _uneven(ptx: str) -> int:
    sent = set(re.findall(r"\bshfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    # From sm_100 on, LLVM adds two values in one instruction.
    pairs = re.findall(r"\bmov\.b64\s+(%\w+), \{(%\w+), (%\w+)\};", ptx)
    sent |= {pair for pair, *values in pairs if sent.intersection(values)}
    added = re.findall(r"\bfma\.rn\.f32(?:x2)?\s+[^;]*,\s*(%\w+);", ptx)
    return sum(register in sent for register in added)


def parse_ptxas(text: str) -> Iterator[Registers]:
    """Yields the reports in a captured output, where each follows its kernel's PTX."""
    end = 0
    for report in _REPORT.finditer(text):
        ptx, end = text[end : report.start()], report.end()
        yield Registers(
            kernel=report["kernel"].removesuffix("_mosaic_gpu_kernel"),
            arch=report["arch"],
            registers=int(report["registers"]),
            spilled=int(report["stores"]) + int(report["loads"]),
            stack=int(report["stack"]),
            matrices=len(re.findall(r"\b(?:ld|st)matrix\.", ptx)),
            uneven=_uneven(ptx),
            fences=len(re.findall(r"\bfence\.acq_rel\.gpu;\s*bar\.warp\.sync\b", ptx)),
        )
