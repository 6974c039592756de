"""Perplexity over non-overlapping windows, as Wanda, RIA and SparseGPT measure it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .text import TextError
from .threads import few_threads, forward_work


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was taken over.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token, in nats, over all predicted tokens.
        windows, length: number of windows and tokens of each.
        tokens: tokens predicted, windows * (length - 1).
    """

    perplexity: float
    windows: int
    length: int
    tokens: int

    def to_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any,
    ids: torch.Tensor,
    *,
    length: int = 2048,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal model on a stream of tokens.

    The stream is cut into windows of ``length`` without overlap, what is left over is dropped, and each
    window's first token is context only.

    Args:
        model: a Hugging Face causal model; run as it is, in its own dtype. Log-likelihoods are fp32.
        ids: int64 [n_tokens].
        length: tokens of a window.
        windows: the first so many windows; None for all.
        progress: called with (windows done, windows in all).

    Raises:
        TextError: fewer tokens than one window.
    """
    if length < 2:
        raise TextError(f"a window needs at least 2 tokens, got {length}")
    there = len(ids) // length
    count = there if windows is None else min(windows, there)
    if count < 1:
        raise TextError(
            f"the text has {len(ids)} tokens, one window needs {length}: give more text or a smaller --length"
        )
    was_training = model.training
    model.eval()
    loss = 0.0
    try:
        with few_threads(forward_work(model, length)):
            for index in range(count):
                window = ids[index * length : (index + 1) * length].to(model.device)[None]
                logits = model(window, use_cache=False).logits[0, :-1].float()
                loss += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
                if progress is not None:
                    progress(index + 1, count)
    finally:
        model.train(was_training)
    tokens = count * (length - 1)
    mean = loss / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, count, length, tokens)
