"""weight_sums against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.weight_sums import (
    relative_importance,
    relative_importance_reference,
    weight_sums,
    weight_sums_reference,
)
from tests.kernels.test_column_scale import made_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 300


def check(weight: torch.Tensor) -> None:
    for got, expected in zip(weight_sums(weight), weight_sums_reference(weight), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


def check_terms(got: ScoreTerms, expected: ScoreTerms) -> None:
    assert set(got.tensors) == set(expected.tensors)
    for name, tensor in got.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-5, atol=0.0, equal_nan=True)
    assert got.power == expected.power == 1
    assert got.finite is not None
    assert expected.finite is not None
    for name, tensor in got.tensors.items():
        passed = got.finite.passed(tensor, is_term=True)
        assert passed is expected.finite.passed(expected.tensors[name], is_term=True) is not None


@given(
    rows=st.integers(0, MOST),
    cols=st.integers(0, MOST),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(["normal", "ties"]),
    seed=st.integers(0, 1000),
    parts=st.sets(st.sampled_from(["square", "base", "factor"])),
    sign=st.sampled_from([1, -1]),
    exponent=st.sampled_from([1, 0.75, 0.5]),
)
def test_equals_reference(make_matrix, rows, cols, dtype, values, seed, parts, sign, exponent):
    weight = make_matrix(rows, cols, dtype, values, seed)
    check(weight)
    scale = made_of(cols, parts, sign, seed, exponent) if parts else None
    check_terms(relative_importance(weight, scale), relative_importance_reference(weight, scale))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_terms_show_a_weight_that_is_not_finite(make_matrix, value):
    weight = make_matrix(20, 50, torch.bfloat16)
    weight[7], weight[:, 9] = 0.0, 0.0
    of_zeros = relative_importance(weight)
    check_terms(of_zeros, relative_importance_reference(weight))
    assert of_zeros.finite is not None
    assert of_zeros.finite.passed(weight) is True
    weight[3, 5] = value
    assert weight_sums(weight).not_finite.tolist() == [1]
    terms = relative_importance(weight)
    check_terms(terms, relative_importance_reference(weight))
    assert terms.finite is not None
    assert terms.finite.passed(weight) is False
    assert terms.row is not None
    assert terms.col is not None
    assert terms.row.isnan().nonzero().tolist() == [[3]]
    assert terms.col.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("part", ["square", "base", "factor"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_terms_show_a_scale_that_is_not_finite(make_matrix, part, value):
    weight, scale = make_matrix(20, 50, torch.bfloat16), made_of(50, {"square", "base", "factor"})
    scale.vectors()[part][49] = value
    terms = relative_importance(weight, scale)
    assert terms.finite is not None
    assert terms.finite.passed(weight) is False
    assert terms.scale is not None
    assert terms.scale.isfinite().tolist() == [True] * 49 + [False]


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3000, 1111), (257, 9000), (1, 70000), (70000, 1)])
def test_layer_sized(make_matrix, dtype, shape):
    check(make_matrix(*shape, dtype))


@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_any_strides(make_matrix, layout):
    wide = make_matrix(20, 50, torch.bfloat16)
    check({"row stride": wide[:, 3:40], "transposed": wide.t(), "column stride": wide[:, ::3]}[layout])


def test_same_result_on_every_run(make_matrix):
    weight = make_matrix(*((30, 40) if interpreting() else (700, 900)), torch.float16)
    first, second = weight_sums(weight), weight_sums(weight)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="out_features"):
        weight_sums(torch.zeros(3))
    with pytest.raises(ValueError, match="got 5 columns"):
        relative_importance(torch.zeros(3, 4), made_of(5, {"base"}))
