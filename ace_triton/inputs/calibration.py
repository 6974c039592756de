"""Make calibration sequences: token ids cut from text, or text written by the model itself."""

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
"""Source name: the model writes its own text."""

MOST_DOCUMENTS = 20_000
"""Largest number of documents read from one source. It limits the cost of a huge source."""


@dataclass(frozen=True)
class Calibration:
    """Token ids for calibration.

    Attributes:
        ids: int64 [n_sequences, length].
        mask: bool [n_sequences, length], False for padding; None if there is no padding.
        beginning: the beginning of every sequence; its tokens are included in ``ids``.
        documents, distinct_documents: number of documents read from the source; None if the model wrote the text.
        text_tokens: number of tokens in all documents; None if the model wrote the text.
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
    """Read the documents of a source before the model is loaded. "self" is returned unchanged.

    Pass the result to :func:`load_calibration` as its source.
    """
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
    """Make calibration sequences from text, for :func:`~ace_triton.prune_blocks.prune_model` and recovery.

    Documents are tokenized one by one and each is followed by the end-of-text id. Sequences are cut from the resulting
    stream at random places.

    Args:
        source: a text file, a ``.jsonl`` or ``.json`` file with the documents under "text" (each also as ``.gz``),
            ``pydoc:calibration`` for text that comes with Python, or the name of a dataset,
            ``name[:config[:split]]``; or a list of documents; or "self", and the model writes its own text.
        tokenizer: the tokenizer of the model.
        samples: number of sequences.
        length: number of tokens in each sequence.
        seed: random seed for the places of the cuts, or for the text that the model writes.
        model: the model, needed for "self" only.
        apart: cut the text into consecutive pieces that share no token, at most ``samples`` of them, instead of random
            cuts.
        bos: where to put the beginning-of-text token (BOS): at the start of "each" sequence, of the whole text
            ("stream"), or "none". "auto" means "each" if the tokenizer adds a BOS itself, otherwise "none". The token
            counts toward ``length``. For "self", "stream" is the same as "none".
        progress: called with (done, total), in sequences.

    Returns:
        An object with ``ids``, int64 [n_sequences, length], and ``mask``, which is None because nothing is padded.

    Raises:
        TextError: if the text cannot be read or is shorter than one sequence, or an argument is invalid.
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
    """Token ids of all documents, int64 [n_tokens], without BOS. The end-of-text id follows each document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = token_ids(tokenizer, list(documents), add_special_tokens=False, verbose=False)
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64, device="cpu")


def crop(
    stream: torch.Tensor, samples: int, length: int, seed: int, beginning: Beginning = NO_BEGINNING
) -> torch.Tensor:
    """Cut ``samples`` sequences from random places of a stream and add the beginning, int64 [samples, length]."""
    text = _text_length(stream, length, beginning)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - text + 1, (samples,), generator=generator, device="cpu")
    return beginning.before(stream[starts[:, None] + torch.arange(text, device="cpu")])


def pieces(
    stream: torch.Tensor, samples: int, length: int, seed: int, beginning: Beginning = NO_BEGINNING
) -> torch.Tensor:
    """Cut a stream into consecutive pieces, at most ``samples`` of them, int64 [n_pieces, length].

    The first piece starts at a random place. No token of the stream is in two pieces. If ``samples`` is large enough,
    fewer than ``length`` tokens of the stream are in no piece.
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
        raise TextError('source "self" needs the model that writes the text: pass model=')
    text, size = text_to_write(model, tokenizer, length, beginning), min(samples, AT_ONCE)
    batches = []
    for place in range(math.ceil(samples / size)):
        batches.append(write_batch(model, text, seed=seed, place=place, sequences=size))
        if progress is not None:
            progress(min((place + 1) * size, samples), samples)
    return torch.cat(batches)[:samples]
