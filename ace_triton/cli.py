"""The command line: ``ace-triton prune | evaluate | demo | info | study``."""

from __future__ import annotations

import functools
import os
import sys
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
from .threads import respect_processors

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

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
    """Run the command line; a user's mistake ends in one line and exit code 1, a wrong call in 2."""
    _quieten_libraries()
    respect_processors()
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error) or type(error).__name__)}", soft_wrap=True)
        if not isinstance(error, (ValueError, OSError)):
            errors.print(f"(set {TRACEBACK_VARIABLE}=1 for the traceback)")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        sys.exit(130)


def _quieten_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # TQDM_DISABLE would come too late: tqdm reads it when it is imported, which torch has done by now.
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
