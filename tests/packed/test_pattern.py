import pytest
import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.packed.pattern import FoundPattern, find_pattern


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
