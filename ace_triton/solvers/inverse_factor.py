"""The factor of the inverse Gram matrix with which an error in one column is spread over the later columns."""

from __future__ import annotations

import torch

from ..statistics.activation import ActivationStats
from ..threads import cholesky_work, few_threads
from .raised_damping import with_damping
from .update import gram_of


def inverse_factor(stats: ActivationStats, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = (G + damping mean(diag G))^-1; fp32 [in_features, in_features].

    A channel that was never active gets 1 on G's diagonal, as in SparseGPT's published code. The damping is raised
    if the factorization fails.

    Raises:
        StatsError: there is no Gram matrix, or no damping makes it positive definite.
    """
    matrix = gram_of(stats).matrix
    assert matrix is not None
    gram = matrix + (matrix.diagonal() == 0).float().diag()
    with few_threads(cholesky_work(len(gram))):
        return with_damping(gram, _factor_of_inverse, damping)


def _factor_of_inverse(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
