"""y, h = norm(x, residual=r) in the reference, the kernels of both chips and layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm
from fusednorm.kernels import dispatch
from tests import interpreters
from tests.helpers import EPS32, Case, assert_close, slow_but
from tests.layer_helpers import assert_agrees, build, data

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MIXES = [  # dtypes of x, residual, scale and bias, y
    ("float32", "float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32", "bfloat16"),
    ("float16", "float16", "float16", "float16"),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("float32", "bfloat16", "float32", "float32"),
    ("bfloat16", "float16", "float32", "float16"),
]


kernels = interpreters.kernels_of_each_chip


def check(case: Case, mix: tuple[str, str, str, str], seed: int = 0) -> None:
    """Checks y, h and all gradients against float64."""
    x_dtype, residual_dtype, param_dtype, dtype = map(jnp.dtype, mix)
    x, scale, bias, dy = case.data(seed, x_dtype, param_dtype)
    rng = np.random.default_rng(seed + 1)
    residual = rng.normal(-0.3, 2, case.shape).astype(residual_dtype)
    x, residual = jnp.asarray(x), jnp.asarray(residual)
    expected_h = x + residual
    dy = jnp.asarray(dy, dtype)
    dh = jnp.asarray(rng.normal(0, 1, case.shape), expected_h.dtype)
    truth = case.truth(expected_h, scale, bias, dy)

    params = {"scale": scale, "bias": bias}
    given = {n: jnp.asarray(p) for n, p in params.items() if p is not None}

    def function(x: Any, residual: Any, given: Any) -> Any:
        scale, bias = given.get("scale"), given.get("bias")
        return case.run(x, scale, bias, residual=residual, dtype=dtype)

    (y, h), vjp = jax.vjp(function, x, residual, given)
    assert (y.dtype, h.dtype) == (dtype, expected_h.dtype)
    np.testing.assert_array_equal(*(np.asarray(a, "float32") for a in (h, expected_h)))
    assert_close(y, truth.y, truth.bounds["y"])
    dx, dresidual, dparams = vjp((dy, dh))
    assert (dx.dtype, dresidual.dtype) == (x.dtype, residual.dtype)
    expected = truth.dx + np.asarray(dh, np.float64)
    bound = truth.bounds["dx"] + EPS32 * np.abs(np.asarray(dh, np.float64))
    # Gradients are rounded to h's dtype, and then to x's or the residual's.
    for gradient in (dx, dresidual):
        narrow = gradient.dtype.itemsize == h.dtype.itemsize
        wider = 0 if narrow else EPS32 * np.abs(expected)
        assert_close(gradient, expected, bound + wider)
    for name, gradient in dparams.items():
        assert_close(gradient, getattr(truth, f"d{name}"), truth.bounds[f"d{name}"])


# --- the reference --------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (37, 40)),
        Case("rms_norm", (5, 7, 40), (("activation", "silu"),)),
        Case("layer_norm", (3, 40), params=False),
    ],
    ids=str,
)
def test_against_float64(case: Case, mix: tuple[str, str, str, str]) -> None:
    check(case, mix)


def test_several_axes_against_float64() -> None:
    check(Case("layer_norm", (5, 7, 40), (("reduction_axes", (1, 2)),)), MIXES[0])


# --- kernels --------------------------------------------------------------------------


MIXED = [
    (Case("layer_norm", (37, 64)), MIXES[0]),
    (Case("layer_norm", (37, 64)), MIXES[2]),
    (Case("rms_norm", (2, 150, 64)), MIXES[1]),
    (Case("rms_norm", (11, 128)), MIXES[4]),
    (Case("layer_norm", (37, 760)), MIXES[1]),
    (Case("rms_norm", (11, 761)), MIXES[3]),
    (Case("layer_norm", (5, 2048), (("activation", "gelu_tanh"),)), MIXES[2]),
    (Case("rms_norm", (3, 4096)), MIXES[1]),
    (Case("layer_norm", (3, 8200)), MIXES[5]),
]


@pytest.mark.parametrize(
    "number",
    slow_but([0, 2, 5, 6], range(len(MIXED))),
    ids=lambda n: f"{MIXED[n][0]}-{'-'.join(MIXED[n][1])}",
)
def test_kernels_against_float64(kernels: str, number: int) -> None:
    check(*MIXED[number])
    assert interpreters.runs == {"rowwise forward": 1, "rowwise backward": 1}


def test_a_kernel_of_many_features(kernels: str) -> None:
    features = 16384 if kernels == "mosaic_gpu" else 12288
    check(Case("layer_norm", (3, features)), MIXES[1])
    assert interpreters.runs == {"rowwise forward": 1, "rowwise backward": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES[:3], ids="-".join)
@pytest.mark.parametrize("features", [64, 128, 512, 760, 2048, 7168, 12288, 65536])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gpu_values_and_gradients(kind: str, features: int, mix: Any) -> None:
    rows = 4097 if features < 1024 else 37
    with fusednorm.use_backend("mosaic_gpu"):
        check(Case(kind, (rows, features)), mix)


def test_what_no_cotangent_comes_to(kernels: str) -> None:
    x, r = data((6, 64)), data((6, 64), seed=3)
    dy = data((6, 64), seed=4)

    def norm(x: Any, r: Any) -> Any:
        return fusednorm.layer_norm(x, residual=r)

    through_h = jax.grad(lambda x, r: jnp.vdot(norm(x, r)[1], dy), (0, 1))(x, r)
    for gradient in jax.block_until_ready(through_h):
        np.testing.assert_array_equal(gradient, dy)
    assert interpreters.runs == {"rowwise forward": 1}  # no backward to run
    through_y = jax.grad(lambda x, r: jnp.vdot(norm(x, r)[0], dy), (0, 1))(x, r)
    expected = jax.grad(lambda h: jnp.vdot(fusednorm.layer_norm(h), dy))(x + r)
    for gradient in through_y:
        np.testing.assert_array_equal(gradient, expected)


def test_bitwise_the_same_as_apart(kernels: str) -> None:
    """The sum is rounded before it is normalized, and rows are independent."""
    x, r = data((37, 192), "bfloat16"), data((37, 192), "bfloat16", seed=3)
    scale = jnp.linspace(0.5, 1.5, 192)
    y, h = fusednorm.rms_norm(x, scale, residual=r, dtype="bfloat16")
    np.testing.assert_array_equal(y, fusednorm.rms_norm(h, scale, dtype="bfloat16"))
    some, _ = fusednorm.rms_norm(x[5:30], scale, residual=r[5:30], dtype="bfloat16")
    np.testing.assert_array_equal(y[5:30], some)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [37, 4096])
def test_the_reference_rounds_the_sum(rows: int, dtype: str) -> None:
    """y is the norm of the rounded h that is returned.

    A barrier keeps the rounding, or an explicit rounding where XLA makes one loop.
    """
    x, r = data((rows, 24), dtype), data((rows, 24), dtype, seed=3)
    norm = functools.partial(fusednorm.rms_norm, dtype="float32")
    y, h = jax.jit(lambda x, r: norm(x, residual=r))(x, r)
    rounded = (np.asarray(x, "float32") + np.asarray(r, "float32")).astype(x.dtype)
    np.testing.assert_array_equal(h, rounded)
    np.testing.assert_allclose(y, norm(jnp.asarray(rounded)), rtol=1e-6)


def test_nan_stays_in_its_row(kernels: str) -> None:
    x, r, dy = (data((9, 96), seed=seed) for seed in (2, 3, 4))

    def all_of(r: Any, dh: Any) -> list[np.ndarray]:
        y, vjp = jax.vjp(lambda x, r: fusednorm.layer_norm(x, residual=r), x, r)
        return [np.asarray(a) for a in (*y, *vjp((dy, dh)))]

    clean = all_of(r, dy)
    for poisoned in (
        all_of(r.at[4, 7].set(np.nan), dy)[:2],
        all_of(r, dy.at[4, 7].set(np.nan))[2:],
    ):
        assert all(np.isnan(result[4]).any() for result in poisoned)
        same = clean[:2] if np.isnan(poisoned[0][4]).all() else clean[2:]
        for a, b in zip(same, poisoned, strict=True):
            rows = np.arange(9) != 4
            np.testing.assert_array_equal(a[rows], b[rows])


# --- the transformations --------------------------------------------------------------

X, R, V, W = (data((3, 4, 24), seed=seed) for seed in (2, 3, 4, 5))
SCALE = jnp.linspace(0.5, 1.5, 24)

Norm = Callable[..., tuple[jax.Array, jax.Array]]


def _joined(x: Any, r: Any, scale: Any = SCALE) -> tuple[jax.Array, jax.Array]:
    y, h = fusednorm.layer_norm(x, scale, residual=r)
    return y, h


def _apart(x: Any, r: Any, scale: Any = SCALE) -> tuple[jax.Array, jax.Array]:
    h = x + r
    return fusednorm.layer_norm(h, scale), h


def _loss(norm: Norm, x: Any, r: Any, scale: Any = SCALE) -> jax.Array:
    y, h = norm(x, r, scale)
    return jnp.sum(jnp.sin(y) * V[: y.shape[0]]) + jnp.sum(h**2 * y)


def _scan(norm: Norm, x: Any) -> jax.Array:
    def block(h: Any, r: Any) -> Any:
        y, h = norm(jnp.tanh(h), r)
        return h, y

    h, ys = jax.lax.scan(jax.checkpoint(block), x, jnp.stack([R, V, W]))
    return jnp.sum(jnp.sin(h)) + jnp.sum(ys**3)


TRANSFORMED: dict[str, Callable[[Norm], Any]] = {
    "jvp": lambda f: jax.jvp(f, (X, R, SCALE), (V, W, SCALE**2)),
    "jvp of x": lambda f: jax.jvp(lambda x: f(x, R), (X,), (V,)),
    "jvp of scale": lambda f: jax.jvp(lambda s: f(X, R, s), (SCALE,), (SCALE**2,)),
    "grad": lambda f: jax.grad(lambda *a: _loss(f, *a), (0, 1, 2))(X, R, SCALE),
    "grad of r": lambda f: jax.grad(lambda r: _loss(f, X, r))(R),
    "vmap": lambda f: jax.vmap(f)(X, R),
    "vmap of r": lambda f: jax.vmap(lambda r: f(X[0], r))(R),
    "vmap of x": lambda f: jax.vmap(lambda x: f(x, R[0]), 1)(X.transpose(1, 0, 2)),
    "vmap of scale": lambda f: jax.vmap(lambda s: f(X, R, s))(jnp.stack([SCALE] * 2)),
    "vmap of grad": lambda f: jax.vmap(
        jax.grad(lambda *a: _loss(f, *a), (0, 1, 2)), (0, 0, None)
    )(X, R, SCALE),
    "linearize": lambda f: jax.linearize(f, X, R)[1](V, W),
    "hvp": lambda f: jax.jvp(
        jax.grad(lambda x, r: _loss(f, x, r), (0, 1)), (X, R), (V, W)
    ),
    "grad of grad": lambda f: jax.grad(
        lambda x: jnp.sum(jax.grad(lambda r: _loss(f, x, r))(R) ** 2)
    )(X),
    "scan and checkpoint": lambda f: jax.grad(lambda x: _scan(f, x))(X),
    "export": lambda f: jax.export.deserialize(
        jax.export.export(jax.jit(jax.grad(lambda *a: _loss(f, *a), (0, 1))))(
            X, R
        ).serialize()
    ).call(X, R),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_under(name: str) -> None:
    results = [jax.tree.leaves(TRANSFORMED[name](f)) for f in (_joined, _apart)]
    for a, b in zip(*results, strict=True):
        assert_agrees(a, b, roundings=512)


@pytest.mark.slow
def test_second_order_through_kernels(kernels: str) -> None:
    for name in ("hvp", "vmap of grad", "scan and checkpoint"):
        ours = jax.jit(lambda: TRANSFORMED[name](_joined))()  # noqa: B023
        with fusednorm.use_backend("reference"):
            expected = jax.jit(lambda: TRANSFORMED[name](_apart))()  # noqa: B023
        for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            assert_agrees(a, b, roundings=1024)
    assert interpreters.runs["rowwise backward"] >= 3


# --- what goes apart, and what is refused ---------------------------------------------

MASK = jnp.arange(24) < 20


@pytest.mark.parametrize(
    "options",
    [
        {"mask": MASK},
        {"reduction_axes": (1, 2)},
        {"reduction_axes": 1, "feature_axes": 1},
        {"dtype": "complex64"},
    ],
    ids=str,
)
def test_what_no_kernel_takes(options: dict) -> None:
    y, h = fusednorm.layer_norm(X, residual=R, **options)
    np.testing.assert_array_equal(h, X + R)
    np.testing.assert_array_equal(y, fusednorm.layer_norm(X + R, **options))


def test_several_axes_run_the_kernels_of_several_axes(kernels: str) -> None:
    fusednorm.layer_norm(X, SCALE, residual=R, reduction_axes=(1, 2))
    assert [name.split(",")[0] for name in interpreters.runs] == ["channelwise forward"]


def test_over_a_mapped_axis() -> None:
    def both(norm: Callable[..., Any]) -> Any:
        return jax.vmap(norm, axis_name="data")(X, R)

    ours = both(lambda x, r: fusednorm.layer_norm(x, residual=r, axis_name="data"))
    theirs = both(lambda x, r: (fusednorm.layer_norm(x + r, axis_name="data"), x + r))
    for a, b in zip(ours, theirs, strict=True):
        assert_agrees(a, b)


def test_numbers_promote_as_they_add() -> None:
    y, h = fusednorm.layer_norm(X.astype("bfloat16"), residual=R)
    assert (y.dtype, h.dtype) == ("float32", "float32")
    _, h = fusednorm.layer_norm(X, residual=jnp.ones(X.shape, "int32"))
    np.testing.assert_array_equal(h, X + 1)
    y, h = fusednorm.rms_norm(X, residual=(1j * R).astype("complex64"))
    assert_agrees(h, X + 1j * R)
    assert_agrees(y, fusednorm.rms_norm(h))


@pytest.mark.filterwarnings("ignore:Casting from complex to real")
@pytest.mark.parametrize("complex_one", ["x", "residual"])
def test_complex_numbers_are_never_a_primitives(complex_one: str) -> None:
    given = {"x": X, "residual": R}
    given[complex_one] = (1 + 1j) * given[complex_one]
    dtype = "float32" if complex_one == "residual" else None  # else x would be real

    def norm(x: Any, residual: Any) -> Any:
        return fusednorm.layer_norm(x, residual=residual, dtype=dtype)

    (choice,) = fusednorm.explain(norm, **given).choices
    assert "complex numbers" in str(choice)


@pytest.mark.parametrize("function", [fusednorm.layer_norm, fusednorm.rms_norm])
def test_another_shape_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"\(24,\), expected that of x, \(3, 4, 24\)"):
        function(X, residual=R[0, 0])


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_layers(name: str, options: dict) -> None:
    layer = build(fusednorm, name, 24, **options)
    y, h = layer(X, residual=R)
    np.testing.assert_array_equal(h, X + R)
    np.testing.assert_array_equal(y, layer(X + R))
    assert y.dtype == layer(X).dtype

    def loss(layer: Any, x: Any) -> Any:
        y, h = layer(x, residual=R)
        return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

    explained = fusednorm.explain(nnx.grad(loss, argnums=(0, 1)), layer, X)
    assert [(c.op, c.residual) for c in explained.choices] == [
        ("forward", True),
        ("backward", True),
    ]
    assert "K=24  residual\n" in str(explained)


def test_layers_call_a_promotion_of_the_users() -> None:
    seen = []

    def promote(arrays: Any, *, dtype: Any) -> Any:
        seen.append(len(arrays))
        return tuple(a if a is None else a.astype("bfloat16") for a in arrays)

    layer = build(fusednorm, "LayerNorm", 24, promote_dtype=promote)
    y, h = layer(X, residual=R)
    assert seen == [4]
    assert (y.dtype, h.dtype) == ("bfloat16", "bfloat16")


# --- the plan -------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_counts_the_bytes(platform: str) -> None:
    x = jax.ShapeDtypeStruct((512, 1024), "bfloat16")
    tensor = 512 * 1024 * 2

    def step(x: Any, r: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(lambda x, r: fusednorm.rms_norm(x, residual=r), x, r)
        return y, vjp(dy)

    forward, backward = fusednorm.explain(step, x, x, (x, x)).on(platform).choices
    for choice, units in ((forward, 4), (backward, 4)):
        assert isinstance(choice.plan, dispatch.Kernel)
        assert units <= choice.plan.bytes_moved / tensor < units + 0.05


def test_along_the_narrower_one_alone() -> None:
    """The tangent of a narrower x is one of h, and has h's wider dtype."""
    x, v = (jnp.linspace(a, 3, 24, dtype="bfloat16").reshape(2, 12) for a in (-1, 1))
    r = jnp.linspace(0, 1, 24).reshape(2, 12)

    def joined(x: Any) -> Any:
        return fusednorm.layer_norm(x, residual=r)

    def apart(x: Any) -> Any:
        h = x + r
        return fusednorm.layer_norm(h), h

    for f in (lambda f: jax.jvp(f, (x,), (v,)), lambda f: jax.linearize(f, x)[1](v)):
        for a, b in zip(*map(jax.tree.leaves, (f(joined), f(apart))), strict=True):
            assert a.dtype == b.dtype == "float32"
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
