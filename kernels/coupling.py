"""coupling: the matrix of CosP's published loss, accumulated over batches in fp32.

    "abs":  K_ij += sum_t |a_ti x_tj| d_t          "rms":  K_ij += sum_t (a_ti x_tj d_t)^2

with d_t = 1 / s_t (0 for a token left out). A GEMM over the tokens whose operands are made on the way
in: |a| d and |x|, or their squares; nothing of size [n_tokens, ...] is written.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu
from .backend import choose_backend

Reduce = Literal["abs", "rms"]


def coupling(
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
    reduce: Reduce = "abs",
    *,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a batch to the coupling matrix.

    Args:
        tokens: [n_tokens, in_features], fp32, fp16 or bf16.
        outputs: [n_tokens, out_features], the layer's outputs, bias included; same dtypes.
        weights: fp32 [n_tokens], d_t; a token whose weight is 0 is not used, whatever it holds. Keep them near 1 by
            scaling (1 / s_t is below fp16's range).
        reduce: "abs" or "rms".
        into: fp32 [out_features, in_features], added to in place and returned; None starts from 0.
    """
    if reduce not in ("abs", "rms"):
        raise ValueError(f"reduce must be 'abs' or 'rms', got {reduce!r}")
    n_tokens = tokens.shape[0]
    if tokens.dim() != 2 or outputs.dim() != 2 or outputs.shape[0] != n_tokens or weights.shape != (n_tokens,):
        raise ValueError(
            "coupling needs tokens [n_tokens, in_features], outputs [n_tokens, out_features] and weights [n_tokens], "
            f"got {tuple(tokens.shape)}, {tuple(outputs.shape)}, {tuple(weights.shape)}"
        )
    shape = (outputs.shape[1], tokens.shape[1])
    if into is None:
        into = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
    elif tuple(into.shape) != shape or into.dtype != torch.float32 or not into.is_contiguous():
        raise ValueError(f"into must be contiguous float32 {shape}, got {into.dtype} {tuple(into.shape)}")
    if choose_backend(tokens, outputs, weights, into) == "cpu":
        return cpu.coupling(tokens, outputs, weights, reduce, into)
    return into.add_(coupling_reference(tokens, outputs, weights, reduce))


def coupling_reference(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce = "abs"
) -> torch.Tensor:
    """One batch's matrix in plain torch, in fp64."""
    used = weights != 0
    x, a, d = tokens[used].detach().double().abs(), outputs[used].detach().double().abs(), weights[used].double()
    a = a * d[:, None]
    if reduce == "rms":
        x, a = x.square(), a.square()
    return (a.t() @ x).float()
