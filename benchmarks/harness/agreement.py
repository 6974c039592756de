"""Checks that two implementations keep the same weights, apart from ties."""

from __future__ import annotations

import torch

ROUNDING = 1e-5
"""Relative difference up to which scores count as tied: the same multiplications in another order differ by less."""

CHAOS = 1e-3
"""Share of weights that may differ if choices depend on weights that were updated before."""


class Disagreement(AssertionError):
    """Two implementations give different results, so their times cannot be compared."""


def check_same_choice(scores: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, group: int) -> None:
    """Check that in every group both masks keep weights of the same scores; weights of score 0 may differ.

    Args:
        scores: [out_features, in_features], the scores that both used.
        ours, theirs: bool masks of that shape, True if kept.
        group: number of adjacent weights in a group: m for n:m, in_features for a row, all weights for a layer.

    Raises:
        Disagreement: if a group differs by more than ties.
    """
    if not (scores.shape == ours.shape == theirs.shape):
        raise Disagreement(
            f"masks of shapes {tuple(ours.shape)} and {tuple(theirs.shape)}, scores {tuple(scores.shape)}"
        )
    ours, theirs = ours.reshape(-1, group), theirs.reshape(-1, group)
    differing = (ours != theirs).any(1)
    if not differing.any():
        return
    among = scores.reshape(-1, group)[differing].float()
    kept = [among.masked_fill(~mask[differing], 0).sort(1).values for mask in (ours, theirs)]
    wrong = ~torch.isclose(*kept, rtol=ROUNDING, atol=0).all(1)
    if wrong.any():
        raise Disagreement(
            f"{int(wrong.sum())} of {len(ours)} groups of {group} keep different weights, and their scores do not tie "
            "(another metric or pattern? a wrong kernel?)"
        )


def check_nearly_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Check that all but a thousandth of the weights are pruned in both or in neither, and that the others are close.

    For methods that choose among weights they have updated: there, rounding in one choice changes the next one.

    Args:
        ours, theirs: pruned and updated weights [out_features, in_features].

    Raises:
        Disagreement: if more weights differ.
    """
    same = ((ours != 0) == (theirs != 0)).float().mean().item()
    if same < 1 - CHAOS:
        raise Disagreement(f"{1 - same:.2%} of the weights are pruned in one and kept in the other")
    far = float((ours - theirs).norm() / theirs.norm())
    if not far < CHAOS**0.5:
        raise Disagreement(f"the weights differ by {far:.2%} of their norm")
