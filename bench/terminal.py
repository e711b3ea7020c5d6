"""Style of the commands' output."""

from typing import Any

from rich import box
from rich.console import Console

# The style of all tables.
STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "pad_edge": False,
    "collapse_padding": True,
    "title_justify": "left",
    "caption_justify": "left",
}


def console() -> Console:
    """Returns a console of the terminal's width, or of 120 columns into a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
