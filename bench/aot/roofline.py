"""python -m bench roofline: predicts what bounds the kernels, from compiled code."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench import terminal
from bench.aot.chart import draw
from bench.aot.chips import CHIPS, Chip, Gpu
from bench.aot.measure import TENSOR_BYTES, Elsewhere, Measurement, measure, of_case
from bench.aot.whole import PASSES, Whole, layer
from bench.cases import CASES, Case, chosen
from bench.provenance import of_compiled
from bench.terminal import STYLE

HERE = Path(__file__).resolve().parent
_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
_OPS = {"forward": "fwd", "forward+statistics": "fwd+stats", "backward": "bwd"}
_PREDICTED = (
    "Predicted from code compiled for these chips. None is here: no time is measured."
)
_BYTES = (
    "bytes: of device memory over those of x and y, or x, dy and dx. rest, stats, "
    "parts: in % of these;\nrest: what is left to XLA, where x is read twice. around: "
    "other kernels."
)


def main(arguments: Sequence[str]) -> int:
    """Compiles all cases, prints tables, draws charts and writes the JSON file.

    Args:
      arguments: command-line arguments.

    Returns:
      The exit status: 0, or 1 if something did not compile.
    """
    options = _parser().parse_args(arguments)
    names = chosen([case.name for case in CASES], options.cases)
    cases = [case for case in CASES if case.name in names]
    console = terminal.console()
    chips = [CHIPS[name] for name in options.chips]
    record: dict[str, Any] = of_compiled(_PREDICTED, chips) | {
        "measurements": [],
        "layers": [],
        "without_kernel": {},
        "failures": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"roofline-{record['date'][:10]}"
    console.print(f"[bold]{_PREDICTED}[/]")
    with Elsewhere() as elsewhere:
        begun = {name: _begin(elsewhere, CHIPS[name], cases) for name in options.chips}
        for name, (works, layers) in begun.items():
            chip = CHIPS[name]
            found = list(_results(name, works, record).values())
            console.print(_kernels_table(chip, found))
            record["measurements"] += [_as_record(one) for one in found]
            whole = _results(name, layers, record)
            console.print(_layers_table(chip, whole))
            record["layers"] += [
                {"chip": name, "case": case, "pass": which, "fused": fused}
                | dataclasses.asdict(one)
                for (case, which, fused), one in whole.items()
            ]
            if found:
                draw(chip, found, path := stem.with_name(f"{stem.name}-{name}.png"))
                console.print(f"wrote {path}", highlight=False)
    for what, why in record["without_kernel"].items():
        console.print(f"no kernel: {what}: {why}", highlight=False)
    for what, why in record["failures"].items():
        console.print(Text(f"FAILED: {what}: {why}", style="bold red"))
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {path}", highlight=False)
    return int(bool(record["failures"]))


_Futures = dict[Any, Future[Any]]


def _begin(
    elsewhere: Elsewhere, chip: Chip, cases: Sequence[Case]
) -> tuple[_Futures, _Futures]:
    """Starts compiling the kernels and layers of `cases` for one chip.

    Returns:
      The kernels' futures by (case, op); the layers' by (case, pass, whether fused).
    """
    works = {
        (work.name, work.op): elsewhere.begin(measure, chip, work)
        for case in cases
        for work in of_case(case)
    }
    layers = {
        (case.name, which, fused): elsewhere.begin(
            layer, chip, case, TENSOR_BYTES, which, fused
        )
        for case in cases
        for which in PASSES
        for fused in (True, False)
    }
    return works, layers


def _results(chip: str, futures: _Futures, record: dict[str, Any]) -> dict[Any, Any]:
    """Returns the results that succeeded, and adds the others' reasons to `record`."""
    found = {}
    for key, future in futures.items():
        name = " ".join([chip, *map(str, key)])
        try:
            found[key] = future.result()
        except LookupError as error:
            record["without_kernel"][name] = str(error)
        except Exception as error:
            record["failures"][name] = str(error)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline",
        description="Compiles every case for chips that need not be here, and predicts "
        "what bounds it: registers, spills, shared memory, bytes and cycles.",
    )
    parser.add_argument(
        "--chips",
        nargs="+",
        default=["H100", "B200", "v4", "v5e", "v5p", "v6e", "7x"],
        choices=[*CHIPS],
        help="default: all but H200 and RTX5090",
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
        help="where JSON and charts go (default: bench/results/local, ignored by git)",
    )
    return parser


def _as_record(found: Measurement) -> dict[str, Any]:
    derived = ("total", "ratio", "accessed", "floor", "compute", "seconds")
    return dataclasses.asdict(found) | {name: getattr(found, name) for name in derived}


def _kernels_table(chip: Chip, found: Sequence[Measurement]) -> Table:
    return (_gpu_table if isinstance(chip, Gpu) else _tpu_table)(chip, found)


def _gb(chip: Chip) -> str:
    return f"{chip.bandwidth / 1e9:.0f} GB/s"


def _columns(table: Table, names: Sequence[str]) -> None:
    for name in ("case", "", "op"):
        table.add_column(name)
    for name in names:
        table.add_column(name, justify="right")


def _name(one: Measurement) -> tuple[str, str, str]:
    return one.case, _DTYPES[one.dtype], _OPS[one.op]


def _percent(one: Measurement, *parts: int) -> list[str]:
    return [f"{100 * part / one.ideal:.1f}" for part in parts]


def _gpu_table(chip: Any, found: Sequence[Measurement]) -> Table:
    table = Table(
        title=f"\n{chip.name} ({chip.arch}), {_gb(chip)}: our kernels",
        caption="regs, spill: of a thread. smem: of a block. blocks: those an SM holds "
        "at once. flight: bytes on their way to\nan SM at once, at most; bandwidth x "
        f"latency is {chip.bytes_to_fly / 1024:.1f}K. again: what ragged rows or lines "
        f"access twice, from the cache.\n{_BYTES}",
        **STYLE,
    )
    _columns(table, ("regs", "spill", "smem", "threads", "blocks", "flight", "bytes"))
    for name in ("again", "rest", "stats", "parts", "around"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            *_name(one),
            *map(str, (one.registers, one.spilled)),
            f"{one.scratch / 1024:.0f}K",
            *map(str, (one.threads, one.resident)),
            f"{(one.in_flight or 0) / 1024:.1f}K",
            f"{one.ratio:.3f}",
            *_percent(one, one.again, one.rest, one.statistics, one.partials),
            str(len(one.around)),
        )
    return table


def _tpu_table(chip: Any, found: Sequence[Measurement]) -> Table:
    by_memory = [one for one in found if (one.compute or 0) <= 1]
    table = Table(
        title=f"\n{chip.name}, {_gb(chip)}, {chip.clock} GHz: our kernels; "
        f"{len(by_memory)} of {len(found)} bound by memory",
        caption="steps: of a core. cycles, compute, DMA: of a step, the last two in "
        f"us. bound: by the longer of these, and by how much.\n{_BYTES}",
        **STYLE,
    )
    _columns(table, ("VMEM", "steps", "cycles", "compute", "DMA"))
    table.add_column("bound")
    for name in ("bytes", "rest", "stats", "parts", "around"):
        table.add_column(name, justify="right")
    for one in found:
        assert one.compute is not None
        steps = one.blocks
        bound = "compute" if one.compute > 1 else "memory"
        table.add_row(
            *_name(one),
            f"{one.scratch / 2**20:.1f}M",
            str(steps),
            f"{sum(one.cycles) / steps:.0f}",
            f"{1e6 * sum(one.seconds_of_cycles) / steps:.2f}",
            f"{1e6 * sum(one.seconds_of_bytes) / steps:.2f}",
            f"{bound} {max(one.compute, 1 / one.compute):.2f}x",
            f"{one.ratio:.3f}",
            *_percent(one, one.rest, one.statistics, one.partials),
            str(len(one.around)),
        )
    return table


def _layers_table(chip: Chip, found: dict[Any, Whole]) -> Table:
    table = Table(
        title=f"\n{chip.name}: whole layers, ours and flax's as XLA compiles them",
        caption="kernels and GB; each reads and writes its arrays once.\n"
        "floor: x, y, dy and dx once.",
        **STYLE,
    )
    for name in ("case", "pass"):
        table.add_column(name)
    for name in ("flax", "GB", "fusednorm", "GB", "ratio", "floor"):
        table.add_column(name, justify="right")
    for case, which in dict.fromkeys(key[:2] for key in found):
        theirs = found.get((case, which, False))
        ours = found.get((case, which, True))
        if theirs is None or ours is None:
            continue
        table.add_row(
            case,
            which,
            str(theirs.kernels),
            f"{theirs.nbytes / 1e9:.3f}",
            str(ours.kernels),
            f"{ours.nbytes / 1e9:.3f}",
            f"{ours.nbytes / theirs.nbytes:.2f}",
            f"{ours.floor / 1e9:.3f}",
        )
    return table
