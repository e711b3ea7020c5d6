"""python -m bench report: writes the README's figures from the files of runs."""

import argparse
import dataclasses
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.cases import FEW, SWEEP
from bench.compare import NotARunError, Record, read
from bench.contest import PASSES
from bench.report import as_result, draw, geometric_mean, title

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
END = "<!-- end of figures -->"

# Features. Wider rows have a line of their own in the table of shares.
WIDE = 8192

_PASSES = {"forward+backward": "forward + backward", "forward": "forward alone"}
# The group of each case that is not named after a real model, and the groups' titles.
_GROUPS = {case.name: "sweep" for case in SWEEP} | {case.name: "few" for case in FEW}
_IN_WORDS = {
    "models": "cases named after real models",
    "sweep": "rows of every length",
    "few": "so little that launching it is most of it",
}

_OURS = ("fusednorm", "fuse")
_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of peers

Entry = dict[str, Any]  # an item of a record's "results" or "models"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's file and the record in it."""

    path: Path
    record: Record

    @property
    def device(self) -> str:
        return str(self.record["device"]["name"])

    @property
    def on_cpu(self) -> bool:
        return bool(self.record["device"].get("platform") == "cpu")

    @property
    def results(self) -> list[Entry]:
        return self.record.get("results", [])

    def group(self, name: str) -> list[Entry]:
        """Returns the results of one of the groups in `_IN_WORDS`."""
        return [
            one for one in self.results if _GROUPS.get(one["case"], "models") == name
        ]

    @property
    def norms(self) -> list[Entry]:
        """Results that the tables of norms show."""
        return [one for one in self.group("models") if one["which"] in PASSES]

    @property
    def kind(self) -> str:
        """Kind of the run: "models", "peers" (norms beside peers), or "norms"."""
        if self.record.get("models"):
            return "models"
        return "peers" if any(one.get("peers") for one in self.results) else "norms"


def newest(runs: Iterable[Run]) -> dict[tuple[str, str], Run]:
    """Returns the last run of each device and kind.

    A run beside peers times flax.nnx too. It therefore also replaces the last run of
    norms, unless it has fewer of their cases.
    """
    found: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: run.record["date"]):
        found[run.device, run.kind] = run
        norms = found.get((run.device, "norms"))
        if run.kind == "peers" and norms and len(run.norms) >= len(norms.norms):
            found[run.device, "norms"] = run
    return found


def committed(folder: Path = HERE / "results") -> list[Run]:
    """Reads the runs in a folder. Skips predictions, which have no device."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith(("roofline-", "scaling-")):
            runs.append(Run(path, read(path)))
    return runs


# --- Markdown -------------------------------------------------------------------------


def blocks(runs: Iterable[Run]) -> dict[str, str]:
    """Returns the README's blocks as Markdown, by name; "" if no run has a figure."""
    last = newest(runs)

    def of(kind: str, write: Callable[[Run], str], where: Callable[[Run], bool]) -> str:
        mine = (run for (_, its), run in sorted(last.items()) if its == kind)
        return "\n\n".join(write(run) for run in mine if where(run))

    return {
        "gpu": of("norms", _norms, lambda run: not run.on_cpu),
        "peers": of("peers", _peers, lambda run: True),
        "models": of("models", _models, lambda run: True),
        "cpu": of("norms", _norms, lambda run: run.on_cpu),
    }


def _heading(run: Run, what: str) -> str:
    """Writes the heading of a block: where its figures come from."""
    record = run.record
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in _named(run))
    cores = f", {record['device'].get('cpu_cores')} cores" if run.on_cpu else ""
    return _wrapped(
        f"**{run.device}{cores}**: {what} ({versions}, commit {_commit(record)}, "
        f"{record['date'][:10]}; bench/results/{run.path.name})"
    )


def _wrapped(text: str) -> str:
    """Wraps text to the README's width."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _named(run: Run) -> list[str]:
    """Names the packages whose versions matter and are recorded."""
    peers = {name for one in run.results for name in one.get("peers") or {}}
    wanted = ("jax", "flax", *sorted(peers))
    return [name for name in wanted if name in run.record["versions"]]


def _commit(record: Record) -> str:
    commit = record.get("commit") or "unknown"
    return commit[:7] + (" with changes" if commit.endswith("+") else "")


def _how(run: Run) -> str:
    """Describes the size of the tensors and the clock."""
    nbytes = run.record.get("settings", {}).get("tensor_bytes")
    size = f"tensors of {nbytes / 1e6:.0f} MB, " if nbytes else ""
    clocks = {one.get("clock", "host") for one in run.results}
    clock = "the kernels' own time" if clocks == {"device"} else "the host's clock"
    return f"{size}first deciles by {clock}"


def _norms(run: Run) -> str:
    """Tabulates fusednorm against flax.nnx, and on a GPU also against a copy."""
    cases = len({one["case"] for one in run.norms})
    lines = [
        _heading(run, f"{cases} {_IN_WORDS['models']}, {_how(run)}"),
        "",
        "| time, fusednorm / flax.nnx | geometric mean | best case | worst case |",
        "|---|---|---|---|",
    ]
    for which, name in _PASSES.items():
        mine = sorted(_of(run.norms, which), key=_ratio)
        if mine:
            mean = geometric_mean(map(_ratio, mine))
            best, worst = (
                f"{_ratio(one):.2f} ({_in_words(one)})" for one in (mine[0], mine[-1])
            )
            lines.append(f"| {name} | {mean:.2f} | {best} | {worst} |")
    if not run.on_cpu:
        lines += ["", *_shares(run)]
    return "\n".join(lines + _steps(run))


def _ratio(one: Entry) -> float:
    return float(one["fusednorm"]["p10"] / one["flax"]["p10"])


def _in_words(one: Entry) -> str:
    """Describes a case as "GroupNorm, 64x64x512, float32".

    The first axis is left out, because the benchmark chooses its length.
    """
    shape = "x".join(map(str, one["shape"][1:]))
    return f"{one['layer']}, {shape}, {one['dtype']}"


def _shares(run: Run) -> list[str]:
    """Tabulates how close each family of cases comes to a copy's rate."""
    families: dict[str, list[Entry]] = {}
    for one in run.norms:
        if _share(one) is not None:
            families.setdefault(_family(one), []).append(one)
    copy = statistics.median(one["copy_rate"] for one in run.norms)
    lines = [
        "| bytes that must move per second, of a copy's "
        f"({copy / 1e12:.1f} TB/s) | forward | forward + backward |",
        "|---|---|---|",
    ]
    for family, mine in families.items():
        cells = [_percent(_share(one) for one in _of(mine, which)) for which in PASSES]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def _of(found: Iterable[Entry], which: str) -> list[Entry]:
    return [one for one in found if one["which"] == which]


def _share(one: Entry, who: str = "fusednorm") -> float | None:
    """Returns a contestant's rate of bytes that must move, over the copy's rate."""
    floor = one.get("floor_bytes")
    return floor and floor / one[who]["p10"] / one["copy_rate"]


def _family(one: Entry) -> str:
    """Returns the family of a case, which has one line in the table of shares."""
    layer = one["layer"]
    if " + " in layer:
        return "norms together with their neighbours"
    if layer in ("LayerNorm", "RMSNorm"):
        above = "more than" if one["shape"][-1] > WIDE else "up to"
        return f"LayerNorm, RMSNorm: rows of {above} {WIDE} features"
    if layer == "BatchNorm":
        return f"BatchNorm, {one['dtype']}"
    return "GroupNorm, InstanceNorm"


def _percent(shares: Iterable[float | None]) -> str:
    """Formats the range from the least to the largest: "46 to 87 %"."""
    found = sorted(share for share in shares if share is not None)
    if not found:
        return "-"
    ends = dict.fromkeys(f"{100 * share:.0f}" for share in (found[0], found[-1]))
    return f"{' to '.join(ends)} %"


def _steps(run: Run) -> list[str]:
    """Reports how long training steps, and tracing and lowering them, take."""
    said = []
    for part, what in (
        ("training", "a training step"),
        ("tracing", "tracing and lowering it"),
    ):
        found = run.record.get(part)
        if found:
            each = (f"{one['ratio']:.2f} ({one['model']})" for one in found)
            said.append(f"{what} takes {' and '.join(each)}")
    if not said:
        return []
    return ["", _wrapped(f"Of the time with flax's layers, {'; '.join(said)}.")]


def _peers(run: Run) -> str:
    """Tabulates fusednorm against each contestant, on that contestant's cases."""
    lines = [_heading(run, f"fusednorm beside others, {_how(run)}")]
    for group, words in _IN_WORDS.items():
        found = [_flat(one) for one in run.group(group)]
        passes = list(dict.fromkeys(one["which"] for one in found))
        if not any(one.get("peers") for one in found):
            continue
        columns = [f"fusednorm's time over that of, {words}", "cases", *passes]
        lines += [
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        ]
        for who in _contestants(run):
            mine = [one for one in found if who in one]
            if not mine or who == "fusednorm":
                continue
            cells = (_means(_of(mine, which), who) for which in passes)
            cases = len({one["case"] for one in mine})
            name = "flax.nnx" if who == "flax" else who
            lines.append(f"| {name} | {cases} | {' | '.join(cells)} |")
    lines += ["", "Geometric means (best to worst), in one process."]
    for who, why in (run.record.get("absent") or {}).items():
        lines.append(_wrapped(f"Not there: {who}, {why.rstrip('.')}."))
    return "\n".join(lines)


def _means(found: Sequence[Entry], who: str) -> str:
    """Formats fusednorm's times over another's: "0.81 (0.44 to 1.05)"."""
    over = sorted(one["fusednorm"]["p10"] / one[who]["p10"] for one in found)
    if not over:
        return "-"
    return f"{geometric_mean(over):.2f} ({over[0]:.2f} to {over[-1]:.2f})"


def _contestants(run: Run) -> list[str]:
    peers = dict.fromkeys(who for one in run.results for who in one.get("peers") or {})
    return ["fusednorm", "flax", *peers]


def _flat(one: Entry) -> Entry:
    """Moves the peers' times to the level of flax's and fusednorm's."""
    return {**one, **{who: t for who, t in (one.get("peers") or {}).items() if t}}


def _models(run: Run) -> str:
    """Tabulates whole models, before and after `fuse` and `fuse_neighbours`."""
    lines = [
        _heading(run, "whole models, first deciles by the host's clock"),
        "",
        "| model | pass | flax.nnx | time over that, `fuse` | and `fuse_neighbours` "
        "| memory, GB: flax.nnx, `fuse`, `fuse_neighbours` |",
        "|---|---|---|---|---|---|",
    ]
    for one in run.record["models"]:
        memory = one.get("memory") or {}
        gigabytes = ", ".join(
            f"{memory[who] / 1e9:.2f}" if memory.get(who) else "-"
            for who in ("flax", "fusednorm", "neighbours")
        )
        lines.append(
            f"| {_model(one)} | {one['which']} | {1e3 * one['flax']['p10']:.1f} ms "
            f"| {_over_flax(one, 'fusednorm')} | {_over_flax(one, 'neighbours')} "
            f"| {gigabytes if memory else '-'} |"
        )
    compiling = run.record.get("compiling")
    if compiling:
        lines += [
            "",
            "| tracing, lowering and compiling a training step | layers | flax.nnx "
            "| fusednorm | ratio |",
            "|---|---|---|---|---|",
        ]
    for one in compiling or ():
        flax, fused = (sum(one[who].values()) for who in ("flax", "fusednorm"))
        lines.append(
            f"| {one['model']} | {one['layers']} | {flax:.1f} s | {fused:.1f} s "
            f"| {fused / flax:.2f} |"
        )
    return "\n".join(lines)


def _model(one: Entry) -> str:
    size = one.get("size", "real")
    attention = one.get("attention", "xla")
    given = [
        one["model"],
        "" if size == "real" else size,
        f"batch {one['batch']}" if "batch" in one else "",
        one.get("dtype", ""),
        "" if attention == "xla" else f"{attention} attention",
    ]
    return ", ".join(filter(None, given))


def _over_flax(one: Entry, who: str) -> str:
    return f"{one[who]['p10'] / one['flax']['p10']:.2f}" if one.get(who) else "-"


# --- README ---------------------------------------------------------------------------


def marked(name: str, text: str) -> str:
    """Returns a block between its markers."""
    return f"{_begin(name)}\n{text and f'\n{text}\n\n'}{END}"


def _begin(name: str) -> str:
    return f"<!-- figures: {name} -->"


def replaced(page: str, found: dict[str, str]) -> str:
    """Replaces the page's blocks with the given ones.

    Raises:
      ValueError: the page has no place for one of them.
    """
    for name, text in found.items():
        head, begin, rest = page.partition(_begin(name))
        _, end, tail = rest.partition(END)
        if not begin or not end or begin in tail:
            raise ValueError(f"the page needs one {_begin(name)}, and {END} behind it")
        page = head + marked(name, text) + tail
    return page


# --- charts ---------------------------------------------------------------------------


def charts(run: Run) -> list[Path]:
    """Draws a run's figures into PNGs beside its file.

    Returns:
      The paths of the PNGs.
    """
    path = run.path.with_suffix(".png")
    if run.kind == "models":
        _draw_models(run, path)
        return [path]
    if run.kind == "peers":
        return _draw_peers(run, path)
    draw([as_result(one) for one in run.results], path, title(run.record))
    return [path]


def _draw_peers(run: Run, path: Path) -> list[Path]:
    """Draws speeds as shares of a copy's, for each pass and case that a peer has."""
    paths = []
    for group in _IN_WORDS:
        bars = [
            (one["which"], f"{one['case']}  {one['dtype']}", who, _share(one, who))
            for one in map(_flat, run.group(group))
            if one.get("peers") and _share(one) is not None
            for who in _contestants(run)
            if who in one
        ]
        if bars:
            end = "" if group == "models" else f"-{group}"
            paths.append(path.with_stem(path.stem + end))
            label = "bytes that must move per second, as a share of a copy's"
            _draw_bars(bars, paths[-1], title(run.record), label)
    return paths


def _draw_models(run: Run, path: Path) -> None:
    """Draws the time over flax's, for each model and pass."""
    bars = [
        (one["which"], _model(one), name, one[who]["p10"] / one["flax"]["p10"])
        for one in run.record["models"]
        for who, name in (("fusednorm", "fuse"), ("neighbours", "fuse_neighbours"))
        if one.get(who)
    ]
    _draw_bars(bars, path, title(run.record), "time over that with flax.nnx's layers")


def _draw_bars(
    bars: Sequence[tuple[str, str, str, float | None]],
    path: Path,
    title: str,
    label: str,
) -> None:
    """Draws a PNG of bars, with a line at 1.

    Args:
      bars: pass, row, contestant and length of each bar.
      path: path of the PNG.
      title: title of the chart.
      label: what the lengths mean.
    """
    passes = list(dict.fromkeys(which for which, *_ in bars))
    rows = list(dict.fromkeys(row for _, row, *_ in bars))
    names = list(dict.fromkeys(name for _, _, name, _ in bars))
    height = 0.8 / len(names)
    figure = Figure(
        figsize=(2 + 5 * len(passes), 1.8 + 0.13 * len(rows) * (1 + len(names))),
        layout="constrained",
    )
    axes = figure.subplots(ncols=len(passes), squeeze=False, sharey=True)[0]
    for axis, which in zip(axes, passes, strict=True):
        for i, name in enumerate(names):
            mine = [bar for bar in bars if bar[0] == which and bar[2] == name]
            axis.barh(
                [rows.index(bar[1]) - 0.4 + (i + 0.5) * height for bar in mine],
                [bar[3] for bar in mine],
                height=height,
                color=_color(name, i),
                label=name,
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(which)
        axis.set_xlabel(label)
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), labels=rows)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _color(name: str, i: int) -> str:
    """Returns the color that `bench.report.draw` uses, or a peer's own."""
    if name in _OURS:
        return "#0072b2"
    return "#b8b8b8" if name == "flax" else _COLORS[i % len(_COLORS)]


# --- the command ----------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Prints the blocks, and with --write puts them into the README.

    Args:
      arguments: command-line arguments.

    Returns:
      0, or 2 if a file holds no run or the README has no place for a block.
    """
    options = _parser().parse_args(arguments)
    try:
        runs = [Run(path, read(path)) for path in options.files] or committed()
        found = blocks(runs)
        if options.files:  # other blocks stay as they are
            found = {name: text for name, text in found.items() if text}
        print("\n\n".join(marked(name, text) for name, text in found.items()))
        if options.write:
            README.write_text(replaced(README.read_text(), found))
            # One run may be the newest of two kinds.
            last = {run.path: run for run in newest(runs).values()}
            drawn = [path for run in last.values() for path in charts(run)]
            for path in (README, *drawn):
                print(f"wrote {path.name}", file=sys.stderr)
    except (NotARunError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Prints the figures of README.md as Markdown, from the JSON files "
        "of runs: norms on GPUs, beside peers, in whole models, and on CPUs.",
        epilog="Of several runs of one device and kind the newest counts. The tests "
        "hold README.md to what is printed without FILES.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILES",
        help="of runs (default: all of bench/results/)",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the figures between their markers in README.md, and draw the charts "
        "beside the files again",
    )
    return parser
