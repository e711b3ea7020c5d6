"""A call of NNX modules as jax traces it: a function of arrays."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class ArrayCall:
    """fn(*args, **kwargs) as a function of the arrays in it.

    A node is what NNX carries from one place to another as one object, however often it
    is there: a module, random keys, an optimizer, a metric, a Variable.

    Attributes:
      state: of all nodes among fn and its arguments.
      arrays: the other arrays.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        fn, own_args, own_kwargs = unbound(fn)
        called = (fn, (*own_args, *args), {**own_kwargs, **kwargs})
        self._tree: Any
        self._leaves, self._tree = jax.tree.flatten(called, is_leaf=_is_node)
        self._nodes = nnx.List(leaf for leaf in self._leaves if _is_node(leaf))
        self.arrays = [leaf for leaf in self._leaves if _is_array(leaf)]
        self._graph: Any
        self.state: Any
        self._graph, self.state = nnx.split(self._nodes)
        self._fixed_changes: list[tuple[Any, dict[str, Any], set[str]]] = []

    def __call__(self, state: Any, arrays: list[Any]) -> tuple[Any, Any]:
        """What the call returns, and what it changes in the nodes' state."""
        nodes = nnx.merge(self._graph, state, copy=True)
        next_node, next_array = iter(nodes), iter(arrays)
        originals = dict(nnx.iter_graph(self._nodes))
        copies = [
            (copy, originals[path], _fixed(copy))
            for path, copy in nnx.iter_graph(nodes)
            if isinstance(copy, nnx.Pytree) and not isinstance(copy, nnx.List)
        ]
        fn, args, kwargs = self._tree.unflatten(
            [
                next(next_node)
                if _is_node(leaf)
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
            for path, now in _by_path(nnx.state(nodes)).items()
            if path not in before or _differ(before[path], now)
        ]
        self._fixed_changes = [
            (original, now, was.keys() - now.keys())
            for copy, original, was in copies
            if (now := _fixed(copy)) != was
        ]
        return result, nnx.from_flat_state(changed)

    def update(self, changed: Any) -> None:
        """Makes the changes of the last call in the nodes that were given."""
        nnx.update(self._nodes, changed)
        for node, now, gone in self._fixed_changes:
            for name in gone:
                delattr(node, name)
            for name, value in now.items():
                setattr(node, name, value)


def unbound(
    fn: Callable[..., Any],
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A function, and the arguments that it has already: of a method, of a partial."""
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nnx.Pytree):
        inner, args, kwargs = unbound(fn.__func__)
        return inner, (*args, fn.__self__), kwargs
    if isinstance(fn, functools.partial):
        inner, args, kwargs = unbound(fn.func)
        return inner, (*args, *fn.args), {**kwargs, **fn.keywords}
    return fn, (), {}


def _fixed(node: Any) -> dict[str, Any]:
    """What a node has besides arrays and other nodes: numbers, strings, flags."""
    return {
        name: value
        for name, value in vars(node).items()
        if isinstance(value, int | float | complex | str | bytes | None)
    }


def _by_path(state: Any) -> dict[Any, Any]:
    flat = nnx.to_flat_state(state)
    return dict(zip(flat.paths, flat.leaves, strict=True))


def _differ(before: Any, now: Any) -> bool:
    """Whether a Variable was given another value."""
    old, new = (list(map(id, jax.tree.leaves(value))) for value in (before, now))
    return old != new


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _is_array(leaf: Any) -> bool:
    # A Variable has both attributes, and so has a class of NumPy's numbers.
    if _is_node(leaf) or isinstance(leaf, type):
        return False
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
