"""join_gains against the fp64 reference, and against its definition: the best n of a group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels import launch
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.join_gains import STRIP, join_gains, join_gains_reference

MOST = 20 if interpreting() else 70


@pytest.fixture(scope="session")
def make_scores(device):
    """make_scores(*shape, seed): typical scores: not negative, some of them 0."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.clamp(min=0).to(device)

    return make


def check(candidates: torch.Tensor, thresholds: torch.Tensor) -> None:
    got = join_gains(candidates, thresholds)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, join_gains_reference(candidates, thresholds), rtol=1e-5, atol=1e-6)


@given(
    pools=st.integers(1, 3),
    rows=st.integers(0, MOST),
    groups=st.integers(0, MOST),
    candidates=st.integers(0, MOST),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_scores, pools, rows, groups, candidates, seed):
    check(make_scores(pools, rows, candidates, seed=seed), make_scores(pools, rows, groups, seed=seed + 1))


@pytest.mark.parametrize("rows", [STRIP - 1, STRIP, STRIP + 1, 3 * STRIP])
def test_strips_of_rows(make_scores, rows):
    check(make_scores(1, rows, 19), make_scores(1, rows, 5, seed=1))


@pytest.mark.skipif(interpreting(), reason="too many rows for the interpreter")
def test_many_rows_round_little(make_scores):
    """A single fp32 sum over a million rows would have an error of 1e-3."""
    scores = make_scores(1, 2**20, 3)
    check(scores, scores.flip(1))


def test_is_what_a_group_retains_more_with_the_candidate(make_scores):
    """The best 2 of three channels and a candidate, against the best 2 of the three channels alone."""
    others, candidates = make_scores(1, 40, 3), make_scores(1, 40, 9, seed=1)
    alone = others.topk(2, dim=2).values
    gains = join_gains(candidates, alone[:, :, 1:])
    for y in range(9):
        joined = torch.cat([others, candidates[:, :, y : y + 1]], 2).topk(2, dim=2).values
        torch.testing.assert_close(gains[0, 0, y], joined.sum() - alone.sum(), rtol=1e-4, atol=1e-4)


def test_any_strides(make_scores):
    scores = make_scores(2, 30, 24)
    check(scores[:, ::2, 3:20], scores[:, 1::2, ::5])


@pytest.mark.parametrize(
    ("candidates", "thresholds", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(1, 3, 4), "n_pools, rows, groups"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 4, 4), "n_pools, rows, groups"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), "n_pools, rows, groups"),
        (torch.zeros(1, 3, 4, dtype=torch.float16), torch.zeros(1, 3, 4), "float32"),
    ],
)
def test_says_what_is_wrong(candidates, thresholds, message):
    with pytest.raises(ValueError, match=message):
        join_gains(candidates, thresholds)


def test_more_pools_than_one_launch_takes(monkeypatch, make_scores):
    monkeypatch.setattr(launch, "MOST_ALONG_Y", 2)
    check(make_scores(5, 7, 6), make_scores(5, 7, 3, seed=1))
