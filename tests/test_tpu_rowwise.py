"""What the rowwise kernels of TPUs have for themselves.

What both chips' kernels do is tested in test_rowwise.py.

Every test but those of plans names the backend, so that a fallback raises; every
interpreted launch is checked for races (tests/on_tpu.py), and what a block has beyond
the array is NaN there.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusednorm
from fusednorm.kernels import tpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.tpu import rowwise
from tests import interpreters
from tests.helpers import Case
from tests.test_rowwise import MIXES, calls, run, run_each_example
from tests.test_suite import norm_of

FLOATS = ("float32", "bfloat16", "float16")


@pytest.fixture
def kernels() -> Iterator[None]:
    with interpreters.interpreted("mosaic_tpu"), fusednorm.use_backend("mosaic_tpu"):
        yield


# --- values and gradients -------------------------------------------------------------


ROWS, FEATURES = (1, 37, 2, 199), (7, 64, 127, 128, 192, 760, 1128)
# Each with each, or its neighbour.
RAGGED = list(itertools.product(ROWS, FEATURES))[::2]


@pytest.mark.parametrize(
    ("number", "shape"),
    list(enumerate(RAGGED)),
    ids=["x".join(map(str, shape)) for shape in RAGGED],
)
def test_ragged_shapes(kernels: None, number: int, shape: tuple[int, int]) -> None:
    kind = "layer_norm" if number % 3 else "rms_norm"
    run(Case(kind, shape), MIXES[number % len(MIXES)])


@pytest.mark.parametrize("rows", [1, 37])
def test_one_feature(kernels: None, rows: int) -> None:
    """x_hat is 0 for a row of one element, so only bias and dbias are not."""
    case = Case("layer_norm", (rows, 1))
    x, scale, bias, dy = case.data(1, "float32", "float32")
    y, vjp = jax.vjp(case.run, *map(jnp.asarray, (x, scale, bias)))
    dx, dscale, dbias = vjp(jnp.asarray(dy, "float32"))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dscale, 0)
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (2, 3, 50, 768)),  # a slab each, for 50 rows fill no tiles
        Case("layer_norm", (3, 5, 760)),  # joined
        Case("layer_norm", (7, 5, 6), (("reduction_axes", (1, 2)),), params=False),
        Case("rms_norm", (4, 3, 9), (("reduction_axes", (1, 2)),), params=False),
        Case("layer_norm", (1, 9, 1, 300)),
        Case("group_norm", (9, 24), (("num_groups", 3),), params=False),
        Case("layer_norm", (2, 33), params=False),
        Case("layer_norm", (300,)),
        Case("layer_norm", (16, 5, 40)),  # 16 fill sublanes, 5 do not: transposed
        Case("layer_norm", (3, 8, 2, 5, 200)),
        Case("layer_norm", (16, 1, 5, 40), (("reduction_axes", (1, 3)),), params=False),
    ],
    ids=str,
)
def test_shapes_that_become_rows(kernels: None, case: Case) -> None:
    run(case)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_long_rows_take_several_blocks_to_a_tile_of_statistics(
    kernels: None, kind: str
) -> None:
    """Here a block has fewer rows than a statistic's tile of 128 lanes."""
    case = Case(kind, (150, 8200))
    x, _, _, dy = case.data(2, "float32", "float32")
    call = Call(
        "backward",
        norm_of(case),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        dy=jax.ShapeDtypeStruct(dy.shape, jnp.dtype("float32")),
    )
    kernel = tpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    assert int(kernel.block.split()[0]) < rowwise.LANES
    run(case)


# --- what is wanted -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(5,), (3, 50), (8, 3)], ids=str)
def test_each_example_has_its_own_gradients(
    kernels: None, rows: tuple[int, ...]
) -> None:
    run_each_example((*rows, 768))


# --- float16 --------------------------------------------------------------------------

EVERY_FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_float16_is_read_right() -> None:
    found = rowwise._from_float16(EVERY_FLOAT16.view(np.int16).astype(np.int32))
    np.testing.assert_array_equal(found, EVERY_FLOAT16.astype(np.float32))
    zeros = EVERY_FLOAT16 == 0
    np.testing.assert_array_equal(
        np.signbit(found)[zeros], np.signbit(EVERY_FLOAT16)[zeros]
    )


def test_float16_is_rounded_to_nearest_even() -> None:
    exact = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)].astype(np.float32)
    between = (np.sort(exact)[1:] + np.sort(exact)[:-1]) / 2
    values = [exact, between, 65504 + np.arange(40, dtype=np.float32)]
    values += [np.nextafter(between, s * np.float32(np.inf)) for s in (-1, 1)]
    values += [np.float32([np.inf, -np.inf, 1e-30, -1e-30, 1e38])]
    rng = np.random.default_rng(14)
    values += [
        (rng.normal(size=10**5) * 10.0 ** rng.uniform(-9, 6, 10**5)).astype("f4")
    ]
    value = np.concatenate(values)
    found = np.asarray(rowwise._to_float16(value)).astype(np.int16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, value.astype(np.float16).view(np.int16))
    nan = np.asarray(rowwise._to_float16(np.float32([np.nan]))).astype(np.int16)
    assert np.isnan(nan.view(np.float16)).all()


# --- plans ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "features", [1, 7, 64, 127, 128, 192, 256, 760, 1128, 4096, 8200, 12288, 16384]
)
def test_what_must_run_runs(features: int, dtype: str) -> None:
    for rows in (1, 2, 37, 199, 4097, 2**22):
        for y_dtype in FLOATS:
            for call in calls((rows, features), dtype, y_dtype):
                kernel = tpu.plan(call, None)
                assert isinstance(kernel, Kernel), kernel
                assert kernel.name == f"rowwise {call.op}"
                block_rows = int(kernel.block.split()[0])
                assert block_rows & (block_rows - 1) == 0


def test_the_block_depends_on_features_and_dtypes_alone() -> None:
    blocks = {
        tuple(tpu.plan(call, None).block for call in calls(shape, "bfloat16"))
        for shape in ((1, 760), (4097, 760), (3, 5, 760), (2, 3, 51, 760))
    }
    assert len(blocks) == 1


def test_bytes_moved() -> None:
    forward, backward = (tpu.plan(c, None) for c in calls((37, 64), "bfloat16"))
    x, param, statistic = 37 * 64 * 2, 64 * 4, 37 * 4
    assert forward.bytes_moved == 2 * x + 2 * param + 2 * statistic
    assert backward.bytes_moved == 3 * x + (1 + 2) * param + 2 * statistic


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (calls((3, 2**20), "float32")[1], "features"),
        (calls((3, 2**15), "bfloat16")[1], "features"),  # what registers spill counts
    ],
    ids=["long", "spills"],
)
def test_what_falls_back(call: Call, reason: str) -> None:
    answer = tpu.plan(call, None)
    assert isinstance(answer, Fallback)
    assert reason in answer.reason


def test_axes_come_in_the_order_of_memory() -> None:
    def order(shape: tuple[int, ...], own_params: int = 0) -> Any:
        call = dataclasses.replace(calls(shape, "float32")[1], own_params=own_params)
        return rowwise._order_of_axes(call)

    assert order((264, 197, 768)) == (1, 0, 2)
    assert order((16, 3, 8, 5, 64)) == (0, 1, 3, 2, 4)
    assert order((64, 197, 768), own_params=1) is None  # examples stay in front
    assert order((2, 64, 197, 768), own_params=1) == (0, 2, 1, 3)
    for as_it_is in ((264, 200, 768), (263, 197, 768), (264, 1, 768), (197, 768)):
        assert order(as_it_is) is None
