"""Gram matrices that have no Cholesky factor get more damping, in every solver that factorizes one."""

import pytest
import torch

from ace_triton.errors import StatsError
from ace_triton.solvers.inverse_factor import inverse_factor
from ace_triton.solvers.least_squares import penalty_factor, penalty_step
from ace_triton.solvers.raised_damping import with_damping
from ace_triton.statistics.activation import ActivationStats
from ace_triton.structures.compensation import fitted
from ace_triton.structures.settings import ShrinkSettings

WIDTH = 16


def indefinite(least: float) -> torch.Tensor:
    """A symmetric matrix with a unit diagonal, one of whose leading 2 x 2 eigenvalues is ``least``."""
    matrix = torch.full((WIDTH, WIDTH), 0.5)
    matrix[0, 1] = matrix[1, 0] = 1 - least
    return matrix.fill_diagonal_(1.0)


def test_the_damping_rises_tenfold_until_the_factorization_succeeds():
    tried = []

    def factorize(matrix: torch.Tensor) -> torch.Tensor:
        tried.append(float(matrix[0, 0]) - 2)
        return torch.linalg.cholesky(matrix)

    lower = with_damping(2 * indefinite(-0.05), factorize)
    assert tried == pytest.approx([0, 0.02, 0.2], abs=1e-6)
    torch.testing.assert_close(lower @ lower.t(), 2 * indefinite(-0.05) + 0.2 * torch.eye(WIDTH))


def test_a_first_damping_above_the_largest_is_tried():
    lower = with_damping(indefinite(-3.0), torch.linalg.cholesky, 5.0)
    torch.testing.assert_close(lower @ lower.t(), indefinite(-3.0) + 5 * torch.eye(WIDTH))


@pytest.mark.parametrize("solver", [penalty_factor, penalty_step])
def test_least_squares_survives_an_indefinite_matrix(solver):
    assert bool(solver(indefinite(-2.0)).isfinite().all())
    with pytest.raises(StatsError, match="even with a damping of 1 times its mean diagonal: calibrate on more tokens"):
        solver(indefinite(-9.0))


def test_sparsegpt_and_removed_structures_survive_one():
    stats = ActivationStats.from_tokens(torch.randn(20, WIDTH), gram=True)
    assert stats.gram is not None
    stats.gram.matrix = indefinite(-0.5)
    assert bool(inverse_factor(stats, 0.01).isfinite().all())
    mask = torch.arange(WIDTH) < 8
    settings = ShrinkSettings(0.5, damping=1e-4, prior=0)
    assert bool(fitted(torch.randn(4, WIDTH), mask, stats, settings, has_bias=False).weight.isfinite().all())
