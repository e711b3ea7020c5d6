"""fuse_neighbours(fn): what stands around a norm goes into its kernels."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from fusednorm.kernels import neighbours
from fusednorm.layers.calls import ArrayCall, unbound


def fuse_neighbours[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """The same function, with what stands around its norms inside their kernels.

    A relu, silu or gelu of a fusednorm layer's output, which nothing else uses, becomes
    the layer's `activation`: it is applied to what the kernel has in registers, instead
    of in a pass of its own over memory, and so is its derivative.

    So does an array of x's shape that is added to the output, before the activation or
    without one, as in `nnx.relu(norm(x) + r)`, where it has the output's dtype.

    Where x goes on beside a norm, as in `x + f(norm(x))`, the backward kernel adds dx
    to what comes to x from there, as it writes it.

    A sum before a norm of rows, h = x + r, is added by the norm where r is what a
    collective made, as in `norm(x + psum(f))`, and x lies in memory anyway.

    Results are the same up to rounding; in half precision a sum and an activation are
    computed, and dx added, before they are rounded.

    They are found wherever jax's trace of `fn` shows them, in jitted functions, scans,
    `jax.checkpoint` or `jax.shard_map` too, but not in functions with a `custom_jvp` or
    `custom_vjp`. Left as it is: an activation of an output that is used twice, is cast
    to another dtype first or is complex, and a sum with one; a sum with an array that
    is broadcast or cast to a wider dtype first, or that depends on the norm's
    statistics; any other sum before a norm, which XLA takes into a product before it
    (`residual=` adds it in the norm).

    Wrap the forward pass and differentiate the result: a derivative taken inside of
    `fn` uses the norm's output a second time. Each call traces `fn`: call it inside
    of a jitted function, which does so once.

    Args:
      fn: a model or its method, or any function that calls some; it decorates methods
        too. What it changes (a BatchNorm in training, random keys, an optimizer) must
        be among its arguments; its changes are made there, as `nnx.jit` makes them.

    Returns:
      A function of the same arguments and results. Results are trees of arrays and
      nnx objects.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> norm = fusednorm.GroupNorm(64, num_groups=8, rngs=nnx.Rngs(0))
    >>> forward = fusednorm.fuse_neighbours(lambda norm, x: nnx.silu(norm(x)))
    >>> x = jax.ShapeDtypeStruct((2, 16, 16, 64), "float32")
    >>> print(fusednorm.explain(forward, norm, x))  # doctest: +SKIP
    forward   float32[2, 16, 16, 64]  N=2 S=256 G=8 K=8  silu
      reference: CPU: the kernels are for NVIDIA GPUs and TPUs
    """

    inner, args, kwargs = unbound(fn)
    fused: Any = _Fused(_run, inner, *args, **kwargs)
    return functools.update_wrapper(fused, fn, updated=())


class _Fused(functools.partial[Any]):
    """A function, or a method where a class has it; `explain` finds fn in it."""

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)


def _run(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with ArrayCall(fn, args, kwargs) as call:
        program = jax.make_jaxpr(call)(*call.operands)
        run = jaxpr_as_fun(neighbours.join(program))
        return call.finish(run(*call.operands))
