"""Figures that no change may make worse: a recorded baseline, and fixed limits.

    make aot              # fails where a figure grew by more than 2 %
    make aot-baseline     # records all figures anew, to be committed with its reason

The limits hold whatever is recorded: bytes at most 10 % above the floor, repeated
accesses at most `AGAIN`, no spills, and no matrix instructions on shared memory, since
their addresses may be misaligned.
"""

import json
from pathlib import Path

from bench.aot.measure import Measurement

# Figures by chip; then by case, op and dtype; then by the figure's name.
Baseline = dict[str, dict[str, dict[str, float]]]

PATH = Path(__file__).with_name("baseline.json")
GROWTH = 0.02
ABOVE_FLOOR = 0.10
# Largest share of the bytes of x, y, dy and dx that may be accessed again: adjacent
# blocks of a GPU load parts of one line, the second time from the cache. A second read
# of x would be a third or a half of these bytes.
AGAIN = 0.31


def load() -> Baseline:
    """Loads the recorded baseline."""
    found: Baseline = json.loads(PATH.read_text())
    return found


def save(baseline: Baseline) -> None:
    """Saves the baseline, sorted, with one line per kernel."""
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
    """Returns the figures of a kernel that are recorded.

    Returns:
      bytes: ratio of the bytes of device memory accessed, repeats included, to the
        bytes of x and y, or of x, dy and dx.
      spilled: bytes spilled per thread of a GPU.
      cycles: cycles of a TPU over the whole grid. Cycles per step would not be
        comparable between block sizes.
    """
    values: dict[str, float] = {"bytes": round(found.accessed, 4)}
    if found.spilled is not None:
        values["spilled"] = found.spilled
    if found.cycles:
        values["cycles"] = sum(found.cycles)
    return values


def grown(found: Measurement, baseline: Baseline) -> list[str]:
    """Returns a message for each figure that grew by more than 2 %."""
    recorded = baseline.get(found.chip, {}).get(_name(found))
    if recorded is None:
        return [f"{_name(found)} on {found.chip} is not recorded: make aot-baseline"]
    return [
        f"{name}: {value:.9g}, recorded {recorded.get(name, 0):.9g}"
        for name, value in figures(found).items()
        if value > (1 + GROWTH) * recorded.get(name, 0)
    ]


def beyond(found: Measurement) -> list[str]:
    """Returns a message for each limit that the kernel breaks."""
    broken = []
    # The statistics are left out: they must be moved too, and are a large part of the
    # bytes where a row has few features.
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
