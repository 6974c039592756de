"""Split documents into sentences, to compare models on short texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

FEWEST_WORDS, MOST_WORDS = 4, 60
"""Sentences with fewer or more words are left out: headings, lists, and text without punctuation."""

SORTED_BATCHES = 32
"""Batches whose sentences are sorted by length together."""

_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences_of(documents: Iterable[str], most: int | None = None) -> list[str]:
    """The different sentences of documents, in order.

    Args:
        documents: the text.
        most: stop after this many sentences.
    """
    found: dict[str, None] = {}
    for document in documents:
        for part in _ENDS.split(document):
            sentence = part.strip()
            if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                found.setdefault(sentence)
            if most is not None and len(found) >= most:
                return list(found)
    return list(found)


def shuffled_by_length(sentences: Sequence[str], size: int, seed: int, most: int | None = None) -> list[str]:
    """Sentences in random order, except that those of one batch have about the same length, so padding is short.

    Args:
        sentences: the sentences.
        size: sentences in a batch.
        seed: random seed.
        most: stop after this many sentences.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sentences), generator=generator, device="cpu").tolist()[:most]
    found: list[str] = []
    for start in range(0, len(order), size * SORTED_BATCHES):
        found += sorted((sentences[i] for i in order[start : start + size * SORTED_BATCHES]), key=len)
    return found
