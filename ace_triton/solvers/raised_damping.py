"""Cholesky factorizations of Gram matrices: the damping is raised while they fail, as in SparseGPT's published code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import StatsError

MOST_DAMPING = 1.0
"""The largest damping that is tried, as a share of the matrix's mean diagonal."""

LEAST_RAISED = 0.01
"""The smallest damping after a failure."""

Result = TypeVar("Result")


def add_to_diagonal(gram: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """A copy of the Gram matrix with ``added``, a number or [in_features], added to its diagonal."""
    matrix = gram.clone()
    matrix.diagonal().add_(added)
    return matrix


def with_damping(matrix: torch.Tensor, factorize: Callable[[torch.Tensor], Result], damping: float = 0.0) -> Result:
    """Factorize a matrix; while that fails, raise the damping tenfold, up to :data:`MOST_DAMPING`.

    Args:
        matrix: symmetric, [in_features, in_features].
        factorize: raises torch.linalg.LinAlgError if its argument is not positive definite.
        damping: the first damping, added to the diagonal, as a share of its mean.

    Raises:
        StatsError: no damping makes the matrix positive definite.
    """
    level, most = matrix.diagonal().mean(), max(damping, MOST_DAMPING)
    while damping <= most:
        try:
            return factorize(add_to_diagonal(matrix, damping * level) if damping else matrix)
        except torch.linalg.LinAlgError:
            damping = max(10 * damping, LEAST_RAISED)
    raise StatsError(
        f"the Gram matrix has no Cholesky factor, even with a damping of {most:g} times its mean diagonal: "
        "calibrate on more tokens, in float32 or bfloat16"
    )
