"""The command line: ``ace-triton prune | recover | pack | generate | evaluate | ...``."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from tqdm import tqdm

from . import __version__
from .commands.bench import bench
from .commands.console import accept_any_text, errors, print_error, print_line
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.info import info
from .commands.methods import methods
from .commands.pack import pack
from .commands.prune import prune
from .commands.recover import recover
from .commands.study import study

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

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
    """Run the command line; a user's mistake ends in one line and exit code 1, a wrong call in 2."""
    _quieten_libraries()
    accept_any_text()
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print_error(str(error) or type(error).__name__)
        if not isinstance(error, (ValueError, OSError)):
            errors.print(f"(set {TRACEBACK_VARIABLE}=1 for the traceback)")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        sys.exit(130)


def _quieten_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # TQDM_DISABLE would come too late: tqdm reads it when it is imported, which torch has done by now.
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
