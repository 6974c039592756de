"""SAAP: the importance of a weight fused with the importance of its input channel."""

from __future__ import annotations

import torch

from ..kernels.finite_check import FiniteCheck
from ..kernels.score_terms import ScoreTerms
from ..kernels.weight_sums import weight_sums
from ..statistics.activation import ActivationStats
from .registry import register_metric
from .wanda_ria import norm_to_power


@register_metric("saap")
def saap(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """SAAP's adaptive fusion (arXiv 2412.15127) of a weight's importance and its channel's importance.

    The weight's importance is |W_ij| n_j. The channel's is sum_i |W_ij| n_j = C_j n_j. SAAP weights importances by
    learned noise scales. With one scale for each structure these have a closed form, and the fused score then ranks
    weights as the product does. The paper's importances are Taylor terms of whole heads and channels, which need
    gradients. Only its fusion rule is used here, and it is *reconstructed*.
    """
    sums = weight_sums(weight)
    finite = FiniteCheck().record(weight, terms=[sums.col], flags=sums.not_finite)
    return ScoreTerms(col=sums.col, scale=norm_to_power(stats, 2), finite=finite)
