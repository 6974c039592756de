"""Calibration sequences: token ids cut out of text, or written by the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TextError
from .beginnings import NO_BEGINNING, Beginning, Bos, token_ids
from .text import read_documents
from .written_text import AT_ONCE, text_to_write, write_batch

SELF = "self"

MOST_DOCUMENTS = 20_000
"""Documents that are read from one source: enough for any calibration, and a bound on the cost of a huge source."""


@dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate on.

    Attributes:
        ids: int64 [n_sequences, length].
        mask: bool [n_sequences, length], False for padding; None if there is no padding.
        beginning: what every sequence begins with; its tokens are in ``ids``.
        documents, distinct_documents: read from the source; None if the model wrote the text.
        text_tokens: tokens of all documents together, which the sequences were cut out of; None likewise.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    beginning: Beginning = NO_BEGINNING
    documents: int | None = None
    distinct_documents: int | None = None
    text_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def read_calibration(source: str) -> str | list[str]:
    """The documents of a source, or "self" as it is: what :func:`load_calibration` takes once a model is loaded."""
    return source if source == SELF else read_documents(source, most=MOST_DOCUMENTS)


def load_calibration(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 128,
    seed: int = 0,
    model: Any = None,
    apart: bool = False,
    bos: Bos = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibration sequences from a source.

    Documents are tokenized one by one, joined with the end-of-text id between them, and cropped at random places.

    Args:
        source: as for :func:`~ace_triton.inputs.text.read_documents`; its documents, already read; or "self": the model
            writes its own text (:mod:`~ace_triton.inputs.written_text`).
        tokenizer: the model's.
        samples, length: number of sequences, and tokens of each.
        seed: of the crops, or of the sampling.
        model: the model, for "self".
        apart: cut the text into consecutive pieces that share no token, at most ``samples`` of them, instead of random
            crops.
        bos: what every sequence begins with (:data:`~ace_triton.inputs.beginnings.Bos`); counted in ``length``. For
            "self", "stream" is the same as "none".
        progress: called with sequences done and sequences in all.

    Raises:
        TextError: text that cannot be read, or is shorter than one sequence.
    """
    if samples < 1 or length < 2:
        raise TextError(f"calibration needs at least 1 sequence of 2 tokens, got {samples} of {length}")
    beginning = Beginning.of(tokenizer, bos)
    if source == SELF:
        written = _written_by(model, tokenizer, samples, length, seed, beginning, progress)
        return Calibration(written, beginning=beginning)
    documents = read_documents(source, most=MOST_DOCUMENTS) if isinstance(source, str) else source
    stream = token_stream(documents, tokenizer)
    ids = (pieces if apart else crop)(beginning.before_stream(stream), samples, length, seed, beginning)
    if progress is not None:
        progress(len(ids), len(ids))
    return Calibration(ids, None, beginning, len(documents), len(set(documents)), len(stream))


def token_stream(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """All documents' token ids, int64 [n_tokens], each document ended by the end-of-text id; no BOS."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = token_ids(tokenizer, list(documents), add_special_tokens=False, verbose=False)
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64, device="cpu")


def crop(
    stream: torch.Tensor, samples: int, length: int, seed: int, beginning: Beginning = NO_BEGINNING
) -> torch.Tensor:
    """``samples`` random crops of a stream, each after its beginning, int64 [samples, length]."""
    text = _text_length(stream, length, beginning)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - text + 1, (samples,), generator=generator, device="cpu")
    return beginning.before(stream[starts[:, None] + torch.arange(text, device="cpu")])


def pieces(
    stream: torch.Tensor, samples: int, length: int, seed: int, beginning: Beginning = NO_BEGINNING
) -> torch.Tensor:
    """Consecutive pieces of a stream from a random place on, at most ``samples`` of them, int64 [n_pieces, length].

    No token of the stream is in two pieces. If ``samples`` allows it, fewer than ``length`` of them are in none.
    """
    text = _text_length(stream, length, beginning)
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(0, len(stream) % text + 1, (), generator=generator, device="cpu"))
    cut = stream[first : first + len(stream) // text * text].view(-1, text)
    return beginning.before(cut[torch.randperm(len(cut), generator=generator, device="cpu")[:samples]])


def _text_length(stream: torch.Tensor, length: int, beginning: Beginning) -> int:
    text = beginning.text_length(length)
    if len(stream) < text:
        raise TextError(
            f"the calibration text has {len(stream)} tokens, one sequence needs {text}: "
            "give more text or a smaller --length"
        )
    return text


def _written_by(
    model: Any,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    beginning: Beginning,
    progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    if model is None:
        raise TextError('source "self" needs the model: pass model=')
    text, size = text_to_write(model, tokenizer, length, beginning), min(samples, AT_ONCE)
    batches = []
    for place in range(math.ceil(samples / size)):
        batches.append(write_batch(model, text, seed=seed, place=place, sequences=size))
        if progress is not None:
            progress(min((place + 1) * size, samples), samples)
    return torch.cat(batches)[:samples]
