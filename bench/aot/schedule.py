"""Counts the cycles of a TPU kernel in the schedule that libtpu compiled it to.

    from bench.aot.chips import CHIPS
    from bench.aot.schedule import cycles_per_step

    cycles_per_step(CHIPS["v5e"], function, *shapes)  # {"rowwise_forward": 2911.3}

A TensorCore runs one bundle of a few instructions per cycle. libtpu writes a kernel's
bundles as text. This module reads "packed-bundles-post-ra", where the cycles in which
the schedule waits for a result appear as empty bundles. "final_bundles" lacks them,
because the hardware waits by itself: there a kernel that sums over lanes looks up to
40 % faster. An example:

    0x20   : > { %178 = sbr.rel (%p128_p12) target bundleno = 338 (0x152), region = 28 }
    0x21   : > { %s912_s6 = sshll.u32 (!%p128_p12), %s117_s10, 12  ;;  ... }

How often each bundle runs is not guessed from loops and regions. Instead, this module
executes the scalar instructions on which the branches depend, from the kernel's first
bundle to its last, over the whole grid. So a remainder, a `pl.when` and the first and
last steps count as often as they run. The cycles per step are the kernel's cycles
divided by the steps of its grid.

The model assumes that a bundle takes one cycle and that its operands are never late.
Waiting for a DMA is not counted. So the kernel takes at least these cycles, and at
least its bytes divided by the bandwidth. Where two cores share a kernel, the first core
is counted: it runs its part of a `parallel` grid axis, or all steps if there is none.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.aot import hlo, traffic
from bench.aot.chips import Chip, Tpu
from bench.aot.compile import Compiled, compile_for

# Bundles that still run after a taken branch.
DELAY_SLOTS = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "7x": 6}


class Unreadable(Exception):
    """A schedule that this module does not understand."""


def cycles_per_step(
    chip: Tpu, function: Callable[..., Any], *args: Any
) -> dict[str, float]:
    """Returns the cycles per grid step and core of each Pallas kernel of a function.

    Args:
      chip: the chip to compile for.
      function: the function, jitted or not, which is traced with `args`.
      args: arrays or `jax.ShapeDtypeStruct`s, or None.

    Returns:
      Cycles by the kernel's name. A second kernel of the same name is "name.2".
    """
    found = traffic.kernels(function, *args)
    total = cycles(compile_for(chip, function, *args), [one.name for one in found])
    result: dict[str, float] = {}
    for one, count in zip(found, total, strict=True):
        taken = sum(name.split(".")[0] == one.name for name in result)
        name = f"{one.name}.{taken + 1}" if taken else one.name
        result[name] = count / (one.blocks // cores(chip, one))
    return result


def cores(chip: Chip, kernel: traffic.Traffic) -> int:
    """Returns how many cores share the kernel's grid: all of a TPU device, or one."""
    if isinstance(chip, Tpu) and kernel.parts >= chip.cores:
        return chip.cores
    return 1


def cycles(compiled: Compiled, names: Sequence[str]) -> list[int]:
    """Returns the cycles of each Pallas kernel of a function, over all steps of a core.

    Args:
      compiled: the function, compiled for a TPU.
      names: the kernels' names, in the order in which they run.
    """
    ours = [kernel.name for kernel in hlo.kernels(compiled.hlo) if kernel.ours]
    result = []
    for name in names:
        # XLA numbers them: "rowwise_forward.1".
        match = next((own for own in ours if own.split(".")[0] == name), None)
        if match is None or match not in compiled.schedules:
            raise Unreadable(
                f"no schedule of {name}; XLA has {ours}, libtpu wrote "
                f"{sorted(compiled.schedules)}"
            )
        ours.remove(match)
        slots = DELAY_SLOTS[compiled.chip.name]
        result.append(count(compiled.schedules[match], slots))
    return result


def count(schedule: str, delay_slots: int) -> int:
    """Returns the cycles of a kernel's schedule, from its first bundle to its last.

    Args:
      schedule: the schedule's text.
      delay_slots: bundles that run after a taken branch.

    Raises:
      Unreadable: a branch depends on data, or on an instruction that is not in
        `_OPERATIONS`.
    """
    bundles = list(_bundles(schedule))
    needed = _needed([each for bundle in bundles for each in bundle])
    bundles = [[each for each in bundle if each.result in needed] for bundle in bundles]
    busy = [i for i, bundle in enumerate(bundles) if bundle]
    following = _following(busy, len(bundles))
    machine = _Machine()
    total = at = 0
    target: int | None = None  # a taken branch's, while its delay slots run
    left = 0
    while at < len(bundles):
        if target is None:  # skip to the next bundle that does something
            total += following[at] - at
            at = following[at]
            if at == len(bundles):
                break
        taken = machine.run(bundles[at])
        at += 1
        total += 1
        if target is not None and taken is not None:
            raise Unreadable("a branch behind a branch")
        if target is not None:
            left -= 1
        elif taken is not None:
            target, left = taken, delay_slots
        if target is not None and left == 0:
            at, target = target, None
    return total


def _following(busy: Sequence[int], size: int) -> list[int]:
    """Returns, for each index, the first entry of `busy` at or after it, or `size`."""
    result = [size] * (size + 1)
    for i in busy:
        result[i] = i
    for i in reversed(range(size)):
        result[i] = min(result[i], result[i + 1])
    return result


# --- text -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One scalar instruction.

    Attributes:
      result: name of the value that it writes, as before register allocation, by which
        dependences are followed: "%s1193", "%p57", a spilled value's "[smem:...]", the
        queue "%3021" that takes a division's results, or "branch".
      register: the register that it writes, "s14" or "p0"; without one, the `result`.
      operation: the opcode, for example "sadd.s32".
      predicate: the predicate under which it runs, "p0" or "!p0", or "".
      operands: registers, numbers, or a branch's target.
      sources: names of the values in `operands` and `predicate`, in the form of
        `result`.
    """

    result: str
    register: str
    operation: str
    predicate: str
    operands: tuple[Any, ...]
    sources: frozenset[str]


_BUNDLE = re.compile(r"^ *(?:0x[\da-f]+|0) +(?:[A-Z]{2})? *: *>* *\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_ASSIGNMENT = re.compile(r"%([sp]\d+)_([sp]\d+) = ([\w.]+) ?(.*)", re.DOTALL)
_SPILL = re.compile(r"%\d+ = sst (\[smem:\[#allocation\w+_spill\]\]) (.*)")
_DIVISION = re.compile(r"(%\d+) = (sdivrem\.\w+) (.*)")
_BRANCH = re.compile(r"%\d+ = (s(?:br|call)[\w.]*) (?:\((!?)%(\w+)\) )?(.*)")
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, %?(\w+))?\),? *")
_OPERAND = re.compile(r"\[smem:\[#allocation\w+_spill\]\]|!?%\w+|\d+|[^\s,]+")


def _bundles(schedule: str) -> Iterator[list[_Instruction]]:
    """Yields the scalar instructions of each bundle."""
    starts = [found.end() for found in _BUNDLE.finditer(schedule)]
    for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True):
        text = schedule[start:end]
        # Only the comment shows that a load gives the id of the core, where two cores
        # share a kernel. Make it core 0.
        text = re.sub(r"= sld [^;]*?/\* [^*]*core id.*?\*/", "= smov 0", text)
        # Only the comment shows which results of a division are wanted. Make them part
        # of the opcode.
        text = re.sub(r"sdivrem\.u32 ([^;]*?) /\* k(\w+) \*/", r"sdivrem.\2 \1", text)
        text = _COMMENT.sub("", text).partition("}")[0]
        parts = (part.strip() for part in text.split(";;"))
        yield [found for part in parts if (found := _instruction(part))]


def _instruction(text: str) -> _Instruction | None:
    if found := _BRANCH.match(text):
        operation, no, predicate, rest = found.groups()
        target = re.search(r"target bundleno = (\d+)", rest)
        if operation != "sbr.rel" or not target:
            raise Unreadable(text)
        return _make("branch", "branch", operation, no, predicate, [int(target[1])])
    if found := _SPILL.match(text):
        place, rest = found.groups()
        return _make(place, place, "smov", "", None, _OPERAND.findall(rest))
    if found := _DIVISION.match(text):
        queue, operation, rest = found.groups()
        return _make(queue, queue, operation, "", None, _OPERAND.findall(rest))
    if not (found := _ASSIGNMENT.match(text)):
        return None
    name, register, operation, rest = found.groups()
    if operation == "sphi" or (operation.startswith("int_to_ptr") and register in rest):
        # The sources are in the instruction's own register already.
        operation, operands = "sphi", _OPERAND.findall(rest)
        return _make(name, register, operation, "", None, operands)
    no, predicate, otherwise = "", None, None
    if prefix := _PREDICATE.match(rest):
        no, predicate, otherwise = prefix.groups()
        rest = rest[prefix.end() :]
    operands = _OPERAND.findall(rest)
    if otherwise:  # the value where the predicate does not hold
        return _make(
            name,
            register,
            "scalar_select",
            "",
            None,
            [f"{no}%{predicate}", *operands, f"%{otherwise}"],
        )
    return _make(name, register, operation, no, predicate, operands)


def _make(
    name: str,
    register: str,
    operation: str,
    no: str,
    predicate: str | None,
    operands: Sequence[Any],
) -> _Instruction:
    if predicate:
        operands = [*operands, f"{no}%{predicate}"]
    sources, read = set(), list[Any]()
    for operand in operands:
        if isinstance(operand, int):
            read.append(operand)
        elif operand.isdecimal():
            read.append(int(operand))
        elif found := re.fullmatch(r"(!?)%([sp]\d+)_([sp]\d+)", operand):
            sources.add(found[2])
            read.append(found[1] + found[3])
        elif operand.endswith("_spill]]") or re.fullmatch(r"%\d+", operand):
            sources.add(operand)
            read.append(operand)
        else:
            read.append(None)  # an address
    condition = read.pop() if predicate else ""
    return _Instruction(
        name, register, operation, condition, tuple(read), frozenset(sources)
    )


def _needed(instructions: Sequence[_Instruction]) -> set[str]:
    """Returns the names of the values that the branches depend on."""
    writers: dict[str, list[_Instruction]] = {}
    for each in instructions:
        writers.setdefault(each.result, []).append(each)
    needed, new = set[str](), ["branch"]
    while new:
        name = new.pop()
        if name not in needed:
            needed.add(name)
            new += [source for each in writers.get(name, ()) for source in each.sources]
    return needed


# --- scalars --------------------------------------------------------------------------


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _unsigned(value: int) -> int:
    return value & 0xFFFFFFFF


def _either(*values: bool | None) -> bool | None:
    """Returns the logical or; operands may be unknown (None)."""
    if any(values):
        return True
    return None if None in values else False


def _both(*values: bool | None) -> bool | None:
    return _not(_either(*map(_not, values)))


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


# Operations on numbers, all known.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "smov": lambda a: a,
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smulhi.u32": lambda a, b: _unsigned(a) * _unsigned(b) >> 32,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: a << b if b < 32 else 0,
    "sshrl.u32": lambda a, b: _unsigned(a) >> b,
    "sshra.s32": operator.rshift,
    "smin.u32": lambda a, b: min(_unsigned(a), _unsigned(b)),
    "smax.u32": lambda a, b: max(_unsigned(a), _unsigned(b)),
}
_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
# Operations on predicates, some of them possibly unknown.
_LOGIC: dict[str, Callable[..., bool | None]] = {
    "pmov": lambda a: a,
    "pneg": _not,
    "por": _either,
    "pand": _both,
    "pnor": lambda *values: _not(_either(*values)),
    "pnand": lambda *values: _not(_both(*values)),
}


class _Machine:
    """Values of scalar registers, predicates and their spills; None is unknown."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def run(self, bundle: Sequence[_Instruction]) -> int | None:
        """Runs a bundle, and returns the target of a taken branch, or None."""
        target = None
        written = []  # all instructions of a bundle read before any writes
        for each in bundle:
            if each.operation == "sphi":
                continue
            runs = self._read(each.predicate) if each.predicate else True
            if each.operation == "sbr.rel":
                if runs is None:
                    raise Unreadable(f"a branch on an unknown {each.predicate}: {each}")
                if runs:
                    (target,) = each.operands
            elif runs is None:
                written.append((each.register, None))
            elif runs:
                written.append((each.register, self._evaluate(each)))
        self._values.update(written)
        return target

    def _read(self, operand: Any) -> Any:
        if not isinstance(operand, str):
            return operand
        if operand.startswith("!"):
            return _not(self._values.get(operand[1:]))
        return self._values.get(operand)

    def _evaluate(self, each: _Instruction) -> Any:
        values = [self._read(operand) for operand in each.operands]
        operation = each.operation
        if operation in _LOGIC:
            return _LOGIC[operation](*values)
        if operation == "scalar_select":
            which, yes, no = values
            if which is None:
                return yes if yes == no else None
            return yes if which else no
        if operation == "sld":  # loads a spilled value
            return values[0]
        if operation == "spop.drf":  # takes the next result of a division
            return values[0].pop(0)
        if operation.startswith("sdivrem."):
            if None in values:
                return [None, None]
            quotient, rest = divmod(_unsigned(values[0]), _unsigned(values[1]))
            results = {"Div": quotient, "Rem": rest}
            return [results[name] for name in operation[8:].split("And")]
        if None in values:
            return None
        if operation.startswith("scmp."):
            _, relation, kind, *_ = operation.split(".")
            form = _signed if kind == "s32" else _unsigned
            return _COMPARISONS[relation](*map(form, values))
        if operation == "sc.u32":  # whether the sum has a carry
            return _unsigned(values[0]) + _unsigned(values[1]) >= 2**32
        if operation in _OPERATIONS:
            return _signed(_OPERATIONS[operation](*map(_signed, values)))
        return None
