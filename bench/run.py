"""Implements `python -m bench`: picks models and cases, runs them, reports."""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from bench import terminal
from bench.cases import CASES, FEW, SWEEP, Case, chosen
from bench.contest import HALVES, PASSES, Peer, Settings
from bench.models.small import MODELS
from bench.report import Report, show, write

HERE = Path(__file__).resolve().parent


class Run:
    """The pytest plugin that parametrizes suite.py and gathers what its items find.

    Attributes:
      report: what was found so far.
    """

    def __init__(
        self,
        report: Report,
        models: Sequence[str],
        cases: Sequence[Case],
        passes: Sequence[str],
        peers: Sequence[Peer],
        progress: Progress,
        until: float,
        out: Path | None,
    ):
        """Prepares the run.

        Args:
          report: receives what the items find.
          models, cases, passes, peers: what to run.
          progress: shows the progress of the run.
          until: time of `time.monotonic` after which no case is begun.
          out: folder to which the report is written after each item, or None.
        """
        self.report = report
        self._models = models
        self._cases = cases
        self._passes = passes
        self._peers = peers
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._until = until
        self._out = out

    @pytest.fixture(scope="session")
    def settings(self) -> Settings:
        """Returns how much is run."""
        return self.report.settings

    @pytest.fixture(scope="session")
    def passes(self) -> Sequence[str]:
        """Returns the passes of a case that are timed."""
        return self._passes

    @pytest.fixture(scope="session")
    def peers(self) -> Sequence[Peer]:
        """Returns the contestants beside flax and fusednorm."""
        return self._peers

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrizes the items with models, cases and passes."""
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", self._models, scope="module")
        if "case" in metafunc.fixturenames:
            names = [case.name for case in self._cases]
            metafunc.parametrize("case", self._cases, ids=names, scope="module")
        if "which" in metafunc.fixturenames:
            metafunc.parametrize("which", self._passes)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Sets the length of the progress bar."""
        self._progress.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Shows the name of the item that runs now."""
        self._progress.update(self._task, description=_name(nodeid), refresh=True)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skips the item if the time is used up."""
        if time.monotonic() > self._until:
            pytest.skip("no time left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records what an item found, or why it failed."""
        if report.failed:
            self.report.failures[_name(report.nodeid)] = report.longreprtext
        if report.skipped:
            self.report.left.append(_name(report.nodeid))
        if report.when == "teardown":
            self._progress.update(self._task, advance=1, refresh=True)
        if report.when == "call":
            for _, found in report.user_properties:
                self.report.add(found)
            if self._out is not None and self.report.results:
                write(self.report, self._out)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records an error in the import of suite.py."""
        if report.failed:
            self.report.failures[report.nodeid] = report.longreprtext

    def pytest_internalerror(self, excrepr: Any) -> None:
        """Records an error of pytest or of this class."""
        self.report.failures["internal error"] = str(excrepr)


def _name(nodeid: str) -> str:
    """Returns what a node id has in brackets: the model, or the case and its pass."""
    return nodeid.rpartition("[")[2].rstrip("]")


def main(arguments: Sequence[str]) -> int:
    """Times fusednorm against flax.

    Returns:
      0; 1 if a result was wrong, which then has no figure; 2 if there is nothing to
      run.
    """
    options = _parser().parse_args(arguments)
    # Without a pattern, only cases named after models run.
    known = (*CASES, *SWEEP, *FEW) if options.cases else CASES
    models = chosen(MODELS, options.cases or ["*"])
    prepared = prepare(options, known, models)
    if isinstance(prepared, int):
        return prepared
    report, cases, console = prepared
    code = run_suite(report, console, models, cases, options.passes)
    show_and_write(report, known, options.out, console)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times fusednorm against flax.nnx: two small models in training, "
        "and layers and blocks named after real models.",
        epilog="A result that is wrong has no figure, and makes the exit code 1. Other "
        "commands, each with --help: peers (other libraries), models (whole models), "
        "tune (how GPU kernels cut their work), compare (two runs), report (the "
        "README's figures), roofline and scaling (chips that are not here).",
    )
    add_arguments(
        parser,
        "models and cases whose name matches, as in 'resnet50_*' (default: those named "
        "after real models; also: rms_*, layer_*, few_*, one_*, decode_*)",
    )
    return parser


# --- what bench/peers_run.py does too -------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, help_of_cases: str) -> None:
    """Adds the options that choose what runs, how much of it, and where results go."""
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help=help_of_cases)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="cases of these dtypes only",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        default=list(PASSES),
        choices=[*PASSES, *HALVES],
        help="what of each case is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny tensors and few rounds: shows that all works, and no true figures",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "local",
        metavar="DIR",
        help="where JSON and chart go (default: bench/results/local, ignored by git)",
    )
    parser.add_argument("--list", action="store_true", help="name the cases, and stop")


def prepare(
    options: argparse.Namespace, known: Sequence[Case], models: Sequence[str] = ()
) -> tuple[Report, list[Case], Console] | int:
    """Returns an empty report, the cases that are asked for, and where to print; or the
    exit code if there is nothing to run."""
    patterns = options.cases or ["*"]
    names = chosen([case.name for case in known], patterns)
    cases = [c for c in known if c.name in names and c.dtype in options.dtypes]
    if options.list:
        print(*models, *(f"{c.name:24} {c.layer}, {c.dtype}" for c in cases), sep="\n")
        return 0
    if not models and not cases:
        print(f"no case is named {' or '.join(patterns)}; see --list")
        return 2
    settings = Settings.quick() if options.quick else Settings.usual()
    console = terminal.console()
    large = [case.name for case in cases if case.sample_bytes > settings.largest]
    if large:
        limit = f"{settings.largest / 1e6:.0f} MB"
        console.print(f"left out, a sample is above {limit}: {', '.join(large)}")
        cases = [case for case in cases if case.name not in large]
    return (Report(settings), cases, console) if models or cases else 2


def run_suite(
    report: Report,
    console: Console,
    models: Sequence[str],
    cases: Sequence[Case],
    passes: Sequence[str],
    peers: Sequence[Peer] = (),
    until: float = math.inf,
    out: Path | None = None,
) -> int:
    """Runs the models and cases, and returns pytest's exit code; see `Run`."""
    items = (["bench_training", "bench_tracing"] if models else []) + (
        ["bench_case"] if cases else []
    )
    if not items:
        return 0
    with _progress(console) as progress:
        run = Run(report, models, cases, passes, peers, progress, until, out)
        suite = [f"{HERE / 'suite.py'}::{item}" for item in items]
        given = ["-c", str(HERE / "pytest.ini"), *suite]
        return int(pytest.main(given, plugins=[run]))


def show_and_write(
    report: Report, known: Sequence[Case], out: Path, console: Console
) -> None:
    """Shows the report, and writes it if there are figures."""
    order = [case.name for case in known]
    report.results.sort(key=lambda result: order.index(result.case))
    show(report, console)
    if report.trainings or report.results:
        for path in write(report, out):
            console.print(f"wrote {os.path.relpath(path)}", highlight=False)


def _progress(console: Console) -> Progress:
    """Makes a bar for terminals, drawn only between items: it costs them no time."""
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
