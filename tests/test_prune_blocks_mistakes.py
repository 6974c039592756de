"""What prune_model refuses, before it changes a weight."""

import pytest
import torch
from torch import nn

from ace_triton import PruneError
from ace_triton.prune_blocks import prune_model
from tests.naive_pruning import Sequences, same_masks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": torch.full((2, 8), 101)}, r"vocabulary runs from 0 to 100: tokenize"),
        ({"calibration": torch.full((2, 8), -1)}, r"run from -1"),
        ({"calibration": torch.zeros(0, 8, dtype=torch.int64)}, "empty"),
        ({"calibration": torch.zeros(2, 8)}, r"int64 .* got torch.float32 \(2, 8\)"),
        ({"calibration": torch.zeros(8, dtype=torch.int64)}, r"got torch.int64 \(8,\)"),
        ({"calibration": None}, "got 'NoneType'"),
        ({"calibration": ["text"]}, "calibration.0. is a str; calibration must be token ids"),
        ({"calibration": torch.ones(1, 65, dtype=torch.int64)}, "65 tokens, but the model takes at most 64"),
        ({"calibration": Sequences(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4))}, "mask must be bool"),
        (
            {"calibration": Sequences(torch.ones(2, 4, dtype=torch.int64), torch.eye(2, 4) > 1)},
            "sequence 0 is all padding",
        ),
        ({"batch_size": 0}, "batch_size must be a positive int, got 0"),
        ({"method": "wander"}, "unknown method 'wander'"),
        ({"sparsity": "4:2"}, "'4:2'"),
        ({"base": "wander"}, "base must be one of 'none', 'relative', 'wanda', 'ria'; got 'wander'"),
        ({"nonsense": 1}, "no option 'nonsense'"),
        ({"include": "*.q_porj"}, r"include pattern '\*.q_porj' matches no linear layer; .* 'model.layers.0"),
        ({"exclude": ["*q_proj", "x"]}, "exclude pattern 'x'"),
        (
            {"exclude": "*"},
            "no layer of LlamaForCausalLM can be pruned with these settings: include and exclude leave none",
        ),
        ({"include": "*.down_proj", "sparsity": "2:32"}, "its 48 inputs are not a multiple of 32"),
    ],
)
def test_mistakes_are_named_before_anything_changes(make_decoder, ids, arguments, message):
    model = make_decoder("llama", max_position_embeddings=64)
    arguments = {"calibration": ids, **arguments}
    with pytest.raises(ValueError, match=message):
        prune_model(model, **arguments)
    assert same_masks(model, make_decoder("llama"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_before_anything_changes(make_decoder, ids, bad):
    model = make_decoder("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(PruneError, match=r"model\.layers\.2\.mlp\.up_proj: the weight holds NaN or infinity"):
        prune_model(model, ids)
    assert same_masks(model, make_decoder("llama"))


def test_a_lone_layer_is_refused(ids):
    with pytest.raises(ValueError, match="got a Linear; prune_linear prunes a single layer"):
        prune_model(nn.Linear(4, 4), ids)


def test_weights_on_the_meta_device_are_refused(make_decoder, ids):
    model = make_decoder("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"layers\.1.*meta device .*prune_checkpoint.*without device_map"):
        prune_model(model, ids)


def test_quantised_weights_are_refused(make_decoder, ids):
    model = make_decoder("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PruneError, match=r"up_proj: the weight is stored as torch.int8"):
        prune_model(model, ids)
