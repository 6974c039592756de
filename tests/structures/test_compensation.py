"""Least squares over kept inputs, beside torch's own solver on the tokens themselves."""

import pytest
import torch

from ace_triton import ActivationStats, ShrinkSettings, shrink_model
from ace_triton.statistics.gram import Gram
from ace_triton.structures import compensation
from ace_triton.structures.compensation import Moments, fitted, mean_in_bias


@pytest.fixture
def layer():
    """A weight, tokens with dependent channels and a mean, and which inputs are kept."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    tokens = torch.randn(400, 12, generator=generator) @ mixing + torch.randn(12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    mask = torch.tensor([True] * 8 + [False] * 4)[torch.randperm(12, generator=generator)]
    return weight, tokens, mask


def statistics(tokens):
    stats = ActivationStats.from_tokens(tokens)
    gram = Gram(tokens.shape[1])
    gram.update(tokens)
    stats.gram = gram
    return stats


@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_solution_of_least_squares(layer, has_bias):
    weight, tokens, mask = layer
    settings = ShrinkSettings(damping=1e-7, prior=0)
    repair = fitted(weight, mask, statistics(tokens), settings, has_bias=has_bias)
    ones = torch.ones(len(tokens), 1)
    inputs = torch.cat([tokens[:, mask], ones], 1) if has_bias else tokens[:, mask]
    best = torch.linalg.lstsq(inputs.double(), (tokens @ weight.t()).double()).solution.t().float()
    torch.testing.assert_close(repair.weight, best[:, : int(mask.sum())], rtol=2e-3, atol=2e-3)
    outputs = tokens[:, mask] @ repair.weight.t()
    if has_bias:
        torch.testing.assert_close(repair.bias, best[:, -1], rtol=2e-3, atol=5e-3)
        outputs = outputs + repair.bias
    else:
        assert repair.bias is None
    wanted = tokens @ weight.t()
    assert repair.left == pytest.approx(float((outputs - wanted).square().sum() / wanted.square().sum()), rel=1e-2)
    assert repair.left < repair.lost


def test_a_strong_prior_keeps_the_dense_weights(layer):
    weight, tokens, mask = layer
    repair = fitted(weight, mask, statistics(tokens), ShrinkSettings(prior=1e12), has_bias=False)
    torch.testing.assert_close(repair.weight, weight[:, mask], rtol=1e-4, atol=1e-4)
    assert repair.left == pytest.approx(repair.lost, rel=1e-3)


def test_the_bias_takes_the_mean_of_what_is_removed(layer):
    weight, tokens, mask = layer
    repair = mean_in_bias(weight, mask, Moments.of(statistics(tokens)))
    assert torch.equal(repair.weight, weight[:, mask])
    error = (tokens @ weight.t() - tokens[:, mask] @ repair.weight.t() - repair.bias).mean(0)
    torch.testing.assert_close(error, torch.zeros(5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("groups", [0, 1])
def test_the_update_computes_no_producer_twice_and_gives_the_same_weights(groups, tiny_model, ids, monkeypatch):
    gate, calls = tiny_model.model.layers[0].mlp.gate_proj, []
    own = gate.forward
    gate.forward = lambda tokens: calls.append(tokens.shape) or own(tokens)
    options = {"ratio": 0.3, "multiple": 8, "groups": groups}
    results = []
    for settings in ({}, {"_finished": lambda *_: []}):
        calls.clear()
        for name, value in settings.items():
            monkeypatch.setattr(compensation, name, value)
        model = shrink_model(tiny_model, [{"input_ids": ids}] * 8, **options).model
        results.append((len(calls), {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    (cached, weights), (plain, expected) = results
    assert cached <= plain - 5  # Seven batches of eight, and at most two calls to try the cache.
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
