"""Weights with row starts: packing, unpacking and products, against plain torch and the dense product in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.errors import ArgumentError, PatternError
from ace_triton.kernels.pack_rows import pack_rows, pack_rows_reference, unpack_rows, unpack_rows_reference
from ace_triton.kernels.packed_rows import PackedRows, count_bits
from ace_triton.kernels.rows_linear import rows_linear, rows_linear_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative tolerance per dtype: a little more than the error of rounding the output once."""


def pruned(make_matrix, rows, cols, dtype, kept, seed=0, values="normal") -> torch.Tensor:
    """A weight with about this share of non-zeros, at random places. Zeros have both signs."""
    weight = make_matrix(rows, cols, dtype, values, seed)
    drawn = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    return torch.where(drawn < kept, weight, weight * 0)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_product(tokens, packed, bias=None) -> torch.Tensor:
    """Outputs agree within the errors of fp32 sums and one rounding of the output."""
    outputs, dense = rows_linear(tokens, packed, bias), unpack_rows_reference(packed).double()
    truth, size = tokens.double() @ dense.t(), tokens.double().abs() @ dense.abs().t()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    assert outputs.dtype == tokens.dtype
    assert outputs.shape == (*tokens.shape[:-1], packed.shape[0])
    assert bool(((outputs.double() - truth).abs() <= STEP[tokens.dtype] * truth.abs() + 3e-6 * size + 1e-30).all())
    torch.testing.assert_close(outputs, rows_linear_reference(tokens, packed, bias), atol=2e-2, rtol=2e-2)
    return outputs


sizes = {
    "rows": st.integers(1, 7 if interpreting() else 40),
    "cols": st.integers(1, 70 if interpreting() else 700),
    "kept": st.sampled_from([0.0, 0.03, 0.4, 0.5, 0.9, 1.0]),
    "dtype": st.sampled_from(FLOATS),
    "seed": st.integers(0, 1000),
}


@given(**sizes, values=st.sampled_from(["normal", "special"]))
def test_packing_and_unpacking(make_matrix, rows, cols, kept, dtype, seed, values):
    weight = pruned(make_matrix, rows, cols, dtype, kept, seed, values)
    weight[0, :: cols // 3 + 1] = torch.nan
    packed, expected = pack_rows(weight), pack_rows_reference(weight)
    packed.check()
    assert torch.equal(bits_of(packed.values), bits_of(expected.values))
    assert torch.equal(packed.meta, expected.meta)
    assert torch.equal(packed.starts, expected.starts)
    dense = unpack_rows(packed)
    assert torch.equal(bits_of(dense), bits_of(weight.where(weight != 0, 0)))
    assert torch.equal(bits_of(dense), bits_of(unpack_rows_reference(packed)))
    assert packed.packed_bytes == len(packed.values) * dtype.itemsize + rows * -(-cols // 32) * 4 + (rows + 1) * 8
    half = packed.outputs(rows // 2, rows)
    assert torch.equal(bits_of(unpack_rows(half)), bits_of(dense[rows // 2 :]))


@given(**sizes, n_tokens=st.integers(0, 3 if interpreting() else 20), with_bias=st.booleans())
def test_equals_the_dense_product(make_matrix, rows, cols, kept, dtype, seed, n_tokens, with_bias):
    packed = pack_rows(pruned(make_matrix, rows, cols, dtype, kept, seed))
    tokens = make_matrix(n_tokens, cols, dtype, seed=seed + 1)
    check_product(tokens, packed, make_matrix(1, rows, dtype, seed=seed + 2)[0] if with_bias else None)


def test_strides_shapes_and_a_result_tensor(make_matrix):
    weight = pruned(make_matrix, 12, 96, torch.float32, 0.5)
    part = pack_rows(weight[::2, 16:80])
    assert torch.equal(unpack_rows(part), weight[::2, 16:80])
    into = torch.full_like(weight[::2, 16:80].contiguous(), torch.nan)
    assert unpack_rows(part, into) is into
    assert torch.equal(into, weight[::2, 16:80])
    check_product(make_matrix(12, 96, torch.float32)[:, 16:80].reshape(3, 4, 64), part)
    with pytest.raises(ArgumentError, match="into must be contiguous"):
        unpack_rows(part, into[:, 1:])
    with pytest.raises(ArgumentError, match="float32, float16 or bfloat16"):
        pack_rows(weight.double())
    with pytest.raises(ArgumentError, match=r"tokens must be \[..., 64\]"):
        rows_linear(weight, part)


@pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_and_number_of_threads_agrees(make_matrix, dtype):
    weight, tokens = pruned(make_matrix, 1026, 700, dtype, 0.45), make_matrix(5, 700, dtype)
    in_use, threads = cpu_library.isa(), torch.get_num_threads()
    results = []
    try:
        for isa in cpu_library.ISAS:
            for count in (1, 3):
                try:
                    cpu_library.use_isa(isa)
                except ValueError:
                    continue
                torch.set_num_threads(count)
                packed = pack_rows(weight)
                results.append((packed.values, packed.meta, packed.starts, rows_linear(tokens, packed)))
                results[-1] += (unpack_rows(packed), rows_linear(tokens[:1], packed))
    finally:
        cpu_library.use_isa(in_use)
        torch.set_num_threads(threads)
    first, *others = results
    assert torch.equal(first[4], weight)
    assert torch.equal(first[5], first[3][:1])
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def damaged(packed: PackedRows) -> dict[str, PackedRows]:
    """Copies of a packed weight [8, 40] with one fault each, by a part of the message."""
    starts, meta = packed.starts.clone(), packed.meta.clone()
    ends, back, bits, past = starts.clone(), starts.clone(), meta.clone(), meta.clone()
    ends[-1] += 1
    back[3] = back[4] + 7
    bits[2, 0] ^= 1
    past[5, 1] ^= 1 << 8
    past[5, 1] ^= 1 << int((past[5, 1] & 0xFF).item().bit_length() - 1)
    return {
        "row starts go from 0 to": replace(packed, starts=ends),
        "row 3 starts at value": replace(packed, starts=back),
        "metadata of row 2 keep": replace(packed, meta=bits),
        "row 5 marks inputs past the last one, 39": replace(packed, meta=past),
        "values of a weight": replace(packed, values=packed.values[::2]),
        "starts of a weight": replace(packed, starts=starts[1:]),
        "starts must be torch.int64": replace(packed, starts=starts.int()),
        "meta must be torch.int32": replace(packed, meta=meta.long()),
        "float32, float16 or bfloat16": replace(packed, values=packed.values.double()),
    }


def test_a_damaged_weight_is_refused(make_matrix):
    packed = pack_rows(pruned(make_matrix, 8, 40, torch.float32, 0.6))
    for message, wrong in damaged(packed).items():
        with pytest.raises((ArgumentError, PatternError), match=message):
            wrong.check()


def test_damage_does_not_lead_outside(make_matrix):
    """Any metadata and row starts: reads stay inside the values, and what is missing is 0."""
    rows, cols = (2, 40) if interpreting() else (9, 100)
    packed = pack_rows(pruned(make_matrix, rows, cols, torch.float32, 0.5))
    tokens = make_matrix(2, cols, torch.float32)
    wrong = [
        replace(packed, meta=torch.full_like(packed.meta, -1)),
        replace(packed, starts=packed.starts + 2**40),
        replace(packed, starts=packed.starts - 2**40),
        replace(packed, values=packed.values[:3].clone()),
        replace(packed, values=packed.values[:0].clone()),
    ]
    for case in wrong:
        assert bool(rows_linear(tokens, case).isfinite().all())
        unpack_rows(case)
    assert not unpack_rows(wrong[-1]).any()


def test_count_bits():
    words = torch.tensor([[0, -1, 1 << 30], [-(2**31), 0x55555555, 7]], dtype=torch.int32)
    assert count_bits(words).tolist() == [[0, 32, 1], [1, 16, 3]]
