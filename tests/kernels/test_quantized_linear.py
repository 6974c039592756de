"""Weights that are not pruned, in 8 and 4 bits: their bytes, their errors, and their product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels import cpu_library, launch_packed, packed_dense
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.packed_dense import PackedDense, dequantize_dense, quantize_dense
from ace_triton.kernels.quantized_linear import quantized_linear, quantized_linear_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEP = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check(tokens, packed, bias=None) -> torch.Tensor:
    """Outputs agree with the dequantized weight within the errors of fp32 sums and of tokens rounded to 30 bits."""
    outputs = quantized_linear(tokens, packed, bias)
    dense = dequantize_dense(packed, torch.float32).double()
    truth = tokens.double() @ dense.t() + (0 if bias is None else bias.double())
    largest = tokens.double().abs().amax(-1, keepdim=True)
    rounding = 1e-6 * (tokens.double().abs() @ dense.abs().t()) + largest / 2**29 * dense.norm(dim=1) * 4
    assert (outputs.dtype, outputs.shape) == (tokens.dtype, (*tokens.shape[:-1], packed.shape[0]))
    assert bool(((outputs.double() - truth).abs() <= STEP[tokens.dtype] * truth.abs() + rounding + 1e-30).all())
    return outputs


@given(
    rows=st.integers(1, 7 if interpreting() else 40),
    cols=st.integers(1, 70 if interpreting() else 400),
    n_tokens=st.integers(0, 3 if interpreting() else 19),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_product_is_that_of_the_dequantized_weight(
    make_matrix, rows, cols, n_tokens, bits, group, dtype, weight_dtype, with_bias, seed
):
    packed = quantize_dense(make_matrix(rows, cols, weight_dtype, seed=seed), bits, group)
    packed.check()
    bias = make_matrix(1, rows, dtype, seed=seed + 2)[0] if with_bias else None
    tokens = make_matrix(n_tokens, cols, dtype, seed=seed + 1)
    outputs = check(tokens, packed, bias)
    expected = quantized_linear_reference(tokens, packed, bias)
    torch.testing.assert_close(outputs, expected, rtol=4 * STEP[dtype], atol=1e-3)


@pytest.mark.parametrize(
    ("bits", "dtype", "shape", "n_tokens", "splits"),
    [(8, torch.bfloat16, (37, 160), 9, 2), (4, torch.float16, (5, 101), 16, 3), (4, torch.bfloat16, (40, 352), 33, 1)],
)
def test_tiles_of_tokens(make_matrix, monkeypatch, bits, dtype, shape, n_tokens, splits):
    """Products on matrix units: whole and partial tiles, with and without split inputs."""
    plan = launch_packed.nm_linear_few_bits
    monkeypatch.setattr(launch_packed, "nm_linear_few_bits", lambda *size: replace(plan(*size), splits=splits))
    packed = quantize_dense(make_matrix(*shape, dtype), bits, 64)
    check(make_matrix(n_tokens, shape[1], dtype, seed=1), packed, make_matrix(1, shape[0], dtype)[0])


@pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), [(67, 289), (5, 1), (1, 1000), (9, 64)])
def test_every_instruction_set_agrees_whatever_lies_beside_the_weight(bits, rows, cols, group):
    """Reads past a row meet inputs that are zeros, and none is past the tensor."""
    torch.manual_seed(0)
    packed = quantize_dense(torch.randn(rows + 2, cols), bits, group)
    tokens, in_use, results = torch.randn(5, cols), cpu_library.isa(), []
    tokens[:, ::50] *= 1e3
    part = packed.outputs(1, rows + 1)
    alone = part.with_tensors({name: tensor.clone() for name, tensor in part.tensors.items()})
    try:
        for isa in cpu_library.ISAS:
            try:
                cpu_library.use_isa(isa)
            except ValueError:
                continue
            for one in (part, alone):
                results += [check(tokens, one), torch.cat([quantized_linear(token[None], one) for token in tokens])]
    finally:
        cpu_library.use_isa(in_use)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_weight_is_the_nearest_value_and_stays_when_quantized_again(make_matrix, monkeypatch, bits, dtype):
    monkeypatch.setattr(packed_dense, "ELEMENTS_AT_ONCE", 200)  # Several parts of rows.
    weight = make_matrix(9, 75, dtype)
    packed = quantize_dense(weight, bits, 32)
    rounded = dequantize_dense(packed)
    assert rounded.dtype == dtype
    for first in range(0, 75, 32):
        before, after = (w[:, first : first + 32].double() for w in (weight, rounded))
        largest = before.abs().amax(1, keepdim=True)
        assert torch.equal(after.abs().amax(1, keepdim=True), largest)
        step = largest / {8: 127, 4: 7}[bits]
        assert bool(((after - before).abs() <= step * 0.50005 + torch.finfo(dtype).eps * after.abs()).all())
    again = quantize_dense(rounded, bits, 32)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in packed.tensors.items())
    ids = torch.tensor([[8, 0, 3], [3, 1, 1]], device=weight.device)
    assert torch.equal(packed.rows(ids), rounded[ids])
    assert torch.equal(dequantize_dense(packed.outputs(2, 5)), rounded[2:5])


def test_its_bytes_by_hand():
    weight = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 7.0]])
    eight, four = quantize_dense(weight, 8, 32), quantize_dense(weight, 4, 32)
    assert eight.values.tolist() == [[64, -127, 32], [0, 0, 127]]
    assert four.values.tolist() == [[0x94, 0x02], [0x00, 0x07]]
    assert eight.absmax.tolist() == four.absmax.tolist() == [[1.0], [7.0]]
    assert (eight.packed_bytes, four.packed_bytes, eight.dense_bytes) == (6 + 8, 4 + 8, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.full((3, 96), -128, dtype=torch.int8)}, "a number that no quantization gives"),
        ({"values": torch.ones(3, 96)}, r"must be torch\.int8 \(8 bits\) or torch\.uint8 \(4 bits\)"),
        ({"values": torch.ones(3, 95, dtype=torch.int8)}, r"values of a weight \(3, 96\) in 8 bits must be contiguous"),
        ({"absmax": torch.full((3, 2), torch.nan)}, "NaN, infinity or a negative number"),
        ({"absmax": torch.ones(3, 3)}, r"absmax of a weight .* must be contiguous \(3, 2\)"),
        ({"absmax": torch.ones(3, 2, device="meta")}, "absmax on meta: move one of them"),
        ({"group": 48}, "must be a multiple of 32 above 0 and at most 1048576; got 48"),
    ],
)
def test_an_invalid_weight_is_refused(change, message):
    sound = quantize_dense(torch.randn(3, 96), 8, 64)
    with pytest.raises(ArgumentError, match=message):
        PackedDense(**{**vars(sound), **change}).check()


def test_what_cannot_be_quantized():
    with pytest.raises(ArgumentError, match=r"got torch\.float64 \(2, 3\)"):
        quantize_dense(torch.ones(2, 3, dtype=torch.float64), 8, 32)
    with pytest.raises(ArgumentError, match="with NaN or infinity cannot be quantized"):
        quantize_dense(torch.tensor([[1.0, torch.inf]]), 8, 32)
    with pytest.raises(ArgumentError, match=r"tokens must be \[\.\.\., 3\]"):
        quantized_linear(torch.ones(2, 4), quantize_dense(torch.ones(2, 3), 8, 32))
