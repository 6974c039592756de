"""The page of families lists how many layers are pruned, and the reason for families that are not."""

import copy
import dataclasses

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ace_triton import prune_model
from benchmarks.harness.small_models import OWN, SMALL, NotMade, small_model
from benchmarks.reports.families import NOT_JUDGED, Family, _misses, judged, page

OPTIONS = {"method": "wanda", "sparsity": "2:4"}

FAMILIES = {
    "llama": 14,
    "gpt2": 8,
    "deepseek_v3": 24,
    "bloom": 8,
    "gptj": 12,
    "gemma3": 14,
    "gemma4": 18,
    "llama4": 30,
    "qwen3_5": 16,
    "dbrx": 28,
    "gemma3n_text": 26,
    "inkling_text": 32,
}
"""Number of layers that are pruned in a small model of each family."""


@pytest.fixture
def ids():
    return torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_of_a_family_is_pruned(ids, name):
    family = judged(name, small_model(name, ids), ids, OPTIONS)
    assert family.error is None
    assert family.layers == FAMILIES[name]
    assert not family.whole
    assert family.pruned > 0.9
    assert f"block by block** (1): {name}." in "\n".join(page([family], {}, OPTIONS))


def test_blocks_in_several_lists_are_all_pruned(ids):
    """XLM has its attention and feed-forward modules in separate lists."""
    family = judged("xlm", small_model("xlm", ids), ids, OPTIONS)
    assert (family.error, family.layers, family.pruned, family.whole) == (None, 2 * (4 + 2), 1.0, True)


def test_the_error_of_a_family_is_reported(ids):
    model = small_model("llama", ids)
    broken = judged("llama", model, ids, {**OPTIONS, "method": "wonder"})
    assert broken.error is not None
    assert "unknown method 'wonder'" in broken.error
    text = "\n".join(page([broken], {"blt": "too large"}, OPTIONS))
    assert "**Not pruned** (1): llama." in text
    assert "**Not judged** (1): blt." in text
    assert "blt: too large." in text
    assert broken.error in text
    looser = judged("llama", small_model("llama", ids), ids, {**OPTIONS, "sparsity": "3:4"})
    assert looser.error is not None
    assert "not 2:4" in looser.error


def test_an_account_that_misses_weights_is_an_error(ids):
    report = prune_model(small_model("llama", ids), ids, "magnitude")
    matrices = report.account.blocks
    assert _misses(report, matrices) is None
    assert "misses some of the" in _misses(report, matrices + 1)
    fewer = dataclasses.replace(report.account, pruned=report.account.pruned - 1, skipped=1)
    assert "other weights than its account" in _misses(dataclasses.replace(report, account=fewer), matrices)


def test_experts_that_are_not_pruned_are_detected(ids, monkeypatch):
    dense = small_model("mixtral", ids)

    def without_pruning_experts(model, *arguments, **options):
        report = prune_model(model, *arguments, **options)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.data.copy_(dense.get_parameter(name))
        return report

    monkeypatch.setattr("benchmarks.reports.families.prune_model", without_pruning_experts)
    family = judged("mixtral", copy.deepcopy(dense), ids, OPTIONS)
    assert "not 2:4: ['model.layers.0.mlp.experts.0.gate_up_proj'" in family.error


def test_families_that_are_pruned_in_part_are_listed_with_their_share():
    text = "\n".join(
        page([Family("a", pruned=0.5), Family("b", pruned=1.0), Family("c", pruned=1.0, outside=0.2)], {}, {})
    )
    assert "| a | 50.0% | 0.0% |" in text
    assert "| c | 100.0% | 20.0% |" in text
    assert "| b |" not in text


def test_a_family_that_no_small_sizes_suit_is_not_judged(ids):
    made = small_model("no such family", ids)
    assert isinstance(made, NotMade)
    assert "no such family" in made.reason


def test_the_tables_name_families_of_transformers():
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert known >= NOT_JUDGED.keys()
    assert SMALL["hidden_size"] == 32
    assert len(known & OWN.keys()) > 15
