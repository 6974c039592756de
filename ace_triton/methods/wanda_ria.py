"""Metrics of the weight's magnitude and the input's norm: magnitude, Wanda, RIA and STADE."""

from __future__ import annotations

import torch

from ..kernels.column_scale import ColumnScale
from ..kernels.score_terms import ScoreTerms
from ..kernels.weight_sums import relative_importance
from ..statistics.activation import ActivationStats
from .registry import Needs, register_metric


@register_metric("magnitude", Needs(tokens=False))
def magnitude(weight: torch.Tensor, stats: ActivationStats | None) -> ScoreTerms:
    """|W_ij|."""
    return ScoreTerms()


@register_metric("wanda")
def wanda(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """|W_ij| n_j (Sun et al., arXiv 2306.11695, equation 1)."""
    return ScoreTerms(scale=stats.norm)


@register_metric("ria", Needs(relative_importance=True))
def ria(weight: torch.Tensor, stats: ActivationStats, a: float = 0.5) -> ScoreTerms:
    """(|W_ij| / C_j + |W_ij| / R_i) n_j^a (Zhang et al., "Plug-and-Play", ICLR 2024).

    R_i and C_j are the row and column sums of |W|, in fp32: in fp16 the quotients would fall below its normal range.
    """
    return relative_importance(weight, ColumnScale(base=norm_to_power(stats, a)))


@register_metric("stade")
def stade(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """|W_ij| std(x_j), the square root of STADE's W_ij^2 var(x_j). STADE's optional bias correction is not included."""
    return ScoreTerms(scale=stats.standard_deviation)


def norm_to_power(stats: ActivationStats, power: float) -> torch.Tensor:
    """n_j^power, fp32 [in_features]; computed once for all layers that share the statistics."""
    return stats.derive(("norm", power), lambda: stats.norm**power)
