"""Layer-wise budgets: blocks whose scores have more outliers keep more of their weights, the total kept.

That is OWL (Yin et al., arXiv 2310.05175), with its two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .batches import Batch
from .collect import InputCollector
from .kernels.score_terms import ScoreTerms, scores_reference
from .metrics import Needs
from .plan import Unit
from .prune import as_kernel_dtype, check_weight
from .replay import WholeForward
from .sparsity import Sparsity
from .timing import Stopwatch

BUDGETS = ("outliers",)

OUTLIER = 5.0
"""A score above so many times its layer's mean is an outlier."""

SPREAD = 0.08
"""The block that keeps the most and the one that keeps the least lie twice this apart."""


def check_budgets(budgets: str | None, pattern: Sparsity) -> None:
    """ValueError for budgets that there are not, or for a pattern that has none."""
    if budgets is None:
        return
    if budgets not in BUDGETS:
        raise ValueError(f"budgets must be one of {', '.join(BUDGETS)}, or None; got {budgets!r}")
    if pattern.n is not None:
        raise ValueError(
            f"budgets spread a pruned fraction over the blocks; {pattern} is the same in all of them: give a fraction, "
            "as 0.5"
        )


def find_budgets(
    model: nn.Module, units: Sequence[Unit], pattern: Sparsity, batches: Sequence[Batch], clock: Stopwatch
) -> dict[str, Sparsity]:
    """The pattern of each block, by what the dense model does with some batches.

    Args:
        model: dense, in evaluation mode.
        units: its blocks, with the layers to prune; layers that no token reaches do not count.
        pattern: of the whole, a fraction.
        batches: run through the model once; outliers hardly depend on which.
        clock: charged with it.
    """
    collector = InputCollector({name: layer for unit in units for name, layer in unit.layers.items()}, Needs(), clock)
    WholeForward(model, batches, clock).run_all(collector)
    counts, sizes = {}, {}
    with clock.measure("statistics"):
        for unit in units:
            stats = {name: collector.statistics(name) for name in unit.layers}
            reached = {name: seen.norm for name, seen in stats.items() if seen is not None}
            weights = {name: as_kernel_dtype(check_weight(unit.layers[name], name, finite=False)) for name in reached}
            counts[unit.name] = sum(outliers(weights[name], norm) for name, norm in reached.items())
            sizes[unit.name] = sum(weight.numel() for weight in weights.values())
    return block_patterns(counts, sizes, pattern)


def outliers(weight: torch.Tensor, norm: torch.Tensor) -> int:
    """How many of Wanda's scores |W_ij| n_j are more than :data:`OUTLIER` times their mean.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        norm: n, fp32 [in_features].
    """
    scores = scores_reference(weight, ScoreTerms(scale=norm))
    return int((scores > OUTLIER * scores.mean(dtype=torch.float64)).sum())


def kept_shares(
    outlier_shares: Sequence[float], sizes: Sequence[int], kept: float, spread: float = SPREAD
) -> list[float]:
    """What each block keeps, linear in its share of outliers.

    Args:
        outlier_shares: of each block's scores.
        sizes: how many weights each has, above 0.
        kept: share of all weights to keep, in (0, 1].
        spread: as :data:`SPREAD`; less where some block would keep all or nothing.

    Returns:
        Shares in (0, 1], ``kept`` in the mean over all weights.
    """
    lowest, highest = min(outlier_shares), max(outlier_shares)
    if highest == lowest:
        return [kept] * len(sizes)
    width = 2 * min(spread, kept / 4, (1 - kept) / 2)
    raised = [width * (share - lowest) / (highest - lowest) for share in outlier_shares]
    mean = sum(size * rise for size, rise in zip(sizes, raised, strict=True)) / sum(sizes)
    return [kept + rise - mean for rise in raised]


def block_patterns(
    counts: Mapping[str, int], sizes: Mapping[str, int], pattern: Sparsity, spread: float = SPREAD
) -> dict[str, Sparsity]:
    """The pattern of each block.

    Args:
        counts: outliers by block.
        sizes: weights by block.
        pattern: of the whole model, a fraction.
        spread: as for :func:`kept_shares`.
    """
    names = [name for name, size in sizes.items() if size]
    shares = [counts[name] / sizes[name] for name in names]
    kept = kept_shares(shares, [sizes[name] for name in names], 1 - pattern.fraction, spread) if names else []
    return {name: replace(pattern, pattern=max(1 - share, 0.0)) for name, share in zip(names, kept, strict=True)}
