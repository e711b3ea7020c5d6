"""Which implementation runs, how often, and why, tested with a stand-in kernel."""

import functools
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusednorm
from fusednorm.kernels import dispatch, tpu
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, Target
from fusednorm.reference import Norm
from tests import standin
from tests.on_tpu import Device


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Registers the stand-in's kernels for the CPU."""
    jax.clear_caches()  # drop executables made without the stand-in
    entry = (standin.BACKEND, "tests.standin")
    monkeypatch.setitem(dispatch.KERNELS, "cpu", entry)
    standin.calls.clear()
    standin.runs.clear()
    yield standin
    jax.clear_caches()


X = jnp.asarray(np.random.default_rng(0).normal(0.3, 2, (4, 5, 24)), "float32")
DY = jnp.asarray(np.random.default_rng(1).normal(0, 1, (4, 5, 24)), "float32")
SCALE, BIAS = jnp.linspace(0.5, 1.5, 24), jnp.linspace(-1.0, 1.0, 24)


def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return fusednorm.layer_norm(x, scale, bias)


def loss(
    x: Any, scale: Any, bias: Any, dy: Any, normalize: Any = normalize
) -> jax.Array:
    return jnp.vdot(dy, jnp.sin(normalize(x, scale, bias)))


ARGS = (0, 1, 2)
VMAPPED = (0, None, None, 0)


def directional(function: Any) -> Any:
    """Returns the derivative of a function along (dy, bias, scale, 0).

    The function and its derivative take (x, scale, bias, dy).
    """
    return lambda x, s, b, dy: jax.jvp(
        lambda x, s, b: function(x, s, b, dy), (x, s, b), (dy, b, s)
    )


def counted(normalize: Any) -> dict[str, tuple[Any, int, int]]:
    """Returns transforms of normalize(x, scale, bias), by name.

    Each entry has a function of (x, scale, bias, dy), how often that runs the forward,
    and how often the backward.
    """
    once = functools.partial(loss, normalize=normalize)
    gradient = jax.grad(once, ARGS)
    of_vmap = functools.partial(loss, normalize=jax.vmap(normalize, VMAPPED[:3]))

    def three(x: Any, scale: Any, bias: Any, dy: Any) -> jax.Array:
        step = lambda h, _: (normalize(h, scale, bias), None)  # noqa: E731
        return jnp.vdot(dy, jax.lax.scan(step, x, None, length=3)[0])

    saving = jax.checkpoint_policies.everything_saveable
    saved = jax.checkpoint(once, policy=saving)
    return {
        "value": (once, 1, 0),
        "jvp": (directional(once), 1, 0),
        "grad": (gradient, 1, 1),
        "value_and_grad": (jax.value_and_grad(once, ARGS), 1, 1),
        "grad of x": (jax.grad(once), 1, 1),
        "grad of params": (jax.grad(once, (1, 2)), 1, 1),
        "hvp, forward over reverse": (directional(gradient), 1, 1),
        "vmap": (jax.vmap(once, VMAPPED), 1, 0),
        "vmap of grad": (jax.vmap(gradient, VMAPPED), 1, 1),
        "grad of vmap": (jax.grad(of_vmap, ARGS), 1, 1),
        "scan": (three, 3, 0),
        "grad of scan": (jax.grad(three, ARGS), 3, 3),
        "remat": (jax.value_and_grad(jax.checkpoint(once), ARGS), 2, 1),
        "remat that saves all": (jax.value_and_grad(saved, ARGS), 1, 1),
    }


COUNTED = counted(normalize)


@pytest.mark.parametrize("name", COUNTED)
def test_each_kernel_runs_as_often_as_it_should(name: str, kernels: Any) -> None:
    function, forward, backward = COUNTED[name]
    result = jax.block_until_ready(jax.jit(function)(X, SCALE, BIAS, DY))
    assert dict(kernels.runs) == {
        op: n for op, n in (("forward", forward), ("backward", backward)) if n
    }
    with fusednorm.use_backend("reference"):
        expected = jax.jit(function)(X, SCALE, BIAS, DY)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert sum(kernels.runs.values()) == forward + backward  # the reference runs none


def test_statistics_are_written_for_a_derivative_alone(kernels: Any) -> None:
    jax.jit(loss).lower(X, SCALE, BIAS, DY)
    assert [call.statistics for call in kernels.calls] == [False]
    kernels.calls.clear()
    jax.jit(jax.grad(loss, ARGS)).lower(X, SCALE, BIAS, DY)
    assert [(c.op, c.statistics) for c in kernels.calls] == [
        ("forward", True),
        ("backward", False),
    ]


@pytest.mark.parametrize(
    ("wrt", "wanted"),
    [
        (0, (True, False, False, False)),
        ((1, 2), (False, True, True, False)),
        (2, (False, False, True, False)),
    ],
)
def test_only_gradients_that_are_wanted(wrt: Any, wanted: tuple, kernels: Any) -> None:
    jax.jit(jax.grad(loss, wrt)).lower(X, SCALE, BIAS, DY)
    assert [c.wanted for c in kernels.calls if c.op == "backward"] == [wanted]


def test_batched_calls_keep_their_rank(kernels: Any) -> None:
    jax.jit(jax.vmap(jax.grad(loss, ARGS), VMAPPED)).lower(X, SCALE, BIAS, DY)
    forward, backward = kernels.calls
    assert forward.x.shape == backward.x.shape == backward.dy.shape == X.shape
    assert forward.scale.shape == (24,)
    assert backward.own_params == 1


def test_eager_calls_run_the_kernel(kernels: Any) -> None:
    jax.block_until_ready(jax.grad(loss, ARGS)(X, SCALE, BIAS, DY))
    assert kernels.runs == {"forward": 1, "backward": 1}


def test_disable_jit_runs_the_reference(kernels: Any) -> None:
    with jax.disable_jit():
        y = normalize(X, SCALE, BIAS)
    assert not kernels.runs
    np.testing.assert_allclose(y, normalize(X, SCALE, BIAS), rtol=1e-5, atol=1e-6)


# --- the user's choice ----------------------------------------------------------------


def test_use_backend_retraces_a_function_that_is_compiled(kernels: Any) -> None:
    jitted = jax.jit(normalize)
    for backend, runs in (
        ("auto", 1),
        ("reference", 1),
        ("mosaic_gpu", 2),
        ("auto", 3),
    ):
        with fusednorm.use_backend(backend):
            jax.block_until_ready(jitted(X, SCALE, BIAS))
        assert kernels.runs["forward"] == runs, backend


def test_a_gradient_uses_the_backend_of_its_forward(kernels: Any) -> None:
    with fusednorm.use_backend("reference"):
        _, vjp = jax.vjp(normalize, X, SCALE, BIAS)
    jax.block_until_ready(vjp(DY))
    assert not kernels.runs


def test_a_named_backend_that_cannot_run_raises(kernels: Any) -> None:
    with (
        fusednorm.use_backend("mosaic_tpu"),
        pytest.raises(
            NotImplementedError, match=r"'mosaic_tpu' was named.*kernels are mosaic_gpu"
        ),
    ):
        normalize(X, SCALE, BIAS)
    with (
        fusednorm.use_backend("mosaic_gpu"),
        pytest.raises(NotImplementedError, match="mask given"),
    ):
        fusednorm.layer_norm(X, mask=X > 0)
    fusednorm.layer_norm(X, mask=X > 0)  # "auto" falls back


def test_no_kernel_on_the_cpu() -> None:
    for backend in ("mosaic_gpu", "mosaic_tpu"):
        with (
            fusednorm.use_backend(backend),
            pytest.raises(NotImplementedError, match=f"'{backend}' was named.*CPU"),
        ):
            normalize(X, SCALE, BIAS)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="no backend 'triton'; the backends are auto"):
        fusednorm.use_backend("triton").__enter__()


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("", "ran"),
        ("reference", "ran"),
        ("mosaic_gpu", "NotImplementedError"),
        ("cuda", "ValueError: FUSEDNORM_BACKEND: no backend 'cuda'"),
    ],
)
def test_the_environment_variable(value: str, outcome: str) -> None:
    """The variable is read at the first call, so importing the package never fails."""
    program = (
        "import os, fusednorm, jax.numpy as jnp\n"
        f"os.environ['FUSEDNORM_BACKEND'] = {value!r}\n"
        "try:\n"
        "    fusednorm.layer_norm(jnp.ones((2, 3))); print('ran')\n"
        "except Exception as e:\n"
        "    print(f'{type(e).__name__}: {e}')\n"
        "with fusednorm.use_backend('reference'):\n"
        "    fusednorm.layer_norm(jnp.ones((2, 3))); print('a context goes first')\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("FUSEDNORM_BACKEND", None)
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = run.stdout.strip().splitlines()
    assert first.startswith(outcome)
    assert second == "a context goes first"


# --- the plan -------------------------------------------------------------------------

CPU = Target(("cpu",))


def call(shape: tuple[int, ...] = (8, 24), **changes: Any) -> Call:
    norm = Norm((len(shape) - 1,), (len(shape) - 1,), **changes.pop("norm", {}))
    dtype = changes.pop("dtype", "float32")
    return Call("forward", norm, jax.ShapeDtypeStruct(shape, dtype), **changes)


def refusal(asked: Call, target: Target = CPU, backend: str = "auto") -> str:
    answer = dispatch.plan(asked, target, backend)
    assert isinstance(answer, Fallback)
    return answer.reason


def test_reasons_to_fall_back(kernels: Any) -> None:
    """Each reason says what would have to change."""
    assert isinstance(dispatch.plan(call(), CPU), Kernel)
    assert refusal(call(), backend="reference") == "the backend 'reference' was chosen"
    assert refusal(call(mask=True)) == "mask given"
    assert refusal(call(dtype="float64")) == (
        "float64 x; kernels take float32, bfloat16 or float16"
    )
    assert refusal(call(scale=jax.ShapeDtypeStruct((24,), "float64"))) == (
        "float64 scale; kernels take float32, bfloat16 or float16"
    )
    assert refusal(call(norm={"dtype": jnp.dtype("float64")})) == (
        "float64 output; kernels give float32, bfloat16 or float16"
    )
    of_each = jax.ShapeDtypeStruct((8, 24), "float32")
    assert isinstance(dispatch.plan(call(scale=of_each), CPU), Kernel)
    of_places = jax.ShapeDtypeStruct((1, 8, 24), "float32")
    assert refusal(call((4, 8, 24), scale=of_places)) == (
        "scale varies along other axes than the first ones, or along reduced ones: "
        "its shape is (1, 8, 24), that of x (4, 8, 24)"
    )
    assert refusal(call((8, 13))) == "13 features bring bad luck"
    assert "2^30 rows, pixels or channels" in refusal(call((2**30, 24)))
    assert isinstance(dispatch.plan(call((2**30 - 1, 24)), CPU), Kernel)
    assert refusal(call(), Target(("cpu", "cuda"))) == (
        "lowered for several platforms: cpu, cuda"
    )
    assert (
        refusal(call(), Target(("rocm",))) == "no kernels for the platform 'rocm' yet"
    )
    assert "partitions this call over 8 devices" in refusal(call(), Target(("cpu",), 8))
    transposed = Call(
        "forward",
        Norm((0, 2, 3), (1,)),
        jax.ShapeDtypeStruct((4, 8, 5, 5), "float32"),
        jax.ShapeDtypeStruct((8,), "float32"),
    )
    assert refusal(transposed) == (
        "reduction axes (0, 2, 3) and feature axes (1,) of shape (4, 8, 5, 5) need a "
        "transpose; put the channels last (axis=-1), and reduced axes just before them"
    )


@pytest.mark.parametrize(("name", "lead"), [("scale", (4, 6)), ("bias", (4,))])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_groups_of_a_row_have_one_scale_and_bias(
    platform: str, name: str, lead: tuple[int, ...]
) -> None:
    """No kernel takes a scale or bias that also varies from row to row."""
    x, own = (jax.ShapeDtypeStruct((*s, 8), "float32") for s in ((4, 6), lead))
    asked = Call("forward", Norm((), (2,), num_groups=2), x, **{name: own})
    assert "along the groups of a row and from row to row" in refusal(
        asked, Target((platform,))
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_scale_that_varies_along_a_reduced_axis(platform: str) -> None:
    """A kernel takes this scale only if that axis has one element."""
    norm, there = Norm((1, 2), (2,)), Target((platform,))
    x, one = (jax.ShapeDtypeStruct((3, n, 256), "float32") for n in (5, 1))
    assert "or along reduced ones" in refusal(Call("forward", norm, x, x), there)
    assert isinstance(dispatch.plan(Call("forward", norm, one, one), there), Kernel)


@pytest.mark.parametrize(
    ("platform", "backend"), [("cuda", "mosaic_gpu"), ("tpu", "mosaic_tpu")]
)
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (Norm((1,), (1,)), (2**31, 2)),
        (Norm((1, 2), (2,)), (1, 2**24, 2**7)),
        (Norm((1,), (2,)), (2, 2**30, 8)),
        (Norm((0, 1, 2), (3,)), (2**10, 2**10, 2**10, 8)),
        (Norm((1,), (2,)), (2**16, 2**15, 8)),
        (Norm((2,), (1, 2)), (2**26, 2**5, 2**7)),
    ],
    ids=["rows", "elements", "pixels", "batch", "samples", "heads"],
)
def test_kernels_refuse_what_int32_cannot_count(
    platform: str, backend: str, norm: Norm, shape: tuple[int, ...]
) -> None:
    def of(shape: tuple[int, ...]) -> Call:
        sizes = (shape[axis] for axis in norm.feature_axes)
        features = jax.ShapeDtypeStruct((math.prod(sizes),), "bfloat16")
        x = jax.ShapeDtypeStruct(shape, "bfloat16")
        return Call("forward", norm, x, features, features)

    assert "int32" in refusal(of(shape), Target((platform,)))
    less = tuple(n // 4 if n == max(shape) else n for n in shape)
    answer = dispatch.plan(of(less), Target((platform,)), backend)
    assert isinstance(answer, Kernel)


def test_kernels_refuse_channels_that_int32_cannot_count() -> None:
    """They count the channels of all heads together."""

    def answer(heads: int) -> Kernel | Fallback:
        x = jax.ShapeDtypeStruct((2, heads, 64), jnp.dtype("bfloat16"))
        scale = jax.ShapeDtypeStruct((heads * 64,), x.dtype)
        call = Call("forward", Norm((2,), (1, 2), center=False), x, scale)
        return dispatch.plan(call, Target(("cuda",)), "auto")

    assert isinstance(answer(2**20), Kernel)
    refused = answer(2**25)
    assert isinstance(refused, Fallback)
    assert "2^30 rows, pixels or channels" in refused.reason


def test_kernels_run_on_each_part_and_in_shard_map(kernels: Any) -> None:
    """Each device runs one kernel. test_sharded.py tests more, including auto mode."""
    expected = normalize(X, SCALE, BIAS)
    kernels.runs.clear()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        scale, bias = (
            jax.device_put(a, NamedSharding(mesh, P())) for a in (SCALE, BIAS)
        )
        y = jax.block_until_ready(jax.jit(normalize)(x, scale, bias))
        assert kernels.runs["forward"] == 4
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        parts = jax.shard_map(
            normalize, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d")
        )
        y = jax.block_until_ready(jax.jit(parts)(x, scale, bias))
    assert kernels.runs["forward"] == 8
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_kernels_stay_out_of_a_shard_map_that_leaves_axes_to_xla(kernels: Any) -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        part = jax.shard_map(
            normalize, in_specs=(P("a"), P(), P()), out_specs=P("a"), axis_names={"a"}
        )
        x = jax.device_put(X, NamedSharding(mesh, P("a", None, None)))
        y = jax.block_until_ready(jax.jit(part)(x, SCALE, BIAS))
    assert not kernels.runs
    np.testing.assert_allclose(y, normalize(X, SCALE, BIAS), rtol=1e-5, atol=1e-6)


def test_the_trace_cache_traces_a_shape_once() -> None:
    """24 norms of one shape trace the formula as often as one norm does."""
    shape = (3, 1, 7, 29)  # no other test uses this shape

    def stack(x: jax.Array, layers: int) -> jax.Array:
        for _ in range(layers):
            x = fusednorm.layer_norm(x)
        return x

    jaxpr = jax.make_jaxpr(stack, static_argnums=1)(jnp.ones(shape), 24)
    inner = {id(eqn.params["jaxpr"]) for eqn in jaxpr.eqns if "jaxpr" in eqn.params}
    assert len(jaxpr.eqns) == 24
    assert len(inner) == 1


@pytest.mark.parametrize(
    ("activation", "shortcut", "kept"),
    [
        (None, False, "bfloat16"),
        ("silu", False, "bfloat16"),
        ("silu", True, "float32"),
        (None, True, "float32"),
        ("relu", True, "bfloat16"),  # dz is dy or 0
    ],
)
def test_dy_is_kept_as_it_is_where_dz_rounds_nothing(
    activation: str | None, shortcut: bool, kept: str
) -> None:
    x = jax.ShapeDtypeStruct((8, 24), "bfloat16")
    norm = Norm((0,), (1,), activation=activation)
    added = x if shortcut else None
    asked = Call("backward", norm, x, dy=x, shortcut=added)
    assert asked.dy_kept == kept


def test_a_shortcuts_gradient_asks_for_no_parameters() -> None:
    """A backward for dx and dshortcut alone has the same view as its forward."""
    x = jax.ShapeDtypeStruct((3, 4, 5), "float32")
    norm = Norm((1, 2), (2,))
    forward = Call("forward", norm, x, shortcut=x)
    wanted = True, False, False, True
    backward = Call("backward", norm, x, dy=x, shortcut=x, wanted=wanted)
    assert backward.geometry == forward.geometry
    assert backward.geometry.family == "rowwise"


def test_a_parameters_gradient_has_the_view_of_its_forward() -> None:
    """This holds even for a bias, which the backward does not read."""
    x, param = (jax.ShapeDtypeStruct(s, "float32") for s in ((3, 4, 5), (5,)))
    norm = Norm((1, 2), (2,))
    forward = Call("forward", norm, x, bias=param)
    backward = Call("backward", norm, x, dy=x, wanted=(True, False, True, False))
    assert backward.geometry == forward.geometry
    assert backward.geometry.family == "channelwise"


@pytest.mark.parametrize(
    ("version", "platform"), [("rocm 60300", "rocm"), ("cuda 12090", "cuda")]
)
def test_gpus_of_both_makers(
    version: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert Target.default().platforms == (platform,)


@pytest.mark.parametrize(
    ("op", "name", "said"),
    [
        ("forward", "bias", "bias"),
        ("forward", "addend", "residual"),
        ("forward", "shortcut", "shortcut"),
        ("backward", "dy", "dy"),
        ("backward", "addend", "dh"),
        ("backward", "shortcut", "shortcut"),
    ],
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_operands_of_other_dtypes_are_refused(
    platform: str, op: str, name: str, said: str
) -> None:
    x, wide = (jax.ShapeDtypeStruct((8, 24), t) for t in ("float32", "float64"))
    given = {"dy": x} if op == "backward" else {}
    asked = Call(op, Norm((1,), (1,)), x, **{**given, name: wide})  # type: ignore[arg-type]
    assert dispatch.plan(asked, Target((platform,))) == Fallback(
        f"float64 {said}; kernels take float32, bfloat16 or float16"
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_xla_partitions_without_asking_is_for_no_kernel(platform: str) -> None:
    asked = Call("forward", Norm((1,), (1,)), jax.ShapeDtypeStruct((8, 24), "float32"))
    answer = dispatch.plan(asked, Target((platform,), 8))
    assert isinstance(answer, Fallback)
    assert answer.reason.startswith("XLA partitions this call over 8 devices; a kernel")
    assert isinstance(dispatch.plan(asked, Target((platform,), 8, True)), Kernel)


def test_each_elements_own_scale_does_not_cross_devices() -> None:
    x = jax.ShapeDtypeStruct((8, 24), "float32")
    asked = Call("forward", Norm((1,), (1,), axis_names=("d",)), x, scale=x)
    for platform in ("cuda", "tpu"):
        answer = dispatch.plan(asked, Target((platform,)))
        assert isinstance(answer, Fallback)
        assert "each element has its own scale" in answer.reason


def test_the_device_that_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` gets this device if the process has none of the platform."""
    seen: list[Any] = []
    monkeypatch.setattr(tpu, "plan", lambda _, device: seen.append(device))
    asked = Call("forward", Norm((1,), (1,)), jax.ShapeDtypeStruct((8, 24), "float32"))
    elsewhere = Device("TPU7x", num_cores=2)
    with dispatch.compiling_for(elsewhere):
        dispatch.plan(asked, Target(("tpu",)))
    dispatch.plan(asked, Target(("tpu",)))
    assert seen == [elsewhere, None]


def test_whom_xla_asks() -> None:
    """XLA asks everywhere but on a TPU (`custom_partitioning`), if there are parts."""
    assert dispatch.asks(("cuda",), 4)
    assert not dispatch.asks(("cuda",), 1)
    assert not dispatch.asks(("tpu",), 4)
    assert not dispatch.asks(("cuda", "tpu"), 4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_half_of_a_call_reads_nothing_for_its_other_half(platform: str) -> None:
    """A forward's half reads no scale, bias or shortcut; a backward's reads no dh."""
    x = jax.ShapeDtypeStruct((8, 256, 320), "bfloat16")
    param = jax.ShapeDtypeStruct((320,), "float32")
    norm = Norm((0, 1), (2,), axis_names=("d",), dtype=jnp.dtype("bfloat16"))

    def moved(**given: Any) -> int:
        op = "backward" if "dy" in given else "forward"
        answer = dispatch.plan(Call(op, norm, x, **given), Target((platform,)), "auto")  # type: ignore[arg-type]
        assert isinstance(answer, Kernel)
        return answer.bytes_moved

    assert moved() == moved(scale=param, bias=param, shortcut=x)
    assert moved(dy=x, scale=param) == moved(dy=x, scale=param, addend=x)
    behind = {"dy": x, "scale": param, "shortcut": x}
    assert moved(**behind) == moved(**behind, wanted=(True, True, True, True))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda: fusednorm.layer_norm(X.astype("complex64")), "complex numbers"),
        (
            lambda: jax.jit(lambda e: fusednorm.layer_norm(X, epsilon=e))(1e-5),
            "an epsilon that the program computes",
        ),
        (
            lambda: jax.vmap(
                lambda x: fusednorm.layer_norm(x, axis_name="d"), axis_name="d"
            )(X),
            "statistics that cross an axis of jax.vmap",
        ),
    ],
    ids=["complex", "epsilon", "vmap"],
)
def test_what_is_no_primitive_is_refused_by_name(
    run: Callable[[], jax.Array], why: str
) -> None:
    with (
        fusednorm.use_backend("mosaic_gpu"),
        pytest.raises(NotImplementedError, match=f"'mosaic_gpu' was named.*{why}"),
    ):
        run()
    run()
