"""Tests of the commands that read runs: what moved, and the README's figures."""

import copy
import json
import pathlib
from typing import Any

import pytest

for module in ("matplotlib", "pytest_benchmark", "rich"):
    pytest.importorskip(module)

from bench import __main__ as cli  # noqa: E402
from bench import publish, report  # noqa: E402
from bench.compare import Times, differences, moved, read  # noqa: E402

RESULTS = pathlib.Path(publish.__file__).parent / "results"
H200 = RESULTS / "nvidia-h200-2026-11-27.json"
CPU = RESULTS / "amd-epyc-2026-11-23.json"

Record = dict[str, Any]


def a_time(p10: float, p50: float | None = None, p90: float | None = None) -> Any:
    return {"p10": p10, "p50": p50 or p10, "p90": p90 or p50 or p10}


@pytest.fixture
def record() -> Record:
    """Provides the record of a run on an H200, made before peers were timed."""
    found = json.loads(H200.read_text())
    assert not any("peers" in one for one in found["results"])
    return found


def saved(path: pathlib.Path, record: Record) -> str:
    path.write_text(json.dumps(record))
    return str(path)


def entry(record: Record, case: str, which: str = "forward") -> Record:
    (found,) = (
        one
        for one in record["results"]
        if one["case"] == case and one["which"] == which
    )
    return found


def scale(times: dict[str, float], factor: float) -> None:
    for name in times:
        times[name] *= factor


# --- compare --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        # flax takes 100 each time; medians are 1 % above the first deciles. The time
        # 80 means a ratio of 0.792 to 0.808, and 83.2 means 0.824 to 0.840: no overlap.
        ((80, 80.8, 100, 101), (83.2, 84.0, 100, 101), "slower"),
        ((83.2, 84.0, 100, 101), (80, 80.8, 100, 101), "faster"),
        # 0.804 to 0.820: 1.5 % apart, and the interval overlaps the first one.
        ((80, 80.8, 100, 101), (81.2, 82.0, 100, 101), ""),
        # Ten percent slower, but medians are ten percent above the first deciles.
        ((80, 88, 100, 110), (88, 96.8, 100, 110), ""),
        # No change either if only flax's times are that noisy, before or after.
        ((80, 80, 100, 110), (76, 76, 100, 100), ""),
        ((76, 76, 100, 100), (80, 80, 100, 110), ""),
        # Without any noise, 1.9 % still does not count, but 2.1 % does.
        ((80, 80, 100, 100), (81.52, 81.52, 100, 100), ""),
        ((80, 80, 100, 100), (81.68, 81.68, 100, 100), "slower"),
        ((81.68, 81.68, 100, 100), (80, 80, 100, 100), "faster"),
        # The whole machine is twice as slow.
        ((80, 80, 100, 100), (160, 160, 200, 200), ""),
    ],
)
def test_what_moved(old: tuple, new: tuple, change: str) -> None:
    before, after = (
        # The last deciles do not matter.
        Times(
            flax=a_time(flax, flax_median, 2 * flax_median),
            fusednorm=a_time(ours, our_median, 2 * our_median),
        )
        for ours, our_median, flax, flax_median in (old, new)
    )
    assert moved(before, after) == change


@pytest.mark.parametrize(
    ("factor", "change", "code"),
    [(1.1, "slower", 1), (1 / 1.1, "faster", 0), (1.005, "", 0)],
)
def test_one_case_changed(
    factor: float,
    change: str,
    code: int,
    record: Record,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale(entry(record, "llama3_8b")["fusednorm"], factor)
    new = saved(tmp_path / "new.json", record)
    assert cli.main(["compare", str(H200), new]) == code
    printed = capsys.readouterr().out
    assert ("llama3_8b" in printed) == bool(change)
    assert "sd_unet_64" not in printed
    for name in ("slower", "faster"):
        assert f"{name}: {int(name == change)}\n" in printed
    assert f"not moved: {56 - bool(change)}\n" in printed
    assert "only" not in printed
    assert "commit" not in printed
    if change == "slower":
        # fusednorm takes 78.2 and flax 141 microseconds.
        (row,) = (line.split() for line in printed.splitlines() if "llama3" in line)
        assert row[:4] == ["llama3_8b", "bfloat16", "forward", "19531x4096"]
        assert row[4:8] == ["0.555", "0.611", "+10.0%", "slower"]
        assert row[8:] == ["0.141", "->", "0.141", "0.0782", "->", "0.0861"]

    assert cli.main(["compare", str(H200), new, "--all"]) == code
    assert "sd_unet_64" in capsys.readouterr().out


def test_the_largest_slowdown_comes_first(
    record: Record, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"llama3_8b": 1.1, "sd_unet_64": 1.3, "resnet50_conv3": 0.7}
    for case, factor in factors.items():
        scale(entry(record, case)["fusednorm"], factor)
    cli.main(["compare", str(H200), saved(tmp_path / "new.json", record)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    changed = [row[0] for row in rows if {"slower", "faster"} & {*row[1:]}]
    assert changed == ["sd_unet_64", "llama3_8b", "resnet50_conv3"]


def test_absolute_times_only_beside_equal_copies(
    record: Record, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole machine is a tenth slower, and fusednorm another tenth."""
    changed = entry(record, "llama3_8b")
    for who in ("flax", "fusednorm", "fusednorm"):
        scale(changed[who], 1.1)
    changed["copy_rate"] /= 1.1
    cli.main(["compare", str(H200), saved(tmp_path / "new.json", record)])
    (row,) = (
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if "llama3" in line
    )
    assert row[6:] == ["+10.0%", "slower", "-", "-"]


def test_another_device_is_refused(
    record: Record, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record["device"]["name"] = "NVIDIA B200"
    new = saved(tmp_path / "new.json", record)
    assert cli.main(["compare", str(H200), new]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "NVIDIA H200" in said.err
    assert "NVIDIA B200" in said.err

    assert cli.main(["compare", str(H200), new, "--across-devices", "--all"]) == 0
    printed = capsys.readouterr().out
    assert "device, name: NVIDIA H200 -> NVIDIA B200" in printed
    assert "0.0782" not in printed  # milliseconds


def test_differences_of_runs(record: Record) -> None:
    old = copy.deepcopy(record)
    assert differences(old, record) == []
    record["commit"] = "0" * 40
    record["versions"]["jax"] = "0.12.0"
    record["versions"]["torch"] = "2.9"
    record["device"]["driver"] = "590.1"
    record["settings"]["calls"] = 4
    assert differences(old, record) == [
        f"commit: d37541eaebadf465291f19e6d98a6fa153bb7651 -> {'0' * 40}",
        "device, driver: 580.159.04 -> 590.1",
        "versions, jax: 0.11.2 -> 0.12.0",
        "versions, torch: None -> 2.9",
        "settings, calls: 3 -> 4",
    ]


def test_what_one_file_alone_has(
    record: Record, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One case is left out. Another one has a new shape, so it is a different case."""
    record["results"].remove(entry(record, "gpt3_175b"))
    entry(record, "llama3_8b")["shape"] = [10, 4096]
    new = saved(tmp_path / "new.json", record)
    assert cli.main(["compare", str(H200), new]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"in {H200.name} only: gpt3_175b bfloat16 forward (6510x12288)",
        f"in {H200.name} only: llama3_8b bfloat16 forward (19531x4096)",
        "in new.json only: llama3_8b bfloat16 forward (10x4096)",
        "not moved: 54",
    ):
        assert line in printed.splitlines()
    assert printed.count("only") == 3


def test_nothing_in_common(
    record: Record, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record["results"] = [entry(record, "llama3_8b") | {"case": "another"}]
    new = saved(tmp_path / "new.json", record)
    assert cli.main(["compare", str(H200), new]) == 2
    assert "no case of one size in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("# Speed", "is not JSON"),
        ("[1, 2]", "no times of python -m bench"),
        ('{"date": "2026-11-28"}', "it has no 'device'"),
        ("without flax", "it has no 'flax'"),
        ("without results", "holds no times"),
        ((RESULTS / "roofline-2026-12-01.json").read_text(), "it has no 'device'"),
    ],
    ids=["none", "text", "list", "no device", "no flax", "no results", "roofline"],
)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_files_of_something_else(
    command: str,
    text: str | None,
    why: str,
    record: Record,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "other.json"
    if text == "without flax":
        del record["results"][3]["flax"]
        text = json.dumps(record)
    elif text == "without results":
        text = json.dumps(record | {"results": []})
    if text is not None:
        path.write_text(text)
    assert cli.main([command, str(H200), str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "other.json" in said.err
    assert why in said.err


def test_models_compare(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = only("models")
    old = saved(tmp_path / "old.json", record)
    assert cli.main(["compare", old, old]) == 0
    assert "not moved: 3\n" in capsys.readouterr().out
    scale(record["models"][0]["neighbours"], 1.1)
    assert cli.main(["compare", old, saved(tmp_path / "new.json", record)]) == 1
    printed = capsys.readouterr().out
    assert "not moved: 2\n" in printed
    (row,) = (line for line in printed.splitlines() if "unet" in line)
    assert "unet, fuse_neighbours  bfloat16  training step  real, batch 8, xla" in row
    assert row.split()[-6:] == ["0.750", "0.825", "+10.0%", "slower", "-", "-"]


# --- report ---------------------------------------------------------------------------


def test_readme_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, `python -m bench report --write` fixes the README."""
    assert cli.main(["report"]) == 0
    printed = capsys.readouterr().out
    page = publish.README.read_text()
    found = publish.blocks(publish.committed())
    assert list(found) == ["gpu", "peers", "models", "cpu"]
    assert "NVIDIA H200" in found["gpu"]
    assert "AMD EPYC" in found["cpu"]
    for name, text in found.items():
        block = publish.marked(name, text)
        assert block in printed
        assert page.count(block) == 1
    assert page.count("<!-- figures: ") == len(found)


def made_up() -> Record:
    """Returns a run with simple figures: norms, peers of two of them, and models."""
    norm = {
        "case": "rows",
        "layer": "RMSNorm",
        "shape": [1000, 512],
        "dtype": "float32",
        "backend": "mosaic_gpu",
        "plan": "rowwise forward",
        "clock": "device",
        "rounds": 20,
        "copy": a_time(1e-3),
        "copy_bytes": 4_000_000_000,
        "copy_rate": 4e12,
        "kernels": {},
        "errors": {},
    }
    peers = {"quick": a_time(2e-3), "slow": a_time(10e-3)}
    return {
        "date": "2026-11-28T10:00:00+00:00",
        "commit": "0123456789abcdef+",
        "device": {"name": "NVIDIA X1", "platform": "gpu"},
        "versions": {"fusednorm": "0.1.0", "jax": "1.2", "flax": "3.4", "quick": "5"},
        "settings": {"tensor_bytes": 2e9},
        "results": [
            # 4 GB in 4 ms: a quarter of the copy's rate. flax takes 5 ms.
            norm
            | {"which": "forward", "floor_bytes": 4_000_000_000, "peers": peers}
            | {"flax": a_time(5e-3), "fusednorm": a_time(4e-3)},
            # 4 GB in 2 ms: half of that rate.
            norm
            | {"which": "forward", "case": "wide", "shape": [10, 16384]}
            | {"floor_bytes": 4_000_000_000, "peers": {"quick": a_time(1e-3)}}
            | {"flax": a_time(10e-3), "fusednorm": a_time(2e-3)},
            # A convolution has no floor.
            norm
            | {"which": "forward+backward", "case": "conv", "layer": "conv + BatchNorm"}
            | {"floor_bytes": None, "flax": a_time(1e-3), "fusednorm": a_time(2e-3)},
        ],
        "absent": {"other": "no wheel for this Python."},
        "models": [
            {
                "model": "unet",
                "which": "training step",
                "size": "real",
                "batch": 8,
                "dtype": "bfloat16",
                "attention": "xla",
                "flax": a_time(0.1),
                "fusednorm": a_time(0.08),
                "neighbours": a_time(0.075),
                "memory": {"flax": 3e9, "fusednorm": 2.5e9, "neighbours": 2e9},
            },
            {
                "model": "llama",
                "which": "decode",
                "size": "tiny",
                "attention": "cudnn",
                "flax": a_time(0.002),
                "fusednorm": a_time(0.002),
            },
        ],
        "compiling": [
            {
                "model": "llama",
                "layers": 24,
                "flax": {"trace": 1.0, "lower": 0.5, "compile": 2.5},
                "fusednorm": {"trace": 0.75, "lower": 0.25, "compile": 2.0},
            }
        ],
    }


def blocks_of(*records: Record) -> dict[str, str]:
    paths = (pathlib.Path(f"{i}.json") for i in range(len(records)))
    return publish.blocks(map(publish.Run, paths, records))


def only(part: str) -> Record:
    """Returns a part of the made-up run: a file of norms, of peers, or of models."""
    record = made_up()
    if part == "models":
        return record | {"results": []}
    del record["models"], record["compiling"]
    if part == "norms":
        for one in record["results"]:
            one.pop("peers", None)
    return record


def test_block_of_norms() -> None:
    found = blocks_of(only("norms"))
    assert found["peers"] == found["models"] == found["cpu"] == ""
    # Ratios are 0.8 and 0.2: their geometric mean is 0.4. The shares are 1/4 and 1/2 of
    # a copy's rate.
    assert (
        found["gpu"]
        == """\
**NVIDIA X1**: 3 cases named after real models, tensors of 2000 MB, first deciles by the kernels' own time (jax 1.2,
flax 3.4, commit 0123456 with changes, 2026-11-28; bench/results/0.json)

| time, fusednorm / flax.nnx | geometric mean | best case | worst case |
|---|---|---|---|
| forward + backward | 2.00 | 2.00 (conv + BatchNorm, 512, float32) | 2.00 (conv + BatchNorm, 512, float32) |
| forward alone | 0.40 | 0.20 (RMSNorm, 16384, float32) | 0.80 (RMSNorm, 512, float32) |

| bytes that must move per second, of a copy's (4.0 TB/s) | forward | forward + backward |
|---|---|---|
| LayerNorm, RMSNorm: rows of up to 8192 features | 25 % | - |
| LayerNorm, RMSNorm: rows of more than 8192 features | 50 % | - |"""  # noqa: E501
    )


def test_block_of_a_cpu() -> None:
    """The block has training steps, but no shares of a copy's rate: they say little."""
    record = only("norms")
    record["device"] = {"name": "Some CPU", "platform": "cpu", "cpu_cores": 2}
    record["training"] = [
        {"model": "resnet", "ratio": 0.961},
        {"model": "vit", "ratio": 1.02},
    ]
    found = blocks_of(record)
    assert found["gpu"] == ""
    assert found["cpu"].startswith("**Some CPU, 2 cores**: 3 cases")
    assert "copy" not in found["cpu"]
    assert found["cpu"].endswith(
        "Of the time with flax's layers, a training step takes 0.96 (resnet) and "
        "1.02 (vit)."
    )


def test_block_of_peers() -> None:
    """quick has two cases and slow has one. Neither has the convolution."""
    found = blocks_of(only("peers"))
    assert found["gpu"] == found["models"] == found["cpu"] == ""
    lines = found["peers"].splitlines()
    assert "fusednorm beside others, tensors of 2000 MB" in lines[0]
    assert "jax 1.2, flax 3.4, quick 5, commit" in " ".join(lines[:2])
    models = "| fusednorm's time over that of, cases named after real models | cases "
    assert lines[3:] == [
        models + "| forward | forward+backward |",
        "|---|---|---|---|",
        "| flax.nnx | 3 | 0.40 (0.20 to 0.80) | 2.00 (2.00 to 2.00) |",  # as above
        "| quick | 2 | 2.00 (2.00 to 2.00) | - |",  # 4 over 2 ms and 2 over 1 ms
        "| slow | 1 | 0.40 (0.40 to 0.40) | - |",  # 4 over 10 ms
        "",
        "Geometric means (best to worst), in one process.",
        "Not there: other, no wheel for this Python.",
    ]


def test_cases_of_no_model_stand_apart() -> None:
    """Cases of a sweep have their own table, as have cases that are mostly launches."""
    record = only("peers")
    for one, name in zip(
        record["results"], ("rms_4096_f32", "few_rows_768", "a model's"), strict=True
    ):
        one["case"] = name
    found = blocks_of(record)["peers"].splitlines()
    sweep = found.index(
        "| fusednorm's time over that of, rows of every length | cases | forward |"
    )
    assert found[sweep + 2] == "| flax.nnx | 1 | 0.80 (0.80 to 0.80) |"
    few = found.index(
        "| fusednorm's time over that of, so little that launching it is most of it "
        "| cases | forward |"
    )
    assert found[few + 2 : few + 5] == [
        "| flax.nnx | 1 | 0.20 (0.20 to 0.20) |",
        "| quick | 1 | 2.00 (2.00 to 2.00) |",
        "",
    ]
    assert "real models" not in "".join(found)  # that case has no peer

    record = only("norms")
    record["results"][1]["case"] = "few_rows_768"
    half = {"which": "backward", "case": "another"}
    record["results"].append(record["results"][0] | half)
    norms = blocks_of(record)["gpu"]
    assert "2 cases named after real models" in norms
    assert "| forward alone | 0.80 | 0.80 " in norms
    assert "rows of more than" not in norms


def test_block_of_models() -> None:
    found = blocks_of(only("models"))
    assert found["gpu"] == found["peers"] == found["cpu"] == ""
    rows = [line for line in found["models"].splitlines() if line.startswith("| ")]
    assert rows[1:3] == [
        "| unet, batch 8, bfloat16 | training step | 100.0 ms | 0.80 | 0.75 "
        "| 3.00, 2.50, 2.00 |",
        "| llama, tiny, cudnn attention | decode | 2.0 ms | 1.00 | - | - |",
    ]
    assert rows[4:] == ["| llama | 24 | 4.0 s | 3.0 s | 0.75 |"]


def test_the_newest_of_each_device_and_kind() -> None:
    old, other = only("norms"), only("norms")
    new = only("norms") | {"date": "2026-11-29T10:00:00+00:00"}
    other["device"] = {"name": "NVIDIA X2", "platform": "gpu"}
    found = blocks_of(new, old, other, only("models"))
    assert "bench/results/0.json" in found["gpu"]
    assert "bench/results/1.json" not in found["gpu"]
    assert found["gpu"].index("NVIDIA X1") < found["gpu"].index("NVIDIA X2")
    assert "bench/results/3.json" in found["models"]


@pytest.mark.parametrize(("left_out", "named"), [(0, "1.json"), (1, "0.json")])
def test_norms_beside_peers_are_norms_if_none_is_left_out(
    left_out: int, named: str
) -> None:
    beside = only("peers") | {"date": "2026-11-29T10:00:00+00:00"}
    del beside["results"][:left_out]
    found = blocks_of(only("norms"), beside)
    assert f"bench/results/{named}" in found["gpu"]
    assert "bench/results/1.json" in found["peers"]


def test_only_what_is_between_the_marks_is_replaced() -> None:
    begin, end = "<!-- figures: gpu -->", "<!-- end of figures -->"
    page = f"a\n{begin}\nold {end}\nb\n<!-- figures: cpu -->\n{end}\nc\n"
    new = publish.replaced(page, {"gpu": r"new \1", "cpu": ""})
    assert new == (
        f"a\n{begin}\n\nnew \\1\n\n{end}\nb\n<!-- figures: cpu -->\n{end}\nc\n"
    )
    assert publish.replaced(new, {"gpu": r"new \1"}) == new
    for broken in ("no mark", begin, f"{begin}\n{end}\n{begin}\n{end}"):
        with pytest.raises(ValueError, match="needs one <!-- figures: gpu -->"):
            publish.replaced(broken, {"gpu": "new"})


@pytest.mark.parametrize("part", ["norms", "peers", "models"])
def test_write(
    part: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named files replace only the blocks that they fill, and get their charts."""
    page = tmp_path / "README.md"
    names = ("gpu", "peers", "models", "cpu")
    page.write_text("\n".join(publish.marked(name, "old") for name in names))
    monkeypatch.setattr(publish, "README", page)
    path = tmp_path / "run.json"
    assert cli.main(["report", saved(path, only(part)), "--write"]) == 0
    assert "NVIDIA X1" in page.read_text()
    assert page.read_text().count("\nold\n") == 3
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks")
    assert cli.main(["report", str(path), "--write"]) == 2


@pytest.mark.parametrize("path", [H200, CPU], ids=["gpu", "cpu"])
def test_results_come_back_from_their_file(path: pathlib.Path) -> None:
    """The CPU's file was written before results named their clock."""
    for one in read(path)["results"]:
        result = report.as_result(one)
        assert result.ratio == one["ratio"]
        assert result.share == one["share"]
        assert result.shape == tuple(one["shape"])
        assert result.clock == one.get("clock", "host")


def test_bars_are_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple] = []
    monkeypatch.setattr(publish, "_draw_bars", lambda bars, *_: drawn.append([*bars]))
    beside = only("peers")
    alone = {**beside["results"][0], "case": "alone", "peers": {}}
    beside["results"].append(alone)
    publish.charts(publish.Run(tmp_path / "peers.json", beside))
    of_sweep = only("peers")
    of_sweep["results"][1]["case"] = "rms_4096_f32"
    assert publish.charts(publish.Run(tmp_path / "p.json", of_sweep)) == [
        tmp_path / "p.png",
        tmp_path / "p-sweep.png",
    ]
    assert [len(bars) for bars in drawn[1:]] == [4, 3]
    publish.charts(publish.Run(tmp_path / "models.json", only("models")))
    rows, wide = "rows  float32", "wide  float32"
    assert drawn[0] == [  # GB/ms over a copy's 4; slow has no bar for the second
        ("forward", rows, "fusednorm", 0.25),
        ("forward", rows, "flax", pytest.approx(0.2)),
        ("forward", rows, "quick", 0.5),
        ("forward", rows, "slow", pytest.approx(0.1)),
        ("forward", wide, "fusednorm", 0.5),
        ("forward", wide, "flax", pytest.approx(0.1)),
        ("forward", wide, "quick", 1.0),
    ]
    unet, llama = "unet, batch 8, bfloat16", "llama, tiny, cudnn attention"
    assert drawn[3] == [
        ("training step", unet, "fuse", pytest.approx(0.8)),
        ("training step", unet, "fuse_neighbours", pytest.approx(0.75)),
        ("decode", llama, "fuse", 1.0),
    ]


@pytest.mark.parametrize("command", ["compare", "report"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m bench {command}" in capsys.readouterr().out
