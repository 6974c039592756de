"""moments: what every activation-aware metric needs of its tokens, in one read of them.

    per sequence s:  sum_t x_tj^2;   over all tokens:  count, sum_t x_tj, sum_t (x_tj - mean_j)^2

Squared deviations are taken about a token of the same chunk and merged by Chan's rule, so a large mean
does not cancel. Bytes per token element of e bytes: e read; fp32 vectors a chunk written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu
from .backend import choose_backend


@dataclass(frozen=True)
class Moments:
    """Channel sums of one batch of tokens; vectors are fp32.

    Attributes:
        count: number of tokens counted.
        total: [in_features], sum of x.
        deviation: [in_features], sum of squared deviations from the batch's own mean.
        sequence_square: [n_sequences, in_features], sum of x^2 over each sequence's tokens.
        sequence_count: [n_sequences] int64, tokens counted in each sequence.
    """

    count: int
    total: torch.Tensor
    deviation: torch.Tensor
    sequence_square: torch.Tensor
    sequence_count: torch.Tensor


def moments(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> Moments:
    """Channel moments of a batch.

    Args:
        tokens: [n_sequences, length, in_features], or [n_tokens, in_features] as one sequence; fp32,
            fp16 or bf16.
        valid: bool [n_sequences, length] (or [n_tokens]), False for tokens to leave out (padding).
            What stands in tokens left out is never used, NaN included.

    Raises:
        ValueError: a shape that does not fit.
    """
    tokens, valid = as_sequences(tokens, valid)
    if choose_backend(tokens, valid) == "cpu":
        return Moments(*cpu.moments(tokens, valid))
    return moments_reference(tokens, valid)


def moments_reference(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> Moments:
    """The same in plain torch, in fp64."""
    tokens, valid = as_sequences(tokens, valid)
    x = tokens.detach().double()
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    kept = valid[..., None]
    x = torch.where(kept, x, 0.0)
    sequence_count = valid.sum(1)
    count = int(sequence_count.sum())
    total = x.sum((0, 1))
    deviation = torch.where(kept, x - total / max(count, 1), 0.0).square().sum((0, 1))
    return Moments(count, total.float(), deviation.float(), x.square().sum(1).float(), sequence_count)


def as_sequences(tokens: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens as [n_sequences, length, in_features] and valid as bool [n_sequences, length]."""
    if tokens.dim() == 2:
        tokens = tokens[None]
        valid = None if valid is None else valid.reshape(1, -1)
    if tokens.dim() != 3:
        raise ValueError(
            "tokens must be [n_tokens, in_features] or [n_sequences, length, in_features], "
            f"got shape {tuple(tokens.shape)}"
        )
    if valid is not None and (valid.shape != tokens.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool of shape {tuple(tokens.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
        )
    return tokens, valid
