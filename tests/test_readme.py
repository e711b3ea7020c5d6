"""The documentation's Python blocks run, in order, and print what it says."""

import pathlib
import re
import textwrap

import jax
import pytest

import fusednorm

README = pathlib.Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")))


def test_code_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 10
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "1 replaced, 0 left" in printed
    x = names["x"].astype("bfloat16")
    (choice,) = fusednorm.explain(names["own"], x).choices
    assert choice.scale_offset == 1.0
    on_cpu, on_gpu, image_on_gpu = re.findall(
        r"^    forward  .*?(?=\n\n)", text, re.DOTALL | re.MULTILINE
    )
    assert textwrap.dedent(on_cpu) + "\n" in printed
    forward = fusednorm.explain(names["forward"], names["block"], names["images"])
    assert [choice.activation for choice in forward.choices] == ["relu", "silu"]
    assert [choice.shortcut for choice in forward.choices] == [True, False]
    names["gradients"](names["block"], names["images"])
    # What the second explain would print on a GPU, and the third.
    gradient = names["nnx"].grad(names["loss"])
    for said, function, *arguments in (
        (on_gpu, gradient, names["model"], names["x"]),
        (image_on_gpu, names["layer"], names["image"]),
    ):
        explanation = fusednorm.explain(function, *arguments).on("cuda")
        assert str(explanation) == textwrap.dedent(said)


def test_examples_of_sharded_models(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "sharded.md"
    text = page.read_text()
    first, *blocks = re.findall(
        r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert "jax_num_cpu_devices" in first  # tests/conftest.py has done that
    names: dict = {"jax": jax}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    type_of_y, loss = capsys.readouterr().out.splitlines()
    assert f"print(jax.typeof(y))  # {type_of_y}\n" in text
    assert 0.5 < float(loss) < 1.5  # a BatchNorm's mean square
    assert names["y"].sharding.spec == jax.P("data")


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"[A-Z]+_TABLE|REPOSITORY|TODO", page.read_text())


def test_links_lead_somewhere() -> None:
    links = [
        (page, *re.fullmatch(r"([^#]*)#?(.*)", link).groups())  # type: ignore[union-attr]
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text())
    ]
    assert {path for page, path, _ in links if page == README} >= {
        f"docs/{page.name}" for page in PAGES[1:]
    }
    for page, path, anchor in links:
        text = (page.parent / path).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in [
            title.lower().replace(" ", "-") for title in titles
        ]
