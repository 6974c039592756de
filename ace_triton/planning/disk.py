"""Estimate the disk space that a pruning run takes."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..streaming.mapped_model import _saved_form as saved_form
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
    streamed_bytes: int,
) -> Disk:
    """The disk space of a run.

    Args:
        built: the model without weights.
        layers: its layers.
        recipe: how they are pruned.
        out: folder for the output, if it is known.
        packed: True if a packed checkpoint is written.
        streamed_bytes: size of the weights that a streamed run keeps in another form; 0 for a run in memory.
    """
    output = sum(parameter.nbytes for parameter in built.model.parameters()) + _other_files(built)
    if packed:
        output -= _saved_by_packing(layers, recipe)
    # Weights that the model stores in another form than the checkpoint are in the work folder twice more.
    work = output + 2 * streamed_bytes
    return Disk(output, work, None if out is None else free_bytes(out))


def converted_bytes(built: Skeleton) -> int:
    """Size of the weights that the model stores in another form than the checkpoint, such as experts in one tensor.

    For quantized weights this is the whole model, although a few of its weights are not quantized.
    """
    if built.quantization is not None:
        return sum(parameter.nbytes for parameter in built.model.parameters())
    _, direct = saved_form(built.model)
    return sum(parameter.nbytes for name, parameter in built.model.named_parameters() if name not in direct)


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
    """Packed, a group of m weights is n values and m bits."""
    n, m = recipe.sparsity.n, recipe.sparsity.m
    if n is None or m is None:
        return 0
    saved = 0.0
    for layer in (layer for unit in layers.units for layer in unit.layers if layer.is_pruned):
        saved += layer.bytes - layer.bytes * n / m - layer.elements / 8
    return round(saved)
