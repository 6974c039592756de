"""Calibration sequences: token ids cut out of text, or written by the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .text import TextError, read_documents
from .written_text import AT_ONCE, start_token, write_batch

SELF = "self"

MOST_DOCUMENTS = 20_000
"""Read from a dataset; enough for any calibration, and a bound on what a huge one costs."""


@dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate on.

    Attributes:
        ids: int64 [n_sequences, length].
        mask: bool [n_sequences, length], False for padding; None where there is none.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens counted, padding left out."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def load_calibration(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 128,
    seed: int = 0,
    model: Any = None,
    apart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibration sequences from a source.

    Documents are tokenised one by one, joined with the end-of-text id between them, and cropped at
    random places.

    Args:
        source: as for :func:`~ace_triton.text.read_documents`; its documents, already read; or "self": the model writes
            its own text (:mod:`~ace_triton.written_text`).
        tokenizer: the model's.
        samples, length: how many sequences, of how many tokens.
        seed: of the crops, or of the sampling.
        model: the model, for "self".
        apart: no token in two sequences: pieces that follow each other, as many as the text has but no more than
            ``samples``, instead of random crops.
        progress: called with sequences done and sequences in all.

    Raises:
        TextError: text that cannot be read, or is shorter than one sequence.
    """
    if samples < 1 or length < 2:
        raise TextError(f"calibration needs at least 1 sequence of 2 tokens, got {samples} of {length}")
    if source == SELF:
        return Calibration(_written_by(model, tokenizer, samples, length, seed, progress))
    documents = read_documents(source, most=MOST_DOCUMENTS) if isinstance(source, str) else source
    stream = token_stream(documents, tokenizer)
    ids = (pieces if apart else crop)(stream, samples, length, seed)
    if progress is not None:
        progress(len(ids), len(ids))
    return Calibration(ids)


def token_stream(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """All documents' token ids, int64 [n_tokens], each document ended by the end-of-text id."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64)


def crop(stream: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """``samples`` random crops of a stream, int64 [samples, length]."""
    _check_length(stream, length)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def pieces(stream: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """A stream from a random place on, cut into pieces, ``samples`` of them at random: int64 [at most samples, length].

    No token is in two of them, and where ``samples`` allows it fewer than ``length`` are in none.
    """
    _check_length(stream, length)
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(0, len(stream) % length + 1, (), generator=generator))
    cut = stream[first : first + len(stream) // length * length].view(-1, length)
    return cut[torch.randperm(len(cut), generator=generator)[:samples]]


def _check_length(stream: torch.Tensor, length: int) -> None:
    if len(stream) < length:
        raise TextError(
            f"the calibration text has {len(stream)} tokens, one sequence needs {length}: "
            "give more text or a smaller --length"
        )


def _written_by(
    model: Any, tokenizer: Any, samples: int, length: int, seed: int, progress: Callable[[int, int], None] | None
) -> torch.Tensor:
    if model is None:
        raise TextError('source "self" needs the model: pass model=')
    start, size = start_token(model, tokenizer), min(samples, AT_ONCE)
    batches = []
    for place in range(math.ceil(samples / size)):
        batches.append(write_batch(model, start, length, seed=seed, place=place, sequences=size))
        if progress is not None:
            progress(min((place + 1) * size, samples), samples)
    return torch.cat(batches)[:samples]
