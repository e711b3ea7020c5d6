"""fuse_neighbours(fn): moves operations around a norm into its kernels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from fusednorm.kernels import neighbours
from fusednorm.layers.calls import ArrayCall, bind, unbound


def fuse_neighbours[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` with the operations around its norms moved into their kernels.

    It handles four patterns:

    - A relu, silu or gelu of a fusednorm layer's output becomes the layer's
      `activation`, if nothing else uses that output. The kernel applies it, and its
      derivative, to values in registers, instead of in a separate pass over memory.
    - An array of x's shape and the output's dtype that is added to the output becomes
      part of the norm, with or without an activation of the sum, as in
      `nnx.relu(norm(x) + r)`.
    - Where x is also used beside a norm, as in `x + f(norm(x))`, the backward kernel
      adds the gradient from that use to dx as it writes dx.
    - The norm computes a sum before a norm of rows, h = x + r, if a collective made r,
      as in `norm(x + psum(f))`, and x lies in memory anyway.

    Results are the same up to rounding. In half precision, sums and activations are
    computed, and dx is added, before the result is rounded.

    Matches are found wherever jax's trace of `fn` shows them, including in jitted
    functions, scans, `jax.checkpoint` and `jax.shard_map`, but not in functions with a
    `custom_jvp` or `custom_vjp`. These stay as they are:

    - an activation, or a sum, of an output that is used twice, is cast to another dtype
      first or is complex;
    - a sum with an array that is broadcast or cast to a wider dtype first, or that
      depends on the norm's statistics;
    - any other sum before a norm, because XLA fuses it into a product before it
      (`residual=` adds it in the norm).

    Wrap the forward pass and differentiate the result: a derivative taken inside `fn`
    uses the norm's output a second time. Each call traces `fn`, so call the result
    inside a jitted function, which traces it once.

    Args:
      fn: a model or its method, or any function that calls models; it decorates methods
        too. Everything that `fn` changes (a BatchNorm in training, random keys, an
        optimizer) must be among its arguments. The changes are made in them, as
        `nnx.jit` makes them.

    Returns:
      A function with the same arguments and results. Results are trees of arrays and
      nnx objects.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> norm = fusednorm.GroupNorm(64, num_groups=8, rngs=nnx.Rngs(0))
    >>> forward = fusednorm.fuse_neighbours(lambda norm, x: nnx.silu(norm(x)))
    >>> x = jax.ShapeDtypeStruct((2, 16, 16, 64), "float32")
    >>> print(fusednorm.explain(forward, norm, x))  # doctest: +SKIP
    forward   float32[2, 16, 16, 64]  N=2 S=256 G=8 K=8  silu
      reference: CPU: the kernels are for NVIDIA GPUs and TPUs
    """
    if not callable(fn):
        raise TypeError(
            "Expected a model, its method or a function, got an object of type "
            f"{type(fn).__name__}: fuse_neighbours(model)(x), not of model(x)."
        )
    inner, own_args, own_kwargs = unbound(fn)
    run = functools.partial(_run, inner, *own_args, **own_kwargs)

    # NNX rebuilds a partial, and resolves no keyword of it. So this is a function.
    def fused(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    functools.update_wrapper(fused, fn, updated=())
    return bind(fused, run)


def _run(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with ArrayCall(fn, args, kwargs) as call:
        program = jax.make_jaxpr(call)(*call.operands)
        run = jaxpr_as_fun(neighbours.join(program))
        return call.finish(run(*call.operands))
