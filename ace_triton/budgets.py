"""Block budgets: blocks whose scores have more outliers keep more of their weights; the total stays the same.

The rule and its two constants are OWL's (Yin et al., arXiv 2310.05175). For n:m a block keeps n - 1, n or n + 1 of
every m, and about as many weights move between blocks as with OWL's shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from .decoders.batches import Batch
from .decoders.blocks import Tower
from .decoders.collect import InputCollector
from .decoders.plan import Unit
from .decoders.replay import WholeForward
from .kernels.score_terms import ScoreTerms, scores_reference
from .linears import as_kernel_dtype
from .methods.registry import Needs
from .sparsity import Sparsity
from .timing import Stopwatch
from .weight_checks import check_weight

OUTLIER = 5.0
"""A score above this many times its layer's mean is an outlier."""

SPREAD = 0.08
"""Half the difference between the largest and the smallest share that a block keeps."""


def find_budgets(
    model: nn.Module,
    towers: Sequence[tuple[Tower, Sequence[Unit]]],
    pattern: Sparsity,
    batches: Sequence[Batch],
    clock: Stopwatch,
    in_use: Callable[[Unit], AbstractContextManager[object]],
) -> dict[str, Sparsity]:
    """The pattern of each block, from one forward of the dense model for each tower.

    Args:
        model: dense, in evaluation mode.
        towers: its towers, with the layers to prune by block; layers that no token reaches are not counted.
        pattern: the pattern of the whole model.
        batches: run through the model once; the choice of text hardly changes the number of outliers.
        clock: measures the time.
        in_use: gives a context in which the weights of a unit are in memory.
    """
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for tower, units in (pair for pair in towers if pair[1]):
        layers = {name: layer for unit in units for name, layer in unit.layers.items()}
        collector = InputCollector(layers, Needs(), clock)
        WholeForward(model, batches, clock, tower.blocks, tower.masks).run_all(collector)
        with clock.measure("statistics"):
            for unit in units:
                stats = {name: collector.statistics(name) for name in unit.layers}
                reached = {name: seen.norm for name, seen in stats.items() if seen is not None}
                with in_use(unit):
                    weights = {n: as_kernel_dtype(check_weight(unit.layers[n], n)) for n in reached}
                    counts[unit.name] = sum(outliers(weights[name], norm) for name, norm in reached.items())
                    sizes[unit.name] = sum(weight.numel() for weight in weights.values())
    return block_patterns(counts, sizes, pattern)


def outliers(weight: torch.Tensor, norm: torch.Tensor) -> int:
    """Number of Wanda scores |W_ij| n_j above :data:`OUTLIER` times their mean.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        norm: n_j, fp32 [in_features].
    """
    scores = scores_reference(weight, ScoreTerms(scale=norm))
    return int((scores > OUTLIER * scores.mean(dtype=torch.float64)).sum())


def kept_shares(
    outlier_shares: Sequence[float], sizes: Sequence[int], kept: float, spread: float = SPREAD
) -> list[float]:
    """The share that each block keeps, linear in its share of outliers.

    Args:
        outlier_shares: share of outliers among each block's scores.
        sizes: number of weights of each block, above 0.
        kept: share of all weights to keep, in (0, 1].
        spread: as :data:`SPREAD`; it is reduced if a block would keep all or none of its weights.

    Returns:
        Shares in (0, 1]; their mean over all weights is ``kept``.
    """
    lowest, highest = min(outlier_shares), max(outlier_shares)
    if highest == lowest:
        return [kept] * len(sizes)
    width = 2 * min(spread, kept / 4, (1 - kept) / 2)
    raised = [width * (share - lowest) / (highest - lowest) for share in outlier_shares]
    mean = sum(size * rise for size, rise in zip(sizes, raised, strict=True)) / sum(sizes)
    return [kept + rise - mean for rise in raised]


def group_sizes(shares: Sequence[float], sizes: Sequence[int], n: int, m: int) -> list[int]:
    """How many of every m each block keeps: n + 1 for the highest shares, n - 1 for the lowest, n for the others.

    A raised block keeps 1 / m more of its weights. Blocks are raised until this comes near to what the shares above
    n / m ask for; then blocks with as many weights are lowered.

    Args:
        shares: share of its weights that each block should keep; the mean over all weights is n / m.
        sizes: number of weights of each block, above 0.
        n: weights kept of every m in the whole model.
        m: size of a group of weights.

    Returns:
        One number for each block. If all blocks have one size, the mean is n; otherwise it differs from n by at most
        one block's weights.
    """
    moved = m * sum(size * max(share - n / m, 0.0) for share, size in zip(shares, sizes, strict=True))
    order = sorted(range(len(sizes)), key=lambda block: shares[block])
    raised = _filled([block for block in reversed(order) if shares[block] > n / m], sizes, moved)
    lowered = _filled([block for block in order if shares[block] < n / m], sizes, sum(sizes[block] for block in raised))
    return [n + (block in raised) - (block in lowered) for block in range(len(sizes))]


def _filled(blocks: Sequence[int], sizes: Sequence[int], amount: float) -> set[int]:
    """Blocks in order until their weights come near an amount; a block too large for the rest is skipped."""
    taken: set[int] = set()
    for block in blocks:
        if sizes[block] / 2 < amount:
            taken.add(block)
            amount -= sizes[block]
    return taken


def block_patterns(
    counts: Mapping[str, int], sizes: Mapping[str, int], pattern: Sparsity, spread: float = SPREAD
) -> dict[str, Sparsity]:
    """The pattern of each block.

    Args:
        counts: number of outliers by block.
        sizes: number of weights by block.
        pattern: the pattern of the whole model.
        spread: as for :func:`kept_shares`.
    """
    names = [name for name, size in sizes.items() if size]
    if not names:
        return {}
    shares = [counts[name] / sizes[name] for name in names]
    kept = kept_shares(shares, [sizes[name] for name in names], 1 - pattern.fraction, spread)
    if pattern.n is None or pattern.m is None:
        return {name: replace(pattern, pattern=max(1 - share, 0.0)) for name, share in zip(names, kept, strict=True)}
    groups = group_sizes(kept, [sizes[name] for name in names], pattern.n, pattern.m)
    return {name: replace(pattern, pattern=f"{n}:{pattern.m}") for name, n in zip(names, groups, strict=True)}
