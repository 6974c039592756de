"""Blocks are trained toward their dense outputs after their layers are pruned."""

import copy

import pytest
import torch

from ace_triton import ArgumentError, Recipe, RecipeError, prune_linear, prune_model
from ace_triton.block_fit import trained_parameters
from ace_triton.processes import Processes

FITTED = Recipe("wanda", update={"kind": "lstsq", "block_epochs": 3, "block_rate": 1e-2})


@pytest.fixture
def many():
    """Forty sequences of sixteen tokens: three batches."""
    return torch.randint(3, 101, (40, 16), generator=torch.Generator().manual_seed(1))


def test_the_blocks_come_nearer_to_the_dense_ones_and_keep_their_zeros(make_decoder, many):
    model = make_decoder("llama")
    dense = copy.deepcopy(model)
    report = prune_model(model, many, FITTED)
    assert [fit.steps for fit in report.fits] == [6] * len(model.model.layers)
    assert all(fit.after < fit.before for fit in report.fits)
    for name, parameter in model.named_parameters():
        before = dense.get_parameter(name)
        assert parameter.requires_grad == before.requires_grad
        assert parameter.grad is None
        if ".layers." in name and parameter.dim() == 2:
            assert (parameter == 0).sum() == parameter.numel() // 2
        elif ".layers." in name:
            assert not torch.equal(parameter, before)
        else:
            assert torch.equal(parameter, before)


def test_the_error_is_that_of_the_formula(make_decoder, many):
    """The reported error of the first block, from forwards of the pruned and the dense block alone."""
    model = make_decoder("llama")
    dense = copy.deepcopy(model)
    fit = prune_model(model, many, FITTED).fits[0]
    held = many[32:]  # The last of the batches of 16 sequences.
    with torch.no_grad():
        read = dense.model.embed_tokens(held)
        want = dense(held, output_hidden_states=True).hidden_states[1]
        got = model(held, output_hidden_states=True).hidden_states[1]
    error = ((got - want).square().sum(-1) / (want - read).square().sum(-1)).mean()
    assert fit.after == pytest.approx(float(error), rel=1e-3)


def test_a_fit_that_makes_it_worse_is_dropped(make_decoder, many):
    fitted = prune_model(model := make_decoder("llama"), many, Recipe("wanda", update="lstsq"), batch_size=16)
    harmful = {"kind": "lstsq", "block_epochs": 1, "block_rate": 1e3}
    worse = prune_model(other := make_decoder("llama"), many, Recipe("wanda", update=harmful))
    assert fitted.fits == ()
    assert all(fit.before == fit.after for fit in worse.fits)
    for got, want in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_shared_parameters_stay(make_decoder):
    block = make_decoder("llama").model.layers[0]
    with torch.no_grad():
        block.mlp.up_proj.weight[:, ::2] = 0
    norm = block.input_layernorm.weight
    found = trained_parameters(block, {id(norm)})
    assert sorted(found) == ["mlp.up_proj.weight", "post_attention_layernorm.weight"]
    with torch.no_grad():
        block.mlp.up_proj.weight.fill_(1)
    assert trained_parameters(block) == {}


def test_where_there_is_no_block_to_train(make_decoder, many, monkeypatch):
    with pytest.raises(RecipeError, match=r"the recipe's update's block_epochs need a whole model"):
        prune_linear(torch.nn.Linear(8, 8), torch.randn(4, 8), FITTED)
    with pytest.raises(RecipeError, match='sequential="none" never computes'):
        Recipe("wanda", update=FITTED.update, sequential="none")
    monkeypatch.setattr(Processes, "now", classmethod(lambda cls: Processes(0, 2)))
    with pytest.raises(ArgumentError, match="block_epochs trains in one process"):
        prune_model(make_decoder("llama"), many, FITTED)
