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
    assert report.seconds.block_fit > report.seconds.calibration > 0
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


def made_inside(make_decoder):
    with torch.inference_mode():
        return make_decoder("gpt2")


def in_float64(make_decoder):
    return make_decoder("gpt2").double()


@pytest.mark.parametrize("make", [made_inside, in_float64])
def test_any_model_is_trained_as_one_in_float32(make_decoder, many, make):
    model, expected = make(make_decoder), make_decoder("gpt2")
    own = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fits = prune_model(model, many, FITTED).fits
    wanted = prune_model(expected, many, FITTED).fits
    assert [fit.after for fit in fits] == pytest.approx([fit.after for fit in wanted], rel=1e-3)
    for parameter, (before, flag), want in zip(model.parameters(), own, expected.parameters(), strict=True):
        assert parameter is before
        assert parameter.requires_grad == flag
        torch.testing.assert_close(parameter.detach().float(), want.detach(), rtol=1e-3, atol=1e-3)


def test_inputs_made_in_inference_mode_are_trained_on(make_decoder, many):
    """The first linear layers of this model's blocks read the inputs themselves."""

    def fitted(batches: list[dict[str, torch.Tensor]]) -> float:
        model = make_decoder("opt", do_layer_norm_before=False)
        model.model.decoder.embed_positions.weight.data.zero_()
        return prune_model(model, batches, FITTED).fits[0].after

    wanted = fitted(batches := [{"inputs_embeds": torch.randn(4, 8, 32)} for _ in range(2)])
    with torch.inference_mode():
        assert fitted([{name: t.clone() for name, t in batch.items()} for batch in batches]) == wanted


def test_each_parameter_keeps_its_dtype(make_decoder, many):
    model = make_decoder("gpt2").bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    dtypes = [parameter.dtype for parameter in model.parameters()]
    assert set(dtypes) == {torch.bfloat16, torch.float32}
    fits = prune_model(model, many, FITTED).fits
    assert all(fit.steps == 6 and fit.after < fit.before for fit in fits)
    assert [parameter.dtype for parameter in model.parameters()] == dtypes


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
    with pytest.raises(RecipeError, match=r"do not stay at 4 bits: leave quantize \(--bits\) out and pack .* --bits 4"):
        Recipe("wanda", update=FITTED.update, quantize=4)
    monkeypatch.setattr(Processes, "now", classmethod(lambda cls: Processes(0, 2)))
    with pytest.raises(ArgumentError, match="block_epochs trains in one process"):
        prune_model(make_decoder("llama"), many, FITTED)
