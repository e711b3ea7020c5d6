"""Where figures come from."""

import subprocess
from pathlib import Path


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
