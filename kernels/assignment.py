"""assignment: assign one candidate to each group so that the sum of gains is large.

The compiled CPU library finds the optimal assignment by shortest augmenting paths. That algorithm is sequential, so it
does not suit a GPU. Elsewhere, pairs of groups exchange candidates, all pairs in parallel, until no exchange gains.
"""

from __future__ import annotations

import torch

from . import cpu
from .errors import ArgumentError
from .finite import all_finite
from .op import Op, Work

NEGLIGIBLE = 1e-6
"""An exchange must gain more than this share of the mean gain of a group; smaller gains are rounding errors."""

MOST_PASSES = 1000
"""Limit on passes of exchanges; tens are usually enough."""


def assignment(gains: torch.Tensor) -> torch.Tensor:
    """The candidate assigned to each group, int64 [n_pools, groups]: a permutation in every pool.

    The sum of gains is never below that of the identity (candidate g in group g), up to rounding. The compiled library
    returns an optimal assignment; other backends return one that is close to it.

    Args:
        gains: fp32 [n_pools, groups, groups], finite; [g, y] is the gain of group g with candidate y.

    Raises:
        ArgumentError: if the shape or dtype does not fit, or if a gain or a sum of gains is not finite.
    """
    if gains.dim() != 3 or gains.shape[1] != gains.shape[2] or gains.dtype != torch.float32:
        raise ArgumentError(f"gains must be float32 [n_pools, groups, groups], got {gains.dtype} {tuple(gains.shape)}")
    if not all_finite(gains):
        raise ArgumentError("gains contain NaN or infinity: check the scores they were computed from for overflow")
    return ASSIGNMENT.on(gains)(gains)


def assignment_by_exchange(gains: torch.Tensor) -> torch.Tensor:
    """An assignment by pairwise exchange, in plain torch; its sum is close to the largest one.

    Every group finds the partner with which an exchange of candidates gains most. Two groups that choose each other
    exchange.
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


def _assign_on_cpu(gains: torch.Tensor) -> torch.Tensor:
    return cpu.assign(gains.contiguous())


def _work(gains: torch.Tensor) -> Work:
    """Each gain read once; how often searches read it again depends on the gains."""
    return Work(gains.nbytes + 8 * gains.shape[0] * gains.shape[1])


ASSIGNMENT = Op("assignment", _work, assignment_by_exchange, _assign_on_cpu)
