"""The rowwise kernels of both chips, run by Pallas' interpreters.

Every test names the backend, so that a fallback raises, and the interpreters look for
races. test_gpu_rowwise.py and test_tpu_rowwise.py test what only one of the chips has.
"""

import collections
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm.kernels import dispatch
from fusednorm.kernels import norm as op
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, Target
from fusednorm.reference import Norm
from tests import interpreters
from tests.helpers import EPS32, Case, assert_close, slow_but
from tests.test_dispatch import COUNTED
from tests.test_suite import (
    check,
    check_any,
    check_gradients_of,
    flax_function,
    norm_of,
    rms_errors,
)

MIXES = [  # dtypes of x, scale and bias, y
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float32", "float16"),
    ("float32", "float16", "bfloat16"),
]


# Options of a norm over heads that each have their own scale.
OF_HEADS = (("reduction_axes", -1), ("feature_axes", (-2, -1)))

kernels = interpreters.kernels_of_each_chip


def run(case: Case, mix: tuple[str, str, str] = MIXES[0], seed: int = 0) -> None:
    """Checks y and all gradients against float64, with one kernel each way."""
    x_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    x, scale, bias, dy = case.data(seed, x_dtype, param_dtype)
    dy = dy.astype(dtype)
    interpreters.runs.clear()
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)
    assert interpreters.runs == {"rowwise forward": 1, "rowwise backward": 1}


ONE_EACH_WAY = {"rowwise forward": 1, "rowwise backward": 1}


def run_each_example(
    case: Case, runs: dict[str, int] = ONE_EACH_WAY, *, examples: int = 3
) -> None:
    """Checks each example's own dx, dscale and dbias, and the number of runs."""
    each = [case.data(8 + i, "float32", "float32") for i in range(examples)]
    x, dy = (
        jnp.stack([jnp.asarray(data[i], "float32") for data in each]) for i in (0, 3)
    )
    scale, bias = map(jnp.asarray, each[0][1:3])

    def loss(x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        return jnp.vdot(dy, case.run(x, scale, bias))

    of_each = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None, 0))
    gradients = jax.jit(of_each)(x, scale, bias, dy)
    assert interpreters.runs == runs
    for example in range(examples):
        truth = case.truth(x[example], scale, bias, dy[example])
        for name, gradient in zip(("dx", "dscale", "dbias"), gradients, strict=True):
            assert_close(gradient[example], getattr(truth, name), truth.bounds[name])


def calls(shape: tuple[int, ...], dtype: str, y_dtype: str = "") -> list[Call]:
    """Returns the forward of a LayerNorm in training, and its backward."""
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    y = jax.ShapeDtypeStruct(shape, jnp.dtype(y_dtype or dtype))
    param = jax.ShapeDtypeStruct(shape[-1:], jnp.dtype("float32"))
    last = (len(shape) - 1,)
    norm = Norm(last, last, dtype=y.dtype)
    return [
        Call("forward", norm, x, param, param, statistics=True),
        Call("backward", norm, x, param, dy=y),
    ]


# --- values and gradients -------------------------------------------------------------

# Numbers of rows around every tile size. Each row length runs in one of the mixes.
SHAPES = [
    (37, 7),
    (2, 64),
    (199, 64),
    (5, 127),
    (1, 128),
    (37, 192),
    (3, 760),
    (7, 1128),
    (2, 4096),
]


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda n: f"{SHAPES[n]}")
def test_values_and_gradients(kernels: str, number: int) -> None:
    kind = "rms_norm" if number % 3 == 1 else "layer_norm"
    run(Case(kind, SHAPES[number]), MIXES[number % len(MIXES)])


@pytest.mark.parametrize(
    ("kind", "shape", "activation"),
    [
        pytest.param("layer_norm", (37, 64), "relu", marks=pytest.mark.slow),
        ("layer_norm", (5, 127), "silu"),
        ("rms_norm", (37, 192), "gelu"),
        pytest.param("layer_norm", (7, 1128), "gelu_tanh", marks=pytest.mark.slow),
    ],
)
def test_activations(
    kernels: str, kind: str, shape: tuple[int, int], activation: str
) -> None:
    number = shape[1]
    run(Case(kind, shape, (("activation", activation),)), MIXES[number % len(MIXES)])


# Maximum features by number of rows. The interpreters take 20 ms or more per tile and
# warpgroup. Cases that take over 5 seconds are left to a GPU: 4097 rows of more than 64
# features, 199 of 4096, 37 of 8200.
MOST_FEATURES = {1: 8200, 2: 8200, 37: 4096, 199: 1128, 4097: 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "rows"),
    [
        (features, rows)
        for features in (7, 64, 127, 128, 192, 760, 1128, 4096, 8200)
        for rows, most in MOST_FEATURES.items()
        if features <= most
    ],
)
def test_every_shape(kernels: str, features: int, rows: int) -> None:
    number = features + rows  # chooses a mix and a kind
    kind = "rms_norm" if number % 2 else "layer_norm"
    run(Case(kind, (rows, features)), MIXES[number % len(MIXES)])


@st.composite
def rows_of_any_length(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 70)), draw(st.integers(2, 700)))
    kind = draw(st.sampled_from(["layer_norm", "rms_norm"]))
    return Case(kind, shape, params=draw(st.booleans()))


FLOATS = [jnp.dtype(name) for name in ("float32", "bfloat16", "float16")]


@pytest.mark.slow
@hypothesis.settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    case=rows_of_any_length(), dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3)
)
def test_any_shape_and_dtypes(kernels: str, case: Case, dtypes: tuple) -> None:
    check_any(case, *dtypes)


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (2, 2, 3, 760)),
        Case("layer_norm", (7, 5, 6), (("reduction_axes", (1, 2)),), params=False),
        Case("layer_norm", (1, 9, 1, 300)),
        Case("group_norm", (9, 24), (("num_groups", 3),), params=False),
        Case("layer_norm", (2, 33), params=False),
        Case("layer_norm", (300,)),
    ],
    ids=str,
)
def test_shapes_that_become_rows(kernels: str, case: Case) -> None:
    run(case)


@pytest.mark.parametrize("ratio", [10, 1000, 5000])
def test_a_large_mean_is_right(kernels: str, ratio: int) -> None:
    """y and the mean are accurate even if the mean is large.

    y is within 16 roundings. There is no allowance for the mean, which is corrected on
    chip. The saved mean is within one rounding. Gradients start from it, in float32.
    """
    case = Case("layer_norm", (5, 768))
    _, scale, bias, dy = case.data(3, "float32", "float32")
    x = np.random.default_rng(3).normal(0.5 * ratio, 0.5, case.shape).astype("float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    check(case, truth, x, scale, bias, dy)
    x_hat = (x - truth.mean) / np.sqrt(truth.var + case.epsilon)
    strict = 16 * EPS32 * (np.abs(x_hat * scale) + np.abs(bias))
    given = map(jnp.asarray, (x, scale, bias))
    y, mean, _ = op.normalize_with_moments(norm_of(case), *given)
    assert_close(y, truth.y, strict)
    assert_close(mean, truth.mean, 0.5 * EPS32 * np.abs(truth.mean))


def test_epsilon_is_added_to_the_variance(kernels: str) -> None:
    """Epsilon is not added to the root of the variance."""
    run(Case("layer_norm", (5, 40), (("epsilon", 0.5),)))


@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
def test_a_constant_row_gives_the_bias(kernels: str, value: float) -> None:
    case = Case("layer_norm", (4, 760))
    x, scale, bias, dy = case.data(4, "float32", "float32")
    x[2] = value
    dy = dy.astype("float32")
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


def test_a_constant_row_of_any_size_has_a_variance(kernels: str) -> None:
    """The variance is 0 or above, and never NaN, whatever the constant."""
    case = Case("layer_norm", (64, 760), params=False)
    rng = np.random.default_rng(16)
    constants = rng.normal(size=(64, 1)) * 10.0 ** rng.uniform(-3, 18, (64, 1))
    x = np.broadcast_to(constants.astype("float32"), case.shape)
    y, mean, var = op.normalize_with_moments(norm_of(case), jnp.asarray(x))
    np.testing.assert_allclose(mean, x[:, :1], rtol=1e-6)
    assert (np.asarray(var) >= 0).all()
    # The square of the mean's error is subtracted; only its rounding error is left.
    assert (np.asarray(var) <= (1e-9 * x[:, :1]) ** 2).all()
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize(
    "case", [Case("layer_norm", (70, 96)), Case("rms_norm", (2, 40))], ids=str
)
def test_mean_and_variance(kernels: str, case: Case) -> None:
    x, scale, bias, dy = case.data(5, "float32", "float32")
    truth = case.truth(x, scale, bias, dy)
    _, mean, var = op.normalize_with_moments(norm_of(case), jnp.asarray(x))
    assert_close(var, truth.var, truth.bounds["var"])
    if case.kind == "layer_norm":
        assert_close(mean, truth.mean, truth.bounds["mean"])
    else:
        assert mean is None


@pytest.mark.parametrize(
    ("kind", "mean"),
    [
        ("layer_norm", 30.0),
        ("rms_norm", 0.0),
        pytest.param("layer_norm", 0.0, marks=pytest.mark.slow),
        pytest.param("rms_norm", 30.0, marks=pytest.mark.slow),
    ],
)
def test_never_less_accurate_than_flax(kernels: str, kind: str, mean: float) -> None:
    """The RMS error against float64 is at most 1.05 times flax's, in both directions.

    It is taken over four draws, because a single draw's ratio is off by up to 0.02.
    """
    case = Case(kind, (1024, 128))
    errors = []
    for seed in range(17, 21):
        x, scale, bias, dy = case.data(seed, "float32", "float32")
        x = (x + mean).astype("float32")
        dy = dy.astype("float32")
        truth = case.truth(x, scale, bias, dy)
        with interpreters.quickly_compiled(False):  # LLVM decides what is rounded
            errors.append(
                [
                    rms_errors(function, truth, x, scale, bias, dy)
                    for function in (case.run, flax_function(case))
                ]
            )
    ours, theirs = np.sqrt(np.mean(np.square(errors), axis=0))
    if kernels == "mosaic_gpu":
        # The rest is checked on a GPU only. XLA on a CPU sums a tile's rows, blocks and
        # columns in chains, where a GPU uses trees (dbias: 1.23 times flax's error;
        # RMSNorm's dx: 1.12, and 0.70 to 1.00 on an H200).
        known = 2 if kind == "layer_norm" else 1
        ours, theirs = ours[:known], theirs[:known]
    assert (ours <= 1.05 * theirs).all(), ours / theirs


# --- what is wanted -------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    slow_but([(0,), (1, 2)], [(0,), (1,), (2,), (0, 2), (1, 2)]),
    ids="argnums {}".format,
)
def test_gradients_of_some(kernels: str, wanted: tuple[int, ...]) -> None:
    case = Case("layer_norm", (37, 192))
    check_gradients_of(case, wanted, "bfloat16")


@pytest.mark.parametrize("wanted", [(1,), (2,)], ids="argnums {}".format)
def test_gradients_of_some_behind_an_activation(
    kernels: str, wanted: tuple[int, ...]
) -> None:
    """Its slope needs x, scale and bias, whichever gradient is wanted."""
    case = Case("layer_norm", (5, 64), (("activation", "silu"),))
    check_gradients_of(case, wanted)


@pytest.mark.parametrize("given", ["scale", "bias"])
def test_one_parameter(kernels: str, given: str) -> None:
    case = Case("layer_norm", (5, 40))
    x, scale, bias, dy = case.data(7, "float32", "float32")
    scale, bias = (scale, None) if given == "scale" else (None, bias)
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    param = {"scale": scale, "bias": bias}[given]
    y, vjp = jax.vjp(
        lambda x, param: fusednorm.layer_norm(x, **{given: param}),
        jnp.asarray(x),
        jnp.asarray(param),
    )
    dx, dparam = vjp(jnp.asarray(dy))
    assert_close(y, truth.y, truth.bounds["y"])
    assert_close(dx, truth.dx, truth.bounds["dx"])
    assert_close(dparam, getattr(truth, f"d{given}"), truth.bounds[f"d{given}"])


@pytest.mark.parametrize("shape", [(3, 760), (2, 19, 64)], ids=str)
def test_each_example_has_its_own_gradients(kernels: str, shape: tuple) -> None:
    run_each_example(Case("layer_norm", shape))


# --- under the transformations --------------------------------------------------------


def run_counted(family: str, transform: tuple, shape: tuple[int, ...]) -> None:
    """Checks a transform of `counted`: its results, and how often each kernel runs."""
    function, forward, backward = transform
    rng = np.random.default_rng(15)
    x, dy = (jnp.asarray(rng.normal(0.3, 2, shape), "float32") for _ in range(2))
    params = jnp.linspace(0.5, 1.5, 24), jnp.linspace(-1.0, 1.0, 24)
    result = jax.block_until_ready(jax.jit(function)(x, *params, dy))
    runs: collections.Counter[str] = collections.Counter()
    for name, times in interpreters.runs.items():
        runs[name.partition(",")[0]] += times  # summed over variants
    expected_runs = {f"{family} forward": forward, f"{family} backward": backward}
    assert runs == collections.Counter(expected_runs)
    with fusednorm.use_backend("reference"):
        expected = jax.jit(function)(x, *params, dy)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


# JAX composes the others from these. test_dispatch.py runs them on a stand-in.
OF_KERNELS = ["grad", "hvp, forward over reverse", "vmap of grad", "grad of scan"]


@pytest.mark.parametrize("name", slow_but(OF_KERNELS, COUNTED))
def test_each_kernel_runs_as_often_as_it_should(name: str, kernels: str) -> None:
    run_counted("rowwise", COUNTED[name], (2, 5, 24))


# --- rows keep to themselves ----------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(kernels: str, poison: float) -> None:
    case = Case("layer_norm", (37, 96))
    x, scale, bias, dy = case.data(12, "float32", "float32")
    bad = x.copy()
    bad[36, 7] = poison
    results = []
    for given in (x, bad):
        y, vjp = jax.vjp(
            lambda x: op.normalize_with_moments(norm_of(case), x, scale, bias),
            jnp.asarray(given),
        )
        zeros = [jnp.zeros_like(statistic) for statistic in y[1:]]
        results.append([*y, *vjp((jnp.asarray(dy, "float32"), *zeros))])
    for clean, poisoned in zip(*results, strict=True):
        assert np.isfinite(np.asarray(clean)).all()  # or NaN would equal NaN below
        np.testing.assert_array_equal(clean[:36], poisoned[:36])
        assert not np.isfinite(np.asarray(poisoned[36])).all()


@pytest.mark.parametrize(
    ("features", "mix"),
    [
        (64, MIXES[0]),
        (760, MIXES[1]),
        pytest.param(4096, MIXES[2], marks=pytest.mark.slow),
    ],
)
def test_a_row_does_not_depend_on_the_others(
    kernels: str, features: int, mix: tuple[str, str, str]
) -> None:
    """Results are bitwise the same for any number of rows and place of the row."""
    rows = {64: 150, 760: 30, 4096: 5}[features]
    case = Case("layer_norm", (rows, features))
    x, scale, bias, dy = case.data(13, jnp.dtype(mix[0]), mix[1])
    spec = norm_of(case)

    def all_of(rows: slice) -> list[np.ndarray]:
        y, vjp = jax.vjp(
            lambda x: op.normalize_with_moments(spec, x, scale, bias),
            jnp.asarray(x[rows]),
        )
        zeros = [jnp.zeros_like(statistic) for statistic in y[1:]]
        cotangents = (jnp.asarray(dy[rows], y[0].dtype), *zeros)
        return [np.asarray(a) for a in (*y, *vjp(cotangents))]

    whole = all_of(np.s_[:])
    # Each part has at least a tile of rows: XLA on a CPU sums a shorter tile in another
    # order, which no GPU does.
    third = rows // 3
    for some in (np.s_[third:], np.s_[1 : 1 + 2 * third], np.s_[max(rows - 70, 0) :]):
        for part, expected in zip(all_of(some), whole, strict=True):
            np.testing.assert_array_equal(part, expected[some])


# --- what falls back ------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (calls((0, 64), "float32")[0], "x is empty"),
        (calls((3, 0), "float32")[1], "x is empty"),
    ],
    ids=["no rows", "no features"],
)
def test_what_falls_back(platform: str, call: Call, reason: str) -> None:
    answer = dispatch.plan(call, Target((platform,)))
    assert isinstance(answer, Fallback)
    assert reason in answer.reason


@pytest.mark.parametrize(
    "call",
    [
        Call(
            "forward",
            Norm((1,), (2,)),
            jax.ShapeDtypeStruct((3, 4, 5), jnp.dtype("float32")),
            jax.ShapeDtypeStruct((5,), jnp.dtype("float32")),
        ),
        # the backward is not given the bias: still (B, T, C) is no row of T * C
        Call(
            "backward",
            Norm((1, 2), (2,)),
            jax.ShapeDtypeStruct((3, 4, 5), jnp.dtype("float32")),
            dy=jax.ShapeDtypeStruct((3, 4, 5), jnp.dtype("float32")),
            wanted=(True, False, True, False),
        ),
    ],
    ids=["forward", "bias alone"],
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_channelwise(platform: str, call: Call) -> None:
    answer = dispatch.plan(call, Target((platform,)))
    assert isinstance(answer, Kernel)
    assert answer.name.startswith("channelwise")


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
def test_empty_arrays_take_the_reference(backend: str, shape: tuple) -> None:
    with interpreters.interpreted(backend):
        x = jnp.zeros(shape)
        y, vjp = jax.vjp(fusednorm.layer_norm, x)
        assert y.shape == vjp(y)[0].shape == shape
        assert not interpreters.runs


# --- lowered for a chip ---------------------------------------------------------------

CALLED = {"cuda": "mosaic_gpu_v2", "tpu": "tpu_custom_call"}  # kernels' custom calls


def lowered(platform: str, function: Any, *args: Any) -> str:
    """Returns the code for a chip's compiler; the machine needs no such chip."""
    with fusednorm.use_backend(dispatch.KERNELS[platform][0]):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "shape", [(37, 64), (5, 3, 760), (2, 3, 50, 768), (5, 8200)], ids=str
)
@pytest.mark.parametrize("platform", CALLED)
def test_forward_and_backward_are_one_kernel_each(
    platform: str, shape: tuple[int, ...], mix: tuple[str, str, str]
) -> None:
    case = Case("layer_norm", shape)
    x, scale, bias, dy = case.data(0, jnp.dtype(mix[0]), jnp.dtype(mix[1]))
    dy = dy.astype(mix[2])

    def step(*args: Any) -> Any:
        y, vjp = jax.vjp(functools.partial(case.run, dtype=jnp.dtype(mix[2])), *args)
        return y, vjp(jnp.asarray(dy))

    assert lowered(platform, step, x, scale, bias).count(CALLED[platform]) == 2


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (37, 64)),
        Case("rms_norm", (5, 8200), (("activation", "gelu"),)),
        Case("group_norm", (2, 1024, 256), (("num_groups", 8),)),
        Case("group_norm", (2, 1024, 320), (("num_groups", 32),)),
        Case("batch_norm", (8, 128, 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "rule",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
    ],
    ids=["64 bits", "dtypes", "ranks"],
)
@pytest.mark.parametrize("platform", CALLED)
def test_a_users_rules_are_not_for_kernels(
    platform: str, rule: Any, case: Case
) -> None:
    """What a user sets to find mistakes of their own finds none of ours."""
    x, scale, bias, dy = case.data(16, "float32", "float32")
    x, scale, bias, dy = jax.tree.map(jnp.float32, (x, scale, bias, dy))

    def step(*args: Any) -> Any:
        y, vjp = jax.vjp(case.run, *args)
        return y, vjp(dy)

    kernels = lowered(platform, step, x, scale, bias).count(CALLED[platform])
    with rule():
        text = lowered(platform, step, x, scale, bias)
    assert kernels >= 2
    assert text.count(CALLED[platform]) == kernels
    assert "f64>" not in text


@pytest.mark.parametrize(
    ("platform", "case"),
    [
        *((platform, Case("layer_norm", (8, 64))) for platform in CALLED),
        *(
            (platform, case)
            for platform in CALLED
            for case in (
                Case("group_norm", (8, 9, 64), (("num_groups", 4),)),
                Case("batch_norm", (8, 9, 64)),
            )
        ),
    ],
    ids=str,
)
def test_a_shard_map_runs_kernels_on_each_part(platform: str, case: Case) -> None:
    """Each part has one kernel each way; check_vma adds psums of dscale and dbias."""
    mesh = Mesh(np.array(jax.devices()[:4]), "data")
    x, scale, bias, _ = case.data(15, "float32", "float32")

    def loss(x: Any, scale: Any, bias: Any) -> Any:
        part = jax.shard_map(
            case.run, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data")
        )
        return jnp.sum(jnp.sin(part(x, scale, bias)))

    text = lowered(platform, jax.grad(loss, (0, 1, 2)), x, scale, bias)
    assert text.count(CALLED[platform]) == 2
    assert text.count("stablehlo.all_reduce") == 2
