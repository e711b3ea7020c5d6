"""Helpers of the tests of `make aot`, which compile in other processes."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax.numpy as jnp
import pytest

from bench.aot.chips import Chip, Gpu, Tpu
from bench.aot.measure import (
    TENSOR_BYTES,
    Elsewhere,
    Workload,
    measure,
    orders_of_axes,
)
from bench.aot.whole import Whole, layer
from bench.cases import Case

Cell = tuple[Chip, Workload]


def name(value: Any) -> str | None:
    """Returns a parameter's name in a test's id."""
    match value:
        case (Gpu() as chip, Workload() as work) | (chip, Workload() as work):
            return f"{chip.name}-{work.name}-{work.op}"
        case Case() | Gpu() | Tpu():
            return value.name
    return None


def some_slow(values: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """Marks the parameters of a test that are not `quick` as slow.

    `make aot` runs the quick ones, and `make aot-slow` the others.
    """
    return [
        value if quick(value) else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


def layers(
    begun: dict[Any, Future[Any]],
    chip: Chip,
    case: Case,
    which: str,
    nbytes: float = TENSOR_BYTES,
    whole: Any = layer,
) -> tuple[Whole, Whole]:
    """Returns flax's compiled layer, which must have no Pallas kernel, and ours."""
    flax, ours = (
        begun[whole, chip, case.name, nbytes, which, fused].result()
        for fused in (False, True)
    )
    assert flax.ours == 0
    return flax, ours


def tensor_of(case: Case, nbytes: float = TENSOR_BYTES) -> int:
    """Returns the exact bytes of the norm's input when it has about `nbytes`."""
    return math.prod(case.shape(nbytes)) * jnp.dtype(case.dtype).itemsize


@contextlib.contextmanager
def begin(items: Sequence[Any]) -> Iterator[dict[Any, Future[Any]]]:
    """Starts compiling, in other processes, all that the selected tests request."""
    begun: dict[Any, Future[Any]] = {}
    with Elsewhere() as elsewhere:
        for item in items:
            params = (getattr(item, "callspec", None) and item.callspec.params) or {}
            if (cell := params.get("cell")) and cell not in begun:
                begun[cell] = elsewhere.begin(measure, *cell)
            if "tpu" in params:
                tpu = params["tpu"]
                begun[tpu] = elsewhere.begin(orders_of_axes, tpu, item.module.ARRAYS)
            if "case" in params:
                chip, case, which = (params[key] for key in ("chip", "case", "which"))
                nbytes = params.get("nbytes", TENSOR_BYTES)
                whole = params.get("whole", layer)
                for fused in (True, False):
                    key = (whole, chip, case.name, nbytes, which, fused)
                    begun[key] = elsewhere.begin(
                        whole, chip, case, nbytes, which, fused
                    )
        yield begun
