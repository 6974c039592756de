"""Whether two ways to prune keep the same weights, ties aside."""

from __future__ import annotations

import torch

ROUNDING = 1e-5
"""Relative; scores nearer than this are a tie, as two orders of the same multiplications part by less."""

CHAOS = 1e-3
"""Share of weights that may be chosen otherwise where choices follow from updated weights."""


class Disagreement(AssertionError):
    """Two providers of one operation do not do the same: no time of theirs may be compared."""


def check_same_choice(scores: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, group: int) -> None:
    """Every group keeps weights of the same scores in both; which of those whose score is 0, does not matter.

    Args:
        scores: [out_features, in_features], what both chose by.
        ours, theirs: bool of that shape, True where kept.
        group: neighbours in a row that compete: m for n:m, in_features for a row, or the whole size for the layer.

    Raises:
        Disagreement: a group differs by more than ties.
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
            f"{int(wrong.sum())} of {len(ours)} groups of {group} keep other weights, and not because scores tie "
            "(another metric or pattern? a wrong kernel?)"
        )


def check_nearly_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """All but a thousandth of the weights are pruned in both or in neither, and those kept are close.

    For methods that choose among weights they have updated: there the rounding of one choice moves the next.

    Args:
        ours, theirs: pruned and updated weights [out_features, in_features].

    Raises:
        Disagreement: more of them differ.
    """
    same = ((ours != 0) == (theirs != 0)).float().mean().item()
    if same < 1 - CHAOS:
        raise Disagreement(f"{1 - same:.2%} of the weights are pruned in one and kept in the other")
    far = float((ours - theirs).norm() / theirs.norm())
    if not far < CHAOS**0.5:
        raise Disagreement(f"the weights lie {far:.2%} of their norm apart")
