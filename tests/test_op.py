"""The op under JAX's transformations: every result equals flax's.

Equality with flax is checked in float64, where both agree to about 1e-12, so a wrong
factor or a missing term cannot hide. test_suite.py tests float32 accuracy.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import checkify, jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BATCH, PIXELS, CHANNELS = 4, 3, 6
KINDS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]
ACTIVATED = [
    "layer_norm gelu",
    "group_norm silu",
    "instance_norm gelu_tanh",
    "batch_norm relu",
]
ACTIVATIONS = {
    "": lambda y: y,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def function(kind: str) -> Callable[..., jax.Array]:
    """Returns our norm of (x, scale, bias); RMSNorm has the bias added afterwards."""
    kind, _, activation = kind.partition(" ")
    options = {"activation": activation or None}

    def ours(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        if kind == "rms_norm":
            return fusednorm.rms_norm(x, scale) + bias
        if kind == "group_norm":
            return fusednorm.group_norm(x, scale, bias, num_groups=2, **options)
        if kind == "batch_norm":
            return fusednorm.batch_norm(x, scale, bias, **options)[0]
        return getattr(fusednorm, kind)(x, scale, bias, **options)

    return ours


def flax_function(kind: str, channels: int = CHANNELS) -> Callable[..., jax.Array]:
    """Returns flax's norm of (x, scale, bias)."""
    kind, _, activation = kind.partition(" ")
    make = {
        "layer_norm": functools.partial(nnx.LayerNorm, channels),
        "rms_norm": functools.partial(nnx.RMSNorm, channels),
        "group_norm": functools.partial(nnx.GroupNorm, channels, num_groups=2),
        "instance_norm": functools.partial(nnx.InstanceNorm, channels),
        "batch_norm": functools.partial(nnx.BatchNorm, channels),
    }[kind]

    def flax(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        layer = make(use_fast_variance=False, param_dtype=scale.dtype, rngs=nnx.Rngs(0))
        layer.scale[...] = scale
        if kind == "rms_norm":
            return layer(x) + bias
        layer.bias[...] = bias
        if kind == "batch_norm":  # float64 like all else
            layer.mean = nnx.BatchStat(jnp.zeros(channels, scale.dtype))
            layer.var = nnx.BatchStat(jnp.ones(channels, scale.dtype))
        return ACTIVATIONS[activation](layer(x))

    return flax


@pytest.fixture
def data() -> Any:
    """Yields x, scale, bias and dy in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shape = (BATCH, PIXELS, CHANNELS)
        yield tuple(
            jnp.asarray(rng.normal(mean, 1.3, size))
            for mean, size in ((0.4, shape), (1, CHANNELS), (0, CHANNELS), (0, shape))
        )


def assert_same(ours: Any, theirs: Any) -> None:
    """Asserts that two trees agree to 1e-11 of each leaf's largest element.

    Both are computed in float64 but in different orders.
    """
    leaves, tree = jax.tree.flatten(ours)
    expected, expected_tree = jax.tree.flatten(theirs)
    assert tree == expected_tree
    for a, b in zip(leaves, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.abs(b).max() > 1e-3, "next to nothing to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


Fn = Callable[..., jax.Array]
ARGS = (0, 1, 2)


def scalar(f: Fn, dy: jax.Array) -> Fn:
    """Returns <dy, sin(y)>, whose derivatives of every order are O(1) and random."""
    return lambda *args: jnp.sum(dy * jnp.sin(f(*args)))


def first(f: Fn, dy: jax.Array) -> Fn:
    """Returns `scalar` for one sample under vmap; its dy is one more argument."""
    return lambda x, scale, bias, dy: jnp.vdot(dy, jnp.sin(f(x[None], scale, bias)[0]))


def each(param: jax.Array) -> jax.Array:
    """Returns (batch, features) of different values, made from (features,)."""
    return param * jnp.arange(1.0, BATCH + 1)[:, None]


def chain(f: Fn, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Applies three norms in a scan, so that derivatives pass through all of them."""
    step = lambda h, k: (f(h * k, scale, bias), None)  # noqa: E731
    return lax.scan(step, x, jnp.arange(1.0, 4.0))[0]


# name -> (function f, dy) -> function of (x, scale, bias)
TRANSFORMS: dict[str, Callable[[Fn, jax.Array], Fn]] = {
    "value": lambda f, dy: f,
    "jit": lambda f, dy: jax.jit(f),
    "grad": lambda f, dy: jax.grad(scalar(f, dy), ARGS),
    "jit of grad": lambda f, dy: jax.jit(jax.grad(scalar(f, dy), ARGS)),
    "grad of x alone": lambda f, dy: jax.grad(scalar(f, dy), 0),
    "grad of scale alone": lambda f, dy: jax.grad(scalar(f, dy), 1),
    "grad of bias alone": lambda f, dy: jax.grad(scalar(f, dy), 2),
    "value_and_grad": lambda f, dy: jax.value_and_grad(scalar(f, dy), ARGS),
    "vjp": lambda f, dy: lambda *args: jax.vjp(f, *args)[1](dy),
    "jvp": lambda f, dy: lambda x, s, b: jax.jvp(f, (x, s, b), (dy, b, s)),
    "jvp of x alone": lambda f, dy: (
        lambda x, s, b: jax.jvp(lambda x: f(x, s, b), (x,), (dy,))
    ),
    "jvp of params alone": lambda f, dy: (
        lambda x, s, b: jax.jvp(lambda s, b: f(x, s, b), (s, b), (b, s))
    ),
    "linearize": lambda f, dy: lambda x, s, b: jax.linearize(f, x, s, b)[1](dy, b, s),
    "jacfwd": lambda f, dy: jax.jacfwd(f, ARGS),
    "jacrev": lambda f, dy: jax.jacrev(f, ARGS),
    "forward-over-reverse": lambda f, dy: jax.jacfwd(
        jax.jacrev(scalar(f, dy), ARGS), ARGS
    ),
    "reverse-over-reverse": lambda f, dy: jax.jacrev(
        jax.jacrev(scalar(f, dy), ARGS), ARGS
    ),
    "reverse-over-forward": lambda f, dy: jax.jacrev(
        jax.jacfwd(scalar(f, dy), ARGS), ARGS
    ),
    "forward-over-forward": lambda f, dy: jax.jacfwd(
        jax.jacfwd(scalar(f, dy), ARGS), ARGS
    ),
    "third derivative": lambda f, dy: (
        lambda x, s, b: jax.jvp(
            lambda x: jax.jvp(jax.grad(lambda x: scalar(f, dy)(x, s, b)), (x,), (dy,))[
                1
            ],
            (x,),
            (jnp.cos(dy),),
        )
    ),
    "hvp": lambda f, dy: (
        lambda x, s, b: jax.jvp(jax.grad(scalar(f, dy), ARGS), (x, s, b), (dy, b, s))
    ),
    "vmap of x": lambda f, dy: (
        lambda x, s, b: jax.vmap(f, (0, None, None))(
            jnp.stack([x, 2 * x, x + dy]), s, b
        )
    ),
    "vmap of x's last axis, out to the front": lambda f, dy: (
        lambda x, s, b: jax.vmap(f, (3, None, None), 1)(
            jnp.stack([x, 2 * x, x + dy], 3), s, b
        )
    ),
    "vmap of params": lambda f, dy: (
        lambda x, s, b: jax.vmap(f, (None, 0, 0))(x, each(s), each(b))
    ),
    "vmap of both": lambda f, dy: (
        lambda x, s, b: jax.vmap(f, (0, 0, None))(jnp.stack([x] * 3 + [dy]), each(s), b)
    ),
    "nested vmap": lambda f, dy: (
        lambda x, s, b: jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, 0))(
            jnp.stack([x, dy]), each(s), jnp.stack([b, s])
        )
    ),
    "nested vmap, params inside": lambda f, dy: (
        lambda x, s, b: jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, 0))(
            jnp.stack([x, dy]), each(s), each(b)
        )
    ),
    "vmap of grad": lambda f, dy: (
        lambda x, s, b: jax.vmap(jax.grad(first(f, dy), ARGS), (0, None, None, 0))(
            x, s, b, dy
        )
    ),
    "vmap of grad, params mapped": lambda f, dy: (
        lambda x, s, b: jax.vmap(jax.grad(first(f, dy), ARGS), (0, 0, 0, 0))(
            x, each(s), each(b), dy
        )
    ),
    "vmap of vmap of grad": lambda f, dy: (
        lambda x, s, b: jax.vmap(
            jax.vmap(jax.grad(first(f, dy), ARGS), (0, None, None, 0)),
            (None, 0, None, None),
        )(x, each(s), b, dy)
    ),
    "grad of vmap": lambda f, dy: jax.grad(
        lambda x, s, b: jnp.vdot(
            jnp.stack([dy, x]),
            jnp.sin(jax.vmap(f, (0, None, None))(jnp.stack([x, 2 * x + dy]), s, b)),
        ),
        ARGS,
    ),
    "grad of vmap, params mapped": lambda f, dy: jax.grad(
        lambda x, s, b: jnp.vdot(
            jnp.stack([dy] * BATCH),
            jnp.sin(jax.vmap(f, (None, 0, None))(x, each(s), b)),
        ),
        ARGS,
    ),
    "grad of nested vmap, params mapped inside": lambda f, dy: jax.grad(
        lambda x, s, b: jnp.sum(
            jnp.sin(
                jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, 0))(
                    jnp.stack([x, dy]), each(s), jnp.stack([b, s])
                )
            )
            * dy
        ),
        ARGS,
    ),
    "grad of nested vmap, the bias shared": lambda f, dy: jax.grad(
        lambda x, s, b: jnp.sum(
            jnp.sin(
                jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None))(
                    jnp.stack([x, dy]), each(s), b
                )
            )
            * dy
        ),
        ARGS,
    ),
    "jvp of vmap": lambda f, dy: (
        lambda x, s, b: jax.jvp(
            lambda s: jax.vmap(f, (0, None, None))(jnp.stack([x, dy]), s, b), (s,), (b,)
        )
    ),
    "remat": lambda f, dy: jax.grad(jax.checkpoint(scalar(f, dy)), ARGS),
    "remat, dots saveable": lambda f, dy: jax.grad(
        jax.checkpoint(scalar(f, dy), policy=jax.checkpoint_policies.dots_saveable),
        ARGS,
    ),
    "remat, everything saveable": lambda f, dy: jax.grad(
        jax.checkpoint(
            scalar(f, dy), policy=jax.checkpoint_policies.everything_saveable
        ),
        ARGS,
    ),
    "scan": lambda f, dy: functools.partial(chain, f),
    "grad of scan": lambda f, dy: jax.grad(
        scalar(functools.partial(chain, f), dy), ARGS
    ),
    "grad of remat of scan": lambda f, dy: jax.grad(
        scalar(jax.checkpoint(functools.partial(chain, f)), dy), ARGS
    ),
    "hvp of scan": lambda f, dy: (
        lambda x, s, b: jax.jvp(
            jax.grad(scalar(functools.partial(chain, f), dy), ARGS),
            (x, s, b),
            (dy, b, s),
        )
    ),
    "cond": lambda f, dy: jax.grad(
        lambda x, s, b: lax.cond(
            x[0, 0, 0] < 9, scalar(f, dy), lambda x, s, b: jnp.vdot(x, dy), x, s, b
        ),
        ARGS,
    ),
}


def _kinds_and_transforms() -> Iterator[Any]:
    """Yields every kind with every transform; most are marked slow.

    LayerNorm has every transform in the quick run. The other norms, and LayerNorm with
    an activation, have every third one, starting at a different transform from kind to
    kind. The other activated norms have none.
    """
    for i, kind in enumerate([*KINDS, *ACTIVATED]):
        for j, transform in enumerate(TRANSFORMS):
            quick = i == 0 or ((i + j) % 3 == 0 and kind not in ACTIVATED[1:])
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(kind, transform, marks=marks)


@pytest.mark.parametrize(("kind", "transform"), list(_kinds_and_transforms()))
def test_equal_to_flax(kind: str, transform: str, data: Any) -> None:
    x, scale, bias, dy = data
    transformed = TRANSFORMS[transform]
    ours = jax.jit(transformed(function(kind), dy))(x, scale, bias)
    theirs = jax.jit(transformed(flax_function(kind), dy))(x, scale, bias)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_tangent_is_its_gradient_transposed(kind: str, data: Any) -> None:
    """The two are transposes: neither lets masked elements enter the statistics."""
    x, scale, _, dy = data
    mask = np.random.default_rng(1).random(x.shape) < 0.7
    options = {"num_groups": 2} if kind == "group_norm" else {}

    def f(x: Any) -> jax.Array:
        y = getattr(fusednorm, kind)(x, scale, mask=mask, **options)
        return y[0] if kind == "batch_norm" else y

    x_dot = jnp.cos(dy)
    along = jnp.vdot(dy, jax.jvp(f, (x,), (x_dot,))[1])
    (dx,) = jax.vjp(f, x)[1](dy)
    np.testing.assert_allclose(along, jnp.vdot(dx, x_dot), rtol=1e-11)


# --- export ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "group_norm silu"])
@pytest.mark.parametrize(
    ("platforms", "shape"),
    [
        (["cpu"], "4, 3, 6"),
        (["cpu", "cuda"], "4, 3, 6"),
        (["cpu", "cuda", "tpu"], "batch, 3, 6"),
        (["cpu"], "batch, pixels, 6"),
    ],
    ids=str,
)
def test_export(kind: str, platforms: list[str], shape: str) -> None:
    """A norm that is serialized with its gradient gives the same results.

    It is exported for one or more platforms, and for any batch or number of pixels.
    """
    f = function(kind)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(0.3, 1, (4, 3, 6)).astype("float32") for _ in range(2))
    scale, bias = (rng.normal(1, 1, 6).astype("float32") for _ in range(2))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), "float32")
    param = jax.ShapeDtypeStruct((6,), "float32")
    exported = jax.export.export(jax.jit(f), platforms=platforms)(
        symbolic, param, param
    )
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    y, vjp = jax.vjp(again.call, x, scale, bias)
    expected, expected_vjp = jax.vjp(f, x, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    for a, b in zip(vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("norm", [fusednorm.layer_norm, fusednorm.rms_norm])
def test_export_for_any_number_of_features(norm: Fn) -> None:
    f = jax.jit(norm)
    x, dy = (np.random.default_rng(i).normal(0.3, 1, (4, 6)) for i in (0, 1))
    x, dy = x.astype("float32"), dy.astype("float32")
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, n"), "float32")
    exported = jax.export.export(f)(symbolic)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    (y, vjp), (expected, expected_vjp) = jax.vjp(again.call, x), jax.vjp(f, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(vjp(dy)[0], expected_vjp(dy)[0], rtol=0, atol=1e-5)


# --- devices --------------------------------------------------------------------------

# How x is sharded over 8 devices. Parameters are sharded as its features are.
SHARDINGS = {
    "data": P("d"),
    "sequence": P(None, "d"),
    "features": P(None, None, "d"),
}


def gathered(hlo: str) -> list[str]:
    """Returns the shapes of all-gathers, all-to-alls and permutes in compiled code."""
    return re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)\S*\(", hlo)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("kind", [*KINDS, "layer_norm gelu"])
def test_sharded_by_jit(kind: str, mode: str, sharding: str) -> None:
    """Results on 8 virtual devices equal those of one, and nothing is gathered."""
    spec = SHARDINGS[sharding]
    f = function(kind)
    args = sharded_data()
    expected = jax.jit(lambda x, s, b, dy: jax.vjp(f, x, s, b)[1](dy))(*args)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, mode),))
    with jax.set_mesh(mesh):
        param = P(spec[2]) if len(spec) == 3 else P()
        x, scale, bias, dy = (
            jax.device_put(a, NamedSharding(mesh, to))
            for a, to in zip(args, (spec, param, param, spec), strict=True)
        )
        transposed = jax.jit(
            lambda x, s, b, dy: (jax.vjp(f, x, s, b)[1](dy), f(x, s, b))
        )
        if (kind, mode, sharding) == ("group_norm", "Explicit", "features"):
            # 2 groups do not divide over 8 devices: both flax and fusednorm raise
            with pytest.raises(Exception, match="does not evenly divide"):
                transposed.lower(x, scale, bias, dy)
            return
        compiled = transposed.lower(x, scale, bias, dy).compile()
        gradients, y = compiled(x, scale, bias, dy)
    assert gathered(compiled.as_text()) == []
    assert y.sharding.is_equivalent_to(x.sharding, y.ndim)
    np.testing.assert_allclose(y, f(*args[:3]), rtol=0, atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def sharded_data() -> list[jax.Array]:
    """Returns x, scale, bias and dy in float32."""
    rng = np.random.default_rng(0)
    shape = (8, 16, 24)
    return [
        jnp.asarray(rng.normal(mean, 1.3, size), "float32")
        for mean, size in ((0.4, shape), (1, 24), (0, 24), (0, shape))
    ]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("kind", [*KINDS, "group_norm silu"])
def test_shard_map(kind: str, mode: str, check_vma: bool) -> None:
    """Data-parallel results equal flax's.

    The parameters are replicated, so their gradients are summed over the devices.
    """
    x, scale, bias, dy = sharded_data()
    across = {"axis_name": "d"} if kind == "batch_norm" else {}

    def part(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        if kind == "batch_norm":
            return fusednorm.batch_norm(x, scale, bias, **across)[0]
        return function(kind)(x, scale, bias)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, mode),))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            part, in_specs=(P("d"), P(), P()), out_specs=P("d"), check_vma=check_vma
        )
        args = [
            jax.device_put(a, NamedSharding(mesh, to))
            for a, to in zip(
                (x, scale, bias, dy), (P("d"), P(), P(), P("d")), strict=True
            )
        ]
        ours = derivatives(mapped)(*args)
    theirs = derivatives(flax_function(kind, 24))(x, scale, bias, dy)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def derivatives(f: Fn) -> Fn:
    """Returns a function for f's value, gradients, and a Hessian-vector product.

    The Hessian-vector product differentiates the psum.
    """

    @jax.jit
    def all_of_them(x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        gradient = jax.grad(scalar(f, dy), ARGS)
        hvp = jax.jvp(gradient, (x, scale, bias), (dy, bias, scale))
        return f(x, scale, bias), hvp

    return all_of_them


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_shard_map_over_features(kind: str) -> None:
    """Results equal flax's if features, scale and bias are sharded over `axis_name`."""
    x, scale, bias, dy = sharded_data()

    def part(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        if kind == "rms_norm":
            return fusednorm.rms_norm(x, scale, axis_name="d") + bias
        return fusednorm.layer_norm(x, scale, bias, axis_name="d")

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    last = P(None, None, "d")
    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=(last, P("d"), P("d")), out_specs=last
    )
    ours = derivatives(mapped)(x, scale, bias, dy)
    theirs = derivatives(flax_function(kind, 24))(x, scale, bias, dy)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


# --- configurations of jax ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_strict_promotion_and_ranks(kind: str) -> None:
    """The op promotes neither dtypes nor ranks implicitly."""
    x, scale, bias, dy = sharded_data()
    x = x.astype("bfloat16")
    call = dict(group_norm={"num_groups": 2}).get(kind, {})
    params = [scale] if kind == "rms_norm" else [scale, bias]
    mask = jnp.ones((8, 1, 1), bool)

    def f(*args: Any) -> Any:
        y = getattr(fusednorm, kind)(*args, dtype="float32", mask=mask, **call)
        return y[0] if kind == "batch_norm" else y

    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        y, vjp = jax.vjp(f, x, *params)
        gradients = vjp(dy)
        jax.jvp(f, (x, *params), (x, *params))
    expected, expected_vjp = jax.vjp(f, x, *params)
    np.testing.assert_array_equal(y, expected)
    for a, b in zip(gradients, expected_vjp(dy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_debug_nans() -> None:
    """A NaN in x is reported, and constant or fully masked inputs create none."""
    x, scale, bias, dy = sharded_data()
    constant = jnp.full_like(x, 3.0)
    with jax.debug_nans(True):
        for kind in KINDS:
            _, vjp = jax.vjp(function(kind), constant, scale, bias)
            jax.block_until_ready(vjp(dy))
        fusednorm.layer_norm(x, mask=jnp.zeros(x.shape, bool)).block_until_ready()
        with pytest.raises(FloatingPointError):
            fusednorm.layer_norm(x.at[0, 0, 0].set(jnp.nan)).block_until_ready()


def test_complex_input_is_flax_s() -> None:
    """The variance of a complex x is real, as in flax: mean(|x - mean|^2)."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6)) + 1j * rng.normal(size=(4, 6)), "complex64")
    scale, bias = jnp.linspace(0.5, 2, 6), jnp.linspace(-1.0, 1.0, 6)
    for kind in KINDS:
        with warnings.catch_warnings():
            # flax's BatchNorm writes a complex mean to its float32 running average
            warnings.simplefilter("ignore")
            expected = flax_function(kind)(x, scale, bias)
        y = function(kind)(x, scale, bias)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "batch_norm"])
def test_taylor_series(kind: str, data: Any) -> None:
    """The Taylor series of y and of a gradient equal flax's to the third order.

    flax's BatchNorm has no Taylor series.
    """
    x, scale, bias, dy = data

    def series(f: Fn, *, derive: bool) -> Any:
        g = scalar(f, dy)
        at = jax.grad(g) if derive else f
        return jet.jet(lambda x: at(x, scale, bias), (x,), ((dy, x * dy, dy**2),))

    for derive in (False, True):
        ours, theirs = (
            series(f, derive=derive) for f in (function(kind), flax_function(kind))
        )
        assert_same(ours, theirs)


# --- checkify -------------------------------------------------------------------------


ROWS = jnp.arange(64.0).reshape(4, 16)
MAKES_NAN: dict[str, Fn] = {
    "norm": fusednorm.layer_norm,
    "norm_gradient": lambda v: jax.vjp(fusednorm.layer_norm, ROWS)[1](v)[0],
    "norm_tangent": lambda v: jax.jvp(fusednorm.layer_norm, (ROWS,), (v,))[1],
}


@pytest.mark.parametrize("primitive", MAKES_NAN)
def test_checkify_sees_a_nan(primitive: str) -> None:
    """It is told of a NaN even where nothing after the norm lets it through."""
    f = jax.jit(lambda v: jnp.nan_to_num(MAKES_NAN[primitive](v)))
    checked = checkify.checkify(f, errors=checkify.float_checks)
    error, _ = checked(ROWS.at[0, 0].set(jnp.inf))
    assert f"nan generated by primitive: {primitive}." in str(error.get())
    error, _ = checked(ROWS)
    assert error.get() is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_weakly_typed_as_their_arrays(kind: str) -> None:
    """`jnp.full` makes such arrays; a bfloat16 array absorbs their gradients."""
    weak = [jnp.full((4, 3, 6), 0.5), jnp.full(6, 2.0), jnp.full(6, 1.0)]
    ours = function(kind)
    for array in weak:
        assert array.weak_type
    for only in (0, 1, 2):
        arrays = [
            array if i == only else array.astype("float32")
            for i, array in enumerate(weak)
        ]
        found = jax.grad(lambda *a: (ours(*a) ** 2).mean(), (0, 1, 2))(*arrays)
        assert [jax.typeof(g).weak_type for g in found] == [i == only for i in range(3)]
