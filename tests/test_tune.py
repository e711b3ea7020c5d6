"""Tests of the search for faster cuts of a kernel's work, with interpreted kernels."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx

import fusednorm

for module in ("matplotlib", "optax", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(module)

from rich.console import Console  # noqa: E402

from bench import __main__ as cli  # noqa: E402
from bench import report, tune  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.contest import Quantiles, on_device  # noqa: E402
from fusednorm.kernels.gpu import strips, tiles  # noqa: E402
from tests import interpreters  # noqa: E402

ROWS = Case("rows", nnx.RMSNorm, (64,), "float32", samples=64)
PIXELS = Case("pixels", nnx.InstanceNorm, (16, 8), "float32", samples=1)


@pytest.fixture
def kernels() -> Any:
    with interpreters.interpreted("mosaic_gpu"), fusednorm.use_backend("mosaic_gpu"):
        yield


def clock_of(cost: Callable[[], float]) -> tune.Clock:
    """Returns a clock that runs everything but reports made-up times.

    The current setting takes one second. A candidate takes `cost()` seconds, evaluated
    while the functions answer with its setting.
    """

    def clock(turns: tune.Turns) -> dict[str, list[float]]:
        for _, run in turns:
            run()
        return {"present": [1.0] * 3, "candidate": [cost()] * 3}

    return clock


def share_of_rows() -> tiles.Share:
    return tiles.share(
        64, 4, center=False, slopes=False, beside=False, own=False, smem=0
    )


@pytest.mark.usefixtures("kernels")
def test_it_climbs_to_the_fastest() -> None:
    """The fastest is two steps away, and the first step is already an improvement."""

    def cost() -> float:
        return 1 + 0.1 * (abs(share_of_rows().threads - 384) - 256) / 128

    threads = dataclasses.replace(
        tune.KNOBS[0], values=lambda _: {"threads": (256, 384, 512, 640, 768, 896)}
    )
    found = tune.tune(ROWS, "backward", 1e4, clock_of(cost), [threads])
    assert found is not None
    assert found.function == "tiles.share"
    assert found.setting == dataclasses.asdict(share_of_rows())
    assert found.setting["threads"] == 640
    assert found.best is not None
    assert found.best.setting == found.setting | {"threads": 384}
    assert found.best.ratio == pytest.approx(0.8)
    assert [t.setting["threads"] for t in found.trials] == [512, 768, 384, 256]
    assert [trial.failure for trial in found.trials] == [""] * 4
    assert interpreters.runs["rowwise backward"] == 1 + 3 * 4


@pytest.mark.usefixtures("kernels")
def test_every_setting_is_another_kernel_and_right() -> None:
    """Other settings pass the gate, and the cuts are those of the kernels that ran."""
    found = tune.tune(PIXELS, "forward", 1e4, clock_of(lambda: 1.0))
    assert found is not None
    assert found.function == "strips.resident"
    assert found.best is None
    assert {} in [trial.setting for trial in found.trials]  # two reads
    right = [trial for trial in found.trials if not trial.failure]
    assert len(right) >= 3
    assert {trial.cut for trial in right} > {found.cut}


@pytest.mark.usefixtures("kernels")
def test_what_is_wrong_or_does_not_fit_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half_seen(view: Any, *_: int, load: int, **others: int) -> Any:
        both = [
            strips._config(view, 8, 4, 1, blocks, resident=False, load=load)
            for blocks in (4, 1)
        ]
        return both[0], dataclasses.replace(both[1], pixels=2, line=1, warps=1)

    def make(asked: tune.Asked, setting: tune.Setting) -> Any:
        if setting["width"] == 4:
            raise tune.UnfitError("too wide")
        return None  # two reads, which merge only half of the four blocks' results

    monkeypatch.setattr(strips, "in_two_reads", half_seen)

    wrong = tune.Knob(
        strips,
        "resident",
        read=lambda asked: {"width": 2},
        values=lambda asked: {"width": (1, 2, 4)},
        make=make,
    )
    found = tune.tune(PIXELS, "forward", 1e4, clock_of(lambda: 0.1), [wrong])
    assert found is not None
    assert found.best is None
    below, above = found.trials
    assert below.failure.startswith("GateError: ")
    assert above.failure == "UnfitError: too wide"
    assert below.time is above.time is None


def test_without_kernels_there_is_nothing_to_tune(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune.tune(ROWS, "forward", 1e4, clock_of(lambda: 1.0)) is None
    assert cli.main(["tune", "--cases", "llama3_8b"]) == 2
    assert "nothing to tune on a CPU" in capsys.readouterr().out
    assert cli.main(["tune", "--cases", "nothing"]) == 2


def test_the_record_keeps_the_last_of_each(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present, other = Quantiles(1e-6, 2e-6, 3e-6), Quantiles(1e-6, 1.5e-6, 3e-6)
    setting = {"columns": 8, "threads": 640}
    trials = [
        tune.Trial(setting | {"threads": 512}, "cut", other, present),
        tune.Trial(setting | {"columns": 4}, failure="Error: none"),
    ]
    found = tune.Tuned(
        "rows", "float32", (64, 64), "forward", "tiles.share", setting, "cut", trials
    )
    record: dict[str, Any] = {"date": "2026-01-02T03", "tuned": [], "failures": {}}
    for one in (dataclasses.replace(found, trials=[]), found):
        tune.keep(record, one)
        path = report.save(record, tmp_path, "tune")
    (kept,) = json.loads(path.read_text())["tuned"]
    assert kept == json.loads(json.dumps(dataclasses.asdict(found)))
    tune.show(found, Console(width=120))
    printed = capsys.readouterr().out
    assert "would change tiles.share to columns 8, threads 512: 0.750" in printed
    assert "Error: none" in printed


@pytest.mark.gpu
@pytest.mark.parametrize("which", tune.PASSES)
@pytest.mark.parametrize("case", [ROWS, PIXELS], ids=lambda case: case.name)
def test_on_a_gpu(case: Case, which: str) -> None:
    """Kernels are compiled for each setting, checked and timed by the GPU's clock."""
    found = tune.tune(case, which, 1e6, lambda turns: on_device(turns, 3, calls=2)[0])
    assert found is not None
    right = [trial for trial in found.trials if not trial.failure]
    assert right
    assert all(np.isfinite(trial.ratio) for trial in right)
