"""Finds out before a run whether a model that is pruned by a recipe can be packed."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ArgumentError
from ..recipe import Recipe
from .manifest import DTYPES
from .pack_layer import LEAST_UNSTRUCTURED
from .stored_bits import StoredBits
from .tables import tables_of


def check_stored(model: nn.Module, stored: StoredBits | None) -> None:
    """ArgumentError if the head or the embedding of a model cannot be stored in the bits that are given."""
    if stored is not None:
        tables_of(model, stored.head_bits, stored.embedding_bits)


def check_packed(recipe: Recipe, dtype: torch.dtype) -> None:
    """ArgumentError if a model of this dtype that is pruned by this recipe cannot be packed."""
    pattern, few = recipe.sparsity, recipe.quantize
    if dtype not in DTYPES.values():
        raise ArgumentError(f"packed checkpoints hold {', '.join(DTYPES)}, the model is {dtype}: convert it")
    if pattern.n is None or pattern.m is None:
        if few is not None:
            raise ArgumentError(f"a packed checkpoint with few bits needs a pattern n:m, as 8:16; {pattern} is none")
        if pattern.fraction < LEAST_UNSTRUCTURED:
            raise ArgumentError(
                f"a packed checkpoint needs n:m, as 2:4, or a fraction of {LEAST_UNSTRUCTURED} or more; got {pattern}"
            )
        return
    if (pattern.axis or recipe.metric.consumer_axis) == "out":
        _check_along_outputs(recipe)
    # A packed group holds n values and a bit for each of the m weights.
    value_bytes = dtype.itemsize if few is None else few.bits / 8
    if pattern.n * value_bytes + pattern.m / 8 >= pattern.m * dtype.itemsize:
        raise ArgumentError(f"{pattern} packed is no smaller than dense: keep fewer of every {pattern.m}")


def _check_along_outputs(recipe: Recipe) -> None:
    """ArgumentError if groups n:m along the outputs, in all layers or in some, leave layers that cannot be packed."""
    pattern, few = recipe.sparsity, recipe.quantize
    cause, way_out = "axis 'out'", "leave the axis out"
    if pattern.axis is None:
        cause, way_out = f"method {recipe.method!r}", "use another method"
    if few is not None:
        raise ArgumentError(
            f"{cause} groups weights along the outputs, and only groups along the inputs can be packed in {few.bits} "
            f"bits: {way_out}, or do not quantize"
        )
    if pattern.fraction < LEAST_UNSTRUCTURED:
        raise ArgumentError(
            f"{cause} groups weights along the outputs, and such weights are packed from a fraction of "
            f"{LEAST_UNSTRUCTURED} on; {pattern} prunes {pattern.fraction:.2f}: {way_out}, or prune more"
        )
