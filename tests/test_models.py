"""Whole models before and after fuse(): their sizes, the gate, and the command."""

import dataclasses
import json
import math
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm

for module in ("matplotlib", "optax", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(module)

import optax  # type: ignore[import-untyped]  # noqa: E402

from bench import __main__ as cli  # noqa: E402
from bench import report, whole, whole_run  # noqa: E402
from bench.models import llama, parts  # noqa: E402
from bench.models.registry import WORKLOADS, Workload  # noqa: E402
from bench.truth import GateError  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses SGD, because Adam's ten operations per parameter take long to compile."""
    monkeypatch.setattr(whole, "OPTIMIZER", optax.sgd(2e-3))


# --- sizes ----------------------------------------------------------------------------


def _embedding_and(layers: int, layer: int) -> int:
    return 128256 * 2048 + layers * layer + 2048


# Parameter counts as published, or computed from published sizes: nobody states the sum
# for the pair half of an Evoformer block.
PARAMETERS = {
    "resnet50": 25_557_032,  # torchvision
    "vit": 86_567_656,  # torchvision
    # 2 norms, queries and outputs, keys and values, 3 MLP layers; norms of 64 features.
    "llama": _embedding_and(
        16,
        2 * 2048 + 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 64,
    ),
    "unet": 859_520_964,  # diffusers
    "pair": 4
    * (
        2 * (2 * 256 + 6 * (128 * 128 + 128))
        + 2 * (256 + 3 * 128 * 128 + 128 * 4 + 2 * (128 * 128 + 128))
        + (256 + 128 * 512 + 512 + 512 * 128 + 128)
    )
    + 128 * 64
    + 64,
}
NORMS = {
    "resnet50": {"BatchNorm": 53},
    "vit": {"LayerNorm": 25},
    "llama": {"RMSNorm": 4 * 16 + 1},
    "unet": {"GroupNorm": 2 * 22 + 16 + 1, "LayerNorm": 3 * 16},
    "pair": {"LayerNorm": 7 * 4},
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_size(name: str) -> None:
    workload = next(w for w in WORKLOADS if w.name == name)
    model = nnx.eval_shape(lambda: workload.model("real", "bfloat16"))
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(p.shape) for p in params) == PARAMETERS[name]
    assert {p.dtype for p in params} == {jnp.dtype("float32")}
    layers = [module for _, module in nnx.iter_modules(model)]
    assert {m.dtype for m in layers if hasattr(m, "dtype")} == {"bfloat16"}
    report = fusednorm.fuse(model)
    assert report.left == ()
    found = Counter(after.removeprefix("fusednorm.") for *_, after in report.replaced)
    assert found == NORMS[name]


def test_llama_is_published_but_for_its_norms_of_heads() -> None:
    assert PARAMETERS["llama"] - 16 * 2 * 64 == 1_235_814_400


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_what_it_computes(workload: Workload) -> None:
    """At real size, a workload returns a float32 loss or bfloat16 outputs."""
    model = nnx.eval_shape(lambda: workload.model("real", "bfloat16"))
    examples = jax.eval_shape(lambda: workload.examples("real", "bfloat16"))
    graph, state = nnx.split(model)
    result = jax.eval_shape(
        lambda state, examples: workload.run(nnx.merge(graph, state), *examples),
        state,
        examples,
    )
    if workload.which == "training step":
        assert (result.shape, result.dtype) == ((), jnp.float32)
    elif workload.which == "forward":
        assert (result.shape, result.dtype) == ((2, 64, 64, 4), jnp.bfloat16)
    else:
        logits, caches = result
        assert (logits.shape, logits.dtype) == ((8, 1, 128256), jnp.bfloat16)
        assert len(caches) == 16
        assert caches[0][0].shape == (8, 2048, 8, 64)


# --- the models are right -------------------------------------------------------------


def test_decoding_is_what_training_sees() -> None:
    """Decoding token by token with a cache gives the logits of the whole sequence."""
    model = llama.Llama(llama.TINY, "float32", nnx.Rngs(0))
    tokens, _ = llama.inputs(llama.TINY, 2, "float32", nnx.Rngs(1))
    tokens = tokens[:, :5]
    _, _, caches = llama.decode_inputs(llama.TINY, 2, "float32", nnx.Rngs(2))
    step = nnx.jit(llama.decode)
    for position in range(5):
        token = tokens[:, position : position + 1]
        logits, caches = step(model, token, jnp.int32(position), caches)
    expected = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_attention_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attention(q: Any, k: Any, v: Any, *, implementation: str) -> Any:
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    x = jnp.zeros((1, 3, 2, 4))
    with parts.use_attention("cudnn"):
        parts.attend(x, x, x)
    parts.attend(x, x, x)
    assert asked == ["cudnn", "xla"]


# --- the gate -------------------------------------------------------------------------

JOINED = {  # what fuse_neighbours moves into the norms of each tiny model
    "resnet50, training step": ("activation", "shortcut"),
    "llama, training step": ("residual",),
    "llama, decode": (),
    "unet, forward": ("activation",),
    "unet, training step": ("activation", "residual"),
    "pair, training step": ("residual",),
}


# ViT is left out because it runs from the command line below. The UNet is marked slow
# because it takes 20 to 40 seconds to compile.
AGREE = [
    pytest.param(workload, marks=[pytest.mark.slow] * (workload.name == "unet"))
    for workload in WORKLOADS
    if workload.name != "vit"
]


@pytest.mark.parametrize("workload", AGREE, ids=str)
def test_contestants_agree(workload: Workload) -> None:
    """Contestants agree on three training losses, which fall, or on the outputs."""
    with jax.default_matmul_precision("float32"):
        contest = whole.Contest(workload, "tiny", others=["neighbours"])
    off, limit = contest.check(3)
    assert off <= limit == 1e-4
    assert contest.report.left == ()
    if workload.which == "training step":
        losses = contest.results("neighbours", 3)
        assert losses[0] > losses[1] > losses[2]
    assert all(step.memory > 0 for step in contest.steps.values())
    norms = len(contest.report.replaced)
    twice = 2 if workload.which == "training step" else 1
    again = norms - 1 if str(workload) == "llama, training step" else 0  # remat
    choices = contest.choices("neighbours")
    assert len(choices) == twice * norms + again
    joined = {
        what
        for choice in choices
        for what in ("activation", "shortcut", "residual")
        if getattr(choice, what)
    }
    assert joined == set(JOINED[str(workload)])


@dataclasses.dataclass(frozen=True)
class Depth:
    """The config of `Tiny`: its number of norms."""

    depth: int = 1


class Tiny(nnx.Module):
    """The smallest model that has norms."""

    def __init__(self, config: Depth, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Linear(16, 32, dtype=dtype, rngs=rngs)
        self.norms = nnx.List(
            nnx.LayerNorm(32, dtype=dtype, rngs=rngs) for _ in range(config.depth)
        )
        self.head = nnx.Linear(32, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for norm in self.norms:
            x = nnx.silu(norm(x))
        return self.head(x)


def _inputs(config: Any, batch: int, dtype: Any, rngs: nnx.Rngs) -> tuple[Any, ...]:
    x = jax.random.normal(rngs(), (batch, 16), jnp.dtype(dtype))
    return x, jax.random.randint(rngs(), (batch,), 0, 10)


def _loss(model: Tiny, x: jax.Array, labels: jax.Array) -> jax.Array:
    return parts.cross_entropy(model(x), labels)


TINY = Workload(
    name="tiny",
    which="training step",
    build=Tiny,
    inputs=_inputs,
    run=_loss,
    sizes={"tiny": Depth()},
    batch={"tiny": 64},
)
FORWARD = dataclasses.replace(
    TINY, which="forward", run=lambda model, x, labels: model(x)
)


def spoil(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[jax.Array], jax.Array]
) -> None:
    """Applies `wrong` to the result of our LayerNorm."""
    right = fusednorm.LayerNorm.__call__
    monkeypatch.setattr(
        fusednorm.LayerNorm, "__call__", lambda self, x: wrong(right(self, x))
    )


@pytest.mark.parametrize("workload", [TINY, FORWARD], ids=["loss", "output"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_lets_right_norms_through(workload: Workload, dtype: str) -> None:
    off, limit = whole.Contest(workload, "tiny", dtype, ["fusednorm"]).check(3)
    assert off <= limit
    if dtype == "bfloat16":
        assert 1e-4 < limit < 0.1
    else:
        assert limit == 1e-4


@pytest.mark.parametrize(
    ("workload", "dtype", "wrong"),
    [
        (TINY, "float32", lambda y: 1.02 * y),
        (TINY, "float32", lambda y: y.at[0, 0].set(jnp.nan)),
        (TINY, "bfloat16", lambda y: 1.1 * y),
        (FORWARD, "bfloat16", lambda y: 1.1 * y),
        (FORWARD, "bfloat16", lambda y: jnp.roll(y, 1, axis=0)),
    ],
)
def test_gate_is_red_on_a_wrong_norm(
    workload: Workload,
    dtype: str,
    wrong: Callable[[jax.Array], jax.Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, wrong)
    contest = whole.Contest(workload, "tiny", dtype, ["fusednorm"])
    what = "loss" if workload is TINY else "output"
    with pytest.raises(GateError, match=f"fusednorm: the {what} differs"):
        contest.check(3)


def test_gate_is_red_on_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loss is right, but the losses after a training step are not."""
    spoil(monkeypatch, lambda y: 2 * y - jax.lax.stop_gradient(y))
    contest = whole.Contest(TINY, "tiny", others=["fusednorm"])
    assert contest.check(1)[0] <= 1e-4
    with pytest.raises(GateError, match="the loss differs"):
        contest.check(3)


# --- the command line -----------------------------------------------------------------

QUICK = whole.Effort.quick()


def run(out: pathlib.Path, *arguments: str) -> int:
    return cli.main(["models", "--quick", "--out", str(out), *arguments])


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Returns a function that sets which commit seems to be checked out."""

    def put(name: str | None) -> None:
        monkeypatch.setattr(report, "commit", lambda: name)

    put("abc")
    return put


def load(out: pathlib.Path) -> Any:
    (path,) = out.glob("*-models-*.json")
    return json.loads(path.read_text())


def test_a_run(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_run, "WORKLOADS", (TINY,))
    monkeypatch.setattr(whole_run, "_LLAMA", TINY)
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tiny, training step: 1 LayerNorm fused, 0 left" in printed
    assert "2 x reference: CPU" in printed
    assert "Neighbours: 2 activation" in printed
    assert "neighbours: geometric mean" in printed
    assert "Before a training step runs" in printed

    record = load(tmp_path)
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(pathlib.Path(cli.__file__).parent) not in text
    assert record["versions"]["jax"] == jax.__version__
    assert record["device"]["platform"] == "cpu"
    assert record["failures"] == {}
    (one,) = record["models"]
    assert (one["model"], one["which"], one["size"]) == (
        "tiny",
        "training step",
        "tiny",
    )
    assert (one["batch"], one["dtype"], one["attention"]) == (64, "float32", "xla")
    for name in ("flax", "fusednorm", "neighbours"):
        assert 0 < one[name]["p10"] <= one[name]["p50"] <= one[name]["p90"]
        assert one["memory"][name] > 0
    assert one["ratio"] == one["fusednorm"]["p10"] / one["flax"]["p10"]
    assert one["ratio_neighbours"] == one["neighbours"]["p10"] / one["flax"]["p10"]
    assert one["loss_difference"] <= one["limit"]
    assert one["fused"] == {"fusednorm.LayerNorm": 1}
    assert sum(one["ran"]["fusednorm"].values()) == 2
    assert one["joined"] == {"activation": 2, "shortcut": 0, "residual": 0}
    assert record["summary"]["neighbours"] == {
        "models": 1,
        "geometric_mean": pytest.approx(one["ratio_neighbours"]),
        "worst": one["ratio_neighbours"],
        "worst_model": "tiny, training step",
    }
    (compiled,) = record["compiling"]
    assert (compiled["model"], compiled["layers"]) == ("tiny", QUICK.layers)
    sums = {name: sum(compiled[name].values()) for name in ("flax", "fusednorm")}
    assert compiled["ratio"] == pytest.approx(sums["fusednorm"] / sums["flax"])
    for name in sums:
        assert compiled[name].keys() == {"trace", "lower", "compile"}
        assert min(compiled[name].values()) > 0


def test_a_real_model_from_the_command_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--models", "vi*") == 0
    assert "vit, training step: 5 LayerNorm fused, 0 left" in capsys.readouterr().out
    (one,) = load(tmp_path)["models"]
    assert (one["model"], one["batch"], one["limit"]) == ("vit", 4, 1e-4)
    assert one["joined"] == {"activation": 0, "shortcut": 0, "residual": 4}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fakes measuring two workloads, and compiling. Returns the names of what ran."""
    done: list[str] = []
    quantiles = whole.Quantiles(1, 2, 3)

    def measure(workload: Workload, size: Any, effort: Any, attention: str) -> Any:
        done.append(str(workload))
        return whole.Measured(
            model=workload.name,
            which=workload.which,
            size=size,
            batch=1,
            dtype="float32",
            attention=attention,
            flax=quantiles,
            fusednorm=quantiles,
            neighbours=quantiles,
            memory=dict.fromkeys(whole.CONTESTANTS, 1),
            loss_difference=0,
            limit=1,
            fused={},
            left=0,
            ran={"fusednorm": {}, "neighbours": {}},
            joined={},
        )

    def compiling(workload: Workload, size: Any, effort: Any) -> Any:
        done.append("compiling")
        stages = whole.Stages(1, 1, 1)
        return whole.Compiling("llama", 2, size, stages, stages)

    monkeypatch.setattr(whole_run, "WORKLOADS", (TINY, FORWARD))
    monkeypatch.setattr(whole, "measure", measure)
    monkeypatch.setattr(whole, "compiling", compiling)
    return done


ALL = ["tiny, training step", "tiny, forward", "compiling"]


def test_goes_on_where_it_stopped(
    counted: list[str],
    at: Callable[[str | None], None],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, "--models", "tiny") == 0
    assert counted == ALL[:2]
    assert run(tmp_path) == 0
    assert counted == ALL
    assert "goes on with the figures of" in capsys.readouterr().out
    record = load(tmp_path)
    assert [one["which"] for one in record["models"]] == ["training step", "forward"]
    assert len(record["compiling"]) == 1
    assert run(tmp_path) == 0
    assert counted == ALL
    assert run(tmp_path, "--attention", "cudnn") == 0  # needs figures of its own
    assert counted == ALL + ALL[:2]


@pytest.mark.parametrize(
    ("before", "now"), [("abc", "abd"), ("abc", "abc+"), (None,) * 2]
)
def test_figures_of_another_commit_are_no_figures(
    before: str | None,
    now: str | None,
    counted: list[str],
    at: Callable[[str | None], None],
    tmp_path: pathlib.Path,
) -> None:
    at(before)
    assert run(tmp_path) == 0
    at(now)
    assert run(tmp_path, "--models", "tiny") == 0
    assert counted == ALL + ALL[:2]
    assert load(tmp_path)["commit"] == now
    assert load(tmp_path)["compiling"] == []


def test_figures_of_another_device_are_no_figures(
    counted: list[str],
    at: Callable[[str | None], None],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("Chip 9", "CHIP-9"):  # the same file name
        monkeypatch.setattr(report, "device_name", lambda name=name: name)
        assert run(tmp_path) == 0
    assert counted == ALL + ALL
    assert (tmp_path / f"chip-9-models-{load(tmp_path)['date'][:10]}.json").exists()


def test_again(
    counted: list[str], at: Callable[[str | None], None], tmp_path: pathlib.Path
) -> None:
    for _ in range(2):
        assert run(tmp_path, "--again") == 0
    assert counted == ALL + ALL
    assert len(load(tmp_path)["models"]) == 2


def test_stops_when_the_time_is_over(
    counted: list[str],
    at: Callable[[str | None], None],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock advances ten seconds each time it is read."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert run(tmp_path, "--seconds", "25") == 0
    assert counted == ALL[:2]
    assert "No time for: compiling." in capsys.readouterr().out


def test_a_failure_is_none_of_the_others(
    counted: list[str],
    at: Callable[[str | None], None],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = whole.measure

    def fail(workload: Workload, *others: Any) -> Any:
        if workload is TINY:
            raise RuntimeError("no memory\nat all")
        return measure(workload, *others)

    monkeypatch.setattr(whole, "measure", fail)
    assert run(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED, no figure: tiny, training step: RuntimeError: no memory" in printed
    record = load(tmp_path)
    assert [one["which"] for one in record["models"]] == ["forward"]
    assert record["failures"] == {"tiny, training step": "RuntimeError: no memory"}
    monkeypatch.setattr(whole, "measure", measure)
    assert run(tmp_path) == 0  # runs only what failed
    assert counted == [*ALL[1:], ALL[0]]
    assert load(tmp_path)["failures"] == {}


def test_a_wrong_norm_has_no_figure(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, lambda y: 1.02 * y)
    monkeypatch.setattr(whole_run, "WORKLOADS", (TINY,))
    assert run(tmp_path, "--models", "tiny") == 1
    printed = capsys.readouterr().out
    assert "FAILED, no figure: tiny, training step: fusednorm: the loss" in printed
    assert load(tmp_path)["models"] == []


def test_without_quick_a_cpu_says_that_it_runs_tiny_ones(
    counted: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "--out", str(tmp_path), "--models", "tiny"]) == 0
    assert "On a CPU: tiny sizes" in capsys.readouterr().out
    assert load(tmp_path)["models"][0]["size"] == "tiny"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--list", "--models", "l*", "compiling"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["llama, training step", "llama, decode", "compiling"]


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--models", "nothing"]) == 2
    assert "no model is named nothing" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["models", "--help"])
    assert stopped.value.code == 0
    assert "--seconds 480" in capsys.readouterr().out
