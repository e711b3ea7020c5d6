"""fuse_neighbours moves the operations around a norm into it, and nothing else."""

import functools
import gc
import pickle
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm.kernels import neighbours
from tests import interpreters
from tests.helpers import EPS32, Case, assert_close
from tests.layer_helpers import (
    assert_agrees,
    assert_trees_agree,
    build,
    data,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = (2, 4, 4, 12)
SCALE = np.linspace(0.5, 1.5, 12, dtype=np.float32)
BIAS = np.linspace(-1, 1, 12, dtype=np.float32)


def norm(x: Any, scale: Any = SCALE, bias: Any = BIAS) -> jax.Array:
    return fusednorm.group_norm(x, scale, bias, num_groups=3, dtype=x.dtype)


def activations(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Returns the activation of each forward that `explain` finds; "" for none."""
    choices = fusednorm.explain(fn, *args).choices
    return [choice.activation for choice in choices if choice.op == "forward"]


def found(fn: Callable[..., Any], *args: Any) -> list[str]:
    return activations(fusednorm.fuse_neighbours(fn), *args)


def behind(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Returns what each forward does after the norm: "+ relu", "+", "relu" or ""."""
    choices = fusednorm.explain(fn, *args).choices
    return [
        " ".join(
            ["+"] * choice.shortcut + [choice.activation] * bool(choice.activation)
        )
        for choice in choices
        if choice.op == "forward"
    ]


WRITTEN = {
    "relu": ("relu", nnx.relu),
    "silu": ("silu", nnx.silu),
    "swish": ("silu", jax.nn.swish),
    "y * sigmoid(y)": ("silu", lambda y: y * jax.nn.sigmoid(y)),
    "sigmoid(y) * y": ("silu", lambda y: nnx.sigmoid(y) * y),
    "gelu": ("gelu_tanh", nnx.gelu),
    "gelu, exact": ("gelu", lambda y: nnx.gelu(y, approximate=False)),
}


# --- what is found --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("written", WRITTEN)
def test_takes_an_activation_along(written: str, dtype: str) -> None:
    name, act = WRITTEN[written]
    x = data(SHAPE, dtype)

    def apart(x: Any) -> jax.Array:
        return act(norm(x))

    joined = fusednorm.fuse_neighbours(apart)
    assert activations(apart, x) == [""]
    assert activations(joined, x) == [name]
    # Only one call remains.
    assert [str(e.primitive) for e in jax.make_jaxpr(joined)(x).eqns] == ["jit"]

    dy = data(SHAPE, dtype, seed=5)
    y, vjp = jax.vjp(joined, x)
    asked = functools.partial(
        fusednorm.group_norm,
        scale=SCALE,
        bias=BIAS,
        num_groups=3,
        dtype=dtype,
        activation=name,
    )
    expected, expected_vjp = jax.vjp(asked, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(*map(np.asarray, (vjp(dy)[0], expected_vjp(dy)[0])))
    if dtype == "float32":
        assert_agrees(y, apart(x))
        assert_agrees(vjp(dy)[0], jax.vjp(apart, x)[1](dy)[0], roundings=64)


@pytest.mark.parametrize("model", ["resnet", "transformer"])
def test_a_model_is_the_same_but_for_rounding(model: str) -> None:
    pytest.importorskip("sklearn", reason="bench/models/small.py needs it")
    from bench.models.small import MODELS

    fused = MODELS[model](nnx.Rngs(0))
    fusednorm.fuse(fused)
    images = data((4, 8, 8, 1))

    def forward(model: Any, x: Any) -> jax.Array:
        return model(x)

    joined = fusednorm.fuse_neighbours(forward)
    if model == "resnet":  # the second norm of each block adds the shortcut
        expected = ["silu", *["silu", "+ silu"] * 4]
    else:
        expected = [""] * len(activations(forward, fused, images))
    assert behind(joined, fused, images) == expected

    if model == "transformer":  # the stream, with two norms per block

        def loss(model: Any, x: Any) -> Any:
            return jnp.sum(joined(model, x) ** 2)

        gradients = fusednorm.explain(nnx.grad(loss), fused, images).choices
        backward = [c.residual for c in gradients if c.op == "backward"]
        assert (backward.count(True), len(backward)) == (6, 13)

    ours = outputs_and_gradients(fused, images, call=joined)
    theirs = outputs_and_gradients(fused, images)
    assert ours["state"].keys() == theirs["state"].keys()
    for what in ("y", "dx"):
        assert_agrees(ours[what], theirs[what], roundings=256)
    for what in ("state", "d_params"):
        for path in theirs[what]:
            assert_agrees(ours[what][path], theirs[what][path], roundings=256)


@pytest.mark.parametrize(
    "name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"]
)
def test_every_layer_takes_one_along(name: str) -> None:
    layer = build(fusednorm, name)
    x = data()
    assert found(lambda layer, x: nnx.silu(layer(x)), layer, x) == ["silu"]


def _in_scan(x: Any) -> Any:
    return jax.lax.scan(lambda c, _: (nnx.silu(norm(c)), None), x, length=3)[0]


def _in_branch(x: Any) -> Any:
    return jax.lax.cond(x[0, 0, 0, 0] > 0, lambda x: nnx.silu(norm(x)), jnp.sin, x)


def _in_loop(x: Any) -> Any:
    return jax.lax.fori_loop(0, 3, lambda _, c: nnx.silu(norm(c)), x)


def _in_shard_map(x: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = P("data")
    body = lambda x: nnx.silu(norm(x))  # noqa: E731
    return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)(x)


INSIDE = {
    "jit": jax.jit(lambda x: nnx.silu(norm(x))),
    "jit twice": jax.jit(jax.jit(lambda x: nnx.silu(norm(x)))),
    "scan": _in_scan,
    "branch": _in_branch,
    "loop": _in_loop,
    "checkpoint": jax.checkpoint(lambda x: nnx.silu(norm(x))),
    "vmap": jax.vmap(lambda x: nnx.silu(norm(x[None])[0])),
    "shard_map": _in_shard_map,
}


@pytest.mark.parametrize("where", INSIDE)
def test_looks_inside(where: str) -> None:
    x = data(SHAPE)
    joined = fusednorm.fuse_neighbours(INSIDE[where])
    if where == "vmap":  # y[0] lies between norm and silu
        assert activations(joined, x) == [""]
    else:
        assert activations(joined, x) == ["silu"]
    assert_agrees(jax.jit(joined)(x), jax.jit(INSIDE[where])(x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_looks_inside_a_shard_map_with_a_mesh_in_context(kind: AxisType) -> None:
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(kind,)), P("data")

    def f(x: jax.Array) -> jax.Array:
        body = lambda x: nnx.silu(norm(x))  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    joined = fusednorm.fuse_neighbours(f)
    with jax.set_mesh(mesh):
        x = jax.device_put(data(SHAPE), NamedSharding(mesh, spec))
        assert activations(joined, x) == ["silu"]
        assert_agrees(jax.jit(joined)(x), jax.jit(f)(x))


def test_a_function_that_is_called_twice_stays_one_function() -> None:
    block = jax.jit(lambda x: nnx.silu(norm(x)))
    joined = jax.make_jaxpr(fusednorm.fuse_neighbours(lambda x: block(block(x))))(
        data(SHAPE)
    )
    first, second = joined.eqns
    assert first.params["jaxpr"] is second.params["jaxpr"]


def test_derivatives_of_every_order() -> None:
    def apart(x: Any) -> jax.Array:
        return nnx.silu(norm(x.reshape(1, 2, 2, 12)))

    x, v = data((48,)), data((48,), seed=6)
    joined = fusednorm.fuse_neighbours(apart)
    for derivative in (
        lambda f: jax.jvp(f, (x,), (v,))[1],
        lambda f: jax.jvp(jax.grad(lambda x: (f(x) ** 3).sum()), (x,), (v,))[1],
        lambda f: jax.vmap(jax.grad(lambda x: (f(x) ** 3).sum()))(jnp.stack([x, v])),
    ):
        assert_agrees(derivative(joined), derivative(apart), roundings=256)


# --- what goes on beside a norm -------------------------------------------------------

ROWS = (3, 5, 24)
grouped = fusednorm.group_norm


def rows_norm(x: Any, scale: Any = None) -> jax.Array:
    return fusednorm.layer_norm(x, scale)


def _pre_norm(x: Any) -> Any:
    x = jnp.sin(x)
    return x + jnp.tanh(rows_norm(x, jnp.linspace(0.5, 1.5, 24)))


def _two_norms(x: Any) -> Any:
    x = jnp.sin(x)
    return x * rows_norm(x) + jnp.tanh(fusednorm.rms_norm(x)), x


def _stream(x: Any) -> Any:
    return jax.lax.scan(lambda h, _: (jax.checkpoint(_pre_norm)(h), None), x, length=2)


def _sharded(x: Any) -> Any:
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,))
    spec = P("data")
    return jax.shard_map(_pre_norm, mesh=mesh, in_specs=spec, out_specs=spec)(x)


CARRIED = {
    "a sum": (_pre_norm, 1),
    "two norms": (_two_norms, 2),
    "a result": (lambda x: (rows_norm(x), x), 1),
    "with a residual": (
        lambda x: (y := fusednorm.layer_norm(x, residual=x**2), y[0] + y[1])[1],
        1,
    ),
    "with a residual, and x": (
        lambda x: (x + jnp.tanh((y := fusednorm.layer_norm(x, residual=x**2))[0]), y),
        1,
    ),
    "an activation": (lambda x: (x, nnx.silu(rows_norm(x))), 1),
    "groups": (lambda x: x + nnx.silu(grouped(x, num_groups=3)), 1),
    "instances": (lambda x: x + jnp.tanh(fusednorm.instance_norm(x)), 1),
    "batches": (lambda x: (fusednorm.batch_norm(x), jnp.sin(x)), 1),
    "a stream": (_stream, 1),
    "a shard_map": (_sharded, 1),
}


def _loss(f: Callable[..., Any]) -> Callable[[Any], jax.Array]:
    return lambda x: sum(jnp.sum(a**3) for a in jax.tree.leaves(f(x)))  # type: ignore


@pytest.mark.parametrize("what", CARRIED)
def test_adds_dx_to_what_comes_to_x_elsewhere(what: str) -> None:
    apart, count = CARRIED[what]
    joined = fusednorm.fuse_neighbours(apart)
    x, v = data(ROWS), data(ROWS, seed=4)
    gradient = jax.grad(_loss(joined))
    choices = fusednorm.explain(gradient, x).choices
    added = [c.residual for c in choices if c.op == "backward"]
    assert added == [True] * count
    assert_trees_agree(jax.jit(joined)(x), jax.jit(apart)(x), roundings=256)
    for derivative in (
        lambda f: jax.grad(_loss(f))(x),
        lambda f: jax.jvp(jax.grad(_loss(f)), (x,), (v,))[1],
    ):
        assert_agrees(
            jax.jit(lambda: derivative(joined))(),  # noqa: B023
            jax.jit(lambda: derivative(apart))(),  # noqa: B023
            roundings=2048,
        )


# --- a sum before a norm --------------------------------------------------------------


def _product(x: Any) -> jax.Array:
    """Returns a device's part of a product whose factors are split over devices."""
    w = jnp.sin(jnp.arange(24.0 * 24)).reshape(24, 24)
    return jnp.tanh(x @ w)


def _all(x: Any) -> jax.Array:
    return jax.lax.psum(_product(x), "model")


def _parallel(x: Any) -> Any:
    """Runs two layers: the first sum is carried on to the second one."""
    h = x + _all(x)
    y = rows_norm(h, jnp.linspace(0.5, 1.5, 24))
    h = _all(y) + h
    return h * fusednorm.rms_norm(h)


def _early(x: Any) -> Any:
    h = x + _all(x)
    return jnp.tanh(h), rows_norm(h)


# Functions, and whether each of their forwards takes a residual. A name with False
# says why the norm takes none.
SUMS: dict[str, tuple[Callable[[Any], Any], list[bool]]] = {
    "a layer": (lambda x: rows_norm(x + _all(x)), [True]),
    "two layers": (_parallel, [True, True]),
    "an activation behind": (lambda x: nnx.silu(rows_norm(x + _all(x))), [True]),
    "a sum of two": (lambda x: rows_norm(_all(x) + _all(x**2)), [True]),
    "a scan": (
        lambda x: jax.lax.scan(lambda h, _: (_parallel(h), None), x, length=2)[0],
        [True, True],
    ),
    "of a norm": (lambda x: rows_norm(rows_norm(x) + _all(x)), [False, True]),
    "no collective": (lambda x: rows_norm(x + _product(x)), [False]),
    "computed as it is added": (lambda x: rows_norm(jnp.sin(x) + _all(x)), [False]),
    "read before the norm": (_early, [False]),
    "several axes": (
        lambda x: (
            fusednorm.layer_norm(
                (h := x[None] + _all(x[None])), reduction_axes=(1, 2), feature_axes=-1
            )
            + 0 * h
        ),
        [False],
    ),
    "over devices": (
        lambda x: fusednorm.layer_norm(x + _all(x), axis_name="model"),
        [False],
    ),
    "masked": (
        lambda x: fusednorm.layer_norm(x + _all(x), mask=jnp.arange(24) < 20),
        [False],
    ),
}


@pytest.mark.parametrize(
    ("what", "check_vma"), [*((what, True) for what in SUMS), ("two layers", False)]
)
def test_takes_the_sum_with_what_a_collective_made(what: str, check_vma: bool) -> None:
    body, residual = SUMS[what]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))

    def on_mesh(body: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return jax.shard_map(
            body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma
        )

    apart = on_mesh(body)
    joined = fusednorm.fuse_neighbours(apart)
    x, v = data((37, 24)), data((37, 24), seed=4)
    choices = fusednorm.explain(joined, x).choices
    assert [c.residual for c in choices if c.op == "forward"] == residual
    for derivative in (
        lambda f: f(x),
        lambda f: jax.grad(_loss(f))(x),
        lambda f: jax.jvp(jax.grad(_loss(f)), (x,), (v,))[1],
    ):
        for a, b in zip(
            jax.tree.leaves(jax.jit(lambda: derivative(joined))()),  # noqa: B023
            jax.tree.leaves(jax.jit(lambda: derivative(apart))()),  # noqa: B023
            strict=True,
        ):
            assert_agrees(a, b, roundings=2048)


OF_KERNELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rows": (_pre_norm, (37, 24)),
    "groups": (lambda x: x + nnx.silu(grouped(x, num_groups=3)), (2, 5, 7, 24)),
    "groups of many": (lambda x: x + jnp.tanh(grouped(x, num_groups=2)), (1, 9000, 8)),
    "batches": (
        lambda x: x + jnp.tanh(fusednorm.batch_norm(x)[0]),
        (2, 9, 16),
    ),
}


@pytest.mark.parametrize("of", OF_KERNELS)
@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_add_it(backend: str, of: str) -> None:
    function, shape = OF_KERNELS[of]
    x, dy = data(shape), data(shape, seed=4)

    def gradient(function: Any) -> Any:
        return jax.jit(lambda x: jax.vjp(function, x)[1](dy)[0])(x)

    with interpreters.interpreted(backend), fusednorm.use_backend(backend):
        ours = gradient(fusednorm.fuse_neighbours(function))
        ran = {name.split(",")[0] for name in interpreters.runs}
    family = "rowwise" if of == "rows" else "channelwise"
    assert ran == {f"{family} forward", f"{family} backward"}
    with fusednorm.use_backend("reference"):
        assert_agrees(ours, gradient(function), roundings=512)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("mosaic_gpu", Case("layer_norm", (37, 24))),
        ("mosaic_tpu", Case("layer_norm", (37, 24))),
        ("mosaic_gpu", Case("group_norm", (2, 5, 7, 24), (("num_groups", 3),))),
    ],
    ids=str,
)
def test_half_precision_is_rounded_once(backend: str, case: Case) -> None:
    with interpreters.interpreted(backend), fusednorm.use_backend(backend):
        check_carried(case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (4097, 768)),
        Case("group_norm", (2, 64, 64, 320), (("num_groups", 32),)),
        Case("group_norm", (2, 8, 8, 1280), (("num_groups", 32),)),
        Case("batch_norm", (8, 14, 14, 64)),
    ],
    ids=str,
)
def test_gpu_rounds_once(case: Case) -> None:
    with fusednorm.use_backend("mosaic_gpu"):
        check_carried(case)


def check_carried(case: Case) -> None:
    """Checks the gradient of x if both y and x itself have cotangents."""
    x, scale, bias, dy = case.data(3, jnp.dtype("bfloat16"), "float32")
    x, dy = jnp.asarray(x), jnp.asarray(dy, "bfloat16")
    dh = data(case.shape, "bfloat16", seed=5)
    truth = case.truth(x, scale, bias, dy)

    @fusednorm.fuse_neighbours
    def both(x: Any) -> Any:
        return case.run(x, scale, bias, dtype=x.dtype), x

    (dx,) = jax.jit(lambda x: jax.vjp(both, x)[1]((dy, dh)))(x)
    given = np.asarray(dh, np.float64)
    bound = truth.bounds["dx"] + EPS32 * np.abs(given)
    assert_close(dx, truth.dx + given, bound)


NOT_CARRIED = {
    "no other use": lambda x: rows_norm(jnp.sin(x)),
    "an earlier use": lambda x: (h := jnp.sin(x), jnp.tanh(h), rows_norm(h))[1:],
    "complex": lambda x: (z := x + 1j * x, fusednorm.layer_norm(z), z)[1:],
}


@pytest.mark.parametrize("what", NOT_CARRIED)
def test_carries_nothing_else(what: str) -> None:
    program = jax.make_jaxpr(NOT_CARRIED[what])(data(SHAPE))
    assert neighbours.join(program) is program


# --- what is added behind a norm ------------------------------------------------------


def batch(x: Any) -> tuple[jax.Array, Any]:
    """Returns y, and running averages as BatchNorm keeps them."""
    y, mean, var = fusednorm.batch_norm(x, SCALE, BIAS, dtype=x.dtype)
    return y, (0.1 * mean + 0.9, 0.1 * var + 0.9)


def _block(x: Any, r: Any) -> Any:
    y, kept = batch(x)
    return nnx.relu(y + r), kept


def _made_later(x: Any, r: Any) -> Any:
    y, kept = batch(x)
    return nnx.relu(jnp.tanh(r) + y), kept


def _downsampling(x: Any, r: Any) -> Any:
    y, kept = batch(jnp.sin(x))
    z, others = batch(r)
    return nnx.relu(y + z), kept, others


def _the_later_is_used_twice(x: Any, r: Any) -> Any:
    y, kept = batch(x)
    z, others = batch(r)
    return nnx.relu(y + z), kept, others, z


def _of_each_others_statistics(x: Any, r: Any) -> Any:
    (y, (mean, _)), (z, (_, var)) = batch(x), batch(jnp.sin(x))
    return y + r * var, z + r * mean


def _an_effect_before(x: Any, r: Any) -> Any:
    y, kept = batch(x)
    jax.debug.callback(lambda _: None, x[0])
    return nnx.relu(y + jnp.tanh(r)), kept


def _with_sum(x: Any, r: Any) -> Any:
    y, h = fusednorm.layer_norm(x, SCALE, BIAS, residual=r)
    return nnx.silu(y + jnp.tanh(r)), h


def _gradient_inside(x: Any, r: Any) -> Any:
    return jax.grad(lambda x: jnp.sum(nnx.silu(norm(x) + r) ** 2))(x)


def _added_in_scan(x: Any, r: Any) -> Any:
    def body(c: Any, _: Any) -> Any:
        y, kept = batch(c)
        return nnx.silu(y + jnp.tanh(r)), kept

    return jax.lax.scan(body, x, length=2)


def _added_in_branch(x: Any, r: Any) -> Any:
    return jax.lax.cond(x[0, 0, 0, 0] > 9, jnp.add, lambda x, r: norm(x) + r, x, r)


def _added_in_shard_map(x: Any, r: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = P("data")
    # s is replicated on both devices, so jax casts it before the addition.
    body = lambda x, r, s: (nnx.silu(norm(x) + r), rows_norm(x) + s)  # noqa: E731
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(spec, spec, P()), out_specs=(spec, spec)
    )
    return mapped(x, r, r[:1])


ADDED: dict[str, tuple[Any, list[str]]] = {
    "a block": (_block, ["+ relu"]),
    "the other order": (lambda x, r: nnx.relu(r + batch(x)[0]), ["+ relu"]),
    "made later": (_made_later, ["+ relu"]),
    "two norms": (_downsampling, ["", "+ relu"]),
    "two norms, one used twice": (_the_later_is_used_twice, ["", "+ relu"]),
    "of each other's statistics": (_of_each_others_statistics, ["", "+"]),
    "an effect before": (_an_effect_before, ["+ relu"]),
    "no activation": (lambda x, r: norm(x) + r, ["+"]),
    "an activation of x": (lambda x, r: norm(x) + nnx.silu(r), ["+"]),
    "an activation of two": (lambda x, r: nnx.silu(norm(x) + r) + r, ["+ silu"]),
    "a sum of three": (lambda x, r: nnx.relu(norm(x) + r + x), ["+"]),
    "a sum used twice": (lambda x, r: (z := norm(x) + r, nnx.silu(z)), ["+"]),
    "x": (lambda x, r: nnx.silu(norm(x) + x), ["+ silu"]),
    "x, which goes on": (lambda x, r: (nnx.silu(norm(x) + x), x * r), ["+ silu"]),
    "x of the other": (lambda x, r: norm(norm(x) + x) + x, ["+", "+"]),
    "rows": (lambda x, r: nnx.gelu(rows_norm(x, SCALE) + r), ["+ gelu_tanh"]),
    "rows, RMS": (lambda x, r: r + fusednorm.rms_norm(x), ["+"]),
    "instances": (lambda x, r: nnx.relu(fusednorm.instance_norm(x) + r), ["+ relu"]),
    "a sum's": (_with_sum, ["+ silu"]),
    "jit": (jax.jit(lambda x, r: jax.jit(_made_later)(x, r)), ["+ relu"]),
    "checkpoint": (jax.checkpoint(_made_later), ["+ relu"]),
    "vmap": (jax.vmap(lambda x, r: nnx.silu(rows_norm(x) + r)), ["+ silu"]),
    "scan": (_added_in_scan, ["+ silu"]),
    "branch": (_added_in_branch, ["+"]),
    "shard_map": (_added_in_shard_map, ["+ silu", "+"]),
    "a gradient": (_gradient_inside, ["+"]),
}


@pytest.mark.parametrize("what", ADDED)
def test_takes_a_sum_along(what: str) -> None:
    apart, expected = ADDED[what]
    joined = fusednorm.fuse_neighbours(apart)
    x, r = data(SHAPE), data(SHAPE, seed=4)
    assert behind(apart, x, r) == [""] * len(expected)
    assert behind(joined, x, r) == expected

    def everything(f: Any) -> Any:
        def loss(x: Any, r: Any) -> Any:
            results = f(x, r)
            return sum(jnp.sum(a**3) for a in jax.tree.leaves(results)), results

        (_, results), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, r)
        return results, gradients

    ours, theirs = (jax.jit(everything, static_argnums=0)(f) for f in (joined, apart))
    assert_trees_agree(ours[0], theirs[0], roundings=256)
    for dx, expected_dx in zip(ours[1], theirs[1], strict=True):
        if np.any(expected_dx):
            assert_agrees(dx, expected_dx, roundings=2048)
        else:  # r is not used where x is added
            assert not np.any(dx)


def test_derivatives_of_every_order_of_a_sum() -> None:
    def apart(x: Any) -> jax.Array:
        images = x.reshape(1, 2, 2, 12)
        return nnx.silu(norm(images) + jnp.tanh(images))

    x, v = data((48,)), data((48,), seed=6)
    joined = fusednorm.fuse_neighbours(apart)
    assert behind(joined, x) == ["+ silu"]
    for derivative in (
        lambda f: jax.jvp(f, (x,), (v,))[1],
        lambda f: jax.jvp(jax.grad(lambda x: (f(x) ** 3).sum()), (x,), (v,))[1],
        lambda f: jax.vmap(jax.grad(lambda x: (f(x) ** 3).sum()))(jnp.stack([x, v])),
    ):
        assert_agrees(derivative(joined), derivative(apart), roundings=256)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_in_half_precision_is_that_of_the_layer(dtype: str) -> None:
    x, r = data(SHAPE, dtype), data(SHAPE, dtype, seed=4)
    joined = fusednorm.fuse_neighbours(lambda x, r: nnx.silu(norm(x) + r))
    asked = functools.partial(
        fusednorm.group_norm, num_groups=3, dtype=dtype, activation="silu"
    )
    y, expected = joined(x, r), asked(x, SCALE, BIAS, residual=r)
    assert y.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(*map(np.asarray, (y, expected)))


def test_a_sum_needs_no_more_equations() -> None:
    x, r = data(SHAPE), data(SHAPE, seed=4)
    apart, _ = ADDED["no activation"]
    for f, names in (
        (apart, ["jit", "add"]),
        (fusednorm.fuse_neighbours(apart), ["jit"]),
    ):
        assert [str(e.primitive) for e in jax.make_jaxpr(f)(x, r).eqns] == names


def test_x_that_is_added_goes_on_too() -> None:
    joined = fusednorm.fuse_neighbours(lambda x: (norm(x) + x, jnp.sin(x)))

    def loss(x: Any) -> Any:
        return _loss(joined)(x)

    forward, backward = fusednorm.explain(jax.grad(loss), data(SHAPE)).choices
    assert forward.shortcut
    assert backward.residual


def test_an_effect_stays_where_it_is() -> None:
    x, r = data(SHAPE), data(SHAPE, seed=4)
    program = jax.make_jaxpr(_an_effect_before)(x, r)
    joined = neighbours.join(program)
    assert joined.effects == program.effects
    names = [str(e.primitive) for e in joined.eqns]
    assert names.index("debug_callback") < names.index("jit")


def test_sizes_that_are_not_known() -> None:
    apart, _ = ADDED["no activation"]
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, *SHAPE[1:]), "float32")
    joined = fusednorm.fuse_neighbours(apart)
    assert behind(joined, x, x) == ["+"]
    program = jax.export.export(jax.jit(joined))(x, x)
    x, r = data(SHAPE), data(SHAPE, seed=4)
    assert_agrees(program.call(x, r), apart(x, r))


@pytest.mark.parametrize("of", ["rows", "batches"])
@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_add_the_sum(backend: str, of: str) -> None:
    def apart(x: Any, r: Any) -> Any:
        bias = jnp.linspace(-1, 1, x.shape[-1])
        if of == "rows":
            normed = fusednorm.layer_norm(x, bias=bias)
        else:
            normed = fusednorm.batch_norm(x, bias=bias)[0]
        return nnx.relu(normed + jnp.tanh(r))

    shape = (37, 24) if of == "rows" else (2, 9, 16)
    x, r, dy = (data(shape, seed=seed) for seed in (2, 4, 5))

    def gradients(function: Any) -> Any:
        return jax.jit(lambda x, r: jax.vjp(function, x, r)[1](dy))(x, r)

    with interpreters.interpreted(backend), fusednorm.use_backend(backend):
        joined = fusednorm.fuse_neighbours(apart)
        ours = gradients(joined)
        ran = {name.split(",")[0] for name in interpreters.runs}
        assert behind(joined, x, r) == ["+ relu"]
    family = "rowwise" if of == "rows" else "channelwise"
    assert ran == {f"{family} forward", f"{family} backward"}
    with fusednorm.use_backend("reference"):
        for a, b in zip(ours, gradients(apart), strict=True):
            assert_agrees(a, b, roundings=512)


def _a_carried_sum(x: Any, r: Any) -> Any:
    y, h = fusednorm.layer_norm(x, residual=r)
    return y + h


def _with_its_mean(x: Any, r: Any) -> Any:
    y, mean, _ = fusednorm.batch_norm(x)
    return nnx.relu(y + r * jnp.tanh(mean))


def _an_effect_of_the_mean(x: Any, r: Any) -> Any:
    y, mean, _ = fusednorm.batch_norm(x)
    jax.debug.callback(lambda _: None, mean)
    return y + jnp.tanh(r)


NOT_ADDED: dict[str, Any] = {
    "used twice": lambda x, r: (y := norm(x), (y + r) * y)[1],
    "a result too": lambda x, r: (y := norm(x), (y + r, y))[1],
    "itself": lambda x, r: (y := norm(x), y + y)[1],
    "a number": lambda x, r: norm(x) + 1.0,
    "a row": lambda x, r: norm(x) + r[0, 0, 0],
    "of size 1": lambda x, r: norm(x) + r[:1],
    "a row, broadcast": lambda x, r: norm(x) + jnp.broadcast_to(r[0, 0, 0], x.shape),
    "of another dtype": lambda x, r: norm(x) + jnp.sin(r).astype("bfloat16"),
    "y of another dtype": lambda x, r: norm(x.astype("bfloat16")) + r,
    "a difference": lambda x, r: norm(x) - r,
    "a product": lambda x, r: norm(x) * r,
    "a part of y": lambda x, r: norm(x)[:, 1:] + r[:, 1:],
    "an activation inside": lambda x, r: (
        fusednorm.group_norm(x, num_groups=3, activation="silu") + r
    ),
    "a shortcut inside": lambda x, r: fusednorm.instance_norm(x, residual=r) + r,
    "a norm in a function of its own": lambda x, r: jax.jit(norm)(x) + r,
    "h of the norm": _a_carried_sum,
    "of its mean": _with_its_mean,
    "an effect of its mean": _an_effect_of_the_mean,
    "complex": lambda x, r: norm(x + 1j * x) + (r + 1j * r),
    "running averages": lambda x, r: (
        fusednorm.BatchNorm(12, use_running_average=True, rngs=nnx.Rngs(0))(x) + r
    ),
}


@pytest.mark.parametrize("what", NOT_ADDED)
def test_leaves_a_sum_alone(what: str) -> None:
    program = jax.make_jaxpr(NOT_ADDED[what])(data(SHAPE), data(SHAPE, seed=4))
    assert neighbours.join(program) is program


def test_a_sum_behind_an_activation_stays_behind_it() -> None:
    x, r = data(SHAPE), data(SHAPE, seed=4)
    joined = fusednorm.fuse_neighbours(lambda x, r: nnx.silu(norm(x)) + r)
    assert behind(joined, x, r) == ["silu"]


# --- what is not ----------------------------------------------------------------------


@jax.custom_jvp
def _own_relu(z: Any) -> jax.Array:
    return jax.jit(_max_0)(z)


def _max_0(z: Any) -> jax.Array:
    return jax.lax.max(z, 0.0)


_max_0.__name__ = _own_relu.__name__ = "relu"
_own_relu.defjvps(lambda dot, out, z: 0.5 * dot)


@functools.partial(jax.jit)
def _own_silu(z: Any) -> jax.Array:
    return z * jax.lax.logistic(1.702 * z)


_own_silu.__wrapped__.__name__ = "silu"


@jax.custom_vjp
def _own_block(x: Any) -> jax.Array:
    return nnx.silu(norm(x))


_own_block.defvjp(lambda x: (_own_block(x), None), lambda _, dy: (7 * dy,))


@jax.custom_jvp
def _own_tangent(x: Any) -> jax.Array:
    return nnx.silu(norm(x))


_own_tangent.defjvp(lambda x, x_dot: (_own_tangent(*x), 7 * x_dot[0]))


def _used_within(x: Any) -> Any:
    y = norm(x)
    h = nnx.sigmoid(y)
    return y * h + h


NOT = {
    "used twice": lambda x: (y := norm(x), nnx.silu(y) + y)[1],
    "a result too": lambda x: (y := norm(x), (nnx.silu(y), y))[1],
    "a part is used": _used_within,
    "another dtype": lambda x: nnx.silu(norm(x).astype("bfloat16")),
    "a part of y": lambda x: nnx.silu(norm(x)[:, 1:]),
    "another's product": lambda x: (s := nnx.sigmoid(x), norm(x) * s)[1],
    "a square": lambda x: (y := norm(x), y * y)[1],
    "another's relu": lambda x: _own_relu(norm(x)),
    "another's silu": lambda x: _own_silu(norm(x)),
    "another's derivative": _own_block,
    "another's tangent": _own_tangent,
    "its real part": lambda x: nnx.silu(norm(x.astype("complex64")).real),
    "complex": lambda x: nnx.silu(norm(x.astype("complex64"))),
}


@pytest.mark.parametrize("what", NOT)
def test_leaves_alone(what: str) -> None:
    x = data(SHAPE)
    joined = fusednorm.fuse_neighbours(NOT[what])
    assert activations(joined, x) == [""]
    program = jax.make_jaxpr(NOT[what])(x)
    assert neighbours.join(program) is program


def test_a_norm_takes_one_activation() -> None:
    x = data(SHAPE)
    assert found(lambda x: nnx.relu(nnx.silu(norm(x))), x) == ["silu"]

    def again(x: Any) -> jax.Array:
        return nnx.relu(fusednorm.group_norm(x, num_groups=3, activation="silu"))

    assert found(again, x) == ["silu"]


# --- state ----------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self) -> None:
        self.norm = fusednorm.BatchNorm(12, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x: Any, scale: float = 1.0) -> jax.Array:
        y = nnx.silu(self.norm(x))
        self.seen = nnx.Intermediate(y)
        return self.drop(y) * scale


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_changes_what_the_call_changes(wrap: Any) -> None:
    x = data(SHAPE)
    ours, theirs = Block(), Block()
    joined = wrap(fusednorm.fuse_neighbours(Block.__call__))
    plain = wrap(Block.__call__)
    for _ in range(2):
        assert_agrees(joined(ours, x, scale=2.0), plain(theirs, x, scale=2.0))
    kept, expected = (nnx.to_flat_state(nnx.state(block)) for block in (ours, theirs))
    assert kept.paths == expected.paths
    for ours, theirs in zip(kept.leaves, expected.leaves, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert_agrees(a, b)


class Residual(nnx.Module):
    """The end of a ResNet block where the size changes."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(12, 12, (3, 3), rngs=rngs)
        self.norm = fusednorm.BatchNorm(12, rngs=rngs)
        self.projection = nnx.Conv(12, 12, (1, 1), rngs=rngs)
        self.projected = fusednorm.BatchNorm(12, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)) + self.projection(x))
        return nnx.relu(self.norm(self.conv(x)) + self.projected(self.projection(x)))


def test_a_block_keeps_its_running_averages() -> None:
    model, x = Residual(), data(SHAPE)
    joined = fusednorm.fuse_neighbours(Residual.__call__)
    assert behind(joined, model, x) == ["+ relu", "", "+ relu"]
    ours = outputs_and_gradients(model, x, call=joined)
    theirs = outputs_and_gradients(model, x)
    for what in ("y", "dx"):
        assert_agrees(ours[what], theirs[what], roundings=512)
    assert any(path.endswith("mean") for path in theirs["state"])
    for what in ("state", "d_params"):
        for path, expected in theirs[what].items():
            if "conv.bias" in path or "projection.bias" in path:
                continue  # the norm subtracts the bias: only rounding is left
            assert_agrees(ours[what][path], expected, roundings=512)


def test_of_a_model_a_method_and_a_function() -> None:
    x = data(SHAPE)
    block = Block()
    block.eval()
    expected = block(x)
    for joined, args in (
        (fusednorm.fuse_neighbours(block), (x,)),
        (fusednorm.fuse_neighbours(block.__call__), (x,)),
        (fusednorm.fuse_neighbours(lambda block, x: block(x)), (block, x)),
    ):
        assert_agrees(joined(*args), expected)


def test_touches_no_variable_that_the_call_leaves_alone() -> None:
    layer = build(fusednorm, "LayerNorm")

    @jax.jit  # a layer from outside cannot be changed in here
    def call(x: Any) -> jax.Array:
        return fusednorm.fuse_neighbours(layer)(x)

    assert_agrees(call(data()), layer(data()))


def test_outside_of_jit_nothing_is_compiled_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A second run compiles nothing, whether forward, backward or in a jitted part.

    What was joined for a program is freed with the program.
    """
    part = jax.jit(lambda x: nnx.relu(norm(x) + x))

    def block(x: jax.Array) -> jax.Array:
        return x + nnx.silu(norm(x)) + part(x)

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (forward(x) ** 2).mean())(x)

    forward = fusednorm.fuse_neighbours(block)
    x = data(SHAPE)
    assert behind(forward, x) == ["silu", "+ relu"]
    first = forward(x), gradient(x)
    gc.collect()
    joined, norms = len(neighbours._joined), len(neighbours._norms)
    with jax.log_compiles():
        again = forward(x), gradient(x)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert compiled == []
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    gc.collect()
    assert len(neighbours._joined) <= joined
    assert len(neighbours._norms) <= norms


def test_keeps_the_name() -> None:
    assert fusednorm.fuse_neighbours(_used_within).__name__ == "_used_within"


def _times(model: Any, x: jax.Array, factor: Any = 1.0) -> jax.Array:
    return factor * nnx.relu(model(x))


def _either(model: Any, x: jax.Array, mode: str = "relu") -> jax.Array:
    return nnx.relu(model(x)) if mode == "relu" else model(x)


def _mean_of(model: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(nnx.relu(model(x))).mean()


_decorated = fusednorm.fuse_neighbours(_mean_of)
_decorated.__qualname__ = _decorated.__name__ = "_decorated"

IN_NNX: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grad": (_mean_of, lambda f, m, x: nnx.grad(f)(m, x=x)),
    "vmap": (
        _times,
        lambda f, m, x: nnx.vmap(f, in_axes=(None, 0, None))(m, x, factor=2.0),
    ),
    "remat": (_times, lambda f, m, x: nnx.remat(f)(m, x=x, factor=2.0)),
    "static": (
        _either,
        lambda f, m, x: nnx.jit(f, static_argnames="mode")(m, x, "none"),
    ),
    "partial": (
        _either,
        lambda f, m, x: nnx.cached_partial(nnx.jit(f, static_argnames="mode"), m)(
            x, "none"
        ),
    ),
    "donated": (
        _times,
        lambda f, m, x: (
            nnx.jit(f, donate_argnames="x")(m, copy := x + 0),
            jnp.asarray(copy.is_deleted()),
        ),
    ),
}


@pytest.mark.parametrize("how", IN_NNX)
def test_nnx_transforms_take_it_as_they_take_the_function(how: str) -> None:
    """NNX resolves keywords and names by the signature."""
    layer, x = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0)), jnp.asarray(data(SHAPE))
    fn, transformed = IN_NNX[how]
    expected = transformed(fn, layer, x)
    assert_trees_agree(
        transformed(fusednorm.fuse_neighbours(fn), layer, x), expected, 3
    )


def test_a_decorated_function_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(_decorated)) is _decorated


def test_says_what_must_be_an_argument() -> None:
    layer = fusednorm.BatchNorm(12, rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError) as raised:
        fusednorm.fuse_neighbours(lambda x: nnx.relu(layer(x)))(data(SHAPE))
    assert "must be among its arguments" in raised.value.__notes__[0]


# --- what a call carries beside modules -----------------------------------------------


class Noisy(nnx.Module):
    """A module whose dropout draws from the `rngs` passed to the call.

    `silenced` turns the dropout off, and counts its calls.
    """

    def __init__(self) -> None:
        self.norm = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5)
        self.calls = 0
        self.mode: str | None = "first"

    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        return self.drop(nnx.relu(self.norm(x)), rngs=rngs)

    def silenced(self, x: jax.Array) -> jax.Array:
        self.drop.eval()
        self.calls += 1
        del self.mode
        self.last = "silenced"
        return self.drop(nnx.relu(self.norm(x)))

    @nnx.jit
    def jitted(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(x))

    @fusednorm.fuse_neighbours
    def decorated(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(x))


@pytest.mark.parametrize("how", ["by position", "by keyword", "in a jit"])
def test_random_keys_move_on(how: str) -> None:
    x, theirs, ours = data(SHAPE), nnx.Rngs(1), nnx.Rngs(1)
    model = Noisy()
    fused: Any = fusednorm.fuse_neighbours(model)
    if how == "in a jit":
        fused = nnx.jit(lambda x, rngs: fused_model(x, rngs))
        fused_model = fusednorm.fuse_neighbours(model)
    for _ in range(2):
        y = fused(x, rngs=ours) if how == "by keyword" else fused(x, ours)
        assert_agrees(y, model(x, theirs), 3)
    assert ours.default.count[...] == theirs.default.count[...] == 2


def test_variables_optimizers_and_metrics_are_changed() -> None:
    x, times = data(SHAPE), nnx.Variable(jnp.zeros((), int))
    model, average = Noisy(), nnx.metrics.Average()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(model: Any, optimizer: Any, average: Any, times: Any, x: Any) -> Any:
        times[...] += 1
        loss, grads = nnx.value_and_grad(lambda model: model.jitted(x).mean())(model)
        optimizer.update(model, grads)
        average.update(values=loss)
        return loss

    before = model.norm.scale[...]
    loss = fusednorm.fuse_neighbours(step)(model, optimizer, average, times, x)
    assert times[...] == optimizer.step[...] == 1
    assert average.compute() == loss > 0
    assert (model.norm.scale[...] != before).any()


def test_a_variable_may_hold_more_arrays_than_before() -> None:
    kept = nnx.Variable([jnp.zeros(2)])

    def step(kept: Any) -> None:
        kept.set_value([*kept.get_value(), jnp.ones(2)])

    fusednorm.fuse_neighbours(step)(kept)
    np.testing.assert_array_equal(kept.get_value(), [[0, 0], [1, 1]])


def test_a_variable_that_is_shared_is_one() -> None:
    def scaled_twice(norm: Any, scale: nnx.Variable, x: jax.Array) -> jax.Array:
        scale[...] = scale[...] * 3
        return nnx.relu(norm(x))

    theirs, ours = (fusednorm.LayerNorm(12, rngs=nnx.Rngs(0)) for _ in range(2))
    expected = nnx.jit(scaled_twice)(theirs, theirs.scale, data(SHAPE))
    y = fusednorm.fuse_neighbours(scaled_twice)(ours, ours.scale, data(SHAPE))
    assert_agrees(y, expected, 3)
    assert (ours.scale[...] == 3).all()


def test_what_is_no_array_is_changed_too() -> None:
    model = Noisy()
    y = fusednorm.fuse_neighbours(model.silenced)(data(SHAPE))
    assert_agrees(y, nnx.relu(model.norm(data(SHAPE))), 3)
    assert (model.calls, model.last, model.drop.deterministic) == (1, "silenced", True)
    assert not hasattr(model, "mode")
    looked_at = Noisy()
    fusednorm.explain(looked_at.silenced, data(SHAPE))
    assert looked_at.calls == 0


@pytest.mark.parametrize(
    "how", ["method", "partial", "decorated", "decorated, of the class"]
)
def test_takes_what_stands_for_a_method(how: str) -> None:
    model = Noisy()
    x = data(SHAPE)
    if how == "decorated":
        forward: Any = model.decorated
    elif how == "decorated, of the class":
        forward = functools.partial(Noisy.decorated, model)
    else:
        method = (
            model.jitted
            if how == "method"
            else functools.partial(
                nnx.jit(lambda model, x: nnx.relu(model.norm(x))), model
            )
        )
        assert activations(method, x) == [""]
        forward = fusednorm.fuse_neighbours(method)
    assert activations(forward, x) == ["relu"]
    assert_agrees(forward(x), nnx.relu(model.norm(x)), 3)


def test_what_is_no_module_is_changed_too() -> None:
    class Tally(nnx.Pytree):
        calls = 0

    def forward(tally: Any, x: jax.Array) -> jax.Array:
        tally.calls += 1
        return nnx.relu(norm(x))

    tally = Tally()
    fusednorm.fuse_neighbours(forward)(tally, data(SHAPE))
    assert tally.calls == 1


def test_a_variable_sets_its_value_once() -> None:
    class Doubling(nnx.Variable):
        def set_value(self, value: Any, **options: Any) -> None:
            super().set_value(2 * value, **options)

    def forward(variable: Any, x: jax.Array) -> jax.Array:
        variable.set_value(variable.get_value() + 1)
        return nnx.relu(norm(x))

    variable = Doubling(jnp.ones(3))
    fusednorm.fuse_neighbours(forward)(variable, data(SHAPE))
    np.testing.assert_array_equal(variable.get_value(), [4, 4, 4])


def test_a_class_of_numbers_is_no_array() -> None:
    norm = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0))
    forward = fusednorm.fuse_neighbours(
        lambda x, dtype: nnx.relu(norm(x)).astype(dtype)
    )
    assert forward(data(SHAPE), dtype=np.float16).dtype == np.float16


class Frozen(nnx.Param):
    pass


def _linear(use_bias: bool = True) -> nnx.Linear:
    return nnx.Linear(12, 12, use_bias=use_bias, rngs=nnx.Rngs(1))


# How a call changes a model, and what the test looks at afterwards.
REMADE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "a shape for None": (
        lambda m, y: setattr(m, "nothing", y.shape),
        lambda m: m.nothing,
    ),
    "a new dtype": (lambda m, y: setattr(m, "dtype", y.dtype), lambda m: m.dtype),
    "an array for None": (lambda m, y: setattr(m, "array", y), lambda m: m.array),
    "a Variable for None": (
        lambda m, y: setattr(m, "array", nnx.Cache(y)),
        lambda m: m.array[...],
    ),
    "a count": (
        lambda m, y: setattr(m, "count", m.count + 1),
        lambda m: m.count,
    ),
    "an array of NumPy's": (
        lambda m, y: setattr(m, "count", np.ones((), int)),
        lambda m: jnp.asarray(m.count),
    ),
    "an array in a tuple": (
        lambda m, y: setattr(m, "pair", nnx.data((m.pair[1] + 1, m.pair[0]))),
        lambda m: m.pair,
    ),
    "a cache in a dict": (
        lambda m, y: m.cache.update(n=m.cache["n"] + 1, y=y),
        lambda m: m.cache.get_value(),
    ),
    "an item": (lambda m, y: m.items.append(y), lambda m: len(m.items)),
    "a layer when it is needed": (
        lambda m, y: hasattr(m, "late") or setattr(m, "late", _linear()),
        lambda m: m.late.kernel[...],
    ),
    "another layer": (
        lambda m, y: setattr(m, "linear", _linear(use_bias=False)),
        lambda m: m.linear.bias,
    ),
    "a layer around one": (
        lambda m, y: setattr(
            m, "linear", nnx.LoRA(12, 2, 12, base_module=m.linear, rngs=nnx.Rngs(1))
        ),
        lambda m: (type(m.linear.base_module), m.linear.lora_a[...]),
    ),
    "no layer": (lambda m, y: delattr(m, "linear"), lambda m: hasattr(m, "linear")),
    "another kind of Variable": (
        lambda m, y: setattr(m.linear, "kernel", Frozen(m.linear.kernel[...])),
        lambda m: type(m.linear.kernel),
    ),
}


class Remade(nnx.Module):
    def __init__(self, change: Callable[[Any, Any], Any]):
        self.norm = fusednorm.BatchNorm(12, rngs=nnx.Rngs(0))
        self.linear = _linear()
        self.nothing = None
        self.array = nnx.data(None)
        self.count = jnp.zeros((), int)
        self.pair = nnx.data((jnp.zeros(1), jnp.ones(1)))
        self.cache = nnx.Cache({"n": jnp.zeros((), int)})
        self.items = nnx.List([])
        self.change = change

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm(x))
        self.change(self, y)
        return y


@pytest.mark.parametrize("what", REMADE)
def test_a_model_may_be_remade(what: str) -> None:
    """Each call changes the model as it does without fuse_neighbours."""
    change, look = REMADE[what]
    theirs, ours = Remade(change), Remade(change)
    for _ in range(1 if what == "no layer" else 2):
        expected, y = theirs(data(SHAPE)), fusednorm.fuse_neighbours(ours)(data(SHAPE))
        assert_agrees(y, expected, 3)
        assert_agrees(ours.norm.mean[...], theirs.norm.mean[...], 3)
        (found, seen), (found_there, seen_there) = map(
            _apart, (look(ours), look(theirs))
        )
        assert seen == seen_there
        jax.tree.map(functools.partial(assert_agrees, roundings=3), found, found_there)


def _apart(tree: Any) -> tuple[list[jax.Array], list[Any]]:
    """Returns the arrays of a tree, and its other leaves."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]


def test_a_model_that_is_returned_is_the_same_one() -> None:
    model = Remade(lambda m, y: None)
    returned, _ = fusednorm.fuse_neighbours(lambda m, x: (m, nnx.relu(m.norm(x))))(
        model, data(SHAPE)
    )
    assert returned is model
    assert (model.norm.mean[...] != 0).all()


def test_sizes_of_numpy_stay_numbers() -> None:
    norm = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0))

    def forward(x: jax.Array, size: Any, shape: Any) -> jax.Array:
        return nnx.relu(norm(x)).reshape(size, -1).reshape(shape)

    x, shape = data(SHAPE), np.array([-1, 12])
    y = fusednorm.fuse_neighbours(forward)(x, np.int64(4), shape)
    assert_agrees(y, forward(x, 4, shape), 3)


def test_references_are_changed_in_place() -> None:
    with nnx.var_defaults(ref=True):
        theirs, ours = (fusednorm.BatchNorm(12, rngs=nnx.Rngs(0)) for _ in range(2))
        forward = fusednorm.fuse_neighbours(lambda norm, x: nnx.relu(norm(x)))
        for wrap in (lambda f: f, jax.jit):
            expected = nnx.relu(theirs(data(SHAPE)))
            y = wrap(forward)(ours, data(SHAPE))
            assert_agrees(y, expected, 3)
            assert_agrees(ours.mean[...], theirs.mean[...], 3)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_captures_what_is_sown(wrap: Any) -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.norm = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = nnx.relu(self.norm(x))
            self.sow(nnx.Intermediate, "y", y)
            return y

    model, x = Sowing(), data(SHAPE)
    forward = wrap(fusednorm.fuse_neighbours(lambda m, x: m(x)))
    y, found = nnx.capture(forward, nnx.Intermediate)(model, x)
    assert_agrees(jax.tree.leaves(found)[0], y, 0)


def test_constants_come_back_as_arrays() -> None:
    """Constants that are returned or put into a model become jax's arrays."""
    model = Remade(lambda m, y: setattr(m, "count", jnp.zeros((), int)))

    def forward(model: Any, x: jax.Array) -> Any:
        model.cache["n"] = jnp.zeros((), int)
        return model(x), jnp.float32(3), 1.5, True, np.ones(2)

    _, *constants = fusednorm.fuse_neighbours(forward)(model, data(SHAPE))
    _, *expected = nnx.jit(forward)(model, data(SHAPE))
    for found, there in zip(constants, expected, strict=True):
        assert isinstance(found, jax.Array)
        assert found.aval == there.aval
        np.testing.assert_array_equal(found, there)
    assert isinstance(model.count, jax.Array)
    assert isinstance(model.cache["n"], jax.Array)


@pytest.mark.parametrize("how", ["eager", "jit", "grad", "explain"])
def test_no_tracer_leaks(how: str) -> None:
    model, x = Remade(lambda m, y: None), data(SHAPE)
    forward = fusednorm.fuse_neighbours(lambda m, x: m(x))
    loss = lambda m, x: (forward(m, x) ** 2).mean()  # noqa: E731
    run = {
        "eager": forward,
        "jit": nnx.jit(forward),
        "grad": nnx.jit(nnx.grad(loss)),
        "explain": lambda m, x: fusednorm.explain(forward, m, x),
    }[how]
    with jax.checking_leaks():
        run(model, x)


@pytest.mark.parametrize(
    "collective",
    [
        lambda x: jax.lax.all_gather(x[: len(x) // 2], "d", axis=0, tiled=True),
        lambda x: jax.lax.ppermute(x, "d", [(0, 1), (1, 0)]),
        lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True),
        lambda x: jax.lax.psum_scatter(jnp.tile(x, (2, 1)), "d", tiled=True),
    ],
    ids=["all_gather", "ppermute", "all_to_all", "psum_scatter"],
)
def test_takes_what_each_collective_made(collective: Any) -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def body(x: Any) -> Any:
        return fusednorm.layer_norm(x + collective(jnp.tanh(x)))

    f = jax.shard_map(body, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    joined = fusednorm.fuse_neighbours(f)
    (choice,) = fusednorm.explain(joined, jnp.ones((8, 24))).choices
    assert choice.residual


def test_a_partial_of_a_method() -> None:
    """The partial's arguments come after the method's own, which is `self`."""
    layer = fusednorm.LayerNorm(12, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.norm = layer

        def scaled(self, x: Any, times: Any) -> Any:
            return nnx.relu(self.norm(x)) * times

    model, x = Model(), jnp.arange(24.0).reshape(2, 12)
    given = functools.partial(model.scaled, x)
    joined: Any = fusednorm.fuse_neighbours(given)
    np.testing.assert_allclose(joined(3.0), given(3.0), rtol=1e-6)
    (choice,) = fusednorm.explain(joined, 3.0).choices
    assert choice.activation == "relu"


def _times(x: Any, times: float) -> jax.Array:
    return nnx.relu(norm(x)) * times


def test_keywords_of_a_partial() -> None:
    """Keywords are passed on, and an outer partial's override an inner one's."""
    x = data(SHAPE)
    inner = fusednorm.fuse_neighbours(functools.partial(_times, times=2.0))
    assert_agrees(inner(x), _times(x, 2.0), 3)
    outer = fusednorm.fuse_neighbours(functools.partial(inner, times=3.0))
    assert_agrees(outer(x), _times(x, 3.0), 3)


def test_any_keyword_is_the_function_s() -> None:
    def forward(x: jax.Array, fn: Any) -> jax.Array:
        return fn(norm(x))

    x = data(SHAPE)
    y = fusednorm.fuse_neighbours(forward)(x, fn=nnx.relu)
    assert_agrees(y, forward(x, nnx.relu), 3)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fuse_neighbours\(model\)\(x\)"):
        fusednorm.fuse_neighbours(jnp.ones(3))  # type: ignore[arg-type]
