"""Compiled HLO: which kernels run, and the bytes of their operands and results.

A fusion counts as one kernel that reads each operand and writes each result once: a
lower bound of the bytes that it moves. How often our own kernels read is counted in
traffic.py.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

# Custom calls that are Pallas kernels.
OURS = ("mosaic_gpu_v2", "tpu_custom_call")

# Instructions that only name an existing array, or move nothing.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}

_SLICES = ("slice", "dynamic-slice")

_CHIP = re.compile(r"S\([1-9]\d*\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(
    r"(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<order>[\d,]*)(?::(?P<tiles>[^}]*))?\})?"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instruction that runs on the device.

    Attributes:
      name, opcode: the instruction's name and opcode.
      target: the target of a custom call, else "".
      nbytes: bytes of the operands and results in device memory (HBM).
      times: how often the instruction runs, where it is in a loop.
      loop: whether it is in a loop.
      prefetch: whether XLA copies an array onto the chip or off it here, apart from the
        kernel that works on it there. `nbytes` then counts the array's only crossing.
      arrays: bytes of the operands and results, on the chip or off it.
    """

    name: str
    opcode: str
    target: str
    nbytes: int
    times: int = 1
    loop: bool = False
    prefetch: bool = False
    arrays: int = 0

    @property
    def ours(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.target in OURS


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def kernels(hlo: str) -> list[Kernel]:
    """Returns the kernels that the module runs, loops and calls included."""
    computations = dict(_computations(hlo))
    return list(_run(computations, computations["ENTRY"], times=1, loop=False))


def total(found: list[Kernel]) -> int:
    """Returns the bytes of all the kernels, each as often as it runs."""
    return sum(kernel.nbytes * kernel.times for kernel in found)


def surroundings(hlo: str) -> list[Kernel]:
    """Returns the kernels that are not ours, except XLA's prefetches for ours."""
    return [one for one in kernels(hlo) if not (one.ours or one.prefetch)]


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


def collectives(hlo: str) -> list[tuple[str, int]]:
    """Returns the opcode and bytes of each collective operation.

    The bytes are those of the array where one device holds all of it: the operand of a
    reduce-scatter, the result of any other. An operation in a loop counts once.
    """
    found = []
    for _, body in _computations(hlo):
        types = {one.name: one.type for one in body}
        for one in body:
            opcode = one.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                whole = _result(one)
                if opcode == "reduce-scatter":
                    whole = " ".join(types[name] for name in one.operands)
                found.append((opcode, _all_bytes([whole])))
    return found


def _result(one: _Instruction) -> str:
    """Returns the type of an instruction's results.

    The type of an asynchronous start lists the operands too; they are left out.
    """
    # The type of an all-reduce-start is ((operands), results), or the results alone.
    if one.opcode == "all-reduce-start" and not one.type.startswith("(("):
        return one.type
    return _parts(one.type)[1] if one.opcode.endswith("-start") else one.type


def order_of_axes(hlo: str) -> tuple[int, ...]:
    """Returns the axes of the module's only argument, slowest-varying first."""
    entry = dict(_computations(hlo))["ENTRY"]
    (argument,) = [one for one in entry if one.opcode == "parameter"]
    array = _ARRAY.match(argument.type)
    assert array, argument
    axes = (array["order"] or "").split(",")
    return tuple(int(axis) for axis in reversed(axes) if axis)


def _run(
    computations: dict[str, list[_Instruction]],
    body: list[_Instruction],
    times: int,
    loop: bool,
) -> Iterator[Kernel]:
    types = {instruction.name: instruction.type for instruction in body}
    for one in body:
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            continue
        if one.opcode == "while":
            count = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', one.rest)
            trips = times * int(count[1] if count else 1)
            inner = computations[_called(one, "body")]
            yield from _run(computations, inner, trips, loop=True)
        elif one.opcode == "call":
            inner = computations[_called(one, "to_apply")]
            yield from _run(computations, inner, times, loop)
        elif one.opcode == "conditional":
            # Count the branch that moves the fewest bytes: others handle rare cases.
            branches = [
                list(_run(computations, computations[name], times, loop))
                for name in _branches(one)
            ]
            yield from min(branches, key=total)
        else:
            fused = one.opcode == "fusion"
            inside = computations[_called(one, "calls")] if fused else []
            one, where = _unwrapped(one, types, inside)
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            yield Kernel(
                name=one.name,
                opcode=one.opcode,
                target=target[1] if target else "",
                nbytes=_moved(one, where, inside),
                times=times,
                loop=loop,
                prefetch=one.opcode in ("copy-start", "slice-start")
                and _on_chip(_parts(one.type)[:2]),
                arrays=_all_bytes(where.get(name, "") for name in one.operands)
                + _all_bytes([one.type]),
            )


def _unwrapped(
    one: _Instruction, types: dict[str, str], inside: list[_Instruction]
) -> tuple[_Instruction, dict[str, str]]:
    """Replaces a custom fusion by the custom call inside it, if it has one.

    XLA wraps a custom call in a fusion to pass it slices by their address.

    Returns:
      The instruction, and the types of the instructions around it.
    """
    if "kind=kCustom" in one.rest:
        for each in inside:
            if each.opcode == "custom-call":
                return each, {other.name: other.type for other in inside}
    return one, types


def _called(instruction: _Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest)
    assert found, instruction
    return found[1]


def _branches(conditional: _Instruction) -> list[str]:
    """Returns the names of the computations that a conditional chooses from."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.rest):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_called(conditional, f"{side}_computation") for side in ("true", "false")]


def _moved(one: _Instruction, types: dict[str, str], inside: list[_Instruction]) -> int:
    operands = [hbm_bytes(types[name]) for name in one.operands if name in types]
    if one.opcode == "fusion":
        operands = [_used(inside, n, whole) for n, whole in enumerate(operands)]
    result = hbm_bytes(one.type)
    match one.opcode:
        case "dynamic-update-slice":  # in place: reads the update and writes it
            return 2 * operands[1]
        case _ if one.opcode in (*_SLICES, "gather"):
            return 2 * result
        case "copy-start":  # (target, source, context)
            return hbm_bytes(_parts(one.type)[0]) + hbm_bytes(_parts(one.type)[1])
        case "slice-start":  # ((source), target, context): reads as much as it writes
            _, target, *_ = _parts(one.type)
            return hbm_bytes(target) + hbm_bytes(re.sub(r"S\(\d+\)", "", target))
        case _ if one.opcode.endswith("-start"):  # ((operands), result, context)
            result = hbm_bytes(_parts(one.type)[1])
        case "custom-call" if "__cublas" in one.rest:
            result = hbm_bytes(_parts(one.type)[0])  # without the workspace
    return sum(operands) + result


def _used(inside: list[_Instruction], number: int, whole: int) -> int:
    """Returns the bytes that a fusion reads of its operand of this number.

    They are all of its bytes, `whole`, unless only slices of it are used.
    """
    parameter = next(
        one.name
        for one in inside
        if one.opcode == "parameter" and one.operands == (str(number),)
    )
    users = [one for one in inside if parameter in one.operands]
    if not users or any(one.opcode not in _SLICES for one in users):
        return whole
    return min(sum(hbm_bytes(one.type) for one in users), whole)


# --- types ----------------------------------------------------------------------------


def hbm_bytes(type_: str) -> int:
    """Returns the bytes of a type's arrays, without those on the chip.

    A TPU keeps arrays in tiles, for example T(8,128), so whole tiles are counted.
    """
    return sum(_array_bytes(array) for array in _ARRAY.finditer(type_))


def _on_chip(types: Sequence[str]) -> bool:
    """Returns whether one of the types lies in memory on the chip."""
    return any(_CHIP.search(type_) for type_ in types)


def _all_bytes(types: Iterable[str]) -> int:
    """Returns the bytes of all elements of the types' arrays, wherever they lie."""
    found = (array for type_ in types for array in _ARRAY.finditer(type_))
    return sum(int(math.prod(_shape(array)) * _itemsize(array)) for array in found)


def _itemsize(array: re.Match[str]) -> float:
    bits = _BITS.match(array["dtype"])
    return int(bits[1]) / 8 if bits else 1


def _shape(array: re.Match[str]) -> list[int]:
    return [int(size) for size in array["shape"].split(",") if size]


def _array_bytes(array: re.Match[str]) -> int:
    tiles = array["tiles"] or ""
    if _CHIP.search(tiles):
        return 0  # on the chip, or the context of an asynchronous operation
    shape = _shape(array)
    # Sizes in the order of memory, slowest-varying axis first.
    order = [int(axis) for axis in (array["order"] or "").split(",") if axis]
    sizes = [shape[axis] for axis in reversed(order)] if order else shape
    if tile := re.match(r"T\(([\d,]+)\)", tiles):
        lengths = [int(length) for length in tile[1].split(",")]
        for i, length in enumerate(reversed(lengths), start=1):
            if i <= len(sizes):
                sizes[-i] = -(-sizes[-i] // length) * length
    return int(math.prod(sizes) * _itemsize(array))


def _parts(type_: str) -> list[str]:
    """Returns the members of a tuple's type."""
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(type_):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(type_[start:i].strip())
            start = i + 1
    return parts or [type_]


# --- text -----------------------------------------------------------------------------


def _computations(hlo: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """Yields the name and instructions of each computation; the entry is "ENTRY"."""
    name, body = "", list[_Instruction]()
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name, body = "ENTRY" if head[1] else head[2], []
        elif line.startswith("}"):
            yield name, body
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            body.append(_instruction(found[1], line[found.end() :]))


def _instruction(name: str, text: str) -> _Instruction:
    """Parses "TYPE OPCODE(OPERANDS), REST"."""
    end = _close(text) if text.startswith("(") else text.index(" ")
    type_, text = text[:end], text[end:].lstrip()
    opcode = text[: text.index("(")]
    text = text[len(opcode) :]
    end = _close(text)
    operands = re.findall(r"%([\w.\-]+)", text[:end])
    if opcode == "parameter":  # its number
        operands = [text[1 : end - 1]]
    return _Instruction(name, type_, opcode, tuple(operands), text[end:])


def _close(text: str) -> int:
    """Returns the index after the bracket that closes the text's first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced: {text[:80]}")
