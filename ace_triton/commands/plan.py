"""``ace-triton plan``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .plan_run import show_plan
from .prune import prune

_OUT = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="Folder for the pruned model, to check it and its disk.", show_default=False),
]
_PROBE = Annotated[
    bool,
    typer.Option(
        "--probe", help="Also estimate the time: read two blocks, and prune them on a few tokens; takes a while."
    ),
]


def plan(context: typer.Context, **_options: Any) -> None:
    """Say what 'ace-triton prune' with the same options would prune, and what memory, disk and time it would take.

    The weights are not read, and nothing is written. Sizes and times are estimates. Problems that are known before the
    run are printed as warnings.
    """
    show_plan(context)


def _options_of_prune() -> list[inspect.Parameter]:
    """The parameters of ``prune``, with OUT optional, and --probe for --dry-run."""
    found, annotations = [], get_type_hints(prune, include_extras=True)
    for name, parameter in inspect.signature(prune).parameters.items():
        annotation = annotations[name]
        if name == "out":
            # A parameter without a default may not follow one with a default, so all are given by name.
            parameter = parameter.replace(default=None)
            annotation = _OUT
        if name == "dry_run":
            parameter, annotation = parameter.replace(name="probe"), _PROBE
        found.append(parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))
    return found


_OPTIONS = _options_of_prune()
plan.__signature__ = inspect.Signature(_OPTIONS)  # type: ignore[attr-defined]
plan.__annotations__ = {parameter.name: parameter.annotation for parameter in _OPTIONS}
