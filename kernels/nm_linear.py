"""nm_linear: y = x W^T + b from a packed n:m weight, for the few rows of decoding.

    y_ti = sum_j x_tj W_ij + b_i

over the kept (i, j) alone, summed in fp32. Bytes per weight of e bytes: e * n / m + 1/8, once for up to 16 rows.
"""

from __future__ import annotations

import torch

from .pack_nm import PackedNM, unpack_nm_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def nm_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs [..., out_features] in the dtype of ``tokens``.

    Args:
        tokens: [..., in_features], fp32, fp16 or bf16; any number of rows is right, 1 to 16 are fast.
        packed: the weight, fp32, fp16 or bf16, of any pattern; 2:4 is fast.
        bias: [out_features] or None.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_linear(tokens, packed, bias)
    return nm_linear_reference(tokens, packed, bias)


def nm_linear_reference(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch, by way of the dense weight in fp32."""
    weight = unpack_nm_reference(packed).float()
    outputs = tokens.float() @ weight.t()
    if bias is not None:
        outputs = outputs + bias.float()
    return outputs.to(tokens.dtype)


def check_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> None:
    """Raise ValueError for what :func:`nm_linear` does not serve."""
    out_features, in_features = packed.shape
    if tokens.dim() < 1 or tokens.shape[-1] != in_features:
        raise ValueError(
            f"tokens must be [..., {in_features}] for a weight {packed.shape}, got shape {tuple(tokens.shape)}"
        )
    if tokens.dtype not in DTYPES or packed.values.dtype not in DTYPES:
        raise ValueError(
            "tokens and weight must be float32, float16 or bfloat16, "
            f"got {tokens.dtype} and {packed.values.dtype}: convert them"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must be [{out_features}] for a weight {packed.shape}, got {tuple(bias.shape)}")
