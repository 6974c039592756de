"""One call of the compiled library on two threads compared with one: what the pool of threads costs and saves."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels import cpu, cpu_library
from benchmarks.conftest import Compare
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ("tests/kernels/test_pool.py",)

SMALLEST_ROWS = 128
"""Rows of 1,024 inputs in fp32: the smallest weight that two threads share."""


@pytest.mark.skipif(not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("rows", [SMALLEST_ROWS, 8 * SMALLEST_ROWS])
def test_two_threads(compare: Compare, rows: int) -> None:
    weight, tokens = torch.randn(rows, 1024), torch.randn(1, 1024)

    def with_threads(count: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return cpu.dense_linear(tokens, weight)
        finally:
            torch.set_num_threads(before)

    def check() -> None:
        assert torch.equal(with_threads(2), with_threads(1))

    compare(
        Comparison(
            f"dense loop, {rows} x 1024, two threads",
            weight.shape,
            weight.dtype,
            lambda: with_threads(2),
            (Provider("one thread", lambda: with_threads(1)),),
            weight.nbytes,
            check,
        )
    )
