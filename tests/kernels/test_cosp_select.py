"""cosp_select against the reference, bit for bit. Inputs are small integers, so every sum is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.cosp_select import cosp_select, cosp_select_reference
from ace_triton.kernels.score_terms import ScoreTerms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = ((2, 4), (1, 2), (4, 8), (3, 4), (8, 16), (5, 32))
MOST = 40 if interpreting() else 100


def whole_numbers(*shape: int, seed: int = 0, most: int = 3) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def check(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    pattern: tuple[int, int],
    reduce: str,
) -> None:
    given_arguments = (terms, tokens, outputs, token_weights, *pattern)
    expected = cosp_select_reference(weight.clone(), *given_arguments, reduce=reduce)
    got = cosp_select(weight, *given_arguments, reduce=reduce)
    assert got is weight
    assert torch.equal(got.signbit(), expected.signbit())
    assert torch.equal(got, expected)


@given(
    n_tokens=st.integers(0, MOST),
    rows=st.integers(1, MOST),
    groups=st.integers(1, 9),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(["abs", "rms"]),
    present=st.sampled_from([(), ("scale",), ("row",), ("row", "col", "scale")]),
    power=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    make_matrix, make_terms, n_tokens, rows, groups, pattern, dtype, reduce, present, power, seed
):
    cols = groups * pattern[1]
    weight = make_matrix(rows, cols, dtype, "normal", seed)
    tokens = whole_numbers(n_tokens, cols, seed=seed).to(weight)
    outputs = whole_numbers(n_tokens, rows, seed=seed + 1).to(weight)
    token_weights = whole_numbers(n_tokens, seed=seed + 2, most=1).abs().to(weight.device)
    check(weight, make_terms(rows, cols, present, power), tokens, outputs, token_weights, pattern, reduce)


@pytest.mark.parametrize("reduce", ["abs", "rms"])
def test_ties_prune_the_lower_index_first(make_matrix, reduce):
    weight = torch.ones_like(make_matrix(6, 16, torch.bfloat16))
    tokens, outputs = torch.ones_like(weight[:3]), torch.ones(3, 6).to(weight)
    check(weight, ScoreTerms(), tokens, outputs, torch.ones(3, device=weight.device), (2, 4), reduce)
    assert torch.equal(weight.view(-1, 4)[0].float().cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_of_weight_zero_are_not_used(make_matrix, value):
    weight = make_matrix(20, 40, torch.float16)
    tokens, outputs = whole_numbers(30, 40).to(weight), whole_numbers(30, 20, seed=1).to(weight)
    token_weights = torch.ones(30, device=weight.device)
    token_weights[::4] = 0.0
    tokens[::4], outputs[::8] = value, value
    check(weight, ScoreTerms(), tokens, outputs, token_weights, (2, 4), "abs")


@pytest.mark.parametrize("layout", ["row stride", "transposed"])
def test_any_strides(make_matrix, layout):
    wide = make_matrix(24, 60, torch.float32)
    weight = wide[:, 3:43] if layout == "row stride" else wide.t()
    rows, cols = weight.shape
    beside = whole_numbers(17, 240).to(weight)
    token_weights = torch.ones(17, device=weight.device)
    check(weight, ScoreTerms(), beside[:, :cols], beside[:, 100 : 100 + 2 * rows : 2], token_weights, (2, 4), "abs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce": "mean"}, "reduce must be"),
        ({"token_weights": torch.ones(4)}, "coupling needs"),
        ({"outputs": torch.ones(5, 4)}, "need a weight of shape"),
        ({"terms": ScoreTerms(coupling=torch.ones(3, 8))}, "leave it out"),
        ({"m": 3}, "m must be"),
        ({"weight": torch.zeros(3, 8, dtype=torch.float64)}, "weight must be"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    given_arguments = {
        "weight": torch.ones(3, 8),
        "terms": ScoreTerms(),
        "tokens": torch.ones(5, 8),
        "outputs": torch.ones(5, 3),
        "token_weights": torch.ones(5),
        "n": 2,
        "m": 4,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        cosp_select(**given_arguments)
