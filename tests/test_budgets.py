"""Layer-wise budgets: the shares by hand, their sum, and what prune_model makes of them."""

import copy
import itertools
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import Recipe, Sparsity, prune_checkpoint
from ace_triton.budgets import block_patterns, group_sizes, kept_shares, outliers
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.packed.pack_model import pack_model
from ace_triton.prune_blocks import prune_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outliers_are_counted_as_by_hand(dtype):
    weight, norm = torch.randn(40, 70).pow(3).to(dtype), torch.rand(70) + 0.1
    scores = weight.double().abs() * norm.double()
    assert (
        outliers(weight, norm) == int((scores > 5 * scores.mean()).sum()) > int((scores > 6 * scores.mean()).sum()) > 0
    )
    assert outliers(torch.ones(3, 4), torch.ones(4)) == outliers(torch.zeros(3, 4), torch.ones(4)) == 0


@pytest.mark.parametrize(("largest", "count"), [(5.15, 0), (5.25, 1), (7.0, 1)])
def test_an_outlier_is_above_five_times_the_mean(largest, count):
    """Beside 104 ones, 5.2 is five times the mean."""
    weight = torch.ones(1, 105)
    weight[0, 40] = largest
    assert outliers(weight, torch.ones(105)) == count


def test_shares_are_owls():
    """Its code: (r - min) / (max - min) * 2 lambda, less the mean, plus the share kept."""
    shares = kept_shares([1.0, 2.0, 4.0, 3.0], [10, 10, 10, 10], 0.5)
    ratios = torch.tensor([1.0, 2.0, 4.0, 3.0])
    wanted = (ratios - 1) / 3 * 2 * 0.08
    torch.testing.assert_close(torch.tensor(shares), wanted - wanted.mean() + 0.5)


@given(
    blocks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=40),
    kept=st.floats(0.01, 1.0),
)
def test_the_total_is_kept(blocks, kept):
    ratios, sizes = zip(*blocks, strict=True)
    shares = kept_shares(ratios, sizes, kept)
    assert all(0 < share <= 1 + 1e-12 for share in shares)
    assert max(shares) - min(shares) <= 2 * 0.08 + 1e-12
    total = sum(size * share for size, share in zip(sizes, shares, strict=True))
    assert total == pytest.approx(kept * sum(sizes), rel=1e-9)
    ranked = sorted(zip(ratios, shares, strict=True))
    assert all(one[1] <= other[1] + 1e-12 for one, other in itertools.pairwise(ranked))


def test_blocks_without_layers_have_no_pattern():
    patterns = block_patterns({"a": 1, "b": 0, "c": 3}, {"a": 10, "b": 0, "c": 10}, Sparsity(0.5, scope="layer"))
    assert patterns.keys() == {"a", "c"}
    assert patterns["a"].fraction > 0.5 > patterns["c"].fraction
    assert {pattern.scope for pattern in patterns.values()} == {"layer"}
    assert block_patterns({}, {}, Sparsity(0.5)) == {}


def test_groups_move_as_many_weights_as_shares_do():
    """Above the mean: 0.06 + 0.04 of 10 weights a block, which is 0.8 of a block at 1 / 8 and 0.4 of one at 1 / 4."""
    shares = [0.56, 0.54, 0.48, 0.47, 0.45]
    assert group_sizes(shares, [10] * 5, 4, 8) == [5, 4, 4, 4, 3]
    assert group_sizes(shares, [10] * 5, 2, 4) == [2] * 5
    assert group_sizes([0.7, 0.6, 0.4, 0.3], [10] * 4, 4, 8) == [5, 5, 3, 3]
    assert group_sizes([0.7, 0.6, 0.4, 0.3], [10] * 4, 2, 4) == [3, 2, 2, 1]
    assert group_sizes([0.65, 0.45, 0.45], [10, 20, 10], 4, 8) == [5, 4, 3], "as many weights are lowered as raised"


@given(blocks=st.lists(st.floats(0, 1), min_size=1, max_size=40), pattern=st.sampled_from([(2, 4), (4, 8), (6, 8)]))
def test_groups_of_equal_blocks_keep_the_total(blocks, pattern):
    n, m = pattern
    shares = kept_shares(blocks, [100] * len(blocks), n / m)
    groups = group_sizes(shares, [100] * len(blocks), n, m)
    assert set(groups) <= {n - 1, n, n + 1}
    assert abs(sum(groups) - n * len(groups)) <= 1
    ranked = sorted(zip(shares, groups, strict=True))
    assert all(one[1] <= other[1] for one, other in itertools.pairwise(ranked) if one[0] < other[0])


def with_outliers(make_decoder, family: str = "llama"):
    """Its second block has outliers among its weights."""
    model = make_decoder(family)
    with torch.no_grad():
        for _, layer in linears_of(find_blocks(model)[1].module, ""):
            layer.weight[::5, ::3] *= 9
    return model


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "dass", "cosp", "varp", "ace", "sparsegpt"])
@pytest.mark.parametrize("options", [{}, {"sequential": "none"}, {"update": "lstsq"}], ids=str)
def test_a_block_with_outliers_keeps_more_by_every_metric(make_decoder, ids, method, options):
    model = with_outliers(make_decoder)
    report = prune_model(model, ids, method, 0.5, budgets="outliers", **options)
    kept = {layer.name: layer.kept for layer in report.layers}
    blocks = [[share for name, share in kept.items() if f"layers.{i}." in name] for i in range(3)]
    assert min(blocks[1]) > 0.55 > 0.5 > max(blocks[0] + blocks[2])
    for name, share in kept.items():
        weight = model.get_submodule(name).weight
        assert float((weight != 0).float().mean()) == pytest.approx(share, abs=1e-6)
    sizes = {name: model.get_submodule(name).weight.numel() for name in kept}
    assert sum(kept[name] * size for name, size in sizes.items()) / sum(sizes.values()) == pytest.approx(0.5, abs=0.02)
    assert report.to_dict()["budgets"] == "outliers"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "dass", "cosp", "varp", "ace", "sparsegpt"])
@pytest.mark.parametrize("options", [{}, {"sequential": "none"}, {"update": "lstsq", "permute": True}], ids=str)
def test_of_n_m_a_block_with_outliers_keeps_one_more(make_decoder, ids, method, options):
    model = with_outliers(make_decoder)
    report = prune_model(model, ids, method, "4:8", budgets="outliers", **options)
    patterns = [{layer.pattern for layer in report.layers if f"layers.{i}." in layer.name} for i in range(3)]
    assert patterns[1] == {"5:8"}
    assert sorted([*patterns[0], *patterns[2]]) == ["3:8", "4:8"]
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        groups = (weight if layer.axis == "in" else weight.t()).unflatten(-1, (-1, 8))
        assert int((groups != 0).sum(-1).max()) == int(layer.pattern[0])
    if "permute" in options:
        assert report.permutation is not None
        assert all(layer.after >= layer.before for layer in report.permutation.reordered)
    assert report.sparsity == "4:8"


def test_experts_in_turns(make_decoder, ids):
    report = prune_model(with_outliers(make_decoder, "qwen3_moe"), ids, "wanda", 0.5, budgets="outliers")
    assert len({layer.pattern for layer in report.layers}) == 3
    model = with_outliers(make_decoder)
    report = prune_model(model, ids, "wanda", 0.5, budgets="outliers", sequential="layers")
    assert len({layer.pattern for layer in report.layers}) == 3


def test_what_will_not_do_is_refused(make_decoder, ids):
    model = make_decoder("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for pattern in ("1:2", "1:4", "3:4", "7:8"):
        with pytest.raises(ValueError, match=f"which {pattern} has no room for: give a pattern as 2:4"):
            prune_model(model, ids, "wanda", pattern, budgets="outliers")
    with pytest.raises(ValueError, match="one of outliers, or None; got 'owl'"):
        prune_model(model, ids, "wanda", 0.5, budgets="owl")
    with pytest.raises(ValueError, match="calibration"):
        prune_model(model, None, "magnitude", 0.5, budgets="outliers")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_on_the_command_line(command, tmp_path, tiny_checkpoint, some_text):
    out = tmp_path / "out"
    arguments = ("--sparsity", "0.5", "--budgets", "outliers", "--samples", 4, "--length", 16)
    code, said, _ = command(
        "prune", tiny_checkpoint, out, "--method", "magnitude", "--calibration", some_text, *arguments
    )
    assert code == 0, said
    assert re.search(r"kept in a layer, least to most *│ *4\d\.\d% to 5\d\.\d%", said), said
    report = json.loads((out / "ace_triton.json").read_text())
    assert report["budgets"] == "outliers"
    assert len({layer["pattern"] for layer in report["layers"]}) > 1
    groups = ("--sparsity", "4:8", *arguments[2:])
    out = tmp_path / "groups"
    code, said, _ = command("prune", tiny_checkpoint, out, "--method", "magnitude", "--calibration", some_text, *groups)
    assert code == 0, said
    report = json.loads((out / "ace_triton.json").read_text())
    assert report["sparsity"] == "4:8"
    for pattern in {layer["pattern"] for layer in report["layers"]}:
        assert f"layers at {pattern}" in said
    code, _, said = command("prune", tiny_checkpoint, tmp_path / "other", "--budgets", "outliers", "--sparsity", "1:4")
    assert code != 0
    assert "no room" in said


def test_a_block_that_keeps_too_much_to_be_packed_is_named(make_decoder, save, ids, tmp_path):
    """Groups along the outputs are packed by row, which needs more zeros than 5:8 leaves."""
    source = save(with_outliers(make_decoder))
    recipe = Recipe("wanda", sparsity=Sparsity("4:8", axis="out"), budgets="outliers")
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.\S+ and 6 more: pruned, but not packed: it is 5:8"):
        prune_checkpoint(source, tmp_path / "out", ids, recipe, packed=True)


def test_blocks_of_other_patterns_are_packed(make_decoder, ids):
    """Each layer in the format of what it kept; the packed model writes what the dense one with zeros does."""
    model = with_outliers(make_decoder)
    prune_model(model, ids, "wanda", "4:8", budgets="outliers")
    packed = copy.deepcopy(model)
    report = pack_model(packed)
    assert {layer.pattern for layer in report.layers} == {"3:8", "4:8", "5:8"}
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
