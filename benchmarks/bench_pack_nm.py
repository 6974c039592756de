"""pack_nm, and scoring, pruning and packing in one pass, compared with plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ace_triton.kernels.pack_nm import PackedNM, pack_nm, pack_nm_reference, pack_scored, pack_scored_reference
from ace_triton.kernels.select_nm import select_nm
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.matrices import Matrix

TESTS = ("tests/kernels/test_pack_nm.py",)

CPU_ROWS = 512
"""Rows of the matrix that are used on a CPU, where plain torch is slow."""


@pytest.mark.parametrize("scored", [False, True], ids=["pruned", "scored"])
def test_two_of_four(compare: Compare, matrix: Matrix, scored: bool) -> None:
    terms = matrix.terms("wanda")
    dense = matrix.dense if matrix.dense.is_cuda else matrix.dense[:CPU_ROWS]
    weight = dense if scored else select_nm(dense.clone(), terms, 2, 4)

    def ours() -> PackedNM:
        return pack_scored(weight, terms, 2, 4) if scored else pack_nm(weight, 2, 4)

    def theirs() -> PackedNM:
        return pack_scored_reference(weight, terms, 2, 4) if scored else pack_nm_reference(weight, 2, 4)

    compare(
        Comparison(
            "score and pack 2:4, wanda" if scored else "pack_nm 2:4",
            weight.shape,
            weight.dtype,
            ours,
            (Provider("plain torch", theirs), Provider("read of the weight", lambda: weight.sum())),
            weight.nbytes + weight.nbytes // 2 + weight.numel() // 8,
            lambda: check_same(ours, theirs),
        )
    )


def check_same(ours: Callable[[], PackedNM], theirs: Callable[[], PackedNM]) -> None:
    found, expected = ours(), theirs()
    if not (torch.equal(found.values, expected.values) and torch.equal(found.meta, expected.meta)):
        raise Disagreement("packed values or their places differ from the plain-torch reference")
