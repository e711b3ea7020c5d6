"""What no change may make worse: a recorded baseline, and limits that stay.

    make aot              # fails where a figure grew by more than 2 %
    make aot-baseline     # records all figures anew, to be committed with its reason

The limits hold whatever is recorded: the floor and 10 %, no spills, and no matrices in
shared memory, for which an address may be misaligned.
"""

import json
from pathlib import Path

from bench.aot.measure import Measurement

# By chip; then by case, op and dtype; then by figure.
Baseline = dict[str, dict[str, dict[str, float]]]

PATH = Path(__file__).with_name("baseline.json")
GROWTH = 0.02
ABOVE_FLOOR = 0.10
# Of x, y, dy and dx: what a GPU's neighbouring blocks load of one line, from the cache.
# To read x a second time would be a third of them, or half.
AGAIN = 0.31


def load() -> Baseline:
    """What is recorded."""
    found: Baseline = json.loads(PATH.read_text())
    return found


def save(baseline: Baseline) -> None:
    """Records it, sorted, a line for each kernel."""
    chips = []
    for chip, recorded in sorted(baseline.items()):
        lines = [
            f"  {json.dumps(name)}: {json.dumps(values, sort_keys=True)}"
            for name, values in sorted(recorded.items())
        ]
        chips.append(f" {json.dumps(chip)}: {{\n" + ",\n".join(lines) + "\n }")
    PATH.write_text("{\n" + ",\n".join(chips) + "\n}\n")


def record(baseline: Baseline, found: Measurement) -> None:
    """Puts a kernel's figures into the baseline."""
    baseline.setdefault(found.chip, {})[_name(found)] = figures(found)


def figures(found: Measurement) -> dict[str, float]:
    """What is recorded of a kernel.

    Returns:
      bytes: of device memory, counting what is accessed twice twice, over those of x
        and y, or of x, dy and dx.
      spilled: of a GPU's thread, bytes.
      cycles: of a TPU's, over the whole grid: with other blocks, steps compare to
        nothing.
    """
    values: dict[str, float] = {"bytes": round(found.accessed, 4)}
    if found.spilled is not None:
        values["spilled"] = found.spilled
    if found.cycles:
        values["cycles"] = sum(found.cycles)
    return values


def grown(found: Measurement, baseline: Baseline) -> list[str]:
    """What grew by more than 2 %, in words."""
    recorded = baseline.get(found.chip, {}).get(_name(found))
    if recorded is None:
        return [f"{_name(found)} on {found.chip} is not recorded: make aot-baseline"]
    return [
        f"{name}: {value:.9g}, recorded {recorded.get(name, 0):.9g}"
        for name, value in figures(found).items()
        if value > (1 + GROWTH) * recorded.get(name, 0)
    ]


def beyond(found: Measurement) -> list[str]:
    """The limits that it breaks, in words."""
    broken = []
    # Statistics must be moved too: much, where a row has few features.
    moved = (found.total - found.statistics) / found.ideal
    if moved > (1 + ABOVE_FLOOR) * found.floor:
        broken.append(
            f"moves {moved:.3f} times the bytes of its tensors; the floor is "
            f"{found.floor:.3f}"
        )
    whole_lines = found.shape[-1] % 16 == 0
    if whole_lines and found.again > AGAIN * found.ideal:
        broken.append(f"accesses {found.again / found.ideal:.3f} of its tensors again")
    if found.spilled:
        broken.append(f"spills {found.spilled} bytes of a thread's registers")
    if found.matrices:
        broken.append(f"moves matrices in shared memory: {found.matrices} instructions")
    return broken


def _name(found: Measurement) -> str:
    return f"{found.case} {found.op} {found.dtype}"
