"""Which layers of a model are pruned, and which stay dense and why."""

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, ScoreTerms, register_metric
from ace_triton.methods.registry import _REGISTRY, Needs
from ace_triton.prune_blocks import prune_model
from tests.naive_pruning import published_score, same_masks


def test_experts_may_be_excluded_by_name(make_decoder, ids):
    report = prune_model(make_decoder("qwen3_moe"), ids, exclude="*.experts.*")
    assert {s.reason for s in report.skipped} == {"routers stay dense"}
    assert {(e.name.rpartition(".")[2], e.parameters) for e in report.excluded} == {
        ("gate_up_proj", 32 * 32),
        ("down_proj", 32 * 16),
    }
    assert len(report.excluded) == 3 * 4 * 2
    assert len(report.layers) == 12
    assert not any("experts" in layer.name for layer in report.layers)


def test_layers_that_do_not_fit_the_pattern_are_named(make_decoder, ids):
    model = make_decoder("llama", intermediate_size=50)
    report = prune_model(model, ids)
    assert {(s.name.rpartition(".")[2], s.reason) for s in report.skipped} == {
        ("down_proj", "its 50 inputs are not a multiple of 4")
    }
    assert len(report.layers) == 18


def test_layers_that_share_a_weight_are_named(make_decoder, ids):
    model = make_decoder("llama")
    first, second, _ = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    report = prune_model(model, ids)
    assert {(s.name, s.reason) for s in report.skipped} == {
        ("model.layers.0.mlp.up_proj", "its weight is tied to model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj", "its weight is tied to model.layers.0.mlp.up_proj"),
    }


class Unused(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.spare = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_layers_that_nothing_reaches_are_named(make_decoder, ids):
    model = make_decoder("llama")
    model.model.layers[1].mlp = Unused(model.model.layers[1].mlp)
    report = prune_model(model, ids)
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("model.layers.1.mlp.spare", "no calibration token reached it")
    ]


def test_dass_leaves_attention_dense(make_decoder, ids):
    model, dense = make_decoder("llama"), make_decoder("llama")
    report = prune_model(model, ids, "dass")
    assert {s.reason for s in report.skipped} == {"method 'dass' leaves attention dense"}
    assert len(report.skipped) == 12
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dense.model.layers[0].self_attn.q_proj.weight)
    axes = {layer.name.rpartition(".")[2]: layer.axis for layer in report.layers}
    assert axes == {"gate_proj": "out", "up_proj": "out", "down_proj": "in"}


@pytest.mark.parametrize("only", [None, "*gate*"])
@pytest.mark.parametrize("family_name", ["llama", "phi3"])
def test_dass_scores_rows_by_what_they_feed(make_decoder, ids, family_name, only):
    """Gate and up, fused or not: |W_ij| sqrt(m_i), m_i the norm of the down projection's input i."""
    model, dense = make_decoder(family_name), make_decoder(family_name)
    seen = []
    dense.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        dense(input_ids=ids, use_cache=False)
    norm = seen[0].double().reshape(-1, 48).norm(dim=0)
    name = "gate_proj" if family_name == "llama" else "gate_up_proj"
    weight = dense.model.layers[0].mlp.get_submodule(name).weight.detach().double().abs()
    score = weight * norm.repeat(weight.shape[0] // 48).sqrt()[:, None]
    prune_model(model, ids, "dass", include=only)
    kept = model.model.layers[0].mlp.get_submodule(name).weight != 0
    ranks = score.t().reshape(32, -1, 4).argsort(dim=-1, stable=True).argsort(dim=-1)
    assert torch.equal(kept, (ranks >= 2).reshape(32, -1).t())


def test_a_metric_of_ones_own_may_look_at_consumers(make_decoder, ids):
    seen = []

    @register_metric("by_consumer", Needs(consumer=True))
    def by_consumer(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
        seen.append(None if stats.consumer_norm is None else tuple(stats.consumer_norm.shape))
        return ScoreTerms(scale=stats.norm)

    try:
        model, wanda = make_decoder("llama"), make_decoder("llama")
        assert prune_model(model, ids, "by_consumer").skipped == ()
    finally:
        _REGISTRY.pop("by_consumer")
    prune_model(wanda, ids, "wanda")
    assert same_masks(model, wanda)
    assert seen[1:8] == [None, None, None, None, (48,), (48,), None]


def test_a_metric_may_leave_attention_dense_and_group_along_the_outputs(make_decoder, ids):
    @register_metric("no_attention", skips_attention=True)
    def no_attention(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
        return ScoreTerms(scale=stats.norm)

    @register_metric("outputs_of_gated", Needs(consumer=True), consumer_axis="out")
    def outputs_of_gated(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
        return ScoreTerms(scale=stats.norm)

    try:
        report = prune_model(make_decoder("llama"), ids, "no_attention")
        assert {s.reason for s in report.skipped} == {"method 'no_attention' leaves attention dense"}
        assert {layer.name.split(".")[3] for layer in report.layers} == {"mlp"}
        axes = {
            layer.name.split(".")[-1]: layer.axis
            for layer in prune_model(make_decoder("llama"), ids, "outputs_of_gated").layers
        }
        assert {name for name, axis in axes.items() if axis == "out"} == {"gate_proj", "up_proj"}
    finally:
        _REGISTRY.pop("no_attention")
        _REGISTRY.pop("outputs_of_gated")


def test_include_and_exclude(make_decoder, ids):
    model = make_decoder("llama")
    report = prune_model(model, ids, include=["*.mlp.*", "*.q_proj"], exclude="*.2.*")
    names = [layer.name for layer in report.layers]
    assert len(names) == 8
    assert all((".mlp." in name or "q_proj" in name) and ".2." not in name for name in names)
    assert report.skipped == ()


@pytest.mark.parametrize("sequential", ["blocks", "none"])
def test_the_head_is_pruned_where_it_is_asked_for(make_decoder, ids, sequential):
    model = make_decoder("llama")
    report = prune_model(model, ids, "wanda", include=["lm_head", "*.o_proj"], sequential=sequential)
    assert [layer.name for layer in report.layers][-1] == "lm_head"
    assert len(report.layers) == 4
    naive = make_decoder("llama")
    if sequential == "blocks":
        prune_model(naive, ids, "wanda", include="*.o_proj")
    seen = []
    naive.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        naive(input_ids=ids, use_cache=False)
    score = published_score("wanda", naive.lm_head.weight.detach(), seen[0]).reshape(-1, 4)
    ranks = score.argsort(dim=-1, stable=True).argsort(dim=-1)
    assert torch.equal(model.lm_head.weight != 0, (ranks >= 2).reshape(101, 32))


def test_a_tied_head_is_not_pruned(make_decoder, ids):
    model = make_decoder("llama", tie_word_embeddings=True)
    report = prune_model(model, ids, include="*")
    assert [(s.name, s.reason) for s in report.skipped] == [("lm_head", "its weight is tied to model.embed_tokens")]
