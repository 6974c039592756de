"""Where the commands print: results to stdout, progress and errors to stderr; every string as plain text."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ..progress import ProgressLines, bars
from ..runs_on import describe_backend

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


def accept_any_text() -> None:
    """Let stdout and stderr replace the characters that their encoding does not have, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def progress_bars() -> Progress:
    """Bars if stderr is a terminal, else lines."""
    return bars(errors) if errors.is_terminal else ProgressLines(errors)


def print_line(line: str) -> None:
    """A line of the result, whatever its length."""
    console.print(line, soft_wrap=True)


def print_note(line: str) -> None:
    """A line beside the result, on stderr."""
    errors.print(line, soft_wrap=True)


def print_warning(message: str) -> None:
    """What speaks against the result, on stderr."""
    errors.print(Text.assemble(("warning:", "bold yellow"), " ", message), soft_wrap=True)


def print_error(message: str) -> None:
    """What a command ended with."""
    errors.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def print_backend(device: str) -> None:
    """What the kernels run on."""
    print_note(f"running on {describe_backend(device)}")
