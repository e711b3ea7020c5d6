"""The origin of figures: date, commit and versions."""

import dataclasses
import datetime
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPILERS = ("fusednorm", "jax", "jaxlib", "flax", "libtpu")


def of_compiled(what: str, chips: Sequence[Any]) -> dict[str, Any]:
    """Returns the head of a record of figures from compiled code.

    Args:
      what: a sentence that says what the figures are.
      chips: the chips that the code was compiled for, as dataclasses.
    """
    return {
        "what": what,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in COMPILERS},
        "chips": [dataclasses.asdict(chip) for chip in chips],
    }


def commit() -> str | None:
    """Returns the commit that is checked out, with a + if files differ from it."""
    found = output("git", "rev-parse", "HEAD")
    if found is None:
        return None
    return found + ("+" if output("git", "status", "--porcelain") else "")


def output(*command: str) -> str | None:
    """Returns what a command prints, or None if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
