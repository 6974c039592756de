"""Whole models: masks against an independent implementation, families, options, refusals."""

import json

import pytest
import torch
from torch import nn

from ace_triton import Sparsity, metric_names
from ace_triton.decoders.blocks import find_blocks, stacks_of
from ace_triton.decoders.collect import InputCollector
from ace_triton.linears import linear_weight
from ace_triton.prune_blocks import prune_model
from tests.naive_pruning import Sequences, block_linears, masks, prune_naively, same_masks

LENGTHS = torch.tensor([16, 9, 12, 16, 5, 16])


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
        "cpu_seconds",
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
