"""Tests of the benchmarks: bytes, float64, the gate, and whole runs on tiny input."""

import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm

for module in ("matplotlib", "optax", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(module)

from bench import __main__ as cli  # noqa: E402
from bench import (  # noqa: E402
    peers,
    peers_run,
    provenance,
    truth,
)
from bench.aot import hlo, scaling  # noqa: E402
from bench.aot.sharded import Sharded  # noqa: E402
from bench.cases import CASES, Block, Case, draw  # noqa: E402
from bench.contest import (  # noqa: E402
    HALVES,
    PASSES,
    Contest,
    by_kernel,
    copy_of,
    on_device,
    passes,
)
from bench.models.small import MODELS, Transformer  # noqa: E402

CASE = {case.name: case for case in CASES}
TINY = 1e4  # bytes of x


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("llama3_8b", (2, 3)),
        ("sd_unet_64", (2, 3)),
        ("sd_unet_gn_silu", (2, 3)),
        ("i2vgen_xl_90", (2, 3)),
        ("style_64", (2, 3)),
        ("resnet50_conv2", (3, 5)),
        ("llama3_8b_add_rms", (4, 4)),
        ("resnet50_bn_add_relu", (4, 7)),
        ("resnet50_conv_bn_relu", None),
    ],
)
def test_floor(name: str, floor: tuple[int, int] | None) -> None:
    assert CASE[name].floor == floor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensors_have_the_bytes_asked_for(case: Case) -> None:
    shape = case.shape(12e6)
    assert shape[1:] == case.sample
    widest = (*shape[:-1], max(shape[-1], case.conv or 0))
    nbytes = np.prod(widest) * jnp.dtype(case.dtype).itemsize
    if shape[0] > 1:
        assert 8e6 < nbytes < 16e6
    else:
        assert nbytes == case.sample_bytes > 6e6


@pytest.fixture(params=[False, True], ids=["numpy", "jax"])
def of_jax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Selects NumPy or jax to compute in float64. Provides whether it is jax."""
    monkeypatch.setattr(truth, "on_device", lambda: request.param)
    return bool(request.param)


def small(name: str) -> Case:
    """Returns a case like the named one, on samples of few pixels and channels."""
    case = CASE[name]
    return dataclasses.replace(
        case,
        sample=(*(3 for _ in case.sample[:-1]), 64),
        dtype="float32",
        conv=None if case.conv is None else 5,
    )


@pytest.mark.parametrize(
    "name",
    [
        "vit_b_16",
        "llama3_1b",
        "resnet50_conv2",
        "sd_unet_64",
        "style_64",
        "resnet50_conv_bn_relu",
        "resnet50_bn_add_relu",
        "sd_unet_gn_silu",
        "llama3_8b_add_rms",
        "dit_xl_2_adaln",
    ],
)
def test_truth_is_flax_in_float64(name: str, of_jax: bool) -> None:
    case = small(name)
    block = Block(case, nnx.Rngs(0))
    inputs, cotangents = draw(case, TINY)
    done = truth.forward(block, inputs)
    grads = truth.backward(block, done, cotangents)
    kind = jax.Array if of_jax else np.ndarray
    assert all(isinstance(a, kind) and a.dtype == np.float64 for a in grads.values())

    with jax.enable_x64(True):
        for layer in (block.norm, getattr(block, "conv", None)):
            if layer is not None:
                layer.dtype = jnp.dtype("float64")
        graph, params, *rest = nnx.split(block, nnx.Param, ...)
        params, rest, inputs, cotangents = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)),
            (nnx.to_pure_dict(params), rest, inputs, cotangents),
        )

        def run(params: Any, inputs: Any) -> Any:
            return nnx.merge(graph, nnx.State(params), *rest, copy=True)(*inputs)

        outputs, vjp = jax.vjp(run, params, inputs)
        dparams, dinputs = vjp(cotangents)
    expected = {"dx": dinputs[0]}
    for param, gradient in dparams.get("norm", {}).items():
        expected[f"d{param}"] = gradient
    if case.residual == "after":
        expected["dresidual"] = dinputs[1]
    if case.modulated:
        expected |= {"dscale": dinputs[1], "dbias": dinputs[2]}
    if case.conv is not None:
        expected["dkernel"] = dparams["conv"]["kernel"]
    assert grads.keys() == expected.keys()
    assert done.outputs.keys() == outputs.keys()
    for key, value in (expected | outputs).items():
        ours = (grads | done.outputs)[key]
        np.testing.assert_allclose(ours, value, rtol=1e-9, atol=1e-9, err_msg=key)


def test_cotangents_are_zero_at_kinks_alone() -> None:
    case = small("resnet50_bn_add_relu")
    block = Block(case, nnx.Rngs(0))
    inputs, cotangents = draw(case, TINY)
    done = truth.forward(block, inputs)
    dy = truth.away_from_kinks(case, done, cotangents)["y"]
    np.testing.assert_array_equal(dy == 0, np.abs(done.z) <= truth.KINK)
    assert 0.9 < np.mean(dy != 0) < 1


# --- the gate -------------------------------------------------------------------------


def results(dtype: str) -> tuple[dict[str, jax.Array], dict[str, truth.Array]]:
    """Returns a right result, rounded to dtype, and the truth."""
    true = np.random.default_rng(0).standard_normal((64, 128))
    return {"dx": jnp.asarray(true, dtype)}, {"dx": true}


@pytest.mark.usefixtures("of_jax")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_lets_a_right_result_through(dtype: str) -> None:
    right, true = results(dtype)
    off_by_one = {"dx": jnp.nextafter(right["dx"], jnp.inf).astype(dtype)}
    record = truth.check("fusednorm", right, right, true)
    assert record["dx"]["flax"] == record["dx"]["fusednorm"]
    if dtype == "float32":
        truth.check("fusednorm", right, off_by_one, true)


@pytest.mark.usefixtures("of_jax")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 1.02,
        lambda x: x * 0.98,
        jnp.zeros_like,
        lambda x: x.at[3, 5].add(0.1),
        lambda x: x.at[3, 5].set(jnp.nan),
        lambda x: jnp.roll(x, 1, axis=0),
    ],
    ids=["gain", "loss", "zeros", "element", "nan", "shifted"],
)
def test_gate_is_red_on_a_wrong_result(
    dtype: str, spoil: Callable[[jax.Array], jax.Array]
) -> None:
    right, true = results(dtype)
    wrong = {"dx": spoil(right["dx"]).astype(dtype)}
    with pytest.raises(truth.GateError, match="dx is wrong"):
        truth.check("fusednorm", right, wrong, true)


# --- the clock of a GPU ---------------------------------------------------------------


def test_seconds_by_kernel() -> None:
    """CUPTI's milliseconds become seconds, summed over the launches of a kernel."""
    timings = [("sums", 0.5), ("combine", 0.25), ("sums", 1.0)]
    assert by_kernel(timings) == {"sums": 1.5e-3, "combine": 0.25e-3}


@pytest.mark.gpu
def test_device_clock() -> None:
    """Each call is a sample. Four times the bytes take about four times as long."""
    turns = [("small", copy_of(2**28)), ("large", copy_of(2**30))]
    samples, kernels = on_device(turns, rounds=5, calls=3)
    assert {name: len(each) for name, each in samples.items()} == dict.fromkeys(
        ("small", "large"), 15
    )
    # Compare minima, since other tests run on the same GPU meanwhile.
    assert 3 < min(samples["large"]) / min(samples["small"]) < 5
    for name, each in samples.items():
        (median,) = kernels[name].values()  # one kernel
        assert median == pytest.approx(np.median(each))


# --- the command line -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides pytest-xdist, which runs these tests: pytest-benchmark would refuse it."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def run(out: pathlib.Path, *cases: str) -> int:
    return cli.main(["--quick", "--out", str(out), "--cases", *cases])


def test_a_run(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two cases and two timed steps of training give a table, JSON and a chart."""
    monkeypatch.setitem(MODELS, "tiny", lambda rngs: Transformer(rngs, 64, depth=1))
    assert run(tmp_path, "tiny", "llama3_1b", "resnet50_conv5") == 0

    printed = capsys.readouterr().out
    assert "CPU: reference path" in printed
    for word in ("tiny", "llama3_1b", "resnet50_conv5", "fwd+bwd", "geometric mean"):
        assert word in printed
    assert "4 LayerNorm, 1 RMSNorm fused, 0 left" in printed

    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = path.read_text()
    assert platform.node() not in text
    assert not any(
        str(p) in text for p in (tmp_path, pathlib.Path(cli.__file__).parent)
    )

    record = json.loads(text)
    assert record["versions"]["jax"] == jax.__version__
    assert record["failures"] == []
    assert "absent" not in record
    (training,) = record["training"]
    assert training["fused"] == {"fusednorm.LayerNorm": 4, "fusednorm.RMSNorm": 1}
    assert sum(training["ran"].values()) == 10  # forward and backward of each
    assert len(training["flax_losses"]) == len(training["fused_losses"]) == 3
    assert training["loss_difference"] < 1e-5
    assert training["gradient_difference"] < 1e-5
    (tracing,) = record["tracing"]
    assert tracing["ratio"] > 0

    assert len(record["results"]) == 4
    for result in record["results"]:
        nbytes = np.prod(result["shape"]) * 4
        floors = {"llama3_1b": (2, 5), "resnet50_conv5": (3, 8)}[result["case"]]
        floor = floors[result["which"] == "forward+backward"]
        assert result["floor_bytes"] == floor * nbytes
        assert result["copy_bytes"] == 2 * nbytes
        assert result["backend"] == "reference"
        assert result["clock"] == "host"
        for who in ("flax", "fusednorm", "copy"):
            times = result[who]
            assert 0 < times["p10"] <= times["p50"] <= times["p90"]
        assert result["ratio"] == result["fusednorm"]["p10"] / result["flax"]["p10"]
        assert result["rate"] == result["floor_bytes"] / result["fusednorm"]["p10"]
        assert result["share"] == pytest.approx(result["rate"] / result["copy_rate"])
        assert {"y, forward", "dx, forward+backward"} <= result["errors"].keys()
        assert result["memory"]["fusednorm"] > nbytes  # y at least
        assert result["peers"] == {}


# One case per kind of block. HALVES compile code that the other passes do not.
KINDS_OF_BLOCKS = (
    "alphafold_pair_64",
    "resnet50_conv3",
    "cyclegan_256",
    "sd_unet_gn_silu",
    "resnet50_conv_bn_relu",
    "resnet50_bn_add_relu",
    "llama3_8b_add_rms",
    "dit_xl_2_adaln",
)


def few_pixels(name: str) -> Case:
    """Returns the case on samples of few pixels, with its own channels and dtype."""
    case = CASE[name]
    pixels = (min(3, size) for size in case.sample[:-1])
    return dataclasses.replace(case, sample=(*pixels, case.sample[-1]))


@pytest.mark.parametrize("name", KINDS_OF_BLOCKS)
def test_every_pass_of_every_block_is_right(name: str) -> None:
    """The gate compares each result of each pass with its truth in float64."""
    case = few_pixels(name)
    found = Contest(case, 1e5, (*PASSES, *HALVES))
    results = {"y", *(("h",) if case.residual == "before" else ())}
    assert {key for key in found.errors if key.endswith(", forward")} == {
        f"{result}, forward" for result in results
    }
    gradients = {"dx", "dscale"}
    if case.residual == "after":
        gradients.add("dresidual")
    if case.conv is not None:
        gradients.add("dkernel")
    if case.norm is not nnx.RMSNorm:
        gradients.add("dbias")
    assert {key for key in found.errors if key.endswith(", backward")} == {
        f"{result}, backward" for result in gradients
    }
    for key in gradients | results:
        assert f"{key}, forward+backward" in found.errors


def test_a_sum_is_taken_as_it_is_rounded(of_jax: bool) -> None:
    """h is stored as an array in bfloat16, and the norm reads this array."""
    block = Block(few_pixels("llama3_8b_add_rms"), nnx.Rngs(0))
    (x, residual), _ = draw(block.case, 1e5)
    done = truth.forward(block, (x, residual))
    exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
    np.testing.assert_array_equal(done.outputs["h"], exact)
    h = np.asarray(x.astype("float32") + residual.astype("float32"), "bfloat16")
    h = h.astype(np.float64)
    rms = np.sqrt((h * h).mean(-1, keepdims=True) + block.norm.epsilon)
    x_hat = np.asarray(done.x_hat).reshape(h.shape)
    off = np.abs(x_hat - h / rms).max(-1)
    # A float32 sum rounds twice: one element in thousands differs in the last place.
    assert np.median(off) < 1e-12
    assert np.abs(x_hat - exact / rms).max() > 1e-3


# --- peers ----------------------------------------------------------------------------


class Plain:
    """A peer that stands for another library: RMSNorm in jax.numpy."""

    name = "plain"
    gain = 1.0

    def passes(self, block: Any, inputs: Any, cotangents: Any, wanted: Any) -> Any:
        if not isinstance(block.norm, nnx.RMSNorm):
            raise peers.UnsupportedError("no such norm")
        mine = nnx.clone(block)
        mine.norm = PlainNorm(block.norm.scale, self.gain)
        return passes(mine, inputs, cotangents, wanted)

    def read(self, found: Any) -> Any:
        return found


class PlainNorm(nnx.Module):
    def __init__(self, scale: Any, gain: float):
        self.scale, self.gain = scale, gain

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype("float32")
        rstd = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)
        return (self.gain * wide * rstd * self.scale[...]).astype(x.dtype)


def absent() -> Any:
    raise ImportError("No module named 'nowhere'\nand more")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {"plain": Plain, "nowhere": absent})
    monkeypatch.setattr(peers_run, "PEERS", peers.PEERS)


def run_peers(out: pathlib.Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["peers", "--quick", "--out", str(out), *arguments])
    found = list(out.glob("*-peers-*.json"))
    return code, json.loads(found[0].read_text()) if found else {}


@pytest.mark.usefixtures("plain")
def test_peers(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer has figures for the norms that it supports. Absent peers are named."""
    given = ("--cases", "decode_rms_4096", "few_rows_768", "--passes", "backward")
    code, record = run_peers(tmp_path, *given)
    assert code == 0
    assert record["absent"] == {"nowhere": "ImportError: No module named 'nowhere'"}
    rms, layer = record["results"]
    assert (rms["case"], rms["which"]) == ("decode_rms_4096", "backward")
    assert rms["peers"].keys() == {"plain"}
    assert rms["peers_without"] == {}
    assert rms["peers"]["plain"]["p10"] > 0
    assert rms["errors"]["dx, backward"].keys() == {"flax", "fusednorm", "plain"}
    assert layer["peers"] == {}
    assert layer["peers_without"] == {"plain": "UnsupportedError: no such norm"}
    over = rms["fusednorm"]["p10"] / rms["peers"]["plain"]["p10"]
    assert record["against_peers"] == {
        "plain": {
            "backward": {
                "cases": 1,
                "geometric_mean": pytest.approx(over),
                "worst": over,
                "worst_case": "decode_rms_4096",
            }
        }
    }
    assert record["peer_versions"] == peers.versions()
    printed = capsys.readouterr().out
    for words in (
        "absent: nowhere: ImportError: No module named 'nowhere'",
        "no figure: plain: UnsupportedError: no such norm: few_rows_768",
        "plain, backward: geometric mean",
    ):
        assert words in printed


@pytest.mark.usefixtures("plain")
def test_a_wrong_peer_has_no_figure(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer loses its figure, but flax and fusednorm keep theirs."""
    monkeypatch.setattr(Plain, "gain", 1.1)
    given = ("--cases", "decode_rms_4096", "--passes", "forward")
    code, record = run_peers(tmp_path, *given)
    assert code == 0
    (result,) = record["results"]
    assert result["peers"] == {}
    assert result["peers_without"]["plain"].startswith("GateError: y is wrong")


@pytest.mark.usefixtures("plain")
def test_peers_go_on_where_they_stopped(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.report.commit", lambda: "a" * 40)
    given = ("--cases", "decode_*", "--passes", "forward")
    code, record = run_peers(tmp_path, *given, "--seconds", "0")
    assert (code, record) == (0, {})
    assert "no time was left for decode_rms_4096" in capsys.readouterr().out

    _, record = run_peers(tmp_path, "--cases", "decode_rms_4096", *given[2:])
    (first,) = record["results"]
    _, record = run_peers(tmp_path, *given)
    assert [r["case"] for r in record["results"]] == [
        "decode_rms_4096",
        "decode_qk_norm",
    ]
    assert record["results"][0] == first  # not timed anew
    assert "1 figures are there already" in capsys.readouterr().out

    _, record = run_peers(tmp_path, *given, "--again")
    assert record["results"][0] != first
    monkeypatch.setattr("bench.report.commit", lambda: "b" * 40)
    _, record = run_peers(tmp_path, "--cases", "decode_qk_norm", *given[2:])
    assert [r["case"] for r in record["results"]] == ["decode_qk_norm"]


def test_peers_that_need_a_gpu_say_so() -> None:
    found, absent = peers.present(["cudnn"])
    if jax.default_backend() == "gpu":
        assert [peer.name for peer in found] == ["cudnn"]
    else:
        assert absent == {"cudnn": "RuntimeError: its kernels are for GPUs"}


@pytest.mark.gpu  # machines with a GPU have PyTorch
@pytest.mark.parametrize(
    "name", [name for name in KINDS_OF_BLOCKS if CASE[name].conv is None]
)
def test_torch_functions_are_the_norms(name: str) -> None:
    """The code that a PyTorch user would write agrees with flax's, block by block."""
    pytest.importorskip("torch")
    case = few_pixels(name)
    (torch_peer,), _ = peers.present(["torch"])
    found = Contest(case, 1e5, (*PASSES, *HALVES), [torch_peer])
    assert found.failures == {}
    for result in ("dx", "dscale"):
        assert "torch" in found.errors[f"{result}, backward"]


@pytest.mark.parametrize("gain", [1.02, 0.0])
def test_a_wrong_layer_has_no_figure(
    gain: float,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = fusednorm.RMSNorm.__call__
    monkeypatch.setattr(
        fusednorm.RMSNorm, "__call__", lambda self, x: gain * right(self, x)
    )
    assert run(tmp_path, "llama3_1b") == 1
    printed = capsys.readouterr().out
    assert "FAILED, no figure: llama3_1b: " in printed
    assert "ratio" not in printed
    assert not list(tmp_path.iterdir())


class Tiny(nnx.Module):
    """The smallest model that trains on digits and has a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.silu(self.norm(self.embed(images.reshape(-1, 64)))))


def test_a_wrong_layer_stops_training(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = fusednorm.LayerNorm.__call__
    monkeypatch.setattr(
        fusednorm.LayerNorm, "__call__", lambda self, x: 1.02 * right(self, x)
    )
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    assert run(tmp_path, "tiny") == 1
    assert "FAILED, no figure: tiny: training differs" in capsys.readouterr().out


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--cases", "nothing"]) == 2
    assert "no case is named nothing" in capsys.readouterr().out


def test_large_cases_are_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "sd_vae_512", "i2vgen_xl_90") == 2
    printed = capsys.readouterr().out
    assert "left out, a sample is above 24 MB: sd_vae_512, i2vgen_xl_90" in printed
    assert not list(tmp_path.iterdir())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list", "--dtypes", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "llama3_8b " in printed
    assert "vit_b_16" not in printed


def test_roofline_is_a_command_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["roofline", "--help"])
    assert stopped.value.code == 0
    assert "predicts" in capsys.readouterr().out


class Here:
    """A stand-in for `Elsewhere` that works in this process, without a compiler."""

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _counted(
    chip: Any,
    name: str,
    shape: tuple[int, ...],
    on: str,
    sharding: str,
    mode: str,
    *,
    fused: bool,
) -> Sharded:
    """Returns made-up figures in place of `sharded.layer`.

    flax's tensor-parallel layers raise, and ours do not compile for a slice of 256.
    """
    if sharding == "tensor" and not fused:
        raise ValueError("of the sharding")
    if on == "v5e:16x16" and fused:
        raise RuntimeError("no room")
    kernel = hlo.Kernel("k", "custom-call", "mosaic_gpu_v2", 8)
    gathered = (("all-gather", 4096),) * (on == "1x8x8")
    return Sharded((kernel,) * 2, (("all-reduce", 8 * shape[-1]), *gathered))


def test_scaling(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "COMPILERS", ("jax",))
    monkeypatch.setattr(scaling, "Elsewhere", Here)
    monkeypatch.setattr(scaling, "layer", _counted)
    path = tmp_path / "new" / "scaling.json"
    layers = ["--layers", "LayerNorm", "GroupNorm", "--json", str(path)]
    assert (
        cli.main(["scaling", "--chips", "H100", "--devices", "8", "64", *layers]) == 0
    )
    printed = capsys.readouterr().out
    assert "no time is measured" in printed
    lines = [line.split() for line in printed.splitlines()]
    # x; bytes of flax on 8 and 64 devices, and ours; operations of flax, and ours; our
    # kernels
    data = "8192K 8.0K 12.0K 8.0K 12.0K 1R, 1R 1G 1R, 1R 1G 2"
    tensor = "8192K raises raises 8.0K 68.0K 1R, 1R 1G 2"
    assert lines.count(["LayerNorm", "data", *data.split()]) == 2  # one table per mode
    assert lines.count(["LayerNorm", "tensor", *tensor.split()]) == 2
    assert "raises: H100, auto mode, 64 devices: GroupNorm, tensor, flax's" in printed

    record = json.loads(path.read_text())
    assert record["what"] == scaling.COUNTED
    assert record["versions"].keys() == {"jax"}
    assert [chip["name"] for chip in record["chips"]] == ["H100"]
    assert record["failures"] == {}
    assert len(record["raises"]) == 8
    assert len(record["cells"]) == 2 * 2 * 4 * 2 * 2 - 8
    (cell,) = (
        cell
        for cell in record["cells"]
        if cell["mode"] == "Auto" and cell["sharding"] == "tensor"
        if cell["layer"] == "LayerNorm" and cell["devices"] == 64
    )
    assert cell == {
        "chip": "H100",
        "mode": "Auto",
        "layer": "LayerNorm",
        "sharding": "tensor",
        "devices": 64,
        "fused": True,
        "topology": "1x8x8",
        "shape": [64, 512, 8192],
        "dtype": "bfloat16",
        "part": 2 * 64 * 512 * 128,
        "kernels": 2,
        "crossing": 69632,
        "collectives": [["all-reduce", 65536], ["all-gather", 4096]],
    }

    assert cli.main(["scaling", "--chips", "v5e", "--devices", "256", *layers]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: v5e, explicit mode, 256 devices: LayerNorm, data, ours" in printed
    assert "left out: v5e, explicit mode: GroupNorm" in printed
    assert "left out: v5e, auto mode" in printed
