"""explain(layer, x): which implementation runs, and why."""

import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fusednorm.kernels.explain import Explanation, explain_jaxpr, target_of_arguments


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which implementation each normalization inside a call gets, and why.

    The call is traced, not run: no state changes, and no accelerator is needed.

    Args:
      fn: a layer, a model or its method, or any function that calls some: a training
        step, a gradient. Jitted functions are looked into. What a function changes (a
        BatchNorm in training) must be among its arguments.
      *args: its arguments: arrays, `jax.ShapeDtypeStruct`s, nnx Modules, anything else.
      **kwargs: its keyword arguments.

    Returns:
      An `Explanation`. Printed, it shows for each normalization the backend, the
      kernel, its block and the bytes it moves, or the reason why the reference runs.
      Its `choices` are for programs. A normalization inside `jax.lax.scan` counts once.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> layer = fusednorm.LayerNorm(768, rngs=nnx.Rngs(0))
    >>> x = jax.ShapeDtypeStruct((8, 128, 768), "float32")
    >>> print(fusednorm.explain(layer, x))  # doctest: +SKIP
    forward   float32[8, 128, 768]  N=1024 S=1 G=1 K=768
      reference: CPU: the kernels are for NVIDIA GPUs and TPUs
    """
    owner = getattr(fn, "__self__", None)
    if isinstance(fn, types.MethodType) and isinstance(owner, nnx.Module):
        fn, args = fn.__func__, (owner, *args)
    tree: Any
    leaves, tree = jax.tree.flatten(
        (fn, args, kwargs), is_leaf=lambda leaf: isinstance(leaf, nnx.Module)
    )
    is_module = [isinstance(leaf, nnx.Module) for leaf in leaves]
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    modules = [leaf for leaf, yes in zip(leaves, is_module, strict=True) if yes]
    arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]
    graph: Any
    graph, state = nnx.split(nnx.List(modules))

    def call(state: Any, arrays: list[Any]) -> Any:
        merged, given = iter(nnx.merge(graph, state)), iter(arrays)
        fn, args, kwargs = tree.unflatten(
            [
                next(merged) if module else next(given) if array else leaf
                for leaf, module, array in zip(leaves, is_module, is_array, strict=True)
            ]
        )
        fn(*args, **kwargs)

    jaxpr = jax.make_jaxpr(call)(state, arrays)
    return explain_jaxpr(jaxpr, target_of_arguments((state, arrays)))
