"""round_groups against what packing stores, bit for bit, and against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.pack_nm import pack_nm, pack_scored
from ace_triton.kernels.packed_dense import dequantize_dense, quantize_dense
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.round_groups import round_groups, round_groups_reference
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT = (torch.float32, torch.float16) if interpreting() else DTYPES
"""Dtypes of scales and results that are exact; the interpreter truncates to bf16."""

MOST_COLS = 300 if interpreting() else 3000


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if all bits are equal; any NaN equals any other."""
    nan = expected.isnan()
    signs = torch.equal(got[~nan].signbit(), expected[~nan].signbit())
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan], expected[~nan]) and signs


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    pattern=st.sampled_from([(2, 4), (8, 16), (5, 32), (1, 4)]),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 96, 128, 1024]),
    dtype=st.sampled_from(EXACT),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_it_gives_what_packing_stores(make_matrix, rows, groups, pattern, bits, group, dtype, scale, seed):
    n, m = pattern
    weight = unpack_nm(pack_scored(make_matrix(rows, groups * m, dtype, seed=seed) * scale, ScoreTerms(), n, m))
    into = torch.full_like(weight, torch.nan)
    assert round_groups(weight.float(), bits, group, dtype, into) is into
    stored = unpack_nm(quantize_nm(pack_nm(weight, n, m), bits, group))
    assert same_bits(into, stored)
    assert not into[weight == 0].any()
    assert torch.equal(unpack_nm(quantize_nm(pack_nm(into, n, m), bits, group)), into)
    assert same_bits(round_groups(into.float(), bits, group, dtype).to(dtype), into)


@given(
    rows=st.integers(0, 5),
    cols=st.integers(0, MOST_COLS),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 96, 256, 2**20]),
    dtype=st.sampled_from(EXACT),
    kept=st.sampled_from(EXACT),
    values=st.sampled_from(["normal", "ties", "special"]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, rows, cols, bits, group, dtype, kept, values, seed):
    weight = make_matrix(rows, cols, torch.float32, values, seed=seed)
    into = torch.full_like(weight, 5.0, dtype=kept)
    assert round_groups(weight, bits, group, dtype, into) is into
    if weight.numel():
        assert same_bits(into, round_groups_reference(weight, bits, group, dtype).to(kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_row_is_a_group_and_the_weight_may_be_overwritten(make_matrix, dtype):
    weight = make_matrix(3, 4000 if interpreting() else 20_000, dtype).float()
    expected = round_groups_reference(weight, 4, 2**20, dtype)
    assert len(expected[0].unique()) <= 15
    assert round_groups(weight, 4, 2**20, dtype, into=weight) is weight
    assert same_bits(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpruned_weights_round_to_what_packing_stores(make_matrix, dtype):
    weight = make_matrix(5, 200, dtype)
    stored = dequantize_dense(quantize_dense(weight, 8, 64), torch.float32)
    assert same_bits(round_groups(weight.float(), 8, 64, dtype), stored + 0.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_values_beyond_the_range_of_scales_become_its_largest_number(device, bits):
    weight = torch.zeros(2, 64, device=device)
    weight[0, :4] = torch.tensor([1e5, -3e38, 65504.0, 1.0])
    weight[1, 40] = 2.0
    rounded = round_groups(weight, bits, 32, torch.float16)
    assert rounded[0, :4].tolist() == [65504.0, -65504.0, 65504.0, 0.0]
    assert rounded[1, 40] == 2.0
    assert bool(rounded.half().isfinite().all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_that_is_not_finite_is_seen(device, broken, dtype):
    weight = torch.ones(2, 100, device=device)
    weight[1, 40] = broken
    rounded = round_groups(weight, 4, 32, dtype)
    assert rounded.isnan().nonzero().tolist() == [[1, column] for column in range(32, 64)]


def test_a_group_whose_scale_underflows_becomes_zero(device):
    weight = torch.full((1, 32), -1e-9, device=device)
    rounded = round_groups(weight, 8, 32, torch.float16)
    assert not rounded.any()
    assert not rounded.signbit().any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.ones(2, 64).bfloat16()}, "values to round must be fp32"),
        ({"values": torch.ones(64)}, r"must be fp32 \[rows, cols\]"),
        ({"values": torch.ones(64, 2).t()}, "and contiguous"),
        ({"into": torch.ones(2, 63)}, r"into must be .* \(2, 64\) and contiguous"),
        ({"into": torch.ones(2, 64, dtype=torch.float64)}, "into must be float32, float16 or bfloat16"),
        ({"into": torch.ones(64, 2).t()}, "and contiguous"),
        ({"dtype": torch.float64}, "scales must be float32, float16 or bfloat16, got torch.float64"),
        ({"bits": 3}, "bits must be one of 8, 4; got 3"),
        ({"group": 48}, "must be a multiple of 32 above 0"),
    ],
)
def test_says_what_is_wrong(changed, message):
    words = {"values": torch.ones(2, 64), "bits": 8, "group": 32, "dtype": torch.float32}
    with pytest.raises(ArgumentError, match=message):
        round_groups(**{**words, **changed})
