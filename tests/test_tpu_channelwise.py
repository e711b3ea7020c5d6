"""The channelwise kernels of TPUs, run by Pallas' interpreter.

These are the tests of test_channelwise.py, with the TPU's kernels and variants in place
of the GPU's, and tests of what only the TPU's have. Every interpreted launch is checked
for races (tests/on_tpu.py). The interpreter fills the part of a block that lies past
the array with NaN.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusednorm
from fusednorm.kernels import dispatch, tpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, Target
from fusednorm.kernels.tpu import channelwise, memory, pixels
from fusednorm.kernels.tpu.blocks import SUBLANES, order_of_axes
from fusednorm.reference import Norm
from tests import interpreters
from tests.helpers import Case
from tests.on_tpu import Device
from tests.test_channelwise import (  # noqa: F401
    CASES,
    MODELS,
    calls,
    run,
    runs,
    test_a_large_mean_is_right,
    test_a_sample_does_not_depend_on_the_others,
    test_any_shape_and_dtypes,
    test_each_example_has_its_own_gradients,
    test_each_kernel_runs_as_often_as_it_should,
    test_each_variant,
    test_gradients_of_some,
    test_mean_and_variance,
    test_nan_and_inf_stay_in_their_group,
    test_running_statistics_follow_flax,
    test_shapes_of_models,
    test_values_and_gradients,
)
from tests.test_rowwise import MIXES, lowered, run_each_example
from tests.test_tpu_rowwise import moved

kernels = interpreters.kernels_of("mosaic_tpu")


def take_small(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the variant take inputs that would be too small for it."""
    if variant != "one block":  # blocks and chunks of few pixels
        chip = memory.Chip(vmem=2**40, blocks=2**15)
        monkeypatch.setattr(memory, "chip", lambda _: chip)
        registers = {"forward": 2, "backward": 2}
        monkeypatch.setattr(channelwise, "REGISTERS", registers)
    if variant == "two reads":
        real = channelwise._vmem

        def vmem(call: Call, cut: Any, *, normalizes: bool) -> int:
            return 2**50 if normalizes else real(call, cut, normalizes=False)

        monkeypatch.setattr(channelwise, "_vmem", vmem)


def set_variant(
    request: pytest.FixtureRequest, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    variant: str = request.param
    take_small(variant, monkeypatch)
    return variant


variant, every_variant = interpreters.fixtures_of_variants(
    ("kept", "one block", "two reads"), set_variant
)


# --- shapes ---------------------------------------------------------------------------


SHAPES = [
    # Down the sublanes: 20 channels of 300 pixels, and in groups.
    Case("instance_norm", (2, 5, 300, 20)),
    Case("group_norm", (2, 3, 260, 24), (("num_groups", 2),)),
    # More samples than a unit has; groups that do not end with a tile of lanes.
    Case("group_norm", (11, 4, 4, 260), (("num_groups", 26),)),
    Case("group_norm", (3, 14, 14, 140), (("num_groups", 7),)),
    # The batch lies down the sublanes.
    Case("batch_norm", (16, 5, 3, 136)),
    Case("batch_norm", (10, 7, 7, 256)),
    Case("group_norm", (2, 600, 256), (("num_groups", 32),)),
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda n: str(SHAPES[n]))
def test_shapes(variant: str, number: int) -> None:
    run(SHAPES[number], variant, MIXES[number % len(MIXES)])


@pytest.mark.parametrize(
    "case",
    [
        Case("instance_norm", (3, 300, 20)),
        Case("group_norm", (3, 260, 64), (("num_groups", 32),)),
    ],
    ids=str,
)
def test_samples_of_a_block_down_the_sublanes(kernels: None, case: Case) -> None:
    """Each sample of a block has its own statistics."""
    for call in calls(case.kind, case.shape, "float32"):
        cut = planned(call).cut
        assert isinstance(cut, pixels.DownSublanes)
        assert cut.unit > 1
    run(case, "one block")


def test_strips(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a sample does not fit, a unit is 128 channels of several samples."""
    case = Case("group_norm", (3, 160, 256), (("num_groups", 32),))
    chip = memory.Chip(vmem=channelwise.OTHER_BYTES + 600 * 1024, blocks=2**16)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    for call in calls(case.kind, case.shape, "float32"):
        kernel = tpu.plan(call, None)
        assert isinstance(kernel, Kernel)
        assert kernel.block.startswith("128 channels of ")
        assert kernel.name == f"channelwise {call.op}"
    run(case, "kept")


@pytest.mark.parametrize("case", [*CASES, *SHAPES], ids=str)
def test_mosaic_takes_it(case: Case) -> None:
    """Mosaic refuses what the interpreter accepts: vectors of size 0."""
    x, dy = (jax.ShapeDtypeStruct(case.shape, jnp.dtype("bfloat16")) for _ in "xy")
    params = [jax.ShapeDtypeStruct((case.features,), jnp.dtype("float32"))] * 2
    params = params[: case.params + case.has_bias]

    def step(x: Any, dy: Any, *params: Any) -> Any:
        y, vjp = jax.vjp(case.run, x, *params)
        return y, vjp(dy.astype(y.dtype))

    with fusednorm.use_backend("mosaic_tpu"):
        assert lowered("tpu", step, x, dy, *params).count("tpu_custom_call") == 2


# --- two cores ------------------------------------------------------------------------


@pytest.fixture
def two_cores(variant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    chip = dataclasses.replace(memory.chip(None), cores=2)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    return variant


SHARED = [  # 11 samples are 2 units, or 11 units if a block is part of one
    Case("group_norm", (11, 4, 4, 260), (("num_groups", 26),)),
    Case("batch_norm", (6, 5, 4, 384)),  # 3 strips: the last core has one fewer
    Case("instance_norm", (9, 300, 20)),  # down the sublanes
]


@pytest.mark.parametrize("number", range(len(SHARED)), ids=lambda n: str(SHARED[n]))
def test_two_cores(two_cores: str, number: int) -> None:
    """Each core has its own units and partial sums, which are reduced."""
    case, mix = SHARED[number], MIXES[number]
    for call in calls(case.kind, case.shape, mix[0]):
        assert planned(call).cut.cores == 2
    run(case, two_cores, mix)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_two_cores_and_examples(two_cores: str, kind: str) -> None:
    """Of 3 examples of 2 strips each, the first core has none of the last example."""
    options = (("num_groups", 32),) if kind == "group_norm" else ()
    case = Case(kind, (3, 20, 256), options)
    run_each_example(case, runs(two_cores, 1, 1))


def test_two_cores_of_which_one_has_a_unit_less(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One core's last turn has no unit: 17 samples are 3 units of a block each."""
    chip = dataclasses.replace(memory.chip(None), cores=2)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    case = Case("group_norm", (17, 5, 64), (("num_groups", 32),))
    for call in calls(case.kind, case.shape, "float32"):
        cut = planned(call).cut
        assert (cut.cores, cut.units, cut.blocks) == (2, 3, 1)
    run(case, "one block")


def test_one_core_where_two_would_not_both_have_units(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = dataclasses.replace(memory.chip(None), cores=2)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    for kind, shape in (("group_norm", (1, 8, 8, 320)), ("batch_norm", (3, 9, 64))):
        assert all(planned(call).cut.cores == 1 for call in calls(kind, shape))
    run(Case("batch_norm", (3, 9, 64)), "one block")


def planned(call: Call) -> channelwise.Launch:
    kernel = tpu.plan(call, None)
    assert isinstance(kernel, Kernel)
    launch: channelwise.Launch = kernel.launch.__self__  # type: ignore[attr-defined]
    return launch


# --- groups ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "group"),
    [(40, 10), (320, 10), (96, 32), (260, 26), (384, 128), (77, 11), (1024, 256)],
)
@pytest.mark.parametrize("down", [False, True], ids=["lanes", "sublanes"])
def test_sums_of_groups(
    channels: int, group: int, down: bool, monkeypatch: Any
) -> None:
    """NaN and infinity stay in their group; those past the last channel stay there."""
    monkeypatch.setattr(pixels.pltpu, "roll", jnp.roll)
    tile = memory.SUBLANES if down else memory.LANES
    value = np.full((2, memory.round_up(channels, tile)), np.nan, np.float32)
    value[:, :channels] = np.random.default_rng(0).normal(size=(2, channels))
    value[0, group], value[1, 2 * group + group - 1] = np.inf, np.nan
    each = value
    if down:  # the same in all lanes
        each = np.repeat(value[:, :, None], memory.LANES, 2)
    found = np.asarray(pixels.sum_groups(jnp.asarray(each), channels, group))
    if down:
        first = found[:, :, 0]
        np.testing.assert_array_equal(
            found, np.repeat(first[..., None], memory.LANES, 2)
        )
        found = first
    truth = value[:, :channels].astype(np.float64).reshape(2, -1, group).sum(-1)
    truth = np.repeat(truth, group, 1)
    assert np.isnan(truth).any()
    assert np.isfinite(truth).sum() > group
    np.testing.assert_allclose(found[:, :channels], truth, rtol=1e-5, atol=1e-5)


# --- plans ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_models_run_kernels(kind: str, dtype: str) -> None:
    for norm, shape in MODELS:
        for call in calls(norm, shape, dtype):
            answer = tpu.plan(call, Device(kind))
            assert isinstance(answer, Kernel), (norm, shape, answer)
            units = 2 + (call.op == "backward")
            reads = units + (units - 1) * ("two reads" in answer.name)
            size = call.x.size * call.x.dtype.itemsize
            assert reads * size < answer.bytes_moved < 1.25 * reads * size


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        ("group_norm", (64, 64, 320)),
        ("group_norm", (32, 32, 1024)),  # could be cut into strips
        ("instance_norm", (9, 9, 24)),
        # For a single sample, XLA would lay another axis along the sublanes.
        ("group_norm", (7, 7, 32)),
        ("group_norm", (1500, 512)),
        ("instance_norm", (55, 55, 128)),
    ],
)
def test_the_cut_does_not_depend_on_the_number_of_samples(
    norm: str, shape: tuple[int, ...], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = dataclasses.replace(memory.chip(None), cores=cores)
    monkeypatch.setattr(memory, "chip", lambda _: chip)
    cuts = set()
    for n, dtype in itertools.product((1, 2, 37), ("bfloat16", "float32")):
        for call in calls(norm, (n, *shape), dtype):
            launch = planned(call)
            one = dataclasses.replace(launch.cut, samples=1, cores=1)
            cuts.add(
                (call.op, dtype, launch.order, launch.deferred, launch.normalizes, one)
            )
    assert len(cuts) == 4


def test_a_single_sample_is_as_one_of_several(kernels: None) -> None:
    """The results are bitwise equal: an axis of size 1 is no axis of pixels."""
    case = Case("group_norm", (3, 7, 7, 32), (("num_groups", 8),))
    x, scale, bias, dy = map(jnp.asarray, case.data(13, "float32", "float32"))

    def of(some: slice) -> list[jax.Array]:
        y, vjp = jax.vjp(lambda x: case.run(x, scale, bias), x[some])
        return [y, *vjp(dy[some])]

    for alone, among in zip(of(np.s_[1:2]), of(np.s_[:]), strict=True):
        np.testing.assert_array_equal(alone, among[1:2])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        ("batch_norm", (2, 1500, 512)),
        ("group_norm", (4, 1500, 1, 512)),
        ("group_norm", (4, 2, 63, 63, 512)),
    ],
)
def test_registers_are_full_of_pixels(norm: str, shape: tuple[int, ...]) -> None:
    """If XLA has few pixels per tile, the kernel asks for another order of axes."""
    for call in calls(norm, shape, "float32"):
        first = 0 if norm == "batch_norm" else 1
        assert shape[order_of_axes(shape, 4, first)[-2]] < SUBLANES
        assert planned(call).cut.chunk_rows >= SUBLANES
        assert shape[planned(call).order[-2]] >= SUBLANES
        kernel = tpu.plan(call, None)
        assert isinstance(kernel, Kernel)
        assert ("would be copied" in kernel.unless_named) == (len(shape) == 3)


def test_a_chip_with_more_vmem_keeps_more() -> None:
    """A forward BatchNorm of 200 704 pixels: one read on a v5e, two on a v4."""
    forward, backward = calls("batch_norm", (64, 56, 56, 256))
    names = {
        kind: [tpu.plan(call, Device(kind)).name for call in (forward, backward)]  # type: ignore[union-attr]
        for kind in ("TPU v5e", "TPU v4")
    }
    assert names["TPU v5e"] == [
        "channelwise forward",
        "channelwise backward, two reads",
    ]
    assert names["TPU v4"] == [
        "channelwise forward, two reads",
        "channelwise backward, two reads",
    ]


def test_the_blocks_of_a_unit_are_even() -> None:
    """784 slabs: 16 blocks of 49, not of 52, where the last would be mostly empty."""
    _, backward = calls("batch_norm", (199, 28, 28, 512))
    kernel = tpu.plan(backward, Device("TPU v6 lite"))
    assert isinstance(kernel, Kernel)
    assert kernel.name == "channelwise backward"  # the blocks fit VMEM: one read
    assert kernel.block == f"128 channels of {49 * 199} of {784 * 199} pixels"


@pytest.mark.parametrize(
    ("kind", "shape", "is_kernel"),
    [
        ("batch_norm", (8, 14, 14, 64), False),
        ("group_norm", (8, 64, 64, 320), False),
        ("instance_norm", (2, 4, 16, 16, 32), False),  # frames
        ("group_norm", (8, 256, 320), True),  # tokens
        ("batch_norm", (256, 64), True),
    ],
)
def test_images_are_left_to_xla_unless_the_kernels_are_named(
    kind: str, shape: tuple[int, ...], is_kernel: bool
) -> None:
    for call in calls(kind, shape):
        chosen, named = (
            dispatch.plan(call, dispatch.Target(("tpu",)), backend)
            for backend in ("auto", "mosaic_tpu")
        )
        assert isinstance(named, Kernel)
        if is_kernel:
            assert isinstance(chosen, Kernel)
        else:
            assert isinstance(chosen, Fallback)
            assert "XLA fuses the sums into the convolution" in chosen.reason


def test_why() -> None:
    kernel = tpu.plan(calls("group_norm", (8, 64, 64, 320))[0], Device("TPU v5e"))
    assert isinstance(kernel, Kernel)
    assert kernel.block == "320 channels of 2048 of 4096 pixels"
    assert kernel.why == (
        "channels across the lanes; a unit of 2.5 MiB stays in VMEM: one read"
    )
    huge = tpu.plan(calls("group_norm", (1, 16, 90, 160, 320))[0], Device("TPU v5e"))
    assert isinstance(huge, Kernel)
    assert "a unit of 140.6 MiB does not fit in VMEM: two reads" in huge.why


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_scale_or_bias_of_each_sample_falls_back(name: str) -> None:
    call = calls("group_norm", (8, 256, 320))[0]
    own = jax.ShapeDtypeStruct((8, 320), "float32")
    answer = tpu.plan(dataclasses.replace(call, **{name: own}), None)
    assert isinstance(answer, Fallback)
    assert f"whose {name} differs from sample to sample" in answer.reason


def test_examples_of_tokens_are_no_images() -> None:
    """An axis that vmap adds is not an axis of pixels."""
    target = Target(("tpu",))
    x = jax.ShapeDtypeStruct((2, 8, 256, 320), "bfloat16")
    norm = Norm((2,), (3,), num_groups=32, dtype=jnp.dtype("bfloat16"))
    call = Call(
        "backward", norm, x, dy=x, wanted=(True, True, True, False), own_params=1
    )
    assert isinstance(dispatch.plan(call, target), Kernel)
    images = dataclasses.replace(call, own_params=0)
    assert isinstance(dispatch.plan(images, target), Fallback)


def test_a_single_sample_has_a_strip_for_each_core() -> None:
    call = calls("batch_norm", (4096, 256), "float32")[0]
    for cores, width in ((1, 256), (2, 128)):
        kernel = tpu.plan(call, Device("TPU7x", cores))
        assert isinstance(kernel, Kernel)
        assert kernel.block.split(" channels")[0].split()[-1] == str(width)


def test_bytes_of_channels() -> None:
    forward, backward = calls("group_norm", (8, 256, 320))
    x, param, statistics = 8 * 256 * 320 * 2, 320 * 4, 2 * 8 * 320 * 4
    assert moved(forward, "TPU v5e") == 2 * x + 2 * param + statistics
    assert moved(backward, "TPU v5e") == 3 * x + 3 * param + statistics
    _, many = calls("group_norm", (64, 256, 320))
    two = moved(many, "TPU7x", 2)  # each core writes sums, which are read and reduced
    assert two == 8 * (3 * x + statistics) + (1 + 2 * 5) * param
    # XLA reads dx again and dh, and writes their sum.
    carried = dataclasses.replace(backward, addend=backward.x)
    assert moved(carried, "TPU v5e") == 6 * x + 3 * param + statistics
    across = dataclasses.replace(backward.norm, axis_names=("d",))
    half = dataclasses.replace(backward, norm=across)
    assert moved(half, "TPU v5e") == 2 * x + 3 * param + 2 * statistics
