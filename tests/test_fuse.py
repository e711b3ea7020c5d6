"""fuse() and unfuse() change the norm layers of flax.nnx models in place."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from tests.layer_helpers import (
    FEATURES,
    NAMES,
    arrays,
    assert_agrees,
    assert_same_state,
    assert_trees_agree,
    build,
    data,
    outputs_and_gradients,
    pair,
    randomize,
)

# Rounding errors allowed after a few consecutive norms, which accumulate them.
DEEP = 256


class Scaled(nnx.LayerNorm):
    """A user's layer with other defaults and flax's computation."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(num_features, epsilon=0.25, rngs=rngs)
        self.name = "scaled"

    def describe(self) -> str:
        return f"{self.name} {self.num_features}"


class MoreScaled(Scaled):
    """A subclass of a subclass."""


class Doubled(nnx.LayerNorm):
    """A user's layer with a computation of its own."""

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        return 2 * super().__call__(x, mask=mask)


class OurScaled(fusednorm.RMSNorm):
    """A user's subclass of a fused layer."""


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, norm: Any = nnx.LayerNorm, *, rngs: nnx.Rngs) -> None:
        self.norm = norm(FEATURES, rngs=rngs)
        self.linear = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        return x + jnp.tanh(self.linear(self.norm(x)))


def squash(x: Any) -> jax.Array:
    return jnp.tanh(x)


class Model(nnx.Module):
    """A model with every kind of layer, in every container. One layer is shared."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        group = functools.partial(nnx.GroupNorm, num_groups=4)
        self.first = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.again = self.first
        self.blocks = nnx.List([Block(nnx.RMSNorm, rngs=rngs), Block(group, rngs=rngs)])
        self.named = nnx.Dict(
            inner=nnx.Dict(norm=nnx.InstanceNorm(FEATURES, rngs=rngs))
        )
        self.tail = nnx.Sequential(
            nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs),
            nnx.BatchNorm(FEATURES, momentum=0.5, rngs=rngs),
            squash,
        )
        self.scaled = Scaled(FEATURES, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        x = x + self.again(x) + self.named.inner.norm(x)
        return self.scaled(x + self.tail(x))


NORMS = 6  # in a Model; one of them is called twice


def make_model(seed: int = 0) -> Model:
    return randomize(Model(rngs=nnx.Rngs(seed)))


def make_pair(make: Callable[[], Any] = make_model) -> tuple[Any, Any]:
    """Returns a model as flax runs it, and the same model fused."""
    theirs, ours = make(), make()
    fusednorm.fuse(ours)
    return theirs, ours


X_SHAPE = (4, 5, FEATURES)


def norms_called(function: Callable, *args: Any) -> int:
    """Returns the number of fusednorm calls that a function makes."""
    return len(fusednorm.explain(function, *args).choices)


# --- what changes, and what does not --------------------------------------------------


def test_a_layer_changes_its_class_and_nothing_else() -> None:
    model = make_model()
    graph, before = nnx.graphdef(model), dict(nnx.iter_graph(model))
    fusednorm.fuse(model)
    after = dict(nnx.iter_graph(model))
    assert after.keys() == before.keys()
    for path, node in after.items():
        if isinstance(node, nnx.Module | nnx.Variable):
            assert node is before[path], path
    assert type(model.first) is fusednorm.LayerNorm
    assert type(model.blocks[0].norm) is fusednorm.RMSNorm
    assert type(model.blocks[1].norm) is fusednorm.GroupNorm
    assert type(model.named.inner.norm) is fusednorm.InstanceNorm
    assert type(model.tail.layers[1]) is fusednorm.BatchNorm
    assert isinstance(model.scaled, fusednorm.LayerNorm)
    assert type(model.tail.layers[0]) is nnx.Linear
    assert model.first is model.again
    fusednorm.unfuse(model)
    assert nnx.graphdef(model) == graph


def test_a_fused_model_computes_what_the_model_did() -> None:
    """The fused layers do run, and unfuse() brings back flax's exact results."""
    theirs, ours = make_pair()
    x = data(X_SHAPE)
    assert norms_called(theirs, x) == 0
    assert norms_called(ours, x) == NORMS + 1
    expected = outputs_and_gradients(theirs, x)
    assert_trees_agree(outputs_and_gradients(ours, x), expected, DEEP)
    fusednorm.unfuse(ours)
    assert norms_called(ours, x) == 0
    back = outputs_and_gradients(ours, x)
    jax.tree.map(np.testing.assert_array_equal, back, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_a_norm_itself(name: str) -> None:
    layer, ours = pair(name)
    report = fusednorm.fuse(layer)
    assert type(layer) is getattr(fusednorm, name)
    assert report.replaced == (
        ("(the model)", f"flax.nnx.{name}", f"fusednorm.{name}"),
    )
    np.testing.assert_array_equal(layer(data()), ours(data()))
    assert_same_state(layer, ours)
    fusednorm.unfuse(layer)
    assert type(layer) is getattr(nnx, name)


@pytest.mark.parametrize(
    "container", [list, tuple, lambda norms: {"a": {"b": norms[0]}}]
)
def test_models_in_a_plain_container(container: Callable) -> None:
    layer = build(nnx, "LayerNorm")
    report = fusednorm.fuse(container([layer]))
    assert type(layer) is fusednorm.LayerNorm
    assert [path for path, _, _ in report.replaced] in (["0"], ["a.b"])


def test_a_model_without_norms() -> None:
    report = fusednorm.fuse(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert str(report) == "0 replaced, 0 left"


def test_twice_is_once() -> None:
    model = make_model()
    assert len(fusednorm.fuse(model).replaced) == NORMS
    graph = nnx.graphdef(model)
    again = fusednorm.fuse(model)
    assert again.replaced == ()
    assert {reason for _, _, reason in again.left} == {"fused already"}
    assert len(again.left) == NORMS
    assert nnx.graphdef(model) == graph
    assert len(fusednorm.unfuse(model).replaced) == NORMS
    again = fusednorm.unfuse(model)
    assert again.replaced == ()
    assert {reason for _, _, reason in again.left} == {"flax's already"}
    assert len(again.left) == NORMS


def test_a_shared_layer_stays_shared() -> None:
    theirs, ours = make_pair()
    assert len(arrays(nnx.state(ours))) == len(arrays(nnx.state(theirs)))
    for model in (theirs, ours):
        model.again.scale[...] += 1
    assert ours.first.scale is ours.again.scale
    x = data(X_SHAPE)
    assert_agrees(ours(x), theirs(x), DEEP)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_agrees(make_model()(x), theirs(x), DEEP)


def test_variables_keep_metadata_and_sharding() -> None:
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = nnx.LayerNorm(
            8,
            scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("model",)),
            bias_metadata={"mine": 1},
            rngs=nnx.Rngs(0),
        )
        before = {
            name: (variable, variable.get_value(), variable.get_metadata())
            for name, variable in (("scale", layer.scale), ("bias", layer.bias))
        }
        assert before["scale"][1].sharding == NamedSharding(mesh, P("model"))
        fusednorm.fuse(layer)
        for name, (variable, value, metadata) in before.items():
            now = getattr(layer, name)
            assert now is variable
            assert now.get_value() is value
            assert now.get_metadata() == metadata
        assert nnx.get_partition_spec(nnx.state(layer))["scale"].get_value() == P(
            "model"
        )
        assert layer.bias.mine == 1


# --- layers of the user's own ---------------------------------------------------------


@pytest.mark.parametrize("cls", [Scaled, MoreScaled])
def test_a_subclass_without_a_call_of_its_own_is_fused(cls: type) -> None:
    theirs, ours = (randomize(cls(FEATURES, rngs=nnx.Rngs(0))) for _ in range(2))
    fusednorm.fuse(ours)
    assert isinstance(ours, cls)
    assert isinstance(ours, fusednorm.LayerNorm)
    assert type(ours).__name__ == cls.__name__
    assert type(ours).__doc__ == cls.__doc__
    assert ours.describe() == f"scaled {FEATURES}"
    assert_same_state(ours, theirs)
    assert norms_called(ours, data()) == 1
    expected = outputs_and_gradients(theirs, data())
    assert_trees_agree(outputs_and_gradients(ours, data()), expected)
    other = cls(FEATURES, rngs=nnx.Rngs(1))
    fusednorm.fuse(other)
    assert type(other) is type(ours)  # or jitted functions would compile for each layer
    assert fusednorm.unfuse(ours).replaced
    assert type(ours) is cls


def test_a_subclass_with_a_call_of_its_own_is_left() -> None:
    layer = Doubled(FEATURES, rngs=nnx.Rngs(0))
    y = layer(data())
    report = fusednorm.fuse(layer)
    assert type(layer) is Doubled
    assert report.replaced == ()
    assert report.left == (
        (
            "(the model)",
            "Doubled",
            "a subclass of flax.nnx.LayerNorm with its own __call__",
        ),
    )
    np.testing.assert_array_equal(layer(data()), y)


class Tagged(nnx.LayerNorm):
    """A user's layer whose subclasses must give a tag, and are registered."""

    by_name: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tag = tag
        Tagged.by_name[cls.__name__] = cls


class Tag(Tagged, tag="mine"):
    """A subclass that gives its tag."""


class Last(type(nnx.Module)):  # type: ignore[misc]
    """A metaclass whose classes have no subclasses."""

    def __new__(cls, name: str, bases: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(base, Last) for base in bases):
            raise TypeError(f"{name} is the last")
        return super().__new__(cls, name, bases, *args, **kwargs)


class Final(nnx.LayerNorm, metaclass=Last):
    """A user's layer that cannot be subclassed."""


class NoTree(nnx.LayerNorm, pytree=False):
    """A user's layer that is no pytree, so jax does not look into it."""


def test_a_subclass_that_cannot_be_made_is_left() -> None:
    classes = (nnx.LayerNorm, Final, nnx.LayerNorm)
    model = nnx.List(cls(FEATURES, rngs=nnx.Rngs(0)) for cls in classes)
    report = fusednorm.fuse(model)
    assert [type(layer) for layer in model] == [
        fusednorm.LayerNorm,
        Final,
        fusednorm.LayerNorm,
    ]
    ((where, name, reason),) = report.left
    assert (where, name) == ("1", "Final")
    assert "cannot be subclassed: Final is the last" in reason


def test_a_fused_class_is_no_subclass_to_the_users_hook() -> None:
    layer = Tag(FEATURES, rngs=nnx.Rngs(0))
    fusednorm.fuse(layer)
    assert isinstance(layer, fusednorm.LayerNorm)
    assert layer.tag == "mine"
    assert Tagged.by_name == {"Tag": Tag}


def test_a_subclass_that_is_no_tree_stays_none() -> None:
    layer = NoTree(FEATURES, rngs=nnx.Rngs(0))
    fusednorm.fuse(layer)
    assert isinstance(layer, fusednorm.LayerNorm)
    assert jax.tree.leaves(layer) == [layer]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("class", "the class flax.nnx.nn.normalization.LayerNorm"),
        ("method", "an object of builtins.method"),
        ("function", "an object of "),
        ("linen", "an object of flax.linen.normalization.LayerNorm"),
    ],
)
def test_what_is_no_model_is_refused(what: str, named: str) -> None:
    layer = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    wrong = {
        "class": nnx.LayerNorm,
        "method": layer.__call__,
        "function": nnx.relu,
        "linen": linen.LayerNorm(),
    }
    for convert in (fusednorm.fuse, fusednorm.unfuse):
        with pytest.raises(TypeError, match=f"the model itself.*got {named}"):
            convert(wrong[what])
    assert type(layer) is nnx.LayerNorm


def test_what_holds_no_module_is_refused() -> None:
    """The results of `nnx.split`, for example, hold no module to replace."""
    layer = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    for wrong in (graph, state, (graph, state), nnx.to_pure_dict(state), None, data()):
        with pytest.raises(TypeError, match=r"not what `nnx\.split` returns"):
            fusednorm.fuse(wrong)


@pytest.mark.parametrize(
    "transform",
    [nnx.jit, nnx.grad, fusednorm.fuse_neighbours],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("convert", [fusednorm.fuse, fusednorm.unfuse])
def test_a_model_that_a_transform_has_in_hand_is_refused(
    transform: Callable[..., Any], convert: Callable[[Any], Any]
) -> None:
    """NNX would raise as it carries the model back, and would leave it empty."""
    model = nnx.Sequential(nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)))
    if convert is fusednorm.unfuse:
        fusednorm.fuse(model)
    before = type(model.layers[0])

    def inside(model: Any, x: jax.Array) -> jax.Array:
        convert(model)
        return (model(x) ** 2).mean()

    with pytest.raises(ValueError, match="outside"):
        transform(inside)(model, data())
    assert type(model.layers[0]) is before
    assert model(data()).shape == data().shape


def test_a_model_that_is_made_inside_of_a_transform_is_fused() -> None:
    @nnx.jit
    def inside(x: jax.Array) -> jax.Array:
        model = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
        assert len(fusednorm.fuse(model).replaced) == 1
        return model(x)

    plain = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    assert_agrees(inside(data()), plain(data()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Head:
    """A callable tree that holds a norm."""

    norm: nnx.LayerNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


def test_a_tree_that_can_be_called_is_a_tree() -> None:
    head = Head(nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)))
    assert len(fusednorm.fuse(head).replaced) == 1
    assert type(head.norm) is fusednorm.LayerNorm


def test_a_subclass_of_a_fused_layer_is_its_users() -> None:
    layer = OurScaled(FEATURES, rngs=nnx.Rngs(0))
    assert fusednorm.fuse(layer).left == (
        ("(the model)", "OurScaled", "fused already"),
    )
    assert fusednorm.unfuse(layer).left == (
        ("(the model)", "OurScaled", "a subclass of fusednorm.RMSNorm"),
    )
    assert type(layer) is OurScaled


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_norms_of_weights_are_left(wrapper: type) -> None:
    """fuse() leaves the wrapper, but fuses an activation norm inside it."""
    rngs = nnx.Rngs(0)
    model = wrapper(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
    report = fusednorm.fuse(model)
    assert type(model) is wrapper
    assert report.replaced == ()
    assert report.left == (
        ("(the model)", wrapper.__name__, "it normalizes weights, not activations"),
    )
    layer = nnx.LayerNorm(4, rngs=rngs)
    assert len(fusednorm.fuse(wrapper(layer, rngs=rngs)).replaced) == 1
    assert type(layer) is fusednorm.LayerNorm


def test_a_linen_module_is_left() -> None:
    model = nnx.bridge.ToNNX(linen.LayerNorm(), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(model, data())
    ((_, name, reason),) = fusednorm.fuse(model).left
    assert (name, reason) == ("ToNNX", "a Linen module: norms in it are none of nnx's")


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def pickled_in_parts(model: Any) -> Any:
    """A graphdef names the classes."""
    return nnx.merge(*pickled(nnx.split(model)))


# --- norms that are not flax's --------------------------------------------------------


class OwnNorm(nnx.Module):
    """RMS normalization with its own code, as in many language models."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(1 + jax.random.uniform(rngs.params(), (features,)))

    def __call__(self, x: Any, *, gate: Any = None) -> jax.Array:
        h = jnp.asarray(x, "float32") if gate is None else x * jax.nn.silu(gate)
        mean_square = jnp.mean(h**2, axis=-1, keepdims=True)
        return (h * jax.lax.rsqrt(mean_square + 0.25) * self.scale).astype(x.dtype)


class Inheriting(OwnNorm):
    """A subclass that may have another constructor, with the same computation."""


class Overriding(OwnNorm):
    """A subclass with its own computation."""

    def __call__(self, x: Any, *, gate: Any = None) -> jax.Array:
        return 2 * super().__call__(x, gate=gate)


def own_norm(norm: OwnNorm, x: Any, *, gate: Any = None) -> jax.Array:
    h = x if gate is None else x * jax.nn.silu(gate)
    return fusednorm.rms_norm(h, norm.scale[...], epsilon=0.25, dtype=x.dtype)


class OwnNorms(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List(
            [OwnNorm(FEATURES, rngs=rngs), Inheriting(FEATURES, rngs=rngs)]
        )
        self.last = Overriding(FEATURES, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        first, second = self.norms
        return self.last(jnp.sin(second(jnp.sin(first(x)), gate=x)))


def test_a_norm_that_is_not_flaxs_runs_the_call_that_is_given() -> None:
    model = OwnNorms(rngs=nnx.Rngs(0))
    expected = outputs_and_gradients(model, data())
    assert norms_called(model, data()) == 0
    variables = dict(nnx.iter_graph(model))
    report = fusednorm.fuse(model, {OwnNorm: own_norm})
    assert (
        str(report)
        == """\
2 replaced, 1 left
  norms.0  OwnNorm -> fused OwnNorm
  norms.1  Inheriting -> fused Inheriting
  last     Overriding left: a subclass of OwnNorm with its own __call__"""
    )
    assert norms_called(model, data()) == 2
    assert isinstance(model.norms[1], Inheriting)
    assert all(node is variables[path] for path, node in nnx.iter_graph(model) if path)
    assert_trees_agree(outputs_and_gradients(model, data()), expected, DEEP)

    again = fusednorm.fuse(model, {OwnNorm: own_norm, Overriding: own_norm})
    assert [path for path, _, _ in again.replaced] == ["last"]
    assert [why for _, _, why in again.left] == ["fused already"] * 2
    assert len(fusednorm.unfuse(model).replaced) == 3
    assert norms_called(model, data()) == 0
    assert type(model.norms[0]) is OwnNorm


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, nnx.clone, pickled, pickled_in_parts],
)
def test_copies_of_a_norm_with_a_call_that_is_given(duplicate: Callable) -> None:
    layer = Inheriting(FEATURES, rngs=nnx.Rngs(0))
    fusednorm.fuse(layer, {OwnNorm: own_norm})
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    np.testing.assert_array_equal(twin(data(), gate=data()), layer(data(), gate=data()))
    fusednorm.unfuse(twin)
    assert type(twin) is Inheriting
    assert type(layer) is not Inheriting


def test_a_call_may_be_given_for_a_layer_of_flax() -> None:
    """A given call takes precedence over ours. Other layers are fused as usual."""

    def ten(layer: Any, x: Any) -> Any:
        return 10 + x

    model = nnx.Sequential(
        nnx.RMSNorm(FEATURES, rngs=nnx.Rngs(0)),
        Doubled(FEATURES, rngs=nnx.Rngs(0)),
        Scaled(FEATURES, rngs=nnx.Rngs(0)),
    )
    calls = {nnx.RMSNorm: ten, Doubled: functools.partial(ten)}
    assert len(fusednorm.fuse(model, calls).replaced) == 3
    x = data()
    np.testing.assert_array_equal(model.layers[0](x), 10 + x)
    np.testing.assert_array_equal(model.layers[1](x), 10 + x)
    assert isinstance(model.layers[2], fusednorm.LayerNorm)
    fusednorm.unfuse(model)
    assert [type(layer) for layer in model.layers] == [nnx.RMSNorm, Doubled, Scaled]


class Wrapper(nnx.Module):
    """A module that the tests name after the norm that it holds."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    ("name", "is_norm"),
    [
        ("RMSNorm", True),
        ("Qwen3RMSnorm", True),
        ("LayerNorm2d", True),
        ("T5LayerNormalization", True),
        ("NormalizingFlow", False),
        ("Normal", False),
        ("Block", False),
    ],
)
def test_the_report_names_norms_that_fuse_does_not_know(
    name: str, is_norm: bool
) -> None:
    cls = type(name, (Wrapper,), {})
    linear = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))
    why = f"not flax's: fuse(model, {{{name}: call}}) replaces its __call__"
    expected = (("(the model)", name, why),) if is_norm else ()
    assert fusednorm.fuse(cls(linear)).left == expected
    norm = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    assert fusednorm.fuse(cls(norm)).left == ()  # its name is that of the norm inside
    assert type(norm) is fusednorm.LayerNorm


class NoCall(nnx.Module):
    pass


@pytest.mark.parametrize(
    "calls",
    [
        {OwnNorm: fusednorm.RMSNorm},
        {OwnNorm: "rms_norm"},
        {NoCall: own_norm},
        {"OwnNorm": own_norm},
        {dict: own_norm},
        {nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)): own_norm},
    ],
)
def test_calls_that_are_none_are_refused(calls: Any) -> None:
    layer = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Expected calls to map classes") as raised:
        fusednorm.fuse(layer, calls)
    assert "\n" not in str(raised.value)  # no layer's repr
    assert type(layer) is nnx.LayerNorm


# --- the report -----------------------------------------------------------------------


class Various(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.List(
            [nnx.LayerNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)]
        )
        self.own = Doubled(4, rngs=rngs)
        self.mine = fusednorm.BatchNorm(4, rngs=rngs)
        self.scaled = Scaled(4, rngs=rngs)
        self.weights = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)


def test_the_report_reads_well() -> None:
    model = Various(rngs=nnx.Rngs(0))
    report = fusednorm.fuse(model)
    assert isinstance(report, fusednorm.FuseReport)
    assert (
        str(report)
        == """\
3 replaced, 3 left
  encoder.0  flax.nnx.LayerNorm -> fusednorm.LayerNorm
  encoder.1  flax.nnx.RMSNorm -> fusednorm.RMSNorm
  scaled     Scaled -> fused Scaled
  mine       fusednorm.BatchNorm left: fused already
  own        Doubled left: a subclass of flax.nnx.LayerNorm with its own __call__
  weights    WeightNorm left: it normalizes weights, not activations"""
    )
    assert (
        str(fusednorm.unfuse(model))
        == """\
4 replaced, 1 left
  encoder.0  fusednorm.LayerNorm -> flax.nnx.LayerNorm
  encoder.1  fusednorm.RMSNorm -> flax.nnx.RMSNorm
  mine       fusednorm.BatchNorm -> flax.nnx.BatchNorm
  scaled     fused Scaled -> Scaled
  own        Doubled left: flax's already"""
    )


# --- stacked, abstract, attention -----------------------------------------------------


def by_vmap(norm: Any = nnx.LayerNorm) -> Any:
    make = nnx.vmap(lambda key: Block(norm, rngs=nnx.Rngs(key)))
    return randomize(make(jax.random.split(jax.random.key(0), 3)))


def by_vmap_with_averages() -> Any:
    return by_vmap(functools.partial(nnx.BatchNorm, momentum=0.5))


def by_scan() -> Any:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def make(carry: Any, key: Any) -> Any:
        return carry, Block(
            functools.partial(nnx.GroupNorm, num_groups=3), rngs=nnx.Rngs(key)
        )

    _, blocks = make(0, jax.random.split(jax.random.key(0), 3))
    return randomize(blocks)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def through_layers(x: jax.Array, block: Block) -> jax.Array:
    return block(x)


@pytest.mark.parametrize("make", [by_vmap, by_vmap_with_averages, by_scan])
def test_stacked_layers(make: Callable) -> None:
    """Each parameter has one more axis, from vmap or scan over a constructor."""
    theirs, ours = make_pair(make)
    assert ours.norm.scale.shape == (3, FEATURES)
    assert_same_state(ours, theirs)
    x = data(X_SHAPE)

    def scanned(model: Any, x: Any) -> jax.Array:
        return through_layers(x, model)

    def mapped(model: Any, x: Any) -> jax.Array:
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(model, x)

    for call in (scanned, mapped):
        assert norms_called(call, theirs, x) == 0
        assert norms_called(call, ours, x) == 1
        expected = outputs_and_gradients(theirs, x, call)
        assert_trees_agree(outputs_and_gradients(ours, x, call), expected, DEEP)


def test_abstract_models() -> None:
    """fuse() works on an nnx.eval_shape model, which gets its values afterwards."""
    model = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
    expected = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
    assert len(fusednorm.fuse(model).replaced) == NORMS
    assert_same_state(model, expected)
    x = jax.ShapeDtypeStruct(X_SHAPE, "float32")
    assert norms_called(model, x) == NORMS + 1
    nnx.update(model, nnx.state(make_model()))
    x = data(X_SHAPE)
    assert_agrees(model(x), make_model()(x), DEEP)


def test_attention_with_normalized_queries_and_keys() -> None:
    def make() -> nnx.MultiHeadAttention:
        return randomize(
            nnx.MultiHeadAttention(
                3, FEATURES, normalize_qk=True, decode=False, rngs=nnx.Rngs(0)
            )
        )

    theirs, ours = make_pair(make)
    assert type(ours.query_ln) is type(ours.key_ln) is fusednorm.LayerNorm
    x = data(X_SHAPE)
    assert norms_called(ours, x) == 2
    expected = outputs_and_gradients(theirs, x)
    assert_trees_agree(outputs_and_gradients(ours, x), expected, DEEP)


def test_models_without_shared_layers_in_tree_mode() -> None:
    with nnx.set_graph_mode(False):
        theirs, ours = make_pair(lambda: randomize(Block(rngs=nnx.Rngs(0))))
        x = data(X_SHAPE)
        assert norms_called(ours, x) == 1
        assert_agrees(nnx.jit(ours)(x), nnx.jit(theirs)(x), DEEP)


# --- training -------------------------------------------------------------------------


def loss_of(model: Any, x: Any, dy: Any) -> jax.Array:
    return jnp.vdot(model(x), dy) / x.size


@nnx.jit
def train_step(model: Any, optimizer: nnx.Optimizer, x: Any, dy: Any) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, x, dy)
    optimizer.update(model, gradients)
    return loss


def train(fuse_when: str | None) -> dict[str, Any]:
    model = make_model()
    if fuse_when == "before the optimizer":
        fusednorm.fuse(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    if fuse_when == "after the optimizer":
        fusednorm.fuse(model)
    losses = []
    for step in range(4):
        if fuse_when == "after a step" and step == 1:
            fusednorm.fuse(model)
        x, dy = data(X_SHAPE, seed=step), data(X_SHAPE, seed=100 + step)
        losses.append(train_step(model, optimizer, x, dy))
    assert type(model.first) is (fusednorm.LayerNorm if fuse_when else nnx.LayerNorm)
    return {
        "losses": jnp.stack(losses),
        "model": arrays(nnx.state(model)),
        "optimizer": arrays(nnx.state(optimizer, nnx.OptState)),
    }


def test_training_with_an_optimizer() -> None:
    """Losses, parameters, running averages and the optimizer's state match flax's."""
    expected = train(None)
    start = arrays(nnx.state(make_model()))
    for path, value in expected["model"].items():
        assert np.abs(value - start[path]).max() > 1e-3, f"{path} was not trained"
    for when in ("before the optimizer", "after the optimizer", "after a step"):
        assert_trees_agree(train(when), expected, 4 * DEEP)


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit], ids=["nnx.jit", "jax.jit"])
def test_a_function_compiled_before_runs_the_fused_layers_after(jit: Callable) -> None:
    """Rows 5000 deviations from zero tell flax's arithmetic from ours."""
    x = data(X_SHAPE) / 3 + 5000
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
    model = nnx.Sequential(nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)))
    step = jit(lambda model, x: model(x))
    error = functools.partial(lambda y: np.abs(np.asarray(y, np.float64) - exact).max())
    assert error(step(model, x)) > 0.5
    fusednorm.fuse(model)
    assert error(step(model, x)) < 0.01
    fusednorm.unfuse(model)
    assert error(step(model, x)) > 0.5


def test_train_eval_and_view_of_a_fused_model() -> None:
    theirs, ours = make_pair()
    x = data(X_SHAPE)
    for model in (theirs, ours):
        model.eval()
    y_eval = ours(x)
    assert_agrees(y_eval, theirs(x), DEEP)
    assert_same_state(ours, make_model())
    for model in (theirs, ours):
        model.train()
    assert_agrees(ours(x), theirs(x), DEEP)
    views = [nnx.view(m, use_running_average=True) for m in (theirs, ours)]
    assert type(views[1].first) is fusednorm.LayerNorm
    assert views[1].first.scale is ours.first.scale
    assert_agrees(views[1](x), views[0](x), DEEP)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_agrees(y_eval, views[0](x), DEEP)


# --- transforms -----------------------------------------------------------------------


class Chain(nnx.Module):
    """One norm of each kind."""

    def __init__(self) -> None:
        self.norms = nnx.List([build(nnx, name) for name in NAMES])
        self.norms[-1].momentum = 0.5

    def __call__(self, x: Any) -> jax.Array:
        for norm in self.norms:
            x = x + jnp.tanh(norm(x))
        return x


def with_jit(model: Any, x: Any, dy: Any) -> Any:
    return nnx.jit(lambda model, x: model(x))(model, x)


def with_grad(model: Any, x: Any, dy: Any) -> Any:
    return arrays(nnx.grad(loss_of)(model, x, dy))


def with_value_and_grad(model: Any, x: Any, dy: Any) -> Any:
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains(4)))
    loss, gradients = nnx.value_and_grad(loss_of, argnums=wrt)(model, x, dy)
    return loss, arrays(gradients)


def with_jit_of_grad_in_x(model: Any, x: Any, dy: Any) -> Any:
    return nnx.jit(nnx.grad(loss_of, argnums=1))(model, x, dy)


def with_remat(model: Any, x: Any, dy: Any) -> Any:
    call = nnx.remat(lambda model, x: model(x))
    gradients = nnx.grad(lambda model, x: jnp.vdot(call(model, x), dy))(model, x)
    return arrays(gradients)


def with_scan(model: Any, x: Any, dy: Any) -> Any:
    """Runs the same model at each step, and carries its running averages."""
    step = nnx.scan(
        lambda model, x, dy: (model, loss_of(model, x, dy)),
        in_axes=(nnx.Carry, 0, 0),
        out_axes=(nnx.Carry, 0),
    )
    steps = jnp.arange(1.0, 4)[:, None, None, None]
    return step(model, steps + x, steps * dy)[1]


def with_vmap(model: Any, x: Any, dy: Any) -> Any:
    """Maps a model in eval mode over x."""
    model = nnx.view(model, use_running_average=True)
    call = nnx.vmap(lambda model, x: model(x[None])[0], in_axes=(None, 0))
    return call(model, x)


def with_vmap_of_grad(model: Any, x: Any, dy: Any) -> Any:
    """Returns per-example gradients."""
    model = nnx.view(model, use_running_average=True)

    def gradients(model: Any, x: Any, dy: Any) -> Any:
        return nnx.grad(loss_of)(model, x[None], dy[None])

    return arrays(nnx.vmap(gradients, in_axes=(None, 0, 0))(model, x, dy))


def with_jvp(model: Any, x: Any, dy: Any) -> Any:
    graph, state = nnx.split(model)
    return jax.jvp(lambda x: nnx.merge(graph, state, copy=True)(x), (x,), (dy,))


@pytest.mark.parametrize(
    "transform",
    [
        *(with_jit, with_grad, with_value_and_grad, with_jit_of_grad_in_x, with_remat),
        *(with_scan, with_vmap, with_vmap_of_grad, with_jvp),
    ],
)
def test_transforms_of_a_fused_model(transform: Callable) -> None:
    theirs, ours = make_pair(lambda: randomize(Chain()))
    x, dy = data(X_SHAPE), data(X_SHAPE, seed=5)
    transform = nnx.jit(transform)
    expected = transform(theirs, x, dy)
    assert_trees_agree(transform(ours, x, dy), expected, DEEP)
    # What a transform does to running averages is part of its result.
    assert_trees_agree(arrays(nnx.state(ours)), arrays(nnx.state(theirs)), DEEP)


# --- storing and copying --------------------------------------------------------------


def test_checkpoints_go_from_flax_to_fused_and_back(tmp_path: Path) -> None:
    """orbax stores one model's state, and loads it into an abstract other one."""

    def store(model: Any, path: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state(model))

    def load(path: Path, fuse: bool) -> Any:
        model = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(1)))
        if fuse:
            fusednorm.fuse(model)
        with ocp.StandardCheckpointer() as checkpointer:
            nnx.update(model, checkpointer.restore(path, nnx.state(model)))
        return model

    theirs, x = make_model(), data(X_SHAPE)
    store(theirs, tmp_path / "flax")
    ours = load(tmp_path / "flax", fuse=True)
    assert type(ours.first) is fusednorm.LayerNorm
    assert_same_state(ours, theirs)
    assert_agrees(ours(x), theirs(x), DEEP)
    store(ours, tmp_path / "fused")  # the call above moved its averages
    back = load(tmp_path / "fused", fuse=False)
    assert type(back.first) is nnx.LayerNorm
    assert_same_state(back, ours)
    assert_agrees(back.tail.layers[1].mean[...], theirs.tail.layers[1].mean[...], DEEP)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, nnx.clone, pickled, pickled_in_parts],
)
@pytest.mark.parametrize("cls", [Scaled, MoreScaled, nnx.BatchNorm])
def test_copies_of_a_fused_layer(cls: type, duplicate: Callable) -> None:
    layer = randomize(cls(FEATURES, rngs=nnx.Rngs(0)))
    fusednorm.fuse(layer)
    twin = duplicate(layer)
    assert twin is not layer
    assert type(twin) is type(layer)
    assert_same_state(twin, layer)
    np.testing.assert_array_equal(twin(data()), layer(data()))
    fusednorm.unfuse(twin)
    assert type(twin) is cls
    assert isinstance(layer, fusednorm.LayerNorm | fusednorm.BatchNorm)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, nnx.clone, pickled, pickled_in_parts]
)
def test_copies_of_a_fused_model(duplicate: Callable) -> None:
    model = make_model()
    fusednorm.fuse(model)
    twin = duplicate(model)
    twins, modules = (
        {path: type(node) for path, node in nnx.iter_modules(m)} for m in (twin, model)
    )
    assert set(twins.values()) == set(modules.values())
    assert_same_state(twin, model)
    assert twin.first is twin.again
    assert twin.first is not model.first
    np.testing.assert_array_equal(twin(data(X_SHAPE)), model(data(X_SHAPE)))


def test_a_subclass_that_inherits_a_call_of_its_own_is_left() -> None:
    class MoreDoubled(Doubled):
        pass

    layer = MoreDoubled(12, rngs=nnx.Rngs(0))
    ((_, _, reason),) = fusednorm.fuse(layer).left
    assert "its own __call__" in reason
    assert type(layer) is MoreDoubled


def test_calls_that_are_no_dict_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected calls to be a dict.*got function"):
        fusednorm.fuse(build(nnx, "LayerNorm"), fusednorm.rms_norm)  # type: ignore[arg-type]


def test_another_call_for_a_fused_class_asks_for_unfuse() -> None:
    class Norm(nnx.Module):
        def __call__(self, x: Any) -> Any:
            return x

    model = nnx.Sequential(Norm())
    fusednorm.fuse(model, {Norm: lambda norm, x: x})
    (left,) = fusednorm.fuse(model, {Norm: lambda norm, x: 2 * x}).left
    assert left[2] == "fused already; unfuse it first"


class Added(nnx.Module):
    """Takes keywords that a norm of ours takes too."""

    def __call__(self, x: jax.Array, scale: float = 1.0, residual: Any = 0) -> Any:
        return scale * x + residual


@pytest.mark.parametrize("name", NAMES)
def test_a_sequential_passes_keywords_as_before(name: str) -> None:
    """It passes a keyword to the layers whose signature has it.

    An older flax passes all keywords to the first layer.
    """
    found: list[Any] = []
    for fused in (False, True):
        norm = build(nnx, name, **({} if name == "BatchNorm" else {"use_scale": False}))
        model = nnx.Sequential(norm, nnx.Dropout(0.5), Added())
        if fused:
            assert not fusednorm.fuse(model).left
        try:
            found.append(model(data(), deterministic=True, scale=2.0, residual=1.0))
        except TypeError as error:
            found.append(str(error))
    before, after = found
    if isinstance(before, str):
        assert isinstance(after, str)
    else:
        assert_agrees(after, before)
