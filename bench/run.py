"""Picks models and cases, runs them, reports: what `python -m bench` does."""

import argparse
import os
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

from bench.cases import CASES, Case, chosen
from bench.contest import Settings
from bench.models import MODELS
from bench.report import Report, show, write

HERE = Path(__file__).resolve().parent


class Run:
    """The pytest plugin that feeds suite.py, and gathers what its items find.

    Attributes:
      report: what was found so far.
    """

    def __init__(
        self,
        models: Sequence[str],
        cases: Sequence[Case],
        settings: Settings,
        progress: Progress,
    ):
        self.report = Report(settings)
        self._models = models
        self._cases = cases
        self._progress = progress
        self._task = progress.add_task("", total=None)

    @pytest.fixture(scope="session")
    def settings(self) -> Settings:
        """How much is run."""
        return self.report.settings

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Says which models and cases."""
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", self._models, scope="module")
        if "case" in metafunc.fixturenames:
            names = [case.name for case in self._cases]
            metafunc.parametrize("case", self._cases, ids=names, scope="module")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Gives the progress bar its length."""
        self._progress.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Names what runs now."""
        self._progress.update(self._task, description=_name(nodeid), refresh=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what an item found, or why it failed."""
        if report.failed:
            self.report.failures[_name(report.nodeid)] = report.longreprtext
        if report.when == "teardown":
            self._progress.update(self._task, advance=1, refresh=True)
        if report.when == "call":
            for _, found in report.user_properties:
                self.report.add(found)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """An error while suite.py was imported."""
        if report.failed:
            self.report.failures[report.nodeid] = report.longreprtext

    def pytest_internalerror(self, excrepr: Any) -> None:
        """An error of pytest or of this class."""
        self.report.failures["internal error"] = str(excrepr)


def _name(nodeid: str) -> str:
    """The model, or the case and its pass: what is between the brackets."""
    return nodeid.rpartition("[")[2].rstrip("]")


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmarks.

    Args:
      arguments: of the command line.

    Returns:
      0, or 1 where a result was wrong: it then has no figure.
    """
    options = _parser().parse_args(arguments)
    models = chosen(MODELS, options.cases)
    names = chosen([case.name for case in CASES], options.cases)
    cases = [
        case for case in CASES if case.name in names and case.dtype in options.dtypes
    ]
    if options.list:
        print(*models, *(f"{c.name:24} {c.layer}, {c.dtype}" for c in cases), sep="\n")
        return 0
    if not models and not cases:
        print(f"no case is named {' or '.join(options.cases)}; see --list")
        return 2

    settings = Settings.quick() if options.quick else Settings.usual()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    large = [case.name for case in cases if case.sample_bytes > settings.largest]
    if large:
        limit = f"{settings.largest / 1e6:.0f} MB"
        console.print(f"left out, a sample is above {limit}: {', '.join(large)}")
        cases = [case for case in cases if case.name not in large]
        if not models and not cases:
            return 2
    with _progress(console) as progress:
        run = Run(models, cases, settings, progress)
        items = (["bench_training", "bench_tracing"] if models else []) + (
            ["bench_case"] if cases else []
        )
        suite = [f"{HERE / 'suite.py'}::{item}" for item in items]
        code = pytest.main(["-c", str(HERE / "pytest.ini"), *suite], plugins=[run])
    show(run.report, console)
    if run.report.trainings or run.report.results:
        for path in write(run.report, options.out):
            console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times fusednorm against flax.nnx: two small models in training, "
        "and layers and blocks named after real models.",
        epilog="A result that is wrong has no figure, and makes the exit code 1. "
        "`python -m bench roofline --help`: chips that are not here.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="models and cases whose name matches, as in 'resnet50_*' (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="cases of these dtypes only",
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
    return parser


def _progress(console: Console) -> Progress:
    """A bar on a terminal, drawn between items only: it takes no time from them."""
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
