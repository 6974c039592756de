"""Launches for all layers of a block compared with a launch for each layer."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.weight_sums import relative_importance
from ace_triton.kernels.weight_sums_group import group_relative_importance
from benchmarks.conftest import Compare
from benchmarks.harness.block_cases import BLOCK
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ("tests/kernels/test_groups.py",)
SMALL = ((32, 64), (16, 64), (64, 32))


@pytest.fixture
def weights(device: torch.device, tiny: bool) -> list[torch.Tensor]:
    """The weights of a Llama block, or of three small layers."""
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (SMALL if tiny else BLOCK)]


def check_terms(weights: list[torch.Tensor], every: list[ScoreTerms]) -> None:
    """Raise AssertionError unless the sums are those of each weight alone."""
    for weight, terms in zip(weights, every, strict=True):
        for name, vector in relative_importance(weight).tensors.items():
            assert torch.equal(terms.tensors[name], vector)


@pytest.mark.quick
def test_sums_of_a_block(compare: Compare, weights: list[torch.Tensor]) -> None:
    compare(
        Comparison(
            "weight sums of a block",
            (f"{len(weights)} layers",),
            weights[0].dtype,
            lambda: group_relative_importance(weights),
            (Provider("layer by layer", lambda: [relative_importance(weight) for weight in weights]),),
            sum(weight.nbytes for weight in weights),
            lambda: check_terms(weights, group_relative_importance(weights)),
        )
    )


@pytest.mark.quick
def test_selection_in_a_block(compare: Compare, weights: list[torch.Tensor]) -> None:
    every = group_relative_importance(weights)

    def one_by_one() -> list[torch.Tensor]:
        return [select_nm(weight, terms, 2, 4) for weight, terms in zip(weights, every, strict=True)]

    def check() -> None:
        before = [weight.clone() for weight in weights]
        expected = [weight.clone() for weight in one_by_one()]
        for weight, dense in zip(weights, before, strict=True):
            weight.copy_(dense)
        select_nm_group(weights, every, 2, 4)
        assert all(map(torch.equal, weights, expected))

    compare(
        Comparison(
            "selection in a block, 2:4, ria",
            (f"{len(weights)} layers",),
            weights[0].dtype,
            lambda: select_nm_group(weights, every, 2, 4),
            (Provider("layer by layer", one_by_one),),
            2 * sum(weight.nbytes for weight in weights),
            check,
        )
    )
