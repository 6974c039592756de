"""assignment against SciPy's: the optimal sum with the compiled library, a sum close to it elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ace_triton.kernels.assignment import assignment, assignment_by_exchange
from ace_triton.kernels.backend import choose_backend


def sums(gains: torch.Tensor, joins: torch.Tensor) -> torch.Tensor:
    assert torch.equal(joins.sort(1).values, torch.arange(gains.shape[1], device=joins.device).expand_as(joins))
    return gains.double().gather(2, joins[:, :, None]).sum((1, 2)).cpu()


def check(gains: torch.Tensor) -> None:
    best = [linear_sum_assignment(pool.cpu().numpy(), maximize=True) for pool in gains]
    most = torch.tensor([float(p.double().cpu()[i, j].sum()) for p, (i, j) in zip(gains, best, strict=True)])
    start = gains.double().diagonal(dim1=1, dim2=2).sum(1).cpu()
    rounding = 1e-5 * gains.abs().amax().cpu() * gains.shape[1]
    for assign in (assignment, assignment_by_exchange):
        got = sums(gains, assign(gains))
        assert bool((got <= most + rounding).all())
        assert bool((got >= start - rounding).all())
        if assign is assignment and choose_backend(gains) == "cpu":
            assert bool((got >= most - rounding).all())
        else:
            assert bool((got - start >= 0.6 * (most - start) - rounding).all())


@given(
    pools=st.integers(1, 3),
    groups=st.integers(1, 70),
    kind=st.sampled_from(["even", "heavy", "ties", "negative", "equal"]),
    seed=st.integers(0, 1000),
)
def test_against_the_best(device, pools, groups, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(pools, groups, groups, generator=generator)
    if kind == "heavy":
        gains = gains.log().neg().exp() * torch.rand(pools, 1, groups, generator=generator)
    elif kind == "ties":
        gains = (4 * gains).round()
    elif kind == "negative":
        gains = -gains
    elif kind == "equal":
        gains = torch.ones_like(gains)
    check(gains.clamp(max=1e3).to(device))


def test_no_groups_at_all(device):
    assert assignment(torch.zeros(2, 0, 0, device=device)).shape == (2, 0)


@pytest.mark.parametrize("gains", [torch.zeros(3, 3), torch.zeros(1, 3, 4), torch.zeros(1, 3, 3, dtype=torch.float64)])
def test_says_what_is_wrong(gains):
    with pytest.raises(ValueError, match="n_pools, groups, groups"):
        assignment(gains)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_gains_that_are_not_finite_are_refused(device, bad, everywhere):
    gains = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    gains[1, 3 : 20 if everywhere else 4] = bad
    with pytest.raises(ValueError, match="gains contain NaN or infinity"):
        assignment(gains.to(device))


@pytest.mark.parametrize("groups", [3, 16, 33])
def test_gains_whose_differences_leave_fp32_end_the_search(device, groups):
    """All groups but the last want the first candidate, by more than fp32 can say."""
    gains = torch.full((2, groups, groups), -3e38)
    gains[:, :, 0] = gains[:, -1] = 3e38
    gains = gains.to(device)
    if choose_backend(gains) == "cpu":
        with pytest.raises(ValueError, match="divide all gains by the same number"):
            assignment(gains)
    else:
        sums(gains, assignment(gains))
    check(gains / 2**10)
