"""Estimate the disk space that a pruning run takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..decoders.blocks import linears_of
from ..linears import linear_weight
from ..packed.stored_bits import StoredBits
from ..packed.tables import possible_bits, tables_of
from ..recipe import Recipe
from .layers import LayerSize, PlannedModel
from .skeleton import Skeleton


@dataclass(frozen=True)
class Disk:
    """Disk space of a run.

    Attributes:
        output_bytes: size of the output.
        weight_bytes: size of the weights in it, and in memory when it is loaded.
        work_bytes: most that the work folder beside the output takes. A part of it becomes the output.
        free_bytes: free space where the output is written; None if no output is named.
    """

    output_bytes: int
    weight_bytes: int
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
    stored: StoredBits | None = None,
) -> Disk:
    """The disk space of a run.

    Args:
        built: the model without weights.
        layers: its layers.
        recipe: how they are pruned.
        out: folder for the output, if it is known.
        packed: True if a packed checkpoint is written.
        streams: True if the weights stay in files during the run.
        stored: bits of the weights that stay dense in a packed checkpoint; None to keep their type.
    """
    weights, others = sum(parameter.nbytes for parameter in built.model.parameters()), _other_files(built)
    dense, smaller = weights + others, 0
    if packed:
        smaller = _saved_by_packing(layers, recipe)
        smaller += _saved_by_bits(built.model, layers, (stored or StoredBits()).packing(recipe.quantize))
    output = dense - smaller
    work = output
    if streams:
        # Weights that transformers converts are read from a copy; those of another form are pruned in that form.
        work = dense + built.resaved_bytes + built.converted_bytes
        if packed:  # Packed layers wait in files until all are packed.
            work += output + _packed_layers(layers, recipe)
    return Disk(output, weights - smaller, work, None if out is None else free_bytes(out))


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


def _packed_layers(layers: PlannedModel, recipe: Recipe) -> int:
    """Packed, a weight is its kept values, with their scales if they are quantized, and one bit for each weight.

    Without n:m there are also 8 bytes for each row, which are left out here.
    """
    n, m, few = recipe.sparsity.n, recipe.sparsity.m, recipe.quantize
    kept = 1 - recipe.sparsity.fraction if n is None or m is None else n / m
    total = 0.0
    for layer in _pruned(layers):
        values = layer.bytes * kept
        if few is not None:
            scales = layer.outputs * -(-layer.inputs // few.group) * layer.bytes / layer.elements
            values = layer.elements * kept * few.bits / 8 + scales
        total += values + layer.elements / 8
    return round(total)


def _saved_by_packing(layers: PlannedModel, recipe: Recipe) -> int:
    return sum(layer.bytes for layer in _pruned(layers)) - _packed_layers(layers, recipe)


def _saved_by_bits(model: Any, layers: PlannedModel, bits: dict[str, Any]) -> int:
    """Bytes that the head, the embedding and other dense layers lose if they are stored in few bits."""
    saved = 0
    for weight, few in _stored_weights(model, {layer.name for layer in _pruned(layers)}, bits):
        scales = weight.numel() // weight.shape[-1] * -(-weight.shape[-1] // bits["group"]) * weight.itemsize
        packed = weight.numel() * few / 8 + scales
        saved += max(0, weight.nbytes - round(packed))
    return saved


def _stored_weights(model: Any, pruned: set[str], bits: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Weights that are stored in few bits without being pruned, and their bits."""
    head_bits, embedding_bits, of_all = (bits.get(name) for name in ("head_bits", "embedding_bits", "all_bits"))
    left: dict[str, str] = {}
    if of_all is not None:
        head_bits, embedding_bits, left = possible_bits(model, of_all, head_bits, embedding_bits)
    tables = tables_of(model, head_bits, embedding_bits)
    done = {*left, *pruned, tables.tied}
    for table in (tables.head, tables.embedding):
        if table is not None and table[0] not in done:
            done.add(table[0])
            weight: Any = model.get_submodule(table[0]).weight
            yield weight, table[1]
    dense_bits = bits.get("dense_bits") or of_all
    if dense_bits is not None:
        for name, layer in linears_of(model):
            if name not in done and (weight := linear_weight(layer)) is not None:
                yield weight, dense_bits


def _pruned(layers: PlannedModel) -> list[LayerSize]:
    return [layer for unit in layers.units for layer in unit.layers if layer.is_pruned]
