"""The command line: ``ace-triton prune | evaluate | demo | info | study``."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape
from tqdm import tqdm

from . import __version__
from .commands.bench import bench
from .commands.console import console, errors
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.info import info
from .commands.pack import pack
from .commands.prune import prune
from .commands.recover import recover
from .commands.study import study

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

app = typer.Typer(
    name="ace-triton",
    help="Prune language models to N:M sparsity, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prune, recover, pack, generate, bench, evaluate, info, demo, study):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        console.print(f"ace-triton {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command line.

    A user's mistake ends in one line and exit code 1, a wrong call in 2. Ctrl-C and the signals of STOPPING clean up,
    say what became of the run, and end in 128 plus the signal's number.
    """
    _quieten_libraries()
    with _stopped_by_signals(), warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        _run()


def _run() -> None:
    try:
        app()
    except SystemExit as stop:  # typer turns Ctrl-C into one.
        if any(isinstance(error, KeyboardInterrupt) for error in _chain(stop)):
            _say_stopped("stopped", stop)
            sys.exit(128 + signal.SIGINT)
        if stop.code in [128 + number for number in STOPPING]:
            _say_stopped("terminated", stop)
        raise
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error) or type(error).__name__)}", soft_wrap=True)
        if not isinstance(error, (ValueError, OSError)):
            errors.print(f"(set {TRACEBACK_VARIABLE}=1 for the traceback)")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        _say_stopped("stopped", stop)
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Inside, the signals of STOPPING end the run as Ctrl-C does, so that temporary folders are removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    own = threading.current_thread() is threading.main_thread()
    taken = [number for number in STOPPING if own and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _say_stopped(how: str, stop: BaseException) -> None:
    notes = [note for error in _chain(stop) for note in getattr(error, "__notes__", ())]
    errors.print(escape(f"{how}; {'; '.join(notes) or 'nothing was written'}"), soft_wrap=True, highlight=False)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, one after the other."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _show_warning(message: Warning | str, *_: object) -> None:
    errors.print(escape(f"warning: {message}"), soft_wrap=True, highlight=False)


def _quieten_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # TQDM_DISABLE would come too late: tqdm reads it when it is imported, which torch has done by now.
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
