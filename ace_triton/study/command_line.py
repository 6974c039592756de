"""The commands that repeat what a study measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import StudyError
from ..solvers.update import Update
from .cells import Cell
from .records import Setting

PRUNED, RECOVERED = "pruned", "recovered"
"""The folders that the commands write."""


def commands_of(setting: Setting, cell: Cell) -> tuple[str, ...]:
    """``ace-triton prune`` with the options of a cell, and ``recover`` if the cell's recipe has minutes.

    The model and the texts are named without their folders, as the setting has them.

    Raises:
        ValueError: for a published form, which no command runs.
    """
    recipe = cell.variant.recipe
    if recipe.published:
        raise StudyError(f"{cell}: no command prunes by a published form")
    words = ["ace-triton", "prune", setting.model, PRUNED, "--method", cell.variant.method]
    words += [word for name, value in cell.variant.options for word in ("-o", f"{name}={value}")]
    words += ["--sparsity", cell.sparsity]
    words += ["--permute"] if recipe.permute else []
    words += _update_words(recipe.update)
    words += ["--sequential", recipe.sequential] if recipe.sequential != "blocks" else []
    words += ["--budgets", recipe.budgets] if recipe.budgets is not None else []
    text = ["--calibration", setting.calibration]
    if cell.length is not None:
        words += [*text, "--samples", str(setting.samples), "--length", str(cell.length)]
    commands = [[*words, "--dtype", setting.dtype]]
    if recipe.minutes is not None:
        commands.append(["ace-triton", "recover", PRUNED, RECOVERED, "--minutes", f"{recipe.minutes:g}", *text])
    return tuple(map(shlex.join, commands))


def _update_words(update: Update | None) -> list[str]:
    if update is None:
        return []
    changed = {f.name: getattr(update, f.name) for f in fields(Update) if getattr(update, f.name) != f.default}
    options = [word for name, value in changed.items() if name != "kind" for word in ("-u", f"{name}={value}")]
    return ["--update", update.kind, *options]


def without_folders(words: Sequence[str]) -> str:
    """A command line in which every path that exists has its last part only, so that it names no folder of a machine.

    Args:
        words: as in ``sys.argv``, the program first.
    """
    program, *rest = words
    return shlex.join([Path(program).name, *map(_without_folders, rest)])


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name}" if value and Path(value).exists() else word
