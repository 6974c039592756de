"""Masked least squares: the kept weights that best reproduce the dense layer's outputs.

W is the dense weight and G the damped Gram matrix of the input. For each row i

    minimize (w_i - W_i) G (w_i - W_i)^T   over all w_i that are zero where the mask is False.

All rows are solved at once. One step is one product [out_features, in_features] x [in_features, in_features].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.gram_product import bfloat16_products, has_bfloat16_products
from ..threads import cholesky_work, few_threads
from .raised_damping import add_to_diagonal, with_damping

TOLERANCE = 0.02
"""Conjugate gradients stop if the residual, in the preconditioner's norm, is below this share of the norm that the
outputs would have if channels were uncorrelated."""

PENALTY = 0.8
"""The penalty rho of the mask search, in units of G's diagonal."""

WIDEST_FACTOR = 1024
"""Largest matrix that is inverted from its Cholesky factor. A larger one is split in halves, which is faster."""

ENERGY_BLOCK = 512
"""Columns per block of :func:`energy`."""

Step = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies weights, fp32 [out_features, in_features], by a matrix from the right; the result is a new tensor."""

Choose = Callable[[torch.Tensor, Literal["mask", "weight"]], torch.Tensor]
"""Applies a metric's selection to weights, fp32 [out_features, in_features]. "mask" returns the mask, True where kept.
"weight" sets the other weights to 0, in place, and returns the weights."""


def energy(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """sum_t (w_i x_t)^2 for each row, fp32 [out_features]; factors are rounded as in :func:`rounded_product`.

    On a CPU only the blocks of G on and above its diagonal are multiplied.
    """
    width = len(gram)
    if gram.device.type != "cpu" or gram.dtype != weight.dtype or width < 2 * ENERGY_BLOCK:
        return rounded_product(weight, gram).mul_(weight).sum(1)
    total = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, width, ENERGY_BLOCK):
        block, later = slice(start, start + ENERGY_BLOCK), slice(start + ENERGY_BLOCK, width)
        product = weight[:, block] @ gram[block, block]
        product = product.addmm_(weight[:, later], gram[later, block], alpha=2)
        total += product.mul_(weight[:, block]).sum(1)
    return total


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in bf16 if its device has fast bf16 products, else unchanged. Use it if 8 bits are precise enough."""
    return matrix.bfloat16() if has_fast_bfloat16(matrix.device) else matrix


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if products in bf16 are faster than in fp32."""
    return device.type != "cpu" or has_bfloat16_products()


def rounded_product(weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """weight @ matrix in the weight's dtype; on a CPU with fast bf16 products, both factors are rounded to bf16.

    Args:
        weight: fp32 or fp64 [out_features, in_features].
        matrix: [in_features, in_features]; a result of :func:`rounded` is faster.
    """
    with bfloat16_products():
        return (weight.to(matrix.dtype) @ matrix).to(weight.dtype)


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weight with +0.0 where the mask is False. The weight must be finite. Faster than torch.where on a CPU."""
    return (weight * mask).add_(0.0)


def solve_kept(
    dense: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    iterations: int,
    start: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """The least-squares weights for a mask, by conjugate gradients with G's diagonal as preconditioner.

    Args:
        dense: W, fp32 [out_features, in_features].
        mask: bool [out_features, in_features], True where kept.
        gram: G, fp32 [in_features, in_features], positive definite.
        iterations: the largest number of iterations. Each takes one product and lowers the error.
        start: the weights to start from; None for the masked dense weights.
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
    threshold = tolerance**2 * (dense.square() @ gram.diagonal()).sum()
    for _ in range(iterations):
        if bool(size.sum() <= threshold):
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
    """rho D (G + rho D)^-1 with D = diag(G), [in_features, in_features], in the dtype of :func:`rounded`.

    :func:`search_mask` multiplies only the change of the weights by this factor, so bf16 is precise enough. The damping
    is raised if the matrix is not positive definite.
    """
    strength = gram.diagonal() * penalty
    return rounded(with_damping(add_to_diagonal(gram, strength), _inverse).mul_(strength[:, None]))


def penalty_factor(gram: torch.Tensor, penalty: float = PENALTY) -> torch.Tensor:
    """L, lower triangular, with L L^T = G + rho D as in :func:`penalty_step`."""
    with few_threads(cholesky_work(len(gram))):
        return with_damping(add_to_diagonal(gram, gram.diagonal() * penalty), torch.linalg.cholesky)


def solves_by_factor(gram: torch.Tensor, rows: int) -> bool:
    """True if products with :func:`penalty_step` are to be computed by :class:`PenaltySolves`, for ``rows`` rows.

    Triangular solves take about as long as a product on a CPU, and the factor takes a third of the inverse's time. With
    many rows or few columns that time does not matter.
    """
    return gram.device.type == "cpu" and not has_fast_bfloat16(gram.device) and WIDEST_FACTOR < len(gram) >= rows


@dataclass(frozen=True)
class PenaltySolves:
    """Multiplies weights by rho D (L L^T)^-1.

    Attributes:
        lower: L, from :func:`penalty_factor`.
        strength: the diagonal of rho D.
    """

    lower: torch.Tensor
    strength: torch.Tensor

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        half = torch.linalg.solve_triangular(self.lower.t(), weight * self.strength, upper=True, left=False)
        return torch.linalg.solve_triangular(self.lower, half, upper=False, left=False)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a symmetric positive definite matrix.

    A matrix wider than :data:`WIDEST_FACTOR` is inverted by its Schur complement, because products are faster than
    triangular solves.
    """
    width = len(matrix)
    if width <= WIDEST_FACTOR:
        with few_threads(cholesky_work(width)):
            return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    half = width // 2
    a, b, c = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    inverse = torch.empty_like(matrix)
    a_inverse = _inverse(a)
    a_inverse_b = a_inverse @ b
    inverse[half:, half:] = schur_inverse = _inverse(c - b.t() @ a_inverse_b)
    inverse[:half, half:] = corner = (a_inverse_b @ schur_inverse).neg_()
    inverse[half:, :half] = corner.t()
    inverse[:half, :half] = a_inverse.addmm_(corner, a_inverse_b.t(), alpha=-1)
    return inverse


def search_mask(
    dense: torch.Tensor, mask: torch.Tensor, step: Step, rounds: int, choose: Choose
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimize mask and weights together, by the alternating direction method of multipliers (ADMM).

    The splitting follows Boža (arXiv 2401.02938): W = (G + rho D)^-1 (G W0 + rho D (Z - U)), Z = the kept part of
    W + U, U = W + U - Z. Here the penalty uses the norm of D = diag(G). The step is computed as
    W = W0 + (Z - U - W0) rho D (G + rho D)^-1, so rounding errors are small compared with the change of the weights.

    Args:
        dense: W0, fp32 [out_features, in_features].
        mask: the first mask.
        step: multiplies weights by :func:`penalty_step` of the layer's Gram matrix.
        rounds: number of times that the mask is chosen again, 1 or more.
        choose: the metric's selection.

    Returns:
        The last mask, and weights near its least-squares solution.
    """
    kept, offset = masked(dense, mask), dense
    for index in range(rounds):
        free = step(kept.sub_(offset)).add_(offset)
        if index + 1 < rounds:
            kept = choose(free.clone(), "weight")
            offset = free.sub_(kept).add_(dense)
    mask = choose(free, "mask")
    return mask, masked(free, mask)
