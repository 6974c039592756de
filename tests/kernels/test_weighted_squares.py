"""weighted_squares against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.weighted_squares import MOST_LAYERS, weighted_squares, weighted_squares_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 300


def token_weights(n_layers: int, tokens: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Weights of which a fifth are 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_layers, tokens.shape[0], generator=generator) + 0.01
    return torch.where(torch.rand(weights.shape, generator=generator) < 0.2, 0.0, weights).to(tokens.device)


def check(tokens: torch.Tensor, weights: torch.Tensor) -> None:
    got = weighted_squares(tokens, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, weighted_squares_reference(tokens, weights), rtol=2e-5, atol=0.0)


@given(
    n_layers=st.integers(1, MOST_LAYERS),
    n_tokens=st.integers(0, MOST),
    channels=st.integers(0, MOST),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, n_layers, n_tokens, channels, dtype, seed):
    tokens = make_matrix(n_tokens, channels, dtype, seed=seed)
    check(tokens, token_weights(n_layers, tokens, seed))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_of_weight_zero_are_not_used(make_matrix, value):
    tokens = make_matrix(30, 40, torch.float32)
    weights = token_weights(3, tokens)
    weights[:, ::4] = 0.0
    tokens[::4] = value
    weights[0, 5], weights[1, 5] = 0.0, 1.0
    tokens[5] = value
    got = weighted_squares(tokens, weights)
    assert got[0].isfinite().all(), "a layer's own zero weight must leave the token out"
    assert not got[1].isfinite().any()
    check(tokens.nan_to_num(0.0, 0.0), torch.where(tokens.isfinite().all(1), weights, 0.0))


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
def test_many_tokens(make_matrix):
    tokens = make_matrix(20000, 40, torch.bfloat16)
    check(tokens, token_weights(3, tokens))


@pytest.mark.parametrize("layout", ["token stride", "transposed", "channel stride"])
def test_any_strides(make_matrix, layout):
    wide = make_matrix(20, 50, torch.bfloat16)
    tokens = {"token stride": wide[:, 3:40], "transposed": wide.t(), "channel stride": wide[:, ::3]}[layout]
    check(tokens, token_weights(2, tokens))
    check(tokens, token_weights(4, tokens)[::2])


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        (torch.zeros(5), torch.zeros(1, 5), "tokens must be"),
        (torch.zeros(5, 4), torch.zeros(1, 4), "weights must be"),
        (torch.zeros(5, 4), torch.zeros(0, 5), "weights must be"),
        (torch.zeros(5, 4), torch.zeros(9, 5), "weights must be"),
        (torch.zeros(5, 4), torch.zeros(2, 5, dtype=torch.float64), "float32"),
    ],
)
def test_says_what_is_wrong(tokens, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_squares(tokens, weights)
