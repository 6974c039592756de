"""expanded_linear, by tiles and by vectors, against the dense product in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels import cpu_library, cpu_packed, few_bits
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.expanded_linear import (
    ExpandedWeight,
    expanded_linear,
    has_expanded_product,
)
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.pack_rows import pack_rows, unpack_rows, unpack_rows_reference
from ace_triton.kernels.packed_dense import PackedDense, dequantize_dense, quantize_dense
from ace_triton.kernels.packed_rows import PackedRows
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm_reference

HALF = torch.bfloat16
PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (3, 8), (8, 16), (5, 32), (31, 32), None]
"""None packs the non-zeros of a weight without a pattern, and of a quantized weight all of it."""
BITS = [None, 8, 4]
"""None for weights that are not quantized."""
GROUPS = [32, 64, 96, 128, 4096]


def can_run(way: str) -> str:
    """Why the compiled library cannot multiply in this way; "" if it can."""
    if interpreting() or not cpu_library.available():
        return "for the compiled library"
    if not has_expanded_product():
        return "the processor has no AVX512-BF16 with VBMI2"
    return "" if way == "vectors" or cpu_packed.has_tiles() else "the processor or the system has no tiles (AMX)"


@contextmanager
def using(way: str) -> Iterator[None]:
    """A context in which the product is computed in this way; skips the test if this machine cannot."""
    if way != "reference" and (why := can_run(way)):
        pytest.skip(why)
    if not cpu_library.available():
        yield
        return
    isa = cpu_library.isa()
    if way == "reference":
        cpu_library.use_isa("portable")
    else:
        cpu_packed.use_tiles(way == "tiles")
    try:
        yield
    finally:
        cpu_library.use_isa(isa)
        with suppress(ArgumentError):  # Where there are none.
            cpu_packed.use_tiles(True)


@pytest.fixture(params=["tiles", "vectors", "reference"])
def way(request) -> Iterator[str]:
    """Each way to multiply that this machine has."""
    with using(request.param):
        yield request.param


def packed_weight(make_matrix, rows, cols, pattern, seed=0, bits=None, group=64) -> ExpandedWeight:
    weight = make_matrix(rows, cols, HALF, seed=seed)
    if pattern is not None:
        packed = pack_scored(weight, ScoreTerms(), *pattern)
        return packed if bits is None else quantize_nm(packed, bits, group)
    if bits is not None:
        return quantize_dense(weight, bits, group)
    drawn = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    return pack_rows(weight * (drawn < seed % 10 / 9))


def dense_of(packed) -> torch.Tensor:
    """The weight in bf16."""
    if isinstance(packed, PackedRows):
        return unpack_rows_reference(packed)
    if isinstance(packed, PackedDense):
        return dequantize_dense(packed)
    return unpack_nm_reference(packed if packed.absmax is None else dequantize_nm(packed))


def check(tokens, packed, bias=None) -> torch.Tensor:
    """Outputs agree within the errors of fp32 sums and one rounding of the output."""
    outputs = expanded_linear(tokens, packed, bias)
    dense = dense_of(packed).double()
    truth, size = tokens.double() @ dense.t(), tokens.double().abs() @ dense.abs().t()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    assert (outputs.dtype, outputs.shape) == (HALF, (*tokens.shape[:-1], packed.shape[0]))
    assert bool(((outputs.double() - truth).abs() <= 2**-8 * truth.abs() + 3e-6 * size + 1e-30).all())
    return outputs


@given(
    rows=st.integers(1, 7 if interpreting() else 150),
    groups=st.integers(1, 3 if interpreting() else 40),
    n_tokens=st.integers(0, 3 if interpreting() else 100),
    pattern=st.sampled_from(PATTERNS),
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("named", ["tiles", "vectors"])
def test_equals_the_dense_product(make_matrix, named, rows, groups, n_tokens, pattern, bits, group, with_bias, seed):
    cols = groups * pattern[1] if pattern else groups * 7
    bias = make_matrix(1, rows, torch.float32, seed=seed + 2)[0] if with_bias else None
    tokens = make_matrix(n_tokens, cols, HALF, seed=seed + 1)
    with using(named):
        check(tokens, packed_weight(make_matrix, rows, cols, pattern, seed, bits, group), bias)


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 4), (1, 36), (64, 512), (65, 544), (17, 1028), (129, 32), (256, 640), (257, 676)]
)
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 64, 113])
@pytest.mark.parametrize("bits", BITS)
def test_edges_of_blocks(make_matrix, way, rows, cols, n_tokens, bits):
    for pattern in ((2, 4), None):
        packed = packed_weight(make_matrix, rows, cols, pattern, seed=5, bits=bits)
        check(make_matrix(n_tokens, cols, HALF), packed, make_matrix(1, rows, HALF)[0])


@pytest.mark.parametrize("bits", BITS)
def test_more_tokens_than_one_expansion_serves(make_matrix, way, bits):
    check(make_matrix(530, 96, HALF), packed_weight(make_matrix, 70, 96, (8, 16), bits=bits))


@pytest.mark.parametrize(("bits", "largest", "group"), [(8, 127, 256), (4, 7, 32)])
def test_every_integer_times_every_absmax_is_rounded_as_in_unpacking(make_matrix, way, bits, largest, group):
    """A token for each input gives the weight itself. Its rows have the 128 significands of bf16, its groups all
    integers, times some powers of 2."""
    absmax = torch.arange(128, 256)[:, None] * torch.tensor([2.0**-120, 2.0**-7, 1.0, 2.0**119])
    integers = torch.cat((torch.arange(-largest, largest + 1), torch.zeros(1))).float()
    values = few_bits.stored(integers.repeat(4 * group // len(integers)).expand(128, -1), bits)
    device = make_matrix(1, 1, HALF).device
    packed = PackedDense(values.to(device), absmax.to(device, HALF), (128, 4 * group), group)
    packed.check()
    outputs = expanded_linear(torch.eye(4 * group, dtype=HALF, device=device), packed)
    assert torch.equal(outputs.t(), dequantize_dense(packed))


def test_any_leading_shape_and_stride(make_matrix, way):
    wide, packed = make_matrix(40, 96, HALF), packed_weight(make_matrix, 33, 64, (2, 4))
    check(wide[:, 16:80].reshape(5, 8, 64), packed)
    check(wide[::2, 16:80], packed)
    check(wide[:, :64].t().contiguous().t(), packed)
    check(wide[0, :64], packed)
    check(wide[:0, :64], packed)
    check(wide[:20, :64], packed, make_matrix(33, 2, torch.float32)[:, 0])


@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), None])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", ["tiles", "vectors"], indirect=True)
def test_an_output_depends_on_neither_threads_nor_other_tokens_nor_other_outputs(make_matrix, way, pattern, bits):
    tokens, packed = make_matrix(70, 1056, HALF), packed_weight(make_matrix, 300, 1056, pattern, seed=5, bits=bits)
    together, threads = check(tokens, packed), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(expanded_linear(tokens, packed), together)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(1), slice(5, 40)):
        assert torch.equal(expanded_linear(tokens[part], packed), together[part])
    assert torch.equal(expanded_linear(tokens, packed.outputs(77, 203)), together[:, 77:203])


@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_in_its_token(make_matrix, way, pattern, bits):
    packed = packed_weight(make_matrix, 5, 64, pattern, bits=bits)
    tokens = make_matrix(20, 64, HALF)
    expected = check(tokens, packed)
    tokens[3], tokens[17] = torch.nan, torch.inf
    outputs = expanded_linear(tokens, packed)
    assert not outputs[[3, 17]].isfinite().any()
    rest = [t for t in range(20) if t not in (3, 17)]
    assert torch.equal(outputs[rest], expected[rest])


def damaged(make_matrix) -> list[ExpandedWeight]:
    """Weights whose metadata or row starts lead past the values."""
    nm, by_rows = packed_weight(make_matrix, 70, 100, (2, 4)), packed_weight(make_matrix, 70, 100, None, seed=5)
    return [
        replace(nm, meta=torch.full_like(nm.meta, -1)),
        replace(by_rows, meta=torch.full_like(by_rows.meta, -1)),
        replace(by_rows, starts=by_rows.starts + 2**40),
        replace(by_rows, starts=by_rows.starts - 2**40),
        replace(by_rows, values=by_rows.values[:3].clone()),
        replace(by_rows, values=by_rows.values[:0].clone()),
    ]


@pytest.mark.parametrize("way", ["tiles", "vectors"], indirect=True)
def test_damage_does_not_lead_outside(make_matrix, way):
    """Reads stay inside the values, and what is missing is 0."""
    tokens = make_matrix(20, 100, HALF)
    for packed in damaged(make_matrix):
        outputs = expanded_linear(tokens, packed)
        assert bool(outputs.isfinite().all())
        if isinstance(packed, PackedRows):
            dense = unpack_rows(packed)
            torch.testing.assert_close(outputs.float(), tokens.float() @ dense.float().t(), rtol=1e-2, atol=1e-2)
    assert not outputs.any()


def test_a_lower_instruction_set_uses_neither_tiles_nor_vectors():
    if why := can_run("vectors"):
        pytest.skip(why)
    before = cpu_library.isa()
    try:
        cpu_library.use_isa("avx2")
        assert not has_expanded_product()
        assert not cpu_packed.has_tiles()
    finally:
        cpu_library.use_isa(before)
    assert has_expanded_product()


def test_tiles_are_refused_where_there_are_none():
    if not cpu_library.available():
        pytest.skip("for the compiled library")
    if torch.cpu.get_capabilities().get("amx_bf16"):
        pytest.skip("this processor has tiles")
    cpu_packed.use_tiles(False)
    with pytest.raises(ArgumentError, match="no tiles for bf16"):
        cpu_packed.use_tiles(True)


def test_says_what_is_wrong(make_matrix):
    packed, tokens = packed_weight(make_matrix, 8, 16, (2, 4)), make_matrix(3, 16, HALF)
    with pytest.raises(ArgumentError, match=r"tokens must be \[..., 16\]"):
        expanded_linear(tokens[:, :12], packed)
    with pytest.raises(ArgumentError, match=r"bias must be \[8\]"):
        expanded_linear(tokens, packed, tokens[0, :4])
    in_fp32 = quantize_dense(make_matrix(8, 16, torch.float32), 8, 32)
    for wrong in ((tokens.float(), packed), (tokens, replace(packed, values=packed.values.half())), (tokens, in_fp32)):
        with pytest.raises(
            ArgumentError, match=r"must be bfloat16, got .*: use nm_linear, rows_linear or quantized_linear"
        ):
            expanded_linear(*wrong)
