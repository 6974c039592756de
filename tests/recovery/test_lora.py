"""Adapters are merged into a pruned model with its mask."""

import copy

import pytest
import torch
from torch import nn

import ace_triton
from ace_triton import ArgumentError, NMLinear, PackedLinear, merge_lora

RANK = 4


class LowRank(nn.Module):
    """A LoRA layer with the interface of peft's."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        rows, cols = base_layer.weight.shape
        generator = torch.Generator().manual_seed(rows + cols)
        self.a = nn.ParameterDict({"default": torch.randn(RANK, cols, generator=generator)})
        self.b = nn.ParameterDict({"default": torch.randn(rows, RANK, generator=generator)})
        self.active_adapters = ["default"]
        self.disable_adapters = self.merged = False

    def get_base_layer(self):
        return self.base_layer

    @property
    def update(self):
        return (self.b["default"] @ self.a["default"]).detach()

    def merge(self):
        self.base_layer.weight.data += self.update
        self.merged = True

    def forward(self, tokens):
        return self.base_layer(tokens) + tokens @ self.update.T


@pytest.fixture
def pruned(make_decoder):
    model = make_decoder("llama", attention="sdpa")
    ace_triton.prune_model(model, None, "magnitude", "2:4")
    return model


def wrapped(model, leaf="up_proj"):
    """The model with an adapter at each layer of this name, and the adapters by the names of their layers."""
    adapters = {}
    for name, module in list(model.named_modules()):
        if name.endswith(leaf):
            parent, _, _ = name.rpartition(".")
            adapters[name] = LowRank(module)
            setattr(model.get_submodule(parent), leaf, adapters[name])
    return adapters


@pytest.mark.parametrize("pack", [False, True])
def test_the_merge_is_the_masked_sum(pruned, pack):
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    if pack:
        ace_triton.pack_model(pruned)
    adapters = wrapped(pruned)
    result = merge_lora(pruned)
    assert result.model is pruned
    assert [layer.name for layer in result.layers] == list(adapters)
    whole = lost = 0.0
    for layer in result.layers:
        old, update = before[f"{layer.name}.weight"], adapters[layer.name].update
        base = pruned.get_submodule(layer.name)
        assert type(base) is (NMLinear if pack else nn.Linear)
        merged = base.unpack() if pack else base.weight
        mask = old != 0
        assert torch.equal(merged.detach(), torch.where(mask, old + update, 0.0))
        assert layer.dropped == pytest.approx(float(update[~mask].square().sum() / update.square().sum()), rel=1e-4)
        whole, lost = whole + float(update.square().sum()), lost + float(update[~mask].square().sum())
    assert result.dropped == pytest.approx(lost / whole, rel=1e-4)
    assert str(result) == f"merged 3 layers; the mask dropped {lost / whole:.1%} of the update"
    if not pack:
        ace_triton.pack_model(pruned)


def test_a_dense_layer_beside_pruned_ones_gets_the_whole_update(pruned):
    head = pruned.lm_head.weight.detach().clone()
    adapters = {**wrapped(pruned), **wrapped(pruned, "lm_head")}
    result = merge_lora(pruned)
    assert {layer.name: layer.dropped for layer in result.layers}["lm_head"] == 0
    assert torch.equal(pruned.lm_head.weight, head + adapters["lm_head"].update)


def test_what_cannot_be_merged(pruned, make_decoder):
    with pytest.raises(ArgumentError, match="has no adapter that can be merged"):
        merge_lora(pruned)
    dense = make_decoder("llama")
    wrapped(dense)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ArgumentError, match=r"merge with merge_and_unload\(\)"):
        merge_lora(dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    adapters = wrapped(pruned)
    before = copy.deepcopy(pruned.state_dict())
    first, *_, last = adapters.values()
    first.disable_adapters = True
    with pytest.raises(ArgumentError, match=r"up_proj: its adapter is disabled: call enable_adapter_layers"):
        merge_lora(pruned)
    first.disable_adapters = False
    with torch.no_grad():
        last.a["default"][0, 0] = float("nan")
    with pytest.raises(ArgumentError, match=r"up_proj\.a\.default: holds NaN or infinity"):
        merge_lora(pruned)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, before[name]) or name.endswith("a.default")
    with torch.no_grad():
        last.a["default"][0, 0] = 0
    first.merge()
    with pytest.raises(ArgumentError, match=r"up_proj: its adapter is merged already, so the zeros are lost"):
        merge_lora(pruned)


def adapted(model, **options):
    """The model of peft with random adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, target_modules=["up_proj", "q_proj"], init_lora_weights=False, **options)
    config._register_custom_module({PackedLinear: peft.tuners.lora.Linear})
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_adapters_of_peft(pruned, pack, options, ids):
    whole = adapted(copy.deepcopy(pruned), **options).merge_and_unload().state_dict()
    masks = {name: p.detach() != 0 for name, p in pruned.named_parameters()}
    if pack:
        ace_triton.pack_model(pruned)
    result = merge_lora(adapted(pruned, **options))
    assert result.model is pruned
    assert len(result.layers) == 6
    assert 0.2 < result.dropped < 0.8
    for layer in result.layers:
        base, name = pruned.get_submodule(layer.name), f"{layer.name}.weight"
        merged = base.unpack() if pack else base.weight.detach()
        assert torch.equal(merged, torch.where(masks[name], whole[name], 0.0))
    pruned(ids)


def test_adapters_that_transformers_added(pruned, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.22")
    pruned.add_adapter(peft.LoraConfig(r=RANK, target_modules=["up_proj"], init_lora_weights=False))
    masks = {name: p.detach() != 0 for name, p in pruned.named_parameters()}
    result = merge_lora(pruned)
    result.model.save_pretrained(tmp_path)
    saved = type(pruned).from_pretrained(tmp_path)
    for layer in result.layers:
        weight = saved.get_submodule(layer.name).weight
        assert torch.equal(weight != 0, masks[f"{layer.name}.base_layer.weight"])
