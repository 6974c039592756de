"""The factor of the inverse Gram matrix with which an error in one column is spread over the later columns."""

from __future__ import annotations

import torch

from ..errors import StatsError
from ..statistics.activation import ActivationStats
from ..threads import cholesky_work, few_threads
from .update import gram_of

MOST_DAMPING = 1.0
"""The largest damping that is tried, as a share of the Gram matrix's mean diagonal."""


def inverse_factor(stats: ActivationStats, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = (G + damping mean(diag G))^-1; fp32 [in_features, in_features].

    A channel that was never active gets 1 on G's diagonal, as in SparseGPT's published code. The damping is raised
    tenfold, up to :data:`MOST_DAMPING`, while the Cholesky factorization fails.

    Raises:
        StatsError: there is no Gram matrix, or no damping makes it positive definite.
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
        f"the Gram matrix has no Cholesky factor, even with a damping of {MOST_DAMPING:g} times its mean diagonal: "
        "calibrate on more tokens, in float32 or bfloat16"
    )
