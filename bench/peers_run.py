"""Implements `python -m bench peers`: times libraries beside flax and fusednorm."""

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence

from bench.cases import CASES, FEW, SWEEP, Case
from bench.contest import Result, Settings
from bench.peers import PEERS, present
from bench.report import as_result, earlier
from bench.run import add_arguments, prepare, run_suite, show_and_write


def main(arguments: Sequence[str]) -> int:
    """Times other libraries beside flax and fusednorm, on all cases and no models.

    Returns:
      0; 1 if a result was wrong, which then has no figure; 2 if there is nothing to
      run.
    """
    options = _parser().parse_args(arguments)
    # Leave memory to PyTorch; jax reads this when it first runs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    known = (*CASES, *SWEEP, *FEW)
    prepared = prepare(options, known)
    if isinstance(prepared, int):
        return prepared
    report, cases, console = prepared
    peers, report.absent = present(options.peers)
    until = time.monotonic() + options.seconds
    if not options.again:
        found = _timed_already(options, report.settings)
        names = [peer.name for peer in peers]
        cases = [c for c in cases if not _is_done(c, options.passes, names, found)]
        left = {case.name for case in cases}
        report.results = [result for result in found if result.case not in left]
        if report.results:
            console.print(f"{len(report.results)} figures are there already")
    code = run_suite(
        report, console, [], cases, options.passes, peers, until, options.out
    )
    show_and_write(report, known, options.out, console)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench peers",
        description="Times fusednorm, flax.nnx and other libraries on the same arrays, "
        "in one process. What is not installed is named as absent.",
        epilog="Run it again until nothing is left: what has figures of this commit is "
        "not timed again. Example: python -m bench peers --cases 'rms_*' --peers torch "
        "liger",
    )
    add_arguments(parser, "cases whose name matches, as in 'resnet50_*' (default: all)")
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
    return parser
