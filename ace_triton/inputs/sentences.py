"""Split documents into sentences, to compare models on short texts."""

from __future__ import annotations

import re
from collections.abc import Iterable

FEWEST_WORDS, MOST_WORDS = 4, 60
"""Sentences with fewer or more words are left out: headings, lists, and text without punctuation."""

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
