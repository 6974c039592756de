"""The account counts every matrix once and reveals a bug in the pruning loop."""

import pytest
import torch
from torch import nn

from ace_triton import prune_model
from ace_triton.decoders.account import Account, Ledger, matrices
from ace_triton.selection import Selection


class Mixed(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(8, 4), nn.Linear(8, 1)
        self.convolution, self.norm, self.table = nn.Conv1d(6, 6, 3, groups=6), nn.LayerNorm(8), nn.Embedding(5, 8)
        self.experts = nn.Parameter(torch.zeros(3, 4, 8))
        self.experts_bias = nn.Parameter(torch.zeros(3, 4))
        self.mix = nn.Parameter(torch.zeros(1, 1, 8))


def test_matrices_have_several_rows_and_columns():
    module = Mixed()
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert {names[p]: count for p, count in matrices(module).items()} == {
        "up.weight": 32,
        "gate.weight": 8,
        "convolution.weight": 18,
        "table.weight": 40,
        "experts": 96,
    }


def test_entries_add_up_and_shared_parameters_count_once():
    model = nn.ModuleDict({"block": Mixed(), "head": nn.Linear(8, 5)})
    block = model["block"]
    ledger = Ledger(model, [block])
    for _ in range(2):
        ledger.enter("pruned", block.experts, 32)
    ledger.enter("skipped", block.experts, 32)
    assert ledger.rest(block.experts) == 0
    for _ in range(2):
        ledger.enter("skipped", block.up.weight, 32)
    ledger.enter("excluded", block.table.weight, 40)
    ledger.enter("skipped", block.norm.weight, 8)
    account = ledger.account()
    assert (account.pruned, account.skipped, account.excluded, account.outside) == (64, 64, 40, 40)
    assert account.blocks == 168
    assert account.model == sum(parameter.numel() for parameter in model.parameters())
    assert account.share("pruned") == pytest.approx(64 / 168)
    ledger.open(model["head"].parameters())
    ledger.enter("pruned", model["head"].weight, 40)
    assert (ledger.account().pruned, ledger.account().outside) == (104, 0)


def test_pruning_a_weight_twice_is_reported_as_a_bug():
    layer = nn.Linear(8, 4)
    ledger = Ledger(layer, [layer])
    ledger.enter("pruned", layer.weight, 32)
    with pytest.raises(
        RuntimeError, match=r"32 weights were pruned, but only 0 were left to prune: .* please report it"
    ):
        ledger.enter("pruned", layer.weight, 32)


def test_an_empty_account_has_shares_of_zero():
    assert Account(0, 0, 0, outside=7, model=9).to_dict() == {
        "pruned": 0,
        "skipped": 0,
        "excluded": 0,
        "outside": 7,
        "model": 9,
        "blocks": 0,
        "pruned_share": 0.0,
        "skipped_share": 0.0,
        "excluded_share": 0.0,
    }


def test_a_layer_that_is_not_pruned_by_mistake_is_named(make_decoder, ids, monkeypatch):
    prune = Selection.prune

    def prune_all_but_one(self, unit, collector):
        if unit.name != "model.layers.1":
            prune(self, unit, collector)

    monkeypatch.setattr(Selection, "prune", prune_all_but_one)
    report = prune_model(make_decoder("llama"), ids, "magnitude")
    assert len(report.skipped) == 7
    assert all(s.name.startswith("model.layers.1.") and s.reason.startswith("not recognized") for s in report.skipped)
    assert report.account.blocks == report.account.pruned + report.account.skipped
    assert report.account.share("skipped") == pytest.approx(1 / 3)
