"""The command line: ``ace-triton prune | recover | pack | generate | evaluate | ...``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import AceError, ArgumentError, ProcessError
from ..out_of_memory import is_out_of_memory
from ..processes import is_first_to_fail, started
from ..terminal import is_lost_terminal, leave_terminal
from ..threads import respect_processors
from .bench import bench
from .console import accept_any_text, errors, print_error, print_line, print_note, quiet
from .demo import demo
from .evaluate import evaluate
from .export import export
from .generate import generate
from .info import info
from .methods import methods
from .pack import pack
from .plan import plan
from .prune import prune
from .recover import recover
from .serve import serve
from .shrink import shrink
from .study import study

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

app = typer.Typer(
    name="ace-triton",
    help="Prune language models to n:m sparsity, run them sparse, and compare methods.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain text: no emoji codes, no box characters, for every console.
)
COMMANDS: dict[Callable[..., None], str] = {
    prune: "Prune a model and save it.",
    plan: "Say what prune would do and take.",
    shrink: "Remove channels, heads, experts or blocks, for a smaller dense model.",
    recover: "Train the kept weights of a pruned model.",
    pack: "Pack a pruned model, to run it sparse.",
    generate: "Continue a prompt with a model.",
    serve: "Serve a model over HTTP, as OpenAI's API does.",
    evaluate: "Measure a model's perplexity on a text.",
    export: "Export a model to another engine's files.",
    info: "Show how sparse a saved model is.",
    methods: "List the pruning methods and their options.",
    bench: "Time packed layers beside dense ones.",
    demo: "Run every step on a small model, in minutes.",
    study: "Compare methods on a model, and draw a page.",
}
for command, summary in COMMANDS.items():
    app.command(short_help=summary, context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})(
        command
    )


SHARED = ("prune", "recover", "evaluate", "study")
"""Commands that several processes can share."""

SECONDS_AFTER_THE_CAUSE = 10.0
"""How long a process that lost another one waits before it reports that; torchrun stops it earlier."""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        print_line(f"ace-triton {__version__}")
        raise typer.Exit
    if started() > 1:
        if context.invoked_subcommand not in SHARED:
            raise ArgumentError(
                f"torchrun started {started()} processes, but {context.invoked_subcommand} runs in one: run it without "
                f"torchrun (the commands that several processes share are {', '.join(SHARED)})"
            )
        if os.environ.get("RANK") != "0":
            quiet()


def main() -> None:
    """Run the command line.

    A user's mistake, an error of the system and a full memory print one line and exit with code 1. Any other exception
    is a bug: it prints its traceback and asks for a report, and exits with code 1. A wrong call exits with code 2. If
    several processes fail, the first of them prints its error.
    Ctrl-C and the signals of STOPPING clean up, print what was written, and exit with 128 plus the signal's number. A
    terminal that is gone counts as SIGHUP.
    """
    _quiet_libraries()
    accept_any_text()
    respect_processors()
    with _stopped_by_signals(), warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        _run()


def _run() -> None:
    try:
        app()
    except (SystemExit, KeyboardInterrupt) as stop:  # typer turns Ctrl-C into a SystemExit.
        number = _signal_of(stop)
        if number is None:
            raise
        _end_by(number, stop)
    except Exception as error:
        if is_lost_terminal(error):
            _end_by(next(filter(None, map(_signal_of, _chain(error))), signal.SIGHUP), error)
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if isinstance(error, ProcessError):
            time.sleep(SECONDS_AFTER_THE_CAUSE)
        if not is_first_to_fail():
            pass
        elif isinstance(error, (AceError, OSError)) or is_out_of_memory(error):
            print_error(str(error) or type(error).__name__)
        else:
            _print_bug(error)
        sys.exit(1)


def _print_bug(error: Exception) -> None:
    errors.print("".join(traceback.format_exception(error)), end="", soft_wrap=True)
    print_error(
        f"this is a bug in ace-triton {__version__}: please open an issue, with the command and the lines above"
    )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Inside, the signals of STOPPING end the run as Ctrl-C does, so that temporary folders are removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [number for number in STOPPING if in_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _signal_of(stop: BaseException) -> int | None:
    """The signal that a run was stopped by; None if it was not."""
    if any(isinstance(error, KeyboardInterrupt) for error in _chain(stop)):
        return signal.SIGINT
    code = stop.code if isinstance(stop, SystemExit) else None
    return next((number for number in STOPPING if code == 128 + number), None)


def _end_by(number: int, stop: BaseException) -> NoReturn:
    """Say what a run that a signal stopped has written, and exit."""
    notes = [note for error in _chain(stop) for note in getattr(error, "__notes__", ())]
    how = "stopped" if number == signal.SIGINT else "terminated"
    try:
        print_note(f"{how}; {'; '.join(notes) or 'nothing was written'}")
    except OSError as error:
        if not is_lost_terminal(error):
            raise
        leave_terminal()
    sys.exit(128 + number)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the exception that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _show_warning(message: Warning | str, *_: object) -> None:
    print_note(f"warning: {message}")


def _quiet_libraries() -> None:
    """Hide the log and the progress bars of libraries, which read these variables when they are first imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()
