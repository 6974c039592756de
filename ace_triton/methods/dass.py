"""DaSS: gate and up projections are scored by the input norms of the down projection that reads their outputs."""

from __future__ import annotations

import torch

from ..kernels.score_terms import ScoreTerms
from ..statistics.activation import ActivationStats
from .registry import Needs, register_metric
from .wanda_ria import wanda


@register_metric("dass", Needs(consumer=True), consumer_axis="out", skips_attention=True)
def dass(weight: torch.Tensor, stats: ActivationStats, alpha: float = 0.5) -> ScoreTerms:
    """DaSS (arXiv 2405.01943): |W_ij| m_i^alpha for gate and up projections, Wanda for the others.

    m_i is the norm of input channel i of the down projection, which reads the outputs of gate and up. This factor is
    the same for a whole row. So groups must run along the outputs; along the inputs the metric equals magnitude.
    """
    if stats.consumer_norm is None:
        return wanda(weight, stats)
    return ScoreTerms(row=stats.consumer_norm**alpha)
