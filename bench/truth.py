"""A block in float64, forward and backward, and the gate for results.

The formulas are those of `reference/norm.py`, written again without using it. They run
in NumPy. On a GPU they run in jax, because NumPy would take ten seconds for tensors of
160 MB.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bench.cases import Block, Case

Array = Any  # a float64 array of NumPy or jax
Named = dict[str, Any]

# Where a relu's input is this close to 0, rounding decides whether its gradient is 0 or
# dy, and both are right. Cotangents are set to 0 there. Inputs are O(1), and bfloat16
# at worst.
KINK = 0.05

# fusednorm's error may be twice flax's, because the order of sums differs, plus a
# rounding: one of the result's dtype for the maximum, one of float32 arithmetic for the
# root mean square. In the latter, flax's error already contains a rounding to bfloat16:
# 1e-3, where a gain that is wrong by 2 % makes 9e-3.
FACTOR = 2.0


class GateError(AssertionError):
    """A result is too far from float64, or from flax's."""


def on_device() -> bool:
    """Says whether jax computes the formulas: GPUs have float64, TPUs do not."""
    return jax.default_backend() == "gpu"


def _in_float64[**P, R](
    *static: str,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function use float64 in jax, and compiles it as a whole.

    Op by op it would take longer than everything else in a case.

    Args:
      static: names of the arguments that are not arrays.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not on_device():
                return function(*args, **kwargs)
            with jax.enable_x64(True):
                return compiled(*args, **kwargs)

        return run

    return decorate


def _float64(a: Any) -> Array:
    return jnp.asarray(a, jnp.float64) if on_device() else np.asarray(a, np.float64)


def _rounded(a: Array, dtype: str) -> Array:
    """Rounds to a half-precision dtype. Skips float32, as exact as what follows."""
    to = jnp.finfo(dtype)
    if to.bits >= 32:
        return a
    if on_device():  # XLA could drop a conversion to the dtype and back
        return lax.reduce_precision(a, to.nexp, to.nmant)
    return a.astype(to.dtype).astype(np.float64)


def _xp(a: Array) -> Any:
    """Returns the array's module: numpy or jax.numpy."""
    return a.__array_namespace__()


class Forward(NamedTuple):
    """The forward of a block in float64, and what its backward needs."""

    kernel: Array | None  # (channels in, channels)
    scale: Array  # (G, K), or (N, S, G, K)
    x: Array  # the block's input
    x_hat: Array  # (N, S, G, K)
    rstd: Array  # (N, 1, G, 1)
    z: Array  # before the activation, of y's shape
    outputs: dict[str, Array]


@_in_float64("block")
def forward(block: Block, inputs: tuple[Any, ...]) -> Forward:
    """Computes the block's outputs in float64.

    Args:
      block: the block; it is only read, never called.
      inputs: x, and possibly a residual, or scale and bias, in any float dtype.
    """
    case = block.case
    x, *others = (_float64(a) for a in inputs)
    kernel = None
    h = x
    if case.conv is not None:
        kernel = _float64(block.conv.kernel[...])[0, 0]
        h = x @ kernel
    if case.residual == "before":
        h = h + others[0]
    outputs = {"h": h} if case.residual == "before" else {}
    if outputs:  # h is stored, and the norm reads the stored array
        h = _rounded(h, case.dtype)

    n, s, g, k = _view(block.norm, h.shape)
    rows = h.reshape(n, s, g, k)
    xp = _xp(h)
    if case.modulated:
        of_samples, bias = (xp.broadcast_to(a, h.shape) for a in others)
        scale, bias = 1 + of_samples.reshape(rows.shape), bias.reshape(rows.shape)
    else:
        scale = _float64(block.norm.scale[...]).reshape(g, k)
        bias = 0.0
        if getattr(block.norm, "bias", None) is not None:
            bias = _float64(block.norm.bias[...]).reshape(g, k)
    if not isinstance(block.norm, nnx.RMSNorm):
        rows = rows - rows.mean((1, 3), keepdims=True)
    var = (rows * rows).mean((1, 3), keepdims=True)
    rstd = 1 / xp.sqrt(var + block.norm.epsilon)
    x_hat = rows * rstd
    z = (x_hat * scale + bias).reshape(h.shape)
    if case.residual == "after":
        z = z + others[0]
    outputs["y"] = _activate(case, z)
    return Forward(kernel, scale, x, x_hat, rstd, z, outputs)


@_in_float64("case")
def away_from_kinks(case: Case, done: Forward, cotangents: Named) -> Named:
    """Returns the cotangents, with zeros where the gradient jumps."""
    if case.activation != "relu":
        return cotangents
    return {"y": cotangents["y"] * (abs(done.z) > KINK).astype(case.dtype)}


@_in_float64("block")
def backward(block: Block, done: Forward, cotangents: Named) -> dict[str, Array]:
    """Computes the gradients in float64, by the names of `bench.contest`.

    Args:
      block: the same block as for `forward`.
      done: what `forward` returned.
      cotangents: cotangents of the block's outputs, in any float dtype.
    """
    case = block.case
    grads = {}
    dz = _float64(cotangents["y"]) * _activation_gradient(case, done.z)
    if case.residual == "after":
        grads["dresidual"] = dz

    dy = dz.reshape(done.x_hat.shape)
    wdy = dy * done.scale
    dx = wdy - done.x_hat * (wdy * done.x_hat).mean((1, 3), keepdims=True)
    if not isinstance(block.norm, nnx.RMSNorm):
        dx = dx - wdy.mean((1, 3), keepdims=True)
    dx = (done.rstd * dx).reshape(done.z.shape)
    if case.modulated:
        shared = tuple(range(1, dz.ndim - 1))
        of_scale = (dy * done.x_hat).reshape(dz.shape)
        grads["dscale"] = of_scale.sum(shared, keepdims=True)
        grads["dbias"] = dz.sum(shared, keepdims=True)
    else:
        grads["dscale"] = (dy * done.x_hat).sum((0, 1)).reshape(-1)
        if getattr(block.norm, "bias", None) is not None:
            grads["dbias"] = dy.sum((0, 1)).reshape(-1)

    if case.residual == "before":
        dx = dx + _float64(cotangents["h"])
    if done.kernel is not None:
        channels_in, channels = done.kernel.shape
        dkernel = done.x.reshape(-1, channels_in).T @ dx.reshape(-1, channels)
        grads["dkernel"] = dkernel[None, None]
        dx = dx @ done.kernel.T
    grads["dx"] = dx
    return grads


def _view(norm: Any, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Returns N, S, G, K: statistics are over (S, K), scale and bias are (G, K)."""
    *leading, channels = shape
    pixels, batch = int(np.prod(leading[1:])), leading[0]
    match norm:
        case nnx.BatchNorm():
            return 1, batch * pixels, channels, 1
        case nnx.InstanceNorm():
            return batch, pixels, channels, 1
        case nnx.GroupNorm():
            return batch, pixels, norm.num_groups, channels // norm.num_groups
        case _:
            return batch * pixels, 1, 1, channels


def _activate(case: Case, z: Array) -> Array:
    match case.activation:
        case "relu":
            return _xp(z).maximum(z, 0)
        case "silu":
            return z / (1 + _xp(z).exp(-z))
        case _:
            return z


def _activation_gradient(case: Case, z: Array) -> Any:
    match case.activation:
        case "relu":
            return z > 0
        case "silu":
            sigmoid = 1 / (1 + _xp(z).exp(-z))
            return sigmoid * (1 + z * (1 - sigmoid))
        case _:
            return 1.0


# --- the gate -------------------------------------------------------------------------


def errors(result: Any, true: Array) -> tuple[float, float]:
    """Returns rms and maximum of |result - true| / (|true| + rms(true))."""
    rms, largest = _errors(result, true)
    return float(rms), float(largest)


@_in_float64()
def _errors(result: Any, true: Array) -> tuple[Array, Array]:
    true = _float64(true)
    scale = abs(true) + _xp(true).sqrt((true * true).mean())
    scale = _xp(true).where(scale == 0, 1, scale)
    off = abs(_float64(result) - true) / scale
    return (off * off).mean() ** 0.5, off.max()


def check(
    name: str, flax: Named, found: Named, true: dict[str, Array], lenient: bool = False
) -> dict[str, Named]:
    """Checks a contestant's results against float64.

    Args:
      name: name of the contestant.
      flax, found: results of flax and of the contestant, by name.
      true: float64 results, by name; those that flax has are checked.
      lenient: for other libraries, which are timed here, not judged. They may round
        parameters and sums to x's dtype, and have ten times flax's error.

    Returns:
      The errors of flax and of the contestant, by result, for the record.

    Raises:
      GateError: a result is not finite, or its error is above `FACTOR` times flax's
        plus a rounding.
    """
    checked = [key for key in true if key in flax]
    coarsest = max(float(jnp.finfo(found[key].dtype).eps) for key in checked)
    record = {}
    for key in checked:
        flax_rms, flax_max = errors(flax[key], true[key])
        rms, largest = errors(found[key], true[key])
        record[key] = {
            "flax": {"rms": flax_rms, "max": flax_max},
            name: {"rms": rms, "max": largest},
        }
        rms_limit = FACTOR * flax_rms + 4 * float(np.finfo(np.float32).eps)
        max_limit = FACTOR * flax_max + float(jnp.finfo(found[key].dtype).eps)
        if lenient:
            rms_limit = 10 * flax_rms + 4 * coarsest
            max_limit = 10 * flax_max + 4 * coarsest
        # `not ... <=` rather than `>`, so that NaN fails too.
        if not (rms <= rms_limit and largest <= max_limit):
            raise GateError(
                f"{key} is wrong: error {rms:.1e} rms, {largest:.1e} max against "
                f"float64; flax has {flax_rms:.1e}, {flax_max:.1e}, and the limits are "
                f"{rms_limit:.1e}, {max_limit:.1e}"
            )
    return record
