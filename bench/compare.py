"""python -m bench compare: shows what moved beyond noise from one run to another."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench import terminal

# A ratio that changed by less than this has not moved, however quiet both runs were.
LEAST = 0.02
# Two runs whose copy rates differ by no more had the same memory, at the same clock.
SAME_COPY = 0.02

Record = dict[str, Any]


class NotARunError(ValueError):
    """The file holds no times of `python -m bench`."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Identity of what was timed, the same in every run.

    Attributes:
      name: the case, or the model and what was done to it.
      dtype, which: its dtype and pass.
      size: shape of a case; or size, batch and attention of a model.
    """

    name: str
    dtype: str
    which: str
    size: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.which} ({self.size})"


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of fusednorm and flax in one run: quantiles by name, in seconds.

    Attributes:
      flax, fusednorm: "p10", "p50" and "p90" of each.
      copy_rate: bytes per second of the copy timed beside them, or None.
    """

    flax: dict[str, float]
    fusednorm: dict[str, float]
    copy_rate: float | None = None

    @property
    def ratio(self) -> float:
        """fusednorm's time over flax's, using first deciles."""
        return self.fusednorm["p10"] / self.flax["p10"]

    @property
    def interval(self) -> tuple[float, float]:
        """Range of the ratio if each time lies between its first decile and median."""
        return (
            self.fusednorm["p10"] / self.flax["p50"],
            self.fusednorm["p50"] / self.flax["p10"],
        )


def moved(old: Times, new: Times) -> str:
    """Says whether fusednorm became faster or slower, relative to flax.nnx beside it.

    The rule: the ratio of first deciles changed by more than `LEAST`, and the
    intervals of the two runs, from first decile to median, do not overlap. The last
    deciles only show what else the machine did.

    Returns:
      "faster", "slower" or "".
    """
    if abs(math.log(new.ratio / old.ratio)) <= math.log1p(LEAST):
        return ""
    if new.interval[0] > old.interval[1]:
        return "slower"
    if new.interval[1] < old.interval[0]:
        return "faster"
    return ""


# --- files ----------------------------------------------------------------------------


def read(path: Path) -> Record:
    """Reads the record of a run.

    Raises:
      NotARunError: the file holds no record of a run.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise NotARunError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise NotARunError(f"{path} is not JSON: {error}") from error
    try:
        _ = record["device"]["name"], record["date"][:10], record["versions"]["jax"]
        times(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise NotARunError(f"{path} has no times of python -m bench: {why}") from error
    if not record.get("results") and not record.get("models"):
        raise NotARunError(f"{path} holds no times of cases or models")
    return record


def times(record: Record) -> dict[Key, Times]:
    """Returns the times of everything that a run compared with flax.nnx."""
    found = {}
    for one in record.get("results", ()):
        size = "x".join(str(n) for n in one["shape"])
        key = Key(one["case"], one["dtype"], one["which"], size)
        found[key] = Times(
            _quantiles(one["flax"]), _quantiles(one["fusednorm"]), one.get("copy_rate")
        )
    for one in record.get("models", ()):
        batch = f"batch {one['batch']}" if "batch" in one else ""
        given = filter(None, (one.get("size"), batch, one.get("attention")))
        size = ", ".join(given) or "-"
        for who, after in (("fusednorm", "fuse"), ("neighbours", "fuse_neighbours")):
            if one.get(who):
                name = f"{one['model']}, {after}"
                key = Key(name, one.get("dtype", "-"), one["which"], size)
                found[key] = Times(_quantiles(one["flax"]), _quantiles(one[who]))
    return found


def _quantiles(found: Any) -> dict[str, float]:
    return {name: float(found[name]) for name in ("p10", "p50", "p90")}


def differences(old: Record, new: Record) -> list[str]:
    """Lists what else differs between two runs, and may explain a change."""
    found = [f"commit: {old.get('commit')} -> {new.get('commit')}"]
    for part in ("device", "versions", "settings"):
        one, other = old.get(part, {}), new.get(part, {})
        found += [
            f"{part}, {name}: {one.get(name)} -> {other.get(name)}"
            for name in {**one, **other}
            if one.get(name) != other.get(name)
        ]
    return found if old.get("commit") != new.get("commit") else found[1:]


# --- the command ----------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Compares the files of two runs.

    Args:
      arguments: command-line arguments.

    Returns:
      0; 1 if something became slower; 2 if the files cannot be compared.
    """
    options = _parser().parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
    except NotARunError as error:
        print(error, file=sys.stderr)
        return 2
    devices = old["device"]["name"], new["device"]["name"]
    if devices[0] != devices[1] and not options.across_devices:
        print(
            f"{options.old} is of {devices[0]}, {options.new} of {devices[1]}: a ratio "
            "that differs says nothing of a change. --across-devices compares anyway.",
            file=sys.stderr,
        )
        return 2
    before, after = times(old), times(new)
    common = [key for key in before if key in after]
    if not common:
        print(
            f"{options.old} and {options.new} have no case of one size in common",
            file=sys.stderr,
        )
        return 2

    console = terminal.console()
    for text in differences(old, new):
        console.print(Text(text, style="yellow"))
    changes = {key: moved(before[key], after[key]) for key in common}
    shown = [key for key in common if changes[key] or options.all]
    if shown:
        console.print(_table(shown, before, after, devices[0] == devices[1]))
    for change in ("slower", "faster"):
        console.print(f"{change}: {list(changes.values()).count(change)}")
    console.print(f"not moved: {list(changes.values()).count('')}")
    for path, mine, others in (
        (options.old, before, after),
        (options.new, after, before),
    ):
        for key in mine:
            if key not in others:
                console.print(f"in {path.name} only: {key}", highlight=False)
    return int("slower" in changes.values())


def _table(
    keys: Sequence[Key],
    before: dict[Key, Times],
    after: dict[Key, Times],
    same_device: bool,
) -> Table:
    table = Table(
        title="\nfusednorm's time over flax.nnx's, side by side in each run",
        caption="ms: first deciles, where both runs' copies were equally fast.",
        **terminal.STYLE,
    )
    for name in ("case", "dtype", "pass", "size"):
        table.add_column(name)
    for name in ("from", "to", "change", "flax ms", "fusednorm ms"):
        table.add_column(name, justify="right")
    styles = {"slower": "red", "faster": "green", "": ""}
    # The largest slowdown comes first.
    for key in sorted(keys, key=lambda key: -after[key].ratio / before[key].ratio):
        old, new = before[key], after[key]
        change = moved(old, new)
        absolute = same_device and _same_copy(old, new)
        table.add_row(
            key.name,
            key.dtype,
            key.which,
            key.size,
            f"{old.ratio:.3f}",
            f"{new.ratio:.3f}",
            Text(
                f"{new.ratio / old.ratio - 1:+.1%} {change}".strip(),
                style=styles[change],
            ),
            _milliseconds(old.flax, new.flax) if absolute else "-",
            _milliseconds(old.fusednorm, new.fusednorm) if absolute else "-",
        )
    return table


def _same_copy(old: Times, new: Times) -> bool:
    if not old.copy_rate or not new.copy_rate:
        return False
    return abs(math.log(new.copy_rate / old.copy_rate)) <= math.log1p(SAME_COPY)


def _milliseconds(old: dict[str, float], new: dict[str, float]) -> str:
    return f"{1e3 * old['p10']:.3g} -> {1e3 * new['p10']:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="What moved beyond noise from one run to another: fusednorm's time "
        "over that of flax.nnx beside it, since times of two runs on a machine that "
        "others use too do not compare.",
        epilog=f"A ratio moved if it changed by more than {LEAST * 100:.0f} % and the "
        "runs' intervals, between first deciles and medians, do not overlap. Exit "
        "code: 1 if anything became slower, 2 if the files cannot be compared.",
    )
    parser.add_argument("old", type=Path, metavar="A.json", help="a run's JSON file")
    parser.add_argument("new", type=Path, metavar="B.json", help="that of a later run")
    parser.add_argument(
        "--all", action="store_true", help="show what did not move as well"
    )
    parser.add_argument(
        "--across-devices",
        action="store_true",
        help="compare the runs of two devices; by default that is refused",
    )
    return parser
