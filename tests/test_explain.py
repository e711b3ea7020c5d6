"""explain(): what it reports on layers, models and functions; it changes nothing."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm.kernels import dispatch
from fusednorm.kernels.dispatch import Fallback, Kernel
from tests import standin
from tests.layer_helpers import (
    FEATURES,
    NAMES,
    SHAPE,
    assert_same_state,
    build,
    data,
    randomize,
)

CPU = "CPU: the kernels are for NVIDIA GPUs and TPUs"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the CPU kernels, so that reasons other than "CPU" show."""
    entry = (standin.BACKEND, "tests.standin")
    monkeypatch.setitem(dispatch.KERNELS, "cpu", entry)


def layer_of(name: str, *args: Any, **kwargs: Any) -> Any:
    return randomize(build(fusednorm, name, *args, **kwargs))


def reasons(function: Any, *args: Any, **kwargs: Any) -> list[str | None]:
    """Returns the reason of each fallback, and None for each kernel."""
    choices = fusednorm.explain(function, *args, **kwargs).choices
    return [c.plan.reason if isinstance(c.plan, Fallback) else None for c in choices]


def ops(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    return [
        choice.op for choice in fusednorm.explain(function, *args, **kwargs).choices
    ]


def loss(layer: Any, x: Any, dy: Any) -> jax.Array:
    return jnp.vdot(layer(x), dy)


# --- printing -------------------------------------------------------------------------


def test_it_reads_well() -> None:
    model = nnx.Sequential(
        layer_of("LayerNorm"), layer_of("GroupNorm"), layer_of("LayerNorm")
    )
    assert (
        str(fusednorm.explain(nnx.grad(loss), model, data(), data()))
        == """\
2 x forward   float32[5, 4, 3, 12]  N=60 S=1 G=1 K=12
  reference: CPU: the kernels are for NVIDIA GPUs and TPUs
forward   float32[5, 4, 3, 12]  N=5 S=12 G=3 K=4
  reference: CPU: the kernels are for NVIDIA GPUs and TPUs
2 x backward  float32[5, 4, 3, 12]  N=60 S=1 G=1 K=12
  reference: CPU: the kernels are for NVIDIA GPUs and TPUs
backward  float32[5, 4, 3, 12]  N=5 S=12 G=3 K=4
  reference: CPU: the kernels are for NVIDIA GPUs and TPUs"""
    )


def test_it_shows_the_kernel(kernels: None) -> None:
    explanation = fusednorm.explain(layer_of("LayerNorm"), data(dtype="bfloat16"))
    (choice,) = explanation.choices
    assert isinstance(choice.plan, Kernel)
    assert choice.backend == "mosaic_gpu"
    assert (
        str(explanation)
        == """\
forward   bfloat16[5, 4, 3, 12]  N=60 S=1 G=1 K=12
  mosaic_gpu: stand-in forward, all rows per block, 2,880 bytes moved
  it stands in for one"""
    )


def test_it_shows_the_activation(kernels: None) -> None:
    layer = layer_of("LayerNorm")
    act = functools.partial(layer, activation="silu")
    choices = fusednorm.explain(jax.grad(lambda x: loss(act, x, x)), data()).choices
    assert [choice.op for choice in choices] == ["forward", "backward"]
    for choice in choices:
        assert choice.activation == "silu"
        assert str(choice).splitlines()[0].endswith("K=12  silu")
    (plain,) = fusednorm.explain(layer, data()).choices
    assert plain.activation == ""


def test_flax_has_nothing_to_explain() -> None:
    explanation = fusednorm.explain(build(nnx, "LayerNorm"), data())
    assert explanation.choices == ()
    assert str(explanation).startswith("no fusednorm calls (fuse a model")


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("LayerNorm", "N=60 S=1 G=1 K=12"),
        ("RMSNorm", "N=60 S=1 G=1 K=12"),
        ("GroupNorm", "N=5 S=12 G=3 K=4"),
        ("InstanceNorm", "N=5 S=12 G=12 K=1"),
        ("BatchNorm", "N=1 S=60 G=12 K=1"),
    ],
)
def test_each_layer(name: str, view: str) -> None:
    (choice,) = fusednorm.explain(layer_of(name), data()).choices
    assert (choice.op, choice.x, choice.view) == (
        "forward",
        "float32[5, 4, 3, 12]",
        view,
    )
    assert choice.backend == "reference"
    assert choice.plan == Fallback(CPU)


# --- what it is given -----------------------------------------------------------------


def test_functions_that_are_looked_into() -> None:
    layer, x, dy = layer_of("LayerNorm"), data(), data(seed=3)
    both = ["forward", "backward"]
    assert ops(layer, x) == ["forward"]
    assert ops(lambda x: layer(x), x) == ["forward"]
    assert ops(jax.jit(lambda x: layer(x)), x) == ["forward"]
    assert ops(jax.jit(jax.jit(lambda x: layer(layer(x)))), x) == ["forward"] * 2
    assert ops(nnx.jit(lambda layer, x: layer(x)), layer, x) == ["forward"]
    assert ops(nnx.grad(loss), layer, x, dy) == both
    assert ops(nnx.jit(nnx.value_and_grad(loss, argnums=1)), layer, x, dy) == both
    assert ops(jax.grad(lambda x: loss(layer, x, dy)), x) == both
    assert ops(jax.vmap(layer), x) == ["forward"]
    recomputed = jax.checkpoint(lambda x: loss(layer, x, dy))
    assert ops(jax.grad(recomputed), x) == ["forward", "forward", "backward"]
    one_or_none = lambda x: jax.lax.cond(x.sum() > 0, layer, lambda x: x, x)  # noqa: E731
    assert ops(one_or_none, x) == ["forward"]


def test_a_scan_counts_once() -> None:
    layer = layer_of("LayerNorm")

    def steps(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (layer(x), None), x, length=7)[0]

    assert ops(steps, data()) == ["forward"]
    assert ops(jax.grad(lambda x: jnp.vdot(steps(x), x)), data()) == [
        "forward",
        "backward",
    ]


def test_arguments_of_any_kind() -> None:
    """explain takes shapes instead of arrays, modules in containers and by keyword, and
    plain values."""
    layer = layer_of("LayerNorm")
    x = jax.ShapeDtypeStruct((8, FEATURES), "float16")
    (choice,) = fusednorm.explain(layer, x).choices
    assert choice.x == f"float16[8, {FEATURES}]"
    abstract = nnx.eval_shape(lambda: fusednorm.RMSNorm(FEATURES, rngs=nnx.Rngs(0)))
    assert ops(abstract, x) == ["forward"]

    def several(layers: dict, *, x: Any, times: int, then: Any, mode: str) -> Any:
        assert mode == "a string"
        for _ in range(times):
            x = layers["a"][0](x)
        return then(x)

    kwargs = {"x": data(), "times": 2, "then": layer, "mode": "a string"}
    assert ops(several, {"a": [layer]}, **kwargs) == ["forward"] * 3


class Encoder(nnx.Module):
    def __init__(self) -> None:
        self.norm = layer_of("BatchNorm")
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def encode(self, x: Any) -> jax.Array:
        return self.dropout(self.norm(x))

    def __call__(self, x: Any) -> jax.Array:
        return self.encode(self.encode(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: fusednorm.explain(model, x),
        lambda model, x: fusednorm.explain(model.__call__, x),
        lambda model, x: fusednorm.explain(functools.partial(model.__call__, x)),
        lambda model, x: fusednorm.explain(lambda m, x: m(x), model, x),
        lambda model, x: fusednorm.explain(fusednorm.fuse_neighbours(model), x),
        lambda model, x: fusednorm.explain(
            fusednorm.fuse_neighbours(model.__call__), x
        ),
        lambda model, x: fusednorm.explain(nnx.jit(lambda m, x: m(x)), model, x),
        lambda model, x: fusednorm.explain(nnx.grad(loss), model, x, x),
    ],
    ids=[
        *("model", "method", "partial", "function"),
        *("fused", "fused method", "jit", "grad"),
    ],
)
def test_nothing_changes(how: Callable) -> None:
    """explain leaves running averages and random state alone, which a call changes."""
    model, x = Encoder(), data()
    before = nnx.clone(model)
    forward = [c for c in how(model, x).choices if c.op == "forward"]
    assert len(forward) == 2
    assert_same_state(model, before)
    model(x)
    assert (model.norm.mean[...] != before.norm.mean[...]).all()
    assert model.dropout.rngs.count[...] == before.dropout.rngs.count[...] + 2


# --- platforms ------------------------------------------------------------------------


def test_on_platforms_that_are_not_here() -> None:
    explanation = fusednorm.explain(
        nnx.grad(loss), layer_of("LayerNorm"), *[data()] * 2
    )
    for platform, backend in (
        ("cuda", "mosaic_gpu"),
        ("gpu", "mosaic_gpu"),
        ("tpu", "mosaic_tpu"),
        ("cpu", "reference"),
        ("rocm", "reference"),
    ):
        there = explanation.on(platform)
        assert [choice.op for choice in there.choices] == ["forward", "backward"]
        assert {choice.backend for choice in there.choices} == {backend}
        assert there.on("cpu") == explanation


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_equal_calls_are_one_line(platform: str) -> None:
    layers = nnx.Sequential(*[layer_of("LayerNorm") for _ in range(3)])
    gradient = nnx.grad(loss, argnums=(0, 1))
    explanation = fusednorm.explain(gradient, layers, *[data()] * 2).on(platform)
    first, second = (
        line for line in str(explanation).splitlines() if not line.startswith(" ")
    )
    assert first.startswith("3 x forward ")
    assert second.startswith("3 x backward ")


def test_a_gradient_through_running_statistics() -> None:
    """explain reports the shape of x, not of what a derivative keeps."""
    layer = fusednorm.BatchNorm(FEATURES, use_running_average=True, rngs=nnx.Rngs(0))
    x = data()
    forward, backward = fusednorm.explain(
        jax.grad(lambda x: jnp.vdot(x, layer(x))), x
    ).choices
    assert (forward.op, backward.op) == ("forward", "backward")
    assert forward.x == backward.x == f"float32{list(x.shape)}"


def test_on_another_platform_as_many_devices(kernels: None) -> None:
    """The explanation of a sharded array keeps its number of devices.

    On GPUs XLA asks for each device's part. On TPUs it does not.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(mesh, P("data")))
    explanation = fusednorm.explain(fusednorm.layer_norm, x)
    backends = [explanation.on(to).choices[0].backend for to in ("cuda", "tpu")]
    assert backends == ["mosaic_gpu", "reference"]


def test_on_a_platform_where_the_named_backend_cannot_run() -> None:
    with fusednorm.use_backend("reference"):
        explanation = fusednorm.explain(layer_of("LayerNorm"), data())
    (choice,) = explanation.on("cuda").choices
    assert choice.plan == Fallback("the backend 'reference' was chosen")
    with pytest.raises(ValueError, match="No platform 'h100'; the platforms are cpu, "):
        explanation.on("h100")


# --- reasons --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_mask(name: str, kernels: None) -> None:
    layer = layer_of(name)
    assert reasons(layer, data()) == [None]
    assert reasons(layer, data(), mask=jnp.ones(SHAPE, bool)) == ["mask given"]


def test_dtypes(kernels: None) -> None:
    only = "kernels take float32, bfloat16 or float16"
    x = data((5, FEATURES))
    with jax.enable_x64(True):
        x64 = data((5, FEATURES), "float64")
        layer = layer_of("LayerNorm", param_dtype="float64", dtype="float32")
        assert reasons(layer_of("LayerNorm"), x64) == [f"float64 x; {only}"]
        assert reasons(layer, x) == [f"float64 scale; {only}"]
        (reason,) = reasons(layer_of("LayerNorm", dtype="float64"), x)
        assert reason == "float64 output; kernels give float32, bfloat16 or float16"
    for layer in (layer_of("LayerNorm"), layer_of("BatchNorm")):
        assert reasons(layer, x.astype("complex64")) == ["complex numbers"]
    for dtype in ("bfloat16", "float16", "int32"):
        assert reasons(layer_of("LayerNorm"), x.astype(dtype)) == [None]


def test_axis_name(kernels: None) -> None:
    expected = ["statistics that cross an axis of jax.vmap, or groups (axis_name)"]
    mesh = mesh_of(i=2)
    for name in ("LayerNorm", "GroupNorm"):
        layer = layer_of(name, axis_name="i")
        assert reasons(jax.vmap(layer, axis_name="i"), data()) == expected
        over_devices = jax.shard_map(
            layer, mesh=mesh, in_specs=P(None, "i"), out_specs=P(None, "i")
        )
        assert reasons(over_devices, data((4, 4, 12))) == [None]


def test_explicit_sharding_and_auto_mode(kernels: None) -> None:
    """Explicit types tell each device's part; in auto mode XLA does, later."""
    layer = layer_of("LayerNorm")
    for kind, rows in ((AxisType.Explicit, 2), (AxisType.Auto, 4)):
        mesh = jax.make_mesh((2,), ("i",), axis_types=(kind,))
        x = jax.device_put(data((4, 4, 12)), NamedSharding(mesh, P("i")))
        contexts = [jax.set_mesh(mesh)]
        contexts += [contextlib.nullcontext()] if kind is AxisType.Auto else []
        for context in contexts:
            with context:
                (choice,) = fusednorm.explain(layer, x).choices
            assert isinstance(choice.plan, Kernel)
            assert choice.x == f"float32[{rows}, 4, 12]"


def test_batch_norm_in_eval_mode(kernels: None) -> None:
    expected = [
        "BatchNorm with running statistics is elementwise: XLA fuses it into its "
        "neighbours"
    ]
    layer = layer_of("BatchNorm")
    assert reasons(layer, data(), use_running_average=True) == expected
    assert reasons(layer, data(), True) == expected
    assert reasons(layer, data()) == [None]
    layer.eval()
    assert reasons(layer, data()) == expected


def test_axes_that_need_a_transpose(kernels: None) -> None:
    (reason,) = reasons(layer_of("InstanceNorm", 4, feature_axes=1), data())
    assert reason == (
        "reduction axes (2, 3) and feature axes (1,) of shape (5, 4, 3, 12) need a "
        "transpose; put the channels last (axis=-1), and reduced axes just before them"
    )
    (reason,) = reasons(layer_of("BatchNorm", 4, axis=1), data())
    assert "channels last (axis=-1)" in reason
    assert reasons(layer_of("LayerNorm", reduction_axes=(1, 2, 3)), data()) == [None]


def test_scale_of_each_mapped_example(kernels: None) -> None:
    make = nnx.vmap(lambda key: fusednorm.LayerNorm(FEATURES, rngs=nnx.Rngs(key)))
    stack = make(jax.random.split(jax.random.key(0), 5))
    call = nnx.vmap(lambda layer, x: layer(x))
    assert reasons(call, stack, data()) == [None]
    assert "scale or bias (5, 12)" in str(fusednorm.explain(call, stack, data()))


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def test_arrays_on_several_devices(kernels: None) -> None:
    x = jax.device_put(data((8, FEATURES)), NamedSharding(mesh_of(i=2), P("i")))
    explanation = fusednorm.explain(layer_of("LayerNorm"), x)
    assert str(explanation).endswith(
        "\n  of the whole, which XLA splits over 2 devices"
    )
    expected = "\n  reference: XLA partitions this call over 2 devices; a kernel would"
    assert expected in str(explanation.on("tpu"))


def test_keywords_and_models_on_several_devices(kernels: None) -> None:
    everywhere = NamedSharding(mesh_of(i=4), P())
    layer, x = layer_of("LayerNorm"), data((8, FEATURES))
    expected = "\n  reference: XLA partitions this call over 4 devices"
    explanation = fusednorm.explain(layer, x=jax.device_put(x, everywhere))
    assert expected in str(explanation.on("tpu"))
    nnx.update(layer, jax.device_put(nnx.state(layer), everywhere))
    explanation = fusednorm.explain(layer, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert expected in str(explanation.on("tpu"))


def test_kernels_inside_shard_map(kernels: None) -> None:
    """Kernels run if no mesh axis is left to XLA, also in a nested shard_map."""
    layer, mesh = layer_of("LayerNorm"), mesh_of(i=2, j=4)
    rows = {"in_specs": P("i"), "out_specs": P("i")}
    columns = {"in_specs": P("j"), "out_specs": P("j")}
    whole = jax.shard_map(layer, mesh=mesh, **rows)
    part = jax.shard_map(layer, mesh=mesh, axis_names={"i"}, **rows)
    rest = jax.shard_map(layer, axis_names={"j"}, **columns)
    nested = jax.shard_map(rest, mesh=mesh, axis_names={"i"}, **rows)
    x = data((8, FEATURES))
    for function, rows_each, reason in (
        (whole, 4, None),
        (part, 4, "XLA partitions this call over 4 devices"),
        (nested, 1, None),
    ):
        (choice,) = fusednorm.explain(function, x).choices
        assert choice.x == f"float32[{rows_each}, {FEATURES}]"
        if reason is None:
            assert isinstance(choice.plan, Kernel)
        else:
            assert choice.plan.reason.startswith(reason)


def test_the_backend_that_was_chosen(kernels: None) -> None:
    explain = functools.partial(reasons, layer_of("LayerNorm"), data())
    with fusednorm.use_backend("reference"):
        assert explain() == ["the backend 'reference' was chosen"]
    with fusednorm.use_backend("mosaic_gpu"):
        assert explain() == [None]
    with (
        fusednorm.use_backend("mosaic_tpu"),
        pytest.raises(
            NotImplementedError, match="this platform's kernels are mosaic_gpu"
        ),
    ):
        explain()


def test_what_cannot_be_called(kernels: None) -> None:
    with pytest.raises(
        TypeError, match=r"explain\(model, x\) traces model\(x\) itself"
    ):
        fusednorm.explain(layer_of("LayerNorm")(data()))


def test_it_plans_and_launches_nothing(kernels: None) -> None:
    standin.runs.clear()
    fusednorm.explain(nnx.grad(loss), layer_of("LayerNorm"), data(), data())
    assert not standin.runs


def test_of_a_function_that_returns_no_array() -> None:
    def report(x: jax.Array) -> str:
        return f"normalized {fusednorm.layer_norm(x).shape}"

    assert len(fusednorm.explain(report, jnp.ones((2, 3))).choices) == 1


def test_it_shows_a_bias_of_each_sample_and_a_shortcut() -> None:
    x = jnp.ones((5, 4, 3, 12))

    def norm(x: Any, bias: Any) -> Any:
        return fusednorm.layer_norm(x, jnp.ones(12), bias)

    def behind(x: Any, bias: Any) -> Any:
        return fusednorm.instance_norm(x, None, bias, residual=x, activation="relu")

    bias = jnp.ones((5, 1, 1, 12))
    (choice,) = fusednorm.explain(norm, x, bias).choices
    assert str(choice).splitlines()[0].endswith("K=12  scale or bias (5, 12)")
    (choice,) = fusednorm.explain(behind, x, jnp.ones(12)).choices
    assert str(choice).splitlines()[0].endswith("K=1  shortcut  relu")


def test_reasons_of_what_is_no_primitive() -> None:
    x = jnp.ones((5, 12))

    def computed(x: Any, epsilon: Any) -> Any:
        return fusednorm.layer_norm(x, epsilon=epsilon)

    def complex_output(x: Any) -> Any:
        return fusednorm.layer_norm(x, dtype="complex64")

    for function, args, reason in (
        (computed, (x, jnp.float32(1e-3)), "an epsilon that the program computes"),
        (complex_output, (x,), "complex numbers"),
    ):
        (choice,) = fusednorm.explain(function, *args).choices
        assert choice.plan == Fallback(reason)


def test_a_keyword_of_the_call_goes_before_that_of_a_partial() -> None:
    norm = functools.partial(fusednorm.layer_norm, activation="relu")
    x = jnp.ones((2, 12))
    (choice,) = fusednorm.explain(norm, x, activation="silu").choices
    assert choice.activation == "silu"


def test_a_named_backend_can_be_asked_for_its_platform() -> None:
    """No kernel runs here, so printing the answer raises, but not asking for it."""
    with fusednorm.use_backend("mosaic_tpu"):
        explanation = fusednorm.explain(layer_of("LayerNorm"), data())
    (choice,) = explanation.on("tpu").choices
    assert choice.backend == "mosaic_tpu"
    with pytest.raises(NotImplementedError, match="'mosaic_tpu' was named"):
        print(explanation)


def test_shapes_with_a_sharding_are_as_arrays() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("d"))
    shape = jax.ShapeDtypeStruct((8, FEATURES), "float32", sharding=sharding)
    array = jax.device_put(jnp.ones((8, FEATURES)), sharding)
    layer = layer_of("LayerNorm")
    for x in (shape, array):
        explanation = fusednorm.explain(layer, x)
        assert explanation.target.partitioned == 4
        assert "over 4 devices" in str(explanation.on("tpu"))
        assert explanation.on("cuda").choices[0].backend == "mosaic_gpu"


def test_a_scope_s_name_makes_no_backward() -> None:
    layer = fusednorm.BatchNorm(FEATURES, use_running_average=True, rngs=nnx.Rngs(0))

    def run(layer: fusednorm.BatchNorm, x: jax.Array) -> jax.Array:
        with jax.named_scope("transposed_conv"):
            return layer(x)

    (choice,) = fusednorm.explain(run, layer, data()).choices
    assert choice.op == "forward"


def test_explanations_are_what_they_say() -> None:
    layer = layer_of("LayerNorm")
    one, same = (fusednorm.explain(layer, data()) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != one.on("cuda")
    assert repr(one) == f"Explanation(choices={one.choices!r})"


def test_the_gradient_of_a_batch_norm_in_eval_mode_has_xs_dtype() -> None:
    layer = fusednorm.BatchNorm(FEATURES, use_running_average=True, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((5, FEATURES), "bfloat16")
    explanation = fusednorm.explain(
        jax.grad(lambda x: jnp.vdot(layer(x), jnp.ones(x.shape))), x
    )
    assert [c.x for c in explanation.choices] == [f"bfloat16[5, {FEATURES}]"] * 2
