"""A sample of a layer's input tokens. It replaces the Gram matrix when only the energy of each output is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import StatsError
from .gram import check_valid, token_rows
from .statistic import Saved, Statistic, TensorForm, register_statistic

LANE_STEP = 2**32
"""The seeds of two lanes differ by this at least, which is more than the tokens of a lane."""

SAMPLE_TOKENS = 512
"""Number of tokens kept at most."""


@register_statistic("sample", words="a sample of tokens")
@dataclass
class TokenSample(Statistic):
    """A uniform sample of the tokens seen, streamed and mergeable with ``+``.

    Each token gets a random number, and the tokens with the lowest numbers are kept. The random seed is the number of
    earlier tokens, so the same batches give the same sample.

    The first token of each sequence is left out. It is an attention sink (Xiao et al., arXiv 2309.17453), and its
    activations are far larger than those of other tokens (Sun et al., arXiv 2402.17762). Its energy would dominate the
    energy of a row.

    Attributes:
        in_features: number of channels.
        count: tokens that the sample was drawn from.
        tokens: [n, in_features], n at most :data:`SAMPLE_TOKENS`, in their dtype; None before the first update.
        draws: the random numbers of the kept tokens, fp64 [n] on the CPU.
        lane: number of the part of the tokens that this sample is for.
    """

    in_features: int
    count: int = 0
    tokens: torch.Tensor | None = None
    draws: torch.Tensor | None = None
    lane: int = 0

    forms: ClassVar = {
        "sample": TensorForm("kj", (torch.float32, torch.float16, torch.bfloat16), signed=True),
        "draws": TensorForm("k", (torch.float64,)),
    }
    file_prefix: ClassVar = ""

    def draw_for_lane(self, lane: int) -> None:
        """Draw other random numbers than in other lanes."""
        self.lane = lane

    @torch.no_grad()
    def update(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tokens: [n_sequences, length, in_features], or [n_tokens, in_features] in any order; any floating dtype.
            valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out (padding).

        Raises:
            StatsError: the tokens have another width, or ``valid`` another shape.
        """
        rows = token_rows(tokens, None, self.in_features, "sample")
        check_valid(tokens, valid)
        counted = _without_first(valid, tokens.shape[:-1], tokens.device)
        indices = None if counted is None else counted.to(rows.device).flatten().nonzero()[:, 0]
        count = len(rows if indices is None else indices)
        generator = torch.Generator().manual_seed(self.count + LANE_STEP * self.lane)
        draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        lowest = _lowest(draws)
        chosen = lowest.to(rows.device)
        drawn = rows[chosen if indices is None else indices[chosen]]
        merged = self + TokenSample(self.in_features, count, drawn, draws[lowest])
        self.count, self.tokens, self.draws = merged.count, merged.tokens, merged.draws

    def __add__(self, other: TokenSample) -> TokenSample:
        """The sample of the tokens of both; neither operand changes."""
        if other.in_features != self.in_features:
            raise StatsError(f"samples of {self.in_features} and {other.in_features} channels do not merge")
        if self.tokens is None or self.draws is None or other.tokens is None or other.draws is None:
            return replace(other if self.tokens is None else self)
        draws = torch.cat([self.draws, other.draws])
        chosen = _lowest(draws)
        tokens = torch.cat([self.tokens, other.tokens])[chosen.to(self.tokens.device)]
        return TokenSample(self.in_features, self.count + other.count, tokens, draws[chosen])

    def reordered(self, order: torch.Tensor) -> TokenSample:
        """A copy with reordered channels: position p gets channel ``order[p]``, int64 [in_features]."""
        return replace(self, tokens=None if self.tokens is None else self.tokens[:, order])

    def to(self, device: torch.device | str) -> TokenSample:
        """A copy on ``device``."""
        return replace(self, tokens=None if self.tokens is None else self.tokens.to(device, copy=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tokens and draws; empty before the first update."""
        return {} if self.tokens is None or self.draws is None else {"sample": self.tokens, "draws": self.draws}

    @classmethod
    def load(cls, saved: Saved) -> TokenSample:
        """The sample from a file."""
        return cls(saved.in_features, saved.count, saved.tensors["sample"], saved.tensors["draws"])


def _without_first(valid: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """``valid`` without the first token of each sequence; a sequence with a single token keeps it.

    None if all tokens are used.
    """
    if len(shape) < 2:
        return valid
    counted = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    rank = counted.cumsum(1)
    return counted & ((rank > 1) | (rank[:, -1:] == 1))


def _lowest(draws: torch.Tensor) -> torch.Tensor:
    """Indices of the lowest draws, at most :data:`SAMPLE_TOKENS` of them, in ascending order."""
    return draws.topk(min(SAMPLE_TOKENS, len(draws)), largest=False).indices.sort().values
