"""Implements `python -m bench`: picks models and cases, runs them, reports."""

import argparse
import dataclasses
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
from bench.contest import HALVES, PASSES, Peer, Result, Settings
from bench.models.small import MODELS
from bench.peers import PEERS, present
from bench.report import Report, as_result, earlier, show, write

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


def main(arguments: Sequence[str], with_peers: bool = False) -> int:
    """Runs the benchmarks.

    Args:
      arguments: command-line arguments.
      with_peers: whether other libraries are timed beside flax and fusednorm. Models
        are then left out.

    Returns:
      0; 1 if a result was wrong, which then has no figure; 2 if there is nothing to
      run.
    """
    options = _parser(with_peers).parse_args(arguments)
    # Without a pattern, only cases named after models run. Beside peers, all cases run.
    known = (*CASES, *SWEEP, *FEW) if with_peers or options.cases else CASES
    patterns = options.cases or ["*"]
    models = [] if with_peers else chosen(MODELS, patterns)
    names = chosen([case.name for case in known], patterns)
    cases = [
        case for case in known if case.name in names and case.dtype in options.dtypes
    ]
    if options.list:
        print(*models, *(f"{c.name:24} {c.layer}, {c.dtype}" for c in cases), sep="\n")
        return 0
    if not models and not cases:
        print(f"no case is named {' or '.join(patterns)}; see --list")
        return 2

    if with_peers:  # leave memory to PyTorch; jax reads this when it first runs
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings = Settings.quick() if options.quick else Settings.usual()
    console = terminal.console()
    large = [case.name for case in cases if case.sample_bytes > settings.largest]
    if large:
        limit = f"{settings.largest / 1e6:.0f} MB"
        console.print(f"left out, a sample is above {limit}: {', '.join(large)}")
        cases = [case for case in cases if case.name not in large]
        if not models and not cases:
            return 2

    report, until = Report(settings), math.inf
    peers: list[Peer] = []
    if with_peers:
        peers, report.absent = present(options.peers)
        until = time.monotonic() + options.seconds
        if not options.again:
            earlier_results = _timed_already(options, settings)
            asked = [peer.name for peer in peers]
            cases = [
                case
                for case in cases
                if not _is_done(case, options.passes, asked, earlier_results)
            ]
            left = {case.name for case in cases}
            report.results = [r for r in earlier_results if r.case not in left]
            if report.results:
                console.print(f"{len(report.results)} figures are there already")
    with _progress(console) as progress:
        out = options.out if with_peers else None
        run = Run(report, models, cases, options.passes, peers, progress, until, out)
        items = (["bench_training", "bench_tracing"] if models else []) + (
            ["bench_case"] if cases else []
        )
        suite = [f"{HERE / 'suite.py'}::{item}" for item in items]
        code = 0
        if suite:
            given = ["-c", str(HERE / "pytest.ini"), *suite]
            code = int(pytest.main(given, plugins=[run]))
    order = [case.name for case in known]
    report.results.sort(key=lambda result: order.index(result.case))
    show(report, console)
    if report.trainings or report.results:
        for path in write(report, options.out):
            console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return code


def _timed_already(options: argparse.Namespace, settings: Settings) -> list[Result]:
    """Returns what an earlier run of this commit found with the same settings."""
    record = earlier(options.out, "peers")
    if record is None or record["settings"] != dataclasses.asdict(settings):
        return []
    return [as_result(one) for one in record["results"]]


def _is_done(
    case: Case, passes: Sequence[str], peers: Sequence[str], results: Sequence[Result]
) -> bool:
    """Says whether all passes of the case were timed beside all of these peers."""
    done = [
        result.which
        for result in results
        if result.case == case.name
        and {*result.peers, *result.peers_without} >= set(peers)
    ]
    return set(done) >= set(passes)


def _parser(with_peers: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench peers" if with_peers else "python -m bench",
        description="Times fusednorm, flax.nnx and other libraries on the same arrays, "
        "in one process. What is not installed is named as absent."
        if with_peers
        else "Times fusednorm against flax.nnx: two small models in training, and "
        "layers and blocks named after real models.",
        epilog="Run it again until nothing is left: what has figures of this commit is "
        "not timed again. Example: python -m bench peers --cases 'rms_*' --peers torch "
        "liger"
        if with_peers
        else "A result that is wrong has no figure, and makes the exit code 1. Other "
        "commands, each with --help: peers (other libraries), models (whole models), "
        "tune (how GPU kernels cut their work), compare (two runs), report (the "
        "README's figures), roofline and scaling (chips that are not here).",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PATTERN",
        help="cases whose name matches, as in 'resnet50_*' (default: all)"
        if with_peers
        else "models and cases whose name matches, as in 'resnet50_*' (default: those "
        "named after real models; also: rms_*, layer_*, few_*, one_*, decode_*)",
    )
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
    if with_peers:
        parser.add_argument(
            "--peers",
            nargs="+",
            default=list(PEERS),
            choices=list(PEERS),
            help="which other libraries (default: %(default)s)",
        )
        parser.add_argument(
            "--seconds",
            type=float,
            default=420,
            help="after these no case is begun (default: %(default)s)",
        )
        parser.add_argument(
            "--again", action="store_true", help="time what has figures already too"
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
