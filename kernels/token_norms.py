"""token_norms: s_t = sum_i a_ti^2 of every token, in one read, summed in fp32."""

from __future__ import annotations

import torch

from . import cpu
from .backend import choose_backend


def token_norms(outputs: torch.Tensor) -> torch.Tensor:
    """Squared L2 norms [n_tokens] in fp32 of outputs [n_tokens, out_features] (fp32, fp16 or bf16).

    fp32 because s_t passes fp16's largest number on massive-activation tokens.
    """
    if outputs.dim() != 2:
        raise ValueError(f"outputs must be [n_tokens, out_features], got shape {tuple(outputs.shape)}")
    if choose_backend(outputs) == "cpu":
        return cpu.token_norms(outputs)
    return token_norms_reference(outputs)


def token_norms_reference(outputs: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, in fp64."""
    return outputs.detach().double().square().sum(-1).float()
