"""Masked least squares: the kept weights that best reproduce the dense layer's outputs.

For the dense weight W, the input's Gram matrix G (damped) and a mask, row by row

    minimise (w_i - W_i) G (w_i - W_i)^T   over w_i with zeros where the mask has them.

All rows are solved at once; a step is one product [out, in] x [in, in].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from ..kernels.gram_product import bfloat16_products
from ..threads import cholesky_work, few_threads

TOLERANCE = 0.02
"""Conjugate gradients end where the residual, in the preconditioner's norm, is below this share of what the outputs'
norm would be if channels were uncorrelated. The mask itself costs ten times that."""

PENALTY = 0.8
"""Of the mask search, in units of G's diagonal. SmolLM2-135M, 2:4: four or five rounds at it give the perplexity
that eight to twelve give at penalties that rise from 0.4 to 1.2."""

WIDEST_FACTOR = 1024
"""Channels of a matrix that is inverted from its Cholesky factor: at 1,536 halves take 68 ms on a core, not 86."""

Choose = Callable[[torch.Tensor, Literal["mask", "weight"]], torch.Tensor]
"""A metric's choice among weights fp32 [out_features, in_features]: the mask (True where kept), or the weights
themselves, in place, with 0 where they are not kept."""


def energy(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """sum_t (w_i x_t)^2 of every row, fp32 [out_features]; on a CPU from factors of eight bits, as they are in bf16."""
    return coarse_product(weight, gram).mul_(weight).sum(1)


def coarse(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in bf16 where its products are fast, for what eight bits are enough for; else as it is."""
    fast = matrix.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return matrix.bfloat16() if fast else matrix


def coarse_product(weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """weight @ matrix in the weight's dtype, from factors of eight bits where those are fast.

    Args:
        weight: fp32 or fp64 [out_features, in_features].
        matrix: [in_features, in_features]; what :func:`coarse` gave takes half the time on a CPU.
    """
    with bfloat16_products():
        return (weight.to(matrix.dtype) @ matrix).to(weight.dtype)


def under(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight, finite, with +0.0 where the mask has none: on a CPU in a seventh of torch.where's time."""
    return (weight * mask).add_(0.0)


def solve_kept(
    dense: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    iterations: int,
    start: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """The least-squares weights on a mask, by conjugate gradients with G's diagonal as preconditioner.

    Args:
        dense: W, fp32 [out_features, in_features].
        mask: bool of that shape, True where kept.
        gram: G, fp32 [in_features, in_features], positive definite.
        iterations: at most so many, one product each; each lowers the error.
        start: where to start from; None for the dense weights under the mask.
        tolerance: as :data:`TOLERANCE`.

    Returns:
        fp32 [out_features, in_features], +0.0 where not kept.
    """
    keep = mask.to(dense.dtype)
    inverse_diagonal = gram.diagonal().reciprocal()
    weight = (dense if start is None else start).where(mask, 0.0)
    residual = ((dense - weight) @ gram).mul_(keep)
    scaled = residual * inverse_diagonal
    direction = scaled
    size = (residual * scaled).sum(1, keepdim=True)
    enough = tolerance**2 * (dense.square() @ gram.diagonal()).sum()
    for _ in range(iterations):
        if bool(size.sum() <= enough):
            break
        product = (direction @ gram).mul_(keep)
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0.0)
        weight = weight.addcmul_(length, direction)
        residual = residual.addcmul_(length, product, value=-1)
        scaled = residual * inverse_diagonal
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = torch.addcmul(scaled, torch.where(before > 0, size / before, 0.0), direction)
    return weight.where(mask, 0.0)


def penalty_step(gram: torch.Tensor, penalty: float = PENALTY) -> torch.Tensor:
    """rho D (G + rho D)^-1 with D = diag(G), [in_features, in_features], in bf16 where its products are fast.

    The step of :func:`search_mask` is written so that this factor only multiplies what the weights move by: eight
    bits of it are enough to choose a mask.
    """
    strength = gram.diagonal() * penalty
    return coarse(_inverse(raised(gram, strength)).mul_(strength[:, None]))


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of a symmetric positive definite matrix: by its Schur complement where it is wide, since products are faster than
    triangular solves."""
    width = len(matrix)
    if width <= WIDEST_FACTOR:
        with few_threads(cholesky_work(width)):
            return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    half = width // 2
    first, beside, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    inverse = torch.empty_like(matrix)
    of_first = _inverse(first)
    solved = of_first @ beside
    inverse[half:, half:] = of_rest = _inverse(last - beside.t() @ solved)
    inverse[:half, half:] = corner = (solved @ of_rest).neg_()
    inverse[half:, :half] = corner.t()
    inverse[:half, :half] = of_first.addmm_(corner, solved.t(), alpha=-1)
    return inverse


def raised(gram: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """The Gram matrix with ``added`` [in_features] on its diagonal."""
    matrix = gram.clone()
    matrix.diagonal().add_(added)
    return matrix


def search_mask(
    dense: torch.Tensor, mask: torch.Tensor, step: torch.Tensor, rounds: int, choose: Choose
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let mask and weights move together: the alternating direction method of multipliers.

    The splitting is that of Boža (arXiv 2401.02938), W = (G + rho D)^-1 (G W0 + rho D (Z - U)), Z = kept part of
    W + U, U = W + U - Z; here with the penalty in the norm of D = diag(G), and in the form
    W = W0 + (Z - U - W0) rho D (G + rho D)^-1, whose rounding errors are small beside what the weights move by.

    Args:
        dense: W0, fp32 [out_features, in_features].
        mask: the first mask.
        step: :func:`penalty_step` of the layer's Gram matrix.
        rounds: how often the mask is chosen again, 1 or more.
        choose: the metric's choice.

    Returns:
        The last mask, and weights near its least-squares solution.
    """
    kept, beyond = under(mask, dense), dense
    for index in range(rounds):
        free = coarse_product(kept.sub_(beyond), step).add_(beyond)
        if index + 1 < rounds:
            kept = choose(free.clone(), "weight")
            beyond = free.sub_(kept).add_(dense)
    mask = choose(free, "mask")
    return mask, under(mask, free)
