"""The Gram matrix of a layer's input, sum_t x_t x_t^T: all that a weight update must know of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

SYMMETRIC_BLOCK = 384
"""Columns of a block of the product on a CPU: 30 % off at 1,536 channels, where smaller ones save no more."""


@dataclass
class Gram:
    """sum_t x_t x_t^T over the tokens seen, streamed and mergeable with ``+``.

    Attributes:
        in_features: number of channels.
        count: tokens seen, padding left out.
        matrix: fp32 [in_features, in_features], symmetric, on the device of the tokens; None before the first.
    """

    in_features: int
    count: int = 0
    matrix: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tokens: [..., in_features], any floating dtype.
            valid: bool [...], False for tokens to leave out (padding).

        Raises:
            ValueError: tokens of another width.
        """
        rows = token_rows(tokens, valid, self.in_features, "Gram matrix")
        product = gram_product(rows)
        self.matrix = product if self.matrix is None else self.matrix.add_(product)
        self.count += rows.shape[0]

    def __add__(self, other: Gram) -> Gram:
        """That of the tokens of both; neither changes."""
        if other.in_features != self.in_features:
            raise ValueError(f"Gram matrices of {self.in_features} and {other.in_features} channels do not merge")
        if self.matrix is None or other.matrix is None:
            return replace(other if self.matrix is None else self)
        return Gram(self.in_features, self.count + other.count, self.matrix + other.matrix)

    def reordered(self, order: torch.Tensor) -> Gram:
        """With the channels in another order: place p takes channel ``order[p]``, int64 [in_features]."""
        matrix = None if self.matrix is None else self.matrix[order].index_select(1, order)
        return replace(self, matrix=matrix)

    def to(self, device: torch.device | str) -> Gram:
        """A copy on ``device``."""
        return replace(self, matrix=None if self.matrix is None else self.matrix.to(device, copy=True))


def token_rows(tokens: torch.Tensor, valid: torch.Tensor | None, in_features: int, owner: str) -> torch.Tensor:
    """The tokens [..., in_features] of a batch as rows, without padding; ValueError where the width is another."""
    if tokens.shape[-1] != in_features:
        raise ValueError(f"tokens have {tokens.shape[-1]} channels, this {owner} {in_features}")
    return tokens.reshape(-1, in_features) if valid is None else tokens[valid]


def gram_product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X in fp32, each product exact and added in fp32; for 16-bit tokens on the matrix units.

    Args:
        rows: X, [n_tokens, in_features], any floating dtype; fp64 is rounded to fp32 first.
    """
    if rows.is_cuda and torch.version.hip is None and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(rows.t(), rows, out_dtype=torch.float32)
    if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
        with bfloat16_products():
            return _symmetric_product(rows.float())
    single = rows.float()
    return single.t() @ single


def _symmetric_product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X by the blocks on and above the diagonal."""
    columns = rows.t()
    width = len(columns)
    product = rows.new_empty(width, width)
    for start in range(0, width, SYMMETRIC_BLOCK):
        block = slice(start, min(start + SYMMETRIC_BLOCK, width))
        product[block, start:] = columns[block] @ rows[:, start:]
        product[block.stop :, block] = product[block, block.stop :].t()
    return product


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """On a CPU, oneDNN may round fp32 factors to bf16; sums stay fp32. Exact where the factors are bf16 already."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
