"""Builds the layers of flax and fusednorm side by side, and checks that they agree."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusednorm
from tests.helpers import EPS32, Case, Truth, assert_close, ulp

# The layers, and the `kind` of each in tests/helpers.py.
KINDS = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
    "BatchNorm": "batch_norm",
}
NAMES = tuple(KINDS)
FEATURES = 12
SHAPE = (5, 4, 3, FEATURES)


# --- layers ---------------------------------------------------------------------------


def build(library: Any, name: str, num_features: int = FEATURES, **kwargs: Any) -> Any:
    """Builds a layer of flax.nnx or fusednorm, as its constructor initializes it."""
    if name == "GroupNorm" and not {"num_groups", "group_size"} & kwargs.keys():
        kwargs["num_groups"] = 3
    kwargs.setdefault("rngs", nnx.Rngs(0))
    return getattr(library, name)(num_features, **kwargs)


def pair(name: str, num_features: int = FEATURES, **kwargs: Any) -> tuple[Any, Any]:
    """Returns flax's layer and ours, with the same random state."""
    return (
        randomize(build(nnx, name, num_features, **kwargs)),
        randomize(build(fusednorm, name, num_features, **kwargs)),
    )


RANGES = {"scale": (0.5, 1.5), "bias": (-1, 1), "mean": (-1, 1), "var": (0.5, 2)}


def randomize(model: Any) -> Any:
    """Sets scales, biases and running statistics to values that expose mistakes."""
    rng = np.random.default_rng(1)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and path[-1] in RANGES:
            value = rng.uniform(*RANGES[path[-1]], variable.shape)
            variable[...] = jnp.asarray(value, variable.dtype)
    return model


def data(shape: tuple[int, ...] = SHAPE, dtype: Any = "float32", seed: int = 2) -> Any:
    """Returns x with mean 0.7 and standard deviation 3."""
    x = np.random.default_rng(seed).normal(0.7, 3, shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * np.random.default_rng(seed + 1).normal(-0.2, 2, shape)
    return jnp.asarray(x).astype(dtype)


def outputs_and_gradients(
    model: Any, x: Any, call: Callable[..., Any] | None = None, dy: Any = None
) -> dict[str, Any]:
    """Runs a model forward and backward.

    Args:
      model: the model.
      x: its input.
      call: replaces `model(x)` by `call(model, x)`.
      dy: the cotangent of y. By default it is random, and the same for every model.

    Returns:
      y, the state after the call, and the gradients of <dy, y> with respect to x and
      every Param.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def function(params: Any, x: Any) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(x) if call is None else call(merged, x)
        return y, nnx.state(merged, nnx.Not(nnx.Param))

    # LLVM's optimizations are off because compilation takes most of these tests' time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def everything(params: Any, x: Any) -> dict[str, Any]:
        y, vjp, state = jax.vjp(function, params, x, has_aux=True)
        given = data(y.shape, y.dtype, seed=3) / 3 if dy is None else dy
        d_params, dx = vjp(jnp.asarray(given, y.dtype))
        return {"y": y, "dx": dx, "d_params": arrays(d_params), "state": arrays(state)}

    return everything(params, jnp.asarray(x))


def arrays(state: Any) -> dict[str, jax.Array]:
    """Returns a state as a dictionary from path to array, without random keys."""
    flat = nnx.to_flat_state(state)
    return {
        ".".join(map(str, path)): leaf[...]
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


# --- agreement with flax --------------------------------------------------------------


def assert_agrees(ours: Any, theirs: Any, roundings: float = 32) -> None:
    """Asserts that two arrays have the same dtype and differ by rounding alone.

    Both come from float32 arithmetic (float64 for float64) on data of moderate mean: a
    dozen operations, and sums of up to a thousand terms in different orders. The bound
    is therefore 32 roundings of the element and of the array's RMS, the magnitude of
    the terms of a sum. Both results are then rounded to their dtype, which adds a whole
    ulp instead of half. `assert_close` refuses a comparison that zeros or a gain of 2 %
    would pass.
    """
    assert ours.dtype == theirs.dtype, f"{ours.dtype} is not flax's {theirs.dtype}"
    if not jnp.issubdtype(ours.dtype, jnp.inexact):
        np.testing.assert_array_equal(ours, theirs)
    elif jnp.iscomplexobj(ours):
        assert_agrees(ours.real, theirs.real, roundings)
        assert_agrees(ours.imag, theirs.imag, roundings)
    else:
        expected = np.asarray(theirs, np.float64)
        assert np.isfinite(expected).all(), "flax's result is not finite"
        bound = roundings_of(expected, roundings, ours.dtype)
        assert_close(ours, expected, bound + 0.5 * ulp(expected, ours.dtype))


def roundings_of(expected: np.ndarray, count: float, dtype: Any) -> np.ndarray:
    """Returns `count` rounding errors of each element and of the RMS.

    They are rounding errors of the arithmetic's dtype.
    """
    eps = min(EPS32, float(jnp.finfo(dtype).eps))
    rms = np.sqrt(np.mean(np.square(expected))) if expected.size else 0.0
    return count * eps * (np.abs(expected) + rms)


def assert_trees_agree(ours: Any, theirs: Any, roundings: float = 32) -> None:
    """Applies `assert_agrees` to every leaf of two trees of the same structure."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for our_leaf, their_leaf in pairs:
        assert_agrees(our_leaf, their_leaf, roundings)


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Asserts that two trees of Variables are the same.

    Compares types, metadata, shapes, dtypes, and every bit.
    """
    flat, expected = (nnx.to_flat_state(nnx.state(m)) for m in (ours, theirs))
    assert flat.paths == expected.paths
    for path, mine, other in zip(flat.paths, flat.leaves, expected.leaves, strict=True):
        assert type(mine) is type(other), path
        assert mine.get_metadata() == other.get_metadata(), path
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), path
        if isinstance(other.get_value(), jax.ShapeDtypeStruct):
            assert isinstance(mine.get_value(), jax.ShapeDtypeStruct), path
        else:
            bits, other_bits = (
                jax.random.key_data(v[...])
                if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
                else v[...]
                for v in (mine, other)
            )
            np.testing.assert_array_equal(bits, other_bits, err_msg=str(path))


# --- agreement with float64 -----------------------------------------------------------


def case_of(name: str, shape: tuple[int, ...] = SHAPE, **options: Any) -> Case:
    """Returns the normalization that a layer does, as a `Case` of tests/helpers.py."""
    if name == "GroupNorm":
        options.setdefault("num_groups", 3)
    return Case(KINDS[name], shape, tuple(options.items()))


def layer_of(library: Any, case: Case, scale: Any, bias: Any, **kwargs: Any) -> Any:
    """Builds the layer that normalizes as `case` says, with this scale and bias."""
    name = next(name for name, kind in KINDS.items() if kind == case.kind)
    layer = build(library, name, case.features, **dict(case.options), **kwargs)
    for variable, value in ((layer.scale, scale), (getattr(layer, "bias", None), bias)):
        if variable is not None:
            variable[...] = jnp.asarray(value, variable.dtype)
    return layer


def assert_true(
    layer: Any, truth: Truth, x: Any, dy: Any, call: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Asserts that a layer's y, dx, dscale and dbias are within bounds of float64.

    Returns:
      The results of `outputs_and_gradients`.
    """
    results = outputs_and_gradients(layer, x, call, dy)
    assert_close(results["y"], truth.y, truth.bounds["y"])
    assert_close(results["dx"], truth.dx, truth.bounds["dx"])
    for name, gradient in results["d_params"].items():
        name = f"d{name}"
        assert_close(gradient, getattr(truth, name), truth.bounds[name])
    return results
