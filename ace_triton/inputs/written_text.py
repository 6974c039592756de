"""Text that a model writes itself, if there is no other or not enough.

Tokens are drawn from its own predictions at temperature 1, as LLM-QAT (Liu et al., arXiv 2305.17888, section 3.1) makes
its training data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..decoders.loaded_weights import weights_as_loaded
from .beginnings import Beginning

AT_ONCE = 32
"""Sequences in one batch."""

TEXT_LENGTH = 256
"""Default number of tokens in a sequence to recover on."""

SEEDS_APART = 1_000_003
"""Between the seeds of two batches. Torch takes the lower 32 bits of a seed on a CPU, so the upper ones cannot hold the
batch."""


@dataclass(frozen=True)
class WrittenText:
    """Text that a model writes as it is read: as much as is needed, and never the same sequence twice.

    Attributes:
        start: token id, or ids, that the model continues (:func:`start_token`).
        length: tokens of a sequence.
        keep_start: every sequence begins with ``start``, counted in ``length``; otherwise ``start`` is not in it.
    """

    start: int | tuple[int, ...]
    length: int = TEXT_LENGTH
    keep_start: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """``start`` as a tuple."""
        return (self.start,) if isinstance(self.start, int) else self.start


def text_to_write(model: Any, tokenizer: Any, length: int, beginning: Beginning) -> WrittenText:
    """How a model writes sequences that begin as ``beginning`` says; TextError if there is no room for text."""
    if beginning.of_each:
        beginning.text_length(length)
        return WrittenText(beginning.of_each, length, keep_start=True)
    return WrittenText(start_token(model, tokenizer), length)


def start_token(model: Any, tokenizer: Any) -> int:
    """The token that a model's texts continue: its beginning of text, or the end of the text before."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id)
    return next((token for token in tokens if token is not None), 0)


@torch.no_grad()
def write_batch(model: Any, text: WrittenText, *, seed: int, place: int, sequences: int = AT_ONCE) -> torch.Tensor:
    """A batch of sequences, int64 [sequences, text.length] on the CPU.

    Args:
        model: from transformers.
        text: what to write.
        seed: of the text.
        place: index of the batch; the same seed and place give the same tokens.
        sequences: how many.
    """
    start = torch.tensor([text.prompt] * sequences, dtype=torch.int64, device=model.device)
    kept = start.shape[1] if text.keep_start else 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), weights_as_loaded(model):
        torch.manual_seed(seed + SEEDS_APART * place)
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=text.length - kept,
            max_new_tokens=text.length - kept,
            pad_token_id=text.prompt[0],
        )
    return written[:, start.shape[1] - kept :].cpu()
