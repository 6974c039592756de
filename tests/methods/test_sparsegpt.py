"""SparseGPT compared with a naive version of its algorithm, column by column in fp64."""

import copy

import pytest
import torch

from ace_triton import ActivationStats, PruneError, Sparsity, StatsError, prune_linear
from ace_triton.methods.sparsegpt import sparsegpt_weight
from ace_triton.solvers.inverse_factor import inverse_factor


def oracle(dense, tokens, *, n=None, m=None, fraction=0.0, block=128, damping=0.01):
    """Eliminates the columns one by one from the inverse itself, without Cholesky factor or lazy updates."""
    weight, tokens = dense.double().clone(), tokens.double().reshape(-1, dense.shape[1])
    gram = tokens.t() @ tokens
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    pivots, rows = [], []
    for j in range(len(gram)):
        pivots.append(inverse[j, j].clone())
        rows.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    mask = torch.ones_like(weight, dtype=torch.bool)
    for j in range(len(gram)):
        size = m or block
        if j % size == 0:
            ahead = slice(j, min(j + size, len(gram)))
            scores = weight[:, ahead] ** 2 / torch.stack(pivots[ahead])
            if m:
                order = scores.argsort(dim=1, stable=True)
                mask[:, ahead] = mask[:, ahead].scatter(1, order[:, : m - n], False)
            else:
                order = scores.flatten().argsort(stable=True)
                flat = torch.ones(scores.numel(), dtype=torch.bool)
                flat[order[: int(scores.numel() * fraction)]] = False
                mask[:, ahead] = flat.reshape(scores.shape)
        error = torch.where(mask[:, j], 0.0, weight[:, j]) / pivots[j]
        weight -= error[:, None] * rows[j]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0.0)
    return weight, mask


def tokens_of(width: int, n_tokens: int = 300) -> torch.Tensor:
    torch.manual_seed(width)
    return torch.randn(n_tokens, width) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [("2:4", {"n": 2, "m": 4}), ("4:8", {"n": 4, "m": 8}), ("1:4", {"n": 1, "m": 4}), ("16:32", {"n": 16, "m": 32}),
     (0.5, {"fraction": 0.5}), (0.3, {"fraction": 0.3})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("rows", "width", "block"), [(7, 64, 32), (5, 160, 128), (16, 96, 256)])
def test_it_is_the_published_algorithm(sparsity, options, rows, width, block):
    tokens, dense = tokens_of(width), torch.randn(rows, width)
    stats = ActivationStats.from_tokens(tokens, gram=True)
    weight, mask = sparsegpt_weight(dense, stats, Sparsity.of(sparsity), "in", block_size=block)
    wanted, wanted_mask = oracle(dense, tokens, block=block, **options)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(weight.double(), wanted, rtol=1e-3, atol=1e-4)
    assert bool((weight[~mask] == 0).all())


def test_the_factor_is_that_of_the_inverse():
    tokens = tokens_of(24)
    stats = ActivationStats.from_tokens(tokens, gram=True)
    upper = inverse_factor(stats, 0.01).double()
    gram = tokens.double().t() @ tokens.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(gram), rtol=1e-3, atol=1e-8)


def test_dead_channels_lose_their_weights():
    tokens = tokens_of(32)
    tokens[:, [1, 2, 17]] = 0
    dense = torch.randn(8, 32)
    stats = ActivationStats.from_tokens(tokens, gram=True)
    weight, mask = sparsegpt_weight(dense, stats, Sparsity("2:4"), "in")
    wanted, wanted_mask = oracle(dense, tokens, n=2, m=4)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(weight.double(), wanted, rtol=1e-3, atol=1e-4)
    assert bool((weight[:, [1, 2, 17]] == 0).all())


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_fewer_tokens_than_channels(n_tokens):
    tokens, layer = tokens_of(48, n_tokens), torch.nn.Linear(48, 8)
    prune_linear(layer, tokens, "sparsegpt")
    assert bool(((layer.weight != 0).reshape(-1, 4).sum(1) <= 2).all())
    assert bool(layer.weight.isfinite().all())


def test_without_damping_a_singular_gram_is_damped_all_the_same():
    layer = torch.nn.Linear(16, 8)
    prune_linear(layer, torch.ones(20, 16), "sparsegpt", damping=0.0)
    assert bool(layer.weight.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    tokens = tokens_of(32)
    layer = torch.nn.Linear(32, 16).to(dtype)
    wanted, mask = oracle(layer.weight.detach().float(), tokens, n=2, m=4)
    stats = ActivationStats.from_tokens(tokens, gram=True)
    result = prune_linear(layer, stats, "sparsegpt", return_mask=True)
    assert layer.weight.dtype == dtype
    assert torch.equal(result.mask, mask)
    rounding = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(layer.weight.detach().double(), wanted, **rounding)


@pytest.mark.parametrize("recipe", [{"method": "sparsegpt"}, {"method": "wanda", "update": "lstsq"}], ids=str)
@pytest.mark.parametrize("sparsity", ["2:4", "8:16", 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_result_is_rounded_to_16_bits(recipe, sparsity, dtype):
    tokens, layer = tokens_of(160, 640), torch.nn.Linear(160, 48).to(dtype)
    tokens[:, 5] *= 30
    exact, stats = copy.deepcopy(layer).float(), ActivationStats.from_tokens(tokens.to(dtype), gram=True)
    prune_linear(layer, stats, sparsity=sparsity, **recipe)
    prune_linear(exact, stats, sparsity=sparsity, **recipe)
    assert torch.equal(layer.weight, exact.weight.to(dtype))


def test_it_errs_less_than_its_first_criterion_alone():
    tokens, layer = tokens_of(64), torch.nn.Linear(64, 32)
    alone = copy.deepcopy(layer)
    dense = layer(tokens)
    prune_linear(layer, tokens, "sparsegpt")
    prune_linear(alone, tokens, "wanda")
    assert (layer(tokens) - dense).square().sum() < 0.8 * (alone(tokens) - dense).square().sum()


def test_unsupported_requests_are_refused_and_change_nothing():
    layer, tokens = torch.nn.Linear(32, 16), tokens_of(32)
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match="along the outputs"):
        prune_linear(layer, tokens, "sparsegpt", Sparsity("2:4", axis="out"))
    with pytest.raises(PruneError, match="multiple of 8, got 12"):
        prune_linear(layer, tokens, "sparsegpt", "4:8", block_size=12)
    with pytest.raises(ValueError, match="damping must be a number, 0 or more"):
        prune_linear(layer, tokens, "sparsegpt", damping=-1.0)
    with pytest.raises(StatsError, match="gram=True"):
        prune_linear(layer, ActivationStats.from_tokens(tokens), "sparsegpt")
    tokens[3, 4] = torch.inf
    with pytest.raises(StatsError, match="NaN or infinity"):
        prune_linear(layer, tokens, "sparsegpt")
    assert torch.equal(layer.weight, before)
