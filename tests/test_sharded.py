"""Norms over several devices: kernels run on the parts, and no activation is gathered.

Kernels are interpreted in explicit mode and in `jax.shard_map`. Interpreters do not run
inside `custom_partitioning`, so in auto mode a stand-in for the kernels shows what each
device is asked to do. tests/test_aot_sharded.py shows that kernels do it.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import custom_partitioning
from jax._src.sharding_impls import GSPMDSharding  # it has no public name
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from bench.aot import hlo
from fusednorm import reference
from fusednorm.kernels import dispatch, lowering, parts
from fusednorm.kernels.dispatch import Call, Kernel
from fusednorm.reference import Norm, reduce
from tests import interpreters
from tests.test_op import gathered

pytestmark = pytest.mark.usefixtures("quickly_compiled")

Fn = Callable[..., jax.Array]

KINDS: dict[str, Fn] = {
    "layer_norm": fusednorm.layer_norm,
    "rms_norm": lambda x, s, b: fusednorm.rms_norm(x, s, bias=b),
    "group_norm": lambda x, s, b: fusednorm.group_norm(x, s, b, num_groups=4),
    "instance_norm": fusednorm.instance_norm,
    "batch_norm": lambda x, s, b: fusednorm.batch_norm(x, s, b)[0],
    "layer_norm gelu": lambda x, s, b: fusednorm.layer_norm(x, s, b, activation="gelu"),
    "group_norm silu": lambda x, s, b: fusednorm.group_norm(
        x, s, b, num_groups=4, activation="silu"
    ),
}

QUICK = ("layer_norm", "batch_norm")  # the interpreted kinds that are not slow

# Shardings of x. Parameters are sharded as its features are.
SHARDINGS = {
    "data": P("d"),
    "sequence": P(None, "d"),
    "features": P(None, None, "d"),
    "data and features": P("d", None, "e"),
}
MESHES = {"data and features": {"d": 2, "e": 2}, "one device": {"d": 1, "e": 1}}


def mesh_of(sharding: str, mode: str) -> jax.sharding.Mesh:
    axes = MESHES.get(sharding, {"d": 2})
    types = (getattr(AxisType, mode),) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def data(seed: int = 0) -> list[jax.Array]:
    """Returns x, scale, bias and dy."""
    rng = np.random.default_rng(seed)
    shape = (4, 8, 32)
    return [
        jnp.asarray(rng.normal(mean, 1.3, size), "float32")
        for mean, size in ((0.4, shape), (1, 32), (0, 32), (0, shape))
    ]


def both(f: Fn) -> Fn:
    """Returns a function that computes y and all gradients."""

    def whole(*args: Any) -> Any:
        *operands, dy = args
        y, vjp = jax.vjp(f, *operands)
        return y, *vjp(dy)

    return whole


def expected_of(f: Fn) -> Any:
    with fusednorm.use_backend("reference"):
        return jax.jit(both(f))(*data())


def placed(mesh: jax.sharding.Mesh, spec: P, args: Any) -> list[jax.Array]:
    of_param = P(*spec[2:])
    specs = (spec, of_param, of_param, spec)
    return [
        jax.device_put(a, NamedSharding(mesh, to))
        for a, to in zip(args, specs, strict=True)
    ]


def agree(found: Any, expected: Any, within: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=within * np.abs(b).max())


kernels = interpreters.kernels_of_each_chip


def halves(kind: str, sharding: str) -> bool:
    """Returns whether statistics cross devices."""
    crossing = {
        "layer_norm": ("features", "data and features"),
        "rms_norm": ("features", "data and features"),
        "group_norm": ("sequence",),
        "instance_norm": ("sequence",),
        "batch_norm": ("data", "sequence", "data and features"),
    }
    return sharding in crossing[kind.split()[0]]


# --- explicit mode --------------------------------------------------------------------


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_explicit(kernels: str, kind: str, sharding: str) -> None:
    """Kernels run on each device's part, whatever is sharded.

    y and the gradients are sharded like x and the parameters.
    """
    f = KINDS[kind]
    expected = expected_of(f)
    mesh = mesh_of(sharding, "Explicit")
    args = placed(mesh, SHARDINGS[sharding], data())
    with jax.set_mesh(mesh):
        compiled = jax.jit(both(f)).lower(*args).compile()
        found = jax.block_until_ready(compiled(*args))
    agree(found, expected)
    for a, like in zip(found, (args[0], *args[:3]), strict=True):
        assert a.sharding.is_equivalent_to(like.sharding, a.ndim)
    assert gathered(compiled.as_text()) == []
    suffixes = (", moments", ", sums") if halves(kind, sharding) else ("", "")
    assert set(interpreters.runs) == {
        f"{family(kind)} {op}{suffix}"
        for op, suffix in zip(("forward", "backward"), suffixes, strict=True)
    }
    assert set(interpreters.runs.values()) == {mesh.size}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_explicit_axes_of_size_1_split_nothing(
    kernels: str, kind: str, devices: int
) -> None:
    """Whole kernels run, on a mesh of one device too: no statistics cross anything."""
    mesh = jax.make_mesh((devices, 1), ("d", "e"), axis_types=(AxisType.Explicit,) * 2)
    args = placed(mesh, P("d", None, "e"), data())
    with jax.set_mesh(mesh):
        found = jax.block_until_ready(jax.jit(both(KINDS[kind]))(*args))
    agree(found, expected_of(KINDS[kind]))
    for a, like in zip(found, (args[0], *args[:3]), strict=True):
        assert jax.typeof(a) == jax.typeof(like)
    assert interpreters.runs == dict.fromkeys(
        (f"{family(kind)} forward", f"{family(kind)} backward"), devices
    )


@pytest.mark.parametrize("spec", [P("d"), P(None, "d", "e"), P(("d", "e"))])
@pytest.mark.parametrize("shape", [(1, 2, 32), (16, 64, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_on_one_device(kind: str, shape: Any, spec: P) -> None:
    """The reference's forms for a CPU split axes that types say are sharded."""
    mesh = mesh_of("one device", "Explicit")
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (shape, shape[-1:], shape[-1:], shape)
    args = [*map(jax.random.normal, keys, shapes)]
    expected = jax.jit(both(KINDS[kind]))(*args)
    with jax.set_mesh(mesh):
        args = placed(mesh, spec, args)
        found = jax.jit(both(KINDS[kind]))(*args)
    agree(found, expected)
    for a, like in zip(found, (args[0], *args[:3]), strict=True):
        assert jax.typeof(a) == jax.typeof(like)


def family(kind: str) -> str:
    return "rowwise" if kind.split()[0] in ("layer_norm", "rms_norm") else "channelwise"


# --- auto mode ------------------------------------------------------------------------

asked: list[Call] = []  # every call that was planned


def plan(call: Call, device: Any) -> Kernel:
    """Takes every call, with the reference's formulas in place of a kernel."""
    asked.append(call)

    here = dataclasses.replace(call.norm, axis_names=())

    def forward(x: Any, *operands: Any, residual: Any = None) -> list[jax.Array]:
        h = x if residual is None else reference.add(x, residual)
        y, mean, var = reference.forward(here, h, *operands)
        found = [] if call.half else [y]
        found += [] if residual is None else [h]
        return found + [a for a in (mean, var) if call.statistics and a is not None]

    def backward(*operands: Any, dh: Any = None) -> list[jax.Array]:
        own = call.own_params
        dx, *others = reference.backward(here, *operands, dh=dh, own_params=own)
        inner = inner_products(here, *operands) if call.half else [dx]
        wants_dx, *wanted = call.wanted
        outer = [a for a, want in zip(others, wanted, strict=True) if want]
        return [*inner, *outer] if wants_dx else outer

    launch = forward if call.op == "forward" else backward
    return Kernel("mosaic_gpu", "stand-in", launch)


def inner_products(norm: reference.Norm, *operands: Any) -> list[jax.Array]:
    """Returns the local c1 = mean(w * x_hat) and, if centred, c2 = mean(w)."""
    dy, x, scale, bias, mean, var = operands
    dz = reference.before_activation(norm, dy, x, scale, bias, mean, var)
    weight = 1 if scale is None else norm.weight(reduce.spread(norm, scale, x))
    rstd = jax.lax.rsqrt(var + norm.epsilon)
    w = weight * dz
    x_hat = reduce.centred(norm, x, mean) * reduce.channels(norm, rstd, x)
    found = [w * x_hat, w] if norm.center else [w * x_hat]
    return [reduce.total(norm, a) / reduce.count(norm, x, None) for a in found]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    jax.clear_caches()
    asked.clear()
    monkeypatch.setitem(dispatch.KERNELS, "cpu", ("mosaic_gpu", __name__))
    yield asked
    jax.clear_caches()


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("kind", "has_mesh"), [*((k, False) for k in KINDS), *((k, True) for k in QUICK)]
)
def test_auto(stand_in: list[Call], kind: str, has_mesh: bool, sharding: str) -> None:
    """XLA asks for each device's part, y is sharded like x, and nothing is gathered.

    A mesh in context, which `jax.set_mesh` puts there, changes nothing.
    """
    f = KINDS[kind]
    expected = expected_of(f)
    mesh = mesh_of(sharding, "Auto")
    args = placed(mesh, SHARDINGS[sharding], data())
    stand_in.clear()
    with jax.set_mesh(mesh) if has_mesh else contextlib.nullcontext():
        compiled = jax.jit(both(f)).lower(*args).compile()
        found = compiled(*args)
    agree(found, expected)
    assert found[0].sharding.is_equivalent_to(args[0].sharding, 3)
    assert gathered(compiled.as_text()) == []
    # A call is planned twice: to see if a kernel takes the whole, and for the part.
    forward, backward = ([c for c in stand_in if c.op == op] for op in
                         ("forward", "backward"))  # fmt: skip
    part = args[0].sharding.shard_shape((4, 8, 32))
    for calls in (forward, backward):
        assert [c.x.shape for c in calls] == [(4, 8, 32), part]
        assert calls[-1].half == halves(kind, sharding)


@pytest.mark.parametrize(
    ("num_groups", "axes", "spec", "groups_here", "channels_here"),
    [
        (2, {"d": 8}, P(None, None, "d"), 1, 4),
        (1, {"d": 4}, P(None, None, "d"), 1, 8),
        (32, {"d": 4}, P(None, None, "d"), 8, 8),
        (4, {"d": 2, "e": 4}, P(None, None, ("d", "e")), 1, 4),
        (2, {"d": 2, "e": 4}, P(None, None, ("d", "e")), 1, 4),
        (2, {"d": 2, "e": 4}, P(None, "d", "e"), 1, 8),
        (6, {"d": 4}, P(None, None, "d"), 6, 48),  # a device would have 1.5 groups
    ],
)
def test_auto_groups_on_several_devices(
    stand_in: list[Call],
    num_groups: int,
    axes: dict[str, int],
    spec: P,
    groups_here: int,
    channels_here: int,
) -> None:
    """If several devices have channels of one group, its statistics cross them."""

    def f(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        y = fusednorm.group_norm(x, scale, bias, num_groups=num_groups)
        return jnp.sin(y)

    channels = 48 if num_groups == 6 else 32
    rng = np.random.default_rng(0)
    x, dy = (
        jnp.asarray(rng.normal(0.4, 1.3, (4, 8, channels)), "float32") for _ in range(2)
    )
    scale, bias = jnp.linspace(0.5, 2, channels), jnp.linspace(-1, 1, channels)

    def all_of(x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        _, y_dot = jax.jvp(f, (x, scale, bias), (dy, bias, scale))
        return *both(f)(x, scale, bias, dy), y_dot

    with fusednorm.use_backend("reference"):
        expected = jax.jit(all_of)(x, scale, bias, dy)
    kinds = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    args = placed(mesh, spec, (x, scale, bias, dy))
    stand_in.clear()
    compiled = jax.jit(all_of).lower(*args).compile()
    found = compiled(*args)
    agree(found, expected)
    last = [call for call in stand_in if call.x.shape != x.shape] or stand_in
    assert {call.x.shape[-1] for call in last} == {channels_here}
    assert {call.norm.num_groups for call in last} == {groups_here}
    assert {call.half for call in last} == {num_groups in (1, 2, 4)}
    if last is not stand_in:
        crossing = [nbytes for _, nbytes in hlo.collectives(compiled.as_text())]
        assert max(crossing, default=0) <= 4 * 4 * channels  # a statistic, or dscale


def test_statistics_of_groups_do_not_split_channels() -> None:
    """How statistics of groups are sharded tells nothing of x's channels.

    4 groups on 2 devices are not 32 channels on 2.
    """
    norm = reference.Norm((1,), (2,), num_groups=4)
    every, statistic = (0, 1, 2), (0, None, parts.GROUPS)
    alignment = parts.Alignment((every, statistic), (every,), (False,))
    specs = [(every, P()), (statistic, P(None, None, "d"))]
    found = parts._split(mesh_of("data", "Auto"), norm, (4, 8, 32), alignment, specs)
    assert found.axes == ((), (), ())
    assert found.norm == norm


def test_another_partitioner_does_not_ask(stand_in: list[Call]) -> None:
    args = placed(mesh_of("data", "Auto"), P("d"), data())[:3]
    expected = fusednorm.layer_norm(*data()[:3])
    stand_in.clear()
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        y = jax.jit(fusednorm.layer_norm)(*args)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert stand_in == []
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norms", [2, 5])
def test_auto_lowers_a_kernel_once_for_all_norms_alike(
    stand_in: list[Call], norms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[Any] = []
    export = jax.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        exports.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(jax.export, "export", counted)
    eps = 1e-3 * norms  # so that no kernel is known from another test

    def f(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        for _ in range(norms):
            x = jnp.sin(fusednorm.layer_norm(x, scale, bias, epsilon=eps))
        return x

    x, scale, bias, dy = data()
    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(f))(x, scale, bias, dy)
    args = placed(mesh_of("data", "Auto"), P("d"), (x, scale, bias, dy))
    agree(jax.jit(both(f))(*args), expected)
    assert len(exports) == 2  # the forward, and the backward


def test_auto_on_another_mesh(stand_in: list[Call]) -> None:
    """What is sharded over a mesh that is not in context is split all the same."""
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x, scale, bias, _ = data()
    expected = jax.jit(fusednorm.layer_norm)(x, scale, bias)
    stand_in.clear()
    x = jax.device_put(x, NamedSharding(other, P("b", "a")))
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))):
        compiled = jax.jit(lambda *a: fusednorm.layer_norm(*a)).lower(x, scale, bias)
        compiled = compiled.compile()
    assert gathered(compiled.as_text()) == []
    assert [call.x.shape for call in stand_in] == [(4, 8, 32), (1, 4, 32)]
    y = compiled(x, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "group_norm", "batch_norm"])
def test_auto_with_parameters_on_the_mesh_axis_of_the_data(
    stand_in: list[Call], kind: str, residual: bool
) -> None:
    """FSDP and tensor parallelism at once: x's own sharding is what counts."""

    def f(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        if not residual:
            return jnp.sin(KINDS[kind](x, scale, bias))
        if kind == "layer_norm":
            y, h = fusednorm.layer_norm(x, scale, bias, residual=jnp.sin(x))
            return jnp.sin(y) * h
        return KINDS[kind](x + jnp.sin(x), scale, bias)

    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(f))(*data())
    mesh = mesh_of("data and features", "Auto")
    specs = P("d", None, "e"), P("d"), P("d"), P("d", None, "e")
    args = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(data(), specs, strict=True)
    ]
    stand_in.clear()
    compiled = jax.jit(both(f)).lower(*args).compile()
    agree(compiled(*args), expected)
    part = 2, 8, 16
    assert {call.x.shape for call in stand_in} == {(4, 8, 32), part}
    # Parameters are gathered, 32 numbers each.
    assert all(re.match(r"f32\[(32|16)\]", a) for a in gathered(compiled.as_text()))


def test_auto_keeps_no_program(stand_in: list[Call]) -> None:
    """What XLA asks through goes with the program."""

    def lower(epsilon: float) -> None:
        norm = functools.partial(fusednorm.layer_norm, epsilon=epsilon)
        x = placed(mesh_of("data", "Auto"), P("d"), data())[0]
        jax.jit(norm).lower(x).compile()(x)

    def left() -> int:
        jax.clear_caches()
        gc.collect()
        return len(custom_partitioning._sharding_callbacks)

    before = left()
    for epsilon in (1e-3, 1e-4, 1e-5):
        lower(epsilon)
    assert left() == before


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_auto_on_six_devices(stand_in: list[Call], sizes: tuple[int, int]) -> None:
    """The residual, on another mesh of these devices, is moved to where x is."""

    def f(x: Any, scale: Any, bias: Any, r: Any) -> jax.Array:
        return fusednorm.layer_norm(x, scale, bias, residual=r)[0]

    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(sizes, ("d", "e"), axis_types=kinds)
    other = jax.make_mesh(sizes[::-1], ("d", "e"), axis_types=kinds)
    x, r = (jax.random.normal(jax.random.key(i), (6, 6, 32)) for i in range(2))
    _, scale, bias, _ = data()
    expected = jax.jit(f)(x, scale, bias, r)
    stand_in.clear()
    x = jax.device_put(x, NamedSharding(mesh, P("d", "e")))
    for of_residual in (mesh, other):
        args = x, scale, bias, jax.device_put(r, NamedSharding(of_residual, P("d")))
        np.testing.assert_allclose(jax.jit(f)(*args), expected, rtol=0, atol=1e-5)
    part = 6 // sizes[0], 6 // sizes[1], 32
    assert [call.x.shape for call in stand_in] == [(6, 6, 32), part] * 2


@pytest.mark.parametrize("sharding", ["data", "sequence"])
@pytest.mark.parametrize(
    "kind", [*KINDS, "layer_norm residual", "of each sample", "layer_norm epsilon 0"]
)
def test_auto_uneven_parts(stand_in: list[Call], kind: str, sharding: str) -> None:
    """What lies outside of x, on the device with less of it, enters no sum.

    13 samples or pixels on 2 devices are 7 on each. The reference takes them, with a
    mask, and no activation is gathered.
    """
    shape = (14, 8, 32) if sharding == "data" else (4, 14, 32)
    axis = shape.index(14)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(3, 1.3, shape), "float32") for _ in range(2))
    params = [jnp.linspace(0.5, 2, 32), jnp.linspace(-1, 1, 32)]
    if kind == "of each sample":
        params = [p * jnp.ones((4, 1, 1)) for p in params]
        if sharding == "data":
            params = [jnp.ones((14, 1, 1)) * p[0] for p in params]

    def f(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        x = jax.lax.slice_in_dim(x, 0, 13, axis=axis)
        if kind == "of each sample":
            scale, bias = scale[: len(x)], bias[: len(x)]
            y = fusednorm.group_norm(x, scale, bias, num_groups=2, activation="silu")
        elif kind == "layer_norm residual":
            y, h = fusednorm.layer_norm(x, scale, bias, residual=x * x)
            y = y + h
        elif kind == "layer_norm epsilon 0":
            y = fusednorm.layer_norm(x, scale, bias, epsilon=0.0)
        else:
            y = KINDS[kind](x, scale, bias)
        return jax.lax.pad(y, 7.0, [(0, int(a == axis), 0) for a in range(3)])

    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(f))(x, *params, dy)
    mesh = mesh_of(sharding, "Auto")
    args = placed(mesh, SHARDINGS[sharding], (x, *params, dy))
    stand_in.clear()
    lowered = jax.jit(both(f)).lower(*args)
    compiled = lowered.compile()
    agree(compiled(*args), expected)
    assert "CustomSPMDPartitioning" in lowered.as_text()
    assert {call.x.shape[axis] for call in stand_in} == {13}  # no kernel for a part
    assert gathered(compiled.as_text()) == []


def test_what_is_exported_is_the_reference(stand_in: list[Call]) -> None:
    """A call that XLA asks about would export a pointer into this process."""
    mesh = mesh_of("data", "Auto")
    args = placed(mesh, P("d"), data())[:3]
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(fusednorm.layer_norm))(*args)
        again = jax.export.deserialize(exported.serialize())
        y = jax.jit(again.call)(*args)
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    assert stand_in == []
    np.testing.assert_allclose(y, fusednorm.layer_norm(*data()[:3]), rtol=0, atol=1e-5)


def test_a_persistent_cache_that_will_miss(stand_in: list[Call], tmp_path: Any) -> None:
    """The program has a pointer into this process, unless an option removes it."""
    args = placed(mesh_of("data", "Auto"), P("d"), data())[:3]

    def lower() -> None:
        jax.clear_caches()
        jax.jit(fusednorm.layer_norm).lower(*args)

    option = "jax_remove_custom_partitioning_ptr_from_cache_key"
    before = jax.config.jax_compilation_cache_dir
    lower()  # a warning would be an error
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        with pytest.warns(UserWarning, match=option):
            lower()
        jax.config.update(option, True)
        lower()
    finally:
        jax.config.update(option, False)
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_key_of_the_persistent_cache_knows_all(
    stand_in: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs differ wherever the norm, the backend or our code does.

    This holds even without the pointer, which
    jax_remove_custom_partitioning_ptr_from_cache_key removes from the key.
    """
    mesh = mesh_of("data", "Auto")
    x, scale, bias, _ = placed(mesh, P("d"), data())

    def text(backend: str = "auto", **options: Any) -> str:
        jax.clear_caches()
        with jax.set_mesh(mesh), fusednorm.use_backend(backend):
            f = jax.jit(lambda *a: fusednorm.layer_norm(*a, **options))
            return re.sub(
                r'backend_config = "\d+"', "", f.lower(x, scale, bias).as_text()
            )

    assert "CustomSPMDPartitioning" in text()
    assert text() == text()
    assert text(epsilon=1e-3) != text()
    assert text(activation="gelu") != text()
    assert text("mosaic_gpu") != text()
    before = text()
    monkeypatch.setattr(parts, "_sources", lambda: "another")
    assert text() != before


def test_the_key_of_the_persistent_cache_knows_what_a_gradient_is_of(
    stand_in: list[Call],
) -> None:
    """The forwards of two gradients have the same key, and the backwards differ."""
    mesh = mesh_of("data", "Auto")
    args = placed(mesh, P("d"), data())

    def keys(of: int) -> set[str]:
        jax.clear_caches()

        def along_dy(x: Any, scale: Any, bias: Any, dy: Any) -> jax.Array:
            return jnp.vdot(dy, fusednorm.layer_norm(x, scale, bias))

        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(along_dy, of)).lower(*args).as_text()
        return set(re.findall(r"dense<.*> : tensor<2xui32>", text))

    of_scale, of_bias = keys(1), keys(2)
    assert len(of_scale) == len(of_bias) == 2
    assert len(of_scale & of_bias) == 1


# --- explicit mode, with the stand-in -------------------------------------------------


def written_out(x: Any, r: Any, scale: Any, bias: Any, *, how: str) -> tuple[Any, ...]:
    """Computes LayerNorm in jax.numpy, alone or with a sum before or after it."""
    h = x + r if how == "before" else x
    mean = h.mean(-1, keepdims=True)
    var = ((h - mean) ** 2).mean(-1, keepdims=True)
    z = (h - mean) * jax.lax.rsqrt(var + 1e-6) * scale + bias
    return (z + r,) if how == "behind" else (z, h)[: 1 + (how == "before")]


def by_a_layer(x: Any, r: Any, scale: Any, bias: Any, *, how: str) -> tuple[Any, ...]:
    """Computes what `written_out` computes, with `fusednorm.layer_norm`."""
    if how == "before":
        return fusednorm.layer_norm(x, scale, bias, residual=r)
    y = fusednorm.layer_norm(x, scale, bias)
    return (y + r if how == "behind" else y,)


@pytest.mark.parametrize("how", ["alone", "before", "behind"])
@pytest.mark.parametrize(
    ("of_x", "of_r", "of_params"),
    [
        (P("d", None, "e"), P("d", None, "e"), P()),
        (P("d", None, "e"), P(), P()),
        (P("d"), P(), P("e")),
        (P(), P("d"), P()),
        (P(None, "d"), P(), P()),
    ],
    ids=str,
)
def test_explicit_operands_that_lie_otherwise(
    stand_in: list[Call], of_x: P, of_r: P, of_params: P, how: str
) -> None:
    """Results, gradients and tangents have the same types as those of the formula."""
    x, scale, bias, r = data()

    def all_of(f: Fn) -> Fn:
        joined = functools.partial(fusednorm.fuse_neighbours(f), how=how)

        def whole(x: Any, r: Any, scale: Any, bias: Any) -> Any:
            y, vjp = jax.vjp(joined, x, r, scale, bias)
            along_r = jax.jvp(lambda r: joined(x, r, scale, bias), (r,), (r,))
            along_scale = jax.jvp(lambda s: joined(x, r, s, bias), (scale,), (scale,))
            return y, vjp(jax.tree.map(jnp.cos, y)), along_r, along_scale

        return jax.jit(whole)

    with jax.set_mesh(mesh_of("data and features", "Explicit")):
        args = [
            jax.device_put(a, spec)
            for a, spec in zip(
                (x, r, scale, bias), (of_x, of_r, of_params, of_params), strict=True
            )
        ]
        expected = jax.tree.leaves(all_of(written_out)(*args))
        assert stand_in == []
        found = jax.tree.leaves(all_of(by_a_layer)(*args))
    assert {call.op for call in stand_in} == {"forward", "backward"}
    assert list(map(jax.typeof, found)) == list(map(jax.typeof, expected))
    agree(found, expected)


@pytest.mark.parametrize("of_mask", [P(), P("d"), P(None, "e")], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 32), (4, 1, 1), (1, 8, 1)], ids=str)
@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.BatchNorm, nnx.InstanceNorm])
def test_explicit_masks_that_lie_otherwise(
    kind: Any, shape: tuple[int, ...], of_mask: P
) -> None:
    """A mask may be sharded unlike x. y has flax's type and one device's numbers."""
    x = data()[0]
    mask = np.random.default_rng(1).random(shape) < 0.7
    padded = (*of_mask, None, None)
    of_mask = P(*[s if n > 1 else None for s, n in zip(padded, shape, strict=False)])

    @nnx.jit
    def call(layer: Any, x: Any, mask: Any) -> jax.Array:
        return layer(x, mask=mask)

    layer = kind(32, rngs=nnx.Rngs(0))
    fusednorm.fuse(layer)
    expected = call(layer, x, mask)
    with jax.set_mesh(mesh_of("data and features", "Explicit")):
        args = jax.device_put(x, P("d")), jax.device_put(mask, of_mask)
        flax_s = kind(32, rngs=nnx.Rngs(0))
        layer = nnx.clone(flax_s)
        fusednorm.fuse(layer)
        found = call(layer, *args)
        assert jax.typeof(found) == jax.typeof(call(flax_s, *args))
    agree([found], [expected])


# --- both modes -----------------------------------------------------------------------


def deep(norm: Fn) -> Fn:
    """Returns four norms: one in a nested jit, three in a scan that is recomputed."""

    @jax.checkpoint
    def step(h: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(norm(h, *params)), None

    def f(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        x = jax.jit(norm)(x, scale, bias)
        params = jnp.stack([scale] * 3), jnp.stack([bias] * 3)
        return jax.lax.scan(step, x, params)[0]

    return f


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("kind", ["layer_norm gelu", "group_norm", "batch_norm"])
def test_scan_and_checkpoint_and_jit_on_a_mesh_of_three_axes(
    stand_in: list[Call], kind: str, mode: str
) -> None:
    """One of the three axes has a single device."""
    f = deep(KINDS[kind])
    expected = expected_of(f)
    types = (getattr(AxisType, mode),) * 3
    mesh = jax.make_mesh((2, 1, 4), ("d", "one", "e"), axis_types=types)
    spec = P("d", "one", "e")
    args = placed(mesh, spec, data())
    stand_in.clear()
    with jax.set_mesh(mesh):
        compiled = jax.jit(both(f)).lower(*args).compile()
        found = compiled(*args)
    agree(found, expected, within=1e-4)  # each norm magnifies the rounding before it
    assert found[0].sharding.is_equivalent_to(args[0].sharding, 3)
    assert gathered(compiled.as_text()) == []
    assert (2, 8, 8) in {call.x.shape for call in stand_in if call.op == "forward"}
    assert (2, 8, 8) in {call.x.shape for call in stand_in if call.op == "backward"}


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("kind", ["rms_norm", "group_norm", "batch_norm"])
def test_gradients_of_an_ensemble_s_parameters_alone(
    stand_in: list[Call], kind: str, mode: str
) -> None:
    """Statistics cross devices, dx is not wanted, and members have their own dscale."""
    x, scale, bias, _ = data()
    params = jnp.stack([scale, 2 * scale]), jnp.stack([bias, bias - 1])

    def gradients(x: jax.Array, *params: jax.Array) -> Any:
        ensemble = jax.vmap(KINDS[kind], in_axes=(None, 0, 0))
        y, vjp = jax.vjp(functools.partial(ensemble, x), *params)
        return vjp(jnp.cos(y))

    with fusednorm.use_backend("reference"):
        expected = jax.jit(gradients)(x, *params)
    sharding = "features" if kind == "rms_norm" else "sequence"
    stand_in.clear()
    with jax.set_mesh(mesh_of(sharding, mode)):
        there = jax.device_put(x, SHARDINGS[sharding])
        agree(jax.jit(gradients)(there, *params), expected)
    last = stand_in[-1]
    assert last.half
    assert last.wanted[:3] == (False, True, True)


# Norms whose scale has two axes of x: both are reduced, or each head has a scale.
TWO_AXES = {
    "joined": {"reduction_axes": (1, 2), "feature_axes": (1, 2)},
    "heads": {"reduction_axes": 2, "feature_axes": (1, 2)},
}


def of_two_axes(kind: str) -> tuple[Fn, list[jax.Array]]:
    """Returns the norm's function, and [x, scale, bias, dy]."""
    x, _, _, dy = data()
    scale, bias = (data(seed)[0][0].reshape(-1) for seed in (1, 2))
    f = functools.partial(fusednorm.layer_norm, **TWO_AXES[kind])
    return f, [x, scale, bias, dy]


@pytest.mark.parametrize("sharded", [0, 1])
@pytest.mark.parametrize("kind", TWO_AXES)
def test_explicit_with_two_axes_of_features(
    kernels: str, kind: str, sharded: int
) -> None:
    """If the first of the two axes is sharded, so are scale and bias."""
    f, args = of_two_axes(kind)
    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(f))(*args)
    mesh = mesh_of("data", "Explicit")
    of_x = P(*[None] * sharded, "d")
    specs = (of_x, *[P("d") if sharded else P()] * 2, of_x)
    args = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(args, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(both(f)).lower(*args).compile()
        found = jax.block_until_ready(compiled(*args))
    agree(found, expected)
    assert gathered(compiled.as_text()) == []
    crosses = kind == "joined" and sharded == 1
    suffixes = (", moments", ", sums") if crosses else ("", "")
    assert interpreters.runs == {
        f"rowwise {op}{suffix}": 2
        for op, suffix in zip(("forward", "backward"), suffixes, strict=True)
    }


def of_parts(f: Fn, args: Sequence[Any], specs: Sequence[P]) -> Any:
    """Returns y and gradients of two devices in explicit mode, and those expected.

    The expected ones are the reference's on one device.
    """
    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(f))(*args)
    with jax.set_mesh(mesh_of("data", "Explicit")):
        there = map(jax.device_put, args, specs)
        return jax.block_until_ready(jax.jit(both(f))(*there)), expected


def test_explicit_scale_of_each_element(stand_in: list[Call]) -> None:
    """dscale is sharded like x."""
    (x, _, bias, dy), (scale, *_) = data(), data(1)
    specs = P("d"), P("d"), P(), P("d")
    found, expected = of_parts(fusednorm.layer_norm, (x, scale, bias, dy), specs)
    agree(found, expected)
    assert found[2].sharding.spec == P("d", None, None)
    assert stand_in[-1].x.shape == (2, 8, 32)


def test_explicit_scale_of_each_sample_of_a_batch(stand_in: list[Call]) -> None:
    """Each of two devices has one sample, and a mean is taken over both."""
    x, scale, bias, dy = (data(seed)[0][:2] for seed in range(4))
    args = x, scale[:, :1], bias[:, :1], dy
    agree(*of_parts(KINDS["batch_norm"], args, [P("d")] * 4))
    assert stand_in[-1].half


def test_explicit_groups_of_a_batch(stand_in: list[Call]) -> None:
    """A mean is taken over several channels, which have their own scales."""

    def norm(x: Any, scale: Any, bias: Any) -> jax.Array:
        given = {"num_groups": 4, "reduction_axes": (0, 1, 2)}
        return fusednorm.group_norm(x, scale, bias, **given)

    agree(*of_parts(norm, data(), (P("d"), P(), P(), P("d"))))
    assert stand_in[-1].half


def test_explicit_inside_a_shard_map(stand_in: list[Call]) -> None:
    """Statistics cross the axis of the shard_map and the axis that types tell of."""
    x, scale, bias, _ = data()
    with fusednorm.use_backend("reference"):
        expected = jax.jit(KINDS["batch_norm"])(x, scale, bias)

    def part(x: Any, scale: Any, bias: Any) -> jax.Array:
        return fusednorm.batch_norm(x, scale, bias, axis_name="d")[0]

    stand_in.clear()
    kinds = AxisType.Auto, AxisType.Explicit
    with jax.set_mesh(jax.make_mesh((2, 2), ("d", "e"), axis_types=kinds)):
        mapped = jax.shard_map(
            part,
            in_specs=(P("d"), P(), P()),
            out_specs=P("d"),
            axis_names={"d"},
            check_vma=False,
        )
        y = jax.jit(mapped)(jax.device_put(x, P(None, "e")), scale, bias)
    agree([y], [expected])
    assert stand_in[-1].x.shape == (2, 4, 32)


def test_a_mesh_of_both_modes_is_left_to_xla(stand_in: list[Call]) -> None:
    """XLA partitions the Auto axes, whatever the types tell of the others."""
    kinds = AxisType.Explicit, AxisType.Auto
    x, scale, bias, _ = data()
    with jax.set_mesh(jax.make_mesh((2, 2), ("d", "e"), axis_types=kinds)):
        x = jax.device_put(x, P("d"))
        (choice,) = fusednorm.explain(fusednorm.layer_norm, x, scale, bias).choices
    assert choice.backend == "reference"
    assert "partitions this call over 2 devices" in str(choice)


@pytest.mark.parametrize(
    ("mode", "spec"),
    [("Auto", P("d")), ("Auto", P(None, "d")), ("Explicit", P(None, None, "d"))],
)
@pytest.mark.parametrize("kind", TWO_AXES)
def test_two_axes_of_features_are_the_reference_s(
    stand_in: list[Call], kind: str, mode: str, spec: P
) -> None:
    """They are so in auto mode or if the second axis is sharded. x is not gathered."""
    f, args = of_two_axes(kind)
    with fusednorm.use_backend("reference"):
        expected = jax.jit(f)(*args[:3])
    mesh = mesh_of("data", mode)
    there = jax.device_put(args[0], NamedSharding(mesh, spec))
    stand_in.clear()
    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(there, *args[1:3]).compile()
        found = compiled(there, *args[1:3])
    assert stand_in == []
    assert [
        a for a in gathered(compiled.as_text()) if not a.startswith("f32[256]")
    ] == []
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_what_stands_beside_a_norm(stand_in: list[Call], mode: str) -> None:
    """A residual, whose sum h is used too, works with a scale and bias per sample."""
    x, _, _, r = data()
    scale, bias = (data(seed)[0][:, :1] for seed in (1, 2))

    def f(x: Any, r: Any, scale: Any, bias: Any) -> Any:
        y, h = fusednorm.layer_norm(x, scale, bias, residual=r)
        return y * h

    def whole(*args: Any) -> Any:
        y, vjp = jax.vjp(f, *args)
        return y, *vjp(jnp.cos(y))

    args = x, r, scale, bias
    with fusednorm.use_backend("reference"):
        expected = jax.jit(whole)(*args)
    mesh = mesh_of("data", mode)
    there = [jax.device_put(a, NamedSharding(mesh, P("d"))) for a in args]
    stand_in.clear()
    with jax.set_mesh(mesh):
        compiled = jax.jit(whole).lower(*there).compile()
        found = compiled(*there)
    agree(found, expected)
    assert gathered(compiled.as_text()) == []
    for a, like in zip(found, (x, *args), strict=True):
        spec = NamedSharding(mesh, P("d"))
        assert a.sharding.is_equivalent_to(spec, like.ndim)
    forward, backward = (
        next(c for c in reversed(stand_in) if c.op == op)
        for op in ("forward", "backward")
    )
    assert forward.x.shape == backward.x.shape == (2, 8, 32)
    assert forward.addend is not None
    assert backward.addend is not None
    assert forward.param_axes == 1


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("statistics", [P(), P("d")], ids=str)
def test_batch_norm_of_sharded_channels(statistics: P, masked: bool) -> None:
    """Running statistics keep their sharding when they are updated; flax raises."""
    x = data()[0]
    # The mask is all false for one channel, so its running statistics stay.
    mask = jnp.broadcast_to(jnp.arange(32) > 0, x.shape) if masked else None
    plain = fusednorm.BatchNorm(32, rngs=nnx.Rngs(0))
    y = plain(x, mask=mask)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layer = fusednorm.BatchNorm(32, rngs=nnx.Rngs(0))
        for name, spec in (
            *(("mean", statistics), ("var", statistics)),
            *(("scale", P("d")), ("bias", P("d"))),
        ):
            variable = getattr(layer, name)
            placed = jax.device_put(variable[...], NamedSharding(mesh, spec))
            variable.set_value(placed)
        there, mask = (
            a
            if a is None
            else jax.device_put(a, NamedSharding(mesh, P(None, None, "d")))
            for a in (x, mask)
        )
        found = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))(layer, there, mask)
        assert found.sharding.spec == there.sharding.spec
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-5)
        for name in ("mean", "var"):
            average = getattr(layer, name)[...]
            assert average.sharding.is_equivalent_to(NamedSharding(mesh, statistics), 1)
            np.testing.assert_allclose(average, getattr(plain, name)[...], atol=1e-6)


# --- shard_map ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "check_vma"),
    [
        ("layer_norm", True),
        ("layer_norm", False),
        ("batch_norm", True),
        ("group_norm silu", False),
        pytest.param("batch_norm", False, marks=pytest.mark.slow),
        pytest.param("group_norm silu", True, marks=pytest.mark.slow),
    ],
)
def test_statistics_over_an_axis_of_a_shard_map(
    kernels: str, kind: str, check_vma: bool
) -> None:
    """`axis_name` runs the kernels' halves with psums between them."""
    sharding = "features" if kind == "layer_norm" else "sequence"
    spec = SHARDINGS[sharding]
    expected = expected_of(KINDS[kind])
    mesh = mesh_of(sharding, "Auto")

    def part(x: Any, scale: Any, bias: Any) -> jax.Array:
        if kind == "layer_norm":
            return fusednorm.layer_norm(x, scale, bias, axis_name="d")
        if kind == "batch_norm":
            return fusednorm.batch_norm(x, scale, bias, axis_name="d")[0]
        given = {"num_groups": 4, "activation": "silu", "axis_name": "d"}
        return fusednorm.group_norm(x, scale, bias, **given)

    of_param = P(*spec[2:])
    mapped = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(spec, of_param, of_param),
        out_specs=spec,
        check_vma=check_vma,
    )
    agree(jax.jit(both(mapped))(*data()), expected)
    assert {name.split(", ")[1] for name in interpreters.runs} == {"moments", "sums"}
    assert set(interpreters.runs.values()) == {mesh.size}


@pytest.mark.parametrize("check_vma", [True, False])
def test_statistics_of_devices_with_a_scale_each(kernels: str, check_vma: bool) -> None:
    """Each scale weights its own dy, so psums of dscale and dbias do not give dx."""
    (x, *_, dy), (_, scale, bias, _), (_, scale_2, bias_2, _) = map(data, range(3))
    scale, bias = (jnp.stack(pair) for pair in ((scale, scale_2), (bias, bias_2)))

    def norm(x: Any, scale: Any, bias: Any, **across: Any) -> jax.Array:
        return fusednorm.batch_norm(x, scale, bias, **across)[0]

    def part(x: Any, scale: Any, bias: Any) -> jax.Array:
        return norm(x, scale[0], bias[0], axis_name="d")

    def whole(x: Any, scale: Any, bias: Any) -> jax.Array:
        scale, bias = (jnp.repeat(p[:, None], 2, 0) for p in (scale, bias))
        return norm(x, scale, bias)

    mapped = jax.shard_map(
        part,
        mesh=mesh_of("data", "Auto"),
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    found = jax.block_until_ready(jax.jit(both(mapped))(x, scale, bias, dy))
    with fusednorm.use_backend("reference"):
        agree(found, jax.jit(both(whole))(x, scale, bias, dy))
    assert {name.split(", ")[1] for name in interpreters.runs} == {"moments", "sums"}


def test_what_is_the_same_on_all_devices_stays_so() -> None:
    """Statistics over devices with the same data are those of each device."""
    x, scale, bias, _ = data()
    norm = functools.partial(fusednorm.layer_norm, axis_name="d")
    mesh = mesh_of("data", "Auto")
    same = jax.shard_map(norm, mesh=mesh, in_specs=P(), out_specs=P())
    agree([same(x, scale, bias)], [fusednorm.layer_norm(x, scale, bias)])


@pytest.mark.parametrize("over", ["e", ("d", "e")], ids=str)
def test_what_is_the_same_along_an_axis_stays_so(over: Any) -> None:
    """Statistics over this axis are those of each device, as in flax's layers."""
    x, scale, bias, dy = data()
    mesh = mesh_of("data and features", "Auto")

    def norm(x: Any, scale: Any, bias: Any, **across: Any) -> jax.Array:
        return fusednorm.batch_norm(x, scale, bias, **across)[0]

    def alone(x: Any, scale: Any, bias: Any) -> jax.Array:
        if over == "e":  # each part has two samples
            parts = x.reshape(2, 2, *x.shape[1:])
            return jax.vmap(norm, (0, None, None))(parts, scale, bias).reshape(x.shape)
        return norm(x, scale, bias)

    mapped = jax.shard_map(
        functools.partial(norm, axis_name=over),
        mesh=mesh,
        in_specs=(P("d"), P(), P()),
        out_specs=P("d"),
    )
    found = jax.jit(both(mapped))(x, scale, bias, dy)
    agree(found, both(alone)(x, scale, bias, dy))


# --- fuse -----------------------------------------------------------------------------


class Block(nnx.Module):
    """A model whose norms have parameters split over "model" by their metadata."""

    def __init__(self, rngs: nnx.Rngs):
        ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
        split = {
            "scale_init": nnx.with_partitioning(ones, ("model",)),
            "bias_init": nnx.with_partitioning(zeros, ("model",)),
        }
        self.first = nnx.LayerNorm(32, **split, rngs=rngs)
        self.linear = nnx.Linear(
            32,
            32,
            kernel_init=nnx.with_partitioning(
                nnx.initializers.lecun_normal(), (None, "model")
            ),
            rngs=rngs,
        )
        self.second = nnx.BatchNorm(32, **split, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.linear(self.first(x)))


def test_a_partitioned_model_trains_after_fuse() -> None:
    """It trains as flax's model does, and every Variable keeps its sharding."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, _, _, target = data()

    @nnx.jit
    def step(model: nnx.Module, x: jax.Array, target: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return jnp.mean((model(x) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
        return value

    trained = []
    with jax.set_mesh(mesh):
        x, target = (
            jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, target)
        )
        for fused in (False, True):
            model = Block(nnx.Rngs(0))
            specs = nnx.get_partition_spec(nnx.state(model))
            if fused:
                assert not fusednorm.fuse(model).left
            assert nnx.get_partition_spec(nnx.state(model)) == specs
            losses = [step(model, x, target) for _ in range(3)]
            trained.append((losses, jax.tree.leaves(nnx.state(model))))
    (losses, theirs), (our_losses, ours) = trained
    assert losses[0] > losses[2]
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    assert any(not a.sharding.is_fully_replicated for a in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [8, 12])
def test_a_mesh_for_all_shardings(devices: int) -> None:
    """The mesh says how an array is sharded on any mesh whose devices are in order."""
    sizes = [s for s in ((2, 4), (8,), (2, 2, 2), (3, 4), (4, 3), (2, 3, 2), (12,))
             if math.prod(s) == devices]  # fmt: skip
    for shape in sizes:
        names = "abc"[: len(shape)]
        theirs = AbstractMesh(shape, tuple(names))
        for order in itertools.permutations(names):
            for spec in (P(*order), P(order), P(order[0]), P(None, order[-1])):
                given = numbered(theirs, spec, rank=3)
                mesh, (first, second) = parts._on_a_mesh([given, given], [3, 3])
                assert first == second
                assert numbered(mesh, first, rank=3).is_equivalent_to(given, 3)


def numbered(mesh: Any, spec: P, rank: int) -> GSPMDSharding:
    """Returns the sharding as `custom_partitioning` tells it, of devices by number."""
    hlo_sharding = NamedSharding(mesh, spec)._to_xla_hlo_sharding(rank)
    return GSPMDSharding(tuple(range(mesh.size)), hlo_sharding)


def test_a_mesh_for_shardings_of_two_meshes() -> None:
    """No mesh of 12 devices has an axis of 4, then 3, and one of 3, then 4."""
    specs = [
        numbered(AbstractMesh(shape, ("a", "b")), P("a", "b"), rank=2)
        for shape in ((4, 3), (3, 4))
    ]
    mesh, (first, second) = parts._on_a_mesh(specs, [2, 2])
    assert mesh.axis_sizes == (2, 2, 3)
    assert first == P(("d0", "d1"), "d2")
    assert second == P(None, None)


def over_devices(norm: Fn, arrays: Sequence[Any], params: Sequence[Any]) -> Any:
    """Returns y and gradients of norm(*arrays, *params), found and expected.

    A `jax.shard_map` over all devices finds the former, and the reference on one device
    computes the latter.
    """
    dy = data()[3]
    spec = P(None, "d")
    mapped = jax.shard_map(
        functools.partial(norm, axis_name="d"),
        mesh=mesh_of("sequence", "Auto"),
        in_specs=(*[spec] * len(arrays), *[P()] * len(params)),
        out_specs=spec,
    )
    found = jax.block_until_ready(jax.jit(both(mapped))(*arrays, *params, dy))
    with fusednorm.use_backend("reference"):
        expected = jax.jit(both(norm))(*arrays, *params, dy)
    assert {name.split(", ")[1] for name in interpreters.runs} == {"moments", "sums"}
    return found, expected


@pytest.mark.parametrize("check_vma", [False, True])
def test_statistics_of_one_device_cross_nothing(kernels: str, check_vma: bool) -> None:
    """A program for several devices runs whole kernels on one."""
    x, scale, bias, dy = data()

    def norm(*args: Any) -> tuple[jax.Array, ...]:
        return fusednorm.batch_norm(*args, axis_name="d")

    mapped = jax.shard_map(
        norm,
        mesh=mesh_of("one device", "Auto"),
        in_specs=(P("d"), P(), P()),
        out_specs=(P("d"), P(), P()),
        check_vma=check_vma,
    )
    whole = jax.jit(both(lambda *args: mapped(*args)[0]))
    found = jax.block_until_ready(whole(x, scale, bias, dy))
    agree(found, expected_of(KINDS["batch_norm"]))
    names = "channelwise forward", "channelwise backward"
    assert interpreters.runs == dict.fromkeys(names, 1)
    statistics = jax.jit(mapped)(x, scale, bias)[1:]
    agree(statistics, fusednorm.batch_norm(x, scale, bias)[1:])


def test_a_mask_that_varies_where_x_does_not() -> None:
    """Along "e" neither varies, and combining would change nothing."""
    x, scale, bias, dy = data()
    masks = jnp.asarray(np.random.default_rng(1).random((2, *x.shape)) < 0.7)

    def norm(masks: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        return fusednorm.batch_norm(*args, mask=masks[0], axis_name=("d", "e"))

    mapped = jax.shard_map(
        norm,
        mesh=mesh_of("data and features", "Auto"),
        in_specs=(P("d"), P(), P(), P()),
        out_specs=(P("d"), P(), P()),
    )
    found = jax.jit(both(lambda *args: mapped(masks, *args)[0]))
    twice = jnp.concatenate([x, x])
    whole = jnp.concatenate(list(masks))
    y, vjp = jax.vjp(
        lambda *args: fusednorm.batch_norm(*args, mask=whole)[0], twice, scale, bias
    )
    dx, *dparams = vjp(jnp.concatenate([dy, dy]))
    dx = dx[: len(x)] + dx[len(x) :]
    agree(found(x, scale, bias, jnp.concatenate([dy, dy])), [y, dx, *dparams])


def test_statistics_of_one_device_are_the_same_on_all_of_them() -> None:
    """Where no kernel runs, too; otherwise JAX would refuse these `out_specs`."""
    x = jax.lax.complex(data(0)[0][0], data(1)[0][0])
    mapped = jax.shard_map(
        lambda x: fusednorm.batch_norm(x, axis_name="d"),
        mesh=mesh_of("one device", "Auto"),
        in_specs=P("d"),
        out_specs=(P("d"), P(), P()),
    )
    agree(mapped(x), fusednorm.batch_norm(x))


@pytest.mark.parametrize("has_bias", [False, True])
def test_batch_norm_over_devices_with_an_offset(kernels: str, has_bias: bool) -> None:
    """c1 and c2 come from the sums of dscale and dbias if there are both."""

    def norm(x: Any, *params: Any, **across: Any) -> jax.Array:
        return fusednorm.batch_norm(x, *params, scale_offset=1.0, **across)[0]

    x, scale, bias, _ = data()
    agree(*over_devices(norm, [x], [scale, bias] if has_bias else [scale]))


def test_a_shortcut_behind_statistics_of_several_devices(kernels: str) -> None:
    """XLA computes the shortcut's gradient; it is not part of the kernel's half."""

    def norm(x: Any, r: Any, *params: Any, **across: Any) -> jax.Array:
        given = {"residual": r, "activation": "silu", **across}
        return fusednorm.batch_norm(x, *params, **given)[0]

    (x, scale, bias, _), r = data(), data(1)[0].astype("bfloat16")
    found, expected = over_devices(norm, [x, r], [scale, bias])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        agree([a], [b], within=1e-2 if b.dtype == r.dtype else 1e-5)


def test_what_is_not_added_up_yet_is_for_no_kernel() -> None:
    """No kernel takes an operand of explicit mode that is unreduced."""
    mesh = mesh_of("data and features", "Explicit").abstract_mesh
    every = (0, 1)
    alignment = parts.Alignment((every,), (every,), (False,))
    for spec, has_parts in ((P("d"), True), (P("d", unreduced={"e"}), False)):
        sharding = types.SimpleNamespace(mesh=mesh, spec=spec)
        x = types.SimpleNamespace(shape=(4, 32), ndim=2, sharding=sharding)
        found = parts.of_types(Norm((1,), (1,)), x, alignment, [x])
        assert (found is not None) == has_parts


def test_xla_does_not_ask_about_types() -> None:
    """What explicit mode cannot split is the reference's, without a callback."""
    mesh = mesh_of("data and features", "Explicit").abstract_mesh
    tree = jax.tree.structure(("x", *[None] * 5))
    params = {"tree": tree, "norm": Norm((1,), (1,))}
    params |= {"carries": False, "statistics": False}
    target = dispatch.Target(("cuda",), 4, asks=True)
    for spec, kind in (
        (P("d"), parts.Parts),
        (P("d", unreduced={"e"}), type(None)),
    ):
        x = jax.core.ShapedArray(
            (4, 32), jnp.dtype("float32"), sharding=NamedSharding(mesh, spec)
        )
        *_, partitioning = lowering.choose([x], params, target, "auto")
        assert isinstance(partitioning, kind)


def test_axes_keep_their_types_where_one_is_split_for_groups() -> None:
    kinds = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=kinds)
    refined, inner = parts._refined(mesh, "d", 2)
    assert refined.axis_names == ("d", inner, "e")
    assert refined.axis_types == (AxisType.Explicit, *kinds)


def test_xs_own_sharding_goes_before_that_of_parameters() -> None:
    every, param = (0, 1, 2), (2,)
    alignment = parts.Alignment((every, param), (every,), (False,))
    specs = [(param, P("d")), (every, P("d", P.UNCONSTRAINED))]
    norm = Norm((2,), (2,))
    found = parts._split(mesh_of("data", "Auto"), norm, (4, 8, 32), alignment, specs)
    assert found.axes == (("d",), (), ())
