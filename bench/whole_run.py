"""Implements `python -m bench models`: picks whole models, runs them, reports."""

import argparse
import gc
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import terminal, whole
from bench.cases import chosen
from bench.contest import Quantiles, said
from bench.models.parts import use_attention
from bench.models.registry import WORKLOADS, Size, Workload
from bench.report import (
    as_dict,
    colored,
    device_name,
    earlier,
    geometric_mean,
    head,
    milliseconds,
    save,
)
from bench.terminal import STYLE
from bench.truth import GateError
from bench.whole import CONTESTANTS, Compiling, Effort, Measured

HERE = Path(__file__).resolve().parent
COMPILING = "compiling"  # name of the job that times compiling

Record = dict[str, Any]
Job = Workload | str


def main(arguments: Sequence[str]) -> int:
    """Runs the models.

    Args:
      arguments: command-line arguments.

    Returns:
      0; 1 if a model failed or was wrong, which then has no figure; 2 if no model has
      a name that was asked for.
    """
    options = _parser().parse_args(arguments)
    jobs = [
        job for job in (*WORKLOADS, COMPILING) if chosen([_name(job)], options.models)
    ]
    if options.list:
        print(*jobs, sep="\n")
        return 0
    if not jobs:
        print(f"no model is named {' or '.join(options.models)}; see --list")
        return 2
    console = terminal.console()
    size: Size = "tiny" if options.quick or jax.default_backend() == "cpu" else "real"
    if size == "tiny" and not options.quick:
        console.print("On a CPU: tiny sizes, for the real ones would take hours.")

    kept = (None if options.again else earlier(options.out, "models")) or {}
    if kept:
        console.print(f"goes on with the figures of {kept['date']}", highlight=False)
    record: Record = head() | {
        "models": kept.get("models", []),
        "compiling": kept.get("compiling", []),
        "summary": kept.get("summary", {}),
        "failures": {},
    }
    todo = [job for job in jobs if not _is_done(job, size, options.attention, record)]
    started, written = time.perf_counter(), False
    while todo and time.perf_counter() - started < options.seconds:
        job = todo.pop(0)
        console.print(f"{job} ...", highlight=False)
        effort = Effort.quick() if options.quick else Effort()
        with use_attention(options.attention):
            _run(job, size, effort, options.attention, record)
        record["summary"] = summary(record["models"])
        path, written = save(record, options.out, "models"), True

    show(record, console)
    if todo:
        left = "; ".join(map(str, todo))
        console.print(f"No time for: {left}. The same command goes on with them.")
    if written:
        console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return 1 if record["failures"] else 0


def _run(job: Job, size: Size, effort: Effort, attention: str, record: Record) -> None:
    """Runs one job and adds what it finds to the record."""
    found: Measured | Compiling
    try:
        if isinstance(job, Workload):
            found = whole.measure(job, size, effort, attention)
            record["models"].append(as_dict(found, "ratio", "ratio_neighbours"))
        else:
            found = whole.compiling(_LLAMA, size, effort)
            record["compiling"].append(as_dict(found, "ratio"))
    except GateError as error:
        record["failures"][str(job)] = str(error)
    except Exception as error:  # out of memory, say: the next model may still run
        record["failures"][str(job)] = said(error)[:400]
    jax.clear_caches()  # frees executables and their constants
    gc.collect()


(_LLAMA,) = (
    workload
    for workload in WORKLOADS
    if (workload.name, workload.which) == ("llama", "training step")
)


def _name(job: Job) -> str:
    return job.name if isinstance(job, Workload) else job


# --- files ----------------------------------------------------------------------------


def _is_done(job: Job, size: Size, attention: str, record: Record) -> bool:
    if isinstance(job, Workload):
        mine = (job.name, job.which, size, attention)
        keys = ("model", "which", "size", "attention")
        return any(tuple(one[key] for key in keys) == mine for one in record["models"])
    return any(one["size"] == size for one in record["compiling"])


def summary(models: Sequence[Record]) -> dict[str, Record]:
    """Summarizes ratios after `fuse` and with neighbours: geometric mean and worst."""
    found = {}
    for name, key in (("fusednorm", "ratio"), ("neighbours", "ratio_neighbours")):
        if models:
            worst = max(models, key=lambda one: one[key])
            found[name] = {
                "models": len(models),
                "geometric_mean": geometric_mean(one[key] for one in models),
                "worst": worst[key],
                "worst_model": f"{worst['model']}, {worst['which']}",
            }
    return found


# --- tables ---------------------------------------------------------------------------


def show(record: Record, console: Console) -> None:
    """Prints the record."""
    if record["models"]:
        _show_models(record, console)
    if record["compiling"]:
        _show_compiling(record["compiling"], console)
    for name, why in record["failures"].items():
        console.print(Text(f"FAILED, no figure: {name}: {why}", style="bold red"))


def _show_models(record: Record, console: Console) -> None:
    console.print(f"\n{device_name()}, jax {jax.__version__}", highlight=False)
    table = Table(
        title="\nWhole models: flax's layers, after fuse, and with fuse_neighbours",
        caption="ms by the host's clock: median (first to last decile). ratio: over "
        "flax's, of first deciles.\ndifference: of losses or outputs, over its limit.",
        **STYLE,
    )
    for name in ("model", "runs", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("flax ms", "fusednorm ms", "ratio", "neighbours ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("difference", justify="right")
    for one in record["models"]:
        table.add_row(
            one["model"],
            one["which"],
            str(one["batch"]),
            milliseconds(Quantiles(**one["flax"])),
            milliseconds(Quantiles(**one["fusednorm"])),
            colored(one["ratio"]),
            milliseconds(Quantiles(**one["neighbours"])),
            colored(one["ratio_neighbours"]),
            f"{one['loss_difference'] / one['limit']:.2g}",
        )
    console.print(table)
    for one in record["models"]:
        fused = [f"{n} {name.split('.')[-1]}" for name, n in one["fused"].items()]
        ran = [f"{n} x {plan}" for plan, n in one["ran"]["fusednorm"].items()]
        joined = [f"{n} {what}" for what, n in one["joined"].items() if n] or ["none"]
        reserved = [f"{one['memory'][name] / 1e9:.3g}" for name in CONTESTANTS]
        console.print(
            f"{one['model']}, {one['which']}: {', '.join(fused)} fused, {one['left']} "
            f"left; {one['size']}. It runs {'; '.join(ran)}. Neighbours: "
            f"{', '.join(joined)}. The compiler reserves {', '.join(reserved)} GB",
            highlight=False,
        )
    for name, found in record["summary"].items():
        console.print(
            f"{name}: geometric mean {found['geometric_mean']:.2f}, worst "
            f"{found['worst']:.2f} ({found['worst_model']}), {found['models']} runs",
            highlight=False,
        )


def _show_compiling(found: Sequence[Record], console: Console) -> None:
    table = Table(
        title="\nBefore a training step runs, from cleared caches",
        caption="seconds: medians. ratio: of their sums.",
        **STYLE,
    )
    for name in ("model", "size", "layers", "layers of"):
        table.add_column(name)
    for name in ("trace", "lower", "compile", "ratio"):
        table.add_column(name, justify="right")
    for one in found:
        for name in ("flax", "fusednorm"):
            of_flax = name == "flax"
            table.add_row(
                one["model"] if of_flax else "",
                one["size"] if of_flax else "",
                str(one["layers"]) if of_flax else "",
                name,
                *(f"{one[name][stage]:.2f}" for stage in ("trace", "lower", "compile")),
                "" if of_flax else colored(one["ratio"]),
            )
    console.print(table)


# --- the command line -----------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench models",
        description="""\
Times whole models with flax's layers, after fusednorm.fuse, and with
fusednorm.fuse_neighbours too. Losses, or outputs, must agree first. Then it times how
long a deep model takes to be traced, lowered and compiled.""",
        epilog="""examples:
  python -m bench models --quick --models vit      # does it work here?
  python -m bench models --seconds 480             # again and again, until all is done
  python -m bench models --models llama unet --attention cudnn
  python -m bench models --models compiling --again

Each model's figures are written as soon as it is done. Another run with the same commit
on the same device goes on from there.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help=f"models whose name matches, or '{COMPILING}' (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and few rounds: shows that all works, and no true figures",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        metavar="N",
        help="start no more models after this time (default: no end)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="run what has figures too, and replace the file of today",
    )
    parser.add_argument(
        "--attention",
        choices=["xla", "cudnn"],
        default="xla",
        help="what runs attention: XLA (default), or cuDNN's kernels on a GPU",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "local",
        metavar="DIR",
        help="where JSON goes (default: bench/results/local, ignored by git)",
    )
    parser.add_argument("--list", action="store_true", help="name the models, and stop")
    return parser
