"""python -m bench scaling: traffic between 8, 64 and 256 devices, in compiled code."""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.table import Table
from rich.text import Text

from bench import terminal
from bench.aot.chips import CHIPS, Gpu, Tpu
from bench.aot.measure import Elsewhere
from bench.aot.sharded import (
    GROUP_SIZE,
    LAYERS,
    MODES,
    SHARDINGS,
    Mode,
    Sharded,
    dtype_of,
    grown,
    layer,
    topology,
)
from bench.provenance import of_compiled

HERE = Path(__file__).resolve().parent
COUNTED = (
    "What crosses devices, forward and backward, counted in code compiled for them. "
    "None is here: no time is measured."
)
_LEGEND = (
    "K: 1024 bytes of the arrays that cross, on a device that has them whole.\n"
    "x: one device's part, the same for any number of devices: the axis that is split "
    "grows with them.\n"
    "ops: R all-reduce, G all-gather, S reduce-scatter, X all-to-all, "
    "P collective-permute. kernels: ours.\n"
    f"GroupNorm has {GROUP_SIZE} channels a group: on more devices, more groups."
)
_WHOSE = ("flax", "ours")
_LETTERS = {
    "all-reduce": "R",
    "all-gather": "G",
    "reduce-scatter": "S",
    "all-to-all": "X",
    "collective-permute": "P",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One compilation.

    Attributes:
      chip: the chip's name.
      mode: what decides how arrays are sharded.
      layer, sharding: names in `LAYERS` and `SHARDINGS`.
      devices: number of devices.
      fused: whether the layer is ours, rather than flax's.
    """

    chip: str
    mode: Mode
    layer: str
    sharding: str
    devices: int
    fused: bool

    def __str__(self) -> str:
        """Describes the compilation in a message."""
        whose = "ours" if self.fused else "flax's"
        return (
            f"{self.chip}, {self.mode.lower()} mode, {self.devices} devices: "
            f"{self.layer}, {self.sharding}, {whose}"
        )

    @property
    def topology(self) -> str:
        """Topology of the devices."""
        return topology(CHIPS[self.chip], self.devices)

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of x."""
        _, shape = LAYERS[self.layer]
        return grown(shape, self.sharding, self.devices)

    @property
    def dtype(self) -> str:
        """Dtype of x and y."""
        return jnp.dtype(dtype_of(CHIPS[self.chip])).name

    @property
    def part(self) -> int:
        """Bytes of x on one device."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize // self.devices

    def begin(self, elsewhere: Elsewhere) -> Future[Sharded]:
        """Starts the compilation in another process."""
        return elsewhere.begin(
            layer,
            CHIPS[self.chip],
            self.layer,
            self.shape,
            self.topology,
            self.sharding,
            self.mode,
            fused=self.fused,
        )


def main(arguments: Sequence[str]) -> int:
    """Compiles all cells, prints tables and writes the JSON file.

    Args:
      arguments: command-line arguments.

    Returns:
      The exit status: 0, or 1 if something did not compile that should.
    """
    options = _parser().parse_args(arguments)
    console = terminal.console()
    record: dict[str, Any] = of_compiled(
        COUNTED, [CHIPS[name] for name in options.chips]
    ) | {"cells": [], "left_out": {}, "raises": {}, "failures": {}}
    console.print(f"[bold]{COUNTED}[/]")
    with Elsewhere() as elsewhere:
        begun = {
            (chip, mode): {
                cell: cell.begin(elsewhere)
                for cell in _cells(chip, mode, options.layers, options.devices, record)
            }
            for chip in options.chips
            for mode in options.modes
        }
        for (chip, mode), futures in begun.items():
            if futures:
                found = _results(futures, record)
                console.print(_table(chip, mode, options.devices, found))
    console.print(_LEGEND, highlight=False)
    for what, why in record["left_out"].items():
        console.print(Text(f"left out: {what}: {why}"))
    for what, why in record["raises"].items():
        console.print(Text(f"raises: {what}: {why}"))
    for what, why in record["failures"].items():
        console.print(Text(f"FAILED: {what}: {why}", style="bold red"))
    local = HERE.parent / "results" / "local"
    path = options.json or local / f"scaling-{record['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {path}", highlight=False)
    return int(bool(record["failures"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench scaling",
        description="Compiles norm layers, forward and backward, for many devices that "
        "need not be here, and counts what crosses them: ours and flax's.",
    )
    parser.add_argument(
        "--chips",
        nargs="+",
        default=["H100", "v5e"],
        # Slices of other TPUs have three dimensions.
        choices=[n for n, chip in CHIPS.items() if isinstance(chip, Gpu)]
        + ["v5e", "v6e"],
        help="default: H100 v5e",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        type=int,
        default=[8, 64, 256],
        choices=[8, 16, 32, 64, 128, 256],
        help="default: 8 64 256",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[*LAYERS],
        choices=[*LAYERS],
        help="default: all",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        type=str.capitalize,
        default=[*MODES],
        choices=[*MODES],
        help="who says how arrays are sharded: their types, or XLA (default: each)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="what is written (default: in bench/results/local, ignored by git)",
    )
    return parser


def _cells(
    chip: str,
    mode: Mode,
    layers: Sequence[str],
    devices: Sequence[int],
    record: dict[str, Any],
) -> list[Cell]:
    """Returns the cells of one table.

    A TPU's table leaves out what only the reference runs; `record` gets the reasons.
    """
    where = f"{chip}, {mode.lower()} mode"
    if isinstance(CHIPS[chip], Tpu):
        if mode == "Auto":
            record["left_out"][where] = "no kernel of ours runs there"
            return []
        if images := [name for name in layers if len(LAYERS[name][1]) > 3]:
            record["left_out"][f"{where}: {', '.join(images)}"] = (
                "of images no kernel of ours runs there"
            )
            layers = [name for name in layers if name not in images]
    return [
        Cell(chip, mode, name, sharding, count, fused)
        for name in layers
        for sharding in SHARDINGS
        for count in devices
        for fused in (False, True)
    ]


def _results(
    futures: dict[Cell, Future[Sharded]], record: dict[str, Any]
) -> dict[Cell, Sharded | str]:
    """Returns each cell's result, "FAILED" or "raises"; `record` gets the details."""
    found: dict[Cell, Sharded | str] = {}
    for cell, future in futures.items():
        try:
            one = found[cell] = future.result()
        except Exception as error:
            # The compiler raises RuntimeError. Any other error of a flax layer comes
            # from JAX, which rejects flax's program.
            failed = cell.fused or isinstance(error, RuntimeError)
            found[cell] = "FAILED" if failed else "raises"
            record["failures" if failed else "raises"][str(cell)] = str(error)
            continue
        record["cells"].append(
            dataclasses.asdict(cell)
            | {
                "topology": cell.topology,
                "shape": cell.shape,
                "dtype": cell.dtype,
                "part": cell.part,
                "kernels": len(one.kernels),
                "crossing": one.crossing,
                "collectives": one.collectives,
            }
        )
    return found


def _table(
    chip: str,
    mode: Mode,
    devices: Sequence[int],
    found: dict[Cell, Sharded | str],
) -> Table:
    """Returns a table with one row per layer and sharding."""
    table = Table(
        title=f"\n{chip}, {mode.lower()} mode: what crosses "
        f"{', '.join(map(str, devices))} devices",
        **terminal.STYLE,
    )
    table.add_column("layer", no_wrap=True, min_width=12)
    table.add_column("split")
    for name in ("x", *(f"{whose} {n}" for whose in _WHOSE for n in devices)):
        table.add_column(name, justify="right")
    for whose in _WHOSE:
        table.add_column(f"{whose}: ops")
    table.add_column("kernels", justify="right")
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        rows.setdefault((cell.layer, cell.sharding), []).append(cell)
    for (name, sharding), cells in rows.items():
        theirs, ours = (
            [found[cell] for cell in cells if cell.fused is fused]
            for fused in (False, True)
        )
        table.add_row(
            name,
            sharding,
            f"{cells[0].part // 1024}K",
            *map(_bytes, (*theirs, *ours)),
            *(_differing(map(_operations, of)) for of in (theirs, ours)),
            _differing(
                str(len(one.kernels)) for one in ours if isinstance(one, Sharded)
            ),
        )
    return table


def _bytes(one: Sharded | str) -> str:
    if isinstance(one, str):
        return one
    return f"{one.crossing / 1024:.1f}K" if one.crossing else "0"


def _operations(one: Sharded | str) -> str:
    """Formats the counts of operations, for example as "3R 1G"."""
    counts = {} if isinstance(one, str) else one.operations
    return " ".join(f"{count}{_LETTERS[kind]}" for kind, count in counts.items())


def _differing(texts: Iterable[str]) -> str:
    """Joins the distinct texts: one if it is the same for all numbers of devices."""
    return ", ".join(dict.fromkeys(texts))
