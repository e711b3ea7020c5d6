"""How the commands print."""

from typing import Any

from rich import box
from rich.console import Console

# Of all tables.
STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "pad_edge": False,
    "collapse_padding": True,
    "title_justify": "left",
    "caption_justify": "left",
}


def console() -> Console:
    """The terminal; into a file, lines of 120 columns."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
