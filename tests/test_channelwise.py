"""The channelwise kernels of NVIDIA GPUs, run by Pallas' interpreter.

Every test names the backend, so that a fallback raises, and the interpreter looks for
races. test_aot_channelwise.py tests what the kernels compile to.
"""

import dataclasses
import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm
from fusednorm.kernels import dispatch, gpu, tpu
from fusednorm.kernels import norm as op
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, Target
from fusednorm.kernels.geometry import Geometry
from fusednorm.kernels.gpu import strips
from tests import interpreters
from tests.helpers import Case, assert_close
from tests.on_tpu import Device
from tests.test_dispatch import counted
from tests.test_rowwise import FLOATS, MIXES, lowered, run_counted, run_each_example
from tests.test_suite import (
    check,
    check_any,
    check_gradients_of,
    flax_function,
    norm_of,
    rms_errors,
)

VARIANTS = ("resident", "cluster", "two reads")


kernels = interpreters.kernels_of("mosaic_gpu")


def take_small(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the variant take inputs that would be too small for it."""
    if variant == "cluster":  # 2 to 8 blocks, each a thread here
        monkeypatch.setattr(strips, "KB", 28)
    if variant == "two reads":
        monkeypatch.setattr(strips, "resident", lambda *_, **__: None)


def set_variant(
    request: pytest.FixtureRequest, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    variant: str = request.param
    take_small(variant, monkeypatch)
    return variant


variant, every_variant = interpreters.fixtures_of_variants(VARIANTS, set_variant)


def runs(variant: str, forward: int, backward: int) -> dict[str, int]:
    end = ", two reads" if variant == "two reads" else ""
    named = {"forward": forward, "backward": backward}
    return {f"channelwise {op}{end}": n for op, n in named.items() if n}


def run(case: Case, variant: str, mix: tuple[str, str, str] = MIXES[0]) -> None:
    """Checks y and all gradients against float64."""
    x_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    x, scale, bias, dy = case.data(0, x_dtype, param_dtype)
    dy = dy.astype(dtype)
    interpreters.runs.clear()
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)
    assert interpreters.runs == runs(variant, 1, 1)


# --- values and gradients -------------------------------------------------------------

CASES = [  # one channel per group, several, or all; ragged pixels and channels
    Case("batch_norm", (6, 5, 4, 10)),
    Case("batch_norm", (41, 33)),
    Case("batch_norm", (3, 2)),
    Case("batch_norm", (1600, 2)),  # 3 blocks in two reads
    Case("instance_norm", (2, 9, 7, 16)),
    Case("instance_norm", (2, 5, 7), params=False),
    Case("group_norm", (3, 7, 5, 24), (("num_groups", 4),)),
    Case("group_norm", (2, 4, 8, 80), (("num_groups", 8), ("epsilon", 0.1))),
    Case("layer_norm", (2, 9, 9, 96), (("reduction_axes", (1, 2, 3)),)),  # a loop
    Case("rms_norm", (2, 37, 24), (("reduction_axes", (1, 2)),)),
    Case("group_norm", (3, 7, 5, 24), (("num_groups", 4), ("activation", "silu"))),
    Case("batch_norm", (6, 5, 4, 10), (("activation", "relu"),)),
    Case("instance_norm", (2, 5, 16), (("activation", "gelu"),), params=False),
    Case("batch_norm", (41, 33), (("activation", "gelu_tanh"), ("epsilon", 0.5))),
]


@pytest.mark.parametrize("number", [0, 10], ids=lambda n: str(CASES[n]))
def test_each_variant(every_variant: str, number: int) -> None:
    run(CASES[number], every_variant, MIXES[number % len(MIXES)])


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_values_and_gradients(variant: str, number: int) -> None:
    run(CASES[number], variant, MIXES[number % len(MIXES)])


def test_strips_of_groups(kernels: None) -> None:
    """Each strip writes the statistics of its own groups."""
    case = Case("group_norm", (2, 32, 64), (("num_groups", 32),))
    for call in calls(case.kind, case.shape, "float32"):
        kernel = gpu.plan(call, None)
        assert isinstance(kernel, Kernel)
        config = kernel.launch.args[0]  # type: ignore[attr-defined]
        assert config.strips > 1
        assert config.group > 1
    run(case, "resident")


def test_a_ragged_line_that_is_loaded_alone(kernels: None) -> None:
    """Most places of this line count no pixel, and without a pixel there is no mean."""
    case = Case("instance_norm", (1, 129, 64))
    forward, _ = calls(case.kind, case.shape, "float32")
    kernel = gpu.plan(forward, None)
    assert isinstance(kernel, Kernel)
    config = kernel.launch.args[0]  # type: ignore[attr-defined]
    whole = config.pixels // config.workers // config.line
    assert whole % config.lines_at_once == 0
    assert config.lines == whole + 1
    run(case, "resident")


def test_three_blocks_in_two_reads(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks' results take two lines, and the second one overlaps the first.

    Each block has 256 pixels or more.
    """
    take_small("two reads", monkeypatch)
    options = (("epsilon", 0.5), ("activation", "silu"))
    run(Case("instance_norm", (2, 770, 4), options), "two reads")


def test_groups_of_two_channels_in_two_reads(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each channel finds the statistics of its own group."""
    take_small("two reads", monkeypatch)
    run(Case("group_norm", (2, 9, 5, 8), (("num_groups", 4),)), "two reads")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", (2, 14, 14, 64)),
        Case("batch_norm", (8, 7, 7, 128)),
        Case("group_norm", (2, 16, 16, 80), (("num_groups", 8),)),
        Case("group_norm", (1, 8, 8, 320), (("num_groups", 32),)),
        Case("instance_norm", (1, 32, 32, 16)),
        Case("layer_norm", (2, 9, 11, 96), (("reduction_axes", (1, 2, 3)),)),
    ],
    ids=str,
)
def test_shapes_of_models(variant: str, case: Case) -> None:
    run(case, variant, MIXES[1])


@st.composite
def pixels_and_channels(draw: st.DrawFn) -> Case:
    batch, pixels = draw(st.integers(1, 3)), draw(st.integers(2, 70))
    groups, channels = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    params = draw(st.booleans())
    shape = (batch, pixels, groups * channels)
    kind = draw(st.sampled_from(["group_norm", "instance_norm", "batch_norm"]))
    options = (("num_groups", groups),) if kind == "group_norm" else ()
    return Case(kind, shape, options, params=params)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    case=pixels_and_channels(), dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3)
)
def test_any_shape_and_dtypes(variant: str, case: Case, dtypes: tuple) -> None:
    check_any(case, *dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [10, 1000, 5000])
def test_a_large_mean_is_right(variant: str, ratio: int) -> None:
    case = Case("group_norm", (2, 70, 16), (("num_groups", 4),))
    _, scale, bias, dy = case.data(1, "float32", "float32")
    rng = np.random.default_rng(2)
    x = (rng.normal(0, 0.5, case.shape) + 0.5 * ratio).astype("float32")
    dy = dy.astype("float32")
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8]], ids=str)
def test_mean_and_variance(variant: str, case: Case) -> None:
    """BatchNorm's running statistics are made of this mean and variance."""
    x, scale, bias, dy = case.data(5, "float32", "float32")
    truth = case.truth(x, scale, bias, dy)
    params = [None if p is None else jnp.asarray(p) for p in (scale, bias)]
    _, mean, var = op.normalize_with_moments(norm_of(case), jnp.asarray(x), *params)
    assert_close(var, truth.var, truth.bounds["var"])
    if norm_of(case).center:
        assert_close(mean, truth.mean, truth.bounds["mean"])
    else:
        assert mean is None
    assert interpreters.runs == runs(variant, 1, 0)


def test_running_statistics_follow_flax(kernels: None) -> None:
    x = jnp.asarray(np.random.default_rng(3).normal(0.5, 2, (4, 6, 5, 24)), "float32")
    ours = fusednorm.BatchNorm(24, momentum=0.9, rngs=nnx.Rngs(0))
    theirs = nnx.BatchNorm(24, momentum=0.9, rngs=nnx.Rngs(0))
    for _ in range(2):
        np.testing.assert_allclose(ours(x), theirs(x), atol=2e-5)
    assert interpreters.runs == runs("resident", 2, 0)
    for name in ("mean", "var"):
        mine, its = getattr(ours, name)[...], getattr(theirs, name)[...]
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, its, rtol=1e-5)


# --- what is wanted -------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids="argnums {}".format)
def test_gradients_of_some(variant: str, wanted: tuple[int, ...]) -> None:
    case = Case("group_norm", (2, 37, 24), (("num_groups", 4),))
    check_gradients_of(case, wanted)
    if wanted[0]:  # without dx nothing is read twice
        assert interpreters.runs["channelwise backward, sums"] == 1


@pytest.mark.slow
def test_each_example_has_its_own_gradients(variant: str) -> None:
    case = Case("group_norm", (2, 10, 12), (("num_groups", 3),))
    run_each_example(case, runs(variant, 1, 1))


# --- under the transformations --------------------------------------------------------

GROUP_NORM = counted(functools.partial(fusednorm.group_norm, num_groups=4))


OFTEN = ("value", "grad", "scan", "vmap of grad")  # `make test-slow` runs the rest


@pytest.mark.parametrize(
    "name",
    [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in GROUP_NORM],
)
def test_each_kernel_runs_as_often_as_it_should(name: str, kernels: None) -> None:
    """If vmap takes the first axis, each of its examples still has a batch axis."""
    run_counted("channelwise", GROUP_NORM[name], (2, 3, 5, 24))


# --- samples and channels keep to themselves ------------------------------------------


def _all_of(case: Case, x: Any, dy: Any, *params: Any) -> list[np.ndarray]:
    """Returns y, mean, var and dx."""
    y, vjp = jax.vjp(
        lambda x: op.normalize_with_moments(norm_of(case), x, *params), jnp.asarray(x)
    )
    zeros = [jnp.zeros_like(statistic) for statistic in y[1:]]
    cotangents = (jnp.asarray(dy, y[0].dtype), *zeros)
    return [np.asarray(a) for a in (*y, *vjp(cotangents))]


@pytest.mark.parametrize("kind", ["group_norm", "batch_norm"])
def test_nan_and_inf_stay_in_their_group(variant: str, kind: str) -> None:
    options = (("num_groups", 4),) if kind == "group_norm" else ()
    case = Case(kind, (3, 19, 24), options)
    x, scale, bias, dy = case.data(12, "float32", "float32")
    bad = x.copy()
    bad[1, 18, 7], bad[2, 3, 20] = np.nan, np.inf
    # The groups of 6 channels, or the channels, of these two values.
    touched = np.zeros(case.shape, bool)
    if kind == "group_norm":
        touched[1, ..., 6:12] = touched[2, ..., 18:24] = True
    else:
        touched[..., 7] = touched[..., 20] = True
    clean, poisoned = (_all_of(case, a, dy, scale, bias) for a in (x, bad))
    for before, after in zip(clean, poisoned, strict=True):
        assert np.isfinite(before).all()  # or NaN would equal NaN below
        if before.shape != case.shape:
            continue
        np.testing.assert_array_equal(before[~touched], after[~touched])
        assert np.isnan(after[1, 18, 7])
        assert not np.isfinite(after[2, 3, 20])


def test_a_sample_does_not_depend_on_the_others(variant: str) -> None:
    """A sample's results are bitwise the same for any number and order of samples."""
    case = Case("group_norm", (4, 70, 24), (("num_groups", 4),))
    x, scale, bias, dy = case.data(13, jnp.dtype("bfloat16"), "float32")
    whole = _all_of(case, x, dy, scale, bias)
    for some in (np.s_[2:3], np.s_[1:]):
        for part, expected in zip(
            _all_of(case, x[some], dy[some], scale, bias), whole, strict=True
        ):
            np.testing.assert_array_equal(part, expected[some])


# --- plans ----------------------------------------------------------------------------


def calls(kind: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> list[Call]:
    """Returns the forward of a norm in training, and its backward."""
    options = (("num_groups", 32),) if kind == "group_norm" else ()
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    norm = dataclasses.replace(norm_of(Case(kind, shape, options)), dtype=x.dtype)
    param = jax.ShapeDtypeStruct(shape[-1:], jnp.dtype("float32"))
    return [
        Call("forward", norm, x, param, param, statistics=True),
        Call("backward", norm, x, param, dy=x),
    ]


MODELS = [
    *[
        ("batch_norm", (n, *stage))
        for n in (1, 8, 64)
        for stage in ((56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048))
    ],
    *[
        ("group_norm", (n, *level))
        for n in (1, 8)
        for level in ((64, 64, 320), (32, 32, 640), (16, 16, 1280), (8, 8, 1280))
    ],
    *[("group_norm", (1, s, s, c)) for s, c in ((512, 128), (256, 256), (128, 512))],
    ("instance_norm", (2, 256, 256, 64)),
    ("group_norm", (1, 16, 90, 160, 320)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "shape"), MODELS)
def test_models_run_kernels(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    for call in calls(kind, shape, dtype):
        answer = dispatch.plan(call, Target(("cuda",)))
        assert isinstance(answer, Kernel), answer
        assert answer.name.startswith(f"channelwise {call.op}")
        units = 2 + (call.op == "backward")
        reads = units + (units - 1) * ("two reads" in answer.name)
        size = call.x.size * call.x.dtype.itemsize
        assert reads * size < answer.bytes_moved < 1.25 * reads * size


@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
@pytest.mark.parametrize("pixels", [2, 3, 49, 196, 4096, 50176])
@pytest.mark.parametrize(("groups", "group"), [(32, 10), (32, 40), (256, 1), (33, 1)])
def test_each_pixel_and_channel_counts_once(
    groups: int, group: int, pixels: int, shared: int
) -> None:
    """Strips cover all channels, and a worker's loads stay inside its own pixels."""
    view = Geometry(3, pixels, groups, group)
    cuts = [
        *(
            strips.resident(
                view, 2, [2], shared, cluster=8, one_sample=False, load=load
            )
            for load in (8, 16)
        ),
        *(strips.in_two_reads(view, 2, shared, arrays=1, load=16) or ()),
    ]
    for config in filter(None, cuts):
        assert config.strips * config.width == view.features
        columns = np.zeros(config.width, int)
        for chunk in config.chunks:
            end = chunk.start + config.lanes * chunk.vector
            assert 0 <= chunk.start < end <= config.width
            columns[chunk.start : end] += 1
        assert (columns > 0).all()
        counts = [config.count(block) for block in range(config.blocks)]
        assert sum(counts) == config.pixels
        for worker in range(config.workers):
            own = config.first(worker + 1) - config.first(worker)
            assert config.line <= own <= config.lines * config.line
        assert config.shared(()) <= shared


@pytest.mark.parametrize(
    ("pixels", "channels", "kept", "width", "blocks"),
    [
        (8 * 28 * 28, 512, 2, 32, 8),  # two sectors
        (8 * 7 * 7, 2048, 4, 16, 1),  # two would make clusters
        (28 * 28, 512, 2, 16, 1),
        (9, 8, 2, 8, 1),  # all channels
    ],
)
def test_the_cut_of_batch_norms(
    pixels: int, channels: int, kept: int, width: int, blocks: int
) -> None:
    view = Geometry(1, pixels, channels, 1)
    config = strips.resident(
        view, 2, [kept], gpu.SHARED, cluster=8, one_sample=True, load=16
    )
    assert config is not None
    assert (config.width, config.blocks) == (width, blocks)


@pytest.mark.parametrize(
    ("pixels", "channels", "itemsize", "width", "blocks", "warpgroups"),
    [
        (64 * 64, 320, 4, 40, 8, 2),  # whole lines of the L1 cache, aligned: 4 groups
        (32 * 32, 640, 2, 80, 2, 2),  # 80 KB
        (16 * 16, 1280, 4, 40, 1, 1),  # 40 KB: no cluster
        (8 * 8, 1280, 2, 160, 1, 1),  # 20 KB
        (2 * 2, 1280, 2, 320, 1, 1),  # no more than 8 groups
        (128 * 128, 512, 2, None, None, None),  # 64 bytes per pixel do not fit
    ],
)
def test_the_cut_of_group_norms(
    pixels: int,
    channels: int,
    itemsize: int,
    width: int | None,
    blocks: int | None,
    warpgroups: int | None,
) -> None:
    view = Geometry(8, pixels, 32, channels // 32)
    config = strips.resident(
        view, itemsize, [itemsize], gpu.SHARED, cluster=8, one_sample=False, load=16
    )
    found = config and (config.width, config.blocks, config.warpgroups)
    assert found == (None if width is None else (width, blocks, warpgroups))


def test_the_cut_does_not_depend_on_the_number_of_samples() -> None:
    for kind, shape in (("group_norm", (64, 64, 320)), ("instance_norm", (9, 9, 24))):
        cuts = {
            (call.op, kernel.launch.args[0])  # type: ignore[attr-defined]
            for n in (1, 2, 37)
            for call in calls(kind, (n, *shape))
            if isinstance(kernel := gpu.plan(call, None), Kernel)
        }
        assert len(cuts) == 2


def test_what_falls_back() -> None:
    many = calls("batch_norm", (4, 5, 5, 1019))[0]
    wide = calls("group_norm", (4, 9, 9, 40960))[0]  # strips of 64 would divide it
    for call, channels, group in ((many, 1019, 1), (wide, 40960, 1280)):
        answer = dispatch.plan(call, Target(("cuda",)))
        assert isinstance(answer, Fallback)
        assert f"{channels} channels in groups of {group}: no strip" in answer.reason
        assert "or a group takes more than 8 loads or 232,448 bytes" in answer.reason
    for one in calls("batch_norm", (32, 28, 28, 1)):  # no two lanes have work
        assert dispatch.plan(one, Target(("cuda",))) == Fallback("one channel")


def test_why() -> None:
    call = calls("group_norm", (8, 64, 64, 320))[0]
    whole, huge = (
        gpu.plan(c, None) for c in (call, calls("batch_norm", (64, 56, 56, 256))[0])
    )
    assert isinstance(whole, Kernel)
    assert isinstance(huge, Kernel)
    assert whole.why == "8 blocks keep 640 KB on the chip: one read"
    assert "200704 pixels do not fit the shared memory of 8 blocks" in huge.why
    twice = gpu.plan(calls("group_norm", (8, 64, 64, 320))[1], None)
    assert isinstance(twice, Kernel)
    assert "4096 pixels do not fit the shared memory of 2 blocks" in twice.why


# --- lowered for a GPU ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "groups", "launched"),
    [
        ((2, 32, 32, 64), 32, 2),
        ((2, 64, 64, 64), 32, 3),  # two for the backward
        ((1, 512, 512, 128), 32, 4),
        ((2, 9, 8), 1, 2),  # one load holds all channels
    ],
)
def test_launches(shape: tuple[int, ...], groups: int, launched: int) -> None:
    """Each direction is one launch if x stays on the chip, else two."""

    def step(x: Any, scale: Any, bias: Any) -> Any:
        norm = functools.partial(fusednorm.group_norm, num_groups=groups)
        y, vjp = jax.vjp(norm, x, scale, bias)
        return y, vjp(y)

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    param = jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16)
    assert lowered("cuda", step, x, param, param).count("mosaic_gpu_v2") == launched


@pytest.mark.parametrize(
    ("shape", "barriers", "fences"), [((2, 8, 8, 64), 4, 0), ((2, 64, 64, 64), 7, 2)]
)
def test_warps_and_blocks_meet(shape: Any, barriers: int, fences: int) -> None:
    """Warps meet at barriers, and blocks between two fences.

    Warps meet twice for the moments and twice for the groups. The blocks of a cluster
    meet once, and the warps twice more for the blocks' results. The first fence is
    behind what the blocks store for each other. The interpreter would miss an error
    here, because it runs a warpgroup as one thread and in order.
    """
    call = calls("group_norm", shape)[0]
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    jaxpr = jax.make_jaxpr(kernel.launch)(call.x, call.scale, call.bias)
    names = r"\b(?:store(?=\[)|inline_mgpu(?=(?:_p)?\[)|barrier_(?:arrive|wait))"
    events = re.findall(names, str(jaxpr))
    assert events.count("barrier_wait") == barriers
    assert events.count("inline_mgpu") == fences
    meeting = "store store inline_mgpu barrier_arrive barrier_wait inline_mgpu"
    assert (meeting in " ".join(events)) == (fences > 0)


def test_four_groups_are_summed_side_by_side() -> None:
    """One group per warp: as many reductions as a single group takes.

    A strip of 160 channels has four groups of 40, in two loads each. Means and squares
    are summed over pixels, and over groups.
    """
    call = calls("group_norm", (2, 8, 8, 1280))[0]
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    assert kernel.block == "160 channels of 64 pixels"
    jaxpr = str(jax.make_jaxpr(kernel.launch)(call.x, call.scale, call.bias))
    assert len(re.findall(r"reduce_sum\[", jaxpr)) == 2 * 2 + 2 * 2


# --- on a real one --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case("batch_norm", (8, 14, 14, 1024)),
        Case("batch_norm", (16, 56, 56, 64)),
        Case("group_norm", (2, 64, 64, 320), (("num_groups", 32),)),
        Case("group_norm", (2, 8, 8, 1280), (("num_groups", 32),)),
        Case("group_norm", (1, 256, 256, 64), (("num_groups", 32),)),
        Case("instance_norm", (1, 256, 256, 32)),
    ],
    ids=str,
)
def test_gpu_values_and_gradients(case: Case, mix: tuple[str, str, str]) -> None:
    x_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    x, scale, bias, dy = case.data(0, x_dtype, param_dtype)
    dy = dy.astype(dtype)
    with fusednorm.use_backend("mosaic_gpu"):
        check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [64, 4096, 65536])
def test_gpu_results_are_bitwise_the_same(pixels: int) -> None:
    """All results repeat from run to run, and a sample's repeat in any batch."""
    case = Case("group_norm", (5, pixels, 64), (("num_groups", 32),))
    x, scale, bias, dy = case.data(2, jnp.dtype("bfloat16"), "float32")
    with fusednorm.use_backend("mosaic_gpu"):
        whole = _all_of(case, x, dy, scale, bias)
        for _ in range(3):
            for again, first in zip(
                _all_of(case, x, dy, scale, bias), whole, strict=True
            ):
                np.testing.assert_array_equal(again, first)
        for part, expected in zip(
            _all_of(case, x[2:], dy[2:], scale, bias), whole, strict=True
        ):
            np.testing.assert_array_equal(part, expected[2:])


@pytest.mark.gpu
def test_gpu_never_less_accurate_than_flax() -> None:
    """The RMS error against float64 is at most 1.05 times flax's.

    It is taken over a thousand statistics.
    """
    case = Case("group_norm", (32, 256, 256), (("num_groups", 32),))
    x, scale, bias, dy = case.data(17, "float32", "float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    with fusednorm.use_backend("mosaic_gpu"):
        ours = rms_errors(case.run, truth, x, scale, bias, dy)
    theirs = rms_errors(flax_function(case), truth, x, scale, bias, dy)
    assert (ours <= 1.05 * theirs).all(), ours / theirs


def moved(call: Call) -> int:
    kernel = gpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    return kernel.bytes_moved


def test_bytes_of_channels_on_a_gpu() -> None:
    forward, backward = calls("group_norm", (8, 16, 16, 320))
    x, param, statistics = 8 * 16 * 16 * 320 * 2, 320 * 4, 2 * 8 * 32 * 4
    of_samples = (2 * 8 + 1) * param  # written, read and reduced
    assert moved(forward) == 2 * x + 2 * param + statistics
    assert moved(backward) == 3 * x + param + statistics + 2 * of_samples
    carried = dataclasses.replace(backward, addend=backward.x)
    assert moved(carried) == moved(backward) + x
    of_each = dataclasses.replace(backward, own_params=1)  # not reduced
    assert moved(of_each) == moved(backward) - 2 * of_samples + 2 * 8 * param
    across = dataclasses.replace(backward.norm, axis_names=("d",))
    half = dataclasses.replace(backward, norm=across)
    kernel = gpu.plan(half, None)
    assert isinstance(kernel, Kernel)
    config = kernel.launch.args[0]  # type: ignore[attr-defined]
    partials = 2 * 2 * 8 * config.blocks * param
    assert kernel.bytes_moved == (
        2 * x + param + 2 * statistics + 2 * of_samples + partials
    )
    alone = dataclasses.replace(backward, wanted=(False, True, True, False))
    assert moved(alone) == (2 * x + param + statistics + 2 * of_samples + partials)
    one = dataclasses.replace(backward, wanted=(False, True, False, False))
    assert moved(one) == 2 * x + param + statistics + of_samples + partials // 2


TWO_READS = {  # plan for an absent chip, and a shape
    "mosaic_gpu": (lambda call: gpu.plan(call, None), (2, 128, 128, 320)),
    "mosaic_tpu": (
        lambda call: tpu.plan(call, Device("TPU v5e")),
        (1, 16, 90, 160, 320),
    ),
}


@pytest.mark.parametrize(("activation", "tensors"), [("relu", 7), ("silu", 8)])
@pytest.mark.parametrize("backend", TWO_READS)
def test_bytes_of_a_shortcut_in_two_reads(
    backend: str, activation: str, tensors: int
) -> None:
    """SiLU's dz is recomputed from dy and the shortcut; ReLU's is read as it is."""
    plan, shape = TWO_READS[backend]
    _, backward = calls("group_norm", shape)
    kernel = plan(
        dataclasses.replace(
            backward,
            norm=dataclasses.replace(backward.norm, activation=activation),
            shortcut=backward.x,
            bias=backward.scale,
            wanted=(True, True, True, True),
        )
    )
    assert isinstance(kernel, Kernel)
    assert kernel.name.endswith("two reads")
    x = backward.x.size * 2
    assert tensors <= kernel.bytes_moved / x < tensors + 0.1


@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 32), (1, 9, 5, 32), (1, 40, 20, 32)], ids=str
)
def test_a_mean_whose_square_is_infinite(backend: str, shape: tuple[int, ...]) -> None:
    """Lanes that have seen no pixel count 0 times, not infinity times 0."""
    case = Case("group_norm", shape, (("num_groups", 8),))
    x, scale, bias, dy = case.data(15, "float32", "float32")
    x = (3e19 + 5e16 * x).astype("float32")
    truth = case.truth(x, scale, bias, dy)
    with interpreters.interpreted(backend), fusednorm.use_backend(backend):
        y, vjp = jax.vjp(lambda x: case.run(x, scale, bias), jnp.asarray(x))
        (dx,) = vjp(jnp.asarray(dy))
    assert_close(y, truth.y, truth.bounds["y"])
    assert np.all(np.isfinite(dx))
