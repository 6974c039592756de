"""weight_sums compared with RIA's two sums in torch."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.weight_sums import weight_sums
from benchmarks.conftest import Compare
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.matrices import Matrix

TESTS = ("tests/kernels/test_weight_sums.py",)


@pytest.mark.quick
def test_row_and_column_sums(compare: Compare, matrix: Matrix) -> None:
    weight = matrix.weight

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        magnitude = weight.float().abs()
        return magnitude.sum(1), magnitude.sum(0)

    def check() -> None:
        for our_sums, their_sums in zip(weight_sums(weight)[:2], theirs(), strict=True):
            torch.testing.assert_close(our_sums, their_sums, rtol=1e-4, atol=0)

    compare(
        Comparison(
            "weight_sums",
            weight.shape,
            weight.dtype,
            lambda: weight_sums(weight),
            (Provider("two sums in torch", theirs),),
            weight.nbytes,
            check,
        )
    )
