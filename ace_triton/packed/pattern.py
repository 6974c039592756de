"""Find the n:m pattern of a weight from its zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.select_nm import GROUP_SIZES
from ..solvers.kept_adamw import LEAST_ZEROS

FULL_GROUPS = 1.1
"""A pattern n:m is accepted if n / m is at most this many times the share of non-zero weights.

Without this bound almost every sparse matrix would have a pattern such as 30:32.
"""

FULL_GROUPS_ROUNDED = 1.6
"""As FULL_GROUPS, for a weight that is stored in few bits: some of its kept weights may be rounded to 0."""

WIDEST_ROUNDED = 0.75
"""Largest n / m beyond FULL_GROUPS. Rounding alone leaves zeros in most groups of a dense weight."""


@dataclass(frozen=True)
class FoundPattern:
    """The pattern of a weight's zeros. ``str`` gives "dense", "unstructured", "2:4" or "2:4 along outputs".

    Attributes:
        dense: True if the zeros follow no pattern and are less than 5 % of the weight, or if it has no elements.
        nm: (n, m) of the pattern with the smallest n / m, and of those the smallest m; None if the weight is dense or
            its zeros follow no pattern.
        across: None if the groups lie along the last axis. "outputs" if only groups along the first axis of a matrix
            follow the pattern, "the middle axis" if only groups along the middle axis of a stack do.
    """

    dense: bool
    nm: tuple[int, int] | None = None
    across: Literal["outputs", "the middle axis"] | None = None

    def __str__(self) -> str:
        if self.nm is None:
            return "dense" if self.dense else "unstructured"
        n, m = self.nm
        return f"{n}:{m}" if self.across is None else f"{n}:{m} along {self.across}"


def find_pattern(weight: torch.Tensor, *, rounded: bool = False) -> FoundPattern:
    """Find the narrowest n:m that all groups of a weight follow.

    Args:
        weight: a matrix [rows, cols], or a stack of matrices [n_experts, rows, cols].
        rounded: True if some of the kept weights may be rounded to 0, because they are stored in few bits.
    """
    kept = weight != 0
    share = float(kept.sum()) / max(kept.numel(), 1)
    if kept.numel() == 0 or share > 1 - 1 / max(GROUP_SIZES):
        return FoundPattern(dense=True)
    along_last = _narrowest(kept.flatten(0, -2), rounded)
    if along_last is not None:
        return FoundPattern(dense=False, nm=along_last)
    along_other = _narrowest(kept.mT.flatten(0, -2), rounded)
    if along_other is not None:
        return FoundPattern(dense=False, nm=along_other, across="outputs" if weight.dim() == 2 else "the middle axis")
    return FoundPattern(dense=share > 1 - LEAST_ZEROS)


def _narrowest(kept: torch.Tensor, rounded: bool) -> tuple[int, int] | None:
    """(n, m) with the smallest n / m, and of those the smallest m, for groups along the last axis of [rows, cols]."""
    best: tuple[int, int] | None = None
    share = float(kept.sum()) / kept.numel()
    largest = FULL_GROUPS * share
    if rounded:
        largest = max(largest, min(FULL_GROUPS_ROUNDED * share, WIDEST_ROUNDED))
    for m in GROUP_SIZES:
        if kept.shape[1] % m:
            continue
        n = int(kept.reshape(kept.shape[0], -1, m).sum(-1).max())
        if 0 < n < m and n / m <= largest and (best is None or n / m < best[0] / best[1]):
            best = (n, m)
    return best


def follows(weight: torch.Tensor, n: int, m: int) -> bool:
    """True if every m neighbors along the last axis of a weight have at most n non-zero entries."""
    if not weight.numel() or weight.shape[-1] % m:
        return False
    return int((weight != 0).flatten(0, -2).reshape(-1, m).sum(-1).max()) <= n
