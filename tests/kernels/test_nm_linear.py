"""nm_linear against the dense product in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels import cpu_library, launch, launch_packed
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.nm_linear import nm_linear, nm_linear_reference
from ace_triton.kernels.pack_nm import pack_nm, pack_scored
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm, unpack_nm_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (3, 8), (8, 16), (5, 32), (31, 32)]
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative tolerance per dtype: a little more than the error of rounding the output once."""


def check(tokens, weight, n, m, bias=None) -> torch.Tensor:
    """Outputs agree within the errors of fp32 sums and one rounding of the output."""
    packed = pack_scored(weight, ScoreTerms(), n, m)
    outputs = nm_linear(tokens, packed, bias)
    dense = unpack_nm(packed).double()
    truth = tokens.double() @ dense.t()
    size = tokens.double().abs() @ dense.abs().t()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    assert outputs.dtype == tokens.dtype
    assert outputs.shape == (*tokens.shape[:-1], weight.shape[0])
    assert bool(((outputs.double() - truth).abs() <= STEP[tokens.dtype] * truth.abs() + 3e-6 * size + 1e-30).all())
    torch.testing.assert_close(outputs, nm_linear_reference(tokens, packed, bias), atol=2e-2, rtol=2e-2)
    return outputs


@given(
    rows=st.integers(1, 7 if interpreting() else 40),
    groups=st.integers(1, 5 if interpreting() else 60),
    n_tokens=st.integers(0, 3 if interpreting() else 35),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_product(make_matrix, rows, groups, n_tokens, pattern, dtype, weight_dtype, with_bias, seed):
    n, m = pattern
    weight = make_matrix(rows, groups * m, weight_dtype, seed=seed)
    tokens = make_matrix(n_tokens, groups * m, dtype, seed=seed + 1)
    bias = make_matrix(1, rows, dtype, seed=seed + 2)[0] if with_bias else None
    check(tokens, weight, n, m, bias)


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("shape", [(515, 1032), (64, 4100)])
def test_layer_sized(make_matrix, dtype, n_tokens, shape):
    check(make_matrix(n_tokens, shape[1], dtype), make_matrix(*shape, dtype), 2, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "n_tokens"), [((70, 128), 16), ((3, 1104), 9), ((3, 16), 17), ((9, 48), 33)])
def test_tiles_of_tokens(make_matrix, dtype, shape, n_tokens):
    """Products on matrix units: whole and partial tiles, with and without split inputs."""
    tokens, weight = make_matrix(n_tokens, shape[1], dtype), make_matrix(*shape, dtype)
    outputs = check(tokens, weight, 2, 4, make_matrix(1, shape[0], dtype)[0])
    if not interpreting():
        others = torch.cat((tokens[:1], torch.full_like(tokens[1:], 7)))
        assert torch.equal(check(others, weight, 2, 4, make_matrix(1, shape[0], dtype)[0])[0], outputs[0])


@pytest.mark.parametrize("pattern", [(2, 4), (3, 8)])
def test_an_output_does_not_depend_on_the_other_tokens(make_matrix, pattern):
    cols = 96 if interpreting() else 1096
    packed = pack_scored(make_matrix(9, cols, torch.bfloat16), ScoreTerms(), *pattern)
    tokens = make_matrix(7, cols, torch.float32)
    together = nm_linear(tokens, packed)
    alone = torch.cat([nm_linear(token[None], packed) for token in tokens])
    assert torch.equal(together, alone)
    assert torch.equal(nm_linear(tokens, packed), together)


def test_any_leading_shape_and_stride(make_matrix):
    weight = make_matrix(6, 64, torch.float32)
    wide = make_matrix(12, 96, torch.float32)
    check(wide[:, 16:80].reshape(3, 4, 64), weight, 2, 4)
    check(wide[::2, 16:80], weight, 2, 4)
    check(wide[:4, :64].t().contiguous().t(), weight, 2, 4)
    check(wide[0, :64], weight, 2, 4)
    assert nm_linear(wide[:0, :64], pack_scored(weight, ScoreTerms(), 2, 4)).shape == (0, 6)


def test_pruned_infinities_of_the_tokens_stay_out(device):
    """At 2:4, the inputs of pruned weights are skipped, not multiplied by 0."""
    packed = pack_nm(torch.tensor([[0.0, 1.0, 2.0, 0.0]], device=device), 2, 4)
    tokens = torch.tensor([[torch.inf, 3.0, 4.0, torch.nan]], device=device)
    assert nm_linear(tokens, packed).tolist() == [[11.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(2, 12)}, r"tokens must be \[..., 16\]"),
        ({"tokens": torch.zeros(2, 16, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"packed": pack_nm(torch.zeros(8, 16, dtype=torch.int8), 2, 4)}, "float32, float16 or bfloat16"),
        ({"bias": torch.zeros(4)}, r"bias must be \[8\]"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    given_arguments = {"tokens": torch.zeros(2, 16), "packed": pack_nm(torch.zeros(8, 16), 2, 4), **arguments}
    with pytest.raises(ValueError, match=message):
        nm_linear(**given_arguments)


@pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_instruction_set_and_number_of_threads_agrees(dtype, pattern):
    n, m = pattern
    torch.manual_seed(0)
    weight, tokens = torch.randn(1026, 32 * 33).to(dtype), torch.randn(5, 32 * 33).to(dtype)
    in_use, threads = cpu_library.isa(), torch.get_num_threads()
    results = {}
    try:
        for isa in cpu_library.ISAS:
            for count in (1, 3):
                try:
                    cpu_library.use_isa(isa)
                except ValueError:
                    continue
                torch.set_num_threads(count)
                packed = pack_scored(weight, ScoreTerms(), n, m)
                results[isa, count] = (packed.meta, packed.values, nm_linear(tokens, packed))
    finally:
        cpu_library.use_isa(in_use)
        torch.set_num_threads(threads)
    first, *others = results.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("pattern", [(2, 4), (5, 32), (3, 4)])
def test_damaged_metadata_do_not_lead_outside(pattern):
    n, m = pattern
    packed = pack_scored(torch.randn(33, 32 * 7), ScoreTerms(), n, m)
    packed.meta.fill_(-1)
    in_use = cpu_library.isa()
    for isa in ("portable", in_use):
        cpu_library.use_isa(isa)
        nm_linear(torch.randn(3, 32 * 7), packed)
    cpu_library.use_isa(in_use)


@pytest.mark.parametrize(
    ("dtype", "pattern", "cols", "rows"),
    [
        (torch.bfloat16, (3, 8), 24, 11),
        (torch.bfloat16, (2, 4), 20, 11),
        (torch.float16, (2, 4), 32, 50),
    ],
)
def test_more_tokens_than_one_launch_takes(monkeypatch, device, dtype, pattern, cols, rows):
    """The third case uses tiles of 16 tokens or more; the last launch has fewer tokens than the others."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(n, cols, generator=generator).to(dtype).to(device) for n in (rows, 5))
    at_once = check(tokens, weight, *pattern)
    monkeypatch.setattr(launch, "MOST_ALONG_Y", 1)
    assert torch.equal(check(tokens, weight, *pattern), at_once)


def quantized(weight, n, m, bits, group=128):
    return quantize_nm(pack_scored(weight, ScoreTerms(), n, m), bits, group)


def check_quantized(tokens, packed, bias=None) -> torch.Tensor:
    """Outputs agree with the dequantized weight within the errors of fp32 sums and of tokens rounded to 30 bits."""
    outputs = nm_linear(tokens, packed, bias)
    dense = unpack_nm_reference(dequantize_nm(packed, torch.float32)).double()
    truth = tokens.double() @ dense.t() + (0 if bias is None else bias.double())
    largest = tokens.double().abs().amax(-1, keepdim=True)
    rounding = 1e-6 * (tokens.double().abs() @ dense.abs().t()) + largest / 2**29 * dense.norm(dim=1) * 4
    assert outputs.dtype == tokens.dtype
    assert outputs.shape == (*tokens.shape[:-1], packed.shape[0])
    assert bool(((outputs.double() - truth).abs() <= STEP[tokens.dtype] * truth.abs() + rounding + 1e-30).all())
    return outputs


@given(
    rows=st.integers(1, 7 if interpreting() else 40),
    groups=st.integers(1, 5 if interpreting() else 20),
    n_tokens=st.integers(0, 3 if interpreting() else 19),
    pattern=st.sampled_from(PATTERNS),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_few_bits_equal_the_dequantized_product(
    make_matrix, rows, groups, n_tokens, pattern, bits, group, dtype, weight_dtype, with_bias, seed
):
    n, m = pattern
    packed = quantized(make_matrix(rows, groups * m, weight_dtype, seed=seed), n, m, bits, group)
    bias = make_matrix(1, rows, dtype, seed=seed + 2)[0] if with_bias else None
    check_quantized(make_matrix(n_tokens, groups * m, dtype, seed=seed + 1), packed, bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_of_a_layer(make_matrix, bits):
    rows, cols = (5, 160) if interpreting() else (130, 1104)
    packed = quantized(make_matrix(rows, cols, torch.bfloat16), 8, 16, bits)
    tokens = make_matrix(3, cols, torch.float32) * torch.logspace(-30, 30, cols).to(packed.values.device)
    together = check_quantized(tokens, packed)
    assert torch.equal(together, torch.cat([nm_linear(token[None], packed) for token in tokens]))
    tokens[0] = 0
    tokens[1, 1] = torch.inf
    outputs = nm_linear(tokens, packed)
    assert bool((outputs[0] == 0).all())
    assert torch.equal(outputs[2], together[2])
    if not interpreting() and cpu_library.available():
        assert not bool(outputs[1].isfinite().any())


@pytest.mark.parametrize(
    ("bits", "dtype", "pattern", "shape", "n_tokens", "splits"),
    [
        (8, torch.bfloat16, (8, 16), (37, 160), 9, 2),
        (4, torch.float16, (2, 4), (5, 100), 16, 3),
        (4, torch.bfloat16, (1, 4), (40, 352), 33, 1),
    ],
)
def test_few_bits_and_tiles_of_tokens(make_matrix, monkeypatch, bits, dtype, pattern, shape, n_tokens, splits):
    """Products on matrix units: whole and partial tiles, with and without split inputs."""
    plan = launch_packed.nm_linear_few_bits
    monkeypatch.setattr(launch_packed, "nm_linear_few_bits", lambda *size: replace(plan(*size), splits=splits))
    packed = quantized(make_matrix(*shape, dtype), *pattern, bits, 64)
    check_quantized(make_matrix(n_tokens, shape[1], dtype, seed=1), packed, make_matrix(1, shape[0], dtype)[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("large", [1e2, 1e4, -1e4])
def test_few_bits_keep_small_inputs_beside_a_large_one(make_matrix, bits, large):
    weight = make_matrix(16, 256, torch.float32)
    weight[:, 0] = 0
    packed = quantized(weight, 2, 4, bits)
    tokens = make_matrix(2, 256, torch.float32, seed=1)
    tokens[:, 0] = large
    dense = unpack_nm_reference(dequantize_nm(packed, torch.float32)).double()
    assert bool((dense[:, 0] == 0).all())
    errors = (nm_linear(tokens, packed).double() - tokens.double() @ dense.t()).abs()
    assert bool((errors <= 3e-6 * (tokens.double().abs() @ dense.abs().t())).all())


@pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), (16, 32), (5, 32), (3, 16), (31, 32)])
def test_few_bits_agree_on_every_instruction_set_and_stay_inside(bits, pattern):
    torch.manual_seed(0)
    packed = quantized(torch.randn(67, 32 * 9), *pattern, bits)
    tokens, in_use, results = torch.randn(5, 32 * 9), cpu_library.isa(), []
    tokens[:, ::50] *= 1e3
    try:
        for isa in cpu_library.ISAS:
            try:
                cpu_library.use_isa(isa)
            except ValueError:
                continue
            results += [nm_linear(tokens, packed), torch.cat([nm_linear(token[None], packed) for token in tokens])]
        packed.meta.fill_(-1)
        nm_linear(tokens, packed)  # Damaged metadata: any numbers, but no access outside of the tensors.
    finally:
        cpu_library.use_isa(in_use)
    assert all(torch.equal(results[0], other) for other in results[1:])
