"""The Gram matrix of a layer's input, sum_t x_t x_t^T: the only token statistic that a least-squares update needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import StatsError
from ..kernels.gram_product import gram_product
from .statistic import Saved, Statistic, TensorForm, register_statistic


@register_statistic("gram", words="a Gram matrix")
@dataclass
class Gram(Statistic):
    """sum_t x_t x_t^T over the tokens seen, streamed and mergeable with ``+``.

    Attributes:
        in_features: number of channels.
        count: tokens seen, padding left out.
        matrix: fp32 [in_features, in_features], symmetric, on the device of the tokens; None before the first update.
    """

    in_features: int
    count: int = 0
    matrix: torch.Tensor | None = None

    forms: ClassVar = {"gram": TensorForm("jj", signed=True)}
    file_prefix: ClassVar = ""
    in_place: ClassVar = True

    @torch.no_grad()
    def update(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            tokens: [..., in_features], any floating dtype.
            valid: bool [...], False for tokens to leave out (padding).

        Raises:
            StatsError: the tokens have another width, or ``valid`` another shape.
        """
        rows = token_rows(tokens, valid, self.in_features, "Gram matrix")
        self.matrix = gram_product(rows, into=self.matrix)
        self.count += rows.shape[0]

    def __add__(self, other: Gram) -> Gram:
        """The Gram matrix of the tokens of both; neither operand changes."""
        if other.in_features != self.in_features:
            raise StatsError(f"Gram matrices of {self.in_features} and {other.in_features} channels do not merge")
        if self.matrix is None or other.matrix is None:
            return replace(other if self.matrix is None else self)
        return Gram(self.in_features, self.count + other.count, self.matrix + other.matrix)

    def reordered(self, order: torch.Tensor) -> Gram:
        """A copy with reordered channels: position p gets channel ``order[p]``, int64 [in_features]."""
        matrix = None if self.matrix is None else self.matrix[order].index_select(1, order)
        return replace(self, matrix=matrix)

    def to(self, device: torch.device | str) -> Gram:
        """A copy on ``device``."""
        return replace(self, matrix=None if self.matrix is None else self.matrix.to(device, copy=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The matrix; empty before the first update."""
        return {} if self.matrix is None else {"gram": self.matrix}

    @classmethod
    def load(cls, saved: Saved) -> Gram:
        """The Gram matrix from a file."""
        return cls(saved.in_features, saved.count, saved.tensors["gram"])


def check_valid(tokens: torch.Tensor, valid: torch.Tensor | None) -> None:
    """Raise ValueError if ``valid`` is not a mask of ``tokens`` [..., in_features]."""
    if valid is not None and (valid.shape != tokens.shape[:-1] or valid.dtype != torch.bool):
        raise StatsError(
            f"valid must be bool of shape {tuple(tokens.shape[:-1])}, got {valid.dtype} {tuple(valid.shape)}"
        )


def token_rows(tokens: torch.Tensor, valid: torch.Tensor | None, in_features: int, owner: str) -> torch.Tensor:
    """The tokens [..., in_features] of a batch as rows, without padding.

    Args:
        owner: what the tokens are for, named in the error message.

    Raises:
        StatsError: the tokens have another width, or ``valid`` another shape.
    """
    if tokens.shape[-1] != in_features:
        raise StatsError(f"tokens have {tokens.shape[-1]} channels, this {owner} {in_features}")
    check_valid(tokens, valid)
    return tokens.reshape(-1, in_features) if valid is None else tokens[valid]
