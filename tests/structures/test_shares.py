"""Shares that are surely worse than the best one do not run on later batches."""

import pytest
import torch

from ace_triton.structures.shares import compared


def of_each(losses):
    return lambda shares, batch: [losses(share, batch) for share in shares]


@pytest.mark.parametrize(("gap", "spread", "batches"), [(1.0, 0.1, 1), (0.01, 1.0, 4)])
def test_only_a_share_that_is_surely_worse_stops(gap, spread, batches):
    generator = torch.Generator().manual_seed(0)
    text = torch.rand(4, 512, generator=generator) * 8
    own = torch.randn(2, 4, 512, generator=generator) * spread
    found = compared(of_each(lambda share, batch: text[batch] + own[share, batch] + share * gap), 2, 4)
    assert [len(losses) for losses in found] == [batches, batches]
    assert torch.equal(found[1][0], text[0] + own[1, 0] + gap)


def test_a_share_that_is_left_runs_on_all_batches():
    """The second share is too close to the first one, the third one is not."""
    noise = torch.randn(3, 4, 512, generator=torch.Generator().manual_seed(0))
    found = compared(of_each(lambda share, batch: noise[share, batch] + (0.0, 0.01, 3.0)[share]), 3, 4)
    assert [len(losses) for losses in found] == [4, 4, 1]


def test_few_tokens_are_never_sure():
    found = compared(of_each(lambda share, batch: torch.full((16,), float(share))), 2, 3)
    assert [len(losses) for losses in found] == [3, 3]
