"""The recipe and the calibration settings that the flags of ``ace-triton prune`` ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer

from ..errors import ArgumentError, RecipeError
from ..packed.stored_bits import StoredBits
from ..presets import DEFAULT_PRESET, PRESETS, replaced
from ..recipe import Recipe
from ..solvers.quantize import GROUP, Quantization
from ..sparsity import Sparsity
from .options import parse_bits, parse_options, parse_update
from .prune_run import PruneRun
from .recipe_file import MEDIA, CalibrationSettings, SavedRun, is_missing_file

STORED = ("head_bits", "embedding_bits", "dense_bits", "all_bits")
"""Flags of :class:`~ace_triton.packed.stored_bits.StoredBits`."""


def given_flags(context: typer.Context) -> dict[str, Any]:
    """The values of the flags that are on the command line, by parameter name."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def recipe_from(given: Mapping[str, Any], saved: SavedRun | None) -> Recipe:
    """The recipe: a saved one, a preset, or a method alone, with the parts that flags replace.

    A method that is named without a preset or a file runs alone.

    Raises:
        ValueError: if a flag's value is invalid, or flags do not go together.
    """
    start = _start(given.get("preset"), given.get("method"), saved)
    method = given.get("method", start.method)
    parts: dict[str, Any] = {"method": method}
    if given.get("option"):
        kept = start.options if method == start.method else {}
        parts["options"] = {**kept, **parse_options(method, given["option"])}
    if "sparsity" in given or "scope" in given:
        parts["sparsity"] = _sparsity(given, start.sparsity)
    if given.get("update") is not None or given.get("update_option"):
        parts["update"] = parse_update(given.get("update"), given.get("update_option"), start.update)
    for name in ("rotate", "permute", "sequential", "budgets", "include", "exclude"):
        if name in given:
            parts[name] = given[name]
    if "all_bits" in given:
        given = {"bits": given["all_bits"], **given}
    of_stored = start.quantize is None and (set(STORED) & set(given) or (saved and saved.stored))
    if any(name in given for name in ("bits", "quantize")) or ("group" in given and not of_stored):
        parts["quantize"] = _quantization(given, start.quantize, None if saved is None else saved.stored)
    return replaced(start, parts)


def stored_from(given: Mapping[str, Any], saved: StoredBits | None, quantize: Quantization | None) -> StoredBits | None:
    """The bits of the weights that stay dense in a packed model: saved ones, with those that flags replace.

    Args:
        given: the flags.
        saved: those of the recipe's file; None if it has none.
        quantize: how this run quantizes the kept weights, whose group holds for all; None if it does not.

    Raises:
        ArgumentError: if bits are given with a dense output, or are invalid.
    """
    parts = {name: given[name] for name in STORED if given.get(name) is not None}
    if given.get("packed") is False or (saved is None and not given.get("packed")):
        if parts:
            option = f"--{next(iter(parts)).replace('_', '-')}"
            raise ArgumentError(f"{option} is for packed models: add --packed")
        return None
    if not parts and saved is None:
        return None
    for name, bits in parts.items():
        parse_bits(bits, given.get("group", GROUP), f"--{name.replace('_', '-')}")
    group = {"group": given["group"]} if "group" in given else {}
    if quantize is not None:
        group = {"group": quantize.group}
    return replace(saved or StoredBits(), **parts, **group)


def calibration_from(given: Mapping[str, Any], saved: CalibrationSettings | None) -> CalibrationSettings:
    """The calibration settings: saved ones or the defaults, with those that flags replace."""
    start = saved or CalibrationSettings()
    names = [entry.name for entry in fields(CalibrationSettings)]
    parts = {name: given[name] for name in names if name in given}
    if any(name in given for name in MEDIA):
        parts |= {name: str(given[name]) if name in given else None for name in MEDIA}
    if "calibration" in given:
        parts["text"] = given["calibration"]
    of_files = any(getattr(start, name) is not None for name in MEDIA)
    if given.keys() & {"calibration", *MEDIA, *(("samples", "seed") if of_files else ())}:
        parts["sha256"] = None
    return replace(start, **parts)


def check_places(settings: CalibrationSettings, path: Path) -> None:
    """RecipeError if the text is a file that was not found, or a folder was not found."""
    for name in MEDIA:
        folder = getattr(settings, name)
        if folder is not None and not Path(folder).is_dir():
            raise RecipeError(
                f"{path}: the folder {folder} was not found here or near the recipe: give it with --{name}"
            )
    if is_missing_file(settings.text):
        raise RecipeError(
            f"{path}: the calibration text {settings.text} was not found here or near the recipe: give it with "
            "--calibration"
        )


def replaced_lines(path: Path, saved: SavedRun, run: PruneRun, settings: CalibrationSettings) -> list[str]:
    """One line for each part of a saved run that a flag replaced."""
    pairs = _pairs(saved.recipe.to_dict(), run.recipe.to_dict())
    if saved.calibration is not None:
        pairs += _pairs(saved.calibration.to_dict(), settings.to_dict())
    if saved.stored is not None:
        pairs += _pairs(saved.stored.to_dict(), {} if run.stored is None else run.stored.to_dict())
    if saved.dtype is not None:
        pairs += _pairs({"dtype": saved.dtype}, {"dtype": run.dtype})
    if saved.task is not None:
        pairs += _pairs({"task": saved.task}, {"task": run.task_name})
    return [f"{name} {old} of {path} is replaced by {new}" for name, old, new in pairs]


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, _short(old), _short(after.get(name))) for name, old in before.items() if after.get(name) != old]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "pattern" in value:
        return str(Sparsity.of(value)) + "".join(f", {name}={value[name]}" for name in ("axis", "scope") if value[name])
    return "none" if value is None else str(value)


def _start(preset: str | None, method: str | None, saved: SavedRun | None) -> Recipe:
    if preset not in (None, *PRESETS):
        raise ArgumentError(f"--preset {preset!r}: use one of {', '.join(PRESETS)}")
    if saved is not None:
        if preset is not None:
            raise ArgumentError("--preset and --recipe both name a recipe: give one of them")
        return saved.recipe
    return Recipe(method) if method is not None and preset is None else PRESETS[preset or DEFAULT_PRESET]


def _quantization(given: Mapping[str, Any], start: Quantization | None, stored: StoredBits | None) -> Quantization:
    """The quantization with the parts that flags replace; a new one has the group of the saved stored bits."""
    if start is None and "bits" not in given:
        raise ArgumentError("--group and --quantize are for quantized weights: add --bits 8 or --bits 4")
    names = {"bits": "bits", "group": "group", "quantize": "rule"}
    changed = {part: given[flag] for flag, part in names.items() if flag in given}
    return replace(start or Quantization(group=GROUP if stored is None else stored.group), **changed)


def _sparsity(given: Mapping[str, Any], start: Sparsity) -> Sparsity:
    """The pattern with the scope that was given, or else, for a fraction, with the old scope."""
    pattern = given.get("sparsity", start.pattern)
    usual = "row" if Sparsity.of(pattern).n is not None else start.scope
    return Sparsity(pattern, axis=start.axis, scope=given.get("scope", usual))
