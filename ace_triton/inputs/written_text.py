"""Text that a model writes itself, for use if there is no other text or too little.

Tokens are sampled from the model's predictions at temperature 1, as LLM-QAT (Liu et al., arXiv 2305.17888, section 3.1)
does for its training data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..decoders.loaded_weights import weights_as_loaded
from ..dispatched.hooks import input_device
from .beginnings import Beginning

AT_ONCE = 32
"""Number of sequences in one batch."""

TEXT_LENGTH = 256
"""Default number of tokens in a sequence to recover on."""

SEEDS_APART = 1_000_003
"""Difference between the seeds of consecutive batches. On a CPU torch uses only the lower 32 bits of a seed, so the
index of the batch cannot be stored in the upper bits."""


@dataclass(frozen=True)
class WrittenText:
    """Text that a model writes on demand. Each sequence is used once.

    Attributes:
        start: token id, or ids, that the model continues; :func:`start_token` gives the usual one.
        length: number of tokens in a sequence.
        keep_start: True if every sequence begins with ``start``, which then counts toward ``length``; False if
            ``start`` is left out.
    """

    start: int | tuple[int, ...]
    length: int = TEXT_LENGTH
    keep_start: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """``start`` as a tuple."""
        return (self.start,) if isinstance(self.start, int) else self.start


def text_to_write(model: Any, tokenizer: Any, length: int, beginning: Beginning) -> WrittenText:
    """Describe the text that a model writes. Raises TextError if the beginning leaves no room for text."""
    if beginning.of_each:
        beginning.text_length(length)
        return WrittenText(beginning.of_each, length, keep_start=True)
    return WrittenText(start_token(model, tokenizer), length)


def start_token(model: Any, tokenizer: Any) -> int:
    """The token that starts a written text: the first that exists of the tokenizer's BOS, its end-of-text token and the
    configuration's BOS; otherwise 0.
    """
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id)
    return next((token for token in tokens if token is not None), 0)


@torch.no_grad()
def write_batch(model: Any, text: WrittenText, *, seed: int, place: int, sequences: int = AT_ONCE) -> torch.Tensor:
    """Let a model write one batch of sequences.

    Args:
        model: a model of transformers.
        text: start and length of the sequences.
        seed: random seed of the text.
        place: index of the batch; the same seed and index give the same tokens.
        sequences: number of sequences.

    Returns:
        int64 [sequences, text.length], on the CPU.
    """
    device = input_device(model)
    start = torch.tensor([text.prompt] * sequences, dtype=torch.int64, device=device)
    kept = start.shape[1] if text.keep_start else 0
    devices = [device] if device.type == "cuda" else []
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
