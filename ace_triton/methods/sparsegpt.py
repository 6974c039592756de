"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column and spread each column's error over the
later columns."""

from __future__ import annotations

from typing import Annotated

import torch

from ..errors import RecipeError
from ..kernels.score_terms import ScoreTerms
from ..kernels.select_nm import select_nm
from ..kernels.select_rows import select_rows
from ..option_types import Range
from ..solvers.inverse_factor import inverse_factor
from ..solvers.update import gram_of
from ..sparsity import Axis, Sparsity
from ..statistics.activation import ActivationStats
from ..threads import few_threads
from .registry import Needs, register_metric


def sparsegpt_weight(
    weight: torch.Tensor,
    stats: ActivationStats,
    pattern: Sparsity,
    axis: Axis,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune and update a weight as published (algorithm 1 and its code at 147d215).

    For n:m, the sweep chooses the kept weights of a group when it reaches the group, from the weights updated so far.
    For a fraction, it chooses them once per block of columns; the fraction applies to the whole block
    [out_features, block_size].

    Args:
        weight: dense, fp32 [out_features, in_features].
        stats: with a Gram matrix.
        pattern: any pattern that runs along the inputs; the scope of a fraction is ignored.
        axis: the direction of the groups; only "in" is valid.
        damping: share of the Gram matrix's mean diagonal that is added to its diagonal. It is raised while the
            Cholesky factorization fails (:func:`~ace_triton.solvers.inverse_factor.inverse_factor`).
        block_size: columns per block, a multiple of m.

    Returns:
        The weight, fp32 [out_features, in_features], +0.0 where pruned; and the mask.

    Raises:
        RecipeError: the pattern or an option is invalid.
        StatsError: there is no Gram matrix, or no damping makes it positive definite.
    """
    if axis == "out":
        raise RecipeError(
            "sparsegpt prunes input columns one after another, so groups cannot run along the outputs: use axis='in'"
        )
    if pattern.m is not None and weight.shape[1] % pattern.m:
        raise RecipeError(f"its {weight.shape[1]} inputs are no multiple of {pattern.m}")
    if block_size < 1 or block_size % (pattern.m or 1):
        raise RecipeError(f"block_size must be a positive multiple of {pattern.m or 1}, got {block_size}")
    factor = stats.derive(("inverse_factor", damping), lambda: inverse_factor(stats, damping))
    gram = gram_of(stats).matrix
    assert gram is not None
    current = weight.masked_fill(gram.diagonal() == 0, 0.0)
    mask = torch.zeros_like(current, dtype=torch.bool)
    for start in range(0, current.shape[1], block_size):
        block = slice(start, min(start + block_size, current.shape[1]))
        with few_threads(weight.shape[0] * block_size):
            errors = _sweep(current[:, block], mask[:, block], factor[block, block].contiguous(), pattern)
        current[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
    return current.where(mask, 0.0), mask


def _sweep(current: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, pattern: Sparsity) -> torch.Tensor:
    """Prune a block's columns in place; returns each column's error divided by its pivot, [out_features, columns]."""
    columns = current.t().contiguous()
    errors = torch.empty_like(columns)
    scale = factor.diagonal().reciprocal()
    group = pattern.m
    if group is None or pattern.n is None:
        kept = pattern.kept_of(current.numel())
        mask.copy_(select_rows(current.contiguous(), ScoreTerms(scale=scale), kept, scope="layer", output="mask"))
    for j in range(len(columns)):
        if group is not None and pattern.n is not None and j % group == 0:
            ahead = slice(j, j + group)
            terms = ScoreTerms(scale=scale[ahead].contiguous())
            mask[:, ahead] = select_nm(columns[ahead].t().contiguous(), terms, pattern.n, group, output="mask")
        error = torch.mul(columns[j].masked_fill(mask[:, j], 0.0), scale[j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    current.copy_(columns.t())
    return errors.t()


@register_metric("sparsegpt", Needs(gram=True), solve=sparsegpt_weight)
def sparsegpt(
    weight: torch.Tensor,
    stats: ActivationStats,
    damping: Annotated[float, Range(least=0)] = 0.01,
    block_size: Annotated[int, Range(least=1)] = 128,
) -> ScoreTerms:
    """|W_ij| / U_jj, the square root of SparseGPT's criterion, for weights that are not updated yet.

    :func:`sparsegpt_weight` prunes; it applies the criterion to the updated weights. This form ranks the dense weights,
    for channel orders, budgets and weight updates.
    """
    factor = stats.derive(("inverse_factor", damping), lambda: inverse_factor(stats, damping))
    return ScoreTerms(scale=factor.diagonal().reciprocal())
