"""gram_product against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.gram_product import gram_product, gram_product_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 40 if interpreting() else 150


def check(got: torch.Tensor, rows: torch.Tensor) -> None:
    """Errors in units of the channels' own energies."""
    assert got.dtype == torch.float32
    wanted = gram_product_reference(rows)
    scale = wanted.diagonal().sqrt().clamp(min=1e-30)
    torch.testing.assert_close(got / scale / scale[:, None], wanted / scale / scale[:, None], rtol=0.0, atol=1e-5)


@given(
    tokens=st.integers(0, MOST), width=st.integers(1, MOST), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000)
)
def test_equals_reference(make_matrix, tokens, width, dtype, seed):
    rows = make_matrix(tokens, width, dtype, seed=seed)
    got = gram_product(rows)
    check(got, rows)
    if dtype == torch.bfloat16:
        assert torch.equal(got, got.t())


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2100])
def test_chunks_of_tokens(make_matrix, tokens):
    rows = make_matrix(tokens, 65, torch.bfloat16)
    check(gram_product(rows), rows)


@pytest.mark.parametrize("width", [47, 48, 49, 96, 400])
def test_panels_of_channels(make_matrix, width):
    rows = make_matrix(9, width, torch.bfloat16)
    check(gram_product(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_add_up(make_matrix, dtype):
    first, second = make_matrix(70, 33, dtype, seed=1), make_matrix(31, 33, dtype, seed=2)
    gram = gram_product(first)
    assert gram_product(second, into=gram) is gram
    check(gram, torch.cat([first, second]))


@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_layouts(make_matrix, layout):
    whole = make_matrix(60, 80, torch.bfloat16)
    rows = {"row stride": whole[:, 3:40], "transposed": whole.t(), "column stride": whole[:, ::2]}[layout]
    check(gram_product(rows), rows)


def test_threads_change_nothing(make_matrix):
    rows, before = make_matrix(1500, 500, torch.bfloat16), torch.get_num_threads()
    try:
        grams = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            grams.append(gram_product(rows))
    finally:
        torch.set_num_threads(before)
    if not rows.is_cuda:
        assert torch.equal(*grams)


def test_what_is_not_finite_stays_in_its_channels(make_matrix):
    rows = make_matrix(5, 60, torch.bfloat16)
    rows[4, 7], rows[2, 50] = torch.nan, torch.inf
    touched = gram_product(rows).isfinite().logical_not_()
    wanted = torch.zeros_like(touched)
    for channel in (7, 50):
        wanted[channel] = wanted[:, channel] = True
    assert torch.equal(touched, wanted)


def test_what_does_not_fit_is_refused(make_matrix):
    rows = make_matrix(4, 6, torch.bfloat16)
    with pytest.raises(ValueError, match="n_tokens, in_features"):
        gram_product(rows[0])
    for wrong in (rows.new_zeros(6, 6), rows.new_zeros(5, 5).float(), rows.new_zeros(6, 12).float()[:, ::2]):
        with pytest.raises(ValueError, match=r"fp32 and \[6, 6\]"):
            gram_product(rows, into=wrong)
