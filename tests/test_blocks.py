"""Blocks and layers are found by structure alone."""

import pytest
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ace_triton.blocks import (
    Block,
    find_blocks,
    gated_consumers,
    in_attention,
    linears_of,
    routers,
    stacks_of,
)

FIRST_BLOCK = {
    "llama": "model.layers.0",
    "gpt2": "transformer.h.0",
    "opt": "model.decoder.layers.0",
    "gpt_neox": "gpt_neox.layers.0",
    "falcon": "transformer.h.0",
}
LINEARS = {"phi3": 4, "gpt2": 4, "opt": 6, "gpt_neox": 4, "falcon": 4, "qwen3_moe": 4}


def test_blocks_of_every_family(make_decoder, family):
    blocks = find_blocks(make_decoder(family))
    assert blocks[0].name == FIRST_BLOCK.get(family, "model.layers.0")
    assert [block.name.rpartition(".")[2] for block in blocks] == ["0", "1", "2"]
    if family != "gemma4_text":
        assert {len(list(linears_of(b.module, b.name))) for b in blocks} == {LINEARS.get(family, 7)}


def test_names_are_those_of_the_model(make_decoder, family):
    model = make_decoder(family)
    for block in find_blocks(model):
        assert model.get_submodule(block.name) is block.module
        for name, layer in linears_of(block.module, block.name):
            assert model.get_submodule(name) is layer


def model_with(**children: nn.Module) -> PreTrainedModel:
    model = PreTrainedModel(PretrainedConfig())
    for name, child in children.items():
        model.add_module(name, child)
    return model


def mixture(n_experts: int) -> nn.Module:
    """A block with a mixture of experts as separate modules, all router-like traps included."""

    def expert(width: int = 24) -> nn.ModuleDict:
        return nn.ModuleDict({"gate_proj": nn.Linear(16, width), "down_proj": nn.Linear(width, 16)})

    mlp = nn.ModuleDict(
        {
            "gate": nn.Linear(16, n_experts),
            "experts": nn.ModuleList([expert() for _ in range(n_experts)]),
            "shared_expert": expert(width=n_experts),
            "shared_expert_gate": nn.Linear(16, 1),
        }
    )
    return nn.ModuleDict({"k_proj": nn.Linear(16, n_experts), "mlp": mlp})


def test_lists_of_experts_are_no_blocks():
    model = model_with(layers=nn.ModuleList([mixture(8) for _ in range(2)]))
    assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1"]


def test_the_longest_list_holds_the_blocks():
    extra = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
    norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(9)])
    assert find_blocks(model_with(extra=extra, layers=layers, norms=norms))[0].name == "layers.0"


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.ModuleList of blocks"):
        find_blocks(model_with(layer=nn.Linear(4, 4)))


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config))


def test_routers_are_told_from_layers_of_the_same_shape():
    assert routers(Block("b", mixture(8))) == {"b.mlp.gate", "b.mlp.shared_expert_gate"}


def test_a_dense_block_has_no_routers(make_decoder):
    assert not any(routers(block) for block in find_blocks(make_decoder("llama")))


def test_stacked_weights_are_experts_and_not_convolutions(make_decoder):
    block = find_blocks(make_decoder("qwen3_moe"))[0]
    found = {stack.name for stack in stacks_of(block.module, block.name)}
    assert found == {f"{block.name}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    assert stacks_of(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))) == []


def test_attention_is_what_takes_a_mask(make_decoder, family):
    for block in find_blocks(make_decoder(family)):
        for name, _ in linears_of(block.module, block.name):
            attends = any(part in name for part in ("attn", "attention"))
            assert in_attention(block, name) == attends, name


@pytest.mark.parametrize(("hidden", "inner"), [(8, 12), (8, 8), (8, 4)])
def test_gate_and_up_are_found_by_shape_and_shared_input(hidden, inner):
    layers = {
        "mlp.gate": nn.Linear(hidden, inner),
        "mlp.up": nn.Linear(hidden, inner),
        "mlp.down": nn.Linear(inner, hidden),
    }
    groups = [["mlp.gate", "mlp.up"], ["mlp.down"]]
    assert gated_consumers(layers, groups) == {"mlp.gate": "mlp.down", "mlp.up": "mlp.down"}


def test_fused_gate_and_up():
    layers = {"mlp.gate_up": nn.Linear(8, 24), "mlp.down": nn.Linear(12, 8)}
    assert gated_consumers(layers, [["mlp.gate_up"], ["mlp.down"]]) == {"mlp.gate_up": "mlp.down"}


def test_plain_feed_forward_has_no_gate():
    layers = {"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)}
    assert gated_consumers(layers, [["fc1"], ["fc2"]]) == {}


def test_experts_that_share_an_input_have_their_own_consumers():
    expert = {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    layers = {f"experts.{e}.{name}": layer for e in range(2) for name, layer in expert.items()}
    shared = [f"experts.{e}.{name}" for e in range(2) for name in ("gate", "up")]
    found = gated_consumers(layers, [shared])
    assert found == {name: f"{name.rpartition('.')[0]}.down" for name in shared}
