"""fuse_neighbours: which activations go into their norms, and that no other does."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm.kernels import neighbours
from tests import interpreters
from tests.helpers import EPS32, Case, assert_close
from tests.layer_helpers import assert_agrees, build, data, outputs_and_gradients

SHAPE = (2, 4, 4, 12)
SCALE = np.linspace(0.5, 1.5, 12, dtype=np.float32)
BIAS = np.linspace(-1, 1, 12, dtype=np.float32)


def norm(x: Any, scale: Any = SCALE, bias: Any = BIAS) -> jax.Array:
    return fusednorm.group_norm(x, scale, bias, num_groups=3, dtype=x.dtype)


def activations(fn: Callable[..., Any], *args: Any) -> list[str]:
    """That of each forward in the traced call, as `explain` reads it; "" for none."""
    choices = fusednorm.explain(fn, *args).choices
    return [choice.activation for choice in choices if choice.op == "forward"]


def found(fn: Callable[..., Any], *args: Any) -> list[str]:
    return activations(fusednorm.fuse_neighbours(fn), *args)


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
    # One call is all that is left of it.
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
    pytest.importorskip("sklearn", reason="bench/models.py needs it")
    from bench.models import MODELS

    fused = MODELS[model](nnx.Rngs(0))
    fusednorm.fuse(fused)
    images = data((4, 8, 8, 1))

    def forward(model: Any, x: Any) -> jax.Array:
        return model(x)

    joined = fusednorm.fuse_neighbours(forward)
    if model == "resnet":  # the other activations come behind a sum
        expected = ["silu" if i in (0, 1, 3, 5, 7) else "" for i in range(9)]
    else:
        expected = [""] * len(activations(forward, fused, images))
    assert activations(joined, fused, images) == expected

    if model == "transformer":  # the stream, two norms a block

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
    if where == "vmap":  # y[0] lies between the two
        assert activations(joined, x) == [""]
    else:
        assert activations(joined, x) == ["silu"]
    assert_agrees(jax.jit(joined)(x), jax.jit(INSIDE[where])(x))


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
    assert_agrees(jax.jit(joined)(x), jax.jit(apart)(x)) if what == "a sum" else None
    for derivative in (
        lambda f: jax.grad(_loss(f))(x),
        lambda f: jax.jvp(jax.grad(_loss(f)), (x,), (v,))[1],
    ):
        assert_agrees(
            jax.jit(lambda: derivative(joined))(),  # noqa: B023
            jax.jit(lambda: derivative(apart))(),  # noqa: B023
            roundings=2048,
        )


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
    """The gradient of x where y and x itself have cotangents."""
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

    @jax.jit  # a layer of outside cannot be changed in here
    def call(x: Any) -> jax.Array:
        return fusednorm.fuse_neighbours(layer)(x)

    assert_agrees(call(data()), layer(data()))


def test_keeps_the_name() -> None:
    assert fusednorm.fuse_neighbours(_used_within).__name__ == "_used_within"
