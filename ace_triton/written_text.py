"""Text that a model writes itself, for want of any other or of more.

Tokens are drawn from its own predictions at temperature 1, as LLM-QAT (Liu et al., arXiv 2305.17888, section 3.1) makes
its training data.
"""

from __future__ import annotations

from typing import Any

import torch

from .loaded_weights import weights_as_loaded

AT_ONCE = 32
"""Sequences of one batch."""

SEEDS_APART = 1_000_003
"""From a batch to the next. Torch takes the lower 32 bits of a seed on a CPU, so that places cannot have the upper."""


def start_token(model: Any, tokenizer: Any) -> int:
    """The token that a model's texts are continued from: its beginning of text, or the end of the one before."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id)
    return next((token for token in tokens if token is not None), 0)


@torch.no_grad()
def write_batch(
    model: Any, start: int, length: int, *, seed: int, place: int, sequences: int = AT_ONCE
) -> torch.Tensor:
    """Sequences that follow ``start``, which is not in them; int64 [sequences, length] on the CPU.

    Args:
        model: of transformers.
        start: token id.
        length: tokens of a sequence.
        seed: of the text.
        place: of the batch in it, from 0 on; the same seed and place give the same tokens.
        sequences: how many.
    """
    prompt = torch.full((sequences, 1), start, dtype=torch.int64, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), weights_as_loaded(model):
        torch.manual_seed(seed + SEEDS_APART * place)
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=start,
        )
    return text[:, 1:].cpu()
