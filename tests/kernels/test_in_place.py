"""Pruning is an in-place operation: autograd sees it, and torch's inference mode allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ace_triton import Sparsity, prune_linear, prune_model
from ace_triton.kernels.backend import interpreting

WAYS = {
    "groups": {"method": "wanda"},
    "rows": {"method": "wanda", "sparsity": 0.5},
    "a mask": {"method": "ace", "return_mask": True},
    "columns": {"method": "magnitude", "sparsity": Sparsity(0.5, axis="out")},
    "a layer": {"method": "magnitude", "sparsity": Sparsity(0.5, scope="layer")},
    "a solver": {"method": "sparsegpt"},
    "an update": {"method": "ria", "update": "lstsq"},
}


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA = {**SMALL, "num_hidden_layers": 1 if interpreting() else 2}
MODELS = {
    "llama, ace": ("llama", LLAMA, {"method": "ace"}),
    "llama, permute": ("llama", {**SMALL, "num_hidden_layers": 1}, {"method": "magnitude", "permute": True}),
    "llama, rescale": ("llama", LLAMA, {"method": "ria", "update": "rescale", "sequential": "none"}),
    "gpt2, ace": ("gpt2", {"n_embd": 8, "n_head": 2, "n_layer": 2}, {"method": "ace"}),
    "qwen3_moe, cosp": (
        "qwen3_moe",
        {**LLAMA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
        {"method": "cosp"},
    ),
}
"""Family, sizes and options. The models are small, since Triton's interpreter prunes one of them too."""


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"Linear": nn.Linear(8, 4), "Conv1D": Conv1D(4, 8)}


def tokens_of(layer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 8, generator=generator).to(layer.weight.dtype)


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("way", WAYS)
def test_backward_through_a_layer_pruned_since_raises(way, kind):
    layer = layers()[kind]
    inputs = tokens_of(layer).requires_grad_()
    outputs = layer(inputs)
    prune_linear(layer, tokens_of(layer), **WAYS[way])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_backward_through_a_model_pruned_since_raises(make_decoder, ids):
    model = make_decoder("llama", **LLAMA)
    loss = model(input_ids=ids, labels=ids).loss
    prune_model(model, ids, "wanda")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_and_inference_mode(way, kind):
    expected, layer = layers()[kind], layers()[kind]
    prune_linear(expected, tokens_of(expected), **WAYS[way])
    with torch.inference_mode():
        made_inside, left = layers()[kind], layers()[kind]
        for one in (layer, made_inside):
            prune_linear(one, tokens_of(one), **WAYS[way])
    prune_linear(left, tokens_of(left), **WAYS[way])
    for one in (layer, made_inside, left):
        assert torch.equal(one.weight, expected.weight)


@pytest.mark.parametrize("case", list(MODELS)[:1] if interpreting() else MODELS)
def test_a_model_in_inference_mode(make_decoder, ids, case):
    family, sizes, options = MODELS[case]
    ids = ids[:3]
    expected, model = make_decoder(family, **sizes), make_decoder(family, **sizes)
    before = [weight.clone() for weight in expected.parameters()]
    prune_model(expected, ids, **options)
    assert not all(map(torch.equal, before, expected.parameters()))
    with torch.inference_mode():
        made_inside = make_decoder(family, **sizes)
        for one in (model, made_inside):
            prune_model(one, ids.clone(), **options)
    for one in (model, made_inside):
        for (name, weight), other in zip(one.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(weight, other), name
