"""The pytest-benchmark items; `python -m bench` chooses their models and cases.

Each item times one thing. It gives its result to `record_property`, and pytest hands
that to the run in `run.py`. If the gate is red, the item fails and records nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.contest import Contest, Peer, Settings
from bench.training import Pair, trace, train
from bench.truth import GateError

Record = Callable[[str, Any], None]


@contextmanager
def gate(name: str) -> Iterator[None]:
    """Turns a red gate into a failure that says only what was wrong."""
    try:
        yield
    except GateError as error:
        raise pytest.fail.Exception(f"{name}: {error}", pytrace=False) from None


@pytest.fixture(scope="module")
def pair(model: str) -> Pair:
    """Builds one model with flax's layers and with ours."""
    return Pair(model)


def bench_training(
    pair: Pair, settings: Settings, benchmark: BenchmarkFixture, record_property: Record
) -> None:
    """Times some training steps of a model."""
    with gate(pair.name):
        record_property("result", train(pair, benchmark, settings.steps))


def bench_tracing(
    pair: Pair, settings: Settings, benchmark: BenchmarkFixture, record_property: Record
) -> None:
    """Times tracing and lowering of one training step."""
    record_property("result", trace(pair, benchmark, settings.traces))


@pytest.fixture(scope="module")
def contest(
    case: Case, settings: Settings, passes: Sequence[str], peers: Sequence[Peer]
) -> Contest:
    """Compiles and checks one case, once for all passes."""
    with gate(case.name):
        return Contest(case, settings.tensor_bytes, passes, peers)


def bench_case(
    contest: Contest,
    which: str,
    settings: Settings,
    benchmark: BenchmarkFixture,
    record_property: Record,
) -> None:
    """Times one pass of one case."""
    record_property("result", contest.time(which, benchmark, settings))
