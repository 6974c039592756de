"""Folding orders into a model keeps its function and its weights, and layers without a fold are reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton import prune_model
from ace_triton.decoders.batches import Batch
from ace_triton.decoders.blocks import find_blocks
from ace_triton.linears import linear_weight
from ace_triton.reordering.fold import Fold
from ace_triton.reordering.reorder import Folds, find_folds

FOLDED = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "mistral": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma3_text": {"self_attn.o_proj", "mlp.down_proj"},
    "phi3": {"mlp.down_proj"},
    "gpt2": {"mlp.c_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt_neox": {"mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_4h_to_h"},
    "qwen3_moe": {"self_attn.o_proj"},
}


def folds_of(model: nn.Module, ids: torch.Tensor, m: int = 4) -> Folds:
    def always(_name: str) -> bool:
        return True

    batch = Batch.of_ids(ids[:2, :8])
    return find_folds(model, find_blocks(model), batch, m, wanted=always, shared=lambda _name: False)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def within_block(name: str) -> str:
    """``mlp.down_proj`` for ``model.layers.0.mlp.down_proj``."""
    parts = name.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) + 1 :])


def random_order(fold: Fold, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(fold.width, generator=generator) for _ in range(fold.pools)])


@pytest.mark.parametrize("family", FOLDED)
def test_folds_of_each_family(make_decoder, ids, family):
    model, dense = make_decoder(family), make_decoder(family)
    folds = folds_of(model, ids)
    assert {within_block(name) for name in folds.proven} == FOLDED[family]
    assert len(folds.proven) == 3 * len(FOLDED[family])
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} was not restored"


@pytest.mark.parametrize("family", FOLDED)
def test_the_function_is_unchanged(make_decoder, ids, family):
    """With random orders in all folds, and random biases, only the order of additions differs."""
    model = make_decoder(family)
    model = model if family == "qwen3_moe" else model.double()  # torch's grouped product takes no fp64
    rounding = 10 * torch.finfo(model.dtype).eps
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = logits(model, ids)
    folds = folds_of(model, ids)
    for fold in folds.proven.values():
        fold.apply(folds.layers, random_order(fold))
    assert float((logits(model, ids) - before).norm()) <= rounding * float(before.norm())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_reverted_order_restores_every_bit(make_decoder, ids, family):
    model, dense = make_decoder(family).bfloat16(), make_decoder(family).bfloat16()
    folds = folds_of(model, ids)
    assert len(folds.proven) == 3 * len(FOLDED[family])
    for fold in folds.proven.values():
        order = random_order(fold)
        fold.apply(folds.layers, order)
        weight = linear_weight(folds.layers[fold.consumer])
        assert not torch.equal(weight, linear_weight(dense.get_submodule(fold.consumer)))
        assert torch.equal(weight.sort(1).values, linear_weight(dense.get_submodule(fold.consumer)).sort(1).values)
        fold.apply(folds.layers, order.argsort(1))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_query_heads_share_the_order_of_their_values():
    fold = Fold("o", ("v",), pools=2, shares=2, width=4)
    order = torch.tensor([[3, 1, 0, 2], [0, 2, 1, 3]])
    assert fold.inputs(order).tolist() == [3, 1, 0, 2, 7, 5, 4, 6, 8, 10, 9, 11, 12, 14, 13, 15]
    assert fold.outputs(order, 8).tolist() == [3, 1, 0, 2, 4, 6, 5, 7]
    halves = Fold("down", ("gate_up",), pools=1, shares=1, width=3)
    assert halves.outputs(torch.tensor([[2, 0, 1]]), 6).tolist() == [2, 0, 1, 5, 3, 4]
    scores = torch.arange(16.0)[None].expand(5, -1)
    assert fold.by_pool(scores).shape == (2, 10, 4)
    assert fold.by_pool(scores)[1, 0].tolist() == [8, 9, 10, 11]
    assert fold.by_pool(scores)[1, 1].tolist() == [12, 13, 14, 15]


def test_values_that_another_block_reads_keep_their_order(make_decoder, ids):
    """Gemma 4's last block reads the values of an earlier block."""
    folds = folds_of(make_decoder("gemma4_text"), ids)
    reasons = {u.name: u.reason for u in folds.unfolded}
    assert "model.layers.2.self_attn.o_proj" in reasons
    assert "another layer reads the same values" in reasons["model.layers.1.self_attn.o_proj"]
    assert "model.layers.0.self_attn.o_proj" in folds.proven


def test_finding_folds_takes_three_forwards_for_any_number_of_folds(make_decoder, ids):
    model, forwards = make_decoder("llama"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert len(folds_of(model, ids).proven) == 6
    assert len(forwards) == 3


def fail_when_run_again(model: nn.Module, fail) -> None:
    """Make the second block fail if it is called twice in one forward of the model."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.clear())
    model.model.layers[1].register_forward_pre_hook(lambda *_: fail() if calls else calls.append(1))


def test_a_block_that_fails_when_run_again_is_named_and_its_folds_are_tried_in_the_model(make_decoder, ids):
    def fail() -> None:
        raise LookupError("no second call")

    model = make_decoder("llama")
    fail_when_run_again(model, fail)
    with pytest.warns(UserWarning, match=r"model\.layers\.1: the block fails .* \('?no second call'?\)") as caught:
        folds = folds_of(model, ids)
    assert len(caught) == 1
    assert folds.proven == folds_of(make_decoder("llama"), ids).proven


def test_a_full_memory_is_not_taken_for_a_block_that_cannot_be_run_again(make_decoder, ids):
    model = make_decoder("llama")
    fail_when_run_again(model, lambda: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        folds_of(model, ids)


class Scaled(nn.Module):
    """A projection followed by a separate factor per channel, as in a norm."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.factor = nn.Parameter(torch.linspace(0.97, 1.03, layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor


def test_operations_that_depend_on_the_order_are_detected(make_decoder, ids):
    model = make_decoder("llama").bfloat16()
    value = model.model.layers[1].self_attn.v_proj
    value.register_forward_hook(lambda _m, _a, out: out * torch.linspace(0.9, 1.1, out.shape[-1]).to(out.dtype))
    act = model.model.layers[2].mlp
    act.act_fn = nn.Softmax(dim=-1)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), Scaled(nn.Linear(48, 48)).bfloat16())
    folds = folds_of(model, ids)
    assert {u.name for u in folds.unfolded} == {"model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    assert "model.layers.2.mlp.down_proj" in folds.proven, "a softmax over all channels does not depend on their order"


def test_widths_that_do_not_fit_the_groups_are_reported(make_decoder, ids):
    folds = folds_of(make_decoder("llama"), ids, m=16)
    reasons = {within_block(u.name): u.reason for u in folds.unfolded}
    assert reasons == {"self_attn.o_proj": "its runs of 8 inputs are not a multiple of 16"}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "cosp", "ace"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
def test_pruning_with_permutation_is_pruning_of_the_reordered_model(make_decoder, ids, family, method):
    """Fold in the same orders by hand and prune without permutation: models and statistics are the same."""
    model, dense = make_decoder(family), make_decoder(family)
    report = prune_model(model, ids, method, permute=True)
    assert {within_block(r.name) for r in report.permutation.reordered} == FOLDED[family]
    assert all(r.after > r.before for r in report.permutation.reordered)
    folds = folds_of(dense, ids)
    for name, fold in folds.proven.items():
        order = order_between(linear_weight(dense.get_submodule(name)), linear_weight(model.get_submodule(name)), fold)
        fold.apply(folds.layers, order)
    prune_model(dense, ids, method)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor != 0, model.state_dict()[name] != 0), name
        assert torch.equal(tensor, model.state_dict()[name]), name


def order_between(dense: torch.Tensor, pruned: torch.Tensor, fold: Fold) -> torch.Tensor:
    """The order that turns the columns of ``dense`` into those of ``pruned``, found from the kept weights."""
    matches = (dense[:, :, None] == pruned[:, None, :]).sum(0)
    order = matches.argmax(0).reshape(fold.pools, fold.shares, fold.width)[:, 0]
    return order - torch.arange(fold.pools)[:, None] * fold.shares * fold.width


@pytest.mark.parametrize("options", [{"method": "cosp", "reduce": "abs"}, {"method": "dass"}, {"sequential": "none"}])
def test_statistics_of_rows_and_couplings_are_reordered_too(make_decoder, ids, options):
    model, dense = make_decoder("llama"), make_decoder("llama")
    prune_model(model, ids, permute=True, **options)
    folds = folds_of(dense, ids)
    wanted = [fold for name, fold in folds.proven.items() if options.get("method") != "dass" or "mlp" in name]
    for fold in wanted:
        ours, theirs = (linear_weight(m.get_submodule(fold.consumer)) for m in (model, dense))
        fold.apply(folds.layers, order_between(theirs, ours, fold))
    prune_model(dense, ids, **options)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_only_layers_to_prune_are_reordered(make_decoder, ids):
    model = make_decoder("llama")
    report = prune_model(model, ids, permute=True, include="*.1.mlp.*")
    assert [r.name for r in report.permutation.reordered] == ["model.layers.1.mlp.down_proj"]


def test_permutation_needs_a_pattern_with_groups(make_decoder, ids):
    model, dense = make_decoder("llama"), make_decoder("llama")
    with pytest.raises(ValueError, match="n:m"):
        prune_model(model, ids, sparsity=0.5, permute=True)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_a_permuted_model_generates_the_same_text(make_decoder, ids, family):
    """Values in the cache are in the new order too."""
    model, dense = make_decoder(family).double(), make_decoder(family).double()
    folds = folds_of(model, ids)
    for fold in folds.proven.values():
        fold.apply(folds.layers, random_order(fold))
    ours, theirs = (m.generate(ids[:2, :5], max_new_tokens=8, do_sample=False) for m in (model, dense))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"update": "lstsq"}, {"method": "sparsegpt"}, {"sequential": "layers"}])
def test_permutation_combines_with_methods_that_update_weights(make_decoder, ids, options):
    """The Gram matrix is reordered too, so the output error is about as low as without permutation."""
    model = make_decoder("llama")
    report = prune_model(model, ids, permute=True, **{"method": "wanda", **options})
    assert len(report.permutation.reordered) == 6
    for layer in report.layers:
        groups = (linear_weight(model.get_submodule(layer.name)) != 0).reshape(-1, 4).sum(1)
        assert bool((groups <= 2).all())
    errors = {}
    for permute in (False, True):
        pruned, dense = make_decoder("llama"), make_decoder("llama")
        prune_model(pruned, ids, permute=permute, include="*.0.*", **{"method": "wanda", **options})
        errors[permute] = float((logits(pruned, ids) - logits(dense, ids)).norm())
    assert errors[True] < 1.2 * errors[False], "statistics in the wrong order would give a much larger error"


def test_dass_cannot_reorder_layers_that_it_has_pruned(make_decoder, ids):
    with pytest.raises(ValueError, match="leave one of them out"):
        prune_model(make_decoder("llama"), ids, "dass", permute=True, sequential="layers")
