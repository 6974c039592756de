"""The command line: ``ace-triton prune | recover | pack | generate | evaluate | ...``."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from tqdm import tqdm

from .. import __version__
from ..threads import respect_processors
from .bench import bench
from .console import accept_any_text, errors, print_error, print_line, print_note
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .methods import methods
from .pack import pack
from .prune import prune
from .recover import recover
from .study import study

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

app = typer.Typer(
    name="ace-triton",
    help="Prune language models to n:m sparsity, run them sparse, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain text: no emoji codes, no box characters, for every console.
)
COMMANDS: dict[Callable[..., None], str] = {
    prune: "Prune a model and save it.",
    recover: "Train the kept weights of a pruned model.",
    pack: "Pack a pruned model, to run it sparse.",
    generate: "Continue a prompt with a model.",
    evaluate: "Measure a model's perplexity on a text.",
    info: "Show how sparse a saved model is.",
    methods: "List the pruning methods and their options.",
    bench: "Time packed layers beside dense ones.",
    demo: "Show it all on a small model, in minutes.",
    study: "Compare methods on a model, on one page.",
}
for command, summary in COMMANDS.items():
    app.command(short_help=summary, context_settings={"max_content_width": 100})(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        print_line(f"ace-triton {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line.

    A user's mistake ends in one line and exit code 1, a wrong call in 2. Ctrl-C and the signals of STOPPING clean up,
    say what became of the run, and end in 128 plus the signal's number.
    """
    _quieten_libraries()
    accept_any_text()
    respect_processors()
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
        print_error(str(error) or type(error).__name__)
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
    print_note(f"{how}; {'; '.join(notes) or 'nothing was written'}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, one after the other."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _show_warning(message: Warning | str, *_: object) -> None:
    print_note(f"warning: {message}")


def _quieten_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # TQDM_DISABLE would come too late: tqdm reads it when it is imported, which torch has done by now.
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
