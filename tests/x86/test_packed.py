"""Packing and nm_linear as machine code, against their references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ace_triton.kernels import launch_packed
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import PackedNM, PatternError, pack_cutlass, pack_nm, pack_scored, pack_scored_reference
from ace_triton.kernels.pack_rows import pack_rows_reference, unpack_rows, unpack_rows_reference
from ace_triton.kernels.packed_dense import dequantize_dense, quantize_dense
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm, unpack_nm_reference
from tests.x86.executor import executed_on_x86

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(got: PackedNM, expected: PackedNM) -> None:
    assert torch.equal(got.meta, expected.meta)
    assert torch.equal(bits_of(got.values), bits_of(expected.values))


@pytest.mark.parametrize(
    ("dtype", "shape", "n", "m"),
    [
        *((dtype, (576, 1536), 2, 4) for dtype in DTYPES),
        (torch.bfloat16, (33, 36), 2, 4),
        (torch.float32, (33, 36), 3, 4),
        (torch.bfloat16, (48, 96), 8, 16),
    ],
)
def test_packing(dtype, shape, n, m):
    torch.manual_seed(0)
    weight, terms = torch.randn(shape).to(dtype), ScoreTerms(scale=torch.rand(shape[1]) + 0.1)
    expected = pack_scored_reference(weight, terms, n, m)
    pruned = unpack_nm_reference(expected)
    with executed_on_x86(1):
        assert_same(pack_scored(weight, terms, n, m), expected)
        assert_same(pack_nm(pruned, n, m), expected)
        pruned[7, : n + 1] = 1
        with pytest.raises(PatternError, match="row 7, group 0"):
            pack_nm(pruned, n, m)


def test_int8():
    kept = torch.tensor([1, 0, 0, 1], dtype=torch.int8).repeat(16)
    weight = torch.randint(-128, 128, (40, 64), dtype=torch.int8) * kept
    expected = pack_nm(weight, 2, 4)
    with executed_on_x86(1):
        assert_same(pack_nm(weight, 2, 4), expected)


@pytest.mark.parametrize(
    ("dtype", "shape", "n", "m"),
    [
        *((dtype, (576, 1536), 2, 4) for dtype in (*DTYPES, torch.int8)),
        (torch.bfloat16, (33, 36), 2, 4),
        (torch.float32, (33, 36), 3, 4),
        (torch.bfloat16, (48, 96), 8, 16),
        (torch.int8, (5, 96), 5, 32),
    ],
)
def test_unpacking(dtype, shape, n, m):
    torch.manual_seed(0)
    packed = pack_scored_reference(torch.randn(shape).mul(50).to(dtype), ScoreTerms(), n, m)
    if dtype.is_floating_point:
        packed.values[:, ::3], packed.values[:, ::5] = torch.nan, -0.0
    expected = unpack_nm_reference(packed)
    with executed_on_x86(1):
        assert torch.equal(bits_of(unpack_nm(packed)), bits_of(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_cutlass(dtype):
    torch.manual_seed(0)
    weight, terms = torch.randn(64, 192).mul(30).to(dtype), ScoreTerms(scale=torch.rand(192) + 0.1)
    packed = pack_scored_reference(weight.float(), terms, 2, 4)
    pruned = unpack_nm_reference(packed).to(dtype)
    pruned[::3, ::5] = 0
    expected = pack_cutlass(pruned)
    sources = (pruned, pack_nm(pruned, 2, 4))
    broken = pruned.clone()
    broken[7, 4:7] = 1
    with executed_on_x86(1):
        for source in sources:
            for got, truth in zip(pack_cutlass(source), expected, strict=True):
                assert torch.equal(bits_of(got), bits_of(truth))
        with pytest.raises(PatternError, match="row 7, group 1"):
            pack_cutlass(broken)
    if dtype.is_floating_point:
        expected = pack_cutlass(weight, terms)
        with executed_on_x86(1):
            for got, truth in zip(pack_cutlass(weight, terms), expected, strict=True):
                assert torch.equal(bits_of(got), bits_of(truth))


@pytest.mark.parametrize(
    ("dtype", "pattern", "shape", "n_tokens"),
    [
        *((dtype, (2, 4), (576, 1536), 1) for dtype in DTYPES),
        (torch.bfloat16, (2, 4), (37, 72), 1),
        (torch.float32, (2, 4), (37, 72), 3),
        (torch.float32, (2, 4), (64, 128), 6),
        (torch.bfloat16, (3, 8), (37, 72), 1),
        (torch.float32, (3, 8), (64, 128), 6),
    ],
)
def test_products(dtype, pattern, shape, n_tokens):
    torch.manual_seed(0)
    packed = pack_scored_reference(torch.randn(shape).to(dtype), ScoreTerms(), *pattern)
    tokens, bias = torch.randn(n_tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    truth = tokens.double() @ unpack_nm_reference(packed).double().t() + bias.double()
    with executed_on_x86(2):
        outputs = nm_linear(tokens, packed, bias)
    torch.testing.assert_close(outputs, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "dtype", "pattern", "shape", "n_tokens"),
    [
        (8, torch.bfloat16, (8, 16), (64, 1536), 1),
        (4, torch.float32, (8, 16), (64, 576), 3),
        (8, torch.float16, (2, 4), (37, 72), 6),
        (4, torch.bfloat16, (5, 32), (9, 96), 1),
    ],
)
def test_products_of_few_bits(bits, dtype, pattern, shape, n_tokens):
    torch.manual_seed(0)
    packed = quantize_nm(pack_scored_reference(torch.randn(shape).to(dtype), ScoreTerms(), *pattern), bits, 64)
    tokens, bias = torch.randn(n_tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    dense = unpack_nm_reference(dequantize_nm(packed, torch.float32)).double()
    truth = tokens.double() @ dense.t() + bias.double()
    with executed_on_x86(1):
        outputs = nm_linear(tokens, packed, bias)
    torch.testing.assert_close(outputs, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("bits", "dtype", "n_tokens"), [(8, torch.bfloat16, 1), (4, torch.float32, 3)])
def test_products_of_few_bits_without_metadata(bits, dtype, n_tokens):
    torch.manual_seed(0)
    packed = quantize_dense(torch.randn(37, 101).to(dtype), bits, 64)
    tokens, bias = torch.randn(n_tokens, 101).to(dtype), torch.randn(37).to(dtype)
    truth = tokens.double() @ dequantize_dense(packed, torch.float32).double().t() + bias.double()
    with executed_on_x86(1):
        outputs = quantized_linear(tokens, packed, bias)
    torch.testing.assert_close(outputs, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "shape", "n_tokens", "words", "splits"),
    [
        *((dtype, (37, 160), 9, 1, 2) for dtype in DTYPES),
        *((dtype, (20, 48), 18, 1, 2) for dtype in (torch.bfloat16, torch.float32)),
        (torch.float16, (64, 128), 6, 4, 1),
    ],
)
def test_tiles_of_tokens(monkeypatch, dtype, shape, n_tokens, words, splits):
    """Smaller tiles than on a GPU; most split the inputs of every output."""
    planned = launch_packed.nm_linear_dot
    small = {"tokens": 16, "block_rows": 16, "words": words, "splits": splits, "num_warps": 1}
    monkeypatch.setattr(launch_packed, "nm_linear_dot", lambda *arguments: replace(planned(*arguments), **small))
    torch.manual_seed(0)
    packed = pack_scored_reference(torch.randn(shape).to(dtype), ScoreTerms(), 2, 4)
    tokens, bias = torch.randn(n_tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    truth = tokens.double() @ unpack_nm_reference(packed).double().t() + bias.double()
    with executed_on_x86(2):
        outputs = nm_linear(tokens, packed, bias)
    torch.testing.assert_close(outputs, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "shape", "n_tokens", "kept"),
    [
        (torch.bfloat16, (7, 50), 1, 0.5),
        (torch.float32, (3, 32), 2, 0.4),
    ],
)
def test_row_starts(dtype, shape, n_tokens, kept):
    """Unpacking and products, also with row starts and metadata that lead outside."""
    torch.manual_seed(0)
    packed = pack_rows_reference(torch.randn(shape).to(dtype) * (torch.rand(shape) < kept))
    tokens, bias = torch.randn(n_tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    dense = unpack_rows_reference(packed)
    truth = tokens.double() @ dense.double().t() + bias.double()
    damaged = replace(packed, meta=torch.full_like(packed.meta, -1), starts=packed.starts - 70)
    with executed_on_x86(2):
        outputs = rows_linear(tokens, packed, bias)
        assert torch.equal(bits_of(unpack_rows(packed)), bits_of(dense))
        assert bool(rows_linear(tokens, damaged).isfinite().all())
    torch.testing.assert_close(outputs, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("bits", "pattern", "cols"), [(None, (3, 8), 40), (8, (8, 16), 64), (4, (5, 32), 96)])
def test_metadata_that_count_past_the_values(bits, pattern, cols):
    torch.manual_seed(0)
    packed = pack_scored_reference(torch.randn(5, cols), ScoreTerms(), *pattern)
    packed = packed if bits is None else quantize_nm(packed, bits, 64)
    damaged = replace(packed, meta=torch.full_like(packed.meta, -1))
    with executed_on_x86(1):
        assert bool(nm_linear(torch.randn(2, cols), damaged).isfinite().all())
        unpack_nm(damaged)
