"""Tests of what only the rowwise kernels of NVIDIA GPUs have.

They test how rows are cut, what falls back, what is lowered, and (marked gpu) all of it
on a real GPU. test_rowwise.py tests values and gradients in the interpreter.
"""

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.aot import traffic
from fusednorm.kernels import dispatch, gpu
from fusednorm.kernels import norm as op
from fusednorm.kernels.dispatch import Call, Fallback, Kernel
from fusednorm.kernels.gpu import rowwise, tiles
from tests import interpreters
from tests.helpers import Case
from tests.test_channelwise import moved
from tests.test_dispatch import COUNTED
from tests.test_rowwise import MIXES, OF_HEADS, calls, run
from tests.test_sharded import agree, both
from tests.test_suite import (
    check,
    check_gradients_of,
    flax_function,
    norm_of,
    rms_errors,
)

DTYPES = ("float32", "bfloat16", "float16")
FEATURES = (64, 128, 192, 256, 760, 1128, 4096, 8200, 12288, 65536)
ROWS = (1, 2, 37, 4097)

kernels = interpreters.kernels_of("mosaic_gpu")


# --- how rows are cut -----------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("per_lane", "of_long", "in_warp"),
    [(16, 16, 512), (32, 64, 2048), (32, 160, 2048)],
)
@pytest.mark.parametrize(
    "features",
    [2, 3, 7, 96, 127, 760, 4128, 5120, 8209, 12288, 13824, 32776, 65512, 65535],
)
def test_each_column_counts_once(
    features: int, per_lane: int, of_long: int, in_warp: int, itemsize: int
) -> None:
    """Every load is also aligned, and inside its part of the row."""
    config = tiles.configure(
        features, itemsize, per_lane=per_lane, of_long=of_long, in_warp=in_warp
    )
    counted = np.zeros(features, int)
    for part in range(config.parts):
        first = part * config.width
        for chunk in config.chunks:
            is_last = part == config.parts - 1
            earlier = config.beyond(chunk) if is_last else 0
            start = first + chunk.start - earlier
            end = start + config.lanes * chunk.vector
            assert first <= start < end <= min(first + config.width, features)
            assert start % chunk.vector == features % chunk.vector == 0
            assert chunk.vector * itemsize <= 16
            counted[start + chunk.seen + earlier : end] += 1
    held = sum(config.lanes * chunk.vector for chunk in config.chunks)
    assert held < 1.1 * config.width + config.lanes
    np.testing.assert_array_equal(counted, 1)


def test_lanes_grow_with_the_row() -> None:
    cut = {
        features: (config.lanes, config.warpgroups, config.cluster, config.rows)
        for features in (64, 256, 1024, 2048, 4096, 20480, 20488, 65536)
        for of_long in [tiles.columns_of_long(features, 0, 0)]
        for config in [
            tiles.configure(
                features, 2, per_lane=32, of_long=of_long, in_warp=2048, fill=True
            )
        ]
    }
    assert cut == {
        64: (8, 1, 1, 64),
        256: (8, 1, 1, 16),
        1024: (32, 1, 1, 4),
        2048: (32, 1, 1, 4),
        4096: (128, 1, 1, 1),
        20480: (128, 1, 1, 1),
        20488: (128, 4, 1, 1),
        65536: (128, 4, 2, 1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
def test_the_cut_depends_on_features_and_dtypes_alone(
    features: int, dtype: str
) -> None:
    """The number of rows has no influence: any batch sums a row in the same order."""
    for y_dtype in DTYPES:
        blocks = set()
        for rows in ROWS:
            for call in calls((rows, features), dtype, y_dtype):
                kernel = gpu.plan(call, None)
                assert isinstance(kernel, Kernel), kernel
                assert kernel.name == f"rowwise {call.op}"
                assert isinstance(kernel.launch, functools.partial)
                config = kernel.launch.args[0]
                assert isinstance(config, tiles.Config)
                blocks.add((call.op, config))
        assert len(blocks) == 2


def test_bytes_moved() -> None:
    forward, backward = (gpu.plan(c, None) for c in calls((37, 64), "bfloat16"))
    x, param, statistic = 37 * 64 * 2, 64 * 4, 37 * 4
    assert isinstance(forward, Kernel)
    assert isinstance(backward, Kernel)
    assert forward.bytes_moved == 2 * x + 2 * param + 2 * statistic
    # 37 rows are 2 tiles of 16 and a ragged one, in 2 blocks. Each block writes partial
    # sums of dscale and dbias, which are read once more and reduced.
    assert backward.bytes_moved == 3 * x + param + 2 * statistic + 2 * param * (
        2 + 2 + 1
    )


@pytest.mark.parametrize("lanes", [2, 8, 32])
def test_columns_lie_alike_whatever_the_number_of_rows(lanes: int) -> None:
    """If rows are few, lanes hold copies of them; a row's lanes stay adjacent."""
    pairs = lanes % 4 == 0
    for rows in (1, 2, 4, 8, 16, 32, 64):
        layout = tiles._layout(lanes, 4, rows).kwargs
        assert layout["lane_dims"][-1 - pairs :] == ((-3, -2) if pairs else (-2,))
        assert layout["vector_dim"] == -1
        sizes = [tile[-1] for tile in tiles._layout(lanes, 4, rows).args[0].tiles]
        assert sizes[-2 - pairs :] == [4 * lanes, *([8] * pairs), 4]


# --- what falls back ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (calls((3, 65537), "float32")[1], "65537 features"),
        (calls((3, 1), "float32")[0], "one feature"),
    ],
    ids=["long", "one"],
)
def test_what_falls_back(call: Call, reason: str) -> None:
    answer = gpu.plan(call, None)
    assert isinstance(answer, Fallback)
    assert reason in answer.reason


def test_an_older_gpu_falls_back() -> None:
    """Compiling Mosaic kernels for an older GPU would end the process."""
    call = calls((3, 64), "float32")[0]
    for capability, taken in (("8.0", False), ("8.9", False), ("9.0", True)):
        device = types.SimpleNamespace(compute_capability=capability, core_count=108)
        answer = gpu.plan(call, device)
        assert isinstance(answer, Kernel) is taken
        if isinstance(answer, Fallback):
            assert capability in answer.reason


# --- rows so long that several warpgroups and blocks share them -----------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "features", [5120, 8192, 8209, 10752, 12288, 13824, 16384, 16392]
)
def test_long_rows(features: int) -> None:
    with interpreters.interpreted("mosaic_gpu"), fusednorm.use_backend("mosaic_gpu"):
        case = Case("layer_norm", (3, features))
        x, scale, bias, dy = case.data(1, jnp.dtype("bfloat16"), "float32")
        dy = dy.astype("float32")
        check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)
        assert interpreters.runs == {"rowwise forward": 1, "rowwise backward": 1}


def test_the_last_part_of_a_cluster_begins_earlier(kernels: None) -> None:
    """It counts its columns once. Last parts of other blocks do not begin earlier."""
    call = calls((2, 12296), "float32")[1]
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    config = kernel.launch.args[0]  # type: ignore[attr-defined]
    assert config.cluster > 1
    assert any(map(config.beyond, config.chunks))
    run(Case("layer_norm", (2, 12296)))


def events(jaxpr: Any) -> str:
    """Returns a kernel's fences, and its barriers and stores to device memory."""
    store = r"\w+\[\w+,\w+,\w+\] <-"
    names = rf"inline_mgpu(?=(?:_p)?\[)|barrier_(?:arrive|wait)|{store}"
    found = re.findall(names, str(jaxpr))
    return " ".join("store" if event.endswith("<-") else event for event in found)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (4096, "barrier_arrive barrier_wait"),
        (
            12296,
            "barrier_arrive barrier_wait "
            "store store inline_mgpu barrier_arrive barrier_wait inline_mgpu",
        ),
    ],
)
def test_blocks_of_a_cluster_meet_behind_fences(features: int, expected: str) -> None:
    """Fences precede and follow their barrier. The interpreter works without them.

    The first is behind the stores that the others see, and each sum has 128 bytes.
    """
    call = calls((3, features), "bfloat16")[1]
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    statistic = jax.ShapeDtypeStruct((3, 1), jnp.dtype("float32"))
    operands = (call.dy, call.x, call.scale, None, statistic, statistic)
    jaxpr = jax.make_jaxpr(kernel.launch)(*operands)
    assert events(jaxpr) == expected
    assert ("Ref<gmem>{f32[3,4,32]}" in str(jaxpr)) == ("store" in expected)


@pytest.mark.parametrize(
    ("kind", "features", "blocks", "smaller"),
    [
        ("layer_norm", 8192, 1, 1),
        ("layer_norm", 9216, 1, 2),
        ("layer_norm", 8256, 1, 2),  # lanes have single columns at the end
        ("layer_norm", 12288, 1, 2),
        ("layer_norm", 16384, 2, 2),
        ("rms_norm", 16384, 1, 2),
        ("rms_norm with a bias", 16384, 2, 2),
        ("layer_norm", 65536, 8, 8),
        ("layer_norm", 8193, 1, 2),
    ],
)
def test_sums_in_shared_memory_spare_a_cluster(
    kind: str, features: int, blocks: int, smaller: int
) -> None:
    """They do so in a backward, but not if the device has 99 KB of shared memory."""
    norm = norm_of(Case(kind.removesuffix(" with a bias"), (64, features)))
    wanted = True, True, kind != "rms_norm", False
    call = calls((64, features), "bfloat16")[1]
    call = dataclasses.replace(call, norm=norm, wanted=wanted)
    for shared, expected in ((gpu.SHARED, blocks), (gpu.SMALLER_SHARED, smaller)):
        kernel = rowwise.plan(call, 132, shared)
        assert isinstance(kernel, Kernel)
        config, work, *_ = kernel.launch.args  # type: ignore[attr-defined]
        assert config.cluster == expected
        assert (work.smem > 0) == (shared == gpu.SHARED and features > 8192)


# --- on a real one --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "features", [3, 7, 127, 5120, 9216, 13824, 16384, 20480, 65512, *FEATURES]
)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gpu_values_and_gradients(
    kind: str, features: int, mix: tuple[str, str, str]
) -> None:
    x_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    # float64 NumPy takes a second per 16 million elements.
    for rows in [n for n in (1, 2, 37, 199, 4097) if n * features < 2**22]:
        case = Case(kind, (rows, features))
        x, scale, bias, dy = case.data(0, x_dtype, param_dtype)
        dy = dy.astype(dtype)
        with fusednorm.use_backend("mosaic_gpu"):
            check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [64, 760, 4096, 12288, 65536])
def test_gpu_results_are_bitwise_the_same(features: int) -> None:
    """All results repeat from run to run, and a row's in any batch and place."""
    case = Case("layer_norm", (401, features))
    x, scale, bias, dy = case.data(2, jnp.dtype("bfloat16"), "float32")
    spec = norm_of(case)

    def all_of(rows: slice) -> list[np.ndarray]:
        with fusednorm.use_backend("mosaic_gpu"):
            y, vjp = jax.vjp(
                lambda *args: op.normalize_with_moments(spec, *args),
                *map(jnp.asarray, (x[rows], scale, bias)),
            )
            zeros = [jnp.zeros_like(statistic) for statistic in y[1:]]
            cotangents = (jnp.asarray(dy[rows], y[0].dtype), *zeros)
            return [np.asarray(a) for a in (*y, *vjp(cotangents))]

    whole = all_of(np.s_[:])
    for _ in range(3):
        for again, first in zip(all_of(np.s_[:]), whole, strict=True):
            np.testing.assert_array_equal(again, first)
    for some in (np.s_[200:201], np.s_[133:], np.s_[1:38]):
        for part, expected in zip(all_of(some)[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(part, expected[some])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100003, 64), (16384, 768), (4096, 5120)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_gpu_never_less_accurate_than_flax(shape: tuple[int, int], mean: float) -> None:
    case = Case("layer_norm", shape)
    x, scale, bias, dy = case.data(4, "float32", "float32")
    x = (x + mean).astype("float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    with fusednorm.use_backend("mosaic_gpu"):
        ours = rms_errors(case.run, truth, x, scale, bias, dy)
    theirs = rms_errors(flax_function(case), truth, x, scale, bias, dy)
    assert (ours <= 1.05 * theirs).all(), ours / theirs


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUNTED)
def test_gpu_transformations(name: str) -> None:
    function, _, _ = COUNTED[name]
    rng = np.random.default_rng(15)
    x, dy = (jnp.asarray(rng.normal(0.3, 2, (4, 5, 24)), "float32") for _ in range(2))
    params = jnp.linspace(0.5, 1.5, 24), jnp.linspace(-1.0, 1.0, 24)
    with fusednorm.use_backend("mosaic_gpu"):
        result = jax.jit(function)(x, *params, dy)
    with fusednorm.use_backend("reference"):
        expected = jax.jit(function)(x, *params, dy)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.gpu
def test_gpu_offsets_beyond_31_bits() -> None:
    """The last rows of an array of 2.2 billion elements are right."""
    rows, features = 2**19 + 1, 4100
    x = (
        jnp.zeros((rows, features), "bfloat16")
        .at[-3:]
        .set(np.random.default_rng(3).normal(5, 2, (3, features)).astype(jnp.bfloat16))
    )
    with fusednorm.use_backend("mosaic_gpu"):
        y = jax.jit(lambda x: fusednorm.layer_norm(x)[-3:])(x)
        expected = jax.jit(fusednorm.layer_norm)(x[-3:])
    np.testing.assert_array_equal(y, expected)


def backward_grid(call: Call) -> tuple[tiles.Config, int, int, int]:
    """Returns the config, tile, tiles and blocks of a backward's plan."""
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    config, work, _, processors = kernel.launch.args  # type: ignore[attr-defined]
    rows = call.x.size // config.features
    return config, *tiles.grid(config, rows, 1, processors, work.threads)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [64, 512, 1024, 2048, 2304, 4096, 12288, 65536])
def test_a_backward_fills_the_device(
    features: int, dtype: str, residual: bool, activation: str | None
) -> None:
    """All of the 132 multiprocessors, or nearly all, have a block.

    Of clusters, 29 of 4 blocks or 14 of 8 are sure to be resident.
    """
    _, call = calls((8192, features), dtype)
    norm = dataclasses.replace(call.norm, activation=activation)
    call = dataclasses.replace(call, norm=norm, addend=call.x if residual else None)
    if activation:
        call = dataclasses.replace(call, bias=call.scale)
    config, _, _, blocks = backward_grid(call)
    assert blocks * config.cluster >= {4: 116, 8: 112}.get(config.cluster, 128)


@pytest.mark.parametrize(
    ("examples", "rows", "expected"),
    [
        (1, 65536, 396),  # all that are resident
        (1, 1024, 132),  # each multiprocessor has one, of fewer than 32 rows
        (2, 4096, 128),  # of 32 rows each
        (64, 256, 6),  # in total 384, of 396 that are resident
        (100, 1024, 5),  # with 3 some multiprocessors would have 3 and some 2
        (271, 256, 4),
        (133, 256, 8),  # no other number is more even
        (264, 256, 1),
        (10000, 32, 1),
    ],
)
def test_blocks_of_examples_are_even(examples: int, rows: int, expected: int) -> None:
    config = tiles.configure(1152, 2, per_lane=16, of_long=16, in_warp=512)
    _, _, blocks = tiles.grid(config, rows, examples, 132, 384)
    assert blocks == expected


@pytest.mark.parametrize(
    ("features", "cluster", "processors", "clusters"),
    [
        (12288, 1, 132, 132),
        (16384, 2, 132, 66),
        (32768, 4, 132, 29),  # 31 are the most that an H100 is known to have
        (32768, 4, 148, 33),
        (32768, 4, 16, 4),
        (65536, 8, 132, 14),  # of 15
        (65536, 8, 114, 12),
    ],
)
def test_all_clusters_of_a_grid_are_resident(
    features: int, cluster: int, processors: int, clusters: int
) -> None:
    """A cluster runs on one GPC, so that those of 4 do not fill all multiprocessors."""
    config = tiles.configure(
        features, 4, per_lane=24, of_long=16 if cluster > 1 else 24, in_warp=512
    )
    assert config.cluster == cluster
    assert tiles.grid(config, 10**5, 1, processors, 512)[2] == clusters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [8, 64, 256, 512, 1024, 4096])
def test_warps_of_one_row_share_no_sum(features: int, dtype: str) -> None:
    """The warps would not wait for each other, which no interpreter shows."""
    for rows in range(1, 9):
        config, tile, whole, blocks = backward_grid(calls((rows, features), dtype)[1])
        assert tile <= rows
        assert not tiles.sums_twice(whole, blocks)
    config, tile, whole, blocks = backward_grid(calls((10**6, features), dtype)[1])
    assert tiles.sums_twice(whole, blocks)
    assert config.long or tile >= tiles.WARPS


@pytest.mark.parametrize(
    "shape", [(300, 64), (150, 192), (9, 2048), (9, 9216)], ids=str
)
def test_sums_of_several_batches_of_tiles(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of every two tiles, even of a ragged one, move to shared memory."""
    found: list[bool] = []
    twice = tiles.sums_twice
    monkeypatch.setattr(tiles, "IN_A_ROW", 2)
    monkeypatch.setattr(
        tiles, "sums_twice", lambda *args: found.append(twice(*args)) or found[-1]
    )
    with interpreters.interpreted("mosaic_gpu"), fusednorm.use_backend("mosaic_gpu"):
        run(Case("layer_norm", shape), MIXES[0])
    assert found
    assert all(found)


def test_the_plan_is_that_of_the_platform() -> None:
    call = calls((37, 64), "bfloat16")[0]
    answer = dispatch.plan(call, dispatch.Target(("cuda",)))
    assert isinstance(answer, Kernel)
    assert answer.backend == "mosaic_gpu"


def test_bytes_of_some_on_a_gpu() -> None:
    forward, backward = calls((37, 64), "bfloat16")
    x, param, statistic = 37 * 64 * 2, 64 * 4, 37 * 4
    assert moved(dataclasses.replace(forward, statistics=False)) == (2 * x + 2 * param)
    rms = dataclasses.replace(forward.norm, center=False)
    assert (
        moved(dataclasses.replace(forward, norm=rms)) == 2 * x + 2 * param + statistic
    )
    across = dataclasses.replace(forward.norm, axis_names=("d",))
    half = dataclasses.replace(
        forward, norm=across, scale=None, bias=None, statistics=True
    )
    assert moved(half) == x + 2 * statistic
    half = dataclasses.replace(backward, norm=across)
    assert moved(half) == 2 * x + param + 4 * statistic + 2 * param * (2 + 2 + 1)


@pytest.mark.parametrize("features", [12288, 16384])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_sums_and_a_scale_fit_shared_memory(kind: str, features: int) -> None:
    """The scale is kept where the two levels of sums leave room for it."""
    shape = (4096, features)
    call = calls(shape, "bfloat16")[1]
    if kind == "rms_norm":
        norm = dataclasses.replace(call.norm, center=False)
        call = dataclasses.replace(call, norm=norm, wanted=(True, True, False, False))
    kernel: Any = gpu.plan(call, None)
    statistic = jax.ShapeDtypeStruct((4096, 1), jnp.dtype("float32"))
    mean = statistic if call.norm.center else None
    operands = (call.dy, call.x, call.scale, None, mean, statistic)
    (found,) = traffic.kernels(kernel.launch, *operands)
    assert found.scratch <= gpu.SHARED


@pytest.mark.parametrize(
    ("capability", "clusters"), [("9.0", 1), ("10.0", 1), ("12.0", 2), ("12.1", 2)]
)
def test_the_devices_shared_memory_and_processors(
    capability: str, clusters: int
) -> None:
    """A block has 99 KB from 12.0 on, and blocks fill the device's multiprocessors."""
    call = calls((8192, 12288), "bfloat16")[1]
    device = types.SimpleNamespace(compute_capability=capability, core_count=84)
    kernel = gpu.plan(call, device)
    assert isinstance(kernel, Kernel)
    config, _, _, processors = kernel.launch.args  # type: ignore[attr-defined]
    assert config.cluster == clusters
    assert processors == 84


@pytest.mark.parametrize(
    ("features", "forward", "backward"), [(64, 0, 0), (4096, 2, 1), (65536, 4, 2)]
)
def test_warps_of_long_rows_meet(features: int, forward: int, backward: int) -> None:
    counts = []
    for call in calls((3, features), "bfloat16"):
        kernel: Any = gpu.plan(call, None)
        statistic = jax.ShapeDtypeStruct((3, 1), jnp.dtype("float32"))
        operands = (
            (call.x, call.scale, call.bias)
            if call.op == "forward"
            else (call.dy, call.x, call.scale, None, statistic, statistic)
        )
        jaxpr = jax.make_jaxpr(kernel.launch)(*operands)
        counts.append(str(jaxpr).count("barrier_wait"))
    assert counts == [forward, backward]


@pytest.mark.parametrize(("own", "examples"), [(0, 1), (1, 8)])
def test_bytes_of_sums_of_each_example_on_a_gpu(own: int, examples: int) -> None:
    """Partial sums of each example are written and read, and one sum is written."""
    _, backward = calls((8, 256, 1152), "bfloat16")
    call = dataclasses.replace(backward, own_params=own)
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    config, work, _, processors = kernel.launch.args  # type: ignore[attr-defined]
    rows = 8 * 256
    *_, blocks = tiles.grid(
        config, rows // examples, examples, processors, work.threads
    )
    x, param, statistics = rows * 1152 * 2, 1152 * 4, 2 * rows * 4
    sums = 2 * param * examples * (2 * blocks + 1)
    assert kernel.bytes_moved == 3 * x + param + statistics + sums


# --- groups of channels ---------------------------------------------------------------

GROUPS = [
    Case("group_norm", (37, 24), (("num_groups", 3),)),
    Case("group_norm", (5, 96), (("num_groups", 32),)),
    Case("group_norm", (70, 64), (("num_groups", 2), ("activation", "silu"))),
    Case("rms_norm", (2, 9, 4, 64), OF_HEADS),
    Case("layer_norm", (3, 5, 2, 127), OF_HEADS),
    Case("layer_norm", (1, 3, 760), OF_HEADS),
    Case("layer_norm", (3, 2, 4096), OF_HEADS),
]


@pytest.mark.parametrize("number", range(len(GROUPS)), ids=lambda n: str(GROUPS[n]))
def test_groups_of_channels(kernels: None, number: int) -> None:
    run(GROUPS[number], MIXES[number % len(MIXES)])


def test_a_row_of_a_group_does_not_depend_on_the_others(kernels: None) -> None:
    """Results are bitwise the same for any number of rows and place of the row."""
    case = GROUPS[0]
    x, scale, bias, dy = case.data(3, jnp.dtype("bfloat16"), "float32")

    def all_of(rows: slice) -> list[np.ndarray]:
        y, vjp = jax.vjp(lambda x: case.run(x, scale, bias), jnp.asarray(x[rows]))
        return [np.asarray(a) for a in (y, *vjp(jnp.asarray(dy[rows], y.dtype)))]

    whole = all_of(np.s_[:])
    for some in (np.s_[20:], np.s_[3:33]):
        for part, expected in zip(all_of(some), whole, strict=True):
            np.testing.assert_array_equal(part, expected[some])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids="argnums {}".format)
def test_gradients_of_some_of_groups(kernels: None, wanted: tuple[int, ...]) -> None:
    check_gradients_of(GROUPS[0], wanted)


def test_groups_whose_statistics_cross_devices(kernels: None) -> None:
    """Each device has half of the features of each head, so c1 and c2 are partial."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(7)
    x, dy = (jnp.asarray(rng.normal(0.7, 2, (5, 3, 128)), "float32") for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(1, 0.5, (3, 128)), "float32") for _ in "ab")

    def norm(x: Any, scale: Any, bias: Any) -> Any:
        params = scale.reshape(-1), bias.reshape(-1)
        return fusednorm.layer_norm(x, *params, axis_name="d", **dict(OF_HEADS))

    last = P(None, "d")
    in_specs = (P(None, None, "d"), last, last)
    norm = jax.shard_map(norm, mesh=mesh, in_specs=in_specs, out_specs=in_specs[0])

    found = jax.block_until_ready(jax.jit(both(norm))(x, scale, bias, dy))
    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(norm))(x, scale, bias, dy)
    assert interpreters.runs == {
        "rowwise forward, moments": 2,
        "rowwise backward, sums": 2,
    }
    agree(found, expected)


def test_bytes_of_groups() -> None:
    """The blocks of each group have partial sums of that group's features."""
    forward, backward = calls((37, 96), "bfloat16")
    norm = dataclasses.replace(forward.norm, reduction_axes=(), num_groups=32)
    x, param, statistics = 37 * 96 * 2, 96 * 4, 2 * 37 * 32 * 4
    forward, backward = (
        dataclasses.replace(call, norm=norm) for call in (forward, backward)
    )
    assert moved(forward) == 2 * x + 2 * param + statistics
    config, work, _, processors = gpu.plan(backward, None).launch.args
    *_, blocks = tiles.grid(config, 37, 32, processors, work.threads)
    sums = 2 * 32 * (2 * blocks + 1) * 3 * 4
    assert moved(backward) == 3 * x + param + statistics + sums


@pytest.mark.parametrize("behind", [False, True])
def test_groups_with_a_residual(kernels: None, behind: bool) -> None:
    """Heads take a residual, and a GroupNorm of (batch, channels) takes a shortcut."""
    rng = np.random.default_rng(8)
    shape = (37, 24) if behind else (11, 3, 40)
    x, r, dy, dh = (jnp.asarray(rng.normal(0.5, 2, shape), "float32") for _ in range(4))
    scale = jnp.asarray(rng.normal(1, 0.5, x.size // len(x)), "float32")

    def norm(x: Any, scale: Any, r: Any) -> Any:
        if behind:
            return fusednorm.group_norm(
                x, scale, r, num_groups=3, residual=r, activation="gelu"
            )
        return fusednorm.rms_norm(x, scale, residual=r, **dict(OF_HEADS))

    @jax.jit
    def all_of(x: Any, scale: Any, r: Any) -> Any:
        y, vjp = jax.vjp(norm, x, scale, r)
        return *jax.tree.leaves(y), *vjp(dy if behind else (dy, dh))

    interpreters.runs.clear()
    found = jax.block_until_ready(all_of(x, scale, r))
    assert interpreters.runs == {"rowwise forward": 1, "rowwise backward": 1}
    with fusednorm.use_backend("reference"):
        expected = all_of(x, scale, r)
    agree(found, expected)


def test_a_scale_along_groups_and_rows_falls_back() -> None:
    x = scale = jnp.ones((4, 24))
    norm = functools.partial(fusednorm.group_norm, num_groups=3)
    (choice,) = fusednorm.explain(norm, x, scale).on("cuda").choices
    assert isinstance(choice.plan, Fallback)
    assert "along the groups of a row and from row to row" in choice.plan.reason


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "case",
    [
        *GROUPS,
        Case("group_norm", (4097, 1024), (("num_groups", 32),)),
        Case("rms_norm", (199, 32, 128), OF_HEADS),
        Case("layer_norm", (7, 3, 12288), OF_HEADS),
        Case("layer_norm", (7, 2, 40952), OF_HEADS),
    ],
    ids=str,
)
def test_gpu_groups_of_channels(case: Case, mix: tuple[str, str, str]) -> None:
    x_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    x, scale, bias, dy = case.data(0, x_dtype, param_dtype)
    dy = dy.astype(dtype)
    with fusednorm.use_backend("mosaic_gpu"):
        check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)
