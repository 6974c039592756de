"""Chooses rows of a report by name: the options ``--only`` and ``--list``, and the texts of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar

import typer
from rich.console import Console

Only = Annotated[
    list[str] | None, typer.Option(help="Rows to measure, by name, with * and ? as in file names; repeatable.")
]
ListRows = Annotated[bool, typer.Option("--list", is_eager=True, help="Print the names of all rows, and measure none.")]


def _given_unless_listed(context: typer.Context, value: str) -> str:
    """The name of a text; BadParameter if it is missing and rows are measured."""
    if not value and not context.params.get("list_rows"):
        raise typer.BadParameter("is missing: name a text (only --list needs none)")
    return value


CalibrationText = Annotated[
    str, typer.Option(callback=_given_unless_listed, help="Calibration text, as for ace-triton prune.")
]
EvaluationText = Annotated[str, typer.Option(callback=_given_unless_listed, help="A raw WikiText file.")]
"""Texts whose default is "". A run that measures must name them."""

Row = TypeVar("Row")


def chosen_rows(rows: Iterable[Row], name: Callable[[Row], str], only: list[str] | None) -> list[Row]:
    """The rows to measure, in their order: all of them without ``only``.

    Args:
        rows: all rows.
        name: the name of a row.
        only: shell patterns of names.

    Raises:
        typer.BadParameter: if a pattern fits no row.
    """
    if not only:
        return list(rows)
    named = [(name(row), row) for row in rows]
    for pattern in only:
        if not any(fnmatchcase(text, pattern) for text, _ in named):
            raise typer.BadParameter(f"--only {pattern!r}: no row has such a name; --list prints all names")
    return [row for text, row in named if any(fnmatchcase(text, pattern) for pattern in only)]


def print_rows(console: Console, model: str, rows: Iterable[tuple[str, str | None]]) -> None:
    """Print the model's name, and then each row's name and what is known of it; None if the row is not measured."""
    console.print(f"{model} (--name)", highlight=False, markup=False)
    for name, known in rows:
        console.print(f"{name}: {known or 'not measured'}", highlight=False, markup=False)
