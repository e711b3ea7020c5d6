"""A call of NNX modules as jax traces it: a function of arrays."""

import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class ArrayCall:
    """fn(*args, **kwargs) as a function of the arrays in it.

    Attributes:
      state: of all modules among fn and its arguments.
      arrays: the other arrays.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        fn, *owner = unbound(fn)
        args = (*owner, *args)
        self._tree: Any
        self._leaves, self._tree = jax.tree.flatten(
            (fn, args, kwargs), is_leaf=_is_module
        )
        self._modules = nnx.List(leaf for leaf in self._leaves if _is_module(leaf))
        self.arrays = [leaf for leaf in self._leaves if _is_array(leaf)]
        self._graph: Any
        self.state: Any
        self._graph, self.state = nnx.split(self._modules)

    def __call__(self, state: Any, arrays: list[Any]) -> tuple[Any, Any]:
        """What the call returns, and what it changes in the modules' state."""
        modules = nnx.merge(self._graph, state, copy=True)
        next_module, next_array = iter(modules), iter(arrays)
        fn, args, kwargs = self._tree.unflatten(
            [
                next(next_module)
                if _is_module(leaf)
                else next(next_array)
                if _is_array(leaf)
                else leaf
                for leaf in self._leaves
            ]
        )
        result = fn(*args, **kwargs)
        before = _by_path(state)
        changed = [
            (path, now)
            for path, now in _by_path(nnx.state(modules)).items()
            if path not in before or _differ(before[path], now)
        ]
        return result, nnx.from_flat_state(changed)

    def update(self, changed: Any) -> None:
        """Makes the changes of a call in the modules that were given."""
        nnx.update(self._modules, changed)


def unbound(fn: Callable[..., Any]) -> tuple[Any, ...]:
    """A module's method as a function, and the module; any other function alone."""
    owner = getattr(fn, "__self__", None)
    if isinstance(fn, types.MethodType) and isinstance(owner, nnx.Module):
        return fn.__func__, owner
    return (fn,)


def _by_path(state: Any) -> dict[Any, Any]:
    flat = nnx.to_flat_state(state)
    return dict(zip(flat.paths, flat.leaves, strict=True))


def _differ(before: Any, now: Any) -> bool:
    """Whether a Variable was given another value."""
    old, new = (list(map(id, jax.tree.leaves(value))) for value in (before, now))
    return old != new


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Module)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
