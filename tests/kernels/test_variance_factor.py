"""variance_factor against the fp64 reference."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.variance_factor import VarianceNorm, variance_factor, variance_factor_reference

NORMS = get_args(VarianceNorm)


def make_squares(sequences: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Sums of squares with some channels of 0, one sequence of 0, and one dominant entry."""
    square = torch.randn(sequences, channels, generator=torch.Generator().manual_seed(seed)).square()
    square[:, ::7] = 0.0
    square[sequences // 2] = 0.0
    square[-1, -1] = 1e6
    return square


def check(square: torch.Tensor, norm: VarianceNorm, power: float = 1.0, eps: float = 0.01) -> None:
    got, expected = variance_factor(square, norm, power, eps), variance_factor_reference(square, norm, power, eps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0.0)


@given(
    sequences=st.integers(1, 100),
    channels=st.integers(1, 200),
    norm=st.sampled_from(NORMS),
    power=st.sampled_from([1.0, 0.5, 2.0]),
    eps=st.sampled_from([0.01, 0.5]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(sequences, channels, norm, power, eps, seed):
    check(make_squares(sequences, channels, seed), norm, power, eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2000)] if interpreting() else [(1, 1), (3, 30000), (3000, 70)])
def test_any_shape(norm, shape):
    check(make_squares(*shape), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_any_strides_and_no_channels(norm):
    check(make_squares(6, 40)[::2, 3:], norm)
    check(make_squares(6, 40).t(), norm)
    assert variance_factor(torch.zeros(4, 0), norm, 1.0, 0.01).shape == (0,)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_shows_what_is_not_finite(norm, value):
    square = make_squares(5, 40)
    square[2, 17] = value
    assert not bool(variance_factor(square, norm, 1.0, 0.01)[17].isfinite())


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="eps must be in"):
        variance_factor(torch.ones(2, 2), "channel", 1.0, 0.0)
    with pytest.raises(ValueError, match="norm must be"):
        variance_factor(torch.ones(2, 2), "largest", 1.0, 0.01)
