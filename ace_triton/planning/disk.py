"""Estimate the disk space that a pruning run takes."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from .layers import PlannedModel
from .skeleton import Skeleton


@dataclass(frozen=True)
class Disk:
    """Disk space of a run.

    Attributes:
        output_bytes: size of the output.
        work_bytes: most that the work folder beside the output takes; it becomes the output.
        free_bytes: free space where the output is written; None if no output is named.
    """

    output_bytes: int
    work_bytes: int
    free_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def disk_of(
    built: Skeleton,
    layers: PlannedModel,
    recipe: Recipe,
    out: Path | None,
    *,
    packed: bool,
    streams: bool,
) -> Disk:
    """The disk space of a run.

    Args:
        built: the model without weights.
        layers: its layers.
        recipe: how they are pruned.
        out: folder for the output, if it is known.
        packed: True if a packed checkpoint is written.
        streams: True if the weights stay in files during the run.
    """
    output = sum(parameter.nbytes for parameter in built.model.parameters()) + _other_files(built)
    if packed:
        output -= _saved_by_packing(layers, recipe)
    # Weights that the model stores in another form than the checkpoint are in the work folder twice more.
    work = output + (2 * built.converted_bytes if streams else 0)
    return Disk(output, work, None if out is None else free_bytes(out))


def free_bytes(out: Path) -> int:
    """Free space on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(p for p in out.absolute().parents if os.path.lexists(p))).free


def _other_files(built: Skeleton) -> int:
    """Size of the tokenizer and the configuration, if they are on this machine; else 0."""
    folder = built.source.path
    if folder is None or not folder.is_dir():
        return 0
    kinds = (".json", ".txt", ".model", ".jinja", ".py")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)


def _saved_by_packing(layers: PlannedModel, recipe: Recipe) -> int:
    """Packed, a group of m weights is n values and m bits; if quantized, a value is smaller, and groups have scales."""
    n, m = recipe.sparsity.n, recipe.sparsity.m
    if n is None or m is None:
        return 0
    saved, by = 0.0, recipe.quantize
    for layer in (layer for unit in layers.units for layer in unit.layers if layer.is_pruned):
        values = layer.bytes * n / m
        if by is not None:
            values = layer.elements * n / m * by.bits / 8 + layer.bytes / by.group
        saved += layer.bytes - values - layer.elements / 8
    return round(saved)
