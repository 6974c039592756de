"""A packed model becomes the dense one again."""

import copy

import pytest
import torch
from torch import nn

from ace_triton import pack_model, prune_model, unpack_model
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_it_is_the_model_that_was_packed(make_decoder, ids, family, tmp_path):
    """Bit for bit, with the same modules, so that transformers saves it as before."""
    dense = make_decoder(family)
    prune_model(dense, ids, "magnitude", "2:4")
    packed = copy.deepcopy(dense)
    layers = pack_model(packed).layers
    assert unpack_model(packed) == len(layers) > 3
    expected, found = dense.state_dict(), packed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kinds = {name: type(module) for name, module in dense.named_modules()}
    assert {name: type(module) for name, module in packed.named_modules()} == kinds
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dense(ids).logits)


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(8, 4, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(select_nm(layer.weight, ScoreTerms(), 2, 4))
    model = nn.Sequential(layer, nn.Identity(), layer)
    weight = layer.weight.detach().clone()
    pack_model(model)
    assert unpack_model(model) == 1
    assert model[0] is model[2]
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].bias, layer.bias)


def test_a_dense_model_is_not_changed():
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.float32, device="cpu"))
    layer = model[0]
    assert unpack_model(model) == 0
    assert model[0] is layer
