"""The reference, on a CPU: values, gradients, ragged sizes, bad rows.

Results are compared with float64 NumPy (tests/helpers.py), with the bounds of an honest
float32 implementation: half an ulp of the output's dtype, 16 roundings in float32, and
the rounding of the mean itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.nnx.nn.normalization as flax_normalization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm
from fusednorm import reference
from fusednorm.kernels import norm as op
from fusednorm.reference import Norm, chunks, statistics
from tests.helpers import EPS32, Case, Truth, assert_close, ulp

CASES = [
    Case("layer_norm", (37, 64)),
    Case("layer_norm", (3, 5, 760)),
    Case("layer_norm", (1, 1128)),
    Case("layer_norm", (2, 33), params=False),
    Case("layer_norm", (3, 4, 5, 6), (("reduction_axes", (1, 2, 3)),)),
    Case(
        "layer_norm", (7, 5, 6), (("reduction_axes", (1, 2)), ("feature_axes", (1, 2)))
    ),
    Case("layer_norm", (5, 6, 7), (("reduction_axes", 1),)),
    Case("layer_norm", (5, 6, 7), (("reduction_axes", (0, 2)), ("feature_axes", 1))),
    Case("rms_norm", (37, 128)),
    Case("rms_norm", (5, 3, 192)),
    Case("rms_norm", (4, 3, 9), (("reduction_axes", (1, 2)),), params=False),
    Case("group_norm", (3, 7, 5, 24), (("num_groups", 4),)),
    Case("group_norm", (2, 64, 32), (("num_groups", 32),)),
    Case("group_norm", (9, 24), (("num_groups", 3),)),
    Case("group_norm", (2, 3, 4, 12), (("num_groups", 3), ("reduction_axes", (2, 3)))),
    Case("group_norm", (4, 9, 12), (("num_groups", 1),), params=False),
    Case("instance_norm", (3, 9, 7, 10)),
    Case("instance_norm", (2, 6, 5, 4), (("feature_axes", (1, 3)),)),
    Case("batch_norm", (6, 5, 4, 10)),
    Case("batch_norm", (41, 33)),
    Case("batch_norm", (6, 10, 4, 5), (("axis", 1),)),
    Case("batch_norm", (41, 3, 2), (("epsilon", 1e-2),), params=False),
    Case("layer_norm", (9, 96), (("activation", "gelu"),)),
    Case("rms_norm", (7, 64), (("activation", "gelu_tanh"),), params=False),
    Case("group_norm", (3, 7, 24), (("num_groups", 4), ("activation", "silu"))),
    Case("batch_norm", (6, 5, 10), (("activation", "relu"),)),
]
DTYPES = [  # of x, of scale and bias, of y (None: what they promote to)
    ("float32", "float32", None),
    ("bfloat16", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("float16", "float32", "float16"),
    ("float32", "bfloat16", "bfloat16"),
]
FLOATS = [jnp.dtype(name) for name in ("float32", "bfloat16", "float16")]


def check(case: Case, truth: Truth, x, scale, bias, dy, dtype=None, mask=None) -> None:
    """Checks y, dx, dscale and dbias against the truth."""
    given = [jnp.asarray(a) for a in (x, scale, bias) if a is not None]
    y, vjp = jax.vjp(
        jax.jit(lambda *args: case.run(*args, dtype=dtype, mask=mask)), *given
    )
    # dy is rounded to y's dtype, as a cotangent is; the truth gets the same one.
    assert_close(y, truth.y, truth.bounds["y"])
    names = ["dx", "dscale", "dbias"]
    for name, gradient in zip(names, vjp(jnp.asarray(dy, y.dtype)), strict=False):
        assert_close(gradient, getattr(truth, name), truth.bounds[name])


def check_gradients_of(
    case: Case, wanted: tuple[int, ...], x_dtype: str = "float32"
) -> None:
    """Checks some of dx, dscale and dbias, selected by number, against the truth."""
    x, scale, bias, dy = case.data(6, jnp.dtype(x_dtype), "float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    loss = lambda *args: jnp.vdot(dy, case.run(*args))  # noqa: E731
    gradients = jax.jit(jax.grad(loss, wanted))(*map(jnp.asarray, (x, scale, bias)))
    for number, gradient in zip(wanted, gradients, strict=True):
        name = ("dx", "dscale", "dbias")[number]
        assert_close(gradient, getattr(truth, name), truth.bounds[name])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(map(str, d)))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtypes: tuple) -> None:
    x_dtype, param_dtype, dtype = dtypes
    x, scale, bias, dy = case.data(0, jnp.dtype(x_dtype), jnp.dtype(param_dtype))
    y = jax.eval_shape(lambda *args: case.run(*args, dtype=dtype), x, scale, bias)
    dy = dy.astype(y.dtype)
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy, dtype)


@pytest.mark.parametrize("ratio", [10, 1000, 5000])
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (5, 768)),
        Case("group_norm", (3, 20, 16), (("num_groups", 4),)),
        Case("instance_norm", (2, 150, 3)),
        Case("batch_norm", (200, 5)),
    ],
    ids=str,
)
def test_a_large_mean_is_right(case: Case, ratio: int) -> None:
    """Means of up to 5000 deviations, where E[x^2] - E[x]^2 has no digit left."""
    _, scale, bias, dy = case.data(1, "float32", "float32")
    rng = np.random.default_rng(2)
    x = (rng.normal(0, 0.5, case.shape) + 0.5 * ratio).astype("float32")
    dy = dy.astype("float32")
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4])
def test_a_constant_row_gives_the_bias(value: float) -> None:
    case = Case("layer_norm", (4, 768))
    x, scale, bias, dy = case.data(3, "float32", "float32")
    x[2] = value
    dy = dy.astype("float32")
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("case", "statistic"),
    [  # the elements that share a mean with the poisoned one
        (Case("layer_norm", (5, 96)), np.s_[2]),
        (Case("rms_norm", (5, 96)), np.s_[2]),
        (Case("group_norm", (4, 6, 24), (("num_groups", 4),)), np.s_[2, :, 6:12]),
        (Case("instance_norm", (4, 6, 24)), np.s_[2, :, 7]),
        (Case("batch_norm", (4, 6, 24)), np.s_[:, :, 7]),
    ],
    ids=str,
)
def test_nan_and_inf_stay_where_they_are(
    case: Case, statistic: tuple, poison: float
) -> None:
    x, scale, bias, dy = case.data(4, "float32", "float32")
    position = (2, 7) if len(case.shape) == 2 else (2, 3, 7)
    x[position] = poison
    given = [jnp.asarray(a) for a in (x, scale, bias) if a is not None]
    y, vjp = jax.vjp(jax.jit(case.run), *given)
    dx = vjp(jnp.asarray(dy, y.dtype))[0]
    clean, _ = jax.vjp(jax.jit(case.run), *[jnp.nan_to_num(a, posinf=0) for a in given])
    inside = np.zeros(case.shape, bool)
    inside[statistic] = True
    for result in (y, dx):
        assert np.isfinite(np.asarray(result)[~inside]).all()
    assert np.isnan(np.asarray(y)[position])
    np.testing.assert_array_equal(np.asarray(y)[~inside], np.asarray(clean)[~inside])


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (0, 64)),
        Case("layer_norm", (3, 0), params=False),
        Case("rms_norm", (2, 0, 8)),
        Case("group_norm", (0, 4, 8), (("num_groups", 2),)),
        Case("group_norm", (2, 0, 8), (("num_groups", 2),)),
        Case("instance_norm", (2, 0, 8)),
        Case("batch_norm", (0, 8)),
    ],
    ids=str,
)
def test_empty_arrays(case: Case) -> None:
    x, scale, bias, dy = case.data(5, "float32", "float32")
    given = [jnp.asarray(a) for a in (x, scale, bias) if a is not None]
    y, vjp = jax.vjp(case.run, *given)
    gradients = vjp(jnp.asarray(dy, y.dtype))
    assert y.shape == case.shape
    for gradient, argument in zip(gradients, given, strict=True):
        assert gradient.shape == argument.shape
        np.testing.assert_array_equal(gradient, np.zeros(argument.shape))


MASKED = [
    Case("layer_norm", (6, 40)),
    Case("rms_norm", (6, 40)),
    Case("group_norm", (4, 5, 12), (("num_groups", 3),)),
    Case("instance_norm", (3, 8, 5)),
    Case("batch_norm", (7, 4, 6)),
]


def draw_mask(case: Case, along: str) -> np.ndarray:
    """Returns a random mask that varies along all of x's axes, or one of them."""
    ones = (1,) * (len(case.shape) - 1)
    shape = {
        "all": case.shape,
        "last axis": (*ones, case.shape[-1]),
        "first axis": (case.shape[0], *ones),
        "one axis given": case.shape[-1:],
    }[along]
    return np.random.default_rng(7).random(shape) < 0.7


@pytest.mark.parametrize("along", ["all", "last axis", "first axis", "one axis given"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masks(case: Case, along: str) -> None:
    x, scale, bias, dy = case.data(6, "float32", "float32")
    mask = draw_mask(case, along)
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy, mask)
    check(case, truth, x, scale, bias, dy, mask=jnp.asarray(mask))


@pytest.mark.parametrize("tuned_for", ["cpu", "gpu", "gpus", "tpu"])
@pytest.mark.parametrize("mean", [0, 3000], ids="mean={}".format)
@pytest.mark.parametrize("along", ["all", "last axis", "first axis"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masks_in_every_form(
    case: Case,
    along: str,
    mean: float,
    tuned_for: reference.TunedFor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference counts by the mask in the form of each compiler."""
    monkeypatch.setattr("fusednorm.reference.statistics._SMALL_BYTES", 0)
    x, scale, bias, dy = case.data(6, "float32", "float32")
    far = np.zeros(case.shape, bool)
    far[:1] = True
    x = (x + mean * far).astype("float32")
    mask = draw_mask(case, along)
    truth = case.truth(x, scale, bias, dy, mask)
    run = functools.partial(reference.forward, norm_of(case), tuned_for=tuned_for)
    y, found_mean, var = jax.jit(run)(x, scale, bias, mask)
    assert_close(y, truth.y, truth.bounds["y"])
    assert_close(var, truth.var, truth.bounds["var"])
    if found_mean is not None:
        assert_close(found_mean, truth.mean, truth.bounds["mean"])


@pytest.mark.parametrize("shape", [(50, 510), (4, 9, 16, 48)], ids=str)
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masks_of_arrays_that_are_not_small(case: Case, shape: tuple[int, ...]) -> None:
    """A CPU takes another form for more than 64 KB of x."""
    case = dataclasses.replace(case, shape=shape)
    x, scale, bias, dy = case.data(6, "float32", "float32")
    mask = draw_mask(case, "all")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy, mask)
    check(case, truth, x, scale, bias, dy, mask=jnp.asarray(mask))


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_a_mask_that_lets_nothing_in(case: Case) -> None:
    """Mean 0, variance 1, and no gradient through the statistics."""
    x, scale, bias, dy = case.data(8, "float32", "float32")
    mask = np.zeros(case.shape, bool)
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy, mask)
    np.testing.assert_array_equal(truth.mean, 0)
    np.testing.assert_array_equal(truth.var, 1)
    check(case, truth, x, scale, bias, dy, mask=jnp.asarray(mask))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws any normalization of any small shape, with any axes that make sense."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axes = list(range(len(shape)))
    subsets = st.sets(st.sampled_from(axes), min_size=1).map(lambda s: tuple(sorted(s)))
    kind = draw(
        st.sampled_from(
            ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]
        )
    )
    options: dict = {}
    if kind in ("layer_norm", "rms_norm"):
        options = {"reduction_axes": draw(subsets), "feature_axes": draw(subsets)}
    elif kind == "group_norm":
        groups = draw(st.integers(1, 4))
        shape = (*shape[:-1], groups * draw(st.integers(1, 4)))
        others = draw(st.sets(st.sampled_from(axes)))
        reduction_axes = tuple(sorted(others | {len(shape) - 1}))
        options = {"num_groups": groups, "reduction_axes": reduction_axes}
    elif kind == "instance_norm":
        hypothesis.assume(len(shape) > 1)
        options = {"feature_axes": draw(st.sampled_from(axes[1:]))}
    else:
        options = {"axis": draw(st.sampled_from(axes))}
    return Case(kind, shape, tuple(options.items()), params=draw(st.booleans()))


@hypothesis.settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
)
@hypothesis.given(case=cases(), dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3))
def test_any_shape_axes_and_dtypes(case: Case, dtypes: tuple) -> None:
    check_any(case, *dtypes)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=200,
    deadline=None,
)
@hypothesis.given(case=cases(), dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3))
def test_many_shapes_axes_and_dtypes(case: Case, dtypes: tuple) -> None:
    """The examples differ each time; hypothesis prints those that fail."""
    check_any(case, *dtypes)


def check_any(case: Case, x_dtype: str, param_dtype: str, dtype: str) -> None:
    x, scale, bias, dy = case.data(9, jnp.dtype(x_dtype), jnp.dtype(param_dtype))
    dy = dy.astype(dtype)
    truth = case.truth(x, scale, bias, dy)
    given = [jnp.asarray(a) for a in (x, scale, bias) if a is not None]
    y, vjp = jax.vjp(lambda *args: case.run(*args, dtype=dtype), *given)
    gradients = vjp(jnp.asarray(dy, y.dtype))
    # If x equals the mean to two digits, the rounding error of the mean's sum is larger
    # than the rest: 20 rows of 42 exceeded the bound by 0.06 roundings of a deviation.
    of_mean = EPS32 / 4 * (1 if scale is None else np.abs(scale).max())
    within(y, truth.y, truth.bounds["y"] + of_mean)
    for name, gradient in zip(["dx", "dscale", "dbias"], gradients, strict=False):
        within(gradient, getattr(truth, name), truth.bounds[name])


def within(actual: jax.Array, expected: np.ndarray, bound: np.ndarray) -> None:
    """Checks like `assert_close`, but all of `expected` may be almost zero.

    That happens if a row has only one element.
    """
    allowed = bound + 0.5 * ulp(expected, actual.dtype)
    np.testing.assert_array_less(
        np.abs(np.asarray(actual, np.float64) - expected), allowed * (1 + 1e-9)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 0.7, 30.0])
def test_never_less_accurate_than_flax(mean: float, dtype: str) -> None:
    """The RMS error to float64 is at most 1.05 times flax's, forward and backward.

    Each case has a thousand statistics, because the error of one is a matter of luck.
    """
    for case in (
        Case("layer_norm", (1024, 256)),
        Case("rms_norm", (1024, 256)),
        Case("group_norm", (32, 16, 256), (("num_groups", 32),)),
        Case("batch_norm", (256, 1024)),
    ):
        x, scale, bias, dy = case.data(10, jnp.dtype(dtype), "float32")
        x = (x + mean).astype(x.dtype)
        dy = dy.astype("float32")
        truth = case.truth(x, scale, bias, dy)
        ours, theirs = (
            rms_errors(function, truth, x, scale, bias, dy)
            for function in (case.run, flax_function(case))
        )
        assert (ours <= 1.05 * theirs).all(), f"{case}: {ours / theirs}"


def rms_errors(function, truth: Truth, x, scale, bias, dy) -> np.ndarray:
    """Returns the errors of y, dx and, where they exist, dscale and dbias."""
    given = [jnp.asarray(a) for a in (x, scale, bias) if a is not None]
    y, vjp = jax.vjp(jax.jit(function), *given)
    results = [y, *vjp(jnp.asarray(dy))]
    expected = [truth.y, truth.dx, truth.dscale, truth.dbias]
    return np.array(
        [
            np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - b)))
            for a, b in zip(results, expected, strict=False)
        ]
    )


def flax_function(case: Case):
    """Returns flax's own arithmetic, as a function of x, scale and bias."""

    def function(x, scale=None, bias=None):
        x = x.astype("float32")
        axes = list(case.reduction_axes)
        view, groups = x, case.num_groups
        if groups is not None:
            view = x.reshape(*x.shape[:-1], groups, -1)
            axes = [*axes[:-1], x.ndim]
        mean, var = flax_normalization._compute_stats(
            view, axes, None, use_mean=case.kind != "rms_norm"
        )
        if groups is not None:
            axes = axes[:-1]
            mean, var = (jnp.repeat(s, x.shape[-1] // groups, 1) for s in (mean, var))
        return flax_normalization._normalize(
            x, mean, var, scale, bias, axes, case.feature_axes, None, case.epsilon
        )

    return function


def norm_of(case: Case) -> Norm:
    """Returns the `Norm` that the functional API makes from the case's arguments."""
    grouped = case.num_groups is not None
    return Norm(
        reduction_axes=case.reduction_axes[:-1] if grouped else case.reduction_axes,
        feature_axes=case.feature_axes,
        num_groups=case.num_groups,
        center=case.kind != "rms_norm",
        epsilon=case.epsilon,
        activation=case.activation,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mean_and_variance(case: Case) -> None:
    x, scale, bias, dy = case.data(11, "float32", "float32")
    spec = norm_of(case)
    truth = case.truth(x, scale, bias, dy)
    _, mean, var = op.normalize_with_moments(spec, jnp.asarray(x))
    assert_close(var, truth.var, truth.bounds["var"])
    if spec.center:
        assert_close(mean, truth.mean, truth.bounds["mean"])
    else:
        assert mean is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "features", [64, 128, 192, 256, 760, 1128, 4096, 8200, 12288, 65536]
)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_every_row_length(kind: str, features: int, dtype: str) -> None:
    """Row counts lie around every tile size; 4097 rows are for the short ones."""
    for rows in (1, 2, 37, 4097)[: 4 if features <= 1128 else 3]:
        case = Case(kind, (rows, features))
        x, scale, bias, dy = case.data(12, jnp.dtype(dtype), "float32")
        dy = dy.astype("float32")
        check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [  # ResNet-50 stages, diffusion UNet levels, style transfer
        Case("batch_norm", (4, 56, 56, 64)),
        Case("batch_norm", (8, 7, 7, 2048)),
        Case("group_norm", (2, 64, 64, 320), (("num_groups", 32),)),
        Case("group_norm", (2, 8, 8, 1280), (("num_groups", 32),)),
        Case("group_norm", (1, 4, 30, 40, 320), (("num_groups", 32),)),
        Case("instance_norm", (1, 128, 128, 64)),
        Case("layer_norm", (2, 32, 32, 96), (("reduction_axes", (1, 2, 3)),)),
    ],
    ids=str,
)
def test_shapes_of_real_models(case: Case, dtype: str) -> None:
    x, scale, bias, dy = case.data(13, jnp.dtype(dtype), "float32")
    dy = dy.astype("float32")
    check(case, case.truth(x, scale, bias, dy), x, scale, bias, dy)


@pytest.mark.parametrize("case", CASES[:2] + MASKED[2:], ids=str)
def test_the_tuned_variance_is_right_and_keeps_to_itself(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one CPU device, squares are centred where a mean is far from 0, nowhere else.

    A statistic far from 0 is right, and others are bitwise the same as without it.
    """
    monkeypatch.setattr("fusednorm.reference.statistics._SMALL_BYTES", 0)
    x, scale, bias, dy = case.data(14, "float32", "float32")
    spec = norm_of(case)
    far = x.copy()
    one_statistic = {
        "batch_norm": np.s_[..., -1],
        "instance_norm": np.s_[0, ..., -1],
    }.get(case.kind, np.s_[0])
    far[one_statistic] += 3000
    tuned_for = jax.jit(lambda x: reference.moments(spec, x, tuned_for="cpu")[1:])
    truth = case.truth(far, scale, bias, dy)
    (mean, m2), (near_mean, near_m2) = tuned_for(far), tuned_for(x)
    assert_close(m2 * (m2.size / x.size), truth.var, truth.bounds["var"])
    same = np.abs(truth.mean) < 100
    assert 0 < same.sum() < same.size
    np.testing.assert_array_equal(np.asarray(mean)[same], np.asarray(near_mean)[same])
    np.testing.assert_array_equal(np.asarray(m2)[same], np.asarray(near_m2)[same])


def test_the_outermost_axis_is_cut() -> None:
    """There a chunk is contiguous; unless even one of its entries is too large."""
    norm = Norm((0, 2), (1,))  # BatchNorm, channels first
    half = chunks.CHUNK_BYTES // 2 // 4
    shapes = {(8, 4, half // 4): (0, 2), (2, 4, 3 * half): (2, half // 4)}
    for shape, cut in shapes.items():
        x = jax.ShapeDtypeStruct(shape, jnp.dtype("float32"))
        assert chunks.chunks_of(norm, x, 0) == cut


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "branches"),
    [
        ("layer_norm", "float32", (32, 512), 0),  # 64 KB
        ("layer_norm", "float32", (33, 512), 1),
        ("layer_norm", "bfloat16", (197, 384), 0),  # 148 KB
        ("layer_norm", "bfloat16", (193, 512), 1),  # 193 KB
        ("batch_norm", "bfloat16", (64, 512), 0),
        ("batch_norm", "bfloat16", (65, 512), 1),
    ],
)
def test_small_arrays_are_read_twice_without_a_branch(
    kind: str, dtype: str, shape: tuple[int, int], branches: int
) -> None:
    norm = norm_of(Case(kind, shape))
    x = jnp.zeros(shape, dtype)
    run = functools.partial(reference.moments, norm, tuned_for="cpu")
    assert jax.jit(run).lower(x).as_text().count("stablehlo.case") == branches


@pytest.mark.parametrize("tuned_for", ["gpu", "gpus"])
@pytest.mark.parametrize("mean", [0, 3000], ids="mean={}".format)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_variance_of_a_gpus_reference(
    case: Case, dtype: str, mean: float, tuned_for: reference.TunedFor
) -> None:
    x, scale, bias, dy = case.data(27, "float32", "float32")
    x = (x + mean).astype(dtype)
    truth = case.truth(x, scale, bias, dy)
    run = functools.partial(reference.forward, norm_of(case), tuned_for=tuned_for)
    y, found_mean, var = jax.jit(run)(x, scale, bias)
    assert_close(y, truth.y, truth.bounds["y"])
    assert_close(var, truth.var, truth.bounds["var"])
    if found_mean is not None:
        assert_close(found_mean, truth.mean, truth.bounds["mean"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "in_parts"),
    [
        (Case("group_norm", (2, 32, 32, 24), (("num_groups", 4),)), True),
        (Case("group_norm", (2, 1600, 24), (("num_groups", 4),)), True),
        (Case("group_norm", (2, 11, 11, 24), (("num_groups", 4),)), False),
        (Case("group_norm", (2, 1009, 24), (("num_groups", 4),)), False),  # a prime
        (Case("instance_norm", (3, 40, 9, 5)), True),
        (Case("batch_norm", (9, 14, 14, 6)), True),
        (Case("batch_norm", (600, 6)), True),
        (Case("batch_norm", (5, 6, 16, 9), (("axis", 1),)), False),
        (Case("batch_norm", (5, 16, 9, 6), (("axis", -1),)), True),
        (Case("layer_norm", (40, 600)), False),
    ],
    ids=str,
)
def test_sums_in_parts(case: Case, in_parts: bool, dtype: str) -> None:
    """A GPU sums parts of the pixels first, where XLA would have few blocks."""
    x, scale, bias, dy = case.data(30, "float32", "float32")
    x, dy = (x + 10).astype(dtype), dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    spec = norm_of(case)

    @jax.jit
    def run(dy: jax.Array, x: jax.Array) -> tuple:
        y, mean, var = reference.forward(spec, x, scale, bias, tuned_for="gpu")
        given = dy, x, scale, bias, mean, var
        return y, var, reference.backward(spec, *given, tuned_for="gpu")

    text = run.lower(dy, x).as_text()
    assert text.count("optimization_barrier") == (2 if in_parts else 0)
    y, var, gradients = run(dy, x)
    assert_close(y, truth.y, truth.bounds["y"])
    assert_close(var, truth.var, truth.bounds["var"])
    for name, gradient in zip(("dx", "dscale", "dbias"), gradients, strict=False):
        if name != "dbias" or case.has_bias:
            assert_close(gradient, getattr(truth, name), truth.bounds[name])


@pytest.mark.parametrize(
    ("shape", "axes", "far"),
    [
        # All elements that the mean is estimated from, or one of them.
        ((3, 4096), (1,), np.s_[:, :128]),
        ((3, 4096), (1,), np.s_[:, :1]),
        ((3, 64, 64, 5), (1, 2), np.s_[:, 16::32]),
        ((3, 64, 64, 5), (1, 2), np.s_[:, 16, :2]),
        ((40, 7, 7, 5), (0, 1, 2), np.s_[7::32]),
        ((3, 7, 7, 5), (1, 2), np.s_[:, 3::7, 2::4]),
    ],
    ids=str,
)
def test_an_estimate_that_is_far_off_costs_five_bits(
    shape: tuple[int, ...], axes: tuple[int, ...], far: Any
) -> None:
    x = np.random.default_rng(28).normal(1, 0.001, shape)
    x[far] += 1000
    x = x.astype("float32")
    spec = Norm(axes, (len(shape) - 1,))
    run = functools.partial(reference.forward, spec, tuned_for="gpu")
    _, mean, var = jax.jit(run)(x, None, None)
    wide = x.astype("float64")
    kept = {"axis": axes, "keepdims": True}
    off = np.abs(np.asarray(mean) - wide.mean(**kept))
    assert np.all(off <= 16 * EPS32 * wide.std(**kept))
    np.testing.assert_allclose(var, wide.var(**kept), rtol=8 * 2**5 * EPS32)


@pytest.mark.parametrize("size", [2, 31, 32, 33, 40, 63, 1000, 4095])
def test_an_estimate_is_of_one_in_32(size: int) -> None:
    for shape in ((size, 5), (5, size), (7, size, 3), (size, 7, 3)):
        axes = tuple(range(len(shape) - 1)) if len(shape) == 3 else (shape.index(size),)
        few = statistics._a_few(Norm(axes, (0,)), jnp.zeros(shape))
        assert few is not None
        total = math.prod(shape)
        assert total / 32 <= few.size <= max(total / 16, total / size)


@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678, 3e20])
def test_a_constant_has_no_variance_on_a_gpu(value: float) -> None:
    x = jnp.full((2, 37, 11, 8), value)
    spec = Norm((1, 2), (3,), num_groups=2)
    run = functools.partial(reference.forward, spec, tuned_for="gpu")
    y, mean, var = jax.jit(run)(x, None, None)
    np.testing.assert_allclose(mean, np.full(mean.shape, value), rtol=2 * EPS32)
    assert np.all(var >= 0)
    assert np.all(var <= (2 * EPS32 * abs(value)) ** 2)
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("shape", [(3, 1000), (8, 4095)], ids=str)
def test_a_large_constant_gives_no_nan_on_a_gpu(shape: tuple[int, ...]) -> None:
    """The rounding of the estimate, squared, is more than epsilon then."""
    run = functools.partial(reference.forward, Norm((1,), (1,)), tuned_for="gpu")
    run = jax.jit(run)
    for value in 10 ** np.random.default_rng(31).uniform(6, 12, 50):
        y, _, var = run(jnp.full(shape, value, "float32"), None, None)
        assert np.all(var >= 0)
        np.testing.assert_array_equal(y, 0)  # the mean is exact


def test_squares_are_centred_before_they_lose_digits() -> None:
    """Squares are centred from a mean of two deviations on."""
    x = np.random.default_rng(25).normal(6, 1, (64, 4096)).astype("float32")
    found = jax.jit(lambda x: reference.moments(Norm((1,), (1,)), x, tuned_for="cpu"))(
        x
    )
    expected = np.var(x.astype("float64"), axis=1, keepdims=True)
    np.testing.assert_allclose(found[2] / 4096, expected, rtol=4 * EPS32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_squares_that_overflow_are_centred(dtype: str) -> None:
    x = 1e18 + 1e17 * np.random.default_rng(26).normal(size=(256, 1024))
    x = jnp.asarray(x, dtype)
    var = jax.jit(lambda x: fusednorm.batch_norm(x, axis=0)[2])(x)
    expected = np.var(np.asarray(x, "float64"), axis=1)
    np.testing.assert_allclose(var, expected, rtol=1e-5)


def test_statistics_of_more_elements_than_an_int32_counts() -> None:
    x = jax.ShapeDtypeStruct((128, 256, 256, 256, 16), "bfloat16")

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array) -> jax.Array:
            y, mean, var = fusednorm.batch_norm(x)
            return (y * y).sum() + mean.sum() + var.sum()

        return jax.value_and_grad(loss)(x)

    assert jax.eval_shape(run, x)[1].shape == x.shape


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_subnormal_numbers_of_float16_are_added(norm: str) -> None:
    """An explicit rounding would set them to 0, where more devices or no jit use it."""
    x = jnp.asarray([[1e-5, 2e-5, 3e-5, -4e-5]], "float16")
    run = functools.partial(getattr(fusednorm, norm), residual=x)
    _, h = run(x)
    with jax.disable_jit():
        _, eager = run(x)
    np.testing.assert_array_equal(h, np.asarray(x) + np.asarray(x))
    np.testing.assert_array_equal(eager, h)


def test_a_barrier_keeps_the_rounding_of_a_sum() -> None:
    """On a CPU an explicit rounding would take longer than a barrier."""
    x = jnp.ones((8, 128), "bfloat16")
    norm = jax.jit(lambda x: fusednorm.rms_norm(x, residual=x))
    text = norm.lower(x).as_text()
    assert "optimization_barrier" in text
    assert "reduce_precision" not in text
    with fusednorm.use_backend("reference"):
        text = norm.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "optimization_barrier" not in text
    assert "reduce_precision" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "shortcut", "wide"),
    [
        (Case("layer_norm", (37, 24)), False, True),
        (Case("layer_norm", (3, 40, 24)), False, True),
        (Case("rms_norm", (40, 24)), False, True),
        (Case("layer_norm", (5, 12, 24), (("reduction_axes", (1, 2)),)), False, False),
        (Case("group_norm", (37, 24), (("num_groups", 4),)), False, True),
        (Case("group_norm", (3, 37, 24), (("num_groups", 4),)), True, False),
        (
            Case(
                "group_norm", (37, 3, 24), (("num_groups", 4), ("activation", "silu"))
            ),
            True,
            False,
        ),
        (Case("instance_norm", (2, 5, 9, 24)), False, False),
        (Case("batch_norm", (37, 2, 24)), False, False),
        (Case("batch_norm", (24, 37), (("axis", 0),)), False, False),
    ],
    ids=str,
)
def test_chunks_are_put_together_and_added_up(
    case: Case, shortcut: bool, wide: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one CPU device, sums are computed in chunks of rows or pixels, some ragged.

    They are all sums of 16-bit arrays, and a backward's sums of float32 rows.
    """
    monkeypatch.setattr("fusednorm.reference.chunks.CHUNK_BYTES", 8 * 24 * 4)
    monkeypatch.setattr("fusednorm.reference.statistics._SMALL_BYTES", 0)
    spec = norm_of(case)
    x, scale, bias, dy = case.data(21, jnp.dtype(dtype), "float32")
    dy = dy.astype("float32")
    rng = np.random.default_rng(22)
    added = rng.normal(size=case.shape).astype("float32") if shortcut else None
    truth = case.truth(x, scale, bias, dy, shortcut=added)

    @jax.jit
    def run(dy: jax.Array, x: jax.Array) -> tuple:
        y, mean, var = reference.forward(
            spec, x, scale, bias, shortcut=added, tuned_for="cpu"
        )
        gradients = reference.backward(
            spec, dy, x, scale, bias, mean, var, shortcut=added, tuned_for="cpu"
        )
        return (y, var), gradients

    text = run.lower(dy, x).as_text()
    chunked = wide if dtype == "float32" else 2 + spec.center
    assert text.count("stablehlo.while") == chunked
    (y, var), gradients = run(dy, x)
    assert_close(y, truth.y, truth.bounds["y"])
    assert_close(var, truth.var, truth.bounds["var"])
    names = ["dx", "dscale", "dbias", "dshortcut"][: 3 + shortcut]
    for name, gradient in zip(names, gradients, strict=False):
        if name != "dbias" or case.has_bias:
            assert_close(gradient, getattr(truth, name), truth.bounds[name])


def test_chunks_lose_no_more_than_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, dscale has hardly more rounding error than in one sum.

    XLA's CPU code accumulates 256 rows in sequence, and 1465 rows in a tree.
    """
    monkeypatch.setattr("fusednorm.reference.chunks.CHUNK_BYTES", 256 * 512 * 4)
    case = Case("rms_norm", (1465, 512))
    x, scale, _, dy = case.data(26, "float32", "float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, None, dy).dscale
    _, _, var = reference.forward(norm_of(case), x, scale, None)

    def error(tuned_for: reference.TunedFor) -> float:
        run = functools.partial(reference.backward, norm_of(case), tuned_for=tuned_for)
        _, dscale, *_ = jax.jit(run)(dy, x, scale, None, None, var)
        return float(np.sqrt(np.mean((dscale - truth) ** 2)))

    assert error("cpu") <= 1.05 * error(None)


@pytest.mark.parametrize(
    ("own", "loops"), [((5, 1, 24), 1), ((1, 40, 24), 0), ((5, 40, 24), 0)], ids=str
)
def test_chunks_where_scale_and_bias_are_their_own(
    own: tuple[int, ...], loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale and bias per sample or row, no axis along which they vary is cut."""
    case = Case("layer_norm", (5, 40, 24))
    x, _, _, dy = case.data(23, "float32", "float32")
    scale, bias = np.random.default_rng(24).normal(1, 0.5, (2, *own)).astype("float32")
    dy = dy.astype("float32")
    truth = case.truth(x, scale, bias, dy)
    monkeypatch.setattr("fusednorm.reference.chunks.CHUNK_BYTES", 5 * 7 * 24 * 4)
    jax.clear_caches()  # its traces have larger chunks
    gradients = jax.jit(lambda dy, *given: jax.vjp(case.run, *given)[1](dy))
    lowered = gradients.lower(dy, x, scale, bias)
    jax.clear_caches()
    assert lowered.as_text().count("stablehlo.while") == loops
    names = ("dx", "dscale", "dbias")
    for name, gradient in zip(
        names, lowered.compile()(dy, x, scale, bias), strict=True
    ):
        assert_close(gradient, getattr(truth, name), truth.bounds[name])


@pytest.mark.parametrize(
    ("rows", "dtype", "branches"),
    [(4095, "bfloat16", 1), (4096, "bfloat16", 0), (4096, "float16", 1)],
)
def test_one_loop_for_many_rows_is_not_broken_up(
    rows: int, dtype: str, branches: int
) -> None:
    """From 4096 rows on, XLA's CPU code is a single loop if there is no branch."""
    x = jnp.zeros((rows, 64), dtype)
    text = jax.jit(fusednorm.layer_norm).lower(x).as_text()
    assert text.count("stablehlo.case") == branches


@pytest.mark.parametrize("channels", [64, 160, 1024])
def test_batch_norm_runs_in_eight_loops(channels: int) -> None:
    """XLA's CPU code schedules more than 8 loops anew in each call."""
    x = jnp.zeros((8, 14, 14, channels))
    layer = fusednorm.BatchNorm(channels, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def step(state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    text = jax.jit(step).lower(state, x).compile().as_text()
    loops = text[text.index("\nENTRY") :]
    assert loops.count(" conditional(") == 1
    assert loops.count(" fusion(") == 7


@pytest.mark.parametrize(
    ("shape", "groups", "branches"),
    [
        ((512, 128), 8, 1),  # 4096 statistics
        ((511, 128), 8, 0),
        ((4, 32, 32, 64), 8, 1),
        ((4, 2, 2, 64), 8, 0),  # too small
        ((512, 2, 2, 64), 8, 1),
        ((4095, 64), 1, 1),  # rows
        ((4096, 64), 1, 0),
    ],
    ids=str,
)
def test_many_groups_have_a_branch(
    shape: tuple[int, ...], groups: int, branches: int
) -> None:
    """XLA's CPU code makes no single loop of groups. With few, a branch costs much.

    So it does where x is small.
    """
    norm = functools.partial(fusednorm.group_norm, num_groups=groups)
    text = jax.jit(norm).lower(jnp.zeros(shape), jnp.ones(shape[-1])).as_text()
    assert text.count("stablehlo.case") == branches


@pytest.mark.parametrize("wanted", [(0,), (0, 1)], ids=str)
def test_dy_of_groups_of_channels_is_kept(wanted: tuple[int, ...]) -> None:
    """Groups in (batch, channels) are not rows, whose gradient is one loop."""

    operands = [jnp.zeros((512, 64)), jnp.ones(64)]
    norm = functools.partial(fusednorm.group_norm, num_groups=8)
    assert backward_text(norm, operands, wanted).count("optimization_barrier") == 2


def backward_text(
    function: Callable[..., jax.Array], operands: list[jax.Array], wanted: Sequence[int]
) -> str:
    """Returns the StableHLO of the gradients of the wanted operands, without y."""

    def of_wanted(*values: jax.Array) -> jax.Array:
        given = list(operands)
        for number, value in zip(wanted, values, strict=True):
            given[number] = value
        return function(*given)

    y, vjp = jax.vjp(of_wanted, *[operands[number] for number in wanted])
    return jax.jit(lambda dy: vjp(dy)).lower(y).as_text()


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "wanted", "barriers"),
    [
        (fusednorm.layer_norm, (4096, 16), "float32", (0,), 0),
        (fusednorm.layer_norm, (4095, 16), "float32", (0,), 2),
        (fusednorm.layer_norm, (4096, 16), "bfloat16", (0,), 2),
        (fusednorm.layer_norm, (2, 8, 8, 64), "float32", (1, 2), 0),
        (fusednorm.layer_norm, (2, 8, 8, 64), "float32", (0, 1), 2),
        (fusednorm.layer_norm, (2, 8, 8, 64), "float32", (0, 2), 2),
        (
            functools.partial(fusednorm.group_norm, num_groups=8),
            (2, 8, 8, 64),
            "float32",
            (0,),
            2,
        ),
    ],
    ids=[
        "dx",
        "dx of few rows",
        "dx of 16 bits",
        "dscale and dbias",
        "dx and dscale",
        "dx and dbias",
        "dx of groups",
    ],
)
def test_dy_is_kept_where_several_loops_read_it(
    function: Callable[..., jax.Array],
    shape: tuple[int, ...],
    dtype: str,
    wanted: tuple[int, ...],
    barriers: int,
) -> None:
    """XLA's CPU code makes one loop of the backward of rows in two cases.

    These are dscale and dbias without dx, and dx alone of many single-precision rows.
    """
    params = jnp.ones(shape[-1])
    text = backward_text(function, [jnp.zeros(shape, dtype), params, params], wanted)
    assert text.count("optimization_barrier") == barriers


@pytest.mark.parametrize(
    ("function", "shape", "features", "loops"),
    [
        (fusednorm.layer_norm, (64, 16384), 16384, 1),
        (
            functools.partial(
                fusednorm.layer_norm, reduction_axes=(1, 2), feature_axes=(1, 2)
            ),
            (64, 128, 128),
            16384,
            0,
        ),
        (lambda *args: fusednorm.batch_norm(*args, axis=1)[0], (64, 64, 256), 64, 0),
    ],
    ids=["rows", "rows of two axes", "channels first"],
)
def test_what_is_cut_into_chunks(
    function: Callable[..., jax.Array],
    shape: tuple[int, ...],
    features: int,
    loops: int,
) -> None:
    """A float32 backward on a CPU is cut only where that is faster."""
    params = jnp.ones(features)
    text = backward_text(function, [jnp.zeros(shape), params, params], (0, 1, 2))
    assert text.count("stablehlo.while") == loops


@pytest.mark.parametrize(
    ("platform", "branches", "slices"), [("tpu", 1, 0), ("cuda", 0, 1), ("rocm", 0, 1)]
)
def test_a_forward_is_tuned_for_its_compiler(
    platform: str, branches: int, slices: int
) -> None:
    """The forward is tuned for a TPU and for a GPU, the backward for no TPU.

    Without a barrier, dy may be computed where it is used. (Here are too few pixels for
    a GPU to sum them in parts.)
    """

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(lambda x: fusednorm.group_norm(x, num_groups=8), x)
        return y, *vjp(y)

    with fusednorm.use_backend("reference"):
        traced = jax.jit(both).trace(jnp.zeros((2, 8, 8, 64)))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.case") == branches
    assert text.count("stablehlo.slice") == slices
    assert "optimization_barrier" not in text


@pytest.mark.parametrize(
    ("norm", "branches"),
    [
        (lambda x: fusednorm.batch_norm(x)[0], 1),
        (lambda x: fusednorm.batch_norm(x, axis=1)[0], 1),
        (fusednorm.layer_norm, 0),
        (fusednorm.instance_norm, 0),
    ],
    ids=["batch_norm", "axis=1", "layer_norm", "instance_norm"],
)
def test_a_branch_on_several_tpus(norm: Callable[..., Any], branches: int) -> None:
    """Where statistics cross the devices anyway, all of them branch alike."""
    placed = jax.NamedSharding(jax.make_mesh((8,), ("d",), (AUTO,)), jax.P("d"))
    x = jax.ShapeDtypeStruct((64, 5, 128), "float32", sharding=placed)
    text = jax.jit(norm).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.case") == branches


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.parametrize(
    ("shape", "devices", "kind", "statistics", "slices", "barriers"),
    [
        ((64, 128), 1, AUTO, False, 0, 0),  # XLA makes one kernel of y alone
        ((64, 128), 1, AUTO, True, 1, 0),
        ((64, 128), 8, AUTO, False, 0, 0),
        ((64, 128), 8, AUTO, True, 0, 1),  # a slice might lie on several devices
        ((64, 128), 8, EXPLICIT, True, 1, 0),  # each device has its part
        ((8, 4, 128), 1, AUTO, False, 1, 0),
        ((8, 4, 128), 8, AUTO, True, 0, 0),
        ((8, 4, 128), 8, EXPLICIT, True, 1, 0),
    ],
    ids=str,
)
def test_how_gpus_find_a_mean(
    shape: tuple[int, ...],
    devices: int,
    kind: Any,
    statistics: bool,
    slices: int,
    barriers: int,
) -> None:
    mesh = jax.make_mesh((devices,), ("d",), (kind,))
    placed = jax.NamedSharding(mesh, jax.P("d"))
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=placed)
    norm = (
        fusednorm.layer_norm
        if len(shape) == 2
        else functools.partial(fusednorm.group_norm, num_groups=8)
    )

    def run(x: jax.Array) -> Any:
        return jax.vjp(norm, x) if statistics else norm(x)

    with fusednorm.use_backend("reference"):
        text = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.slice") == slices
    assert text.count("optimization_barrier") == barriers
