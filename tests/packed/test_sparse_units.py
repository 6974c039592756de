"""The product on sparse matrix units: what it refuses, that it is used only on request, and its repacked metadata."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.nm_linear_mma import fragments_of
from ace_triton.kernels.pack_nm import PackedNM, pack_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.packed import sparse_units
from ace_triton.packed.dispatch import choose_product
from ace_triton.packed.products import RowLimits, registry
from ace_triton.packed.sparse_units import SparseUnits, asked_for, fragments


def packed(rows: int = 32, cols: int = 128, dtype: torch.dtype = torch.bfloat16) -> PackedNM:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    return pack_nm(select_nm(weight, ScoreTerms(), 2, 4), 2, 4)


@pytest.mark.skipif(asked_for(), reason="ACE_TRITON_MMA_SP asks for it")
def test_nobody_gets_it_without_asking():
    assert "mma_sp" not in {product.name for product in registry.products}
    assert choose_product(1, packed()) != "mma_sp"


def test_what_it_cannot_multiply_is_refused(monkeypatch):
    product = SparseUnits()
    assert "needs an NVIDIA GPU, Ampere or later, the weight is on cpu" in product.refusal(packed(), 1)
    monkeypatch.setattr(sparse_units, "_why_no_units", lambda device: None)
    assert product.refusal(packed(), 64) is None
    assert "up to 64 rows" in product.refusal(packed(), 65)
    assert "needs a multiple of 64 inputs" in product.refusal(packed(cols=32), 1)


@pytest.mark.parametrize(("value", "asked"), [("", False), ("0", False), ("no", False), ("1", True), ("True", True)])
def test_the_variable_asks_for_it(monkeypatch, value, asked):
    monkeypatch.setenv("ACE_TRITON_MMA_SP", value)
    assert asked_for() is asked


def test_metadata_are_repacked_once_and_again_when_the_weight_is_written():
    weight = packed()
    first = fragments(weight)
    assert fragments(weight) is first
    weight.meta.copy_(weight.meta.flip(0))
    assert torch.equal(fragments(weight), fragments_of(weight))
    assert not torch.equal(fragments(weight), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_the_product_on_cuda(rows):
    weight = packed(256, 512).to("cuda")
    product, generator = SparseUnits(), torch.Generator().manual_seed(1)
    if product.refusal(weight, rows):
        pytest.skip(product.refusal(weight, rows))
    tokens = torch.randn(rows, 512, generator=generator).bfloat16().cuda()
    bias = torch.randn(256, generator=generator).bfloat16().cuda()
    expected = tokens.double() @ unpack_nm(weight).double().t() + bias.double()
    for outputs in (product.multiply(tokens, weight, bias, RowLimits(0)), product.bound(tokens, weight, bias)[0]):
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-2, atol=1e-2)
