"""The fused importance minimizes SAAP's loss: closed forms beside a search, and the learned scales."""

import math

import pytest
import torch

from ace_triton.structures.fusion import fused, learned_scales, stabilized


@pytest.fixture
def importances():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(6, 40, generator=generator) * scale + 0.1 for scale in (1e-3, 7.0)]


def loss(vector, element, first, second):
    return vector / (2 * first**2) + element / (2 * second**2) + math.log(first * second)


def test_scales_of_each_structure_rank_as_their_minimum(importances):
    """The minimum over a grid of scales of 1 structure ranks structures as the geometric mean does."""
    vector, element = (importance[0] for importance in importances)
    grid = torch.logspace(-2, 1, 400)
    least = [
        min((v / (2 * grid**2) + grid.log()).min() + (e / (2 * grid**2) + grid.log()).min() for _ in (0,))
        for v, e in zip(vector, element, strict=True)
    ]
    score = fused("structure", *importances)[0]
    assert torch.stack(least).argsort().tolist()[:10] == score.argsort().tolist()[:10]


def test_one_scale_is_the_mean_and_learned_scales_find_it(importances):
    vector, element = importances
    best = vector.mean().sqrt().item(), element.mean().sqrt().item()
    assert loss(vector.mean(), element.mean(), *best) < loss(vector.mean(), element.mean(), best[0] * 1.1, best[1])
    assert learned_scales(vector, element) == pytest.approx(best, rel=0.02)
    ranked = fused("mean", vector, element).mean(0).argsort()
    learned = fused("learned", vector, element).mean(0).argsort()
    assert ranked.tolist()[:10] == learned.tolist()[:10]


def test_a_structure_of_no_importance_has_the_least(importances):
    vector, element = importances
    vector[:, 3] = element[:, 3] = 0
    for rule in ("structure", "mean", "learned", "vector", "element"):
        score = stabilized(fused(rule, vector, element))
        assert bool(score.isfinite().all())
        assert int(score.argmin()) == 3


def test_the_same_mean_with_less_variation_is_worth_more():
    importance = torch.tensor([[1.0, 0.5], [1.0, 1.5]])
    steady, unsteady = stabilized(importance)
    assert steady == 1
    assert unsteady == pytest.approx(1 / (1 + 0.5**0.5))
    assert stabilized(importance[:1]).tolist() == [1.0, 0.5]
