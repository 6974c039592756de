"""Launches for many layers as machine code: sums, vectors, checks and the selection, against one layer at a time."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels import weight_sums_group
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.column_scale import ColumnScale, column_scale_reference
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.select_nm_group import select_nm_group, select_nm_group_reference
from ace_triton.kernels.variance_factor import variance_factor_reference
from ace_triton.kernels.vector_group import VectorGroup, grouped_column_scale, grouped_variance_factor
from ace_triton.kernels.weight_sums import relative_importance_reference
from ace_triton.kernels.weight_sums_group import group_relative_importance
from tests.x86.executor import executed_on_x86
from tests.x86.test_selection import bits_of, make_terms, make_weight

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


def test_sums_and_checks(monkeypatch):
    for name in ("MERGED_PARTS", "MERGED_SUMS"):
        monkeypatch.setattr(weight_sums_group, name, 8)  # a small tile compiles faster
    shapes = [(96, 16), (33, 10), (24, 16)]
    weights = [torch.randn(shape, dtype=torch.float32).to(torch.bfloat16) for shape in shapes]
    weights[1][32, 9] = torch.nan
    with executed_on_x86(lanes=1):
        every, flags = group_relative_importance(weights), find_each_not_finite(weights)
    for terms, weight in zip(every, weights, strict=True):
        for name, vector in relative_importance_reference(weight).tensors.items():
            torch.testing.assert_close(terms.tensors[name], vector, rtol=1e-5, atol=0, equal_nan=True)
    assert [int(flag) for flag in flags] == [0, 1, 0]


@pytest.mark.parametrize(("names", "axis"), [(("row", "col", "scale"), "in"), ((), "out")])
def test_selection(names, axis):
    shapes = [(96, 160), (36, 20), (576, 64)]
    weights = [make_weight(*shape, torch.bfloat16) for shape in shapes]
    every = [make_terms(*shape, names) for shape in shapes]
    expected, before = [weight.clone() for weight in weights], [weight.clone() for weight in weights]
    select_nm_group_reference(expected, every, 2, 4, axis)
    good, bad = torch.tensor([[0], [1]], dtype=torch.int32)
    with executed_on_x86(lanes=1):
        select_nm_group(weights, every, 2, 4, axis=axis, unless=[good, bad])
    assert all(torch.equal(bits_of(one), bits_of(other)) for one, other in zip(weights, before, strict=True))
    with executed_on_x86(lanes=1):
        select_nm_group(weights, every, 2, 4, axis=axis, unless=[good])
    assert all(torch.equal(bits_of(one), bits_of(other)) for one, other in zip(weights, expected, strict=True))


def test_vectors():
    squares = [torch.rand(shape, dtype=torch.float32) for shape in ((5, 160), (3, 20))]
    sums = [torch.rand(square.shape[1], dtype=torch.float64) for square in squares]
    with executed_on_x86(lanes=1), VectorGroup():
        factors = [grouped_variance_factor(square, "frobenius", 1.0, 0.01) for square in squares]
        scales = [ColumnScale(s, 3.0, factor=f, sign=-1) for s, f in zip(sums, factors, strict=True)]
        made = [grouped_column_scale(scale) for scale in scales]
    for square, factor in zip(squares, factors, strict=True):
        expected = variance_factor_reference(square, "frobenius", 1.0, 0.01)
        torch.testing.assert_close(factor, expected, rtol=2e-5, atol=0)
    for (vector, not_finite), scale in zip(made, scales, strict=True):
        torch.testing.assert_close(vector, column_scale_reference(scale), rtol=1e-5, atol=0)
        assert not_finite.tolist() == [0]
