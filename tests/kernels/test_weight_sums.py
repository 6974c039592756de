"""weight_sums against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.weight_sums import weight_sums, weight_sums_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 300


def check(weight: torch.Tensor, *, inverse: bool = False) -> None:
    sums = weight_sums(weight, inverse=inverse)
    for got, expected in zip(sums, weight_sums_reference(weight, inverse=inverse), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0, equal_nan=True)


@given(
    rows=st.integers(0, MOST),
    cols=st.integers(0, MOST),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(["normal", "ties"]),
    seed=st.integers(0, 1000),
    inverse=st.booleans(),
)
def test_equals_reference(make_matrix, rows, cols, dtype, values, seed, inverse):
    check(make_matrix(rows, cols, dtype, values, seed), inverse=inverse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inverses_show_what_is_not_finite(make_matrix, value):
    weight = make_matrix(20, 50, torch.bfloat16)
    weight[7], weight[:, 9] = 0.0, 0.0
    check(weight, inverse=True)
    weight[3, 5] = value
    check(weight, inverse=True)
    rows, cols = weight_sums(weight, inverse=True)
    assert rows.isnan().nonzero().tolist() == [[3]]
    assert cols.isnan().nonzero().tolist() == [[5]]


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
