"""The README's Python blocks run, one after the other, and print what it says."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_code_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "1 replaced, 0 left" in printed
    indented = [
        line[4:]
        for line in text.splitlines()
        if re.match(r"    (forward|backward|  reference:) ", line)
    ]
    assert len(indented) == 4
    assert printed.endswith("\n".join(indented) + "\n")


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"[A-Z]+_TABLE|REPOSITORY|TODO", README.read_text())
