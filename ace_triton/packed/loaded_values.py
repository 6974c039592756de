"""The check of quantized values that ``load_state_dict`` puts into a layer."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import few_bits
from ..kernels.memory import why_not_plain


def why_not_loaded(
    state_dict: dict[str, Any], prefix: str, values: torch.Tensor, absmax: torch.Tensor | None, cols: int
) -> str | None:
    """Why the values of a state dict cannot be loaded into a layer; None if they can, or if there are none.

    An empty layer on the meta device is not checked: the code that fills it checks it after all tensors are loaded.

    Args:
        state_dict: the tensors to load.
        prefix: what the names of the layer's tensors begin with.
        values: the layer's values.
        absmax: the layer's largest magnitudes; None if it is not quantized.
        cols: number of values in a row.
    """
    loaded = state_dict.get(f"{prefix}values", values)
    casts = absmax is None and loaded.is_floating_point() and values.is_floating_point()
    if not casts and loaded.dtype != values.dtype:
        return (
            f"{prefix}values are {loaded.dtype}, but this layer has {values.dtype}: load the weights into a layer with "
            "the same bits"
        )
    if absmax is None:
        return None
    scales: torch.Tensor = state_dict.get(f"{prefix}absmax", absmax)
    if loaded.shape != values.shape or scales.shape != absmax.shape:
        return None  # load_state_dict reports shapes itself.
    if any(tensor.is_meta or why_not_plain(tensor) is not None for tensor in (loaded, scales, values)):
        return None
    try:
        few_bits.check_values(loaded, scales, cols)
    except ValueError as error:
        return f"{prefix.rstrip('.') or 'the layer'}: {error}: the tensors are damaged; pack the model again"
    return None
