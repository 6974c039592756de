"""Chooses rows of a report by name: the options ``--only`` and ``--list``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar

import typer
from rich.console import Console

Only = Annotated[
    list[str] | None, typer.Option(help="Rows to measure, by name, with * and ? as in file names; repeatable.")
]
ListRows = Annotated[bool, typer.Option("--list", help="Print the names of all rows, and measure none.")]

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


def print_rows(console: Console, rows: Iterable[tuple[str, str | None]]) -> None:
    """Print each row's name, and what is known of it; None if the row is not measured."""
    for name, known in rows:
        console.print(f"{name}: {known or 'not measured'}", highlight=False, markup=False)
