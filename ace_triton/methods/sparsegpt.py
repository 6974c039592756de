"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, each error spread over the columns
that are still to come."""

from __future__ import annotations

from typing import Annotated

import torch

from ..errors import RecipeError
from ..kernels.score_terms import ScoreTerms
from ..kernels.select_nm import select_nm
from ..kernels.select_rows import select_rows
from ..option_types import Range
from ..solvers.update import gram_of
from ..sparsity import Axis, Sparsity
from ..statistics.activation import ActivationStats, StatsError
from ..threads import cholesky_work, few_threads

MOST_DAMPING = 1.0


def sparsegpt_weight(
    weight: torch.Tensor,
    stats: ActivationStats,
    pattern: Sparsity,
    axis: Axis,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned and updated weight, as published (algorithm 1 and its code at 147d215).

    For n:m the survivors of a group are chosen when the sweep reaches it, from the weights as they are by then; for a
    fraction they are chosen in every block of columns, the share of the whole block [out_features, block_size].

    Args:
        weight: dense, fp32 [out_features, in_features].
        stats: with a Gram matrix.
        pattern: of any kind but along the outputs; a fraction's scope plays no part.
        axis: what groups run along.
        damping: share of the Gram matrix's mean diagonal added to it; raised tenfold as long as Cholesky fails.
        block_size: columns updated together, a multiple of m.

    Returns:
        fp32 [out_features, in_features], +0.0 where pruned, and the mask.

    Raises:
        ValueError: a pattern or option that it cannot serve.
        StatsError: no Gram matrix, or one that no damping makes positive definite.
    """
    if axis == "out":
        raise RecipeError(
            "sparsegpt sweeps over input columns: a pattern along the outputs cannot be chosen on the way"
        )
    if pattern.m is not None and weight.shape[1] % pattern.m:
        raise RecipeError(f"its {weight.shape[1]} inputs are no multiple of {pattern.m}")
    if block_size < 1 or block_size % (pattern.m or 1):
        raise RecipeError(f"block_size must be a positive multiple of {pattern.m or 1}, got {block_size}")
    factor = stats.derive(("sparsegpt", damping), lambda: inverse_factor(stats, damping))
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
    """Prune a block's columns in place; returns each column's error over its pivot, [out_features, columns]."""
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


def inverse_factor(stats: ActivationStats, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = (G + damping mean(diag G))^-1; fp32 [in_features, in_features].

    Channels that were never active have 1 on G's diagonal, as in the published code.
    """
    matrix = gram_of(stats).matrix
    assert matrix is not None
    diagonal = matrix.diagonal()
    gram = matrix + (diagonal == 0).float().diag()
    level = gram.diagonal().mean()
    while damping <= MOST_DAMPING:
        with few_threads(cholesky_work(len(gram))):
            lower, failed = torch.linalg.cholesky_ex(gram + (damping * level).expand_as(diagonal).diag())
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed:
                    return upper
        damping = max(damping, 1e-3) * 10
    raise StatsError(
        f"the Gram matrix has no Cholesky factor, even damped by {MOST_DAMPING:g} of its mean diagonal: calibrate on "
        "more tokens, in float32 or bfloat16"
    )


def sparsegpt(
    weight: torch.Tensor,
    stats: ActivationStats,
    damping: Annotated[float, Range(least=0)] = 0.01,
    block_size: Annotated[int, Range(least=1)] = 128,
) -> ScoreTerms:
    """|W_ij| / U_jj, the root of SparseGPT's criterion, for weights that are not updated yet.

    Pruning itself is :func:`sparsegpt_weight`'s, which applies it to the updated weights. This form serves what must
    rank weights beforehand.
    """
    factor = stats.derive(("sparsegpt", damping), lambda: inverse_factor(stats, damping))
    return ScoreTerms(scale=factor.diagonal().reciprocal())
