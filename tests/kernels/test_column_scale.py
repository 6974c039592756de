"""column_scale against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.column_scale import ColumnScale, checked_column_scale, column_scale, column_scale_reference
from ace_triton.kernels.weight_sums import relative_importance


def made_of(cols: int, parts: set[str], sign: int = 1, seed: int = 0, exponent: float = 1.0) -> ColumnScale:
    generator = torch.Generator().manual_seed(seed)
    square, base, factor = torch.rand(3, cols, generator=generator, dtype=torch.float64) * 7 + 0.01
    return ColumnScale(
        square if "square" in parts else None,
        123.456,
        base.float() if "base" in parts else None,
        factor.float() if "factor" in parts else None,
        sign,
        exponent,
    )


@given(
    cols=st.integers(0, 300),
    parts=st.sets(st.sampled_from(["square", "base", "factor"]), min_size=1),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 1000),
    exponent=st.sampled_from([1, 0.75, 0.5]),
)
def test_equals_reference(cols, parts, sign, seed, exponent):
    of = made_of(cols, parts, sign, seed, exponent)
    scale, not_finite = checked_column_scale(of)
    torch.testing.assert_close(scale, column_scale_reference(of), rtol=1e-6, atol=0.0)
    assert not any(not_finite.tolist())


@pytest.mark.parametrize("part", ["square", "base", "factor"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 700, 1535])
def test_sees_what_is_not_finite(part, bad, place):
    of = made_of(1536, {"square", "base", "factor"})
    of.vectors()[part][place] = bad
    assert any(checked_column_scale(of).not_finite.tolist())


@pytest.mark.parametrize("exponent", [1, 0.75, 0.5])
@pytest.mark.parametrize("part", ["base", "factor"])
def test_sees_a_scale_below_zero(part, exponent):
    of = made_of(1536, {"square", "base", "factor"}, exponent=exponent)
    of.vectors()[part][900] *= -1
    assert any(checked_column_scale(of).not_finite.tolist())
    terms = relative_importance(torch.ones(4, 1536), of)
    assert terms.finite.passed(terms.scale, is_term=True) is False


def test_sees_what_overflows_in_the_product():
    of = ColumnScale(base=torch.tensor([1.0, 1e30]), factor=torch.tensor([1.0, 1e30]))
    assert any(checked_column_scale(of).not_finite.tolist())


def test_squares_of_zero_and_beyond_fp32s_range_of_squares():
    of = ColumnScale(torch.tensor([0.0, 1e-30, 1e30, torch.nan, torch.inf], dtype=torch.float64), 4.0)
    expected = torch.tensor([0.0, 5e-16, 5e14, torch.nan, torch.inf])
    torch.testing.assert_close(column_scale(of), expected, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs square, base or factor"),
        ({"base": torch.ones(3), "factor": torch.ones(4)}, "of the same length"),
        ({"base": torch.ones(3, dtype=torch.float64)}, "base must be a contiguous torch.float32"),
        ({"square": torch.ones(3)}, "square must be a contiguous torch.float64"),
        ({"factor": torch.ones(6)[::2]}, "factor must be a contiguous"),
        ({"factor": torch.ones(3), "sign": 0}, "sign must be"),
        ({"factor": torch.ones(3), "exponent": 0.7}, "exponent of a column scale must be 1, 0.75 or 0.5, got 0.7"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColumnScale(**arguments)
