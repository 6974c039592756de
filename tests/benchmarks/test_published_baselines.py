"""What the benchmarks call the published way prunes what ace_triton prunes, ties aside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, Sparsity, prune_linear, prune_model
from benchmarks.claims import published, published_model

ROWS, COLS = 48, 96


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request) -> str:
    return request.param


@pytest.fixture
def layer(device) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLS, ROWS).to(device)


@pytest.fixture
def tokens(device) -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.randn(4, 32, COLS) * torch.rand(COLS)).to(device)


def scores_of(method: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    norms = published.InputNorms(torch.zeros(COLS, device=tokens.device))
    for batch in tokens.split([1, 3]):
        norms.add(batch)
    mean_square = norms.mean_square
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


@pytest.mark.parametrize(("n_kept", "m"), [(2, 4), (4, 8)])
def test_ace_as_printed(layer, tokens, n_kept, m):
    outputs = layer(tokens).detach().flatten(0, 1)
    theirs = layer.weight.detach().clone()
    loss = published.cosine_loss(tokens.flatten(0, 1), outputs)
    factor = published.variance_factor(tokens.square().sum(1))
    mean_square = tokens.square().sum((0, 1)) / len(tokens)
    published.prune_groups(theirs, published.ace_scores(theirs, mean_square, loss, factor), m - n_kept, m)
    prune_linear(layer, tokens, "ace-paper", f"{n_kept}:{m}")
    assert torch.equal(layer.weight, theirs)


@pytest.mark.parametrize(("n_kept", "m"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("dead_channel", [False, True])
def test_sparsegpt(layer, tokens, n_kept, m, dead_channel):
    if dead_channel:
        tokens[..., 5] = 0
    theirs = layer.weight.detach().clone()
    published.prune_by_sparsegpt(theirs, published.hessian(tokens), m - n_kept, m, block=32)
    prune_linear(layer, ActivationStats.from_tokens(tokens, gram=True), "sparsegpt", f"{n_kept}:{m}", block_size=32)
    assert torch.equal(layer.weight != 0, theirs != 0)
    torch.testing.assert_close(layer.weight.data, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "ace", "ace-paper"])
def test_whole_models(tiny_model, ids, method):
    ours, theirs = tiny_model, copy.deepcopy(tiny_model)
    prune_model(ours, ids, method, "2:4", batch_size=3)
    seconds = published_model.prune_model(theirs, ids, method, 2, 4, batch_size=3)
    assert seconds.total >= seconds.select > 0
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=0, msg=name)


def test_sparsegpt_on_a_whole_model(tiny_model, ids):
    ours, theirs = tiny_model, copy.deepcopy(tiny_model)
    prune_model(ours, ids, "sparsegpt", "2:4", batch_size=3)
    published_model.prune_model(theirs, ids, "sparsegpt", 2, 4, batch_size=3)
    for name, weight in ours.state_dict().items():
        apart = (weight - theirs.state_dict()[name]).norm() / weight.norm()
        assert float(apart) < 1e-3, name


def test_weights_that_lie_transposed(make_decoder, ids):
    ours, theirs = make_decoder("gpt2"), make_decoder("gpt2")
    prune_model(ours, ids, "wanda", "2:4", batch_size=3)
    published_model.prune_model(theirs, ids, "wanda", 2, 4, batch_size=3)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())


def test_what_has_no_published_form(make_decoder, tiny_model, ids):
    with pytest.raises(ValueError, match="no published form of 'stade'"):
        published_model.prune_model(tiny_model, ids, "stade", 2, 4, batch_size=3)
    with pytest.raises(ValueError, match="experts are stacked"):
        published_model.prune_model(make_decoder("qwen3_moe"), ids, "wanda", 2, 4, batch_size=3)


def test_equal_scores_fall_as_in_the_published_sort(tokens):
    layer = nn.Linear(COLS, ROWS, device=tokens.device)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, (ROWS, COLS)))
    theirs = layer.weight.detach().clone()
    published.prune_rows_by_sort(theirs, published.magnitude_scores(theirs), COLS // 2)
    prune_linear(layer, None, "magnitude", 0.5)
    assert torch.equal(layer.weight, theirs)
