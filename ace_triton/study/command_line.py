"""The commands that repeat what a study measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import StudyError
from .cells import Cell
from .records import Setting

PRUNED, RECOVERED = "pruned", "recovered"
"""The folders that the commands write."""


def commands_of(setting: Setting, cell: Cell) -> tuple[str, ...]:
    """``ace-triton prune`` with the options of a cell, and ``recover`` if the cell has minutes.

    The model and the texts are named without their folders, as the setting has them.

    Raises:
        ValueError: for a published form, which no command runs.
    """
    recipe = cell.recipe
    if cell.published:
        raise StudyError(f"{cell}: no command prunes by a published form")
    words = ["ace-triton", "prune", setting.model, PRUNED, "--method", recipe.method]
    words += _assignments("-o", recipe.options)
    words += ["--sparsity", cell.sparsity]
    words += ["--rotate"] if recipe.rotate else []
    words += ["--permute"] if recipe.permute else []
    if recipe.update is not None:
        words += ["--update", recipe.update.kind, *_assignments("-u", recipe.update.changed)]
    words += ["--sequential", recipe.sequential] if recipe.sequential != "blocks" else []
    words += ["--budgets", recipe.budgets] if recipe.budgets is not None else []
    if (bits := recipe.quantize) is not None:
        words += ["--bits", str(bits.bits), "--group", str(bits.group), "--quantize", bits.rule]
    text = ["--calibration", setting.calibration]
    if cell.length is not None:
        words += [*text, "--samples", str(setting.samples), "--length", str(cell.length)]
    commands = [[*words, "--dtype", setting.dtype]]
    if cell.minutes is not None:
        commands.append(["ace-triton", "recover", PRUNED, RECOVERED, "--minutes", f"{cell.minutes:g}", *text])
    return tuple(map(shlex.join, commands))


def _assignments(option: str, values: Mapping[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (option, f"{name}={value}")]


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
