import pytest
import torch
from torch import nn

from ace_triton import ArgumentError, Quantization, pack_model, unpack_model
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.packed.pattern import FoundPattern, find_pattern
from ace_triton.solvers.quantize import rounded_weight
from ace_triton.streaming.streamed_pack import pattern_in


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (5, 16), (1, 2), (31, 32)])
def test_patterns_are_found(n, m):
    weight = select_nm(torch.randn(64, 64), ScoreTerms(), n, m)
    assert find_pattern(weight) == FoundPattern(dense=False, nm=(n, m))
    assert find_pattern(weight.t()) == FoundPattern(dense=False, nm=(n, m), across="outputs")


def test_a_stack_of_experts_counts_as_one():
    stack = torch.stack([select_nm(torch.randn(8, 16), ScoreTerms(), 2, 4) for _ in range(3)])
    assert find_pattern(stack) == FoundPattern(dense=False, nm=(2, 4))
    assert find_pattern(stack.mT) == FoundPattern(dense=False, nm=(2, 4), across="the middle axis")


def test_dense_and_unstructured_weights_have_no_pattern():
    assert find_pattern(torch.randn(8, 8)) == FoundPattern(dense=True)
    assert find_pattern(torch.ones(0, 4)) == FoundPattern(dense=True)
    assert find_pattern(select_rows(torch.randn(128, 128), ScoreTerms(), 64)) == FoundPattern(dense=False)


def test_kept_weights_that_are_rounded_to_zero_hide_no_pattern():
    """A mask that does not depend on the size of weights keeps small ones, which 4 bits round to 0."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(64, 32, 16, generator=generator).argsort(-1).lt(8).flatten(1)
    layer = nn.Linear(512, 64, bias=False)
    with torch.no_grad():
        weight = torch.randn(64, 512, generator=generator) * kept
        layer.weight.copy_(rounded_weight(weight, Quantization(4), torch.float32))
    assert float((layer.weight != 0).float().mean()) < 0.45
    assert find_pattern(layer.weight).nm is None
    assert find_pattern(layer.weight, rounded=True).nm == (8, 16)
    before, model = layer.weight.detach().clone(), nn.Sequential(layer)
    assert [(entry.pattern, entry.bits) for entry in pack_model(model, bits=4).layers] == [("8:16", 4)]
    unpack_model(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("outputs", "group"), [(2, 128), (4, 32)])
def test_a_dense_weight_with_zeros_of_rounding_is_packed_dense(outputs, group):
    """In a small one each group of 32 has zeros by chance."""
    layer = nn.Linear(128, outputs, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        weight = torch.randn(outputs, 128, generator=torch.Generator().manual_seed(0))
        layer.weight.copy_(rounded_weight(weight, Quantization(4, group), torch.bfloat16))
    assert 0.08 < float((layer.weight == 0).float().mean()) < 0.25
    nm = find_pattern(layer.weight, rounded=True).nm
    assert nm == find_pattern(layer.weight).nm
    assert (nm is None) == (outputs == 4)
    before, model = layer.weight.detach().clone(), nn.Sequential(layer)
    [packed] = pack_model(model, group=group, dense_bits=4).layers
    assert (packed.pattern, packed.bits) == ("dense", 4)
    unpack_model(model)
    assert torch.equal(model[0].weight, before)


def test_the_pattern_that_the_model_was_pruned_to_is_tried():
    """Of heavy-tailed weights 4 bits round so many to 0 that the zeros show no pattern."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 512, generator=generator) / torch.rand(64, 512, generator=generator)
    pruned = select_nm(dense, ScoreTerms(), 8, 16)
    layer = nn.Linear(512, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(rounded_weight(pruned, Quantization(4), torch.float32))
    assert find_pattern(layer.weight, rounded=True).nm is None
    before, model = layer.weight.detach().clone(), nn.Sequential(layer)
    with pytest.raises(ArgumentError, match="follow no pattern"):
        pack_model(model, bits=4, pruned_to="50%")
    assert [(entry.pattern, entry.bits) for entry in pack_model(model, bits=4, pruned_to="8:16").layers] == [
        ("8:16", 4)
    ]
    unpack_model(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("report", "pattern"),
    [
        ({"recipe": {"sparsity": {"pattern": "8:16", "axis": None, "scope": "row"}}}, "8:16"),
        ({"recipe": {"sparsity": {"pattern": 0.5}}}, None),
        ({"recipe": {"sparsity": {"pattern": "9:x"}}}, None),
        ({"recipe": []}, None),
        (None, None),
    ],
)
def test_the_pattern_in_a_report(report, pattern):
    assert pattern_in(report) == pattern


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (FoundPattern(dense=True), "dense"),
        (FoundPattern(dense=False), "unstructured"),
        (FoundPattern(dense=False, nm=(2, 4)), "2:4"),
        (FoundPattern(dense=False, nm=(4, 8), across="outputs"), "4:8 along outputs"),
        (FoundPattern(dense=False, nm=(4, 8), across="the middle axis"), "4:8 along the middle axis"),
    ],
)
def test_its_text(found, words):
    assert str(found) == words


@pytest.mark.parametrize(("zeros", "dense"), [(0.04, True), (0.06, False)])
def test_few_zeros_without_a_pattern_are_no_pruning(zeros, dense):
    weight = torch.ones(50, 64)
    weight[: int(50 * zeros)] = 0
    assert find_pattern(weight) == FoundPattern(dense=dense)
