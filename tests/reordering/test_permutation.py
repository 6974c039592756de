"""The search is never worse than the given order, exact for small problems, and close to linear sum assignment."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton.reordering.permutation import retained_score, search_permutation, snake_order


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random scores like those of a metric, with some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[0], 1, shape[2], generator=generator).exp()
    return torch.randn(shape, generator=generator).abs() * channels


def retained(scores: torch.Tensor, order: torch.Tensor, n: int, m: int) -> float:
    """The retained score, computed without the package: sort every group of every row."""
    ordered = torch.stack([pool[:, o] for pool, o in zip(scores, order, strict=True)])
    groups = ordered.double().unflatten(2, (-1, m)).sort(-1).values
    return float(groups[..., m - n :].sum())


def check(scores: torch.Tensor, n: int, m: int, **options) -> None:
    found = search_permutation(scores, n, m, **options)
    channels = torch.arange(scores.shape[2]).expand(scores.shape[0], -1)
    assert torch.equal(found.order.sort(1).values, channels)
    assert found.before == pytest.approx(retained(scores, channels, n, m), rel=1e-9)
    assert found.after == pytest.approx(retained(scores, found.order, n, m), rel=1e-9)
    assert found.after >= found.before


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    pools=st.integers(1, 3),
    rows=st.integers(0, 20),
    groups=st.integers(1, 9),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 16), (16, 32)]),
    seed=st.integers(0, 1000),
)
def test_never_retains_less(pools, rows, groups, pattern, seed):
    n, m = pattern
    check(draw(pools, rows, groups * m, seed=seed), n, m)


def test_equal_scores_and_zeros():
    check(torch.ones(2, 7, 16), 2, 4)
    check(torch.zeros(2, 7, 16), 2, 4)


def test_pools_are_independent():
    scores = draw(3, 40, 32)
    together = search_permutation(scores, 2, 4)
    assert bool((together.order < 32).all())
    alone = sum(search_permutation(pool[None], 2, 4).after for pool in scores)
    assert together.after == pytest.approx(alone, rel=0.01)


def test_retained_score_does_not_decrease_with_more_cycles():
    scores = draw(1, 60, 64)
    retained_by_cycles = [search_permutation(scores, 2, 4, cycles=cycles).after for cycles in range(6)]
    assert retained_by_cycles == sorted(retained_by_cycles)
    assert retained_by_cycles[0] < retained_by_cycles[1] < retained_by_cycles[-1]


@pytest.mark.parametrize("seed", range(12))
def test_two_groups_of_four_are_solved(seed):
    """Compared with all 35 ways to divide eight channels into two groups."""
    scores = draw(1, 30, 8, seed=seed)
    groups = [(0, *three) for three in combinations(range(1, 8), 3)]
    every = [torch.tensor([[*group, *(set(range(8)) - set(group))]]) for group in groups]
    assert len(every) == 35
    best = max(retained(scores, order, 2, 4) for order in every)
    assert search_permutation(scores, 2, 4).after == pytest.approx(best, rel=1e-9)


def test_the_heuristic_assigns_channels_in_alternating_direction():
    scores = torch.arange(12.0)[None, None]
    assert snake_order(scores, 3).tolist() == [[[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11]]]


def test_retains_nearly_as_much_as_linear_sum_assignment():
    """Compared with one sweep of RIA's search from its heuristic order, on a layer of 200 groups."""
    from scipy.optimize import linear_sum_assignment

    from ace_triton.kernels.join_gains import join_gains_reference

    scores = draw(1, 128, 800)
    slots = snake_order(scores, 4)
    given = torch.arange(800)[None]
    for removed in range(4):
        columns = scores[0, :, slots[0].flatten()].unflatten(1, (4, 200))
        others = columns[:, [slot for slot in range(4) if slot != removed]].sort(1).values[:, 1]
        gains = join_gains_reference(columns[None, :, removed].contiguous(), others[None])
        slots[0, removed] = slots[0, removed, linear_sum_assignment(gains[0].numpy(), maximize=True)[1]]
    reference = float(retained_score(scores, slots, 2).sum())
    found = search_permutation(scores, 2, 4)
    assert found.after - found.before >= 0.95 * (reference - retained(scores, given, 2, 4))


@pytest.mark.parametrize(
    ("shape", "n", "m"), [((3, 8), 2, 4), ((1, 3, 6), 2, 4), ((1, 3, 8), 4, 4), ((1, 3, 8), 0, 4), ((1, 3, 0), 2, 4)]
)
def test_invalid_arguments_are_refused(shape, n, m):
    with pytest.raises(ValueError, match="multiple of m"):
        search_permutation(torch.zeros(shape), n, m)


def test_scores_at_the_end_of_fp32s_range_are_ordered_as_small_ones_are():
    scores = torch.rand(2, 64, 32, generator=torch.Generator().manual_seed(3))
    small, large = search_permutation(scores, 2, 4), search_permutation(scores * 2.0**127, 2, 4)
    assert torch.equal(large.order, small.order)
    assert (large.before / 2.0**127, large.after / 2.0**127) == (small.before, small.after)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.rand(1, 8, 16)
    scores[0, 3, 5] = bad
    with pytest.raises(ValueError, match="scores contain NaN or infinity"):
        search_permutation(scores, 2, 4)
