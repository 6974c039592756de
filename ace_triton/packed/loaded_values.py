"""The check of quantized values that ``load_state_dict`` puts into a layer."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import few_bits
from ..kernels.memory import why_not_plain


def why_not_loaded(
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    values: torch.Tensor,
    absmax: torch.Tensor | None,
    cols: int,
) -> str | None:
    """Why the values of a state dict cannot be loaded into a layer; None if they can, or if there are none.

    An empty layer on the meta device is not checked: the code that fills it checks it after all tensors are loaded.

    Args:
        state_dict: the tensors to load.
        prefix: what the names of the layer's tensors begin with.
        metadata: what ``nn.Module`` tells a layer that it loads; it says whether the tensors are copied or assigned.
        values: the layer's values.
        absmax: the layer's largest magnitudes; None if it is not quantized.
        cols: number of values in a row.
    """
    loaded, scales = state_dict.get(f"{prefix}values", values), state_dict.get(f"{prefix}absmax", absmax)
    if not isinstance(loaded, torch.Tensor) or not isinstance(scales, torch.Tensor | None):
        return None  # load_state_dict reports them itself.
    casts = absmax is None and loaded.is_floating_point() and values.is_floating_point()
    if not casts and loaded.dtype != values.dtype:
        return (
            f"{prefix}values are {loaded.dtype}, but this layer has {values.dtype}: load the weights into a layer with "
            "the same bits"
        )
    if absmax is None or scales is None:
        return None
    if scales.dtype not in few_bits.DTYPES:
        return f"{prefix}absmax are {scales.dtype}, but must be float32, float16 or bfloat16: pack the model again"
    if loaded.shape != values.shape or scales.shape != absmax.shape:
        return None  # load_state_dict reports shapes itself.
    if any(tensor.is_meta or why_not_plain(tensor) is not None for tensor in (loaded, scales, values)):
        return None
    try:
        few_bits.check_values(loaded, scales, cols)
    except ValueError as error:
        return f"{prefix.rstrip('.') or 'the layer'}: {error}: the tensors are damaged; pack the model again"
    if not metadata.get("assign_to_params_buffers", False) and bool(scales.to(absmax.dtype).isinf().any()):
        return f"{prefix}absmax exceed the range of {absmax.dtype}: load them into a layer in {scales.dtype}"
    return None
