"""The low-rank product that best replaces what pruning took from a layer's outputs."""

from __future__ import annotations

import torch

from ace_triton.solvers.raised_damping import add_to_diagonal, with_damping
from ace_triton.solvers.update import gram_of
from ace_triton.statistics.activation import ActivationStats

DAMPING = 0.02
"""Added to the Gram matrix's diagonal, as a share of its mean."""


def residual_product(residual: torch.Tensor, stats: ActivationStats, rank: int) -> torch.Tensor:
    """The matrix L of a rank that minimizes trace((R - L) G (R - L)^T), as a dense tensor with factors in bf16.

    With G = C C^T, L = U_r U_r^T R, where U_r are the first left singular vectors of R C. They are the eigenvectors of
    R G R^T. So L is the product of U_r, [out_features, rank], and U_r^T R, [rank, in_features].

    Args:
        residual: R, fp32 [out_features, in_features].
        stats: with a Gram matrix.
        rank: number of columns of U_r.
    """
    gram = gram_of(stats).matrix
    assert gram is not None
    damped = add_to_diagonal(gram, DAMPING * gram.diagonal().mean())
    if residual.shape[0] <= residual.shape[1]:
        left = _largest_vectors(residual @ damped @ residual.t(), rank)
    else:
        lower = with_damping(damped, torch.linalg.cholesky)
        root = residual @ lower
        right = _largest_vectors(root.t() @ root, rank)
        left = torch.linalg.qr(root @ right).Q
    return left.bfloat16().float() @ (left.t() @ residual).bfloat16().float()


def _largest_vectors(square: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors of the largest eigenvalues of a symmetric matrix, by subspace iteration; [width, rank]."""
    generator = torch.Generator(device=square.device).manual_seed(0)
    width = min(len(square), 2 * rank)
    vectors = torch.randn(len(square), width, generator=generator, dtype=square.dtype, device=square.device)
    for _ in range(8):
        vectors = torch.linalg.qr(square @ vectors).Q
    found = torch.linalg.eigh(vectors.t() @ square @ vectors)
    return vectors @ found.eigenvectors[:, -min(rank, width) :]
