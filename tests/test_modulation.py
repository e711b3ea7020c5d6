"""Scale and bias per sample or row (adaLN), and shortcuts added after a norm.

The tests cover the reference, the kernels of both chips and the layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm import reference
from fusednorm.kernels import dispatch
from fusednorm.reference import Norm
from tests import interpreters, test_channelwise, test_tpu_channelwise
from tests.helpers import Case, assert_close, slow_but
from tests.layer_helpers import assert_agrees, build, data

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MIXES = [  # dtypes of x, scale and bias, shortcut, y
    ("float32", "float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float16", "bfloat16"),
    ("float32", "bfloat16", "bfloat16", "float32"),
]


kernels = interpreters.kernels_of_each_chip


def check(
    case: Case,
    mix: tuple[str, str, str, str],
    *,
    scale: tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
    behind: bool = False,
    seed: int = 0,
) -> None:
    """Checks y and all gradients against float64.

    Args:
      scale, bias: shapes of scale and bias, or None for one value per feature.
      behind: whether a shortcut is added after the norm.
    """
    x_dtype, param_dtype, shortcut_dtype, dtype = map(jnp.dtype, mix)
    x, *shared, dy = case.data(seed, x_dtype, param_dtype)
    rng = np.random.default_rng(seed + 1)
    given: dict[str, Any] = {"x": x}
    for name, shape, value in zip(
        ("scale", "bias"), (scale, bias), shared, strict=True
    ):
        if shape is not None:
            value = rng.normal(0.7, 0.6, shape).astype(param_dtype)
        if value is not None:
            given[name] = value
    if behind:
        given["residual"] = rng.normal(0, 1, case.shape).astype(shortcut_dtype)
    params = (given.get("scale"), given.get("bias"))
    shortcut = given.get("residual")
    dy = np.asarray(rng.normal(0, 1, case.shape).astype(dtype))
    truth = case.truth(x, *params, dy, shortcut=shortcut)
    if case.activation == "relu":  # rounding decides if the slope is 0 for z near 0
        z = (
            Case(
                case.kind,
                case.shape,
                tuple(o for o in case.options if o[0] != "activation"),
            )
            .truth(x, *params, dy, shortcut=shortcut)
            .y
        )
        dy = np.where(np.abs(z) > 1e-4, dy, 0).astype(dtype)
        truth = case.truth(x, *params, dy, shortcut=shortcut)

    def function(given: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"dtype": dtype}
        if "residual" in given:
            options["residual"] = given["residual"]
        return case.run(given["x"], given.get("scale"), given.get("bias"), **options)

    y, vjp = jax.vjp(function, jax.tree.map(jnp.asarray, given))
    assert y.dtype == dtype
    assert_close(y, truth.y, truth.bounds["y"])
    (found,) = vjp(jnp.asarray(dy))
    names = {"x": "dx", "scale": "dscale", "bias": "dbias", "residual": "dshortcut"}
    for name, gradient in found.items():
        assert gradient.dtype == given[name].dtype
        what = names[name]
        if gradient.shape == case.shape and name == "bias":
            what = "dshortcut"
        assert_close(gradient, getattr(truth, what), truth.bounds[what])


SAMPLES = [  # shapes of scale and bias for x of (3, 5, 40)
    ((3, 1, 40), (3, 1, 40)),
    ((3, 5, 40), (3, 5, 40)),
    ((3, 1, 40), (40,)),
    ((40,), (3, 1, 40)),
    ((3, 5, 40), (40,)),
    ((3, 1, 40), (3, 5, 40)),
]
OF_PLACES = ((1, 5, 40), (1, 5, 40))  # no kernel takes these
ids = "{}".format


def modulated(kind: str, shape: tuple[int, ...], **options: Any) -> Case:
    return Case(kind, shape, tuple(options.items()))


MODULATED = [
    modulated("layer_norm", (3, 5, 40)),
    modulated("rms_norm", (3, 5, 40), activation="silu"),
]


# --- the reference --------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(("scale", "bias"), [*SAMPLES, OF_PLACES], ids=ids)
@pytest.mark.parametrize("case", MODULATED, ids=str)
def test_each_sample(case: Case, scale: Any, bias: Any, mix: Any) -> None:
    check(case, mix, scale=scale, bias=bias)


# --- the kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("number", slow_but([0, 3, 5, 8, 10], range(12)))
def test_kernels_of_each_sample(kernels: str, number: int) -> None:
    scale, bias = SAMPLES[number // 2]
    check(MODULATED[number % 2], MIXES[number // 2 % 3], scale=scale, bias=bias)


@pytest.mark.parametrize(
    ("per_row", "shape"),
    [
        (False, (2, 9, 64)),
        (True, (2, 3, 760)),
        (False, (3, 37, 128)),
        (True, (2, 2, 5000)),
        pytest.param(True, (2, 9, 64), marks=pytest.mark.slow),
        pytest.param(False, (2, 3, 760), marks=pytest.mark.slow),
        pytest.param(True, (3, 37, 128), marks=pytest.mark.slow),
        pytest.param(False, (2, 2, 5000), marks=pytest.mark.slow),
    ],
)
def test_kernels_of_sizes(kernels: str, shape: tuple[int, ...], per_row: bool) -> None:
    own = shape if per_row else (shape[0], 1, shape[-1])
    check(modulated("layer_norm", shape), MIXES[1], scale=own, bias=own)


def test_kernels_of_samples_that_share_a_scale(kernels: str) -> None:
    """Three samples with a bias each share a scale."""
    case = modulated("layer_norm", (2, 3, 5, 40))
    check(case, MIXES[0], scale=(2, 1, 1, 40), bias=(2, 3, 1, 40))


def test_kernels_of_examples_whose_samples_have_a_bias(kernels: str) -> None:
    """An example's dscale is summed over all of its samples, and over no others."""
    x, dy = data((2, 3, 5, 40)), data((2, 3, 5, 40), seed=3)
    scale, bias = jnp.linspace(0.5, 1.5, 40), data((3, 1, 40), seed=4)

    def loss(scale: Any, x: Any, dy: Any) -> jax.Array:
        return jnp.vdot(dy, fusednorm.layer_norm(x, scale, bias, activation="silu"))

    dscale = jax.vmap(jax.grad(loss), (None, 0, 0))
    found = jax.block_until_ready(jax.jit(dscale)(scale, x, dy))
    with fusednorm.use_backend("reference"):
        assert_agrees(found, jax.jit(dscale)(scale, x, dy), roundings=64)


# --- y = act(norm(x) + residual) ------------------------------------------------------

BEHIND = [
    modulated("batch_norm", (2, 6, 5, 24), activation="relu"),
    modulated("batch_norm", (3, 7, 33), activation="silu"),
    modulated("group_norm", (2, 6, 7, 24), num_groups=4, activation="relu"),
    modulated("group_norm", (2, 6, 7, 24), num_groups=4, activation="gelu"),
    modulated("group_norm", (3, 5, 7, 16), num_groups=2),
    modulated("instance_norm", (2, 9, 5, 8), activation="silu"),
]


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("case", BEHIND, ids=str)
def test_residual_behind(case: Case, mix: Any) -> None:
    check(case, mix, behind=True)


def test_a_bias_and_a_residual_are_not_rounded_when_they_are_added() -> None:
    """Both have half precision, but the output does not."""
    mix = "bfloat16", "bfloat16", "bfloat16", "float32"
    check(BEHIND[4], mix, bias=BEHIND[4].shape, behind=True)


@pytest.mark.parametrize("norm", ["group_norm", "instance_norm", "batch_norm"])
def test_numbers_promote_as_they_are_added_behind(norm: str) -> None:
    options = {"num_groups": 3} if norm == "group_norm" else {}

    def behind(x: Any, r: Any) -> Any:
        y = getattr(fusednorm, norm)(x, residual=r, activation="silu", **options)
        return y[0] if norm == "batch_norm" else y

    assert behind(X.astype("bfloat16"), V).dtype == "float32"
    whole = jnp.round(V).astype("int32")
    np.testing.assert_array_equal(behind(X, whole), behind(X, whole.astype("float32")))
    explained = fusednorm.explain(behind, X, whole)
    for platform in ("cuda", "tpu"):  # their kernels take no integers
        (choice,) = explained.on(platform).choices
        assert isinstance(choice.plan, dispatch.Kernel)


VARIANTS = [
    *("gpu resident", "gpu cluster", "gpu two reads"),
    *("tpu one block", "tpu kept", "tpu two reads"),
]


@pytest.fixture(params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Selects a channelwise kernel, and makes it take inputs too small for it."""
    platform, reads = request.param.split(" ", 1)
    of_platform = {"gpu": test_channelwise, "tpu": test_tpu_channelwise}[platform]
    of_platform.take_small(reads, monkeypatch)
    backend = f"mosaic_{platform}"
    with interpreters.interpreted(backend), fusednorm.use_backend(backend):
        yield request.param
        assert {"two reads" in name for name in interpreters.runs} == {
            reads == "two reads"
        }


@pytest.mark.parametrize(
    ("case", "mix"),
    [
        pytest.param(case, mix, marks=[] if number == 3 else pytest.mark.slow)
        for number, (case, mix) in enumerate(zip(BEHIND, 2 * MIXES[:3], strict=True))
    ],
    ids=str,
)
def test_kernels_with_a_residual_behind(variant: str, case: Case, mix: Any) -> None:
    check(case, mix, behind=True)


@pytest.mark.parametrize("variant", ["gpu two reads", "tpu two reads"], indirect=True)
def test_kernels_round_no_dz_to_the_dtype_of_dy(variant: str) -> None:
    """dx and the residual's gradient are float32 here, and dy is bfloat16."""
    case = modulated("group_norm", (2, 9, 7, 16), num_groups=2, activation="silu")
    check(case, ("float32", "float32", "float32", "bfloat16"), behind=True)


# --- a GroupNorm's scale and bias of each sample --------------------------------------

OWN = [
    ((3, 1, 1, 16), (3, 1, 1, 16)),
    ((3, 1, 1, 16), (16,)),
    ((3, 5, 7, 16), (3, 5, 7, 16)),
    ((1, 5, 7, 16), (3, 1, 1, 16)),
]
FILM = modulated("group_norm", (3, 5, 7, 16), num_groups=2, activation="silu")


@pytest.mark.parametrize(("scale", "bias"), OWN, ids=ids)
def test_each_sample_of_groups(scale: Any, bias: Any) -> None:
    check(FILM, MIXES[0], scale=scale, bias=bias)


@pytest.mark.parametrize("mix", slow_but(MIXES[:1], MIXES[:3]), ids="-".join)
@pytest.mark.parametrize(("scale", "bias"), OWN[:2], ids=ids)
@pytest.mark.parametrize("variant", VARIANTS[:3], indirect=True)
def test_gpu_kernels_of_each_sample_of_groups(
    variant: str, scale: Any, bias: Any, mix: Any
) -> None:
    check(FILM, mix, scale=scale, bias=bias)


@pytest.mark.parametrize("variant", VARIANTS[:1], indirect=True)
def test_gpu_kernels_of_samples_that_share_a_scale(variant: str) -> None:
    """Two samples, which have groups of channels, share each scale."""
    x, dy = data((3, 2, 5, 16)), data((3, 2, 5, 16), seed=3)
    scale = data((3, 16), seed=4)

    def all_of(x: Any, scale: Any) -> Any:
        norm = jax.vmap(functools.partial(fusednorm.group_norm, num_groups=2))
        y, vjp = jax.vjp(norm, x, scale)
        return y, *vjp(dy)

    found = jax.block_until_ready(jax.jit(all_of)(x, scale))
    with fusednorm.use_backend("reference"):
        expected = jax.jit(all_of)(x, scale)
    for a, b in zip(found, expected, strict=True):
        assert_agrees(a, b, roundings=64)


# --- the transformations --------------------------------------------------------------

X, V, W = (data((3, 4, 24), seed=seed) for seed in (2, 4, 5))
Given = tuple[jax.Array, ...]
Block = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A norm with other operations, in one call and apart.

    Attributes:
      joined: function of (x, *others) that does everything in the norm's call.
      apart: function of (x, *others) that does the other operations outside of it.
      others: the operands besides x.
    """

    joined: Block
    apart: Block
    others: Given


def _behind(joined: bool, x: Any, r: Any, scale: Any) -> jax.Array:
    kind = {"num_groups": 3}
    if joined:
        return fusednorm.group_norm(x, scale, residual=r, activation="silu", **kind)
    return jax.nn.silu(fusednorm.group_norm(x, scale, **kind) + r)


def _modulated(joined: bool, x: Any, scale: Any, bias: Any) -> jax.Array:
    if joined:
        return fusednorm.layer_norm(x, scale, bias, scale_offset=1.0)
    return fusednorm.layer_norm(x) * (1 + scale) + bias


def _kind(function: Callable[..., jax.Array], *others: jax.Array) -> Kind:
    joined, apart = (
        functools.partial(function, is_joined) for is_joined in (True, False)
    )
    return Kind(joined, apart, others)


ALIKE = {
    "each sample": _kind(_modulated, V[:, :1], W[:, :1]),
    "each row": _kind(_modulated, V, W),
    "scale alone of each row": _kind(_modulated, V, W[:, :1]),
    "behind": _kind(_behind, W, jnp.linspace(0.5, 1.5, 24)),
}


def _loss(f: Block, *given: Any) -> jax.Array:
    y = f(*given)
    return jnp.sum(jnp.sin(y) * jnp.linspace(0.2, 1, 24)) + jnp.sum(y**3)


def _of_all(f: Block, given: Given) -> Any:
    return jax.grad(functools.partial(_loss, f), tuple(range(len(given))))(*given)


def _first(given: Given) -> Given:
    """Returns the first example of each array that has examples."""
    return tuple(a[0] if a.ndim == 3 else a for a in given)


TRANSFORMED: dict[str, Callable[[Block, Given], Any]] = {
    "jvp": lambda f, a: jax.jvp(f, a, tuple(jnp.cos(b) for b in a)),
    "jvp of x": lambda f, a: jax.jvp(lambda x: f(x, *a[1:]), a[:1], (jnp.cos(a[0]),)),
    "jvp of one": lambda f, a: jax.jvp(
        lambda b: f(a[0], b, a[2]), (a[1],), (jnp.cos(a[1]),)
    ),
    "grad": _of_all,
    "grad of one": lambda f, a: jax.grad(lambda b: _loss(f, a[0], b, a[2]))(a[1]),
    "vmap": lambda f, a: jax.vmap(f, [0 if b.ndim == 3 else None for b in a])(*a),
    "vmap of x": lambda f, a: jax.vmap(lambda x: f(x, *_first(a)[1:]), 1)(
        a[0].transpose(1, 0, 2)
    ),
    "vmap of one": lambda f, a: jax.vmap(lambda b: f(a[0], b, a[2]))(
        jnp.stack([a[1], 2 * a[1]])
    ),
    "vmap of grad": lambda f, a: jax.vmap(
        lambda x, b: jax.grad(lambda *c: _loss(f, *c, a[2]), (0, 1))(x, b), (0, None)
    )(jnp.stack([a[0], a[0] ** 2]), a[1]),
    "grad of vmap": lambda f, a: jax.grad(
        lambda b: _loss(jax.vmap(lambda x: f(x, b, a[2])), jnp.stack([a[0]] * 2))
    )(a[1]),
    "linearize": lambda f, a: jax.linearize(f, *a)[1](*(jnp.cos(b) for b in a)),
    "hvp": lambda f, a: jax.jvp(
        lambda *b: _of_all(f, b), a, tuple(jnp.cos(b) for b in a)
    ),
    "grad of grad": lambda f, a: jax.grad(
        lambda x: sum(jnp.sum(g**2) for g in _of_all(f, (x, *a[1:])))
    )(a[0]),
    "scan and checkpoint": lambda f, a: jax.grad(
        lambda *a: jnp.sum(
            jax.lax.scan(
                jax.checkpoint(lambda h, _: (jnp.tanh(f(h, *a[1:])), h)),
                a[0],
                length=2,
            )[0]
            ** 2
        ),
        (0, 1, 2),
    )(*a),
    "export": lambda f, a: jax.export.deserialize(
        jax.export.export(jax.jit(f))(*a).serialize(vjp_order=1)
    ).call(*a),
}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_under(name: str, kind: str) -> None:
    alike = ALIKE[kind]
    given = (X, *alike.others)
    results = [TRANSFORMED[name](f, given) for f in (alike.joined, alike.apart)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_agrees(a, b, roundings=1024)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALIKE)
def test_second_order_through_kernels(kernels: str, kind: str) -> None:
    alike = ALIKE[kind]
    given = (X, *alike.others)
    for name in ("hvp", "scan and checkpoint"):
        ours = jax.jit(lambda *a: TRANSFORMED[name](alike.joined, a))(*given)  # noqa: B023
        with fusednorm.use_backend("reference"):
            expected = TRANSFORMED[name](alike.apart, given)
        for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            assert_agrees(a, b, roundings=2048)
    assert sum(interpreters.runs.values()) >= 4


@pytest.mark.parametrize("kind", ALIKE)
def test_inside_shard_map(kind: str) -> None:
    """Each device has some samples; gradients of shared operands are summed."""
    alike = ALIKE[kind]
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    given = (X, *alike.others)
    specs = tuple(P("data") if a.ndim == 3 else P() for a in given)
    spread = jax.shard_map(alike.joined, mesh=mesh, in_specs=specs, out_specs=P("data"))
    assert_agrees(spread(*given), alike.apart(*given), roundings=64)
    for a, b in zip(_of_all(spread, given), _of_all(alike.apart, given), strict=True):
        assert_agrees(a, b, roundings=512)


def _before(x: Any, r: Any, scale: Any) -> jax.Array:
    y, h = fusednorm.layer_norm(x, scale, residual=r)
    return y * h


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("kind", [*ALIKE, "before"])
def test_sharded_by_jit(kind: str, mode: str) -> None:
    """Samples are on three devices: nothing is gathered, and results stay sharded."""
    types = (getattr(jax.sharding.AxisType, mode),)
    mesh = jax.make_mesh((3,), ("data",), axis_types=types)
    joined, given = _before, (X, V, jnp.linspace(0.5, 1.5, 24))
    if kind != "before":
        joined, given = ALIKE[kind].joined, (X, *ALIKE[kind].others)
    both = jax.jit(lambda *a: (joined(*a), _of_all(joined, a)))
    expected = both(*given)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, P("data") if a.ndim == 3 else P()))
            for a in given
        ]
        compiled = both.lower(*placed).compile()
        found = compiled(*placed)
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_agrees(a, b, roundings=256)
        if a.ndim == 3:
            assert a.sharding.is_equivalent_to(placed[0].sharding, a.ndim)


# --- rows and samples keep to themselves ----------------------------------------------


def test_bitwise_the_same_in_any_batch(kernels: str) -> None:
    x, scale = data((7, 9, 96)), data((7, 1, 96), seed=3)
    each = data((7, 9, 96), seed=4)

    def results(some: slice) -> Any:
        of_sample = fusednorm.layer_norm(x[some], scale[some], scale[some])
        of_row, vjp = jax.vjp(fusednorm.layer_norm, x[some], each[some], each[some])
        return of_sample, of_row, *vjp(each[some])

    for whole, part in zip(results(slice(7)), results(slice(2, 5)), strict=True):
        np.testing.assert_array_equal(whole[2:5], part)


def test_nan_stays_in_its_row(kernels: str) -> None:
    x, scale = data((3, 5, 96)), data((3, 5, 96), seed=3)

    def results(x: Any) -> list[np.ndarray]:
        y, vjp = jax.vjp(lambda *a: fusednorm.layer_norm(*a), x, scale, scale)
        return [np.asarray(a) for a in (y, *vjp(scale))]

    for clean, poisoned in zip(
        results(x)[:3], results(x.at[1, 2, 7].set(np.nan))[:3], strict=True
    ):
        bad = np.isnan(poisoned).any(-1)
        assert bad[1, 2]
        assert bad.sum() == 1
        np.testing.assert_array_equal(clean[~bad], poisoned[~bad])


# --- layers, and what is refused ------------------------------------------------------


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_layers_take_them(name: str) -> None:
    bare = {"use_scale": False} | ({"use_bias": False} if name == "LayerNorm" else {})
    layer = build(fusednorm, name, 24, **bare)
    y = layer(X, scale=V[:, :1], bias=W[:, :1], scale_offset=1.0)
    assert_agrees(y, layer(X) * (1 + V[:, :1]) + W[:, :1])
    (choice,) = fusednorm.explain(
        lambda x: layer(x, scale=V[:, :1], bias=W, scale_offset=1.0), X
    ).choices
    assert "1 + scale  scale or bias (3, 24)  shortcut" in str(choice)
    with pytest.raises(ValueError, match="use_scale=False"):
        build(fusednorm, name, 24)(X, scale=V)


@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm", "BatchNorm"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=str)
def test_layers_add_a_residual_behind(name: str, options: dict) -> None:
    for training in (True, False)[: 1 + (name == "BatchNorm")]:
        layer = build(fusednorm, name, 24, **options)
        plain = build(fusednorm, name, 24)
        for one in (layer, plain):
            one.train() if training else one.eval()
        y = layer(X, residual=V, activation="relu")
        assert y.dtype == layer(X).dtype
        # The residual is added before the output is rounded.
        assert_agrees(y, jax.nn.relu(plain(X) + V).astype(y.dtype))


def test_one_number_for_all_features() -> None:
    scale = V[:, :1, :1]
    repeated = jnp.tile(scale, (1, 4, 24))
    y = fusednorm.layer_norm(X, scale, scale)
    assert_agrees(y, fusednorm.layer_norm(X) * repeated + repeated)


def test_features_that_are_not_last_may_have_a_scale_of_xs_rank() -> None:
    scale = jnp.linspace(0.5, 1.5, 4)
    y, _, _ = fusednorm.batch_norm(X, scale.reshape(1, 4, 1), axis=1)
    np.testing.assert_array_equal(y, fusednorm.batch_norm(X, scale, axis=1)[0])


def test_a_single_row_s_scale_is_that_of_the_features() -> None:
    (choice,) = fusednorm.explain(fusednorm.layer_norm, X[:1, :1], V[:1, :1]).choices
    assert choice.own == ""


def test_dscale_of_each_element_has_the_dtype_of_scale() -> None:
    norm, scale = Norm((2,), (2,)), V.astype("bfloat16")
    _, mean, var = reference.forward(norm, X, scale, None)
    _, dscale, *_ = reference.backward(norm, W, X, scale, None, mean, var)
    assert (dscale.shape, dscale.dtype) == (scale.shape, scale.dtype)


def test_shapes_that_are_refused() -> None:
    with pytest.raises(TypeError, match="must have x's rank"):
        fusednorm.layer_norm(X, V[:, :3])
    with pytest.raises(TypeError, match="must have x's rank"):
        fusednorm.layer_norm(X, V[0])
    with pytest.raises(ValueError, match=r"\(24,\), expected that of x, \(3, 4, 24\)"):
        fusednorm.batch_norm(X, residual=V[0, 0])


# --- the plan -------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("lead", "forward", "backward"), [(1, 2, 3), (256, 4, 5)])
def test_counts_the_bytes(
    platform: str, lead: int, forward: int, backward: int
) -> None:
    x = jax.ShapeDtypeStruct((64, 256, 1152), "bfloat16")
    own = jax.ShapeDtypeStruct((64, lead, 1152), "bfloat16")

    def step(x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(fusednorm.layer_norm, x, scale, bias)
        return y, vjp(dy)

    choices = fusednorm.explain(step, x, own, own, x).on(platform).choices
    for choice, units in zip(choices, (forward, backward), strict=True):
        assert isinstance(choice.plan, dispatch.Kernel)
        assert units <= choice.plan.bytes_moved / (x.size * 2) < units + 0.25


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_residuals_gradient_alone_needs_no_kernel(platform: str) -> None:
    """It is elementwise, and XLA would drop a kernel whose sums nobody reads."""
    x = jax.ShapeDtypeStruct((4, 16, 16, 64), "bfloat16")
    scale = jax.ShapeDtypeStruct((64,), "float32")

    def gradient(x: Any, scale: Any, residual: Any, dy: Any) -> Any:
        norm = functools.partial(
            fusednorm.group_norm, num_groups=2, activation="silu", dtype="bfloat16"
        )
        _, vjp = jax.vjp(lambda r: norm(x, scale, scale, residual=r), residual)
        return vjp(dy)

    _, choice = fusednorm.explain(gradient, x, scale, x, x).on(platform).choices
    assert isinstance(choice.plan, dispatch.Fallback)
    assert choice.plan.reason.startswith("the shortcut's gradient alone")


@pytest.mark.parametrize("samples", [1, 2, 64])
@pytest.mark.parametrize(
    ("rows", "runs"), [(16, dispatch.Fallback), (512, dispatch.Kernel)]
)
def test_number_of_samples_chooses_nothing(samples: int, rows: int, runs: Any) -> None:
    x = jax.ShapeDtypeStruct((samples, rows, 512), "float32")
    scale = jax.ShapeDtypeStruct((samples, 512), "float32")
    norm = jax.vmap(fusednorm.layer_norm)
    (choice,) = fusednorm.explain(norm, x, scale).on("tpu").choices
    assert isinstance(choice.plan, runs)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES[:3], ids="-".join)
@pytest.mark.parametrize("own", ["sample", "row"])
@pytest.mark.parametrize("features", [64, 128, 760, 1152, 2048, 7168, 12288])
def test_gpu_values_and_gradients(features: int, own: str, mix: Any) -> None:
    shape = (5, 37, features)
    lead = (5, 37) if own == "row" else (5, 1)
    case = modulated("layer_norm", shape, activation="silu")
    with fusednorm.use_backend("mosaic_gpu"):
        check(case, mix, scale=(*lead, features), bias=(*lead, features))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES[:3], ids="-".join)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("batch_norm", (8, 14, 14, 64), {}),
        ("batch_norm", (64, 56, 56, 32), {}),  # two reads
        ("group_norm", (3, 16, 16, 320), {"num_groups": 32}),
        ("group_norm", (2, 64, 64, 320), {"num_groups": 32}),
        ("instance_norm", (2, 33, 31, 48), {}),
    ],
)
def test_gpu_residual_behind(
    kind: str, shape: Any, options: dict, activation: Any, mix: Any
) -> None:
    case = modulated(kind, shape, activation=activation, **options)
    with fusednorm.use_backend("mosaic_gpu"):
        check(case, mix, behind=True)
