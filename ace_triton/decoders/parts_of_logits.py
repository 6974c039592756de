"""Computes a model's logits for a few tokens at a time, because those of all tokens may be larger than a block.

A product may round in another way for another number of tokens. So the head always multiplies parts of the same size,
whether the other tokens' logits are in memory or not, and the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .finished import forward_replaced

PART = 128
"""Tokens of a part. Parts of hidden states start at multiples of 64 bytes, as whole tensors do."""


def parts_of(tokens: int) -> list[slice]:
    """The parts of this many tokens, in order."""
    return [slice(start, min(start + PART, tokens)) for start in range(0, tokens, PART)]


@contextmanager
def head_by_parts(model: Any) -> Iterator[None]:
    """A context in which the model's head multiplies parts of its input. It returns the logits of all tokens."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    own = head.forward

    def by_parts(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        if tokens.dim() < 2 or tokens.shape[-2] <= PART:
            return own(tokens, *others)
        logits: torch.Tensor | None = None
        for part in parts_of(tokens.shape[-2]):
            of_part = own(tokens[..., part, :], *others)
            if logits is None:
                logits = of_part.new_empty(*tokens.shape[:-1], of_part.shape[-1])
            logits[..., part, :] = of_part
        assert logits is not None
        return logits

    with forward_replaced(head, by_parts):
        yield


@contextmanager
def head_of_part(model: Any, part: slice) -> Iterator[None]:
    """A context in which the model's head, if there is one, reads and returns a part of its tokens alone."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def cut(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][..., part, :], *args[1:])

    hook = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()
