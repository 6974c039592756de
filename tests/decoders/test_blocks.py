"""Blocks and layers are found by structure only."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ace_triton.decoders.blocks import Block, find_blocks, find_towers, linears_of, stacks_of
from ace_triton.decoders.layer_roles import adapters, gated_consumers, in_attention, routers

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


class Unknown(PreTrainedModel):
    """A class of its own: transformers keeps facts about a class, which its subclasses inherit."""


def model_with(**children: nn.Module) -> PreTrainedModel:
    model = Unknown(PretrainedConfig())
    for name, child in children.items():
        model.add_module(name, child)
    return model


def mixture(n_experts: int) -> nn.Module:
    """A block with experts as separate modules, and layers that resemble routers by their number of outputs."""

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


def test_lists_of_experts_are_not_blocks():
    model = model_with(layers=nn.ModuleList([mixture(8) for _ in range(2)]))
    assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1"]


def test_without_a_forward_every_list_of_blocks_is_a_tower():
    extra = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
    layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])
    norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(9)])
    towers = find_towers(model_with(extra=extra, layers=layers, norms=norms))
    assert {tower.name: [block.name for block in tower.blocks] for tower in towers} == {
        "extra": ["extra.0", "extra.1"],
        "layers": ["layers.0"],
    }


def test_a_list_of_bare_linear_layers_holds_no_blocks():
    """Examples: projections between streams in Gemma 3n, and heads of models with many codebooks."""
    heads = nn.ModuleList([nn.Linear(64, 64) for _ in range(5)])
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
    assert {block.name.partition(".")[0] for block in find_blocks(model_with(heads=heads, layers=layers))} == {"layers"}


class Alternating(PreTrainedModel):
    """Attention and feed-forward modules in separate lists, as in XLM, and a large list that never runs."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.embed = nn.Embedding(20, 8)
        self.spare = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(4)])
        self.feed_forwards = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout()) for _ in range(2)])
        self.attentions = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout()) for _ in range(2)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            hidden = feed_forward(attention(hidden))
        return hidden


def test_members_of_several_lists_are_blocks_in_the_order_in_which_they_run():
    model, state = Alternating().train(), torch.get_rng_state()
    assert [block.name for block in find_blocks(model)] == [
        "attentions.0", "feed_forwards.0", "attentions.1", "feed_forwards.1",
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_lists_that_run_one_after_the_other_are_towers():
    class InTurn(Alternating):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden = self.embed(input_ids)
            for block in [*self.attentions, self.feed_forwards[0]]:
                hidden = block(hidden)
            return hidden

    towers = find_towers(InTurn())
    assert [(tower.name, len(tower.blocks), tower.is_reached) for tower in towers] == [
        ("attentions", 2, True),
        ("feed_forwards", 1, True),
        ("spare", 4, False),
        ("feed_forwards", 1, False),
    ]


def test_a_full_memory_does_not_change_the_blocks():
    model = Alternating()
    model.feed_forwards[1].register_forward_hook(lambda *_: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        find_blocks(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"has no blocks"):
        find_blocks(model_with(layer=nn.Linear(4, 4)))


def test_routers_are_distinguished_from_layers_of_the_same_shape():
    assert routers(Block("b", mixture(8))) == {"b.mlp.gate", "b.mlp.shared_expert_gate"}


def test_a_dense_block_has_no_routers(make_decoder):
    assert not any(routers(block) for block in find_blocks(make_decoder("llama")))


def test_a_router_need_not_be_a_linear_layer(make_decoder):
    for block in find_blocks(make_decoder("qwen3_moe")):
        assert not isinstance(block.module.mlp.gate, nn.Linear)
        assert routers(block) == {f"{block.name}.mlp.gate"}


class TopRouter(nn.Module):
    """Has ten outputs: one per expert for eight experts, and two for shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 16))


def test_a_router_is_recognized_by_its_class():
    block = mixture(8)
    block["mlp"]["gate"] = TopRouter()
    assert routers(Block("b", block)) == {"b.mlp.gate", "b.mlp.shared_expert_gate"}


class Adapted(nn.Module):
    """A layer with LoRA's A and B beside it, in the structure that peft uses."""

    def __init__(self, base: nn.Linear, names: tuple[str, str], rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.dropout = nn.ModuleDict({"default": nn.Identity()})
        down = nn.Linear(base.in_features, rank, bias=False)
        up = nn.Linear(rank, base.out_features, bias=False)
        self.add_module(names[0], nn.ModuleDict({"default": down}))
        self.add_module(names[1], nn.ModuleDict({"default": up}))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("narrow", "wide")])
def test_adapters_are_found_by_structure(names):
    block = nn.ModuleDict({"q_proj": Adapted(nn.Linear(16, 24), names), "o_proj": nn.Linear(24, 16)})
    assert adapters(block, "b") == {f"b.q_proj.{name}.default" for name in names}
    wide = nn.ModuleDict({"q_proj": Adapted(nn.Linear(16, 24), names, rank=16)})
    assert bool(adapters(wide, "b")) == (names[0] == "lora_A"), "a rank equal to the number of inputs is not low"


def test_adapters_below_their_layer_are_found():
    layer = nn.Linear(16, 24)
    layer.narrow, layer.wide = nn.Linear(16, 2, bias=False), nn.Linear(2, 24, bias=False)
    assert adapters(nn.ModuleDict({"up": layer}), "b") == {"b.up.narrow", "b.up.wide"}


def test_models_without_adapters_have_none(make_decoder, family):
    assert not any(adapters(block.module, block.name) for block in find_blocks(make_decoder(family)))
    assert not adapters(mixture(8), "b")
    latent = nn.ModuleDict({"q_a": nn.Linear(16, 4), "q_b": nn.Linear(4, 16), "o": nn.Linear(16, 16)})
    assert not adapters(latent, "b")


def test_stacked_weights_are_experts_but_convolutions_are_not(make_decoder):
    block = find_blocks(make_decoder("qwen3_moe"))[0]
    found = {stack.name for stack in stacks_of(block.module, block.name)}
    assert found == {f"{block.name}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    assert stacks_of(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))) == []


def test_attention_is_recognized_by_its_mask(make_decoder, family):
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
