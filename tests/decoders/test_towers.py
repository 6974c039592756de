"""Models with one or more towers, of any inputs, are pruned tower by tower."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ace_triton import prune_model
from ace_triton.decoders.blocks import Tower, find_blocks, find_towers, linears_of
from ace_triton.decoders.calibration_forms import batches_of
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.decoders.collect import InputCollector
from ace_triton.decoders.replay import Replay, WholeForward, make_runner
from ace_triton.linears import linear_weight
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch
from benchmarks.harness.small_models import small_model
from tests.decoders.small_towers import KINDS, SOURCE, Kind, ids, llava, make


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


pytestmark = pytest.mark.usefixtures("one_thread")


def layers_of(tower: Tower) -> list[dict[str, nn.Module]]:
    return [dict(linears_of(block.module, block.name)) for block in tower.blocks]


def prune_naively(kind: Kind) -> nn.Module:
    """Wanda 2:4, block by block, by whole forwards of the model, sharing nothing with the package."""
    model, batches = make(kind)
    modules = dict(model.named_modules())
    for tower in kind.towers:
        for block in modules[tower]:
            layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
            square: dict[str, torch.Tensor] = dict.fromkeys(layers, torch.zeros(1, dtype=torch.float64))
            for inputs in batches:
                seen: dict[str, torch.Tensor] = {}
                hooks = [
                    m.register_forward_hook(lambda _m, args, _o, n=n, seen=seen: seen.update({n: args[0]}))
                    for n, m in layers.items()
                ]
                with torch.no_grad():
                    model(**inputs)
                for hook in hooks:
                    hook.remove()
                for name, tokens in seen.items():
                    crossing = any(part in name for part in ("EncDecAttention", "encoder_attn"))
                    source = crossing and name.split(".")[-1] in ("k", "v", "k_proj", "v_proj")
                    valid = inputs.get(kind.masks.get(next(iter(kind.towers)) if source else tower, ""))
                    rows = tokens.double() if valid is None else tokens[valid.bool()].double()
                    square[name] = square[name] + rows.reshape(-1, rows.shape[-1]).square().sum(0)
            for name, layer in layers.items():
                score = (layer.weight.detach().double().abs() * square[name].sqrt()).reshape(-1, 4)
                dropped = torch.zeros_like(score, dtype=torch.bool)
                dropped.scatter_(1, torch.sort(score, dim=1, stable=True).indices[:, :2], True)
                layer.weight.data[dropped.reshape(layer.weight.shape)] = 0
    return model


def test_masks_are_those_of_a_naive_implementation(kind):
    """So each tower sees the pruned towers before it, and no tower sees padding."""
    model, batches = make(kind)
    naive = prune_naively(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_model(model, batches, "wanda", "2:4")
    weights = naive.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert [(tower.name, tower.run) for tower in report.towers] == [(name, "blocks") for name in kind.towers]


@pytest.mark.parametrize(
    "options", [{}, {"sequential": "layers"}, {"sequential": "none", "budgets": "outliers"}], ids=str
)
def test_every_layer_of_every_tower_has_exactly_the_pattern(kind, options):
    model, batches = make(kind)
    dense, _ = make(kind)
    with torch.no_grad():
        expected = model(**batches[0])
    report = prune_model(model, batches, "ace", "4:8", permute=True, **options)
    counts = [sum(layer.name.startswith(f"{tower}.") for layer in report.layers) for tower in kind.towers]
    assert counts == list(kind.towers.values())
    assert len(report.layers) == sum(counts)
    for layer in report.layers:
        groups = linear_weight(model.get_submodule(layer.name)).reshape(-1, 8)
        assert set((groups != 0).sum(1).tolist()) == {int(layer.pattern[0])}
    blocks = [block.module for block in find_blocks(dense, batches_of(dense, batches, None)[0])]
    matrices = {p: p.numel() for block in blocks for p in block.parameters() if p.dim() > 1}
    account = report.account
    assert account.blocks == account.pruned + account.skipped == sum(matrices.values())
    assert account.pruned == sum(layer.parameters for layer in report.layers)
    assert {skipped.reason for skipped in report.skipped} <= {"an embedding"}
    assert report.permutation.reordered
    assert not report.permutation.unfolded
    with torch.no_grad():
        assert type(model(**batches[0])) is type(expected)


def collected(runner: Replay | WholeForward, layers: dict[str, nn.Module], index: int) -> InputCollector:
    collector = InputCollector(layers, Needs(), Stopwatch(torch.device("cpu")))
    runner.run(index, collector, advance=True)
    return collector


def test_replayed_statistics_are_those_of_a_whole_forward(kind):
    model, inputs = make(kind)
    batches, clock = batches_of(model, inputs, None), Stopwatch(torch.device("cpu"))
    with calibration_mode(model):
        towers = find_towers(model, batches[0])
        assert [tower.masks.own for tower in towers if tower.masks.own in batches[0].masks] == list(kind.masks.values())
        for tower in towers:
            replay = make_runner(model, tower.blocks, batches, clock, tower.masks)
            whole = WholeForward(model, batches, clock, tower.blocks, tower.masks)
            assert isinstance(replay, Replay)
            for index, layers in enumerate(layers_of(tower)):
                ours, theirs = collected(replay, layers, index), collected(whole, layers, index)
                assert ours.groups == theirs.groups
                for name in layers:
                    one, other = ours.statistics(name), theirs.statistics(name)
                    assert torch.equal(one.norm, other.norm), name
                    assert torch.equal(one.sequence_square, other.sequence_square), name


def test_a_tower_that_no_input_reaches_is_reported(recwarn):
    """Token ids alone do not reach a vision tower."""
    torch.manual_seed(0)
    model, text = llava().eval(), ids(12)
    report = prune_model(model, text, "wanda")
    assert [(tower.name, tower.blocks, tower.run) for tower in report.towers] == [
        ("model.language_model.layers", 2, "blocks"),
        ("model.vision_tower.encoder.layers", 2, "unreached"),
    ]
    assert len(report.layers) == 14
    assert report.to_dict()["towers"][1] == {
        "name": "model.vision_tower.encoder.layers",
        "blocks": 2,
        "run": "unreached",
    }


def test_token_ids_and_a_dict_of_them_give_the_same():
    kind = KINDS["bert"]
    (one, batches), (other, _) = make(kind), make(kind)
    (plain, _), (masked, _) = make(kind), make(kind)
    prune_model(one, [{"input_ids": batches[0]["input_ids"]}])
    prune_model(other, batches[0]["input_ids"])
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    calibration = type("Calibration", (), {"ids": batches[0]["input_ids"], "mask": SOURCE.bool()})()
    prune_model(plain, calibration)
    prune_model(masked, batches[:1])
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, masked.state_dict()[name]), name


@pytest.mark.parametrize("family", ["hrm_text", "gemma3n_text"])
def test_towers_of_the_same_tokens_have_the_same_mask(family):
    """Two towers that read the same text, and hidden states in several streams."""
    tokens, valid = ids(12), SOURCE.bool()
    (one, other) = (small_model(family, tokens) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Not all of them can be replayed.
        calibration = type("Calibration", (), {"ids": tokens, "mask": valid})()
        prune_model(one, calibration, "wanda")
        prune_model(other, [{"input_ids": tokens, "attention_mask": SOURCE}], "wanda")
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_layers_are_chosen_by_their_dotted_names():
    model, batches = make(KINDS["bart"])
    report = prune_model(model, batches, "wanda", include="model.decoder.*", exclude="*.fc1")
    assert len(report.layers) == 18
    assert all(layer.name.startswith("model.decoder.") for layer in report.layers)
    assert [tower.run for tower in report.towers] == ["none", "blocks"]
    assert {e.name.split(".")[1] for e in report.excluded} == {"encoder", "decoder"}


def test_all_towers_are_pruned_without_a_forward():
    model, _ = make(KINDS["t5"])
    report = prune_model(model, None, "magnitude")
    assert len(report.layers) == 32
    assert [(tower.name, tower.run) for tower in report.towers] == [
        ("encoder.block", "none"),
        ("decoder.block", "none"),
    ]


def test_a_head_is_pruned_by_what_the_last_tower_gives_it():
    model, batches = make(KINDS["bart"])
    report = prune_model(model, batches, "wanda", include=["lm_head", "*.fc2"], sequential="none")
    assert [skipped.reason[:22] for skipped in report.skipped] == ["its weight is tied to "]
    model, batches = make(KINDS["vit"])
    report = prune_model(model, batches, "wanda", include=["classifier", "*.fc2"])
    assert report.layers[-1].name == "classifier"
    assert report.layers[-1].kept == 0.5
