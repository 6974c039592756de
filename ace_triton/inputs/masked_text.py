"""Calibration sequences for encoders: documents with the tokenizer's special tokens, padded, with an attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TextError
from .beginnings import token_ids

MASKED_SHARE = 0.15
"""Share of the tokens that are masked for a masked language model, as in BERT."""

PROBE = "a"
"""A text whose tokens show which special tokens a tokenizer puts around it."""


def pieces_of(documents: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int | None) -> list[list[int]]:
    """Token ids of pieces of documents, each with the tokenizer's own special tokens around it.

    The first piece of each document comes first, the documents in random order; then the other pieces, in random
    order. No piece has more than ``length`` tokens, and no piece ends in the middle of a document unless it has
    ``length`` tokens.

    Args:
        documents: the text.
        tokenizer: the tokenizer of the model.
        samples: largest number of pieces.
        length: most tokens of a piece, special tokens included.
        seed: random seed for the order; None keeps the order of the documents.

    Raises:
        TextError: if the documents have no tokens, or the length has no room for text.
    """
    before, after = around(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise TextError(
            f"a sequence of {length} tokens has no room for text beside {len(before) + len(after)} special tokens: "
            "give a larger --length"
        )
    generator = torch.Generator().manual_seed(seed or 0)

    def ordered(count: int) -> list[int]:
        chosen = (
            torch.arange(count, device="cpu")
            if seed is None
            else torch.randperm(count, generator=generator, device="cpu")
        )
        return [int(index) for index in chosen]

    order = ordered(len(documents))
    first: list[list[int]] = []
    later: list[list[int]] = []
    for ids in token_ids(tokenizer, [documents[i] for i in order], add_special_tokens=False, verbose=False):
        cut = [[*before, *ids[start : start + room], *after] for start in range(0, len(ids), room)]
        first.extend(cut[:1])
        later.extend(cut[1:])
        if len(first) >= samples:
            return first[:samples]
    if not first:
        raise TextError("the calibration text has no tokens: give a source with text in it")
    return [*first, *(later[i] for i in ordered(len(later)))][:samples]


def around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text by itself."""
    whole = token_ids(tokenizer, PROBE)
    plain = token_ids(tokenizer, PROBE, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def beginning_of(text: str, tokenizer: Any, most: int) -> str:
    """The beginning of a text with at most about ``most`` tokens; a text with fewer stays as it is."""
    ids = token_ids(tokenizer, text, add_special_tokens=False, verbose=False)
    return text if len(ids) <= most else str(tokenizer.decode(ids[:most], skip_special_tokens=True))


def padded(pieces: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of pieces, int64 [n_pieces, longest], padded at the end."""
    longest = max(map(len, pieces))
    ids = torch.full((len(pieces), longest), pad, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(pieces), longest, dtype=torch.int64, device="cpu")
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece, dtype=torch.int64, device="cpu")
        mask[row, : len(piece)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_of(tokenizer: Any) -> int:
    """The token id for padding; the end-of-text id, or 0, if the tokenizer has none. The mask hides it."""
    found = tokenizer.pad_token_id
    found = tokenizer.eos_token_id if found is None else found
    return 0 if found is None else int(found)


def with_masked_tokens(
    batches: Sequence[dict[str, torch.Tensor]], tokenizer: Any, seed: int, share: float = MASKED_SHARE
) -> list[dict[str, torch.Tensor]]:
    """Batches in which a random share of the tokens is the mask token; special tokens and padding stay.

    Args:
        batches: with ``input_ids``.
        tokenizer: the tokenizer; without a mask token the batches stay as they are.
        seed: random seed.
        share: share of the tokens.
    """
    if tokenizer.mask_token_id is None:
        return list(batches)
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64, device="cpu")
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        chosen = torch.rand(ids.shape, generator=generator, dtype=torch.float32, device="cpu") < share
        chosen &= ~torch.isin(ids, special)
        if "attention_mask" in batch:
            chosen &= batch["attention_mask"].bool()
        found.append({**batch, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)})
    return found
