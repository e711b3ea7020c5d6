"""Activations and their slopes, as in jax.nn and as kernels compute them."""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusednorm
from fusednorm import reference
from fusednorm.kernels import activation
from tests import interpreters
from tests.helpers import activated

Z = np.linspace(-9, 9, 20001)  # includes 0


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_in_float64(name: str) -> None:
    """The reference's values and slopes are right; its slopes equal jax's derivatives.

    jax's derivative is 0 at relu's kink.
    """
    value, slope = activated(name, Z)
    with jax.enable_x64(True):
        z = jnp.asarray(Z)
        np.testing.assert_allclose(reference.activate(name, z), value, atol=1e-14)
        np.testing.assert_allclose(reference.slope(name, z), slope, atol=1e-13)
        derivative = jax.vmap(jax.grad(lambda z: reference.activate(name, z)))(z)
        np.testing.assert_allclose(
            reference.slope(name, z), derivative, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_in_a_kernel(name: str) -> None:
    """A value is within 4 roundings of z, and a slope within 8 roundings of 1 or of z.

    The slope needs more because of gelu_tanh: for t near 1, few digits are left of
    1 - t^2, which is multiplied by z^3.
    """
    z = jnp.asarray(Z, jnp.float32)
    value, slope = activated(name, np.asarray(z, np.float64))
    eps = float(jnp.finfo(jnp.float32).eps)
    for actual, expected, bound in (
        (activation.activate(name, z), value, 4 * eps * np.abs(z)),
        (
            activation.times_slope(name, z, jnp.ones_like(z)),
            slope,
            8 * eps * np.maximum(np.abs(z), 1),
        ),
    ):
        assert actual.dtype == jnp.float32
        error = np.abs(np.asarray(actual, np.float64) - expected)
        assert (error <= bound).all()


def test_normal_cdf_keeps_its_digits_in_the_tail() -> None:
    z = np.linspace(-6, 6, 20001).astype("float32")
    expected = np.array([math.erfc(-float(a) / math.sqrt(2)) / 2 for a in z])
    found = np.asarray(activation.normal_cdf(jnp.asarray(z)), np.float64)
    assert (np.abs(found / expected - 1) < 2.5e-6).all()
    assert (np.abs(found - expected) < 3e-7).all()


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_nan_stays(name: str) -> None:
    nan = jnp.full(3, jnp.nan, jnp.float32)
    assert np.isnan(activation.activate(name, nan)).all()


def test_unknown() -> None:
    for function in (reference.activate, reference.slope):
        with pytest.raises(ValueError, match="no activation 'swish'"):
            function("swish", jnp.zeros(3))


@pytest.mark.parametrize("backend", ["reference", "mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("shape", [(8, 128), (2, 9, 128)], ids=str)
def test_relu_selects_its_cotangent(backend: str, shape: tuple[int, ...]) -> None:
    """An infinite cotangent below 0, that of a square root, has no effect."""
    x = jax.random.normal(jax.random.key(0), shape)
    names = ("layer_norm", {}) if len(shape) == 2 else ("group_norm", {"num_groups": 4})
    norm = functools.partial(getattr(fusednorm, names[0]), **names[1])

    def gradient(relu: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.grad(lambda x: jnp.sqrt(relu(x)).sum())(x)

    expected = gradient(lambda x: jax.nn.relu(norm(x)))
    kernels: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if backend != "reference":
        kernels = interpreters.interpreted(backend)
    with kernels, fusednorm.use_backend(backend):
        found = gradient(lambda x: norm(x, activation="relu"))
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
