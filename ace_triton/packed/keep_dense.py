"""Keep dense copies of packed weights in the memory of a CPU, so that calls with many rows do not unpack them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ArgumentError, CheckpointError
from ..inputs.model_task import find_task
from .dense_copy import dense_copy_of, free_dense_copy
from .dispatch import ALWAYS, copy_limits
from .kernel import bits_of, pattern_of
from .manifest import DTYPES, DenseEntry, Manifest, PackedEntry, RowsEntry, is_packed
from .packed_linear import PackedLinear
from .products import RowLimits

Keep = Literal["auto", "packed", "fast"]
"""What stays in memory after a packed model is loaded: see :func:`keep_dense`."""

CACHE_BYTES = 32 * 2**20
"""Dense weights of a model up to this many bytes in all count as held by the processor's cache."""


@dataclass(frozen=True)
class DenseCopies:
    """The dense copies of a model's packed weights, in addition to the packed weights.

    Attributes:
        layers: number of layers with a copy.
        bytes: size of all copies.
    """

    layers: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def keep_dense(model: nn.Module, keep: Keep = "auto") -> DenseCopies:
    """Choose if the packed layers of a model on a CPU keep dense copies of their weights, and make these copies.

    Our kernel is for few rows, or with bf16 instructions for some hundreds. A call with more rows unpacks the weight,
    which is slower than a dense layer. With a copy such a call is a dense layer's. Weights that our kernel multiplies
    at every number of rows get no copy, for example bf16 on processors with AVX2 only.

    The choice depends on the model, the dtype and the processor's instruction set, and nothing is timed. So outputs are
    the same in every run, and those of other choices differ from them by rounding only.

    A copy is made again if a tensor of the packed weight was changed or replaced. Changes that torch does not count are
    not seen, such as ``layer.values.data.mul_(2)``: call this function with "packed" and then again after them. Tensors
    that were made in inference mode have no count of changes, so in this mode their copies are made in each call.

    Args:
        model: a model with packed layers. Layers on other devices have the defaults of their device.
        keep: "fast" keeps copies, "packed" keeps none and frees those that exist. "auto" keeps copies unless the model
            generates text: a model that generates multiplies one row at a time, which is what our kernel is for, while
            an encoder multiplies all tokens of its input.

    Returns:
        How many copies are kept, and their size. The limits of the layers are set (:func:`~ace_triton.set_row_limits`
        with None restores the defaults).

    Raises:
        ArgumentError: if ``keep`` is unknown.
    """
    check_keep(keep)
    wanted = keep == "fast" or (keep == "auto" and not generates(model))
    layers = _layers(model)
    cached = sum(layer.packed.dense_bytes for layer in layers) <= CACHE_BYTES
    for layer in layers:
        limits = _limits(layer, cached=cached) if wanted else None
        if limits is not None:
            layer.limits = limits
            dense_copy_of(layer.packed)
        else:
            if _has_copy(layer):
                layer.limits = None
            free_dense_copy(layer.packed)
    return dense_copies(model)


def copies_of(manifest: Manifest, dtype: torch.dtype | None = None, *, generating: bool) -> DenseCopies:
    """The copies that a packed checkpoint gets if it is loaded on this CPU with ``keep="auto"``.

    Args:
        manifest: the checkpoint's manifest.
        dtype: dtype that the weights are converted to; None for their own.
        generating: True if the model generates text.
    """
    dtype = dtype or DTYPES[manifest.dtype]
    entries = [e for e in manifest.layers.values() if not (isinstance(e, DenseEntry) and e.embedding)]
    sizes = [entry.shape[0] * entry.shape[1] * dtype.itemsize for entry in entries]
    cached = sum(sizes) <= CACHE_BYTES
    kept = []
    for entry, size in zip(entries, sizes, strict=True):
        pattern = (entry.n, entry.m) if isinstance(entry, PackedEntry) else None
        bits = None if isinstance(entry, RowsEntry) else entry.bits
        if copy_limits(dtype, pattern, bits, cached=cached).packed < ALWAYS:
            kept.append(size)
    return DenseCopies(0, 0) if generating else DenseCopies(len(kept), sum(kept))


def copies_of_folder(folder: str | Path) -> DenseCopies | None:
    """As :func:`copies_of` for a folder; None if it is not packed, or its model needs Python code of its own."""
    if not is_packed(folder):
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        known = find_task(str(folder), config, None).model_class
    except (CheckpointError, OSError, ValueError):
        return None
    return None if known is None else copies_of(Manifest.read(folder), generating=generates(known))


def check_keep(keep: str) -> None:
    """ArgumentError if ``keep`` is no :data:`Keep`."""
    if keep not in get_args(Keep):
        raise ArgumentError(f"keep {keep!r}: use {', '.join(get_args(Keep))}")


def dense_copies(model: nn.Module) -> DenseCopies:
    """The dense copies that the packed layers of a model keep."""
    sizes = [
        layer.packed.dense_bytes for layer in _layers(model) if layer.limits is not None and layer.limits.dense_copy
    ]
    return DenseCopies(len(sizes), sum(sizes))


def generates(model: Any) -> bool:
    """True if a model or a class of transformers generates text, so that most of its calls have one row."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _layers(model: nn.Module) -> list[PackedLinear]:
    """The packed layers on a CPU."""
    layers = (module for module in model.modules() if isinstance(module, PackedLinear))
    return [layer for layer in layers if layer.values.device.type == "cpu"]


def _has_copy(layer: PackedLinear) -> bool:
    return layer.limits is not None and layer.limits.dense_copy


def _limits(layer: PackedLinear, *, cached: bool) -> RowLimits | None:
    """The limits of a layer with a dense copy; None if our kernel takes all its calls."""
    packed = layer.packed
    limits = copy_limits(layer.dtype, pattern_of(packed), bits_of(packed), cached=cached)
    return None if limits.packed >= ALWAYS else limits
