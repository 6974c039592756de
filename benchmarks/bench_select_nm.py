"""select_nm compared with an in-place pass over the same bytes, for each family of terms, pattern and output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from benchmarks.conftest import Compare
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.matrices import Matrix, check_sample

TESTS = ("tests/kernels/test_select_nm.py",)
WRITTEN = {"weight": None, "mask": 1, "bits": 1 / 8}


@pytest.fixture
def against_pass(compare: Compare, matrix: Matrix) -> Callable[..., None]:
    """against_pass(metric, n, m, axis, output): time a selection of the matrix."""

    def run(metric: str, n: int, m: int, axis: str = "in", output: str = "weight") -> None:
        weight, terms = matrix.weight, matrix.terms(metric)
        written = WRITTEN[output] or weight.element_size()

        def select(part: torch.Tensor, its_terms: ScoreTerms) -> torch.Tensor:
            return select_nm(part, its_terms, n, m, axis=axis, output=output)

        def reference(part: torch.Tensor, its_terms: ScoreTerms) -> torch.Tensor:
            return select_nm_reference(part, its_terms, n, m, axis=axis, output=output)

        variant = f", axis {axis}" * (axis != "in") + f", {output}" * (output != "weight")
        compare(
            Comparison(
                f"select_nm {n}:{m}, {metric}{variant}",
                weight.shape,
                weight.dtype,
                lambda: select(weight, terms),
                (Provider("mul_(1)", lambda: weight.mul_(1)),),
                int(weight.nbytes + weight.numel() * written),
                lambda: check_sample(matrix, metric, m, select, reference),
                matrix.restore,
            )
        )

    return run


@pytest.mark.quick
@pytest.mark.parametrize("metric", ["wanda", "ria", "ace"])
def test_two_of_four(against_pass: Callable[..., None], metric: str) -> None:
    against_pass(metric, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 8), (8, 16), (16, 32)])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_other_patterns(against_pass: Callable[..., None], n: int, m: int, axis: str) -> None:
    against_pass("wanda", n, m, axis)


@pytest.mark.parametrize("output", ["mask", "bits"])
def test_masks(against_pass: Callable[..., None], output: str) -> None:
    against_pass("wanda", 2, 4, output=output)
