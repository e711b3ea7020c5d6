"""Reports of a run: tables, a JSON file, a chart."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import peers
from bench.contest import Quantiles, Result, Settings
from bench.provenance import commit, output
from bench.terminal import STYLE
from bench.training import Tracing, Training

_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
_COLORS = {"fusednorm": "#0072b2", "flax": "#b8b8b8"}
_PASSES = {
    "forward": "fwd",
    "forward with statistics": "fwd+stats",
    "backward": "bwd",
    "forward+backward": "fwd+bwd",
}


@dataclasses.dataclass
class Report:
    """Everything that a run found.

    Attributes:
      settings: how much was run.
      trainings, tracings: findings of the models that ran, in order.
      results: findings of the cases that ran, in order.
      failures: reason why a model or case has no figure, by name.
      absent: reason why a peer cannot run here, by name; None if no peers were asked
        for.
      left: models and cases for which no time was left.
    """

    settings: Settings
    trainings: list[Training] = dataclasses.field(default_factory=list)
    tracings: list[Tracing] = dataclasses.field(default_factory=list)
    results: list[Result] = dataclasses.field(default_factory=list)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] | None = None
    left: list[str] = dataclasses.field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        """Names of the peers that have a figure."""
        return list(dict.fromkeys(name for r in self.results for name in r.peers))

    def add(self, found: object) -> None:
        """Adds what one item of the suite found."""
        match found:
            case Training():
                self.trainings.append(found)
            case Tracing():
                self.tracings.append(found)
            case Result():
                self.results.append(found)


def geometric_mean(values: Iterable[float]) -> float:
    """Returns exp(mean(log(values)))."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Returns the number of cases, geometric mean and worst ratio, by pass."""
    found = {}
    for which in _PASSES:
        mine = [result for result in results if result.which == which]
        if mine:
            found[which] = _of_ratios({r.case: r.ratio for r in mine})
    return found


def against_peers(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarizes fusednorm's time over each peer's by peer and pass, like `summary`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(name for result in results for name in result.peers):
        for which in _PASSES:
            ratios = {
                r.case: r.fusednorm.p10 / r.peers[name].p10
                for r in results
                if r.which == which and name in r.peers
            }
            if ratios:
                found.setdefault(name, {})[which] = _of_ratios(ratios)
    return found


def _of_ratios(ratios: dict[str, float]) -> dict[str, Any]:
    worst = max(ratios, key=lambda case: ratios[case])
    return {
        "cases": len(ratios),
        "geometric_mean": geometric_mean(ratios.values()),
        "worst": ratios[worst],
        "worst_case": worst,
    }


# --- tables ---------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Prints the report."""
    if report.trainings or report.results:
        _say_what_ran(report, console)
    if report.trainings:
        _show_trainings(report, console)
    if report.results:
        _show_results(report.results, console)
    if report.absent is not None:
        _show_peers(report, console)
    if report.left:
        console.print(f"no time was left for {', '.join(report.left)}: run it again")
    for text in dict.fromkeys(report.failures.values()):  # a case fails in every pass
        console.print(Text(f"FAILED, no figure: {text}", style="bold red"))


def _say_what_ran(report: Report, console: Console) -> None:
    console.print(f"\n{device_name()}, jax {jax.__version__}", highlight=False)
    plans = {f"{result.backend}: {result.plan}" for result in report.results}
    for training in report.trainings:
        plans |= set(training.ran)
    if all(plan.startswith("reference: ") for plan in plans):
        where = jax.default_backend().upper()
        console.print(f"[bold]{where}: reference path.[/] No kernel ran.")
    for plan in sorted(plans):
        console.print(f"  {plan}", highlight=False)


def _show_trainings(report: Report, console: Console) -> None:
    table = Table(
        title="\nTraining on scikit-learn's digits, before and after fusednorm.fuse",
        caption="difference: the largest between flax and fusednorm, relative",
        **STYLE,
    )
    table.add_column("model")
    for name in ("steps", "loss", "loss\ndifference", "gradient\ndifference"):
        table.add_column(name, justify="right")
    for name in ("flax\nms a step", "fusednorm\nms a step", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("trace + lower\nratio", justify="right")
    tracings = {tracing.model: tracing for tracing in report.tracings}
    for training in report.trainings:
        losses = training.fused_losses
        tracing = tracings.get(training.model)
        table.add_row(
            training.model,
            str(len(losses)),
            f"{losses[0]:.2f} -> {losses[-1]:.2f}",
            f"{training.loss_difference:.0e}",
            f"{training.gradient_difference:.0e}",
            milliseconds(training.flax),
            milliseconds(training.fusednorm),
            colored(training.ratio),
            colored(tracing.ratio) if tracing else "",
        )
    console.print(table)
    for training in report.trainings:
        fused = [f"{n} {name.split('.')[-1]}" for name, n in training.fused.items()]
        ran = [f"{n} x {plan}" for plan, n in training.ran.items()]
        console.print(
            f"{training.model}: {', '.join(fused)} fused, {training.left} left. "
            f"A step runs {'; '.join(ran)}",
            highlight=False,
        )


def _show_results(results: Sequence[Result], console: Console) -> None:
    copies = sorted(result.copy_rate for result in results)
    of = " of the GPU's kernels" if results[0].clock == "device" else ""
    table = Table(
        title="\nfusednorm against flax.nnx",
        caption=f"ms{of}: median (first to last decile). ratio, GB/s and share: of "
        "first deciles.\nGB/s: bytes that must be moved per second of fusednorm's "
        "time. share: of a copy's rate,\n"
        f"{copies[len(copies) // 2] / 1e9:.1f} GB/s here.",
        **STYLE,
    )
    for name in ("case", "dtype", "pass", "backend"):
        table.add_column(name)
    for name in ("flax ms", "fusednorm ms", "ratio", "GB/s", "share"):
        table.add_column(name, justify="right")
    above = None
    for result in results:
        table.add_row(
            "" if result.case == above else result.case,
            "" if result.case == above else _DTYPES[result.dtype],
            _PASSES[result.which],
            result.backend,
            milliseconds(result.flax),
            milliseconds(result.fusednorm),
            colored(result.ratio),
            "-" if result.rate is None else f"{result.rate / 1e9:.1f}",
            "-" if result.share is None else f"{result.share:.0%}",
        )
        above = result.case
    console.print(table)
    for which, found in summary(results).items():
        console.print(
            f"{which}: geometric mean {found['geometric_mean']:.2f}, worst "
            f"{found['worst']:.2f} ({found['worst_case']}), {found['cases']} cases",
            highlight=False,
        )


def _show_peers(report: Report, console: Console) -> None:
    """Prints fusednorm's time over each peer's."""
    table = Table(
        title="\nfusednorm against others",
        caption="fusednorm's time over the other's, first deciles: below 1 is faster.",
        **STYLE,
    )
    for name in ("case", "dtype", "pass"):
        table.add_column(name)
    for name in ("flax.nnx", *report.peers):
        table.add_column(name, justify="right")
    for result in report.results:
        if result.peers:
            times = (result.peers.get(name) for name in report.peers)
            table.add_row(
                result.case,
                _DTYPES[result.dtype],
                _PASSES[result.which],
                colored(result.ratio),
                *(
                    "-" if t is None else colored(result.fusednorm.p10 / t.p10)
                    for t in times
                ),
            )
    if report.peers:
        console.print(table)
    for name, passes in against_peers(report.results).items():
        for which, found in passes.items():
            console.print(
                f"{name}, {which}: geometric mean {found['geometric_mean']:.2f}, worst "
                f"{found['worst']:.2f} ({found['worst_case']}), {found['cases']} cases",
                highlight=False,
            )
    for name, why in (report.absent or {}).items():
        console.print(f"absent: {name}: {why}", highlight=False)
    without: dict[str, list[str]] = {}
    for result in report.results:
        for name, why in result.peers_without.items():
            without.setdefault(f"{name}: {why}", []).append(result.case)
    for said, cases in without.items():
        names = ", ".join(dict.fromkeys(cases))
        console.print(f"no figure: {said}: {names}", highlight=False)


def milliseconds(time: Quantiles) -> str:
    """Formats the median, and the first and last decile, to three digits."""
    low, middle, high = (_three_digits(1e3 * s) for s in (time.p10, time.p50, time.p90))
    return f"{middle} ({low}-{high})"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f}"


def colored(ratio: float) -> Text:
    """Formats a ratio: green if faster by more than 5 %, red if slower by as much."""
    style = "green" if ratio < 0.95 else "red" if ratio > 1.05 else ""
    return Text(f"{ratio:.2f}", style=style)


# --- files ----------------------------------------------------------------------------


def write(report: Report, folder: Path) -> list[Path]:
    """Writes <device>-<date>.json, and a chart beside it if there are results.

    A run beside peers is written to <device>-peers-<date>.json, without a chart.

    Returns:
      The paths of the files.
    """
    record = as_record(report)
    path = save(record, folder, "" if report.absent is None else "peers")
    if not report.results or report.absent is not None:  # `bench report` draws peers
        return [path]
    draw(report.results, path.with_suffix(".png"), title=title(record))
    return [path, path.with_suffix(".png")]


def save(record: dict[str, Any], folder: Path, kind: str = "") -> Path:
    """Writes <device>-<kind>-<date>.json, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, (device_in_files(), kind, record["date"][:10])))
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def head() -> dict[str, Any]:
    """Returns the head of a record: date, commit, device and versions."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "device": {
            "name": device_name(),
            "platform": jax.default_backend(),
            "count": jax.device_count(),
            "driver": _driver(),
            "cpu_cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("fusednorm", "jax", "jaxlib", "flax", "numpy")
            },
        },
    }


def as_record(report: Report) -> dict[str, Any]:
    """Returns the report as JSON: times in seconds, rates in bytes per second."""
    derived = ("ratio", "rate", "share", "copy_rate")
    return {
        **head(),
        "settings": dataclasses.asdict(report.settings),
        "summary": summary(report.results),
        **_of_peers(report),
        "training": [as_dict(t, "ratio") for t in report.trainings],
        "tracing": [as_dict(t, "ratio") for t in report.tracings],
        "results": [as_dict(result, *derived) for result in report.results],
        "failures": sorted(report.failures),
    }


def _of_peers(report: Report) -> dict[str, Any]:
    if report.absent is None:
        return {}
    return {
        "absent": report.absent,
        "peer_versions": peers.versions(),
        "against_peers": against_peers(report.results),
    }


def as_result(one: dict[str, Any]) -> Result:
    """Rebuilds one of a record's results. Fields that old files lack are empty."""
    given = {"clock": "host", "kernels": {}} | one
    names = [field.name for field in dataclasses.fields(Result)]
    fields = {name: given[name] for name in names if name in given}
    fields |= {who: Quantiles(**one[who]) for who in ("flax", "fusednorm", "copy")}
    fields["peers"] = {who: Quantiles(**t) for who, t in one.get("peers", {}).items()}
    return Result(**fields | {"shape": tuple(one["shape"])})


def earlier(folder: Path, kind: str) -> dict[str, Any] | None:
    """Returns a folder's newest record of this kind, commit and device, or None.

    A + after a commit says that files differed from it, but not which. Two equal
    commits with a + are taken to have the same files.
    """
    now = commit()
    for path in sorted(folder.glob(f"{device_in_files()}-{kind}-*.json"), reverse=True):
        record: dict[str, Any] = json.loads(path.read_text())
        if now and (record["commit"], record["device"]["name"]) == (now, device_name()):
            return record
    return None


def as_dict(found: Any, *properties: str) -> dict[str, Any]:
    """Returns a dataclass's fields and the given properties."""
    return dataclasses.asdict(found) | {
        name: getattr(found, name) for name in properties
    }


def device_name() -> str:
    """Returns jax's name for the accelerator, or the processor's model."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return models[0].strip() if models else platform.processor() or platform.machine()


def device_in_files() -> str:
    """Returns the device's name as it appears in file names: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    found = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found and found.splitlines()[0]


def title(record: dict[str, Any]) -> str:
    """Returns the title of a chart: what was timed, on what and when."""
    versions = record["versions"]
    return (
        f"fusednorm {versions['fusednorm']} and flax.nnx {versions['flax']} on "
        f"{record['device']['name']}, jax {versions['jax']}, {record['date'][:10]}"
    )


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Draws a PNG: for each case and pass, both speeds as shares of the copy's."""
    cases = list(dict.fromkeys(result.case for result in results))
    backends = " and ".join(dict.fromkeys(result.backend for result in results))
    shown = [which for which in _PASSES if any(r.which == which for r in results)]
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(cases)), layout="constrained")
    axes = figure.subplots(ncols=len(shown), squeeze=False, sharey=True)
    fastest = max(max(r.share or 0, r.flax_share or 0) for r in results)
    for axis, which in zip(axes[0], shown, strict=True):
        for result in results:
            if result.which == which:
                _draw_bars(axis, cases.index(result.case), result)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(which)
        axis.set_xlabel("GB/s as a share of a copy's (number: time over flax's time)")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set_xlim(0, 1.12 * max(1, fastest))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    dtypes = {result.case: _DTYPES[result.dtype] for result in results}
    labels = [f"{case}  {dtypes[case]}" for case in cases]
    axes[0, 0].set_yticks(range(len(cases)), labels=labels)
    axes[0, 0].set_ylim(len(cases) - 0.4, -0.6)
    legend = {"fusednorm": f"fusednorm: {backends}", "flax": "flax.nnx"}
    handles = [Patch(color=_COLORS[name], label=legend[name]) for name in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Any, row: int, result: Result) -> None:
    share, flax_share = result.share or 0, result.flax_share or 0
    axis.barh(row - 0.19, share, height=0.36, color=_COLORS["fusednorm"])
    axis.barh(row + 0.19, flax_share, height=0.36, color=_COLORS["flax"])
    axis.text(
        max(share, flax_share) + 0.01,
        row,
        f"{result.ratio:.2f}" if result.share else f"{result.ratio:.2f}, no floor",
        va="center",
        fontsize=9,
    )
