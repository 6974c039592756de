"""The settings that the flags of ``ace-triton shrink`` ask for, or that a file of an earlier run holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from ..errors import RecipeError
from ..recipe import read_recipe_file
from ..structures.settings import METHODS, ShrinkSettings
from .options import parse_bytes
from .recipe_file import CalibrationSettings, read_documents_of, saved_calibration
from .recipe_flags import calibration_from, check_places, given_flags

BUDGETS = {"ratio", "size", "speedup"}
"""The settings that say how much is removed."""


@dataclass(frozen=True)
class ShrinkWords:
    """What a command line asks for.

    Attributes:
        settings: what is removed and how.
        calibration: which calibration sequences to take; its digest is the one that the text must have.
    """

    settings: ShrinkSettings
    calibration: CalibrationSettings

    @classmethod
    def of(cls, context: typer.Context) -> ShrinkWords:
        """From the flags and the file of ``--recipe``; flags replace what the file says.

        Raises:
            RecipeError: if the file or a setting is invalid.
        """
        given, path = given_flags(context), context.params["recipe"]
        names = [entry.name for entry in fields(ShrinkSettings)]
        flags = {name: given[name] for name in names if name in given}
        if "size" in flags:
            flags["size"] = parse_bytes(flags["size"], "--size")
        if len(flags.keys() & BUDGETS) > 1:
            raise RecipeError("give --ratio, --size or --speedup, one of them")
        if path is None:
            return cls(ShrinkSettings(**flags), calibration_from(given, None))
        content = read_recipe_file(path)
        settings = ShrinkSettings(**_replaced(_saved_settings(content, path), flags))
        calibration = calibration_from(given, saved_calibration(content, path))
        if settings.needs_text:
            check_places(calibration, path)
        return cls(settings, calibration)

    def read_text(self) -> tuple[CalibrationSettings, str | list[str] | None]:
        """The calibration settings with the text's digest, and the documents; None if no text is needed.

        Raises:
            TextError: if the text cannot be read.
            RecipeError: if the text is not the recorded one.
        """
        return read_documents_of(self.calibration) if self.settings.needs_text else (self.calibration, None)


def _replaced(start: ShrinkSettings, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The saved settings with those of the flags; another method drops the saved method's own settings and update."""
    saved = start.to_dict()
    if flags.keys() & BUDGETS:
        saved = {name: value for name, value in saved.items() if name not in BUDGETS}
    if flags.get("method", start.method) != start.method:
        saved = {name: value for name, value in saved.items() if name not in ("update", *METHODS[start.method].options)}
    return {**saved, **flags}


def _saved_settings(content: Mapping[str, Any], path: Path) -> ShrinkSettings:
    shrink = content.get("shrink")
    settings = shrink.get("settings") if isinstance(shrink, Mapping) else None
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{path}: holds no settings of shrink: name the ace_triton.json beside a model of 'shrink'")
    try:
        return ShrinkSettings.from_dict(settings)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
