"""Output of the commands: results to stdout, progress and errors to stderr, all as plain text."""

from __future__ import annotations

import sys
from typing import Any

import torch
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


def note_slow_calibration(dtype: str | torch.dtype, model: Any) -> None:
    """If a model keeps its own bfloat16 and its device multiplies that slowly, print what ``--dtype float32`` gains.

    Args:
        dtype: the command's option.
        model: the model that is calibrated.
    """
    if dtype == "auto" and model.dtype == torch.bfloat16:
        _note_slow_bfloat16(model.device, "calibrates several times as fast, and writes OUT in float32")


def note_slow_training(dtype: str | torch.dtype, device: str) -> None:
    """If a recovery runs its forwards in bfloat16 on a device that multiplies that slowly, print the same.

    Args:
        dtype: the command's option.
        device: where the forwards run.
    """
    if dtype == "auto":
        _note_slow_bfloat16(device, "trains several times as fast")


def _note_slow_bfloat16(device: str | torch.device, gain: str) -> None:
    if not multiplies_bfloat16(device):
        print_note(f"this CPU multiplies bfloat16 slowly: --dtype float32 {gain}")
