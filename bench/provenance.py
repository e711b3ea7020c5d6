"""Where figures come from."""

import dataclasses
import datetime
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPILERS = ("fusednorm", "jax", "jaxlib", "flax", "libtpu")


def of_compiled(what: str, chips: Sequence[Any]) -> dict[str, Any]:
    """The head of a record of figures from compiled code.

    Args:
      what: the figures are, in a sentence.
      chips: compiled for: dataclasses.
    """
    return {
        "what": what,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in COMPILERS},
        "chips": [dataclasses.asdict(chip) for chip in chips],
    }


def commit() -> str | None:
    """The commit that is checked out, with a + if files differ from it."""
    found = output("git", "rev-parse", "HEAD")
    if found is None:
        return None
    return found + ("+" if output("git", "status", "--porcelain") else "")


def output(*command: str) -> str | None:
    """What a command prints, or None where it fails."""
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
