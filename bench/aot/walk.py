"""Runs a kernel's jaxpr for all blocks at once, to find the device memory it accesses.

The kernel's integers (block indices, loop counters, offsets) are computed as NumPy
arrays for all lanes at once; arrays of the kernel stay unknown. So conditions, loops
whose length depends on the block, and remainders are exact, not sampled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

# An integer or a bool: one for all lanes, or one per lane.
Number = int | np.ndarray[Any, Any]
# The accessed part of an axis: its first index, and its size.
Span = tuple[Number, int]


class Uncountable(Exception):
    """Raised when the kernel does something whose bytes cannot be counted."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Traffic of one of a kernel's arrays.

    Attributes:
      name: "in 0" or "out 1", by the array's place in the call.
      shape, dtype: shape and dtype of the array.
      loaded, stored: bytes accessed, repeats included.
      distinct_loaded, distinct_stored: bytes accessed at least once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    loaded: int
    stored: int
    distinct_loaded: int
    distinct_stored: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


# --- an array in device memory --------------------------------------------------------


class Memory:
    """One array in device memory, and the accesses to it so far."""

    def __init__(self, name: str, aval: Any):
        self.name = name
        self.shape = tuple(aval.shape)
        self.dtype = np.dtype(aval.dtype)
        self._counts = {"load": 0, "store": 0}
        # Accessed boxes: (first index, last index + 1) for each axis.
        self._boxes: dict[str, list[np.ndarray[Any, Any]]] = {"load": [], "store": []}

    def access(self, kind: str, spans: Sequence[Span], active: Any) -> None:
        """Counts one access of every active lane.

        Args:
          kind: "load" or "store".
          spans: the span of each axis.
          active: a bool per lane.
        """
        lanes = int(np.count_nonzero(active))
        if lanes == 0 or any(size == 0 for _, size in spans):
            return
        first = np.empty((lanes, len(spans)), np.int64)
        for axis, (start, _) in enumerate(spans):
            first[:, axis] = start if np.ndim(start) == 0 else np.asarray(start)[active]
        if all(np.ndim(start) == 0 for start, _ in spans):
            first = first[:1]  # all lanes access the same box
        last = first + [size for _, size in spans]
        if (first < 0).any() or (last > self.shape).any():
            raise Uncountable(
                f"{kind} of {self.name}, of shape {self.shape}, reaches from "
                f"{tuple(first.min(0).tolist())} to {tuple(last.max(0).tolist())}"
            )
        self._counts[kind] += lanes * math.prod(size for _, size in spans)
        self._boxes[kind].append(np.stack([first, last], axis=-1))

    def access_inside(self, kind: str, first: Any, sizes: Any) -> None:
        """Counts accesses, without the parts that lie outside the array.

        Args:
          kind: "load" or "store".
          first: first indices, shape (accesses, axes).
          sizes: accessed size of each axis.
        """
        last = np.minimum(first + sizes, self.shape)
        self._counts[kind] += int(np.maximum(last - first, 0).prod(axis=1).sum())
        self._boxes[kind].append(np.stack([first, last], axis=-1))

    def operand(self) -> Operand:
        """Returns the traffic of all accesses so far."""
        itemsize = self.dtype.itemsize
        distinct = {
            kind: itemsize * volume(np.concatenate(boxes)) if boxes else 0
            for kind, boxes in self._boxes.items()
        }
        return Operand(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            loaded=itemsize * self._counts["load"],
            stored=itemsize * self._counts["store"],
            distinct_loaded=distinct["load"],
            distinct_stored=distinct["store"],
        )


def volume(boxes: np.ndarray[Any, Any]) -> int:
    """Returns the number of elements in the union of boxes, shape (boxes, axes, 2).

    The edges of the boxes cut the array into cells. Each cell lies wholly inside or
    wholly outside of each box. The number of boxes that cover a cell is a prefix sum of
    +1 and -1 at the boxes' corners.
    """
    _, axes, _ = boxes.shape
    if axes == 0:
        return 1
    edges = [np.unique(boxes[:, axis]) for axis in range(axes)]
    if math.prod(len(edge) for edge in edges) > 2e8:
        raise Uncountable("too many overlapping blocks to count distinct bytes")
    cover = np.zeros([len(edge) for edge in edges], np.int32)
    corners = [np.searchsorted(edges[axis], boxes[:, axis]) for axis in range(axes)]
    for corner in itertools.product((0, 1), repeat=axes):
        at = tuple(corners[axis][:, side] for axis, side in enumerate(corner))
        np.add.at(cover, at, (-1) ** sum(corner))
    for axis in range(axes):
        np.cumsum(cover, axis=axis, out=cover)
    inside = (cover > 0).astype(np.int64)
    for edge in reversed(edges):
        inside = inside[..., :-1] @ np.diff(edge)
    return int(inside)


# --- walking through a kernel ---------------------------------------------------------

UNKNOWN = object()  # an array of the kernel, or a float
ON_CHIP = object()  # a ref to memory that is not counted


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Hides a number from the checks in jax's indexers."""

    value: Any


class Walk:
    """Computes a kernel's integers for all lanes at once, and counts its accesses.

    A lane is one Pallas thread of one block of a GPU, or one step of a TPU's grid.
    """

    def __init__(self, axes: dict[Any, Number], lanes: int):
        self._axes = axes
        self._lanes = lanes

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Runs the jaxpr with all lanes active."""
        return self._run(jaxpr, (), args, np.ones(self._lanes, bool))

    def _run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], active: Any
    ) -> list[Any]:
        consts = consts or getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # a ClosedJaxpr
        values: dict[Any, Any] = {}

        def read(var: Any) -> Any:
            if isinstance(var, core.Literal):
                return _number(var.val)
            return values[var]

        for var, value in zip(
            (*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True
        ):
            values[var] = value
        with np.errstate(all="ignore"):  # lanes that are not active hold anything
            for eqn in jaxpr.eqns:
                results = self._evaluate(eqn, [read(v) for v in eqn.invars], active)
                values.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _evaluate(self, eqn: Any, args: list[Any], active: Any) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        unknown = [UNKNOWN] * len(eqn.outvars)
        match name:
            case "axis_index":
                return [self._axes[params["axis_name"]]]
            case "program_id":
                return [self._axes[params["axis"]]]
            case "cond":
                return self._cond(params["branches"], args, active)
            case "while":
                return self._while(params, args, active)
            case "scan":
                return self._scan(params, args, active)
            case "run_scoped":
                scratch = [ON_CHIP] * len(params["jaxpr"].invars)
                return self._run(params["jaxpr"], args, scratch, active)
            case "jit" | "pjit" | "closed_call" | "core_call" | "custom_jvp_call":
                inner = params.get("jaxpr", params.get("call_jaxpr"))
                return self._run(inner, (), args, active)
        if any(isinstance(arg, Memory) for arg in args):
            if name not in _ACCESSES:
                raise Uncountable(f"the primitive {name} takes device memory")
            _ACCESSES[name](params, args, active)
            return unknown
        scalar = all(var.aval.shape == () for var in eqn.outvars)
        if name in _INTEGERS and scalar and all(arg is not UNKNOWN for arg in args):
            return [_INTEGERS[name](eqn, *args)]
        return unknown

    def _cond(self, branches: Any, args: list[Any], active: Any) -> list[Any]:
        index, *args = args
        if index is UNKNOWN:
            raise Uncountable("a condition depends on data")
        index = np.clip(index, 0, len(branches) - 1)
        results: list[Any] | None = None
        for i, branch in enumerate(branches):
            here = active & (index == i)
            if here.any():
                found = self._run(branch, (), args, here)
                results = found if results is None else _merge(here, found, results)
        assert results is not None
        return results

    def _while(self, params: Any, args: list[Any], active: Any) -> list[Any]:
        cut = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        cond_consts, body_consts = args[: cut[0]], args[cut[0] : cut[1]]
        carry = args[cut[1] :]
        while True:
            args = [*cond_consts, *carry]
            (going,) = self._run(params["cond_jaxpr"], (), args, active)
            if going is UNKNOWN:
                raise Uncountable("the length of a loop depends on data")
            active = active & going
            if not active.any():
                return carry
            args = [*body_consts, *carry]
            found = self._run(params["body_jaxpr"], (), args, active)
            carry = found if np.ndim(going) == 0 else _merge(active, found, carry)

    def _scan(self, params: Any, args: list[Any], active: Any) -> list[Any]:
        jaxpr = params["jaxpr"]
        carried = len(jaxpr.outvars if hasattr(jaxpr, "outvars") else jaxpr.out_avals)
        consts, carry = args[: len(args) - carried], args[len(args) - carried :]
        for _ in range(params["length"]):
            carry = self._run(jaxpr, (), [*consts, *carry], active)
        return carry


def _number(value: Any) -> Any:
    value = np.asarray(value)
    return value.item() if value.ndim == 0 and value.dtype.kind in "iub" else UNKNOWN


def _merge(where: Any, found: Sequence[Any], before: Sequence[Any]) -> list[Any]:
    """Selects `found` in the lanes of `where`, and `before` in the others."""
    return [
        new
        if new is old or new is UNKNOWN or old is UNKNOWN or _is_memory(new)
        else np.where(where, new, old)
        for new, old in zip(found, before, strict=True)
    ]


def _is_memory(value: Any) -> bool:
    return value is ON_CHIP or isinstance(value, Memory)


# --- integers -------------------------------------------------------------------------


def _divide(a: Any, b: Any) -> Any:
    """Divides integers and rounds toward 0, as XLA does."""
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _convert(eqn: Any, a: Any) -> Any:
    kind = np.dtype(eqn.params["new_dtype"]).kind
    if kind == "b":
        return np.asarray(a) != 0
    return np.asarray(a).astype(np.int64) if kind in "iu" else UNKNOWN


def _not(eqn: Any, a: Any) -> Any:
    (var,) = eqn.outvars
    return np.logical_not(a) if np.dtype(var.aval.dtype).kind == "b" else ~np.asarray(a)


def _select(eqn: Any, which: Any, *cases: Any) -> Any:
    return np.choose(np.asarray(which, np.int64), cases)


_INTEGERS: dict[str, Callable[..., Any]] = {
    "abs": lambda _, a: np.abs(a),
    "add": lambda _, a, b: a + b,
    "and": lambda _, a, b: a & b,
    "clamp": lambda _, low, a, high: np.clip(a, low, high),
    "convert_element_type": _convert,
    "div": lambda _, a, b: _divide(a, b),
    "eq": lambda _, a, b: np.equal(a, b),
    "ge": lambda _, a, b: np.greater_equal(a, b),
    "gt": lambda _, a, b: np.greater(a, b),
    "integer_pow": lambda eqn, a: a ** eqn.params["y"],
    "le": lambda _, a, b: np.less_equal(a, b),
    "lt": lambda _, a, b: np.less(a, b),
    "max": lambda _, a, b: np.maximum(a, b),
    "min": lambda _, a, b: np.minimum(a, b),
    "mul": lambda _, a, b: a * b,
    "multiple_of": lambda _, a: a,
    "ne": lambda _, a, b: np.not_equal(a, b),
    "neg": lambda _, a: -a,
    "not": _not,
    "or": lambda _, a, b: a | b,
    "rem": lambda _, a, b: a - _divide(a, b) * b,
    "select_n": _select,
    "shift_left": lambda _, a, b: a << b,
    "shift_right_arithmetic": lambda _, a, b: a >> b,
    "sign": lambda _, a: np.sign(a),
    "square": lambda _, a: a * a,
    "stop_gradient": lambda _, a: a,
    "sub": lambda _, a, b: a - b,
    "xor": lambda _, a, b: a ^ b,
}


# --- accesses -------------------------------------------------------------------------


def _leaves(tree: Any, flat: Sequence[Any]) -> Any:
    return tree.unflatten([_Leaf(value) for value in flat])


def _spans(memory: Memory, transforms: Sequence[Any]) -> list[Span]:
    """Returns the part of a ref's array that its transforms select."""
    spans: list[Span] = [(0, size) for size in memory.shape]
    kept = list(range(len(spans)))  # axes that no integer has indexed yet
    reshaped: tuple[int, ...] | None = None
    for transform in transforms:
        if type(transform).__name__ == "ReshapeTransform":
            reshaped = tuple(transform.shape)
            continue
        if not hasattr(transform, "indices"):
            raise Uncountable(f"{type(transform).__name__} of device memory")
        if reshaped is not None:
            if not _is_whole(transform.indices, reshaped):
                raise Uncountable("a part of reshaped device memory")
            continue
        left = []
        for axis, index in zip(kept, transform.indices, strict=True):
            start, _ = spans[axis]
            if hasattr(index, "start"):  # a slice
                if index.stride != 1:
                    raise Uncountable("a slice with a stride")
                spans[axis] = (start + _offset(index.start), _size(index.size))
                left.append(axis)
            else:
                spans[axis] = (start + _offset(index), 1)
        kept = left
    return spans


def _is_whole(indices: Sequence[Any], shape: Sequence[int]) -> bool:
    return all(
        hasattr(index, "start") and (index.start, index.size) == (0, size)
        for index, size in zip(indices, shape, strict=True)
    )


def _offset(index: Any) -> Number:
    value = index.value if isinstance(index, _Leaf) else _number(index)
    if value is UNKNOWN:
        raise Uncountable("an offset into device memory depends on data")
    return value


def _size(size: Any) -> int:
    if not isinstance(size, int):
        raise Uncountable("the size of a slice is not constant")
    return size


def _load(params: Any, args: list[Any], active: Any) -> None:
    memory, *flat = args
    memory.access("load", _spans(memory, _leaves(params["tree"], flat)), active)


def _store(params: Any, args: list[Any], active: Any) -> None:
    memory, _, *flat = args
    memory.access("store", _spans(memory, _leaves(params["tree"], flat)), active)


def _add(params: Any, args: list[Any], active: Any) -> None:
    _store(params, args, active)
    memory, _, *flat = args
    _load(params, [memory, *flat], active)


def _copy(kind: str, place: int) -> Callable[[Any, list[Any], Any], None]:
    """Returns a counter of asynchronous copies whose ref `place` is device memory."""
    side = "src" if place == 0 else "dst"

    def count(params: Any, args: list[Any], active: Any) -> None:
        if params.get("collective_axes"):
            raise Uncountable("a copy to several blocks of a cluster")
        if params.get("has_user_predicate"):
            *args, predicate = args
            if predicate is UNKNOWN:
                raise Uncountable("whether a copy runs depends on data")
            active = active & np.asarray(predicate, bool)
        memory = args[place]
        flat = args[3 if params.get("has_barrier") else 2 :]
        sources = params["src_transforms_treedef"].num_leaves
        flat = flat[:sources] if place == 0 else flat[sources:]
        tree = params[f"{side}_transforms_treedef"]
        transforms = _leaves(tree, flat[: tree.num_leaves])
        memory.access(kind, _spans(memory, transforms), active)

    return count


def _dma(params: Any, args: list[Any], active: Any) -> None:
    source, target, *_ = _leaves(params["tree"], args)
    for kind, ref in (("load", source), ("store", target)):
        memory = getattr(ref, "ref", ref).value
        if isinstance(memory, Memory):
            transforms = getattr(ref, "transforms", ())
            memory.access(kind, _spans(memory, transforms), active)


_ACCESSES: dict[str, Callable[[Any, list[Any], Any], None]] = {
    "get": _load,
    "load": _load,
    # No kernel uses the old value that a swap returns, so it is not loaded.
    "swap": _store,
    "store": _store,
    "addupdate": _add,
    "copy_gmem_to_smem": _copy("load", 0),
    "copy_smem_to_gmem": _copy("store", 1),
    # A prefetch to the L2 is not counted: the load that then finds the data there is.
    "async_prefetch": lambda params, args, active: None,
    "dma_start": _dma,
    "dma_wait": lambda params, args, active: None,
}
