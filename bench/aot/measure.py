"""One norm of one shape, planned and compiled for one chip, and what it then is."""

import dataclasses
import importlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Concatenate, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bench.aot import hlo, traffic
from bench.aot.chips import Chip, Gpu, device
from bench.aot.compile import compile_for
from bench.aot.walk import Operand
from bench.cases import CASES, Case
from fusednorm.kernels import dispatch
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.reference import Norm

Op = Literal["forward", "forward+statistics", "backward"]
OPS: tuple[Op, ...] = ("forward", "forward+statistics", "backward")

TENSOR_BYTES = 160e6  # of x, as in the benchmarks on a chip: more than a cache holds


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a rowwise norm.

    Attributes:
      name: the benchmark case's, or the shape.
      op: the forward alone, the forward in training, or the backward.
      center: LayerNorm with a bias, else RMSNorm without.
      shape: of x; the last axis is normalized.
      dtype: of x, y, dy and dx; parameters are float32.
    """

    name: str
    op: Op
    center: bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def call(self) -> Call:
        """What `plan` is asked."""
        features = self.shape[-1]
        last = (len(self.shape) - 1,)
        x = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
        param = jax.ShapeDtypeStruct((features,), jnp.dtype("float32"))
        backward = self.op == "backward"
        return Call(
            op="backward" if backward else "forward",
            norm=Norm(last, last, center=self.center, dtype=x.dtype),
            x=x,
            scale=param,
            bias=param if self.center and not backward else None,
            dy=x if backward else None,
            statistics=self.op == "forward+statistics",
            wanted=(True, True, self.center),
        )

    @property
    def operands(self) -> tuple[Any, ...]:
        """Of the kernel's launch: arrays' shapes and dtypes, None where there is none.

        (x, scale, bias, mask), or (dy, x, scale, mean, var, mask).
        """
        call = self.call
        if call.op == "forward":
            return call.x, call.scale, call.bias, None
        statistic = jax.ShapeDtypeStruct((*self.shape[:-1], 1), jnp.dtype("float32"))
        mean = statistic if self.center else None
        return call.dy, call.x, call.scale, mean, statistic, None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a workload is on a chip. Bytes are of device memory.

    Attributes:
      case, op, norm, shape, dtype, chip: the workload's, and the chip's name.
      kernels: names of its kernels.
      block: what one block works on, in the plan's words.
      registers, spilled: of a thread: count, bytes. None for a TPU.
      scratch: bytes of shared memory of a block, or of VMEM.
      scratch_limit: what a block may have.
      threads, blocks, resident: threads of a block, blocks, and how many of them an SM
        holds at once. For a TPU `blocks` are grid steps, and the others None.
      ideal: bytes of x and y, or of dy, x and dx.
      tensors: bytes of these that the kernels access, each element once.
      again: bytes of these that they access once more: of ragged rows' overlaps.
      statistics: bytes of mean and variance.
      params: bytes of scale, bias and their gradients, each block's reads.
      partials: bytes of intermediate results, written and read.
      around: other operations beside the kernels, and the bytes of each.
    """

    case: str
    op: str
    norm: str
    shape: tuple[int, ...]
    dtype: str
    chip: str
    kernels: tuple[str, ...]
    block: str
    registers: int | None
    spilled: int | None
    scratch: int
    scratch_limit: int
    threads: int | None
    blocks: int
    resident: int | None
    ideal: int
    tensors: int
    again: int
    statistics: int
    params: int
    partials: int
    around: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes that cross the pins if caches hold all that is read again."""
        return self.tensors + self.statistics + self.partials

    @property
    def ratio(self) -> float:
        """Of the total to the ideal."""
        return self.total / self.ideal


def workloads(
    name: str, center: bool, shape: Sequence[int], dtype: str
) -> tuple[Workload, ...]:
    """The three ops of one shape."""
    return tuple(Workload(name, op, center, tuple(shape), dtype) for op in OPS)


def of_case(case: Case, tensor_bytes: float = TENSOR_BYTES) -> tuple[Workload, ...]:
    """The three ops of a benchmark case's norm."""
    center = case.norm is nnx.LayerNorm
    return workloads(case.name, center, case.shape(tensor_bytes), case.dtype)


ROWWISE = [case for case in CASES if case.norm in (nnx.LayerNorm, nnx.RMSNorm)]


def plan(chip: Chip, call: Call) -> Kernel | Fallback:
    """What our plan says on that chip."""
    _, module = dispatch.KERNELS[chip.platform]
    # A device of a topology lacks what a GPU's plan asks for; the table has it.
    target = chip if isinstance(chip, Gpu) else device(chip)
    return importlib.import_module(module).plan(call, target)


def measure(chip: Chip, workload: Workload) -> Measurement:
    """Plans, compiles and counts.

    Raises:
      LookupError: no kernel takes the workload.
    """
    answer = plan(chip, workload.call)
    if isinstance(answer, Fallback):
        raise LookupError(f"{workload} on {chip.name}: {answer.reason}")
    operands = workload.operands
    found = traffic.kernels(answer.launch, *operands)
    compiled = compile_for(chip, answer.launch, *operands)
    around = hlo.surroundings(compiled.hlo)
    bytes_of = _sort(workload, found)
    bytes_of["partials"] += sum(one.nbytes for one in around)
    largest = max(found, key=lambda kernel: kernel.threads)
    registers = spilled = threads = resident = None
    scratch = max(kernel.scratch for kernel in found)
    if isinstance(chip, Gpu):
        limit = chip.block_shared
        threads = largest.threads
        registers = max(report.registers for report in compiled.registers)
        spilled = max(report.spilled for report in compiled.registers)
        resident = chip.resident_blocks(registers, threads, scratch)
    else:
        limit = chip.vmem
    return Measurement(
        case=workload.name,
        op=workload.op,
        norm="LayerNorm" if workload.center else "RMSNorm",
        shape=workload.shape,
        dtype=workload.dtype,
        chip=chip.name,
        kernels=tuple(kernel.name for kernel in found),
        block=answer.block,
        registers=registers,
        spilled=spilled,
        scratch=scratch,
        scratch_limit=limit,
        threads=threads,
        blocks=max(kernel.blocks for kernel in found),
        resident=resident,
        around=tuple((one.opcode, one.nbytes) for one in around),
        **bytes_of,
    )


def orders_of_axes(
    chip: Chip, arrays: Sequence[jax.ShapeDtypeStruct]
) -> list[tuple[int, ...]]:
    """How XLA has the axes of each in memory, from the slowest to the fastest."""
    return [
        hlo.order_of_axes(compile_for(chip, lambda x: x + x, array).hlo)
        for array in arrays
    ]


def _sort(workload: Workload, found: Sequence[traffic.Traffic]) -> dict[str, int]:
    """Bytes by what the arrays are, which their sizes and places tell."""
    size = math.prod(workload.shape)
    features = workload.shape[-1]
    itemsize = jnp.dtype(workload.dtype).itemsize
    tensors = 3 if workload.op == "backward" else 2
    result = dict.fromkeys(
        ("tensors", "again", "statistics", "params", "partials"), 0
    ) | {"ideal": tensors * size * itemsize}
    for operand in (operand for kernel in found for operand in kernel.operands):
        moved = operand.loaded + operand.stored
        distinct = operand.distinct_loaded + operand.distinct_stored
        elements = math.prod(operand.shape)
        if elements == size and operand.dtype.itemsize == itemsize and tensors:
            tensors -= 1
            result["tensors"] += distinct
            result["again"] += moved - distinct
        elif elements == features:
            result["params"] += moved
        elif _is_statistic(workload, operand):
            result["statistics"] += distinct
        else:
            result["partials"] += distinct
    return result


def _is_statistic(workload: Workload, operand: Operand) -> bool:
    """One number a row; on a TPU in whole tiles of up to 1024."""
    elements = math.prod(operand.shape)
    return (
        operand.dtype == jnp.float32
        and workload.op != "forward"
        and operand.shape[-1] != workload.shape[-1]
        and workload.rows <= elements <= workload.rows + 1024
    )


class Elsewhere:
    """Works in processes of its own: one for each GPU architecture, one for all TPUs.

    A context manager; what was not begun when it is left is not done.
    """

    def __init__(self) -> None:
        self._pools: dict[str, ProcessPoolExecutor] = {}

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def begin[**P, R](
        self,
        function: Callable[Concatenate[Chip, P], R],
        chip: Chip,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        """Begins `function(chip, ...)`."""
        key = chip.arch if isinstance(chip, Gpu) else chip.platform
        if key not in self._pools:
            spawn = multiprocessing.get_context("spawn")
            self._pools[key] = ProcessPoolExecutor(1, mp_context=spawn)
        return self._pools[key].submit(function, chip, *args, **kwargs)
