"""explain(layer, x): tells which implementation runs, and why."""

from collections.abc import Callable
from typing import Any

import jax

from fusednorm.kernels.explain import Explanation, explain_jaxpr
from fusednorm.layers.calls import ArrayCall


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which implementation each normalization inside a call gets, and why.

    The call is traced, not run, so no state changes. The answer holds for jax's default
    platform, and for as many devices as the arguments are sharded over. `.on("cuda")`
    or `.on("tpu")` of it holds for a platform that is not on this machine: an H100, or
    a v4.

    Args:
      fn: a layer, a model or its method, or any function that calls them, for example a
        training step or a gradient. `explain` looks into jitted functions. Everything
        that `fn` changes (a BatchNorm in training) must be among its arguments.
      *args: arguments of `fn`: arrays, `jax.ShapeDtypeStruct`s, nnx Modules or other
        values.
      **kwargs: keyword arguments of `fn`.

    Returns:
      An `Explanation`. Printed, it shows for each normalization the backend, the
      kernel, its block and the bytes it moves, or the reason why the reference runs.
      `choices` holds the same for programs. A normalization inside `jax.lax.scan`
      counts once.

    Raises:
      TypeError: `fn` cannot be called.
      NotImplementedError: printed, if the named backend cannot run a normalization in
        the call on this platform. The call itself raises the same error.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> layer = fusednorm.LayerNorm(768, rngs=nnx.Rngs(0))
    >>> x = jax.ShapeDtypeStruct((8, 128, 768), "float32")
    >>> print(fusednorm.explain(layer, x))  # doctest: +SKIP
    forward   float32[8, 128, 768]  N=1024 S=1 G=1 K=768
      reference: CPU: the kernels are for NVIDIA GPUs and TPUs
    """
    if not callable(fn):
        raise TypeError(
            f"Expected a layer, a model or a function, got a {type(fn).__name__}: "
            "explain(model, x) traces model(x) itself."
        )
    with ArrayCall(fn, args, kwargs) as call:

        def run(*operands: Any) -> None:  # `fn` may return values that are no arrays
            call(*operands)

        jaxpr = jax.make_jaxpr(run)(*call.operands)
        return explain_jaxpr(jaxpr, call.operands)
