"""The five layers as replacements for flax.nnx's, with the installed flax as the judge.

Where flax is not the more accurate of the two, values and gradients are also compared
with float64 (tests/helpers.py).
"""

import doctest
import functools
import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm import reference
from tests.helpers import EPS32, Case, assert_close
from tests.layer_helpers import (
    FEATURES,
    NAMES,
    SHAPE,
    arrays,
    assert_agrees,
    assert_same_state,
    assert_trees_agree,
    assert_true,
    build,
    case_of,
    data,
    layer_of,
    outputs_and_gradients,
    pair,
    randomize,
    roundings_of,
)
from tests.test_op import ACTIVATIONS

by_name = pytest.mark.parametrize("name", NAMES)
WITH_BIAS = tuple(name for name in NAMES if name != "RMSNorm")


# --- construction ---------------------------------------------------------------------

normal = nnx.initializers.normal(0.3)


def constructions() -> Iterator[Any]:
    """Yields each constructor argument of each layer, as (layer, arguments)."""
    for name in NAMES:
        for kwargs in (
            {},
            {"epsilon": 0.5},
            {"use_scale": False},
            {"scale_init": normal},
            {"param_dtype": jnp.bfloat16},
            {"param_dtype": jnp.float16, "scale_init": normal},
            {"use_fast_variance": False},
            {"scale_metadata": {"mine": 1}},
        ):
            yield name, kwargs
    for name in WITH_BIAS:
        for kwargs in (
            {"use_bias": False},
            {"use_bias": False, "use_scale": False},
            {"bias_init": normal},
            {"bias_init": normal, "scale_init": normal, "param_dtype": jnp.bfloat16},
            {"bias_metadata": {"mine": (2, "x")}, "scale_metadata": {"mine": 1}},
        ):
            yield name, kwargs
    for name in ("LayerNorm", "RMSNorm"):
        for kwargs in (
            {"reduction_axes": (1, 2, 3)},
            {"reduction_axes": [-1, 1]},
            {"reduction_axes": np.int64(2)},
            {"feature_axes": (2, -1), "num_features": 3 * FEATURES},
            {"feature_axes": (3, 2), "num_features": 3 * FEATURES},
            {"feature_axes": 1, "reduction_axes": (1, 2), "num_features": 4},
            {"feature_axes": (0, 2), "num_features": 15},
        ):
            yield name, kwargs
    for kwargs in (
        {"num_groups": 1},
        {"num_groups": 4},
        {"num_groups": FEATURES},
        {"num_groups": None, "group_size": 3},
        {"reduction_axes": (1, 2, 3)},
        {"reduction_axes": [-1, -2, -3]},
    ):
        yield "GroupNorm", kwargs
    for kwargs in (
        {"feature_axes": 1, "num_features": 4},
        {"feature_axes": -2, "num_features": 3},
        {"feature_axes": [1, 3], "num_features": 4 * FEATURES},
    ):
        yield "InstanceNorm", kwargs
    for kwargs in (
        {"axis": 1, "num_features": 4},
        {"axis": -4, "num_features": 5},
        {"axis": (1, 3), "num_features": 48, "use_running_average": True},
        {"momentum": 0.3},
        {"momentum": 1.0},
        {"use_running_average": True},
        {"use_running_average": True, "use_bias": False, "axis": 2, "num_features": 3},
    ):
        yield "BatchNorm", kwargs


def named(value: Any) -> str:
    if isinstance(value, str):
        return value
    if callable(value):
        return ""
    return ",".join(
        f"{key}={getattr(item, '__name__', item)}" for key, item in value.items()
    ).replace(" ", "")


each_construction = pytest.mark.parametrize(
    ("name", "kwargs"), list(constructions()), ids=named
)


@by_name
@pytest.mark.parametrize("method", ["__init__", "__call__", "set_view"])
def test_signatures_are_those_of_flax(name: str, method: str) -> None:
    """Those of a call leave out our options, which flax's callers never give."""

    def parameters(library: Any) -> list[tuple]:
        function = getattr(getattr(library, name), method, None)
        if function is None:
            return []
        signature = inspect.signature(function)
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(fusednorm) == parameters(nnx)
    if method == "__call__":
        expected = {"activation": None, "scale_offset": 0.0, "residual": None}
        if name in ("LayerNorm", "RMSNorm"):
            expected |= {"scale": None, "bias": None}
        theirs, ours = (getattr(m, name).__call__.__kwdefaults__ for m in
                        (nnx, fusednorm))  # fmt: skip
        assert ours == (theirs or {}) | expected


@each_construction
def test_state_and_attributes_are_those_of_flax(name: str, kwargs: dict) -> None:
    rngs = [nnx.Rngs(params=7, other=8) for _ in range(2)]
    theirs = build(nnx, name, **kwargs, rngs=rngs[0])
    ours = build(fusednorm, name, **kwargs, rngs=rngs[1])
    assert isinstance(ours, getattr(nnx, name))
    assert type(ours) is getattr(fusednorm, name)
    assert_same_state(ours, theirs)
    assert nnx.graphdef(ours).attributes != ()
    settings, expected = (
        {
            key: value
            for key, value in vars(layer).items()
            if not key.startswith("_") and not isinstance(value, nnx.Variable)
        }
        for layer in (ours, theirs)
    )
    assert settings == expected
    # Both drew the same random keys, so the modules built next are also the same.
    assert_same_state(*rngs)


# Arguments that change a layer's results, whatever the other arguments are.
EFFECTIVE = {
    *("epsilon", "use_scale", "use_bias", "num_groups", "group_size", "momentum"),
    "use_running_average",
}


@functools.cache
def flax_default(name: str) -> dict[str, Any]:
    return outputs_and_gradients(pair(name)[0], data())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (name, kwargs)
        for name, kwargs in constructions()
        if not any("init" in key or "metadata" in key for key in kwargs)
    ],
    ids=named,
)
def test_arguments_mean_what_they_mean_to_flax(name: str, kwargs: dict) -> None:
    """y, all gradients and the state after a call agree for each argument."""
    theirs, ours = pair(name, **kwargs)
    x = data()
    if "use_fast_variance" not in kwargs:
        theirs.use_fast_variance = False  # flax's better formula; see the faults below
    expected = outputs_and_gradients(theirs, x)
    assert_trees_agree(outputs_and_gradients(ours, x), expected)
    if kwargs.keys() & EFFECTIVE and "num_features" not in kwargs:
        default = flax_default(name)
        changed, unchanged = (
            {part: results[part] for part in ("y", "state")}
            for results in (expected, default)
        )
        with pytest.raises(AssertionError, match="elements are off"):
            assert_trees_agree(unchanged, changed)  # or agreement would prove nothing


# --- dtypes ---------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16")

# flax assigns values of other dtypes to its running statistics, which are float32.
flax_warns = pytest.mark.filterwarnings(
    "ignore:scatter inputs have incompatible types:FutureWarning",
    "ignore:Casting complex values to real:numpy.exceptions.ComplexWarning",
    "ignore:Casting from complex to real:DeprecationWarning",
)


@flax_warns
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), ("BatchNorm", {"use_running_average": True})],
    ids=named,
)
def test_output_dtype_is_that_of_flax(name: str, options: dict, x64: bool) -> None:
    """Covers every combination of the dtypes of x, the parameters and `dtype`."""
    dtypes: tuple[tuple, ...] = (  # of x, of the parameters, of the output
        (*DTYPES, "complex64", "int32", "bool"),
        DTYPES,
        (None, "bfloat16"),
    )
    if x64:
        dtypes = (
            (*DTYPES, "float64", "complex64", "int32"),
            (*DTYPES, "float64"),
            (None, *DTYPES, "float64", "complex64"),
        )
    shape = (2, 3, FEATURES)

    def avals(layer: Any, x: jax.ShapeDtypeStruct, dtype: Any) -> Any:
        layer.dtype = dtype
        graph, state = nnx.split(layer)

        def call(state: Any, x: Any) -> Any:
            merged = nnx.merge(graph, state)
            return merged(x), arrays(nnx.state(merged))

        y, state = jax.eval_shape(call, state, x)
        return (y.shape, y.dtype, y.weak_type), jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        )

    seen = set()
    with jax.enable_x64(x64):
        for param_dtype in dtypes[1]:
            layers = pair(name, param_dtype=param_dtype, **options)
            for x_dtype, dtype in itertools.product(dtypes[0], dtypes[2]):
                x = jax.ShapeDtypeStruct(shape, x_dtype)
                theirs, ours = (avals(layer, x, dtype) for layer in layers)
                assert ours == theirs, (x_dtype, param_dtype, dtype)
                seen.add(theirs[0][1].name)
    # BatchNorm's running averages are float32, so half-precision outputs are rare.
    assert seen >= {"float32", "bfloat16", "complex64"}


@by_name
@pytest.mark.parametrize("dtype", [jnp.int32, "uint8", bool])
def test_an_output_dtype_that_is_no_float_is_refused(name: str, dtype: Any) -> None:
    for layer in pair(name, dtype=dtype):
        with pytest.raises(ValueError, match="Dtype must be inexact"):
            layer(data())


@by_name
@pytest.mark.parametrize(
    ("x_dtype", "param_dtype", "dtype"),
    [
        ("float32", "float32", None),
        ("bfloat16", "float32", None),
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_values_and_gradients_in_float64(
    name: str, x_dtype: str, param_dtype: str, dtype: str | None
) -> None:
    case = case_of(name)
    x, scale, bias, dy = case.data(0, jnp.dtype(x_dtype), jnp.dtype(param_dtype))
    layer = layer_of(fusednorm, case, scale, bias, param_dtype=param_dtype, dtype=dtype)
    y = layer_of(nnx, case, scale, bias, param_dtype=param_dtype, dtype=dtype)(x)
    dy = dy.astype(y.dtype)
    assert_true(layer, case.truth(x, scale, bias, dy), x, dy)


@by_name
def test_integers_are_taken_as_floats(name: str) -> None:
    theirs, ours = pair(name)
    x = jnp.asarray(np.random.default_rng(4).integers(-50, 50, SHAPE))
    assert x.dtype == jnp.int32
    assert_agrees(ours(x), theirs(x))


@flax_warns
@by_name
@pytest.mark.parametrize("param_dtype", ["float32", "complex64"])
def test_complex_numbers(name: str, param_dtype: str) -> None:
    """Values, running statistics and gradients agree, holomorphic or not."""
    theirs, ours = pair(name, param_dtype=param_dtype)
    x = data(dtype="complex64")
    expected = outputs_and_gradients(theirs, x)
    assert expected["y"].dtype == jnp.complex64
    assert_trees_agree(outputs_and_gradients(ours, x), expected)


@flax_warns
@by_name
def test_float64_is_computed_in_float64(name: str) -> None:
    with jax.enable_x64(True):
        for kwargs, x_dtype in (
            ({}, "float64"),
            ({"param_dtype": "float64", "dtype": "float64"}, "float32"),
        ):
            theirs, ours = pair(name, **kwargs)
            x = data(dtype=x_dtype)
            expected = outputs_and_gradients(theirs, x)
            assert expected["y"].dtype == jnp.float64
            # float64 results agree to float64's rounding errors. Only the gradients of
            # float32 parameters are rounded to float32.
            assert_trees_agree(outputs_and_gradients(ours, x), expected)
        theirs, ours = pair(name, dtype="float32")
        assert_agrees(ours(x.astype("float64")), theirs(x.astype("float64")))


# --- errors ---------------------------------------------------------------------------


def raised(library: Any, name: str, kwargs: dict, call: Callable) -> Exception:
    with pytest.raises(Exception) as caught:
        call(build(library, name, **kwargs))
    return caught.value


def without_params(name: str) -> dict:
    bias = {} if name == "RMSNorm" else {"use_bias": False}
    return {"use_scale": False, **bias}


def mask_of(*shape: int, dtype: Any = bool) -> Callable:
    return lambda layer: layer(data(), mask=jnp.ones(shape, dtype))


def misuses() -> Iterator[Any]:
    """Yields what flax refuses, as (layer, arguments, call)."""

    def call(layer: Any) -> Any:
        return layer(data())

    for name in NAMES:
        yield name, {"num_features": 6}, call
        yield name, {}, lambda layer: layer(data()[..., :1])
        yield name, {}, lambda layer: layer(jnp.float32(1))
        yield name, {}, mask_of(*SHAPE, dtype="float32")
        yield name, {}, mask_of(*SHAPE, dtype="int32")
        yield name, {}, mask_of(1, *SHAPE)
        yield name, {"epsilon": None}, call
        yield name, {"axis_name": "nowhere"}, call
        yield name, {"no_such_argument": 1}, call
        yield name, {"rngs": None}, call
        yield name, {}, lambda layer: layer(data(), no_such_argument=1)
        yield name, {}, lambda layer: layer()
        if name != "RMSNorm":  # only RMSNorm takes a mask by position
            yield name, {}, lambda layer: layer(data(), jnp.ones(SHAPE, bool))
    for name in NAMES:
        if name != "GroupNorm":
            yield name, {}, mask_of(5)
            yield name, {}, mask_of(2, *SHAPE[1:])
            yield name, {}, mask_of(*SHAPE[::-1])
    for name in ("LayerNorm", "RMSNorm"):
        for axes in (4, (0, 4), (-9, -1)):
            yield name, {"reduction_axes": axes}, call
            yield name, {"feature_axes": axes}, call
            yield name, {"reduction_axes": axes, **without_params(name)}, call
        yield name, {"reduction_axes": "a"}, call
        yield name, {"feature_axes": (2, 3)}, call  # wants 36 features
    yield "BatchNorm", {"num_features": 6, **without_params("BatchNorm")}, call
    yield "BatchNorm", {"num_features": 6, "use_running_average": True}, call
    yield "BatchNorm", {"axis": 4}, call
    yield "BatchNorm", {"axis": (1, 3), "num_features": 48}, call
    yield "BatchNorm", {"use_running_average": None}, call
    yield "InstanceNorm", {"feature_axes": 0, "num_features": 5}, call
    yield "InstanceNorm", {"feature_axes": (0, 1), "num_features": 20}, call
    yield "InstanceNorm", {"feature_axes": -4, "num_features": 5}, call
    yield "InstanceNorm", {"feature_axes": 4}, call
    yield "InstanceNorm", {}, lambda layer: layer(jnp.ones(FEATURES))
    yield "GroupNorm", {"num_features": 6, "num_groups": 3, "use_scale": False}, call
    yield "LayerNorm", {"epsilon": "1e-5"}, call
    for groups, size in (
        *((32, None), (None, None), (3, 4), (None, 5), (5, None), (0, None)),
        *((-3, None), (None, 0), (3.0, None), ("3", None)),
    ):
        yield "GroupNorm", {"num_groups": groups, "group_size": size}, call


@pytest.mark.parametrize(("name", "kwargs", "call"), list(misuses()), ids=named)
def test_misuse_raises_the_error_that_flax_raises(
    name: str, kwargs: dict, call: Callable
) -> None:
    theirs, ours = (raised(library, name, kwargs, call) for library in (nnx, fusednorm))
    assert isinstance(ours, type(theirs)), f"{ours!r} is not flax's {theirs!r}"


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "error", "message"),
    [
        ("LayerNorm", {"num_features": 6}, SHAPE, TypeError, "expected (12,)"),
        ("GroupNorm", {"num_features": 6}, SHAPE, TypeError, "expected 6 channels"),
        ("BatchNorm", {"axis": 1}, SHAPE, TypeError, "expected (4,)"),
        ("LayerNorm", {"reduction_axes": 4}, SHAPE, ValueError, "with 4 axes"),
        ("RMSNorm", {}, (), ValueError, "reduction_axes=-1 is out of range"),
        ("InstanceNorm", {"feature_axes": 0}, SHAPE, ValueError, "leading dimension"),
        ("BatchNorm", {"use_running_average": None}, SHAPE, ValueError, "`nnx.view`"),
        # flax accepts these silently, and computes something else:
        ("LayerNorm", {"reduction_axes": -5}, SHAPE, ValueError, "with 4 axes"),
        ("BatchNorm", {"axis": -5}, SHAPE, ValueError, "with 4 axes"),
        ("GroupNorm", {"reduction_axes": (1, 4)}, SHAPE, ValueError, "with 4 axes"),
        ("GroupNorm", {"reduction_axes": (1, 2)}, SHAPE, ValueError, "the last axis"),
    ],
)
def test_errors_say_what_is_wrong(
    name: str, kwargs: dict, shape: tuple, error: type, message: str
) -> None:
    caught = raised(fusednorm, name, kwargs, lambda layer: layer(data(shape)))
    assert isinstance(caught, error)
    assert message in str(caught)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm"])
def test_one_feature_is_not_spread_over_x(name: str) -> None:
    """A layer's own scale and bias must have x's features. A call's may broadcast."""
    x = data((FEATURES,))
    for library in (nnx, fusednorm):
        layer = build(library, name, num_features=1)
        with pytest.raises((TypeError, ValueError)):
            layer(x)
    layer = build(fusednorm, "LayerNorm")
    layer.bias = nnx.Param(jnp.zeros((5, FEATURES)))
    with pytest.raises(TypeError, match=r"bias has shape \(60,\), expected \(12,\)"):
        layer(data((5, FEATURES)))
    layer.bias = nnx.Param(jnp.ones((1, FEATURES)))
    assert layer(data((5, FEATURES))).shape == (5, FEATURES)


def test_running_averages_keep_their_shape() -> None:
    layer = build(
        fusednorm, "BatchNorm", num_features=1, use_scale=False, use_bias=False
    )
    with pytest.raises(TypeError, match=r"sizes \(12,\).*num_features=1"):
        layer(data())
    assert layer.mean.shape == layer.var.shape == (1,)


@by_name
def test_integers_of_64_bits(name: str) -> None:
    """Covers integers too large for jax's 32 bits."""
    theirs, ours = pair(name)
    x = np.random.default_rng(0).integers(-(10**12), 10**12, SHAPE)
    assert x.dtype == np.int64
    expected = theirs(x)
    assert_agrees(ours(x), ours(x.astype(np.float32)), 0)
    np.testing.assert_allclose(ours(x), expected, atol=1e-4)


@by_name
def test_float_is_float32(name: str) -> None:
    """Without x64, `dtype=float` causes no warning, and a kernel accepts it."""
    layer = pair(name, dtype=float)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, grads = nnx.value_and_grad(
            lambda layer, x: jnp.vdot(layer(x), x), argnums=1
        )(layer, data())
    assert y.dtype == grads.dtype == jnp.float32
    (choice,) = fusednorm.explain(layer, data()).on("cuda").choices
    assert choice.backend == "mosaic_gpu"


@pytest.mark.parametrize("value", [None, "small", 1j, ["a"]], ids=str)
def test_epsilon_and_scale_offset_are_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="epsilon must be a real number, got"):
        fusednorm.layer_norm(data(), epsilon=value)
    with pytest.raises(TypeError, match="scale_offset must be a real number"):
        fusednorm.layer_norm(data(), jnp.ones(12), scale_offset=value)


def test_numbers_of_any_type() -> None:
    x, scale = data(), jnp.ones(12)
    expected = fusednorm.layer_norm(x, scale, epsilon=0.5, scale_offset=2.0)
    for kind in (np.float32, np.float64, jnp.float32, jnp.bfloat16, np.array):
        y = fusednorm.layer_norm(x, scale, epsilon=kind(0.5), scale_offset=kind(2))
        np.testing.assert_array_equal(y, expected)
    with pytest.raises(TypeError, match="add an array to the scale instead"):
        fusednorm.layer_norm(x, scale, scale_offset=scale)
    with pytest.raises(TypeError, match="known when the call is traced"):
        jax.jit(lambda one: fusednorm.layer_norm(x, scale, scale_offset=one))(1.0)


def test_an_output_in_float8() -> None:
    dtype = jnp.float8_e4m3fn
    theirs, ours = pair("BatchNorm", dtype=dtype, use_running_average=True)
    x = data()
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == dtype
    exact = pair("BatchNorm", use_running_average=True)[1](x)
    np.testing.assert_array_equal(y, exact.astype(dtype))


def test_a_mask_that_does_not_broadcast_is_refused_by_group_norm_too() -> None:
    """flax reshapes the mask before it checks it, and raises reshape's TypeError."""
    for shape in ((5,), (2, *SHAPE[1:]), SHAPE[::-1]):
        caught = raised(fusednorm, "GroupNorm", {}, mask_of(*shape))
        assert isinstance(caught, ValueError)
        assert f"mask has shape {shape}" in str(caught)


@by_name
def test_a_mask_larger_than_x_is_refused(name: str) -> None:
    """The mask has sizes above 1 where x has size 1 or no axis."""
    for shape in ((1, *SHAPE[1:]), SHAPE[1:]):
        with pytest.raises(ValueError, match="does not broadcast to x"):
            build(fusednorm, name)(data(shape), mask=jnp.ones(SHAPE, bool))


def test_a_vector_is_one_sample_to_group_norm() -> None:
    """flax fails because it repeats its statistics along axis 1, which x lacks."""
    theirs, ours = pair("GroupNorm")
    x = data()[0, 0]
    y = ours(x[:1])
    assert y.shape == (1, FEATURES)
    assert_agrees(ours(x[0]), y[0])
    with pytest.raises(ValueError, match="axis 1 is out of bounds"):
        theirs(x[0])


@by_name
def test_a_call_that_fails_changes_nothing(name: str) -> None:
    _, ours = pair(name)
    before = nnx.clone(ours)
    for call in (mask_of(7), lambda layer: layer(data()[..., :5])):
        with pytest.raises((TypeError, ValueError)):
            call(ours)
    assert_same_state(ours, before)


def test_epsilon_of_any_number_type() -> None:
    for epsilon in (1, np.float32(0.25), np.full(1, 0.25), jnp.float32(0.25)):
        theirs, ours = pair("LayerNorm", epsilon=epsilon)
        assert_agrees(ours(data()), theirs(data()))
    _, layer = pair("LayerNorm", epsilon=np.full(FEATURES, 0.25))
    with pytest.raises(ValueError, match=r"one number.* of shape \(12,\)"):
        layer(data())


def test_groups_are_a_whole_number() -> None:
    y = fusednorm.group_norm(data(), num_groups=np.int64(2))
    assert_agrees(y, build(nnx, "GroupNorm", num_groups=2)(data()))
    with pytest.raises(TypeError, match="interpreted as an integer"):
        fusednorm.group_norm(data(), num_groups=2.0)


def test_axes_are_whole_numbers() -> None:
    for axes in (None, 1.0, "last"):
        with pytest.raises(TypeError, match=f"reduction_axes must be .* got {axes!r}"):
            fusednorm.layer_norm(data(), reduction_axes=axes)  # type: ignore[arg-type]


def test_lists_are_arrays() -> None:
    x, ones = data().tolist(), [1.0] * FEATURES
    y, h = fusednorm.layer_norm(x, ones, ones, residual=x)
    expected = fusednorm.layer_norm(
        data(), jnp.ones(FEATURES), jnp.ones(FEATURES), residual=data()
    )
    assert_trees_agree((y, h), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm", "eval"])
def test_an_epsilon_that_the_program_computes(name: str) -> None:
    """A traced epsilon cannot be a cache key, so the reference runs.

    The reference also has a derivative with respect to epsilon.
    """
    options = {"use_running_average": True} if name == "eval" else {}
    layers = pair("BatchNorm" if name == "eval" else name, **options)
    x, dy = data(), data()[::-1]

    def call(layer: Any, epsilon: Any) -> Any:
        layer = nnx.clone(layer)
        layer.epsilon = epsilon
        return layer(x)

    theirs, ours = (
        jax.vmap(
            jax.value_and_grad(lambda e, layer=layer: jnp.vdot(call(layer, e), dy))
        )
        for layer in layers
    )
    epsilons = jnp.array([1e-3, 0.5], jnp.float32)
    assert_trees_agree(ours(epsilons), theirs(epsilons))
    if name != "eval":
        (choice,) = fusednorm.explain(
            jax.vmap(lambda e: call(layers[1], e)), epsilons
        ).choices
        assert choice.plan.reason == "an epsilon that the program computes"
        assert choice.x == f"float32{list(x.shape)}"


# --- BatchNorm's running averages and modes -------------------------------------------


def assert_roundings(actual: Any, expected: np.ndarray) -> None:
    """Asserts that a float32 array is within 32 rounding errors of float64."""
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, roundings_of(expected, 32, jnp.float32))


@pytest.mark.parametrize("momentum", [0.99, 0.7, 0.0])
@pytest.mark.parametrize("axis", [-1, 1])
def test_running_averages_after_several_steps(momentum: float, axis: int) -> None:
    """average = momentum * average + (1 - momentum) * batch, with biased variance."""
    theirs, ours = pair("BatchNorm", SHAPE[axis], axis=axis, momentum=momentum)
    mean, var = (np.asarray(v[...], np.float64) for v in (ours.mean, ours.var))
    others = tuple(a for a in range(4) if a != axis % 4)
    for step in range(5):
        x = data(seed=10 + step) + step
        ours(x), theirs(x)
        x = np.asarray(x, np.float64)
        mean = momentum * mean + (1 - momentum) * x.mean(others)
        var = momentum * var + (1 - momentum) * x.var(others)
    assert_roundings(ours.mean[...], mean)
    assert_roundings(ours.var[...], var)
    assert_agrees(ours.mean[...], theirs.mean[...])
    assert_agrees(ours.var[...], theirs.var[...], roundings=128)  # E[x^2] - E[x]^2


def batch_mode(layer: Any, *args: Any, **kwargs: Any) -> str:
    """Returns "train" or "eval", for the statistics that a call uses.

    Asserts that a call moves the running statistics in "train" alone.
    """
    layer = nnx.clone(layer)
    x, before = data(), arrays(nnx.state(layer, nnx.BatchStat))
    y = layer(x, *args, **kwargs)
    now = arrays(nnx.state(layer, nnx.BatchStat))
    moved = {key for key in now if (now[key] != before[key]).any()}
    graph, state = nnx.split(layer)
    modes = [
        mode
        for mode, flag in (("train", False), ("eval", True))
        if np.array_equal(nnx.merge(graph, state, copy=True)(x, flag), y)
    ]
    assert (modes, moved) in [(["train"], {"mean", "var"}), (["eval"], set())]
    return modes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_running_averages_keep_no_more_than_x_for_a_derivative(dtype: str) -> None:
    """Over many layers in a scan, what a derivative keeps is most of the memory."""
    options = {"use_running_average": True, "dtype": jnp.dtype(dtype)}
    theirs, ours = pair("BatchNorm", **options)
    x = jnp.asarray(data(dtype=dtype))

    def kept(layer: Any) -> int:
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def layers(params: Any, x: jax.Array) -> jax.Array:
            def one(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                y = nnx.merge(graph, params, rest, copy=True)(x)
                return jnp.tanh(y), None  # which keeps its result

            return jax.lax.scan(one, x, None, length=8)[0]

        _, vjp = jax.eval_shape(functools.partial(jax.vjp, layers), params, x)
        stacked = [a for a in jax.tree.leaves(vjp) if a.shape == (8, *x.shape)]
        return sum(a.size * a.dtype.itemsize for a in stacked)

    assert kept(ours) <= kept(theirs)
    assert kept(ours) <= 2 * 8 * x.nbytes


def test_use_running_average_and_its_precedence() -> None:
    """The call's argument overrides the constructor, train(), eval() and nnx.view."""
    for library in (nnx, fusednorm):
        make = functools.partial(build, library, "BatchNorm")
        layer = randomize(make())
        assert batch_mode(layer) == "train"
        assert batch_mode(layer, True) == "eval"
        assert batch_mode(layer, use_running_average=True) == "eval"
        layer = randomize(make(use_running_average=True))
        assert batch_mode(layer) == "eval"
        assert batch_mode(layer, use_running_average=False) == "train"
        assert batch_mode(layer, None) == "eval"
        layer = randomize(make(use_running_average=None))
        assert batch_mode(layer, False) == "train"
        for layer in (randomize(make()), randomize(make(use_running_average=None))):
            layer.eval()
            assert batch_mode(layer) == "eval"
            assert batch_mode(layer, False) == "train"
            layer.train()
            assert batch_mode(layer) == "train"
            assert batch_mode(layer, True) == "eval"
            view = nnx.view(layer, use_running_average=True)
            assert isinstance(view, library.BatchNorm)
            assert batch_mode(view) == "eval"
            assert batch_mode(view, False) == "train"
            assert batch_mode(layer) == "train"
            assert view.mean is layer.mean


def test_eval_mode_in_float64() -> None:
    """Running statistics of any magnitude are used at their own precision."""
    case = Case("batch_norm", (40, FEATURES))
    x, scale, bias, _ = case.data(0, "float32", "float32")
    layer = layer_of(fusednorm, case, scale, bias, use_running_average=True)
    mean = np.random.default_rng(1).normal(0, 100, FEATURES)
    var = np.geomspace(1e-8, 1e4, FEATURES)
    layer.mean[...], layer.var[...] = jnp.float32(mean), jnp.float32(var)
    mean, var = (np.asarray(v[...], np.float64) for v in (layer.mean, layer.var))
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    y = layer(jnp.asarray(x))
    assert_close(y, expected, 16 * EPS32 * (np.abs(expected) + np.abs(bias)))
    # The mask is ignored, whatever its shape, as in flax.
    np.testing.assert_array_equal(layer(jnp.asarray(x), mask=jnp.zeros(7, bool)), y)


@pytest.mark.parametrize("dtype", ["float64", "complex64", "bfloat16"])
def test_running_averages_keep_their_dtype(dtype: str) -> None:
    """Values of another dtype cause no warning, unlike in flax."""
    with jax.enable_x64(True):
        _, ours = pair("BatchNorm", momentum=0.0)
        x = data(dtype=dtype)
        ours(x)
        exact = np.asarray(x, np.complex128)
        assert_roundings(ours.mean[...], exact.mean((0, 1, 2)).real)
        assert_roundings(ours.var[...], exact.var((0, 1, 2)))


def test_no_gradient_flows_through_the_running_averages() -> None:
    """The loss sums a call in training and one in eval mode; gradients match flax's."""
    x, dy = data(), data(seed=3)

    def loss(layer: Any, x: Any) -> jax.Array:
        y = layer(x)
        return jnp.vdot(y + layer(x, use_running_average=True), dy)

    gradients = [
        nnx.grad(loss, argnums=(0, 1))(layer, x) for layer in pair("BatchNorm")
    ]
    (d_theirs, dx_theirs), (d_ours, dx_ours) = gradients
    assert_agrees(dx_ours, dx_theirs)
    assert_trees_agree(arrays(d_ours), arrays(d_theirs))


# --- masks ----------------------------------------------------------------------------

MASK_SHAPES = [
    SHAPE,
    (*SHAPE[:-1], 1),
    (SHAPE[0], 1, 1, 1),
    (1, SHAPE[1], 1, 1),
    SHAPE[1:],
    (SHAPE[2], 1),
    (FEATURES,),
    (),
]


def draw_mask(shape: tuple[int, ...]) -> jax.Array:
    mask = np.random.default_rng(7).random(shape) < 0.7
    mask.flat[0] = True
    return jnp.asarray(mask)


@by_name
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_shape_that_broadcasts(name: str, shape: tuple) -> None:
    case = case_of(name)
    x, scale, bias, dy = case.data(6, "float32", "float32")
    mask = draw_mask(shape)
    call = functools.partial(lambda layer, x, mask: layer(x, mask=mask), mask=mask)
    dy = dy.astype("float32")
    theirs, ours = (
        layer_of(library, case, scale, bias) for library in (nnx, fusednorm)
    )
    truth = case.truth(x, scale, bias, dy, np.asarray(mask))
    results = assert_true(ours, truth, x, dy, call)
    # If nothing is counted, flax's statistics are NaN, and we define our own.
    counts = np.broadcast_to(mask, SHAPE).sum(case.reduction_axes)
    if shape in (SHAPE, (FEATURES,)) and name != "GroupNorm" and counts.all():
        expected = outputs_and_gradients(theirs, x, call, dy)
        assert_trees_agree(results, expected, roundings=64)
    if name == "BatchNorm":
        moved = np.where(counts > 0, 0.01, 0)
        mean, var = truth.mean.ravel(), truth.var.ravel()
        assert_roundings(results["state"]["mean"], moved * mean)
        assert_roundings(results["state"]["var"], 1 - moved + moved * var)


def test_rms_norm_takes_its_mask_by_position() -> None:
    theirs, ours = pair("RMSNorm")
    mask = draw_mask(SHAPE).at[..., 0].set(True)
    assert_agrees(ours(data(), mask), theirs(data(), mask))
    np.testing.assert_array_equal(ours(data(), mask), ours(data(), mask=mask))
    with pytest.raises(AssertionError, match="elements are off"):
        assert_agrees(ours(data(), mask), ours(data()))


@by_name
def test_what_is_masked_out_has_no_say(name: str) -> None:
    """Huge values, infinities and NaN outside the mask do not change the rest."""
    _, ours = pair(name)
    mask = np.ones(SHAPE, bool)
    mask[1, 2], mask[:, :, 1, ::2] = False, False
    x = data()

    def call(layer: Any, x: Any) -> jax.Array:
        y = layer(x, mask=jnp.asarray(mask))
        return jnp.where(mask, y, 0)  # so that dy is 0 outside the mask

    clean = outputs_and_gradients(ours, x, call)
    results = outputs_and_gradients(ours, jnp.where(mask, x, 1e30), call)
    for each in (clean, results):
        each["dx"] = np.where(mask, each["dx"], 0)
    jax.tree.map(np.testing.assert_array_equal, results, clean)
    # 0 * inf makes every gradient NaN, in flax too, but no statistic.
    for garbage in (np.inf, np.nan):
        layers = nnx.clone(ours), nnx.clone(ours)
        dirty = call(layers[0], jnp.where(mask, x, garbage))
        np.testing.assert_array_equal(dirty, call(layers[1], x))
        assert_same_state(*layers)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_variance_that_overflows(name: str) -> None:
    """y is 0, as with flax's slow variance. flax's default gives NaN."""
    x = data().at[0, 0, 0].set(1e30)
    default, ours = pair(name)
    slow = pair(name, use_fast_variance=False)[0]
    assert jnp.isnan(default(x)).any()
    np.testing.assert_array_equal(ours(x) == 0, slow(x) == 0)
    assert jnp.isfinite(ours(x)).all()
    if name == "BatchNorm":
        np.testing.assert_array_equal(jnp.isinf(ours.var), jnp.isinf(slow.var))
        assert jnp.isinf(ours.var).any()


@by_name
def test_a_mask_that_lets_nothing_in(name: str) -> None:
    """Mean 0 and variance 1 carry no gradient, and running averages are untouched.

    flax returns NaN, and its running averages are lost.
    """
    theirs, ours = pair(name, epsilon=0.5)
    x, mask = data(), jnp.zeros((*SHAPE[:-1], FEATURES), bool)
    before = nnx.clone(ours)

    def call(layer: Any, x: Any) -> jax.Array:
        return layer(x, mask=mask)

    results = outputs_and_gradients(ours, x, call)
    scale = np.asarray(ours.scale[...], np.float64)
    bias = 0 if name == "RMSNorm" else np.asarray(ours.bias[...], np.float64)
    rstd = 1 / np.sqrt(1.5)
    dy = np.asarray(data(seed=3) / 3, np.float64)
    assert_roundings(results["y"], np.asarray(x, np.float64) * rstd * scale + bias)
    assert_roundings(results["dx"], dy * rstd * scale)
    call(ours, x)
    assert_same_state(ours, before)
    assert np.isnan(call(theirs, x)).all()
    if name == "BatchNorm":
        assert np.isnan(theirs.mean[...]).all()


def test_channels_without_a_masked_in_element_keep_their_running_averages() -> None:
    _, ours = pair("BatchNorm", momentum=0.5)
    before = arrays(nnx.clone(nnx.state(ours, nnx.BatchStat)))
    mask = np.ones((1, FEATURES), bool)
    mask[0, [2, 5]] = False
    ours(data(), mask=jnp.asarray(mask))
    for key, value in arrays(nnx.state(ours, nnx.BatchStat)).items():
        kept = np.asarray(value == before[key])
        np.testing.assert_array_equal(np.flatnonzero(kept), [2, 5])


def test_channels_that_are_not_last_keep_theirs_too() -> None:
    layer = build(fusednorm, "BatchNorm", SHAPE[1], axis=1)
    before = nnx.clone(layer)
    mask = jnp.ones((*SHAPE[:-1], 1), bool).at[:, 2].set(False)
    layer(data(), mask=mask)
    for name in ("mean", "var"):
        kept = getattr(layer, name)[...] == getattr(before, name)[...]
        np.testing.assert_array_equal(np.flatnonzero(kept), [2])


@by_name
@pytest.mark.parametrize("shape", [(0, 4, FEATURES), (3, 0, FEATURES)], ids=str)
def test_an_empty_batch(name: str, shape: tuple) -> None:
    """y is empty, gradients are zero, and running averages stay."""
    _, ours = pair(name)
    before = nnx.clone(ours)
    results = outputs_and_gradients(ours, data(shape))
    assert results["y"].shape == results["dx"].shape == shape
    for gradient in results["d_params"].values():
        np.testing.assert_array_equal(gradient, np.zeros(FEATURES))
    for mask in (None, jnp.ones(FEATURES, bool)):
        ours(data(shape), mask=mask)
        assert_same_state(ours, before)
    if name == "BatchNorm":
        theirs, _ = pair(name)
        theirs(data(shape))
        assert np.isnan(theirs.mean[...]).all()


# --- promote_dtype --------------------------------------------------------------------


def test_promote_dtype_is_called_as_flax_calls_it() -> None:
    for name in NAMES:
        calls: dict[Any, list] = {nnx: [], fusednorm: []}
        for library, seen in calls.items():

            def promote(args: tuple, *, dtype: Any, seen: list = seen) -> tuple:
                seen.append(
                    (dtype, [a if a is None else (a.shape, a.dtype) for a in args])
                )
                return args

            for kwargs in ({}, {"dtype": jnp.float32}, without_params(name)):
                layer = build(library, name, promote_dtype=promote, **kwargs)
                layer(data())
        assert calls[fusednorm] == calls[nnx]
        lengths = {"BatchNorm": 5, "RMSNorm": 2}
        assert [len(args) for _, args in calls[nnx]] == [lengths.get(name, 3)] * 3


def to_bfloat16(args: tuple, *, dtype: Any = None) -> tuple:
    """Casts everything but BatchNorm's running statistics."""
    kept = args[1:3] if len(args) == 5 else ()
    return tuple(
        a if a is None or any(a is k for k in kept) else a.astype(jnp.bfloat16)
        for a in args
    )


def to_float16_x(args: tuple, *, dtype: Any = None) -> tuple:
    x, *others = args
    return (x.astype(jnp.float16), *others)


def something_else(args: tuple, *, dtype: Any = None) -> tuple:
    """Triples x and drops the bias: the layer must use the arrays returned here."""
    x, *others = args
    if len(others) > 1:
        others[-1] = None
    return (3 * x, *others)


def statistics_moved(args: tuple, *, dtype: Any = None) -> tuple:
    x, mean, var, scale, bias = args
    return x, mean + 1, 4 * var, scale, bias


@by_name
@pytest.mark.parametrize("promote", [to_bfloat16, to_float16_x])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_promote_dtype_that_casts(
    name: str, promote: Callable, dtype: str | None
) -> None:
    """The layer uses the arrays that come back, and its output has flax's dtype."""
    case = case_of(name)
    x, scale, bias, dy = case.data(8, "float32", "float32")
    theirs, ours = (
        layer_of(library, case, scale, bias, promote_dtype=promote, dtype=dtype)
        for library in (nnx, fusednorm)
    )
    y = ours(jnp.asarray(x))
    assert y.dtype == theirs(jnp.asarray(x)).dtype
    given = (None if a is None else jnp.asarray(a) for a in (x, scale, bias))
    truth = case.truth(*promote(tuple(given)), dy)
    assert_close(y, truth.y, truth.bounds["y"])


@by_name
def test_promote_dtype_that_does_something_else(name: str) -> None:
    x = data()
    theirs, ours = pair(name, promote_dtype=something_else, epsilon=1.0)
    expected = outputs_and_gradients(theirs, x)
    assert_trees_agree(outputs_and_gradients(ours, x), expected)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_agrees(flax_default(name)["y"], expected["y"])


@pytest.mark.parametrize("change", [lambda a: (*a, None), lambda a: a[:-1]])
@by_name
def test_promote_dtype_that_returns_another_number(name: str, change: Any) -> None:
    def promote(arrays: Any, *, dtype: Any = None) -> Any:
        return change(arrays)

    theirs, ours = pair(name, promote_dtype=promote)
    with pytest.raises(ValueError, match="unpack"):
        theirs(data())
    with pytest.raises(ValueError, match="promote_dtype must return as many"):
        ours(data())


def test_promote_dtype_has_a_say_in_running_statistics() -> None:
    x = data()
    for promote in (statistics_moved, something_else):
        layers = pair("BatchNorm", promote_dtype=promote, use_running_average=True)
        y_theirs, y_ours = (layer(x) for layer in layers)
        assert_agrees(y_ours, y_theirs)
        default = pair("BatchNorm", use_running_average=True)[0]
        with pytest.raises(AssertionError, match="elements are off"):
            assert_agrees(default(x), y_theirs)


# --- an activation in the same call ---------------------------------------------------


@by_name
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_is_jax_nn_s(name: str, activation: str) -> None:
    """The activation applies to the layer's result, in both modes of BatchNorm.

    The running statistics do not see it.
    """
    x = data()
    for mode in ["train", "eval"] if name == "BatchNorm" else ["train"]:
        plain, layer = (pair(name)[1] for _ in range(2))
        getattr(plain, mode)()
        getattr(layer, mode)()
        expected = ACTIVATIONS[activation](plain(x))
        y = layer(x, activation=activation)
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-6)
        assert_same_state(layer, plain)


def test_activation_comes_before_the_rounding() -> None:
    """y in bfloat16 is the activation of the float32 norm, rounded once."""
    x = jnp.asarray(np.random.default_rng(0).normal(0, 2, (64, 32)), jnp.float32)
    layer = fusednorm.LayerNorm(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    once = jax.nn.silu(fusednorm.LayerNorm(32, rngs=nnx.Rngs(0))(x))
    y = layer(x, activation="silu")
    np.testing.assert_array_equal(y, once.astype(jnp.bfloat16))
    assert (y != jax.nn.silu(layer(x))).any()  # which rounds twice


@by_name
def test_activation_errors(name: str) -> None:
    _, layer = pair(name)
    with pytest.raises(ValueError, match=r"'swish' is unknown; expected one of 'relu'"):
        layer(jnp.ones(SHAPE), activation="swish")
    with pytest.raises(ValueError, match="takes real numbers, but x is complex64"):
        layer(jnp.ones(SHAPE, jnp.complex64), activation="relu")


# --- what flax gets wrong -------------------------------------------------------------
# Each test also asserts flax's wrong result, so that it fails once flax is fixed.


def worst_error(actual: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual, np.float64) - expected).max())


@pytest.mark.parametrize(("ratio", "fault"), [(1000, 0.05), (5000, 100)])
def test_rows_far_from_zero(ratio: int, fault: float) -> None:
    """E[x^2] - E[x]^2 loses every digit if the mean is thousands of deviations."""
    case = Case("layer_norm", (64, 768))
    _, scale, bias, dy = case.data(0, "float32", "float32")
    rng = np.random.default_rng(2)
    x = (rng.normal(0, 0.5, case.shape) + 0.5 * ratio).astype("float32")
    truth = case.truth(x, scale, bias, dy)
    theirs, ours = (
        layer_of(library, case, scale, bias) for library in (nnx, fusednorm)
    )
    assert worst_error(theirs(jnp.asarray(x)), truth.y) > fault
    assert worst_error(ours(jnp.asarray(x)), truth.y) < 0.004
    assert_true(ours, truth, x, dy)


@pytest.mark.parametrize("axes", [(2, 3), (3,), -1, (0, 3)], ids=str)
def test_group_norm_over_other_axes(axes: Any) -> None:
    """flax repeats a group's statistics along axis 1, whatever the reduction axes."""
    case = case_of("GroupNorm", (2, 3, 4, 12), reduction_axes=axes)
    x, scale, bias, dy = case.data(0, "float32", "float32")
    truth = case.truth(x, scale, bias, dy)
    theirs, ours = (
        layer_of(library, case, scale, bias) for library in (nnx, fusednorm)
    )
    assert_true(ours, truth, x, dy)
    try:
        y = theirs(jnp.asarray(x))
    except TypeError:  # where the repeated statistics do not even fit
        assert axes == (0, 3)
    else:
        assert worst_error(y, truth.y) > 1


def test_group_norm_with_a_mask_of_one_channel() -> None:
    """flax documents that masks broadcast, but splits the one channel into groups."""
    theirs, ours = pair("GroupNorm")
    mask = draw_mask((*SHAPE[:-1], 1))
    with pytest.raises(TypeError, match="cannot reshape"):
        theirs(data(), mask=mask)
    full = jnp.broadcast_to(mask, SHAPE)
    assert_agrees(ours(data(), mask=mask), theirs(data(), mask=full))


def test_mask_and_axis_name() -> None:
    """One device counts 0, 1, 2, 3 and the other one 4 alone.

    The mean is 2. flax averages the means of the devices, and gets 2.75.
    """
    x = jnp.arange(8.0).reshape(2, 4, 1)
    mask = jnp.arange(8).reshape(2, 4, 1) < 5
    means = []
    for library in (nnx, fusednorm):
        layer = build(library, "BatchNorm", 1, momentum=0.0, axis_name="devices")
        graph, state = nnx.split(layer)

        def call(x: Any, mask: Any, graph: Any = graph, state: Any = state) -> Any:
            layer = nnx.merge(graph, state, copy=True)
            layer(x, mask=mask)
            return layer.mean[...], layer.var[...]

        mean, var = jax.vmap(call, axis_name="devices")(x, mask)
        means.append(mean)
    np.testing.assert_array_equal(means[0], [[2.75], [2.75]])
    np.testing.assert_array_equal(means[1], [[2.0], [2.0]])
    np.testing.assert_array_equal(var, [[2.0], [2.0]])


def test_batch_norm_in_bfloat16_far_from_zero() -> None:
    """flax first rounds the running mean, some hundred deviations, to bfloat16."""
    mean = np.random.default_rng(0).uniform(90, 130, FEATURES).astype("float32")
    x = np.random.default_rng(1).normal(size=(64, FEATURES)) + mean
    x = x.astype(jnp.bfloat16)
    expected = (np.asarray(x, np.float64) - mean) / np.sqrt(1 + 1e-5)
    layers = [
        build(library, "BatchNorm", dtype="bfloat16") for library in (nnx, fusednorm)
    ]
    for layer in layers:
        layer.mean[...] = jnp.asarray(mean)
        layer.eval()
    y_theirs, y_ours = (layer(jnp.asarray(x)) for layer in layers)
    assert worst_error(y_theirs, expected) > 0.2
    assert_close(y_ours, expected, 16 * EPS32 * np.abs(expected))


# --- axis_name ------------------------------------------------------------------------


def over_devices(
    how: str, layer: Any, x: jax.Array, *, mask: Any = None
) -> dict[str, Any]:
    """Runs a layer on 4 devices, or 4 mapped parts, that split x's first axis."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def part(params: Any, rest: Any, x: Any, mask: Any) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(x, mask=mask)
        return y, arrays(nnx.state(merged, nnx.BatchStat))

    if how == "vmap":
        mapped: Any = jax.vmap(
            part, in_axes=(None, None, 0, 0), out_axes=(0, None), axis_name="i"
        )
        x, mask = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), (x, mask))
    else:
        mapped = jax.shard_map(
            part,
            mesh=jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(P(), P(), P("i"), P("i")),
            out_specs=(P("i"), P()),
            check_vma=how == "shard_map checked",
        )

    @jax.jit
    def everything(params: Any, rest: Any, x: Any) -> dict[str, Any]:
        y, vjp, state = jax.vjp(
            lambda params, x: mapped(params, rest, x, mask), params, x, has_aux=True
        )
        d_params, dx = vjp(data(y.shape, seed=3) / 3)
        whole = (-1, *y.shape[-2:])
        results = {"y": y.reshape(whole), "dx": dx.reshape(whole)}
        return results | {"d_params": arrays(d_params), "state": state}

    return everything(params, rest, x)


MAPS = ("vmap", "shard_map", "shard_map checked")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *itertools.product(NAMES, ("vmap", "shard_map checked")),
        ("GroupNorm", "shard_map"),
        ("BatchNorm", "shard_map"),
    ],
)
def test_axis_name_combines_statistics_as_flax_does(name: str, how: str) -> None:
    """Without a mask, values, averages and gradients through the combination agree."""
    theirs, ours = pair(name, axis_name="i")
    x = data((8, 5, FEATURES))
    expected = over_devices(how, theirs, x)
    assert_trees_agree(over_devices(how, ours, x), expected)
    layer = pair(name)[0]
    alone = jnp.concatenate([layer(part) for part in jnp.split(x, 4)])
    with pytest.raises(AssertionError, match="elements are off"):
        assert_agrees(alone, expected["y"])


@pytest.mark.parametrize("how", MAPS)
def test_axis_name_and_mask_are_the_whole_batch(how: str) -> None:
    """BatchNorm over four devices with unequal counts is BatchNorm on one device."""
    case = Case("batch_norm", (8, 5, FEATURES))
    x, scale, bias, _ = case.data(0, "float32", "float32")
    dy = np.asarray(data(case.shape, seed=3) / 3)
    rng = np.random.default_rng(1)
    mask = rng.random(case.shape) < np.linspace(0.1, 0.9, 8)[:, None, None]
    mask[:2, :, 3] = False  # one device counts nothing in this channel
    mask[:, :, 4] = False  # no device counts anything in this one
    layer = layer_of(fusednorm, case, scale, bias, axis_name="i", momentum=0.75)
    truth = case.truth(x, scale, bias, dy, mask)
    results = over_devices(how, layer, jnp.asarray(x), mask=jnp.asarray(mask))
    assert_close(results["y"], truth.y, truth.bounds["y"])
    assert_close(results["dx"], truth.dx, truth.bounds["dx"])
    for name, gradient in results["d_params"].items():
        name = f"d{name}"
        assert_close(gradient, getattr(truth, name), truth.bounds[name])
    moved = 0.25 * np.any(mask, (0, 1))
    mean, var = truth.mean.ravel(), truth.var.ravel()
    assert_roundings(results["state"]["mean"], moved * mean)
    assert_roundings(results["state"]["var"], 1 - moved + moved * var)


def test_axis_index_groups_of_numpy() -> None:
    groups = np.array([[0, 1], [2, 3]])
    layers = pair("LayerNorm", axis_name="i", axis_index_groups=groups)
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4])
    theirs, ours = (
        jax.shard_map(
            layer, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False
        )
        for layer in layers
    )
    x = jax.device_put(data((8, 5, FEATURES)), jax.NamedSharding(mesh, P("i")))
    assert_agrees(ours(x), theirs(x))


@pytest.mark.parametrize("groups", [[], [[]], [[0, 1], []]])
def test_groups_of_no_devices_are_refused(groups: list[list[int]]) -> None:
    layer = pair("RMSNorm", axis_name="i", axis_index_groups=groups)[1]
    with pytest.raises(ValueError, match="axis_index_groups must list"):
        over_devices("shard_map", layer, data((8, 5, FEATURES)))


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm"])
def test_axis_index_groups(name: str) -> None:
    """jax supports axis_index_groups only under shard_map without check_vma."""
    theirs, ours = pair(name, axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
    x = data((8, 5, FEATURES))
    expected = over_devices("shard_map", theirs, x)
    results = over_devices("shard_map", ours, x)
    assert_trees_agree(results, expected)
    # The first two devices combine statistics only with each other.
    whole = over_devices("shard_map", ours, x.at[4:].add(1))
    np.testing.assert_array_equal(whole["y"][:4], results["y"][:4])
    assert (whole["y"][4:] != results["y"][4:]).any()


def test_a_group_of_devices_that_counts_nothing_keeps_its_running_averages() -> None:
    layer = pair("BatchNorm", axis_name="i", axis_index_groups=[[2, 3], [0, 1]])[1]
    before = arrays(nnx.clone(nnx.state(layer, nnx.BatchStat)))
    x, mask = data((8, 5, FEATURES)), jnp.ones((8, 5, FEATURES), bool)
    for counted in (slice(None, 4), slice(4, None)):  # the state is the first device's
        here = over_devices(
            "shard_map", layer, x, mask=jnp.zeros_like(mask).at[counted].set(True)
        )["state"]
        for key, value in before.items():
            moved = np.asarray(here[key] != value)
            np.testing.assert_array_equal(moved, counted.stop == 4)


# --- modes of jax ---------------------------------------------------------------------


@by_name
def test_strict_dtype_promotion(name: str) -> None:
    """Whatever flax accepts, ours does, including mixed precision with `dtype`."""
    mask = jnp.ones((FEATURES,), bool)

    def call(layer: Any, x: Any) -> jax.Array:
        return layer(x) if name == "GroupNorm" else layer(x, mask=mask)

    with jax.numpy_dtype_promotion("strict"):
        for kwargs, dtype in (
            ({}, "float32"),
            ({"dtype": "float32", "param_dtype": "bfloat16"}, "float16"),
        ):
            theirs, ours = pair(name, **kwargs)
            x = data(dtype=dtype)
            expected = outputs_and_gradients(theirs, x, call)
            assert_trees_agree(outputs_and_gradients(ours, x, call), expected)
        for layer in pair(name):
            with pytest.raises(jax.dtypes.TypePromotionError):
                layer(data(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_strict_dtype_promotion_of_running_averages(dtype: str) -> None:
    theirs, ours = pair("BatchNorm", dtype=dtype, use_running_average=True)
    integers = np.ones(SHAPE, np.int32)
    with jax.numpy_dtype_promotion("strict"):
        for x in (data(), integers):
            assert theirs(x).dtype == ours(x).dtype == dtype
        found = outputs_and_gradients(ours, data())
    expected = outputs_and_gradients(ours, data())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@by_name
def test_parameters_that_are_gone_are_missed(name: str) -> None:
    for layer in pair(name):
        nnx.pop(layer, nnx.Param)
        with pytest.raises(AttributeError, match="has no attribute 'scale'"):
            layer(data())


@by_name
def test_rank_promotion_is_never_needed(name: str) -> None:
    theirs, ours = pair(name)
    expected = outputs_and_gradients(theirs, data())
    with jax.numpy_rank_promotion("raise"):
        assert_trees_agree(outputs_and_gradients(ours, data()), expected)
        for shape in ((FEATURES,), (*SHAPE[:-1], 1)):
            ours(data(), mask=draw_mask(shape))
        if name == "BatchNorm":
            ours(data(), use_running_average=True)


@by_name
def test_nothing_is_nan_on_the_way(name: str) -> None:
    """jax_debug_nans finds no NaN for constant rows, empty batches and empty masks."""
    _, ours = pair(name)
    with jax.debug_nans(True):
        for x in (jnp.full(SHAPE, 7.0), data((0, 3, FEATURES))):
            graph, state = nnx.split(ours)

            def call(x: Any, mask: Any, graph: Any = graph, state: Any = state) -> Any:
                return nnx.merge(graph, state, copy=True)(x, mask=mask)

            for mask in (None, jnp.zeros(x.shape, bool)):
                y, vjp = jax.vjp(lambda x, mask=mask: call(x, mask), x)
                (dx,) = vjp(data(y.shape, seed=3))
                assert np.isfinite(y).all()
                assert np.isfinite(dx).all()
        with pytest.raises(FloatingPointError):
            ours(data().at[0, 0].set(np.nan))


def test_layers_of_an_abstract_model() -> None:
    """nnx.eval_shape builds our layers, and a state fills them, as it does flax's."""
    for name in NAMES:
        theirs, ours = (
            nnx.eval_shape(functools.partial(build, library, name))
            for library in (nnx, fusednorm)
        )
        assert type(ours) is getattr(fusednorm, name)
        assert_same_state(ours, theirs)
        filled = pair(name)[0]
        nnx.update(ours, nnx.state(filled))
        assert_agrees(ours(data()), filled(data()))


# --- documentation --------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "layers.normalization",
        "layers.fuse",
        "layers.neighbours",
        "layers.explain",
        "reference.chunks",
    ],
)
def test_examples_of_the_docstrings(module: str) -> None:
    """Runs the doctests, among them the examples of flax's specification."""
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    found = doctest.DocTestFinder().find(importlib.import_module(f"fusednorm.{module}"))
    outputs: list[str] = []
    for test in found:
        runner.run(test, out=outputs.append)
    assert not runner.failures, "".join(outputs)
    assert runner.tries >= 2
    documented = {test.name.rpartition(".")[2] for test in found if test.examples}
    if module == "layers.normalization":
        assert documented == set(NAMES)


def test_integers_are_not_rounded_to_the_outputs_dtype() -> None:
    x = jnp.arange(2001, 2025).reshape(2, 12)
    y = fusednorm.layer_norm(x, dtype="bfloat16")
    expected = fusednorm.layer_norm(x.astype("float32"), dtype="bfloat16")
    assert y.dtype == "bfloat16"
    np.testing.assert_array_equal(y, expected)


def test_no_activation_of_a_complex_output() -> None:
    x = jnp.ones((2, 12))
    with pytest.raises(ValueError, match="takes real numbers, but the output is"):
        fusednorm.layer_norm(x, dtype="complex64", activation="silu")


def test_given_statistics_are_used_in_float32() -> None:
    x = jnp.linspace(-2, 2, 24).reshape(2, 12)
    mean, var = jnp.linspace(-1, 1, 12), jnp.linspace(0.3, 3, 12)
    narrow = mean.astype("bfloat16"), var.astype("bfloat16")
    y = fusednorm.batch_norm_inference(x, *narrow)
    wide = [a.astype("float32") for a in narrow]
    np.testing.assert_array_equal(y, fusednorm.batch_norm_inference(x, *wide))


def test_given_statistics_have_no_say_in_the_dtype() -> None:
    x, mean, var = jnp.ones((2, 12), "bfloat16"), jnp.zeros(12), jnp.ones(12)
    assert fusednorm.batch_norm_inference(x, mean, var).dtype == "bfloat16"


@pytest.mark.parametrize("num_groups", [0, -3, 5])
def test_groups_that_do_not_divide_the_channels(num_groups: int) -> None:
    with pytest.raises(ValueError, match="must divide the channels"):
        fusednorm.group_norm(jnp.ones((2, 3, 12)), num_groups=num_groups)


def test_running_averages_of_complex_numbers_are_real() -> None:
    x = jnp.linspace(-1, 1, 24).reshape(2, 12) * (1 + 2j)
    layer = fusednorm.BatchNorm(12, rngs=nnx.Rngs(0))
    layer(x.astype("complex64"))
    assert layer.mean.dtype == layer.var.dtype == "float32"
    np.testing.assert_allclose(layer.mean[...], 0.01 * x.mean(0).real, atol=1e-7)


def test_a_promotions_running_statistics_have_no_say_in_the_dtype() -> None:
    def promote(arrays: Any, *, dtype: Any) -> Any:
        x, mean, var, *params = arrays
        return (x, mean, var, *(p.astype(x.dtype) for p in params))

    layer = fusednorm.BatchNorm(12, promote_dtype=promote, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((4, 12), "bfloat16")).dtype == "bfloat16"


def test_nothing_counted_has_a_mean_of_0() -> None:
    for x in (jnp.ones((0, 12)), jnp.ones((3, 0, 12))):
        _, mean, var = fusednorm.batch_norm(x)
        np.testing.assert_array_equal(mean, np.zeros(12))
        np.testing.assert_array_equal(var, np.ones(12))


@pytest.mark.parametrize("transform", [nnx.vmap, nnx.remat])
def test_transforms_of_an_rms_norm_itself(transform: Any) -> None:
    """They pass every argument that has a default by position."""
    layer, plain = build(fusednorm, "RMSNorm"), build(nnx, "RMSNorm")
    assert_agrees(transform(layer)(data()), transform(plain)(data()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'bais'"):
        layer(data(), bais=None)


def test_an_epsilon_that_is_a_variable() -> None:
    epsilon = nnx.Param(jnp.asarray(0.5))
    expected = fusednorm.layer_norm(data(), epsilon=0.5)
    found = nnx.jit(lambda e: fusednorm.layer_norm(data(), epsilon=e))(epsilon)
    assert_agrees(found, expected)
    assert_agrees(fusednorm.layer_norm(data(), epsilon=epsilon), expected)


def test_a_scalar_and_a_batch_norm_of_all_axes() -> None:
    settings = {"reduction_axes": (), "feature_axes": ()}
    for library in (nnx, fusednorm):
        layer = library.LayerNorm(1, **settings, rngs=nnx.Rngs(0))
        assert jax.grad(lambda x, layer=layer: layer(x))(jnp.float32(3)) == 0
    ours, theirs = (build(m, "BatchNorm", 1, axis=()) for m in (fusednorm, nnx))
    assert_agrees(ours(data()), theirs(data()))
    assert_agrees(ours.var[...], theirs.var[...])


@by_name
def test_a_complex_x_and_a_real_dtype(name: str) -> None:
    """The imaginary part is dropped with NumPy's warning, as by flax."""
    x = data(dtype="complex64") * (1 + 1j)
    theirs, ours = pair(name, dtype="float32")
    for given in (x, np.asarray(x)):
        with pytest.warns(np.exceptions.ComplexWarning):
            expected = theirs(given)
        with pytest.warns(np.exceptions.ComplexWarning):
            assert_agrees(ours(given), expected)


@pytest.mark.parametrize("shape", [(2, FEATURES), (FEATURES, 1), (1, FEATURES)])
def test_a_momentum_that_changes_the_averages_shape(shape: tuple[int, ...]) -> None:
    momentum = jnp.full(shape, 0.5)
    for library in (nnx, fusednorm):
        layer = build(library, "BatchNorm", momentum=momentum)
        with pytest.raises(ValueError, match="shape"):
            layer(data())
        assert layer.mean.shape == layer.var.shape == (FEATURES,)


@pytest.mark.parametrize("channels", ["c", "4*c"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_export_for_any_number_of_channels(name: str, channels: str) -> None:
    """The parameters' size is checked when the exported function is called."""
    layer = build(fusednorm, name)
    shape = jax.export.symbolic_shape(f"b, h, w, {channels}")
    exported = jax.export.export(jax.jit(lambda x: layer(x)))(
        jax.ShapeDtypeStruct(shape, "float32")
    )
    x = data((2, 3, 5, FEATURES))
    assert_agrees(exported.call(x), layer(x))
    with pytest.raises(ValueError, match="refining shapes"):
        exported.call(x[..., :8])


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm", "instance_norm"])
def test_export_with_a_mask(kind: str) -> None:
    """The CPU's form of the variance takes symbolic counts."""
    options = {"num_groups": 3} if kind == "group_norm" else {}

    def norm(x: jax.Array, mask: jax.Array) -> jax.Array:
        return getattr(fusednorm, kind)(x, mask=mask, **options)

    shape = jax.export.symbolic_shape("b, 4, 12")
    exported = jax.export.export(jax.jit(norm))(
        *(jax.ShapeDtypeStruct(shape, dtype) for dtype in ("float32", bool))
    )
    x, mask = data((5, 4, 12)), draw_mask((5, 4, 12))
    assert_agrees(exported.call(x, mask), norm(x, mask))
