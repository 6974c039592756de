"""weighted_squares: exact second-order CosP's column vectors, for all layers that share an input at once.

    v_kj = sum_t d_kt x_tj^2      (d_kt = 1 / s_t of layer k, 0 for a token left out)

One read of the tokens for up to 8 layers (q, k and v share one input but not their output norms).
"""

from __future__ import annotations

import torch

from . import cpu
from .backend import choose_backend

MOST_LAYERS = 8


def weighted_squares(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of squares [n_layers, in_features] in fp32.

    Args:
        tokens: [n_tokens, in_features], fp32, fp16 or bf16.
        weights: fp32 [n_layers, n_tokens], 1 to 8 layers; a token whose weight is 0 is not used, whatever it holds.
    """
    check_weights(tokens, weights)
    if choose_backend(tokens, weights) == "cpu":
        return cpu.weighted_squares(tokens, weights)
    return weighted_squares_reference(tokens, weights)


def weighted_squares_reference(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, in fp64."""
    squares = tokens.detach().double().square()
    weighted = [torch.where(w[:, None] != 0, w[:, None] * squares, 0.0).sum(0) for w in weights.double()]
    return torch.stack(weighted).float()


def check_weights(tokens: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise ValueError where ``weights`` do not fit ``tokens``."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [n_tokens, in_features], got shape {tuple(tokens.shape)}")
    if weights.dim() != 2 or weights.shape[1] != tokens.shape[0] or not 1 <= weights.shape[0] <= MOST_LAYERS:
        raise ValueError(
            f"weights must be [1..{MOST_LAYERS}, {tokens.shape[0]}] for tokens of shape {tuple(tokens.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32, got {weights.dtype}")
