"""Plans and compiles one norm of one shape for one chip, and counts its figures."""

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

# Bytes of x, as in the benchmarks on a chip: more than a cache holds.
TENSOR_BYTES = 160e6


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a norm.

    Attributes:
      name: the benchmark case's name, or the shape.
      op: the forward alone, the forward in training, or the backward.
      layer: the flax class.
      norm: the normalization; it has a bias if it centres.
      shape: x's shape.
      dtype: dtype of x, y, dy and dx; parameters are float32.
      residual: whether a residual is added to x; the backward then adds dx to the
        cotangent of the sum.
      shortcut: whether a shortcut is added after the norm, before the activation.
      own: which rows share scale and bias: all rows, the rows of each sample, or none.
        Parameters per sample or per row have x's dtype. A bias per row is a shortcut.
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
        """Number of arrays of x's size that are read or written."""
        call = self.call
        given = [call.x, call.dy, call.addend, call.shortcut]
        given += [call.scale] if call.scales_each else []
        count = sum(array is not None for array in given)
        if call.op == "forward":
            return count + 1 + self.residual
        _, dscale, _, dshortcut = call.wanted
        return count + 1 + (dscale and call.scales_each) + dshortcut

    @property
    def statistic(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the variance."""
        shape = self.norm.statistic_shape(self.shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype("float32"))

    @property
    def groups(self) -> int:
        """Number of rows, groups or channels that have their own mean and variance."""
        return self.statistic.size

    @property
    def features(self) -> int:
        """Length of a scale that all rows share."""
        return math.prod(self.shape[axis] for axis in self.norm.feature_axes)

    @property
    def call(self) -> Call:
        """The `Call` that `plan` is given."""
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
            addend=x if self.residual else None,
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
        """Positional operands of the kernel's launch, as shapes and dtypes.

        They are (x, scale, bias), or (dy, x, scale, bias, mean, var), with None for an
        absent one.
        """
        call = self.call
        if call.op == "forward":
            return call.x, call.scale, call.bias
        mean = self.statistic if self.norm.center else None
        params = call.scale, call.bias
        return call.dy, call.x, *params, mean, self.statistic

    @property
    def named(self) -> dict[str, Any]:
        """Operands that the kernel's launch takes by name, as shapes and dtypes."""
        call = self.call
        beside = "residual" if call.op == "forward" else "dh"
        others = {beside: call.addend, "shortcut": call.shortcut}
        return {name: array for name, array in others.items() if array is not None}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Figures of a workload on a chip. Bytes are bytes of device memory.

    Attributes:
      case, op, norm, shape, dtype, chip: the workload, and the chip's name.
      plan: the plan's name.
      kernels: names of the plan's kernels.
      block: what one block works on, in the plan's words.
      registers: registers per thread of the kernel that loads most. None for a TPU.
      spilled: bytes per thread, the maximum over the kernels. None for a TPU.
      matrices, uneven: sums over a GPU's kernels, see `Registers`. None for a TPU.
      scratch: bytes of shared memory per block, or of VMEM per core.
      scratch_limit: bytes of scratch that are available.
      threads, resident: threads per block, and resident blocks per SM, of the kernel
        that loads most. None for a TPU.
      blocks: blocks of a GPU's grid; grid steps per core of a TPU.
      in_flight: upper bound of the bytes in flight per SM. None for a TPU.
      cycles: cycles of each of a TPU's kernels, over all steps of a core. () for a GPU.
      seconds_of_bytes: least time of the DMAs of each of a TPU's kernels. () for a GPU.
      clock: clock of the TPU, GHz. None for a GPU.
      ideal: bytes of x and y, or of dy, x and dx, and of all other arrays of x's size.
      tensors: bytes of these arrays that the kernels access, each element once.
      again: bytes of these arrays that a GPU accesses again, where ragged rows overlap.
        A TPU has no cache to serve them, so there `tensors` includes them.
      rest: bytes of XLA's kernels that access arrays of x's size, which the plan leaves
        to XLA.
      statistics: bytes of mean and variance. BatchNorm and InstanceNorm include the
        parameters and their gradients, which have the same shapes.
      params: bytes of scale, bias and their gradients, every block's reads included.
      partials: bytes of intermediate results, written and read.
      around: opcode and bytes of each operation beside the kernels, in the order in
        which they run.
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
        """Bytes that cross the pins if the caches serve all repeated reads."""
        return self.tensors + self.rest + self.statistics + self.partials

    @property
    def ratio(self) -> float:
        """Ratio of `total` to `ideal`."""
        return self.total / self.ideal

    @property
    def in_two_reads(self) -> bool:
        """Whether the plan leaves a second read of x to XLA."""
        return self.plan.endswith(", two reads")

    @property
    def floor(self) -> float:
        """Least possible ratio.

        It is 1 in one read. Two reads add x once more, and in a backward also dy, or
        dz in its place.
        """
        if not self.in_two_reads:
            return 1.0
        tensor = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return 1 + (2 if self.op == "backward" else 1) * tensor / self.ideal

    @property
    def accessed(self) -> float:
        """Ratio of all bytes accessed, repeats included, to `ideal`."""
        return (self.total + self.again) / self.ideal

    @property
    def seconds_of_cycles(self) -> tuple[float, ...]:
        """Least compute time of each of a TPU's kernels."""
        assert self.clock is not None
        return tuple(cycles / (self.clock * 1e9) for cycles in self.cycles)

    @property
    def compute(self) -> float | None:
        """Ratio of a TPU's compute time to its DMA time; above 1 is compute bound."""
        if not self.cycles:
            return None
        return sum(self.seconds_of_cycles) / sum(self.seconds_of_bytes)

    @property
    def seconds(self) -> float | None:
        """Predicted time of a TPU's kernels: the longer of compute and DMA for each."""
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
    """Returns the normalization that a flax layer does, with flax's defaults.

    Args:
      layer: the flax class.
      shape: x's shape.
      dtype: dtype of x and y.
      reduction_axes: reduced axes of a LayerNorm or an RMSNorm, None for the last.
      feature_axes: axes of scale and bias, None for the last.
      num_groups: groups of a GroupNorm.
      activation: the activation that follows in the same call.
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
    """Returns a workload per op for one shape; `options` go to `norm_of`."""
    norm = norm_of(layer, shape, dtype, **options)
    return tuple(
        Workload(name, op, layer, norm, tuple(shape), dtype, residual, shortcut, own)
        for op in ops
    )


def of_case(case: Case, tensor_bytes: float = TENSOR_BYTES) -> tuple[Workload, ...]:
    """Returns the workloads of a benchmark case's norm, one per op."""
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
    """Returns what our `plan` chooses on the chip."""
    _, module = dispatch.KERNELS[chip.platform]
    return importlib.import_module(module).plan(call, target(chip))


def measure(chip: Chip, workload: Workload) -> Measurement:
    """Plans and compiles a workload, and counts its figures.

    Raises:
      LookupError: no kernel takes the workload.
    """
    answer = plan(chip, workload.call)
    if isinstance(answer, Fallback):
        raise LookupError(answer.reason)
    return measure_kernel(chip, workload, answer)


def measure_kernel(chip: Chip, workload: Workload, answer: Kernel) -> Measurement:
    """Compiles `answer` for the workload and counts its figures.

    Args:
      chip: the chip.
      workload: the work that the kernel does.
      answer: the kernel, chosen by our `plan` or not.

    Raises:
      ValueError: Mosaic GPU cannot compile for the chip.
    """
    if isinstance(chip, Gpu) and not chip.has_kernels:
        raise ValueError(
            f"{chip.name} has compute capability {chip.compute_capability}; Mosaic GPU "
            "compiles for 9.0 and newer, and aborts the process for older ones. Its "
            "plan is the reference."
        )
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
            for kernel in found  # one of two cores has half the device's bandwidth
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
    """Returns the order in which XLA lays out each array's axes, slowest first."""
    return [
        hlo.order_of_axes(compile_for(chip, lambda x: x + x, array).hlo)
        for array in arrays
    ]


def _sort(
    workload: Workload, found: Sequence[traffic.Traffic], *, cached: bool
) -> dict[str, int]:
    """Returns the bytes by kind of array, which sizes and order of operands tell.

    Args:
      workload: the work that the kernels do.
      found: the kernels' traffic.
      cached: whether a cache may serve repeated accesses.
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
    """Returns whether an operand holds one number per row or group.

    On a TPU its size is rounded up to whole tiles of up to 1024 elements.
    """
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
    """Other processes to work in: one per GPU architecture, and one for all TPUs.

    It is a context manager. Work that has not begun when it exits is cancelled.
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
        """Submits `function(chip, ...)` to the chip's process."""
        key = chip.arch if isinstance(chip, Gpu) else chip.platform
        if key not in self._pools:
            spawn = multiprocessing.get_context("spawn")
            self._pools[key] = ProcessPoolExecutor(1, mp_context=spawn)
        return self._pools[key].submit(function, chip, *args, **kwargs)
