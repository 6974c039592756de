"""moments against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.moments import Moments, moments, moments_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS = 20 if interpreting() else 300
MOST_CHANNELS = 40 if interpreting() else 200


def check(got: Moments, expected: Moments, magnitude: float = 1.0) -> None:
    assert got.count == expected.count
    assert torch.equal(got.sequence_count, expected.sequence_count)
    assert got.sequence_count.dtype == torch.int64
    near = {"rtol": 2e-5, "atol": 0.0}
    torch.testing.assert_close(got.sequence_square, expected.sequence_square, **near)
    torch.testing.assert_close(got.deviation, expected.deviation, rtol=2e-5, atol=1e-30)
    tolerance = 5e-7 * magnitude * max(expected.count, 1)
    torch.testing.assert_close(got.total, expected.total, rtol=5e-6, atol=tolerance)


@given(
    sequences=st.integers(0, 5),
    length=st.integers(0, MOST_TOKENS),
    channels=st.integers(1, MOST_CHANNELS),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, sequences, length, channels, dtype, masked, seed):
    tokens = make_matrix(sequences * length, channels, dtype, seed=seed).reshape(sequences, length, channels)
    valid = None
    if masked:
        generator = torch.Generator().manual_seed(seed)
        valid = (torch.rand(sequences, length, generator=generator) < 0.7).to(tokens.device)
        tokens[~valid] = torch.nan
    check(moments(tokens, valid), moments_reference(tokens, valid))


@pytest.mark.parametrize("length", [1, 16, 37] if interpreting() else [1, 16, 130, 2048])
def test_large_means_do_not_cancel(make_matrix, length):
    tokens = (make_matrix(2 * length, 48, torch.float32) + 1000.0).reshape(2, length, 48)
    check(moments(tokens), moments_reference(tokens), magnitude=1000.0)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_massive_token(make_matrix, where):
    length = 24 if interpreting() else 700
    tokens = make_matrix(length, 33, torch.float32)
    tokens[{"first": 0, "middle": length // 2, "last": -1}[where]] *= 1000.0
    check(moments(tokens), moments_reference(tokens), magnitude=10.0)


def test_constant_tokens_do_not_deviate(make_matrix):
    tokens = torch.full_like(make_matrix(50, 20, torch.float32), 1234.5)
    assert torch.equal(moments(tokens).deviation, torch.zeros(20, device=tokens.device))


def test_one_sequence_may_drop_its_dimension(make_matrix):
    tokens = make_matrix(30, 20, torch.bfloat16)
    valid = torch.arange(30, device=tokens.device) % 3 > 0
    check(moments(tokens, valid), moments_reference(tokens[None], valid[None]))


@pytest.mark.parametrize("all_left_out", [True, False])
def test_no_tokens(make_matrix, all_left_out):
    tokens = make_matrix(12 if all_left_out else 0, 20, torch.float16).reshape(3, -1, 20)
    valid = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    got = moments(tokens, valid)
    assert got.count == 0
    for sums in (got.total, got.deviation, got.sequence_square):
        assert torch.equal(sums, torch.zeros_like(sums))


@pytest.mark.parametrize("layout", ["token stride", "sequence stride", "transposed", "channel stride"])
def test_any_strides(make_matrix, layout):
    wide = make_matrix(24, 60, torch.float32).reshape(4, 6, 60)
    tokens = {
        "token stride": wide[..., 5:38],
        "sequence stride": wide[::2, 1:],
        "transposed": wide.transpose(0, 1),
        "channel stride": wide[..., ::2],
    }[layout]
    check(moments(tokens), moments_reference(tokens))


def test_same_result_on_every_run(make_matrix):
    tokens = make_matrix(40 if interpreting() else 4000, 96, torch.bfloat16)
    first, second = moments(tokens), moments(tokens)
    for name in ("total", "deviation", "sequence_square"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("shape", "valid", "message"),
    [
        ((5,), None, "tokens must be"),
        ((2, 3, 4, 5), None, "tokens must be"),
        ((2, 3, 4), torch.ones(3, 2, dtype=torch.bool), "valid must be bool"),
        ((2, 3, 4), torch.ones(2, 3), "valid must be bool"),
    ],
)
def test_says_what_is_wrong(shape, valid, message):
    with pytest.raises(ValueError, match=message):
        moments(torch.zeros(shape), valid)
