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

from bench.aot import hlo, schedule, traffic
from bench.aot.chips import Chip, Gpu, target
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
    """One call of a norm.

    Attributes:
      name: the benchmark case's, or the shape.
      op: the forward alone, the forward in training, or the backward.
      layer: the flax class.
      norm: what it does; with a bias if it centres.
      shape: of x.
      dtype: of x, y, dy and dx; parameters are float32.
      residual: whether one is added to x, and dx to the cotangent of the sum.
      shortcut: whether one is added behind the norm, before the activation.
      own: whether all rows share scale and bias, or those of one sample do, or each row
        has its own, in x's dtype. A bias of each row is a shortcut.
    """

    name: str
    op: Op
    layer: Any
    norm: Norm
    shape: tuple[int, ...]
    dtype: str
    residual: bool = False
    shortcut: bool = False
    own: Literal["all", "sample", "row"] = "all"

    @property
    def tensors(self) -> int:
        """Arrays of x's size that are read or written."""
        call = self.call
        given = [call.x, call.dy, call.beside, call.shortcut]
        given += [call.scale] if call.scales_each else []
        count = sum(array is not None for array in given)
        if call.op == "forward":
            return count + 1 + self.residual
        _, dscale, _, dshortcut = call.wanted
        return count + 1 + (dscale and call.scales_each) + dshortcut

    @property
    def statistic(self) -> jax.ShapeDtypeStruct:
        """The variance."""
        shape = self.norm.statistic_shape(self.shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype("float32"))

    @property
    def groups(self) -> int:
        """What has a mean and a variance of its own: rows, groups, channels."""
        return self.statistic.size

    @property
    def features(self) -> int:
        """Length of a scale."""
        return math.prod(self.shape[axis] for axis in self.norm.feature_axes)

    @property
    def call(self) -> Call:
        """What `plan` is asked."""
        x = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
        param = jax.ShapeDtypeStruct((self.features,), jnp.dtype("float32"))
        if self.own == "sample":
            param = jax.ShapeDtypeStruct((self.shape[0], self.shape[-1]), x.dtype)
        backward = self.op == "backward"
        center = self.norm.center
        for_z = not backward or self.norm.activation is not None
        behind = self.shortcut or self.own == "row"
        biased = center and for_z and self.own != "row"
        return Call(
            op="backward" if backward else "forward",
            norm=self.norm,
            x=x,
            scale=x if self.own == "row" else param,
            bias=param if biased else None,
            dy=x if backward else None,
            beside=x if self.residual else None,
            shortcut=x if behind and for_z else None,
            statistics=self.op == "forward+statistics",
            wanted=(
                True,
                True,
                center and self.own != "row",
                behind and backward and for_z,
            ),
        )

    @property
    def operands(self) -> tuple[Any, ...]:
        """Of the kernel's launch: arrays' shapes and dtypes, None where there is none.

        (x, scale, bias, mask), or (dy, x, scale, bias, mean, var, mask).
        """
        call = self.call
        if call.op == "forward":
            return call.x, call.scale, call.bias, None
        mean = self.statistic if self.norm.center else None
        params = call.scale, call.bias
        return call.dy, call.x, *params, mean, self.statistic, None

    @property
    def named(self) -> dict[str, Any]:
        """Likewise, those that it takes by name."""
        call = self.call
        beside = "residual" if call.op == "forward" else "dh"
        others = {beside: call.beside, "shortcut": call.shortcut}
        return {name: array for name, array in others.items() if array is not None}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a workload is on a chip. Bytes are of device memory.

    Attributes:
      case, op, norm, shape, dtype, chip: the workload's, and the chip's name.
      plan: the plan's name.
      kernels: names of its kernels.
      block: what one block works on, in the plan's words.
      registers, spilled: of a thread: count, of the kernel that loads most, as are the
        threads and what is resident; bytes, the most of any. None for a TPU.
      matrices, uneven: of a GPU's kernels, as in `Registers`.
      scratch: bytes of shared memory of a block, or of VMEM.
      scratch_limit: what a block may have.
      threads, blocks, resident: threads of a block, blocks, and how many of them an SM
        holds at once. For a TPU `blocks` are grid steps of a core, the others None.
      in_flight: bytes on their way to an SM at once, at most; None for a TPU.
      cycles: of a TPU's kernels, over all steps of a core; () for a GPU.
      seconds_of_bytes: that the DMAs of each of these kernels take at least.
      clock: of the TPU, GHz; None for a GPU.
      ideal: bytes of x and y, or of dy, x and dx, and of all else of x's size.
      tensors: bytes of these that the kernels access, each element once.
      again: bytes of these that a GPU's access once more: of ragged rows' overlaps. A
        TPU has no cache to have them from: there they are among `tensors`.
      rest: bytes of XLA's kernels that access such tensors: what the plan leaves to it.
      statistics: bytes of mean and variance; of BatchNorm and InstanceNorm also of
        parameters and their gradients, which have the same shapes.
      params: bytes of scale, bias and their gradients, each block's reads.
      partials: bytes of intermediate results, written and read.
      around: other operations beside the kernels, in the order in which they run, and
        the bytes of each.
    """

    case: str
    op: str
    norm: str
    shape: tuple[int, ...]
    dtype: str
    chip: str
    plan: str
    kernels: tuple[str, ...]
    block: str
    registers: int | None
    spilled: int | None
    matrices: int | None
    uneven: int | None
    scratch: int
    scratch_limit: int
    threads: int | None
    blocks: int
    resident: int | None
    in_flight: int | None
    cycles: tuple[int, ...]
    seconds_of_bytes: tuple[float, ...]
    clock: float | None
    ideal: int
    tensors: int
    again: int
    rest: int
    statistics: int
    params: int
    partials: int
    around: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes that cross the pins if caches hold all that is read again."""
        return self.tensors + self.rest + self.statistics + self.partials

    @property
    def ratio(self) -> float:
        """Of the total to the ideal."""
        return self.total / self.ideal

    @property
    def in_two_reads(self) -> bool:
        """Whether the plan leaves a second read of x to XLA."""
        return self.plan.endswith(", two reads")

    @property
    def floor(self) -> float:
        """Least ratio: 1; or, in two reads, with x once more, and dy, or dz for it."""
        if not self.in_two_reads:
            return 1.0
        tensor = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return 1 + (2 if self.op == "backward" else 1) * tensor / self.ideal

    @property
    def accessed(self) -> float:
        """Of all bytes to the ideal, counting what is accessed twice twice."""
        return (self.total + self.again) / self.ideal

    @property
    def seconds_of_cycles(self) -> tuple[float, ...]:
        """That each of a TPU's kernels computes at least."""
        assert self.clock is not None
        return tuple(cycles / (self.clock * 1e9) for cycles in self.cycles)

    @property
    def compute(self) -> float | None:
        """Of a TPU's computing to its DMAs, in time: above 1, it is bound by it."""
        if not self.cycles:
            return None
        return sum(self.seconds_of_cycles) / sum(self.seconds_of_bytes)

    @property
    def seconds(self) -> float | None:
        """Predicted for a TPU's kernels: each computes, or waits for its DMAs."""
        if not self.cycles:
            return None
        pairs = zip(self.seconds_of_cycles, self.seconds_of_bytes, strict=True)
        return sum(map(max, pairs))


def norm_of(
    layer: Any,
    shape: Sequence[int],
    dtype: str,
    *,
    reduction_axes: tuple[int, ...] | None = None,
    feature_axes: tuple[int, ...] | None = None,
    num_groups: int = 32,
    activation: str | None = None,
) -> Norm:
    """What a flax layer does to an array, with flax's defaults.

    Args:
      layer: the class.
      shape: of x.
      dtype: of x and y.
      reduction_axes: of a LayerNorm or an RMSNorm, None for the last.
      feature_axes: that scale and bias have, None for the last.
      num_groups: of a GroupNorm.
      activation: what follows, in the same call.
    """
    *others, last = range(len(shape))
    reduced = {
        nnx.BatchNorm: tuple(others),
        nnx.GroupNorm: tuple(others[1:]),
        nnx.InstanceNorm: tuple(others[1:]),
    }
    return Norm(
        reduced.get(layer, reduction_axes or (last,)),
        feature_axes or (last,),
        num_groups=num_groups if layer is nnx.GroupNorm else None,
        center=layer is not nnx.RMSNorm,
        dtype=jnp.dtype(dtype),
        activation=activation,
    )


def workloads(
    name: str,
    layer: Any,
    shape: Sequence[int],
    dtype: str,
    *,
    ops: Sequence[Op] = OPS,
    residual: bool = False,
    shortcut: bool = False,
    own: Literal["all", "sample", "row"] = "all",
    **options: Any,
) -> tuple[Workload, ...]:
    """The ops of one shape; `options` are those of `norm_of`."""
    norm = norm_of(layer, shape, dtype, **options)
    return tuple(
        Workload(name, op, layer, norm, tuple(shape), dtype, residual, shortcut, own)
        for op in ops
    )


def of_case(case: Case, tensor_bytes: float = TENSOR_BYTES) -> tuple[Workload, ...]:
    """The three ops of a benchmark case's norm."""
    return workloads(
        case.name,
        case.norm,
        case.shape(tensor_bytes),
        case.dtype,
        own="sample" if case.modulated else "all",
    )


ROWWISE = [case for case in CASES if case.norm in (nnx.LayerNorm, nnx.RMSNorm)]
CHANNELWISE = [case for case in CASES if case not in ROWWISE]


def plan(chip: Chip, call: Call) -> Kernel | Fallback:
    """What our plan says on that chip."""
    _, module = dispatch.KERNELS[chip.platform]
    return importlib.import_module(module).plan(call, target(chip))


def measure(chip: Chip, workload: Workload) -> Measurement:
    """Plans, compiles and counts.

    Raises:
      LookupError: no kernel takes the workload.
    """
    answer = plan(chip, workload.call)
    if isinstance(answer, Fallback):
        raise LookupError(answer.reason)
    return measure_kernel(chip, workload, answer)


def measure_kernel(chip: Chip, workload: Workload, answer: Kernel) -> Measurement:
    """Compiles and counts what does the workload, planned by us or not."""
    arrays = workload.named, *workload.operands

    def launch(named: dict[str, Any], *operands: Any) -> Any:
        return answer.launch(*operands, **named)

    found = traffic.kernels(launch, *arrays)
    compiled = compile_for(chip, launch, *arrays)
    around = hlo.surroundings(compiled.hlo)
    bytes_of = _sort(workload, found, cached=isinstance(chip, Gpu))
    tensor = bytes_of["ideal"] // workload.tensors
    for one in around:
        bytes_of["rest" if one.nbytes >= tensor else "partials"] += one.nbytes
    largest = max(found, key=lambda kernel: kernel.loaded)
    registers = spilled = matrices = uneven = None
    threads = resident = in_flight = clock = None
    cycles: tuple[int, ...] = ()
    seconds_of_bytes: tuple[float, ...] = ()
    scratch = max(kernel.scratch for kernel in found)
    if isinstance(chip, Gpu):
        limit = chip.block_shared
        threads = largest.threads
        registers = max(
            report.registers
            for report in compiled.registers
            if report.kernel == largest.name
        )
        spilled = max(report.spilled for report in compiled.registers)
        matrices = sum(report.matrices for report in compiled.registers)
        uneven = sum(report.uneven for report in compiled.registers)
        resident = chip.resident_blocks(registers, threads, largest.scratch)
        blocks_of_sm = min(resident, -(-largest.blocks // chip.core_count))
        in_flight = blocks_of_sm * largest.in_flight
    else:
        limit, clock = chip.vmem, chip.clock
        cycles = tuple(schedule.cycles(compiled, [kernel.name for kernel in found]))
        seconds_of_bytes = tuple(
            (kernel.loaded + kernel.stored)
            / (chip.bandwidth * schedule.cores(chip, kernel) / chip.cores)
            for kernel in found  # one of two cores has half of a device's bandwidth
        )
    return Measurement(
        case=workload.name,
        op=workload.op,
        norm=workload.layer.__name__,
        shape=workload.shape,
        dtype=workload.dtype,
        chip=chip.name,
        plan=answer.name,
        kernels=tuple(kernel.name for kernel in found),
        block=answer.block,
        registers=registers,
        spilled=spilled,
        matrices=matrices,
        uneven=uneven,
        scratch=scratch,
        scratch_limit=limit,
        threads=threads,
        blocks=max(kernel.blocks // schedule.cores(chip, kernel) for kernel in found),
        resident=resident,
        in_flight=in_flight,
        cycles=cycles,
        seconds_of_bytes=seconds_of_bytes,
        clock=clock,
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


def _sort(
    workload: Workload, found: Sequence[traffic.Traffic], *, cached: bool
) -> dict[str, int]:
    """Bytes by what the arrays are, which their sizes and places tell.

    Args:
      workload: that the kernels do.
      found: their traffic.
      cached: whether what is accessed again may come from a cache.
    """
    size = math.prod(workload.shape)
    features = workload.shape[-1]
    itemsize = jnp.dtype(workload.dtype).itemsize
    tensors = workload.tensors
    result = dict.fromkeys(
        ("tensors", "again", "rest", "statistics", "params", "partials"), 0
    ) | {"ideal": tensors * size * itemsize}
    for operand in (operand for kernel in found for operand in kernel.operands):
        moved = operand.loaded + operand.stored
        distinct = operand.distinct_loaded + operand.distinct_stored
        distinct = distinct if cached else moved
        elements = math.prod(operand.shape)
        if elements == size and operand.dtype.itemsize == itemsize and tensors:
            tensors -= 1
            result["tensors"] += distinct
            result["again"] += moved - distinct
        elif elements == features != workload.groups:
            result["params"] += moved
        elif _is_statistic(workload, operand):
            result["statistics"] += distinct
        else:
            result["partials"] += distinct
    return result


def _is_statistic(workload: Workload, operand: Operand) -> bool:
    """One number a row or group; on a TPU in whole tiles of up to 1024."""
    elements = math.prod(operand.shape)
    if elements == workload.groups:
        return True
    return (
        operand.dtype == jnp.float32
        and workload.op != "forward"
        and operand.shape[-1] != workload.shape[-1]
        and workload.groups <= elements <= workload.groups + 1024
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
