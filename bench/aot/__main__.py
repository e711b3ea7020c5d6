"""python -m bench.aot: compiles the cases, and says what came out."""

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.aot.chips import CHIPS, Chip
from bench.aot.measure import (
    TENSOR_BYTES,
    Elsewhere,
    Measurement,
    measure,
    of_case,
    with_kernels,
)
from bench.aot.whole import PASSES, Whole, layer
from bench.provenance import commit

HERE = Path(__file__).resolve().parent
_STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "pad_edge": False,
    "collapse_padding": True,
    "title_justify": "left",
    "caption_justify": "left",
}
_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
_OPS = {"forward": "fwd", "forward+statistics": "fwd+stats", "backward": "bwd"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints, writes.

    Args:
      arguments: of the command line; None is sys.argv's.

    Returns:
      0, or 1 where something did not compile.
    """
    options = _parser().parse_args(arguments)
    chips = [CHIPS[name] for name in options.chips]
    cases = {
        chip: [
            case
            for case in with_kernels(chip)
            if any(fnmatch.fnmatchcase(case.name, name) for name in options.cases)
        ]
        for chip in chips
    }
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("fusednorm", "jax", "jaxlib", "flax", "libtpu")
        },
        "measurements": [],
        "layers": [],
        "failures": {},
    }
    with Elsewhere() as elsewhere:
        begun = {
            (chip.name, f"{work.name} {work.op}"): elsewhere.begin(measure, chip, work)
            for chip in chips
            for case in cases[chip]
            for work in of_case(case)
        }
        layers = {
            (chip.name, case.name, which, fused): elsewhere.begin(
                layer, chip, case, TENSOR_BYTES, which, fused
            )
            for chip in chips
            for case in cases[chip]
            for which in PASSES
            for fused in (True, False)
        }
        for chip in chips:
            found = []
            for (name, what), future in begun.items():
                if name != chip.name:
                    continue
                try:
                    found.append(future.result())
                except Exception as error:
                    record["failures"][f"{name} {what}"] = str(error)
            console.print(_kernels_table(chip, found))
            record["measurements"] += [_as_record(one) for one in found]
            whole = {
                key[1:]: future.result()
                for key, future in layers.items()
                if key[0] == chip.name
            }
            console.print(_layers_table(chip, whole))
            record["layers"] += [
                {"chip": chip.name, "case": case, "pass": which, "fused": fused}
                | dataclasses.asdict(one)
                for (case, which, fused), one in whole.items()
            ]
    for what, why in record["failures"].items():
        console.print(Text(f"FAILED: {what}: {why}", style="bold red"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"aot-{record['date'][:10]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {path}", highlight=False)
    return int(bool(record["failures"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot",
        description="Compiles every case for chips that need not be here, where these "
        "have kernels for it: registers, spills, shared memory and bytes.",
    )
    parser.add_argument(
        "--chips", nargs="+", default=["H100"], choices=[*CHIPS], help="default: H100"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="cases whose name matches (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parent / "results" / "local",
        metavar="DIR",
        help="where the JSON goes (default: bench/results/local, ignored by git)",
    )
    return parser


def _as_record(found: Measurement) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"total": found.total, "ratio": found.ratio}


def _kernels_table(chip: Chip, found: Sequence[Measurement]) -> Table:
    table = Table(
        title=f"\n{chip.name} ({chip.arch}): our kernels",
        caption="regs, spill: of a thread. smem: of a block "
        "(TPU: VMEM). blocks: those an SM holds at once.\nbytes: of device memory over "
        "those of x and y, or x, dy and dx. again, rest, stats, parts: in % of "
        "these;\nagain: what ragged rows or lines load or store twice, from the cache. "
        "rest: what is left to XLA, where x is read twice.\naround: other kernels.",
        **_STYLE,
    )
    for name in ("case", "", "op"):
        table.add_column(name)
    for name in ("regs", "spill", "smem", "threads", "blocks"):
        table.add_column(name, justify="right")
    for name in ("bytes", "again", "rest", "stats", "parts", "around"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            one.case,
            _DTYPES[one.dtype],
            _OPS[one.op],
            _or_dash(one.registers),
            _or_dash(one.spilled),
            f"{one.scratch / 1024:.0f}K",
            _or_dash(one.threads),
            _or_dash(one.resident),
            f"{one.ratio:.3f}",
            *(
                f"{100 * part / one.ideal:.1f}"
                for part in (one.again, one.rest, one.statistics, one.partials)
            ),
            str(len(one.around)),
        )
    return table


def _layers_table(chip: Chip, found: dict[Any, Whole]) -> Table:
    table = Table(
        title=f"\n{chip.name}: whole layers, ours and flax's as XLA compiles them",
        caption="kernels and GB; each kernel reads and writes its arrays once.",
        **_STYLE,
    )
    for name in ("case", "pass"):
        table.add_column(name)
    for name in ("flax", "GB", "fusednorm", "GB", "ratio"):
        table.add_column(name, justify="right")
    for case, which in dict.fromkeys(key[:2] for key in found):
        theirs, ours = found[case, which, False], found[case, which, True]
        table.add_row(
            case,
            which,
            str(theirs.kernels),
            f"{theirs.nbytes / 1e9:.3f}",
            str(ours.kernels),
            f"{ours.nbytes / 1e9:.3f}",
            f"{ours.nbytes / theirs.nbytes:.2f}",
        )
    return table


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
