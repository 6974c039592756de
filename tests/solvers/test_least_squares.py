"""Masked least squares compared with a separate solution of each row in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.solvers import least_squares
from ace_triton.solvers.least_squares import (
    PenaltySolves,
    energy,
    penalty_factor,
    penalty_step,
    search_mask,
    solve_kept,
)


def output_error(weight: torch.Tensor, dense: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """sum_t |(w_i - W_i) x_t|^2 of every row, fp32 [out_features]."""
    return energy(weight - dense, gram)


def row_by_row(dense: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The minimum, by lstsq on a square root of the Gram matrix, with the kept columns of each row."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp(min=0).sqrt()[:, None] * vectors.t()
    solved = torch.zeros_like(dense, dtype=torch.float64)
    for i in range(len(dense)):
        kept = mask[i].nonzero().squeeze(1)
        if len(kept):
            target = (root @ dense[i].double())[:, None]
            solved[i, kept] = torch.linalg.lstsq(root[:, kept], target, driver="gelsd").solution.squeeze(1)
    return solved


def correlated(n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    tokens = torch.randn(n_tokens, width) @ (torch.randn(width, width) / width**0.5 + 0.5 * torch.eye(width))
    return tokens * torch.logspace(-1, 1, width)


def damped(tokens: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    gram = tokens.t() @ tokens
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram))


@pytest.mark.parametrize(("n_tokens", "rows", "width"), [(200, 9, 24), (7, 5, 40), (64, 1, 3), (1, 4, 8)])
def test_it_is_the_solution_of_every_row(n_tokens, rows, width):
    gram = damped(correlated(n_tokens, width))
    dense, mask = torch.randn(rows, width), torch.rand(rows, width) > 0.5
    solved = solve_kept(dense, mask, gram, 400, tolerance=1e-7)
    wanted = row_by_row(dense, mask, gram)
    error = output_error(solved.double(), dense.double(), gram.double())
    best = output_error(wanted, dense.double(), gram.double())
    torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-5 * float(best.max() + 1e-9))
    torch.testing.assert_close(solved.double(), wanted, rtol=2e-2, atol=2e-3 * float(wanted.abs().max() + 1))
    assert bool((solved[~mask] == 0).all())
    assert not bool(torch.signbit(solved[~mask]).any())


@given(seed=st.integers(0, 10**6), iterations=st.integers(0, 12), n_tokens=st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_no_step_raises_the_error(seed, iterations, n_tokens):
    gram = damped(correlated(n_tokens, 32, seed))
    dense, mask = torch.randn(6, 32), torch.rand(6, 32) > 0.5
    before = output_error(solve_kept(dense, mask, gram, iterations, tolerance=0), dense, gram)
    after = output_error(solve_kept(dense, mask, gram, iterations + 1, tolerance=0), dense, gram)
    assert bool((after <= before * (1 + 1e-4) + 1e-6 * float(gram.diagonal().sum())).all())


def test_full_and_empty_masks_are_exact():
    gram, dense = damped(correlated(50, 16)), torch.randn(4, 16)
    assert torch.equal(solve_kept(dense, torch.ones(4, 16, dtype=torch.bool), gram, 5), dense)
    assert torch.equal(solve_kept(dense, torch.zeros(4, 16, dtype=torch.bool), gram, 5), torch.zeros(4, 16))


def test_orthogonal_channels_leave_the_kept_weights_alone():
    dense, mask = torch.randn(4, 16), torch.rand(4, 16) > 0.5
    solved = solve_kept(dense, mask, torch.logspace(-3, 3, 16).diag(), 5)
    torch.testing.assert_close(solved, dense.where(mask, 0.0))


def test_two_equal_channels_share_their_weight():
    """If two channels are equal, the kept channel also gets the weight of the other."""
    column = torch.randn(30, 1)
    gram = damped(torch.cat([column, column], 1), 1e-6)
    solved = solve_kept(torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]), gram, 10, tolerance=0)
    torch.testing.assert_close(solved, torch.tensor([[5.0, 0.0]]), rtol=1e-4, atol=0)


def test_a_good_start_is_kept():
    gram, dense = damped(correlated(100, 24)), torch.randn(5, 24)
    mask = torch.rand(5, 24) > 0.5
    solved = solve_kept(dense, mask, gram, 200, tolerance=1e-7)
    again = solve_kept(dense, mask, gram, 0, solved)
    assert torch.equal(again, solved)
    warm = output_error(solve_kept(dense, mask, gram, 1, solved, 0), dense, gram).sum()
    cold = output_error(solve_kept(dense, mask, gram, 1, tolerance=0), dense, gram).sum()
    assert warm < cold


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_the_step_is_the_published_one_in_another_form(penalty):
    gram = damped(correlated(100, 24)).double()
    dense, pull = torch.randn(5, 24).double(), torch.randn(5, 24).double()
    strength = penalty * gram.diagonal().diag()
    wanted = torch.linalg.solve(gram + strength, (dense @ gram + pull @ strength).t()).t()
    got = dense + (pull - dense) @ penalty_step(gram.float(), penalty).double()
    assert float((got - wanted).norm() / (wanted - dense).norm()) < 0.01


@pytest.mark.parametrize("widest", [3, 7, 100])
def test_a_wide_step_is_made_of_halves(monkeypatch, widest):
    gram = damped(correlated(60, 37))
    wanted = penalty_step(gram)
    monkeypatch.setattr(least_squares, "WIDEST_FACTOR", widest)
    torch.testing.assert_close(penalty_step(gram), wanted, rtol=1e-2, atol=1e-4)


def test_solves_with_the_factor_are_products_with_the_step():
    gram, change = damped(correlated(60, 37)), torch.randn(5, 37)
    solves = PenaltySolves(penalty_factor(gram, 0.3), gram.diagonal() * 0.3)
    torch.testing.assert_close(solves(change), change @ penalty_step(gram, 0.3).float(), rtol=1e-2, atol=1e-2)


def test_the_energy_of_a_wide_row_is_that_of_its_outputs(monkeypatch):
    tokens, weight = correlated(60, 37), torch.randn(5, 37)
    monkeypatch.setattr(least_squares, "ENERGY_BLOCK", 8)
    wanted = (tokens.double() @ weight.double().t()).square().sum(0)
    torch.testing.assert_close(energy(weight, tokens.t() @ tokens).double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_search_finds_a_better_mask():
    gram, dense = damped(correlated(400, 64)), torch.randn(32, 64)
    terms = ScoreTerms(scale=gram.diagonal().sqrt().contiguous())

    def choose(weight: torch.Tensor, output: str) -> torch.Tensor:
        chosen = select_nm(weight, terms, 2, 4, output=output)
        return weight if output == "weight" else chosen

    first = choose(dense, "mask")
    mask, start = search_mask(dense, first, lambda change: change @ penalty_step(gram).float(), 16, choose)
    assert bool((mask.reshape(-1, 4).sum(1) == 2).all())
    assert bool((start[~mask] == 0).all())
    searched = output_error(solve_kept(dense, mask, gram, 60), dense, gram).sum()
    kept = output_error(solve_kept(dense, first, gram, 60), dense, gram).sum()
    assert searched < 0.8 * kept
