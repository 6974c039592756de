"""A plan names what pruning prunes and skips, and which layers share statistics."""

import copy

import pytest
import torch

from ace_triton import Recipe, prune_model
from ace_triton.decoders.blocks import find_blocks
from ace_triton.errors import ArgumentError
from ace_triton.planning.layers import one_of_each_kind, planned

RECIPES = {
    "wanda": Recipe("wanda"),
    "dass along outputs": Recipe("dass", sparsity="8:32"),
    "some layers": Recipe("magnitude", sparsity="4:8", exclude=("*.1.*",)),
}


def without_weights(model):
    empty = copy.deepcopy(model)
    for parameter in empty.parameters():
        parameter.data.zero_()
    return empty


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_plan_is_what_pruning_does(family, recipe, make_decoder, ids):
    model = make_decoder(family)
    layers = planned(without_weights(model), recipe)
    report = prune_model(model, ids, recipe)
    unreached = {skipped.name for skipped in report.skipped if "no calibration token" in skipped.reason}
    pruned = {layer.name for unit in layers.units for layer in unit.layers if layer.is_pruned}
    assert pruned - unreached == {layer.name for layer in report.layers}
    reasons = {skipped.name: skipped.reason for skipped in report.skipped if skipped.name not in unreached}
    assert {skipped.name: skipped.reason for skipped in layers.plan.skipped} == reasons
    assert layers.plan.excluded == list(report.excluded)
    if not unreached:
        assert layers.plan.close() == report.account


def groups_of(model, recipe=RECIPES["wanda"]) -> list[list[set[str]]]:
    units = planned(without_weights(model), recipe).units
    return [[{layer.name.rpartition(".")[2] for layer in group} for group in unit.groups] for unit in units]


def test_layers_that_read_one_tensor_are_in_one_group(make_decoder):
    expected = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert groups_of(make_decoder("llama")) == [expected] * 3


def test_each_expert_has_groups_of_its_own(make_decoder):
    for groups in groups_of(make_decoder("qwen3_moe")):
        assert [group for group in groups if group & {"gate_up_proj", "down_proj"}] == [
            *[{"gate_up_proj"}] * 4,
            *[{"down_proj"}] * 4,
        ]


def test_only_the_first_block_of_a_kind_computes(make_decoder):
    model = make_decoder("llama")
    blocks, ids = find_blocks(model), torch.arange(8)[None]
    ran = []
    for block in blocks:
        block.module.mlp.register_forward_hook(lambda *_, name=block.name: ran.append(name))
    with one_of_each_kind(blocks):
        model(input_ids=ids)
    assert ran == [blocks[0].name]
    model(input_ids=ids)
    assert ran[1:] == [block.name for block in blocks]


def test_a_pattern_that_matches_nothing_is_refused(make_decoder):
    with pytest.raises(ArgumentError, match="matches no linear layer"):
        planned(make_decoder("llama"), Recipe("wanda", include=("*.nothing",)))


def test_a_pattern_that_fits_no_layer_is_refused(make_decoder):
    with pytest.raises(ArgumentError, match=r"no layer of .* can be pruned"):
        planned(make_decoder("llama", hidden_size=24), Recipe("wanda", sparsity="8:32"))
