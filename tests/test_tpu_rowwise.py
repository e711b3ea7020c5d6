"""Tests of what only the rowwise kernels of TPUs have.

test_rowwise.py tests what the kernels of both chips do.

Every test except those of plans names the backend, so that a fallback raises. Every
interpreted launch is checked for races (tests/on_tpu.py). The interpreter fills the
part of a block that lies past the array with NaN.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import fusednorm
from fusednorm.kernels import dispatch, tpu
from fusednorm.kernels import norm as op
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, Target
from fusednorm.kernels.tpu import blocks as tpu_blocks
from fusednorm.kernels.tpu import memory, rowwise
from fusednorm.kernels.tpu.blocks import (
    AcrossLanes,
    Chunks,
    DownSublanes,
    Turned,
    order_of_axes,
)
from fusednorm.kernels.tpu.memory import LANES, SUBLANES
from fusednorm.reference import Norm
from tests import interpreters
from tests.helpers import Case, slow_but
from tests.on_tpu import Device
from tests.test_rowwise import MIXES, OF_HEADS, calls, run, run_each_example
from tests.test_suite import norm_of

FLOATS = ("float32", "bfloat16", "float16")


kernels = interpreters.kernels_of("mosaic_tpu")


# --- values and gradients -------------------------------------------------------------


ROWS, FEATURES = (1, 37, 2, 199), (7, 64, 127, 128, 192, 760, 1128)
# Every second pair: a number of rows meets each length or an adjacent one.
RAGGED = list(itertools.product(ROWS, FEATURES))[::2]


@pytest.mark.parametrize(
    "number",
    slow_but(range(0, len(RAGGED), 2), range(len(RAGGED))),
    ids=lambda n: "x".join(map(str, RAGGED[n])),
)
def test_ragged_shapes(kernels: None, number: int) -> None:
    kind = "layer_norm" if number % 3 else "rms_norm"
    run(Case(kind, RAGGED[number]), MIXES[number % len(MIXES)])


@pytest.mark.parametrize("rows", [1, 37])
def test_one_feature(kernels: None, rows: int) -> None:
    """x_hat is 0 for a row of one element, so y is the bias, and only dbias is nonzero.

    The scale has exact products. XLA on a CPU rounds some sums with a product only
    once, and dx would then be the rounding error of dy * scale.
    """
    case = Case("layer_norm", (rows, 1))
    x, scale, bias, dy = case.data(1, "float32", "float32")
    scale = np.exp2(np.round(scale))
    y, vjp = jax.vjp(case.run, *map(jnp.asarray, (x, scale, bias)))
    dx, dscale, dbias = vjp(jnp.asarray(dy, "float32"))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dscale, 0)
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (2, 3, 50, 768)),  # slabs of 50 rows, which fill no tiles
        Case("layer_norm", (3, 5, 760)),  # slabs are joined
        Case("rms_norm", (4, 3, 9), (("reduction_axes", (1, 2)),), params=False),
        Case("layer_norm", (16, 5, 40)),  # 16 fill sublanes, 5 do not: transposed
        Case("layer_norm", (3, 8, 2, 5, 200)),
        Case("layer_norm", (16, 1, 5, 40), (("reduction_axes", (1, 3)),), params=False),
    ],
    ids=str,
)
def test_shapes_that_become_rows(kernels: None, case: Case) -> None:
    run(case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [("layer_norm", 384), ("rms_norm", 300)], ids=str)
@pytest.mark.parametrize("together", [1, 3])
def test_chunks_of_a_turn(
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    together: int,
    case: tuple[str, int],
    dtype: str,
) -> None:
    """A turn of the loop has three chunks, or one.

    If it has three, another turn has the rest. If it has one, the preceding turn
    computes the chunk's statistics. The last chunk is ragged.
    """
    sizes = [(op, size) for op in ("forward", "backward") for size in (2, 4)]
    monkeypatch.setattr(rowwise, "REGISTERS", dict.fromkeys(sizes, (1, 16)))
    monkeypatch.setattr(rowwise, "TURN_REGISTERS", together * 6)
    kind, features = case
    shape = (11 * 16 + 5, features)
    for call in calls(shape, dtype):
        kernel = tpu.plan(call, None)
        assert isinstance(kernel, Kernel)
        (_, blocks) = kernel.launch.args  # type: ignore[attr-defined]
        assert blocks.chunks_per_turn == together
        assert blocks.looks_ahead == (together == 1)
        assert blocks.keeps == (dtype != "float32")
    run(Case(kind, shape), (dtype, "float32", dtype))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("layer_norm", "float32"), ("layer_norm", "bfloat16"), ("rms_norm", "float32")],
)
def test_long_rows_take_several_blocks_to_a_tile_of_statistics(
    kernels: None, kind: str, dtype: str
) -> None:
    """A block of long rows has fewer rows than a statistic's tile of 128 lanes."""
    case = Case(kind, (150, 8200))
    x, _, _, dy = case.data(2, dtype, dtype)
    call = Call(
        "backward",
        norm_of(case),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        dy=jax.ShapeDtypeStruct(dy.shape, jnp.dtype(dtype)),
    )
    kernel = tpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    assert int(kernel.block.split()[0]) < LANES
    run(case, (dtype, "float32", dtype))


# --- features down the sublanes -------------------------------------------------------


@pytest.mark.parametrize("number", slow_but([1, 3, 4, 6, 8], range(9)))
def test_rows_along_the_lanes(kernels: None, number: int) -> None:
    """Rows and features vary in number around tiles, blocks and chunks."""
    shape = [
        (5, 384, 64),
        (2, 197, 64),  # 59 lanes of the last chunk are garbage
        (129, 3, 64),  # rows are the first axis
        (2, 130, 2, 24),
        (300, 7),  # one feature of 8 is garbage
        (125, 100),
        (250, 192),  # pieces of 128 and 64
        (125, 600),  # more than the registers hold
        (9300, 16),  # several chunks
    ][number]
    case = Case("layer_norm" if number % 3 else "rms_norm", shape)
    assert all(down(call) for call in calls(shape, MIXES[number % len(MIXES)][0]))
    run(case, MIXES[number % len(MIXES)])


@pytest.mark.parametrize("shape", [(7, 150, 24), (1500, 24)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_of_slabs_and_of_rows(
    kernels: None, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
) -> None:
    """There are several blocks of each, and the last ones are smaller."""
    monkeypatch.setattr(rowwise, "MOST_ROWS", 120)
    registers = dict.fromkeys(("forward", "backward"), 2 * 3)  # for 24 features
    monkeypatch.setattr(rowwise, "DOWN_REGISTERS", registers)
    for call in calls(shape, dtype):
        assert int(tpu.plan(call, None).block.split()[0]) == 512
    run(Case("layer_norm", shape), (dtype, "float32", dtype))


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [(700, 256), (1400, 128), (5, 8, 200, 24), (3, 9, 1024)],
    ids=["across", "turned", "down", "slabs"],
)
def test_sums_of_several_runs_of_chunks(
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    cores: int,
) -> None:
    """The sums of one or two chunks, or of fewer at the end, move to a second level."""
    chip = dataclasses.replace(memory.chip(None), cores=cores)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    monkeypatch.setattr(tpu_blocks, "IN_A_ROW", 1)
    monkeypatch.setattr(rowwise, "MOST_ROWS", LANES)
    monkeypatch.setattr(rowwise, "SLAB_BYTES", 2**10)
    _, backward = calls(shape, "float32")
    blocks = planned(backward)
    *_, slabs, rows = blocks.grid
    assert slabs * rows > blocks.steps_in_a_row
    run(Case("layer_norm", shape))


def test_a_long_sum_loses_no_small_terms(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^24 + 1 is 2^24, but runs of chunks are summed apart."""
    monkeypatch.setattr(tpu_blocks, "IN_A_ROW", 2)
    monkeypatch.setattr(rowwise, "MOST_ROWS", LANES)
    shape = (700, 256)
    blocks = planned(calls(shape, "float32")[1])
    dy = np.zeros(shape, np.float32)
    dy[:: blocks.chunk_rows] = 1.0
    dy[0] = 2.0**24
    x = jnp.asarray(Case("layer_norm", shape).data(0, "float32", "float32")[0])
    zeros = jnp.zeros(shape[1])
    _, vjp = jax.vjp(lambda bias: fusednorm.layer_norm(x, bias=bias), zeros)
    runs = -(-blocks.grid[3] // blocks.steps_in_a_row)
    assert runs > 2
    (dbias,) = vjp(jnp.asarray(dy))
    assert dbias.min() >= 2**24 + 2 * (runs - 2)


@pytest.mark.parametrize("width", [LANES, 2 * LANES])
@pytest.mark.parametrize("features", [1, 5, 8, 24, 64, 96, 100, 127, 130, 192, 300])
def test_both_ways_sum_in_the_same_order(features: int, width: int) -> None:
    rng = np.random.default_rng(18)
    x = np.full((16, 384), np.nan, "float32")
    x[:, :features] = rng.normal(0.3, 2, (16, features))
    x[7, :features] = -0.0  # its sum is -0 either way
    lying = AcrossLanes(0, 1, 1, 16, features, 16, 16, piece_width=width)
    standing = DownSublanes(0, 1, 1, 16, features, LANES, LANES)
    columns = np.full((standing.sublanes, LANES), np.nan, "float32")
    columns[:, :16] = x[:, : standing.sublanes].T

    def sums(way: Any, chunk: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        def kernel(chunk_ref: Any, sums_ref: Any) -> None:
            def add_up(piece: Any, total: Any) -> Any:
                return way.add(total, [way.part(chunk_ref, piece)[...]], piece)

            sums_ref[...] = way.sum_features(*way.over_pieces(add_up))

        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        return np.asarray(pl.pallas_call(kernel, result, interpret=True)(chunk))

    found = sums(lying, x[:, : lying.lanes], (16, LANES))[:, 0]
    np.testing.assert_allclose(found, x[:, :features].sum(1), rtol=1e-4, atol=1e-4)
    others = sums(standing, columns, (SUBLANES, LANES))[0, :16]
    np.testing.assert_array_equal(found.view("int32"), others.view("int32"))


@pytest.mark.parametrize("features", [24, 64, 192])
def test_a_row_is_the_same_whichever_way_it_lies(kernels: None, features: int) -> None:
    """Products are exact here: XLA on a CPU rounds some sums with a product once."""
    rng = np.random.default_rng(19)
    sizes = 10.0 ** rng.uniform(-3, 0, (200, features))
    x = jnp.asarray(rng.normal(size=(200, features)) * sizes, "bfloat16")
    scale = jnp.asarray(rng.normal(size=features), "float32")
    norm = Norm((1,), (1,), center=False, epsilon=0.0, dtype=jnp.dtype("float32"))
    rows = {True: 200, False: 9}
    for is_down, count in rows.items():
        assert down(calls((count, features), "bfloat16")[0]) == is_down
    whole, some = (
        op.normalize_with_moments(norm, x[:count], scale) for count in rows.values()
    )
    np.testing.assert_array_equal(whole[0][:9], some[0])
    np.testing.assert_array_equal(whole[2][:9], some[2])


def test_nan_in_a_row_along_the_lanes_stays_in_it(kernels: None) -> None:
    case = Case("layer_norm", (2, 150, 24))
    x, scale, bias, dy = case.data(20, "float32", "float32")
    bad = x.copy()
    bad[1, 149, 7] = np.nan
    results = []
    for given in (x, bad):
        y, vjp = jax.vjp(lambda x: case.run(x, scale, bias), jnp.asarray(given))
        results.append([np.array(y), np.array(*vjp(jnp.asarray(dy, "float32")))])
    for clean, poisoned in zip(*results, strict=True):
        assert np.isfinite(clean).all()
        assert np.isnan(poisoned[1, 149]).all()
        poisoned[1, 149] = clean[1, 149]
        np.testing.assert_array_equal(clean, poisoned)


# --- two cores ------------------------------------------------------------------------


@pytest.fixture
def two_cores(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for two cores, and makes blocks small so that each core has some."""
    chip = dataclasses.replace(memory.chip(None), cores=2)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    monkeypatch.setattr(rowwise, "MOST_ROWS", LANES)


def call_of(case: Case, op: Literal["forward", "backward"] = "forward") -> Call:
    """Returns a call of the case in float32, forward or backward."""
    x = jax.ShapeDtypeStruct(case.shape, jnp.dtype("float32"))
    scale = jax.ShapeDtypeStruct((case.features,), x.dtype)
    bias = scale if case.has_bias and op == "forward" else None
    dy = x if op == "backward" else None
    wanted = (True, True, case.has_bias, False)
    return Call(op, norm_of(case), x, scale, bias, dy=dy, wanted=wanted)


SHARED = {  # shapes, and the blocks of slabs and of rows per core
    (130, 8200): (1, 4),  # 5 of 32 rows, and 4 write one block of statistics
    (400, 300): (1, 2),  # 4 blocks
    (5, 50, 1024): (3, 1),  # 5 slabs: the last core has one fewer
    (3, 150, 768): (2, 2),  # 3 slabs of 2 blocks
    (300, 128): (1, 2),  # transposed in registers
    (7, 140, 24): (2, 1),  # down the sublanes: 4 blocks of 2 slabs
    (600, 130): (1, 3),
}


@pytest.mark.parametrize(
    "number",
    slow_but([0, 3, 4, 5], range(len(SHARED))),
    ids=lambda n: str([*SHARED][n]),
)
def test_two_cores(two_cores: None, number: int) -> None:
    """Each core has its own blocks and partial sums, which are reduced."""
    (shape, blocks), mix = list(SHARED.items())[number], MIXES[number % len(MIXES)]
    for call in calls(shape, mix[0], mix[2]):
        grid = planned(call).grid
        assert grid[0] == 2
        assert grid[2:] == blocks
    case = Case("rms_norm" if number % 3 else "layer_norm", shape)
    run(case, mix)


@pytest.mark.parametrize("shape", [(150, 300), (5, 50, 1024)], ids=str)
def test_two_cores_and_examples(two_cores: None, shape: tuple[int, ...]) -> None:
    run_each_example(Case("layer_norm", shape))


def test_two_cores_have_examples_each(two_cores: None) -> None:
    """Cores share out the examples if one example has too few rows for both."""
    _, backward = calls((4, 5, 300), "float32")
    assert planned(dataclasses.replace(backward, own_params=1)).example_cores == 2
    run_each_example(Case("layer_norm", (5, 300)), examples=4)


@pytest.mark.parametrize("shape", [(64, 300), (100, 8200), (1, 64)], ids=str)
def test_one_core_where_two_would_not_both_have_rows(
    two_cores: None, shape: tuple[int, ...]
) -> None:
    assert all(planned(call).cores == 1 for call in calls(shape, "float32"))
    run(Case("layer_norm", shape))


@pytest.mark.parametrize(
    ("dtype", "inner", "slabs"),
    [
        ("float32", 24, 1),
        ("float32", 20, 9),
        ("bfloat16", 24, 9),
        ("bfloat16", 32, 1),
    ],
)
def test_axes_are_joined_where_rows_fill_tiles(
    dtype: str, inner: int, slabs: int
) -> None:
    """A tile has 8 rows of float32, or 16 of bfloat16."""
    for call in calls((9, inner, 16384), dtype):
        assert planned(call).slabs == slabs


@pytest.mark.parametrize("rows", [1, 8, 49, 197])
def test_a_chunk_is_no_longer_than_the_rows(rows: int) -> None:
    for shape in ((rows, 4096), (9, rows, 768)):
        for call in calls(shape, "bfloat16"):
            blocks = planned(call)
            assert blocks.rows >= rows  # several slabs may be joined
            assert blocks.chunk_rows <= max(2 * blocks.rows - 1, 16)


def planned(call: Call) -> Any:
    """Returns how the kernel cuts the array."""
    kernel = tpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    launch: Any = kernel.launch
    return next(arg for arg in _arguments(launch) if isinstance(arg, Chunks))


def _arguments(launch: Any) -> Iterator[Any]:
    for arg in launch.args:
        yield arg
        if isinstance(arg, functools.partial):
            yield from _arguments(arg)


def test_a_device_says_how_many_cores_it_has() -> None:
    assert memory.chip(Device("TPU v5", num_cores=2)).cores == 2
    assert memory.chip(Device("TPU v6 lite")).cores == 1
    assert memory.chip(None).cores == 1


# --- groups with a scale of their own -------------------------------------------------

ACTIVATED = ("activation", "silu")
# Cases of heads, their layout (across the lanes, turned, or down the sublanes), and the
# period of rows that take turns. The period is 1 where samples and heads are examples,
# which memory has in front of the rows.
HEADS = (
    (Case("rms_norm", (2, 9, 4, 128), OF_HEADS), Turned, 128),
    (Case("layer_norm", (9, 40, 8, 64), OF_HEADS), Turned, 128),
    (Case("layer_norm", (3, 12, 128), (*OF_HEADS, ACTIVATED)), Turned, 384),
    (Case("layer_norm", (3, 5, 8, 256), OF_HEADS), AcrossLanes, 8),
    (Case("rms_norm", (150, 2, 256), OF_HEADS), AcrossLanes, 8),
    (Case("layer_norm", (5, 16, 760), (*OF_HEADS, ACTIVATED)), AcrossLanes, 16),
    (Case("layer_norm", (2, 48, 3, 128), OF_HEADS), Turned, 1),
    (Case("layer_norm", (2, 150, 3, 24), (*OF_HEADS, ACTIVATED)), DownSublanes, 1),
    (Case("rms_norm", (2, 32, 3, 256), OF_HEADS), AcrossLanes, 1),
)


@pytest.mark.parametrize("number", range(len(HEADS)), ids=lambda n: str(HEADS[n][0]))
def test_heads(kernels: None, number: int) -> None:
    case, _, _ = HEADS[number]
    run(case, MIXES[number % len(MIXES)])


@pytest.mark.parametrize(("case", "lie", "period"), HEADS, ids=str)
def test_how_heads_lie(case: Case, lie: type, period: int) -> None:
    blocks = planned(call_of(case))
    assert type(blocks) is lie
    assert (blocks.groups, blocks.period) == (case.shape[-2], period)
    assert blocks.chunk_rows % period == blocks.block_rows % period == 0


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("rms_norm", (35, 8, 128)),
        ("layer_norm", (17, 16, 256)),
        ("layer_norm", (2, 48, 3, 128)),
        ("rms_norm", (2, 150, 3, 24)),
    ],
)
def test_two_cores_and_heads(
    two_cores: None, kind: str, shape: tuple[int, ...]
) -> None:
    case = Case(kind, shape, OF_HEADS)
    blocks = planned(call_of(case))
    assert blocks.cores * blocks.example_cores == 2
    run(case)


def test_bytes_of_heads() -> None:
    """One core's dscale of each row of a period is written, read and reduced."""
    case, _, period = HEADS[0]
    x, heads, features = 2 * 9 * 4 * 128 * 4, 4, 128
    param, statistics = 4 * heads * features, 4 * 2 * 9 * heads
    forward, backward = call_of(case), call_of(case, "backward")
    assert moved(forward) == 2 * x + param
    sums = (2 * period + heads) * features * 4
    assert moved(backward) == 3 * x + param + statistics + sums


def test_heads_that_fall_back() -> None:
    for case, why in (
        (
            Case("group_norm", (4, 768), (("num_groups", 6),)),
            "the groups share the lanes",
        ),
        (Case("rms_norm", (9, 3, 256), OF_HEADS), "no whole number of groups fills"),
        (
            Case(
                "rms_norm",
                (2, 9, 16, 5, 128),
                (("reduction_axes", -1), ("feature_axes", (-3, -2, -1))),
            ),
            "some groups do not lie in front of the rows",
        ),
        (
            Case(
                "rms_norm",
                (16, 2, 4, 4096),
                (("reduction_axes", -1), ("feature_axes", (-3, -2, -1))),
            ),
            "the groups span several axes",
        ),
    ):
        answer = tpu.plan(call_of(case), Device("TPU v5 lite"))
        assert isinstance(answer, Fallback)
        assert why in answer.reason


# --- what is wanted -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(5,), (3, 50), (8, 3)], ids=str)
def test_each_example_has_its_own_gradients(
    kernels: None, rows: tuple[int, ...]
) -> None:
    run_each_example(Case("layer_norm", (*rows, 768)))


def test_each_example_has_its_own_gradients_down_the_sublanes(kernels: None) -> None:
    run_each_example(Case("layer_norm", (2, 150, 24)))


# --- float16 --------------------------------------------------------------------------

EVERY_FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_float16_is_read_right() -> None:
    found = memory._from_float16(EVERY_FLOAT16.view(np.int16).astype(np.int32))
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
    found = np.asarray(memory._to_float16(value)).astype(np.int16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, value.astype(np.float16).view(np.int16))
    nan = np.asarray(memory._to_float16(np.float32([np.nan]))).astype(np.int16)
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
                if down(call):
                    assert block_rows % LANES == 0
                else:
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


def test_how_long_a_row_may_be() -> None:
    """VMEM limits the length, and a v4 has the least VMEM."""

    def longest(kind: str, number: int, dtype: str) -> int:
        lengths = (2**n for n in range(10, 22))
        return max(n for n in lengths if taken(n, kind, number, dtype))

    def taken(features: int, kind: str, number: int, dtype: str) -> bool:
        answer = tpu.plan(calls((3, features), dtype)[number], Device(kind))
        if isinstance(answer, Kernel):
            return True
        assert f"{features} features: " in answer.reason
        return False

    forward, backward = 0, 1
    assert longest("TPU v4", forward, "float32") == 2**16
    assert longest("TPU v4", backward, "float32") == 2**15
    assert longest("TPU v4", backward, "bfloat16") == 2**15
    for kind in ("TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"):
        for dtype in FLOATS:
            assert longest(kind, forward, dtype) >= 2**17
            assert longest(kind, backward, dtype) >= 2**17


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((264, 197, 768), (1, 0, 2)),  # 264 fill sublanes, 197 leave 3 empty
        ((263, 197, 768), (1, 0, 2)),  # 1 of 264 empty, against 3 of 200
        ((264, 200, 768), (0, 1, 2)),  # two axes fill them: the last one
        ((16, 3, 8, 5, 64), (0, 1, 3, 2, 4)),
        ((264, 1, 768), (0, 1, 2)),
        ((197, 768), (0, 1)),
        ((3255, 384, 64), (0, 2, 1)),  # 64 leave half of the lanes empty
        ((128, 197, 12, 64), (1, 2, 3, 0)),
        ((4097, 64), (1, 0)),
        ((4096, 1128), (1, 0)),
        ((4097, 1128), (0, 1)),  # 127 of 4224 empty, against 24 of 1152
        ((3255, 384, 128), (0, 1, 2)),
        ((64,), (0,)),
        ((3255, 200, 100), (1, 2, 0)),  # XLA: (2, 1, 0), which no kernel takes
    ],
    ids=str,
)
def test_axes_come_in_the_order_of_memory(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    assert order_of_axes(shape, itemsize=4, leading=0) == order


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((64, 197, 768), (0, 1, 2)),  # without examples: (1, 0, 2)
        ((2, 64, 197, 768), (0, 2, 1, 3)),
        ((128, 5, 64), (0, 1, 2)),  # without examples: (1, 2, 0)
        ((3, 130, 64), (0, 2, 1)),
        ((3, 64), (0, 1)),
    ],
    ids=str,
)
def test_examples_stay_in_front(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    assert order_of_axes(shape, itemsize=4, leading=1) == order


def down(call: Call, kind: str = "TPU v4") -> bool:
    """Returns whether a call's features lie down the sublanes."""
    answer = tpu.plan(call, Device(kind))
    assert isinstance(answer, Kernel)
    return "down the sublanes" in answer.why


def test_features_lie_one_way_or_the_other() -> None:
    for shape in ((4097, 64), (3255, 384, 64), (384, 192), (4096, 2880), (37, 7)):
        assert all(down(call) for call in calls(shape, "bfloat16"))
    for shape in ((37, 64), (4097, 128), (4097, 1128), (300,), (4096, 768)):
        assert not any(down(call) for call in calls(shape, "bfloat16"))


def test_longer_rows_lie_down_the_sublanes_where_vmem_has_room() -> None:
    """VMEM must have room for 128 rows. Otherwise XLA copies the array."""
    for dtype in FLOATS:
        for shape in ((4096, 8200), (2**22, 12345)):
            assert not any(down(call) for call in calls(shape, dtype))
            assert all(down(call, "TPU v5e") for call in calls(shape, dtype))


def moved(call: Call, kind: str = "TPU v4", cores: int = 1) -> int:
    kernel = tpu.plan(call, Device(kind, cores))
    assert isinstance(kernel, Kernel)
    return kernel.bytes_moved


def test_bytes_of_some() -> None:
    """Counts bytes without statistics, of the sums of two cores, and of halves."""
    forward, backward = calls((37000, 128), "bfloat16")
    x, param, statistic = 37000 * 128 * 2, 128 * 4, 37000 * 4
    alone = dataclasses.replace(forward, statistics=False)
    assert moved(alone) == 2 * x + 2 * param
    assert moved(backward, cores=2) == (
        3 * x + (1 + 2 * (2 * 2 + 1)) * param + 2 * statistic
    )
    for wanted, expected in (
        ((False, True, True, False), 2 * x + 2 * param + 2 * statistic),
        ((False, False, True, False), x + param),
    ):
        assert moved(dataclasses.replace(backward, wanted=wanted)) == expected
    across = dataclasses.replace(backward.norm, axis_names=("d",))
    half = dataclasses.replace(backward, norm=across)
    assert moved(half) == 2 * x + 3 * param + 4 * statistic


def test_small_arrays_run_kernels_where_rows_share_a_scale() -> None:
    """If each example has its own scale, they fall back (tests/test_modulation.py)."""
    target = Target(("tpu",))
    for call in calls((37, 64), "bfloat16"):
        assert isinstance(dispatch.plan(call, target), Kernel)
    _, backward = calls((3, 37, 64), "bfloat16")
    of_each = dataclasses.replace(backward, own_params=1)  # only the sums vary
    assert isinstance(dispatch.plan(of_each, target), Kernel)
    scale = jax.ShapeDtypeStruct((3, 64), "float32")
    own = dataclasses.replace(of_each, scale=scale)
    assert isinstance(dispatch.plan(own, target), Fallback)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5e", "TPU7x"])
def test_a_kernel_needs_no_more_vmem_than_there_is(kind: str) -> None:
    """VMEM also holds the accumulators of a backward."""
    most = max(memory.chip(Device(kind)).vmem, rowwise.VMEM_BYTES)
    for features in (128, 760, 4096, 12288, 2**15, 2**16):
        for dtype in ("bfloat16", "float32"):
            for call in calls((4099, features), dtype):
                kernel = tpu.plan(call, Device(kind))
                if isinstance(kernel, Fallback):
                    continue
                launch: Any = kernel.launch
                (blocks,) = [a for a in _arguments(launch) if isinstance(a, Chunks)]
                assert blocks.vmem <= most
                streamed = sum(d.itemsize for d in rowwise._streamed(call))
                need = 2 * blocks.block_rows * blocks.lanes * streamed
                if call.op == "backward":  # accumulators of dscale and dbias
                    need += 2 * SUBLANES * blocks.lanes * 4
                assert blocks.vmem >= need + rowwise.OTHER_BYTES, (features, call.op)
