"""A function compiled for a chip that is not here."""

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

# Have Mosaic print the PTX of each kernel that it compiles, and then ptxas' report.
_PRINT = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")


@dataclasses.dataclass(frozen=True)
class Registers:
    """ptxas' report of one Mosaic GPU kernel, and what its PTX says.

    Attributes:
      kernel: its name.
      arch: "sm_90a".
      registers: of a thread.
      spilled: bytes that a thread stores to and loads from its stack for want of them.
      stack: bytes of a thread's stack.
      matrices: instructions that move matrices to or from shared memory. Mosaic has
        them for 4 bytes a lane, and does not ask whether each 4 lanes' 16 bytes are
        aligned, as the hardware wants.
      uneven: FMAs that add what another lane sent to a product. Where lanes add up what
        they have, each rounds its own product with the sum and the others' before, and
        they find different sums.
    """

    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int
    matrices: int
    uneven: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a function.

    Attributes:
      chip: that it is for.
      hlo: the optimized module as text.
      registers: of each different Mosaic GPU kernel in it.
      schedules: of each TPU kernel in it, XLA's too, by its name: the text that
        schedule.py reads.
      memory: bytes that a call takes beside its arguments.
    """

    chip: Chip
    hlo: str
    registers: tuple[Registers, ...]
    schedules: dict[str, str]
    memory: int


def compile_for(chip: Chip, function: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles `function` for one device, or those on which the arguments lie.

    Args:
      chip: the device's kind.
      function: traced with `args`.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s, of which shape and dtype
        matter, and a NamedSharding.

    Raises:
      RuntimeError: the chip's compiler is not installed; or it is a GPU of another
        architecture than one that this process has compiled for: Mosaic keeps what it
        compiled by its source alone, and would take the other one's.
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
    with _ptxas_reports() as read:
        compiled = lowered.compile()
        hlo = compiled.as_text() or ""
        reports = list(parse_ptxas(read()))
    hashes = dict.fromkeys(re.findall(r'kernel_hash ?= ?"((?:[^"\\]|\\.)*)"', hlo))
    # A kernel that was compiled before is not compiled again.
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


# What this process has compiled for, and the reports by the kernels' hashes.
_archs: set[str] = set()
_reports: dict[str, Registers] = {}


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[Callable[[], str]]:
    """Catches what this process, C++ included, writes to its standard output."""
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
    """The schedules of the last compilation; removes its files, a few hundred."""
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
    added = re.findall(r"\bfma\.rn\.f32\s+[^;]*,\s*(%\w+);", ptx)
    return sum(register in sent for register in added)


def parse_ptxas(text: str) -> Iterator[Registers]:
    """The reports in what was printed, each behind the PTX it is of."""
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
        )
