"""The published ways to prune, written from their formulas: what speed and masks are compared with.

Scores are "higher is kept"; the selections count what they *prune*, as the published codes do, and write zeros in
place.
"""

from __future__ import annotations

import torch


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """|W|."""
    return weight.abs()


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """|W| sqrt(mean over sequences of sum_t x_tj^2) (Sun et al., ICLR 2024)."""
    return weight.abs() * mean_square.sqrt().reshape(1, -1)


def ria_scores(weight: torch.Tensor, mean_square: torch.Tensor, a: float = 0.5) -> torch.Tensor:
    """(|W| / column sum + |W| / row sum) sqrt(mean square)^a, quotients in fp32 (Zhang et al., ICLR 2024)."""
    magnitude = weight.float().abs()
    relative = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1).reshape(-1, 1)
    return relative * (mean_square.sqrt() ** a).reshape(1, -1)


def prune_groups(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int, m: int) -> None:
    """Of every m consecutive columns the n lowest of each row, by a loop over the groups."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], m):
        lowest = scores[:, first : first + m].float().topk(n_pruned, dim=1, largest=False).indices
        pruned.scatter_(1, first + lowest, True)
    weight[pruned] = 0


def prune_rows_by_sort(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """The n lowest of every row, by a stable sort: the published code for unstructured Wanda."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    lowest = scores.sort(dim=-1, stable=True).indices[:, :n_pruned]
    pruned.scatter_(1, lowest, True)
    weight[pruned] = 0


def prune_rows_by_topk(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """The n lowest of every row, by top-k: faster than the sort, ties in no order."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    pruned.scatter_(1, scores.topk(n_pruned, dim=1, largest=False).indices, True)
    weight[pruned] = 0


def prune_layer(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """The n lowest of the whole layer, by a threshold from a sort; more of them where scores tie at it."""
    threshold = scores.flatten().sort().values[n_pruned - 1]
    weight[scores <= threshold] = 0
