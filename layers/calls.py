"""Turns a call of NNX modules into a function of arrays, which jax can trace."""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any, Self

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class ArrayCall:
    """A context in which fn(*args, **kwargs) is a function of the arrays in it.

    A node is an object that NNX carries as one, however often it is referenced: a
    module, random keys, an optimizer, a metric or a Variable. NNX's update context
    brings the call's changes to nodes back, as it does for `nnx.jit`. This covers new
    values, attributes that are not arrays, and nodes that are added, removed or
    replaced.

        with ArrayCall(fn, args, kwargs) as call:
            outputs = jax.jit(call)(*call.operands)
            result = call.finish(outputs)

    Attributes:
      operands: the arrays in fn, in its arguments, and in the nodes among them.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        fn, own_args, own_kwargs = unbound(fn)
        called = (fn, (*own_args, *args), {**own_kwargs, **kwargs})
        self._leaves, self._tree = jax.tree.flatten(called, is_leaf=_is_node)
        self._nodes = [leaf for leaf in self._leaves if _is_node(leaf)]
        self._context = nnx.update_context(self)

    def __enter__(self) -> Self:
        self._context.__enter__()
        pure = nnx.to_tree(self._nodes, ctxtag=self)
        arrays = [leaf for leaf in self._leaves if _is_array(leaf)]
        self.operands, self._inputs = jax.tree.flatten((pure, arrays))
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def __call__(self, *operands: Any) -> list[Any]:
        """Runs the call. Returns the arrays it changes in nodes, then its results."""
        pure, arrays = jax.tree.unflatten(self._inputs, operands)
        nodes = nnx.from_tree(pure, ctxtag=self, is_inner=True, merge_fn=_as_they_are)
        next_node, next_array = iter(nodes), iter(arrays)
        fn, args, kwargs = jax.tree.unflatten(
            self._tree,
            [
                next(next_node)
                if _is_node(leaf)
                else next(next_array)
                if _is_array(leaf)
                else leaf
                for leaf in self._leaves
            ],
        )
        graph, before = nnx.graphdef(nodes), _contents(nodes)
        try:
            result = fn(*args, **kwargs)
        except flax.errors.TraceContextError as error:
            error.add_note(
                "The function is traced: everything that it changes must be among its "
                "arguments, or be the model or method itself."
            )
            raise
        changed = {
            path: now.node
            for path, now in _contents(nodes).items()
            if path not in before or not before[path].is_still(now)
        }
        self._is_regraphed = (
            nnx.graphdef(nodes) != graph
            or not all(isinstance(node, nnx.Variable) for node in changed.values())
            or any(map(_is_node, jax.tree.leaves(result, is_leaf=_is_node)))
        )
        returned: Any
        if self._is_regraphed:
            returned = nnx.to_tree((nodes, result), ctxtag=self)
        else:  # unchanged Variables may belong to another trace
            values = {path: node.get_raw_value() for path, node in changed.items()}
            returned = values, result
            with nnx.split_context(self) as context:  # makes NNX forget these nodes
                context.split(())
        of_nodes, self._outputs = jax.tree.flatten(returned[0])
        results, self._result = jax.tree.flatten(returned[1])
        # Do not return what came in with the nodes: a reference may not be returned.
        place = {id(operand): i for i, operand in enumerate(operands)}
        self._came_in = [place.get(id(leaf)) for leaf in of_nodes]
        new = [a for a, i in zip(of_nodes, self._came_in, strict=True) if i is None]
        return [*new, *results]

    def finish(self, outputs: Iterable[Any]) -> Any:
        """Returns the call's result and applies its changes to the given nodes."""
        # Some constants of a jaxpr are not arrays yet.
        left = (o if isinstance(o, jax.Array) else jnp.asarray(o) for o in outputs)
        of_nodes = [
            next(left) if i is None else self.operands[i] for i in self._came_in
        ]
        changed = jax.tree.unflatten(self._outputs, of_nodes)
        result = jax.tree.unflatten(self._result, left)
        if self._is_regraphed:
            return nnx.from_tree((changed, result), ctxtag=self, is_inner=False)[1]
        variables = dict(nnx.iter_graph(self._nodes))
        for path, value in changed.items():
            variables[path].set_raw_value(value)
        return result


def unbound(
    fn: Callable[..., Any],
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Splits a method or partial into its function and the arguments bound to it."""
    if isinstance(fn, types.FunctionType):  # a method has its function's attributes
        fn = getattr(fn, _PARTIAL, fn)
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nnx.Pytree):
        inner, args, kwargs = unbound(fn.__func__)
        return inner, (*args, fn.__self__), kwargs
    if isinstance(fn, functools.partial):
        inner, args, kwargs = unbound(fn.func)
        return inner, (*args, *fn.args), {**kwargs, **fn.keywords}
    return fn, (), {}


def bind(fn: Callable[..., Any], partial: functools.partial[Any]) -> Any:
    """Returns fn, in which `unbound` finds the arguments of an equivalent partial."""
    setattr(fn, _PARTIAL, partial)
    return fn


_PARTIAL = "_fusednorm_partial"


def _as_they_are(context: Any, path: Any, prefix: Any, node: Any) -> Any:
    """Merges a node without copies, so that references stay the given ones."""
    (state,) = node.states
    alone = isinstance(state, nnx.Variable)
    return context.unflatten(
        node.graphdef, [state] if alone else nnx.to_flat_state(state)
    )


@dataclasses.dataclass
class _Content:
    """Contents of a Variable or an array attribute, to compare by identity.

    It keeps the very same arrays, because the containers around them may change.
    """

    node: Any
    leaves: list[Any]
    tree: Any

    @classmethod
    def of(cls, node: Any) -> Self:
        value = node.get_raw_value() if isinstance(node, nnx.Variable) else node
        return cls(node, *jax.tree.flatten(value))

    def is_still(self, now: Self) -> bool:
        same = all(map(operator.is_, self.leaves, now.leaves))
        return same and self.tree == now.tree


def _contents(nodes: Any) -> dict[Any, _Content]:
    """Returns the contents of the Variables and arrays in nodes, by path."""
    return {
        path: _Content.of(node)
        for path, node in nnx.iter_graph(nodes)
        if isinstance(node, nnx.Variable | jax.Array | np.ndarray)
    }


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _is_array(leaf: Any) -> bool:
    # NumPy arrays and numbers stay as they are: they may be sizes. Variables and NumPy
    # scalar classes have both attributes too, but are no arrays.
    if _is_node(leaf) or isinstance(leaf, type | np.ndarray | np.generic):
        return False
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
