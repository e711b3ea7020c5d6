"""Activations after a normalization: y = act(z), z = x_hat * scale + bias.

    name       act(z)                 act'(z), the slope
    relu       max(z, 0)              1 above 0, else 0
    silu       z * s                  s * (1 + z * (1 - s))
    gelu       z * Phi(z)             Phi(z) + z * phi(z)
    gelu_tanh  z * (1 + t) / 2        (1 + t) / 2 + z * (1 - t^2) * u' / 2

    s = 1 / (1 + exp(-z))
    Phi, phi: the normal distribution and its density
    t = tanh(u),  u = sqrt(2 / pi) * (z + 0.044715 z^3),  u' its derivative

They are `jax.nn`'s relu, silu, gelu(approximate=False) and gelu(approximate=True), with
their slopes written out. A backward recomputes z from x, and multiplies dy by the
slope.

Sources: Hendrycks and Gimpel 2016 (arXiv:1606.08415), sections 2 and 4, for GELU and
its approximation; Elfwing et al. 2017 (arXiv:1702.03118), eq. 1 and 2, for SiLU.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")

_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def normal_cdf(z: jax.Array) -> jax.Array:
    """Computes Phi(z), without cancellation below 0."""
    return 0.5 * lax.erfc(z * -math.sqrt(0.5))


def activate(name: str | None, z: Any, cdf: Callable[[Any], Any] = normal_cdf) -> Any:
    """Computes act(z).

    Args:
      name: one of `ACTIVATIONS`, or None for z itself.
      z: float array of any shape.
      cdf: function that computes Phi.

    Raises:
      ValueError: `name` is not an activation.
    """
    match name:
        case None:
            return z
        case "relu":
            return jnp.where(z <= 0.0, 0.0, z)  # keeps NaN; the slope at 0 is 0
        case "silu":
            return z * lax.logistic(z)
        case "gelu":
            return z * cdf(z)
        case "gelu_tanh":
            return z * (0.5 + 0.5 * jnp.tanh(_tanh_of(z)))
    raise ValueError(f"no activation {name!r}")


def slope(name: str, z: Any, cdf: Callable[[Any], Any] = normal_cdf) -> Any:
    """Computes act'(z). Relu's slope at 0, where it has none, is taken to be 0.

    Arguments and errors are those of `activate`, but `name` cannot be None.
    """
    match name:
        case "relu":
            return jnp.where(z > 0.0, 1.0, 0.0).astype(z.dtype)
        case "silu":
            s = lax.logistic(z)
            return s * (1.0 + z * (1.0 - s))
        case "gelu":
            density = jnp.exp(-0.5 * z * z) * (0.5 * _ROOT)
            return cdf(z) + z * density
        case "gelu_tanh":
            t = jnp.tanh(_tanh_of(z))
            inner = _ROOT + (3 * _ROOT * _CUBIC) * z * z
            return 0.5 + 0.5 * t + (0.5 * z) * (1.0 - t * t) * inner
    raise ValueError(f"no activation {name!r}")


def times_slope(
    name: str, z: Any, dy: Any, cdf: Callable[[Any], Any] = normal_cdf
) -> Any:
    """Computes dy * act'(z), the cotangent of z.

    Relu selects dy, as `jax.nn.relu` does: where its slope is 0, an infinite dy (that
    of a square root at 0) has no effect, whereas their product is NaN.

    Arguments and errors are those of `slope`.
    """
    if name == "relu":
        return jnp.where(z > 0.0, dy, 0.0)
    return dy * slope(name, z, cdf)


def _tanh_of(z: Any) -> Any:
    return z * (_ROOT + (_ROOT * _CUBIC) * z * z)
