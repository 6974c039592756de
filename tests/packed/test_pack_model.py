import copy

import pytest
import torch
from torch import nn

import ace_triton
from ace_triton import NMLinear, RowLimits, prune_linear, prune_model, set_row_limits
from ace_triton.packed.pack_model import pack_model


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, NMLinear)}


def test_every_family_answers_and_generates_as_before(family, make_decoder, ids):
    model = make_decoder(family)
    pruned = {layer.name for layer in prune_model(model, ids, "magnitude", "2:4").layers}
    dense = copy.deepcopy(model)
    report = pack_model(model)
    assert {layer.name for layer in report.layers} == pruned
    assert len(packed_names(model)) == len(pruned)
    assert all(layer.pattern == "2:4" for layer in report.layers)
    assert {s.name for s in report.skipped}.isdisjoint(pruned)
    assert report.packed_bytes < 0.54 * report.dense_bytes
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    words = [m.generate(ids[:2, :4], max_new_tokens=4, do_sample=False) for m in (model, dense)]
    assert torch.equal(*words)


def layers(**modules: nn.Module) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(modules)


def pruned(rows: int, cols: int, sparsity="2:4", **options) -> nn.Linear:
    layer = nn.Linear(cols, rows, **options)
    prune_linear(layer, method="magnitude", sparsity=sparsity)
    return layer


def test_each_layer_s_pattern_is_found_and_the_rest_is_left_with_a_reason():
    from ace_triton import Sparsity

    model = layers(
        two=pruned(8, 32),
        three=pruned(8, 32, "3:8"),
        dense=nn.Linear(32, 8),
        fraction=pruned(8, 320, 0.5),
        few_zeros=pruned(8, 320, 0.3),
        along_out=pruned(8, 32, Sparsity("2:4", axis="out")),
        large=pruned(8, 32, "31:32", dtype=torch.bfloat16),
        hooked=pruned(8, 32),
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    report = pack_model(model)
    assert [(layer.name, layer.pattern) for layer in report.layers] == [
        *(("two", "2:4"), ("three", "3:8"), ("fraction", "unstructured"), ("along_out", "unstructured"))
    ]
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert set(reasons) == {"dense", "few_zeros", "large", "hooked"}
    assert "not pruned" in reasons["dense"]
    assert reasons["few_zeros"].startswith("it is unstructured, and 30% of it are zeros")
    assert "no smaller" in reasons["large"]
    assert "hooks" in reasons["hooked"]
    assert sum(s.parameters for s in report.skipped) == 3 * 8 * 32 + 8 * 320


def test_a_layer_that_breaks_the_pattern_is_left_with_row_and_group():
    model = layers(good=pruned(8, 16), bad=pruned(8, 16))
    with torch.no_grad():
        model["bad"].weight[3, 4:8] = 1
    report = pack_model(model, "2:4")
    assert packed_names(model) == {"good"}
    assert [(s.name, s.reason[: len("row 3, group 1")]) for s in report.skipped] == [("bad", "row 3, group 1")]


def test_shared_layers_stay_shared_and_tied_weights_stay_dense():
    shared = pruned(8, 16)
    model = layers(one=shared, two=shared, head=pruned(8, 16), embedding=nn.Embedding(8, 16))
    model["embedding"].weight = model["head"].weight
    report = pack_model(model)
    assert model["one"] is model["two"]
    assert isinstance(model["one"], NMLinear)
    assert [(s.name, s.reason) for s in report.skipped] == [("head", "its weight is tied to another layer's")]


class Doubled(nn.Linear):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


class Spelled(nn.Linear):
    def forward(self, tokens):
        return tokens @ self.weight.t() + self.bias


def test_a_layer_with_a_forward_of_its_own_is_packed_only_where_it_multiplies():
    model = layers(spelled=Spelled(16, 8), doubled=Doubled(16, 8))
    for layer in model.values():
        prune_linear(layer, method="magnitude")
    report = pack_model(model)
    assert packed_names(model) == {"spelled"}
    assert "does not compute x W^T + b" in report.skipped[0].reason


def test_include_exclude_and_limits():
    model = layers(a=pruned(8, 16), b=pruned(8, 16), c=pruned(8, 16))
    pack_model(model, include=["a", "b"], exclude="b", limits=RowLimits(3))
    assert packed_names(model) == {"a"}
    assert model["a"].limits == RowLimits(3)
    set_row_limits(model, None)
    assert model["a"].limits is None


def test_nothing_to_pack_is_an_error_and_changes_nothing():
    model = layers(a=nn.Linear(16, 8))
    with pytest.raises(ValueError, match="not pruned; prune it first"):
        pack_model(model)
    with pytest.raises(ValueError, match="packing takes 'n:m'"):
        pack_model(model, "50%")
    with pytest.raises(ValueError, match="has no linear layer"):
        pack_model(nn.ReLU())
    assert type(model["a"]) is nn.Linear


def test_dense_weights_are_freed_one_after_the_other():
    import weakref

    model = layers(a=pruned(8, 16), b=pruned(8, 16))
    weights = [weakref.ref(layer.weight) for layer in model.values()]
    pack_model(model)
    assert [weight() for weight in weights] == [None, None]


def test_sparsify_is_another_name_for_pack_model():
    assert ace_triton.sparsify is ace_triton.pack_model is pack_model


def test_a_stack_of_a_single_matrix_is_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.Module())
    prune_linear(model[0], method="magnitude")
    model[1].shared = nn.Parameter(model[0].weight.detach()[None].clone())
    model[1].dense = nn.Parameter(torch.ones(1, 16, 16))
    report = pack_model(model)
    reason = "it is neither a linear layer nor a three-dimensional stack of two or more experts"
    assert [(skipped.name, skipped.reason, skipped.parameters) for skipped in report.skipped] == [
        ("1.shared", reason, 256)
    ]
