"""fuse(model) moves every norm layer of a model to fused kernels, in place.

unfuse(model) moves them back.
"""

import copyreg
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx import graphlib

from fusednorm.layers import normalization

_FUSED: dict[Any, Any] = {
    nnx.BatchNorm: normalization.BatchNorm,
    nnx.GroupNorm: normalization.GroupNorm,
    nnx.InstanceNorm: normalization.InstanceNorm,
    nnx.LayerNorm: normalization.LayerNorm,
    nnx.RMSNorm: normalization.RMSNorm,
}
_WEIGHT_NORMS = (nnx.SpectralNorm, nnx.WeightNorm)
_PARTS = (nnx.GraphDef, nnx.State)  # what `nnx.split` returns

_NAME_OF_A_NORM = re.compile(r"norm(?!al)|normali[sz]ation", re.IGNORECASE)

Calls = Mapping[type, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """Outcome of `fuse` or `unfuse`. Printed, it shows one line per norm layer.

    Attributes:
      replaced: (path, class before, class after) of each layer that changed.
      left: (path, class, reason) of each norm layer that did not change.
    """

    replaced: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        rows = [(path, f"{before} -> {now}") for path, before, now in self.replaced]
        rows += [(path, f"{name} left: {why}") for path, name, why in self.left]
        width = max((len(path) for path, _ in rows), default=0)
        lines += [f"  {path:<{width}}  {what}" for path, what in rows]
        return "\n".join(lines)


def fuse(model: Any, calls: Calls = MappingProxyType({})) -> FuseReport:
    """Turns every nnx norm layer inside a model into fusednorm's, in place.

    Each layer stays the same object, with its Variables, their metadata and shardings;
    only its class changes. Whatever holds the layer (another module, a list, an
    optimizer) therefore holds the fused one afterwards, and a shared layer stays
    shared. Abstract models (`nnx.eval_shape`) and stacked ones (`nnx.vmap` or
    `nnx.scan` over the constructor) work the same way.

    Two kinds of norm are left alone: subclasses of flax's layers with their own
    `__call__`, and norms written without flax's layers. Only their code says what they
    compute, so you state it in `calls`. A second call of `fuse` changes nothing.
    A graphdef taken earlier, by `nnx.split` or `nnx.cached_partial`, still names the
    old classes. A module hidden in a function, as in `nnx.jit(module)`, is not found.

    Args:
      model: an nnx Module, or any tree that holds Modules.
      calls: maps a class to the function that replaces `__call__` in its layers and in
        those of subclasses that inherit that `__call__`. The function computes the same
        with fusednorm's functions. It takes the layer first, then `__call__`'s
        arguments. Class and function are kept for good, so define the function once,
        not anew for each model.

    Returns:
      A report of what was replaced and what was left, with reasons.

    Raises:
      TypeError: `model` holds no module: it is a function, a method, a class, a result
        of `nnx.split`, or arrays; or `calls` does not map classes to functions.
      ValueError: the call is inside an NNX transform (`nnx.jit`, `nnx.grad`) or
        `fuse_neighbours` that `model` is an argument of. Neither can carry the change
        of class back. (JAX's own transforms, and NNX's with `graph=False`, drop all
        changes of their arguments' attributes, this one too, and nothing is raised.)

    >>> import fusednorm
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))
    >>> print(fusednorm.fuse(model))
    1 replaced, 0 left
      layers.1  flax.nnx.LayerNorm -> fusednorm.LayerNorm

    >>> import jax, jax.numpy as jnp
    >>> class Norm(nnx.Module):
    ...     def __init__(self, features):
    ...         self.weight = nnx.Param(jnp.ones(features))
    ...
    ...     def __call__(self, x):
    ...         mean_square = (x**2).mean(-1, keepdims=True)
    ...         return x * jax.lax.rsqrt(mean_square + 1e-6) * self.weight
    >>> def rms_norm(norm, x):
    ...     return fusednorm.rms_norm(x, norm.weight[...], epsilon=1e-6)
    >>> print(fusednorm.fuse(Norm(3), {Norm: rms_norm}))
    1 replaced, 0 left
      (the model)  Norm -> fused Norm
    """
    if not isinstance(calls, Mapping):
        raise TypeError(
            "Expected calls to be a dict from classes to the functions that replace "
            f"their `__call__`, got {type(calls).__name__}."
        )
    for cls, call in calls.items():
        is_layer = isinstance(cls, type) and issubclass(cls, nnx.Module)
        is_called = is_layer and any("__call__" in vars(base) for base in cls.__mro__)
        is_function = callable(call) and not isinstance(call, type)
        if not (is_called and is_function and isinstance(call, Hashable)):
            raise TypeError(
                "Expected calls to map classes of nnx Modules with a `__call__` to the "
                "hashable functions that replace it, which take the layer first; got "
                f"{_described(cls)}: {_described(call)}."
            )
    return _convert(model, functools.partial(_fused_class, calls=calls))


def unfuse(model: Any) -> FuseReport:
    """Reverses `fuse`: turns every fusednorm layer inside a model into flax's.

    A layer of a subclass that `fuse` changed has the user's class again. flax's own
    layers, subclasses of these, and subclasses of fusednorm's layers are left alone.

    Args:
      model: an nnx Module, or any tree that holds Modules.

    Returns:
      A report of what was replaced and what was left, with reasons.

    Raises:
      TypeError: `model` holds no module, as for `fuse`.
      ValueError: an NNX transform or `fuse_neighbours` cannot carry the change back, as
        for `fuse`.
    """
    return _convert(model, _flax_class)


def _convert(model: Any, choose: Any) -> FuseReport:
    leaves = jax.tree.leaves(
        model, is_leaf=lambda n: isinstance(n, (nnx.Pytree, *_PARTS))
    )
    if not any(isinstance(leaf, nnx.Pytree) for leaf in leaves):
        raise TypeError(
            "Expected an nnx Module, or a tree of them: the model itself, not what "
            f"`nnx.split` returns, nor a class or function; got {_described(model)}."
        )
    left, changing = [], []
    for path, module in nnx.iter_modules(model):
        choice = choose(module)
        if choice is None:
            continue
        where = ".".join(map(str, path)) or "(the model)"
        if isinstance(choice, str):
            left.append((where, _name(type(module)), choice))
        else:
            changing.append((where, module, choice))
    if any(_is_brought_in(module) for _, module, _ in changing):
        raise ValueError(
            "The model is an argument of an NNX transform (nnx.jit, nnx.grad, ...) or "
            "of fuse_neighbours, which cannot carry a layer's new class back to the "
            "caller. Fuse the model before, outside of it."
        )
    replaced = [(at, _name(type(layer)), _name(to)) for at, layer, to in changing]
    for _, module, choice in changing:
        module.__class__ = choice
    return FuseReport(tuple(replaced), tuple(left))


def _is_brought_in(module: Any) -> bool:
    """Tells whether an NNX transform brought the module in, and will carry it back."""
    stacks = graphlib.GRAPH_CONTEXT.update_context_stacks.values()
    brought_in = [
        context.inner_ref_outer_index for stack in stacks for context in stack
    ]
    return any(module in refs for refs in brought_in if refs is not None)


def _fused_class(module: Any, calls: Calls) -> type | str | None:
    """Returns the class to change to, or why not; None for a module that is no norm."""
    cls: Any = type(module)
    if hasattr(cls, "_unfused") or isinstance(module, tuple(_FUSED.values())):
        original: Any = getattr(cls, "_unfused", None)
        call = calls.get(original)
        another = call not in (None, getattr(cls.__call__, "__wrapped__", None))
        return f"fused already{'; unfuse it first' * another}"
    known = {**_FUSED, **calls}
    base = next((base for base in cls.__mro__ if base in known), None)
    if isinstance(module, _WEIGHT_NORMS):
        return "it normalizes weights, not activations"
    if isinstance(module, nnx.bridge.ToNNX):
        return "a Linen module: norms in it are none of nnx's"
    if base is None:
        if not _looks_like_a_norm(module):
            return None
        name = cls.__name__
        return f"not flax's: fuse(model, {{{name}: call}}) replaces its __call__"
    if cls.__call__ is not base.__call__:
        return f"a subclass of {_name(base)} with its own __call__"
    if cls in _FUSED and cls not in calls:
        return _FUSED[cls]
    try:
        return _fused_subclass(cls, known[base])
    except Exception as error:  # the user's metaclass can raise anything
        return f"a class that cannot be subclassed: {error}"


def _looks_like_a_norm(module: Any) -> bool:
    """Judges by the class name, and excludes a module that only holds another norm."""
    if not (callable(module) and _NAME_OF_A_NORM.search(type(module).__name__)):
        return False
    inside = [type(inner) for _, inner in nnx.iter_modules(module)]
    return sum(bool(_NAME_OF_A_NORM.search(cls.__name__)) for cls in inside) == 1


def _flax_class(module: Any) -> type | str | None:
    cls = type(module)
    if hasattr(cls, "_unfused"):
        return cls._unfused
    for flax_class, fused_class in _FUSED.items():
        if cls is fused_class:
            return flax_class
        if isinstance(module, fused_class):
            return f"a subclass of {_name(fused_class)}"
        if isinstance(module, flax_class):
            return "flax's already"
    return None


@functools.cache
def _fused_subclass(cls: Any, fused: Any) -> type:
    """Returns a subclass of the user's class `cls` with another `__call__`.

    If `fused` is a function, it becomes the `__call__`. If it is a fusednorm layer, the
    subclass also inherits from it, between `cls` and flax's layer.
    """

    def reduce(layer: Any, protocol: int) -> Any:
        # pickle looks a class up by name, and would find the user's class.
        reduced: Any = object.__reduce_ex__(layer, 2)
        _, (_, *arguments), *rest = reduced
        return (_new, (cls, fused, *arguments), *rest)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return fused(layer, *args, **kwargs)

    is_layer = isinstance(fused, type)
    own = {} if is_layer else {"__call__": functools.update_wrapper(call, fused)}
    attributes = {
        **own,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "_unfused": cls,
        "_fused": staticmethod(fused),
    }
    bases = (cls, fused) if is_layer else (cls,)
    is_pytree = cls._pytree__is_pytree
    users: Any = type(cls)
    metaclass = _fused_metaclass(users)
    return metaclass(cls.__name__, bases, attributes, pytree=is_pytree)


class _Unannounced:
    """Stands in a fused class's MRO before the user's class, whose `__init_subclass__`
    must not see one more subclass: it might change it, or register it."""

    def __init_subclass__(cls, **options: Any) -> None:
        nnx.Pytree.__init_subclass__.__func__(cls, **options)  # type: ignore


@functools.cache
def _fused_metaclass(metaclass: Any) -> Any:
    """Returns a metaclass for fused classes.

    They can be pickled although no module has them, as in an `nnx.GraphDef`. Among
    their bases, `_Unannounced` would come with another layout.
    """

    def mro(cls: Any) -> list[type]:
        own, *inherited = metaclass.mro(cls)
        return [own, _Unannounced, *inherited]

    made = type(metaclass.__name__, (metaclass,), {"mro": mro})

    def reduce(cls: Any) -> Any:
        return _fused_subclass, (cls._unfused, cls._fused)

    copyreg.pickle(made, reduce)
    return made


def _new(cls: type, fused: Any, *arguments: Any) -> Any:
    to = _fused_subclass(cls, fused)
    return to.__new__(to, *arguments)


def _described(got: Any) -> str:
    """Says what was passed, without its repr, which can be a whole model's."""
    cls = got if isinstance(got, type) else type(got)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return f"the class {name}" if cls is got else f"an object of {name}"


def _name(cls: type) -> str:
    if cls in _FUSED:
        return f"flax.nnx.{cls.__name__}"
    if cls in _FUSED.values():
        return f"fusednorm.{cls.__name__}"
    return f"fused {cls.__qualname__}" if hasattr(cls, "_unfused") else cls.__qualname__
