"""Counts the bytes that a Pallas kernel moves between the chip and its memory (HBM).

HLO shows which arrays a kernel gets, but not how often it reads them. The kernel's
jaxpr shows that:

    Mosaic GPU    Counts each load, store and copy that names device memory (GMEM),
                  inside its loops and conditions. The kernel's integers (block indices,
                  loop counters, offsets) are computed as NumPy arrays for all blocks
                  and all Pallas threads at once; arrays of the kernel stay unknown. So
                  `pl.when(last block)`, loops whose length depends on the block, and
                  remainders are exact, not sampled.
    Mosaic TPU    Counts a block each time a BlockSpec's index map changes from one grid
                  step to the next, without the part of the block that lies outside the
                  array.

Anything that cannot be counted raises `Uncountable`: an unknown primitive that takes
device memory, or an offset that depends on data. So does a GPU's access outside of its
array, which neither compiler nor chip would notice.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bench.aot.walk import ON_CHIP, UNKNOWN, Memory, Operand, Uncountable, Walk


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kernel's memory traffic.

    Attributes:
      name: the kernel's name.
      operands: its arrays, inputs before outputs.
      blocks: thread blocks of a GPU, grid steps of a TPU.
      parts: parts of the grid that a TPU's cores may share. 1 for a GPU.
      threads: CUDA threads per block; 0 for a TPU.
      scratch: bytes on the chip: shared memory per block of a GPU, VMEM per core of a
        TPU.
      in_flight: bytes of the largest arrays that a GPU's block loads without waiting:
        the maximum between two barriers, or in one iteration of a loop. 0 for a TPU.
    """

    name: str
    operands: tuple[Operand, ...]
    blocks: int
    parts: int
    threads: int
    scratch: int
    in_flight: int

    @property
    def loaded(self) -> int:
        """Bytes loaded, repeated loads included."""
        return sum(operand.loaded for operand in self.operands)

    @property
    def stored(self) -> int:
        """Bytes stored, repeated stores included."""
        return sum(operand.stored for operand in self.operands)

    @property
    def distinct(self) -> int:
        """Bytes moved if caches serve all repeated accesses."""
        return sum(
            operand.distinct_loaded + operand.distinct_stored
            for operand in self.operands
        )


def kernels(function: Callable[..., Any], *args: Any) -> list[Traffic]:
    """Returns the traffic of each kernel that `function` launches.

    Args:
      function: the function, which is traced, not run. A kernel in an outer loop counts
        once.
      args: arrays or `jax.ShapeDtypeStruct`s, or None.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [_KERNELS[eqn.primitive.name](eqn) for eqn in _launches(jaxpr)]


def _launches(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _KERNELS:
            yield eqn
        else:
            for inner in _inner_jaxprs(eqn):
                yield from _launches(inner)


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # a ClosedJaxpr
            if hasattr(part, "eqns"):
                yield part


def _place(i: int, inputs: int) -> str:
    return f"in {i}" if i < inputs else f"out {i - inputs}"


# --- Mosaic GPU -----------------------------------------------------------------------


def _gpu_kernel(eqn: Any) -> Traffic:
    (mesh,), (jaxpr,) = eqn.params["meshes"], eqn.params["jaxprs"]
    names = (*(mesh.grid_names or ()), *(mesh.cluster_names or ()))
    sizes = (*(mesh.grid or ()), *(mesh.cluster or ()))
    blocks = math.prod(sizes)
    if mesh.num_threads is not None:
        names, sizes = (*names, mesh.thread_name), (*sizes, mesh.num_threads)
    lanes = np.indices(sizes).reshape(len(sizes), math.prod(sizes))
    memories = [
        Memory(_place(i, len(eqn.invars)), ref.aval)
        for i, ref in enumerate(jaxpr.invars)
    ]
    Walk(dict(zip(names, lanes, strict=True)), lanes.shape[1]).run(jaxpr, memories)
    return Traffic(
        name=eqn.params["name"],
        operands=tuple(memory.operand() for memory in memories),
        blocks=blocks,
        parts=1,
        threads=128 * (mesh.num_threads or 1),
        scratch=_shared_memory(jaxpr, eqn.params["compiler_params"]),
        in_flight=(mesh.num_threads or 1) * _in_flight(jaxpr),
    )


def _in_flight(jaxpr: Any) -> int:
    """Returns the most bytes that a Pallas thread loads without a wait in between.

    Only the largest arrays count: the others are small, and come from a cache.
    """
    largest = max(math.prod(ref.aval.shape) for ref in jaxpr.invars)
    most = here = 0
    for nbytes in _loads(jaxpr, largest):
        here = here + nbytes if nbytes else 0
        most = max(most, here)
    return most


def _loads(jaxpr: Any, size: int) -> Iterator[int]:
    """Yields the bytes of each load from an array of `size` elements, 0 for a wait."""
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(_inner_jaxprs(eqn))
        if name == "cond":  # the branch that loads most
            yield from max((list(_loads(each, size)) for each in inner), key=sum)
        elif name in ("while", "scan"):
            for body in inner:
                yield 0
                yield from _loads(body, size)
            yield 0
        elif inner:
            for body in inner:
                yield from _loads(body, size)
        elif name == "barrier_wait" or name.startswith("wait_"):
            yield 0
        elif name in _LOADS:
            source, *_ = eqn.invars
            if not _in_shared(source) and math.prod(source.aval.shape) == size:
                loaded = (*eqn.outvars, *eqn.invars)[_LOADS[name]].aval
                yield math.prod(loaded.shape) * loaded.dtype.itemsize


# Index, among a load's results followed by its operands, of one with the loaded size.
_LOADS = {"get": 0, "load": 0, "copy_gmem_to_smem": 1}


def _in_shared(ref: Any) -> bool:
    return str(getattr(ref.aval, "memory_space", "")) == "smem"


def _shared_memory(jaxpr: Any, params: Any) -> int:
    """Returns the peak of live scratch bytes, which Mosaic allocates at launch."""
    found = 0
    for eqn in jaxpr.eqns:
        here = max((_shared_memory(j, params) for j in _inner_jaxprs(eqn)), default=0)
        if eqn.primitive.name == "run_scoped":
            here += sum(_shared_bytes(v.aval) for v in eqn.params["jaxpr"].invars)
        elif eqn.primitive.name.startswith("reduce_"):
            here = _whole_kilobytes(getattr(params, "reduction_scratch_bytes", 0))
        found = max(found, here)
    return found


def _shared_bytes(aval: Any) -> int:
    if str(aval.memory_space) != "smem":
        return 0
    if not isinstance(aval.dtype, np.dtype):
        return 8 * math.prod(aval.shape)  # barriers
    return _whole_kilobytes(math.prod(aval.shape) * aval.dtype.itemsize)


def _whole_kilobytes(nbytes: int) -> int:
    return -(-nbytes // 1024) * 1024


# --- Mosaic TPU -----------------------------------------------------------------------


def _tpu_kernel(eqn: Any) -> Traffic:
    mapping = eqn.params["grid_mapping"]
    grid = tuple(mapping.grid)
    steps = math.prod(grid)
    # In the order in which the grid runs: the last axis varies fastest.
    lanes = list(np.indices(grid).reshape(len(grid), steps))
    refs = eqn.params["jaxpr"].invars[mapping.num_index_operands :]
    memories = []
    for i, block in enumerate(mapping.block_mappings):
        memory = Memory(_place(i, mapping.num_inputs), block.array_aval)
        memories.append(memory)
        if not _in_hbm(refs[i].aval):
            kind = "load" if i < mapping.num_inputs else "store"
            _move_blocks(memory, block, kind, lanes, steps)
    if any(_in_hbm(ref.aval) for ref in refs):  # the kernel copies by itself
        args = [
            memory if _in_hbm(ref.aval) else ON_CHIP
            for ref, memory in itertools.zip_longest(refs, memories)
        ]
        indices = [ON_CHIP] * mapping.num_index_operands
        walk = Walk(dict(enumerate(lanes)), steps)
        walk.run(eqn.params["jaxpr"], [*indices, *args])
    return Traffic(
        name=_tpu_name(eqn.params),
        operands=tuple(memory.operand() for memory in memories),
        blocks=steps,
        parts=_parts(eqn.params["compiler_params"], grid),
        threads=0,
        scratch=_vmem(mapping, refs),
        in_flight=0,
    )


def _tpu_name(params: Any) -> str:
    info = params.get("name_and_src_info")
    return str(params.get("name") or getattr(info, "name", ""))


def _parts(params: Any, grid: Sequence[int]) -> int:
    semantics = getattr(params, "dimension_semantics", None) or ()
    pairs = zip(grid, semantics, strict=bool(semantics))
    return math.prod(size for size, kind in pairs if str(kind) == "parallel")


def _in_hbm(ref: Any) -> bool:
    return str(ref.memory_space).lower() in ("any", "hbm")


def _move_blocks(
    memory: Memory, block: Any, kind: str, lanes: Sequence[Any], steps: int
) -> None:
    """Counts a block at the first step, and at each step where the block changes."""
    jaxpr = block.index_map_jaxpr
    args = [*lanes, *[UNKNOWN] * (len(jaxpr.in_avals) - len(lanes))]
    indices = Walk({}, steps).run(jaxpr, args)
    if any(index is UNKNOWN for index in indices):
        raise Uncountable("an index map depends on data")
    first, sizes = [], []
    for index, axis in zip(indices, block.block_shape, strict=True):
        size = getattr(axis, "block_size", axis if isinstance(axis, int) else 1)
        first.append(index if type(axis).__name__ == "Element" else index * size)
        sizes.append(size)
    starts = np.stack([np.broadcast_to(start, steps) for start in first], axis=1)
    moves = np.ones(steps, bool)
    moves[1:] = (starts[1:] != starts[:-1]).any(axis=1)
    memory.access_inside(kind, starts[moves], np.array(sizes))


def _vmem(mapping: Any, refs: Sequence[Any]) -> int:
    """Returns the VMEM bytes of the blocks and the scratch.

    A block has two buffers, unless it says otherwise: the kernel works on one while the
    other is copied.
    """
    found = 0
    blocks = [*mapping.block_mappings, *[None] * len(refs)]
    for ref, block in zip(refs, blocks, strict=False):
        if _in_hbm(ref.aval) or not isinstance(ref.aval.dtype, np.dtype):
            continue  # not on the chip, or a semaphore
        mode = getattr(block, "pipeline_mode", None)
        buffers = 1 if block is None else getattr(mode, "buffer_count", None) or 2
        found += buffers * _tiled_bytes(ref.aval.shape, ref.aval.dtype)
    return found


def _tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Returns an array's bytes in a TPU's tiles of 8 (for 16-bit dtypes, 16) by 128."""
    *lead, rows, columns = (1, 1, *shape)
    packed = 8 * max(1, 4 // dtype.itemsize)
    rows, columns = -(-rows // packed) * packed, -(-columns // 128) * 128
    return math.prod(lead) * rows * columns * dtype.itemsize


_KERNELS: dict[str, Callable[[Any], Traffic]] = {
    "mpmd_map": _gpu_kernel,
    "pallas_call": _tpu_kernel,
}
