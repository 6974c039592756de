"""What the benchmarks call the published way prunes what ace_triton prunes, ties aside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, Sparsity, prune_linear
from benchmarks import published

ROWS, COLS = 48, 96


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLS, ROWS)


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 32, COLS) * torch.rand(COLS)


def scores_of(method: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    mean_square = tokens.square().sum((0, 1)) / tokens.shape[0]
    if method == "wanda":
        return published.wanda_scores(weight, mean_square)
    if method == "ria":
        return published.ria_scores(weight, mean_square)
    return published.magnitude_scores(weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize(("n_kept", "m"), [(2, 4), (4, 8), (1, 4)])
def test_groups(layer, tokens, method, n_kept, m):
    theirs = layer.weight.detach().clone()
    published.prune_groups(theirs, scores_of(method, theirs, tokens), m - n_kept, m)
    prune_linear(layer, ActivationStats.from_tokens(tokens), method, f"{n_kept}:{m}")
    assert torch.equal(layer.weight, theirs)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("select", [published.prune_rows_by_sort, published.prune_rows_by_topk])
def test_rows(layer, tokens, method, select):
    theirs = layer.weight.detach().clone()
    select(theirs, scores_of(method, theirs, tokens), COLS // 2)
    prune_linear(layer, ActivationStats.from_tokens(tokens), method, 0.5)
    assert torch.equal(layer.weight, theirs)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_whole_layer(layer, tokens, method):
    theirs = layer.weight.detach().clone()
    published.prune_layer(theirs, scores_of(method, theirs, tokens), ROWS * COLS // 2)
    prune_linear(layer, ActivationStats.from_tokens(tokens), method, Sparsity(0.5, scope="layer"))
    assert torch.equal(layer.weight, theirs)


def test_equal_scores_fall_as_in_the_published_sort(tokens):
    layer = nn.Linear(COLS, ROWS)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, (ROWS, COLS)))
    theirs = layer.weight.detach().clone()
    published.prune_rows_by_sort(theirs, published.magnitude_scores(theirs), COLS // 2)
    prune_linear(layer, None, "magnitude", 0.5)
    assert torch.equal(layer.weight, theirs)
