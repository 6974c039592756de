"""Whole models: masks against an independent implementation, families, options, refusals."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, PruneError, ScoreTerms, Sparsity, metric_names, register_metric
from ace_triton.decoders.blocks import find_blocks, linears_of, stacks_of
from ace_triton.decoders.collect import InputCollector
from ace_triton.linears import linear_weight
from ace_triton.methods.registry import _REGISTRY, Needs
from ace_triton.prune_blocks import prune_model

LENGTHS = torch.tensor([16, 9, 12, 16, 5, 16])


@dataclass(frozen=True)
class Sequences:
    ids: torch.Tensor
    mask: torch.Tensor | None = None


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for b in find_blocks(model) for name, layer in linears_of(b.module, b.name)}


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: linear_weight(layer) != 0 for name, layer in block_linears(model).items()}


def same_masks(one: nn.Module, other: nn.Module) -> bool:
    theirs = masks(other)
    return all(torch.equal(mask, theirs[name]) for name, mask in masks(one).items())


def published_score(method: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Wanda's and RIA's formulas, in fp64."""
    weight, tokens = weight.double().abs(), tokens.double().reshape(-1, weight.shape[1])
    norm = tokens.norm(dim=0)
    if method == "wanda":
        return weight * norm
    return (weight / weight.sum(0, keepdim=True) + weight / weight.sum(1, keepdim=True)) * norm.sqrt()


def prune_naively(model: nn.Module, ids: torch.Tensor, method: str, sparsity: str | float, sequential: str) -> None:
    """Pruning block by block or at once, by full forwards of the model, sharing nothing with the package."""
    everything = [(f"{i}.{n}", m) for i, block in enumerate(model.model.layers) for n, m in block.named_modules()]
    linears = [(name, layer) for name, layer in everything if isinstance(layer, nn.Linear)]
    blocks = [[layer for name, layer in linears if name.startswith(f"{i}.")] for i in range(len(model.model.layers))]
    for layers in [[layer for block in blocks for layer in block]] if sequential == "none" else blocks:
        seen = {}
        hooks = [m.register_forward_hook(lambda m, args, _out, s=seen: s.update({m: args[0]})) for m in layers]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            score = published_score(method, layer.weight.detach(), seen[layer])
            group = score.reshape(-1, 4) if sparsity == "2:4" else score
            order = torch.sort(group, dim=-1, stable=True).indices
            pruned = torch.zeros_like(group, dtype=torch.bool)
            pruned.scatter_(-1, order[:, : group.shape[1] // 2], True)
            layer.weight.data[pruned.reshape(score.shape)] = 0


@pytest.mark.parametrize("sequential", ["blocks", "none"])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_masks_are_those_of_a_naive_implementation(make_decoder, ids, method, sparsity, sequential):
    ours, naive = make_decoder("llama"), make_decoder("llama")
    prune_model(ours, ids, method, sparsity, sequential=sequential, batch_size=4)
    prune_naively(naive, ids, method, sparsity, sequential)
    for name, mask in masks(naive).items():
        assert torch.equal(masks(ours)[name], mask), name


def test_all_at_once_and_block_by_block_differ_after_the_first_block(make_decoder, ids):
    by_block, at_once = make_decoder("llama"), make_decoder("llama")
    prune_model(by_block, ids, "wanda")
    prune_model(at_once, ids, "wanda", sequential="none")
    differing = {name.split(".")[2] for name, mask in masks(at_once).items() if not mask.equal(masks(by_block)[name])}
    assert differing == {"1", "2"}


TURNS = {
    "llama": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "qwen3_moe": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
}


@pytest.mark.parametrize("family", TURNS)
def test_turns_inside_a_block_are_prunings_of_their_own(make_decoder, ids, family):
    """The same as pruning the layers of each turn in a call of their own, the others dense."""
    model, by_hand = make_decoder(family), make_decoder(family)
    prune_model(model, ids, "wanda", sequential="layers", batch_size=2)
    for block in find_blocks(by_hand):
        for turn in TURNS[family]:
            prune_model(by_hand, ids, "wanda", include=[f"{block.name}.*{name}" for name in turn])
    weights = by_hand.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight != 0, weights[name] != 0), name


@pytest.mark.parametrize(("part", "runs"), [("self_attn", 3), ("mlp", 3)])
def test_in_turns_each_part_of_a_block_runs_where_it_is_needed(make_decoder, ids, part, runs):
    """Attention while its inputs and its output are looked at, and once pruned; the rest likewise. The first block's
    run shows the order of turns to the second."""
    model, calls = make_decoder("llama"), []
    module = model.model.layers[1].get_submodule(part)
    forward = module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    prune_model(model, ids, "wanda", sequential="layers", batch_size=3)
    trials, batches = 3, 2
    assert len(calls) == trials + runs * batches


def test_an_unknown_turn_is_refused(make_decoder, ids):
    with pytest.raises(ValueError, match="sequential must be one of none, blocks, layers; got 'sideways'"):
        prune_model(make_decoder("llama"), ids, "wanda", sequential="sideways")


def check_pattern(weight: torch.Tensor, sparsity: str | float, axis: str) -> None:
    lines = weight if axis == "in" else weight.t()
    group = 4 if sparsity == "2:4" else lines.shape[1]
    kept = (lines.reshape(-1, group) != 0).sum(1)
    assert kept.unique().tolist() == [group // 2]


def matrix_of(model, name: str) -> torch.Tensor:
    """A pruned layer's weight, or an expert's share of its stack."""
    experts = {stack.expert_name(i): part for stack in stacks_of(model) for i, part in enumerate(stack.weight)}
    return experts[name] if name in experts else linear_weight(model.get_submodule(name))


def check_account(model, dense, report) -> None:
    """Its counts against a walk over the dense model, and what it calls pruned against the zeros that there are."""
    inside = {
        id(p): p for block in find_blocks(dense) for p in block.module.parameters() if p.dim() > 1 and min(p.shape) > 1
    }
    account = report.account
    assert (
        account.blocks == account.pruned + account.skipped + account.excluded == sum(p.numel() for p in inside.values())
    )
    matrices = {id(p): p for p in dense.parameters() if p.dim() > 1 and min(p.shape) > 1}
    assert account.outside == sum(p.numel() for key, p in matrices.items() if key not in inside)
    assert account.model == sum(p.numel() for p in dense.parameters())
    assert account.pruned == sum(layer.parameters for layer in report.layers)
    assert account.skipped == sum(skipped.parameters for skipped in report.skipped)
    assert account.excluded == sum(excluded.parameters for excluded in report.excluded)
    kept = sum(int((p != 0).sum()) for p in model.parameters())
    assert kept == sum(int((p != 0).sum()) for p in dense.parameters()) - account.pruned // 2


def test_every_family(make_decoder, ids, family):
    model, dense = make_decoder(family), make_decoder(family)
    report = prune_model(model, ids, batch_size=4)
    check_account(model, dense, report)
    pruned = {layer.name for layer in report.layers}
    assert pruned | {skipped.name for skipped in report.skipped} >= set(block_linears(model))
    for layer in report.layers:
        check_pattern(matrix_of(model, layer.name), "2:4", "in")
        assert (layer.kept, layer.pattern) == (0.5, "2:4")
    for (name, after), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        kept = after != 0
        assert torch.equal(after[kept], before[kept]), name
        experts = {stack.name: {stack.expert_name(i) for i in range(4)} for stack in stacks_of(model)}
        owned = experts.get(name, {name.removesuffix(".weight")})
        assert bool(kept.all()) or owned & pruned or not bool((before != 0).all())
    generated = model.generate(ids[:2, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 4


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("method", metric_names())
def test_every_method(make_decoder, ids, method, sparsity):
    model = make_decoder("llama")
    report = prune_model(model, ids, method, sparsity)
    assert len(report.layers) == (9 if method == "dass" else 21)
    for layer in report.layers:
        assert layer.kept == 0.5
        if method != "sparsegpt" or sparsity == "2:4":  # Its fraction is that of whole blocks of columns.
            check_pattern(matrix_of(model, layer.name), sparsity, layer.axis)


@pytest.mark.parametrize(
    ("method", "option"), [("cosp", {"reduce": "abs"}), ("ace", {"reduce": "rms", "base": "wanda"})]
)
def test_options_reach_the_metric(make_decoder, ids, method, option):
    plain, other = make_decoder("llama"), make_decoder("llama")
    prune_model(plain, ids, method)
    prune_model(other, ids, method, **option)
    assert not same_masks(plain, other)


@pytest.mark.parametrize("sequential", ["blocks", "none"])
@pytest.mark.parametrize("method", ["ace", "stade"])
def test_batches_do_not_matter(make_decoder, ids, method, sequential):
    whole = make_decoder("llama")
    prune_model(whole, ids, method, batch_size=6, sequential=sequential)
    for size in (1, 4):
        parts = make_decoder("llama")
        prune_model(parts, ids, method, batch_size=size, sequential=sequential)
        assert same_masks(whole, parts)


@pytest.mark.parametrize("family_name", ["llama", "opt", "gpt2", "gemma3_text"])
def test_padding_takes_no_part(make_decoder, ids, family_name):
    plain, padded = make_decoder(family_name), make_decoder(family_name)
    prune_model(plain, ids, "ace", "2:4")
    junk = torch.randint(3, 101, (6, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(23).expand(6, 23) < 16
    prune_model(padded, Sequences(torch.cat([ids, junk], 1), mask), "ace", "2:4", batch_size=4)
    assert same_masks(plain, padded)


def test_sequences_of_different_lengths(make_decoder, ids):
    """Padded junk must not matter whatever it is, and padding must change what a full sequence would give."""
    mask = torch.arange(16) < LENGTHS[:, None]
    junk = torch.where(mask, ids, 50)
    models = [make_decoder("llama") for _ in range(3)]
    for model, calibration in zip(models, [Sequences(ids, mask), Sequences(junk, mask), ids], strict=True):
        prune_model(model, calibration)
    assert same_masks(models[0], models[1])
    assert not same_masks(models[0], models[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(make_decoder, ids, dtype):
    model = make_decoder("llama").to(dtype)
    report = prune_model(model, ids)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for layer in report.layers:
        check_pattern(matrix_of(model, layer.name), "2:4", "in")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["ace", "dass", "stade"])
def test_on_a_gpu(make_decoder, ids, method):
    model = make_decoder("llama").to("cuda", torch.bfloat16)
    report = prune_model(model, Sequences(ids, torch.arange(16) < LENGTHS[:, None]), method)
    assert report.peak_bytes == torch.cuda.max_memory_allocated()
    for layer in report.layers:
        check_pattern(matrix_of(model, layer.name), "2:4", layer.axis)


def test_magnitude_needs_neither_calibration_nor_forward(make_decoder):
    model = make_decoder("llama")
    model.forward = None
    report = prune_model(model, None, "magnitude")
    assert len(report.layers) == 21
    assert report.seconds.calibration == report.seconds.statistics == 0


def test_parameters_held_by_an_optimizer_cost_nothing(make_decoder, ids):
    """Ties are looked for once, in the model, and not among all objects for every layer."""
    model = make_decoder("llama")
    optimizer = torch.optim.SGD(model.parameters())
    assert prune_model(model, ids).seconds.select < 1
    del optimizer


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


class Relay(nn.Module):
    """One block's activation hands a baton to another's, which drops it: neither can run by itself twice."""

    def __init__(self, inner: nn.Module, baton: set[str], hands: bool) -> None:
        super().__init__()
        self.inner, self.baton, self.hands = inner, baton, hands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hands:
            self.baton.add("here")
            return self.inner(x)
        has_it = "here" in self.baton
        self.baton.clear()
        return self.inner(x) * has_it


@pytest.mark.parametrize("sequential", ["blocks", "none"])
def test_models_that_cannot_be_replayed_get_the_same_masks(make_decoder, ids, sequential):
    odd, plain = make_decoder("llama"), make_decoder("llama")
    baton: set[str] = set()
    first, _, last = odd.model.layers
    first.mlp.act_fn = Relay(first.mlp.act_fn, baton, hands=True)
    last.mlp.act_fn = Relay(last.mlp.act_fn, baton, hands=False)
    with pytest.warns(UserWarning, match="cannot be run one at a time"):
        prune_model(odd, ids, sequential=sequential)
    prune_model(plain, ids, sequential=sequential)
    assert same_masks(plain, odd)


def test_progress_and_report(make_decoder, ids):
    seen = []
    report = prune_model(make_decoder("llama"), ids, "ria", Sparsity("1:4"), progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "model.layers.0"), (2, 3, "model.layers.1"), (3, 3, "model.layers.2")]
    told = json.loads(json.dumps(report.to_dict()))
    added = ["permutation", "update", "budgets", "sequential", "recipe", "towers", "fits"]
    assert list(told) == [
        "method",
        "sparsity",
        "seconds",
        "peak_bytes",
        "layers",
        "skipped",
        "excluded",
        "account",
        *added,
    ]
    assert (told["method"], told["sparsity"]) == ("ria", "1:4")
    assert told["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "kept": 0.25,
        "pattern": "1:4",
        "parameters": 1024,
    }
    seconds = told["seconds"]
    stages = ["load", "calibration", "statistics", "select", "total", "permute", "update", "block_fit", "rotate"]
    assert list(seconds) == [*stages, "quantize", "other"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])
    assert seconds["load"] == 0
    assert 0 < seconds["calibration"] + seconds["statistics"] + seconds["select"] <= seconds["total"]
    assert told["peak_bytes"] > 10_000_000


def test_the_model_is_left_as_it_was(make_decoder, ids):
    model = make_decoder("llama").train()
    state = torch.get_rng_state()
    prune_model(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("sequential", ["none", "blocks", "layers"])
@pytest.mark.parametrize("method", ["wanda", "ace"])
def test_a_block_that_is_left_early_is_pruned_the_same(make_decoder, ids, monkeypatch, family, sequential, method):
    pruned = []
    batch = InputCollector.batch
    for early in (True, False):
        model = make_decoder(family)
        if not early:
            monkeypatch.setattr(InputCollector, "batch", lambda self, shape, valid, **_: batch(self, shape, valid))
        prune_model(model, ids, method, "2:4", batch_size=2, sequential=sequential)
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][name], weight) for name, weight in pruned[1].items())


def test_only_the_first_batch_of_the_first_block_runs_it_whole_before_it_is_pruned(make_decoder, ids):
    model, calls = make_decoder("llama"), []
    for index in (0, 1):
        last = model.model.layers[index].mlp.down_proj
        last.register_forward_hook(lambda _m, args, _o, index=index: calls.append((index, args[0].shape[0])))
    prune_model(model, ids, "wanda", "2:4", batch_size=3)
    assert calls.count((0, 3)) == 1 + 2
    assert calls.count((1, 3)) == 0 + 2
