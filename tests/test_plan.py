"""What is not pruned is named with its reason, and the account adds up."""

import pytest
import torch
from torch import nn

from ace_triton import prune_model


def test_layers_whose_weights_overlap_in_memory_are_named(make_decoder, ids):
    model = make_decoder("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.q_proj.weight.data[:16])
    report = prune_model(model, ids)
    assert {(s.name.rpartition(".")[2], s.reason) for s in report.skipped} == {
        ("q_proj", "its weight is tied to model.layers.1.self_attn.k_proj"),
        ("k_proj", "its weight is tied to model.layers.1.self_attn.q_proj"),
    }


def test_a_stack_of_experts_that_is_shared_is_named(make_decoder, ids):
    model = make_decoder("qwen3_moe")
    first, second, _ = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    report = prune_model(model, ids)
    tied = {s.name: s for s in report.skipped if "tied" in s.reason}
    assert set(tied) == {f"model.layers.{block}.mlp.experts.{i}.down_proj" for block in (0, 1) for i in range(4)}
    assert (
        tied["model.layers.0.mlp.experts.2.down_proj"].reason
        == "its weight is tied to model.layers.1.mlp.experts.down_proj"
    )
    assert report.account.skipped == first.down_proj.numel() + 3 * 4 * 32, "once, and three routers"


COMPUTED = {
    "parametrized": torch.nn.utils.parametrizations.weight_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "normed": torch.nn.utils.weight_norm,
    "masked": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.1),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED)
@pytest.mark.parametrize("permute", [False, True])
def test_layers_whose_weight_is_computed_are_named_and_not_touched(make_decoder, ids, compute, permute):
    model = make_decoder("llama")
    mlp = model.model.layers[1].mlp
    for layer in (mlp.up_proj, mlp.down_proj):
        COMPUTED[compute](layer)
    dense = {name: tensor.clone() for name, tensor in mlp.state_dict().items() if "gate" not in name}
    report = prune_model(model, ids, "wanda", permute=permute)
    skipped = {s.name: s for s in report.skipped}
    assert skipped.keys() == {f"model.layers.1.mlp.{name}_proj" for name in ("up", "down")}
    assert all("weight is computed by" in s.reason and "make it permanent first" in s.reason for s in skipped.values())
    assert not any(layer.name in skipped for layer in report.layers)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in mlp.state_dict().items() if "gate" not in name)
    account = report.account
    assert account.pruned == sum(layer.parameters for layer in report.layers)
    assert (account.skipped, account.excluded) == (2 * 48 * 32, 0)
    model(ids)
    assert (mlp.gate_proj.weight == 0).float().mean() == 0.5


class Lora(nn.Module):
    """A layer with an adapter, laid out as peft's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, base.out_features, bias=False)})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return self.base_layer(x) + change


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED)
def test_no_order_is_folded_into_a_weight_that_is_computed(make_decoder, ids, compute):
    model, dense = make_decoder("llama"), make_decoder("llama")
    for decoder in (model, dense):
        COMPUTED[compute](decoder.model.layers[1].mlp.up_proj)
    report = prune_model(model, ids, "wanda", permute=True, include="*.down_proj")
    assert "model.layers.1.mlp.down_proj" in {unfolded.name for unfolded in report.permutation.unfolded}
    kept = model.model.layers[1].mlp.down_proj.weight != 0
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight[kept], dense.model.layers[1].mlp.down_proj.weight[kept]
    )


def test_adapters_stay_dense_and_their_base_is_pruned(make_decoder, ids):
    model, plain = make_decoder("llama"), make_decoder("llama")
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Lora(block.self_attn.get_submodule(name)))
    report = prune_model(model, ids, "magnitude")
    prune_model(plain, ids, "magnitude")
    bases = {layer.name.replace(".base_layer", "") for layer in report.layers}
    assert bases == {layer.name for layer in prune_model(plain, ids, "magnitude").layers}
    assert {s.name.partition(".lora_")[2] for s in report.skipped} == {"A.default", "B.default"}
    assert {s.reason for s in report.skipped} == {"an adapter of low rank; merge it into its layer to prune both"}
    assert len(report.skipped) == 3 * 2 * 2
    lora = model.model.layers[2].self_attn.v_proj
    assert torch.equal(lora.base_layer.weight, plain.model.layers[2].self_attn.v_proj.weight)
    assert all(bool(part["default"].weight.all()) for part in (lora.lora_A, lora.lora_B))


def test_the_account_of_what_is_asked_for(make_decoder, ids):
    model = make_decoder("llama")
    report = prune_model(model, ids, "wanda", include=["*.layers.0.mlp.*", "lm_head"], exclude="*.up_proj")
    assert {layer.name for layer in report.layers} == {
        "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "lm_head",
    }  # fmt: skip
    account, layer, head = report.account, 48 * 32, 101 * 32
    attention = 2 * 32 * 32 + 2 * 16 * 32
    assert (account.pruned, account.skipped) == (2 * layer + head, 0)
    assert account.excluded == 3 * attention + 7 * layer == sum(e.parameters for e in report.excluded)
    assert account.outside == 101 * 32, "the embedding"
    assert account.share("pruned") == pytest.approx((2 * layer + head) / account.blocks)
    told = report.to_dict()["account"]
    assert told["pruned_share"] + told["skipped_share"] + told["excluded_share"] == pytest.approx(1)
    assert {e["name"] for e in report.to_dict()["excluded"]} >= {
        "model.layers.0.mlp.up_proj",
        "model.layers.2.mlp.gate_proj",
    }
