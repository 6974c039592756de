"""assignment: candidates dealt out to groups, one each, for a large sum of gains.

The compiled CPU library finds the largest by shortest augmenting paths. They follow one another, which suits no GPU:
elsewhere pairs of groups exchange candidates, all pairs at once, until no pair gains.
"""

from __future__ import annotations

import torch

from . import cpu
from .backend import choose_backend
from .errors import ArgumentError
from .finite import all_finite

NEGLIGIBLE = 1e-6
"""Exchanges that gain less than this share of a group's gain are left alone: rounding makes them look like gains."""

MOST_PASSES = 1000
"""Of exchanges; tens are needed."""


def assignment(gains: torch.Tensor) -> torch.Tensor:
    """The candidate that each group takes, int64 [n_pools, groups], a permutation in every pool.

    Their gains sum to at least what they do with candidate g in group g, to rounding; to the most that any assignment
    reaches on the compiled library, and to most of what lies between elsewhere.

    Args:
        gains: fp32 [n_pools, groups, groups], finite, of group g with candidate y at [g, y].

    Raises:
        ValueError: another shape or dtype, gains that are not finite, or so large that their sums are not.
    """
    if gains.dim() != 3 or gains.shape[1] != gains.shape[2] or gains.dtype != torch.float32:
        raise ArgumentError(f"gains must be float32 [n_pools, groups, groups], got {gains.dtype} {tuple(gains.shape)}")
    if not all_finite(gains):
        raise ArgumentError("gains hold NaN or infinity: look for overflow in the scores that they were made of")
    if choose_backend(gains) == "cpu":
        return cpu.assign(gains.contiguous())
    return assignment_by_exchange(gains)


def assignment_by_exchange(gains: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, close to the largest sum.

    Every group looks for the group with which it would gain the most by exchanging candidates; pairs that choose each
    other exchange.
    """
    groups = torch.arange(gains.shape[1], device=gains.device).expand(gains.shape[:2])
    dealt = groups
    worth = NEGLIGIBLE * gains.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    for _ in range(MOST_PASSES if gains.numel() else 0):
        own = gains.diagonal(dim1=1, dim2=2)
        gain, partner = (gains + gains.transpose(1, 2) - own[:, :, None] - own[:, None, :]).max(2)
        agreed = (partner.gather(1, partner) == groups) & (gain > worth)
        if not bool(agreed.any()):
            break
        partner = torch.where(agreed, partner, groups)
        dealt = dealt.gather(1, partner)
        gains = gains.gather(2, partner[:, None, :].expand_as(gains))
    return dealt
