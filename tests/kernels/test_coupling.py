"""coupling against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.coupling import coupling, coupling_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 150


def token_weights(tokens: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Weights near 1, of which a fifth are 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens.shape[0], generator=generator) + 0.5
    return torch.where(torch.rand(weights.shape, generator=generator) < 0.2, 0.0, weights).to(tokens.device)


def check(tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: str) -> None:
    expected = coupling_reference(tokens, outputs, weights, reduce)
    torch.testing.assert_close(coupling(tokens, outputs, weights, reduce), expected, rtol=1e-4, atol=1e-4)


@given(
    n_tokens=st.integers(0, MOST),
    rows=st.integers(1, MOST),
    cols=st.integers(1, MOST),
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(["abs", "rms"]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, n_tokens, rows, cols, dtype, reduce, seed):
    tokens = make_matrix(n_tokens, cols, dtype, seed=seed)
    outputs = make_matrix(n_tokens, rows, dtype, seed=seed + 1)
    check(tokens, outputs, token_weights(tokens, seed), reduce)


@pytest.mark.parametrize("reduce", ["abs", "rms"])
def test_batches_add_up(make_matrix, reduce):
    tokens, outputs = make_matrix(40, 30, torch.float32), make_matrix(40, 20, torch.float32, seed=1)
    weights = token_weights(tokens)
    total = None
    for part in (slice(0, 7), slice(7, 7), slice(7, 40)):
        before = total
        total = coupling(tokens[part], outputs[part], weights[part], reduce, into=total)
        assert before is None or total is before
    torch.testing.assert_close(total, coupling_reference(tokens, outputs, weights, reduce), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduce", ["abs", "rms"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_of_weight_zero_are_not_used(make_matrix, reduce, value):
    tokens, outputs = make_matrix(30, 40, torch.float16), make_matrix(30, 20, torch.float16, seed=1)
    weights = token_weights(tokens)
    weights[::4] = 0.0
    tokens[::4] = value
    outputs[::8] = value
    check(tokens, outputs, weights, reduce)


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
@pytest.mark.parametrize("reduce", ["abs", "rms"])
def test_many_tokens(make_matrix, reduce):
    tokens, outputs = make_matrix(5000, 30, torch.bfloat16), make_matrix(5000, 20, torch.bfloat16, seed=1)
    check(tokens, outputs, token_weights(tokens), reduce)


@pytest.mark.parametrize("reduce", ["abs", "rms"])
def test_squares_beyond_fp16(make_matrix, reduce):
    tokens = make_matrix(20, 24, torch.float16) * 1000
    outputs = make_matrix(20, 16, torch.float16, seed=1) * 1000
    weights = torch.full((20,), 1e-6, device=tokens.device)
    check(tokens, outputs, weights, reduce)


def test_any_strides(make_matrix):
    wide = make_matrix(20, 50, torch.bfloat16)
    tokens, outputs = wide[:, 3:40], wide[:, ::3]
    check(tokens, outputs, token_weights(tokens), "abs")
    check(wide.t(), wide.t()[:, :7], token_weights(wide.t()), "rms")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce": "mean"}, "reduce must be"),
        ({"weights": torch.ones(4)}, "coupling needs"),
        ({"outputs": torch.ones(4, 3)}, "coupling needs"),
        ({"into": torch.zeros(6, 3)}, "into must be"),
        ({"into": torch.zeros(3, 6, dtype=torch.float64)}, "into must be"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    given_arguments = {
        "tokens": torch.ones(5, 6),
        "outputs": torch.ones(5, 3),
        "weights": torch.ones(5),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        coupling(**given_arguments)
