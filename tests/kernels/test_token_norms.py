"""token_norms against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.token_norms import token_norms, token_norms_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 300


def check(outputs: torch.Tensor) -> None:
    got = token_norms(outputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_norms_reference(outputs), rtol=1e-5, atol=0.0)


@given(
    tokens=st.integers(0, MOST), features=st.integers(0, MOST), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000)
)
def test_equals_reference(make_matrix, tokens, features, dtype, seed):
    check(make_matrix(tokens, features, dtype, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(make_matrix, dtype):
    check(make_matrix(3, 1100 if interpreting() else 110000, dtype))


def test_norms_beyond_fp16(make_matrix):
    outputs = torch.full_like(make_matrix(2, 50, torch.float16), 6e4)
    check(outputs)


@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_any_strides(make_matrix, layout):
    wide = make_matrix(20, 50, torch.bfloat16)
    check({"row stride": wide[:, 3:40], "transposed": wide.t(), "column stride": wide[:, ::3]}[layout])


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="n_tokens, out_features"):
        token_norms(torch.zeros(3))
