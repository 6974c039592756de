"""Output of the commands: results to stdout, progress and errors to stderr, all as plain text."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ..progress import ProgressLines, bars
from ..runs_on import describe_backend, multiplies_bfloat16

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


def accept_any_text() -> None:
    """Let stdout and stderr escape characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def quiet() -> None:
    """Print nothing from now on, except the error that ends the command."""
    console.quiet = errors.quiet = True


def progress_bars() -> Progress:
    """Bars if stderr is a terminal, else lines."""
    return bars(errors) if errors.is_terminal else ProgressLines(errors)


def print_line(line: str) -> None:
    """Print a line of the result, without breaking it."""
    console.print(line, soft_wrap=True)


def print_note(line: str) -> None:
    """Print a line about the run to stderr."""
    errors.print(line, soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a warning to stderr."""
    errors.print(Text.assemble(("warning:", "bold yellow"), " ", message), soft_wrap=True)


def print_error(message: str) -> None:
    """Print the error that ended a command to stderr."""
    errors.quiet = False
    errors.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def print_backend(device: str) -> None:
    """Print the backend that the kernels run on to stderr."""
    print_note(f"running on {describe_backend(device)}")


def note_slow_bfloat16(device: str, gain: str) -> None:
    """If the device multiplies bfloat16 slowly, print what ``--dtype float32`` gains instead.

    Args:
        device: where the forwards in bfloat16 run.
        gain: the end of the note, such as "trains several times as fast".
    """
    if not multiplies_bfloat16(device):
        print_note(f"this CPU multiplies bfloat16 slowly: --dtype float32 {gain}")
