"""Weights of 8 and 4 bits: their bytes, their errors, and what quantizing twice gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.pack_nm import pack_nm, pack_scored
from ace_triton.kernels.packed_nm import PackedNM
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm, quantized_steps
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.unpack_nm import unpack_nm, unpack_nm_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = [(2, 4), (8, 16), (5, 32), (1, 4), (3, 8)]


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    pattern=st.sampled_from(PATTERNS),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 128, 160]),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_every_weight_is_the_nearest_value_and_stays_when_quantized_again(
    make_matrix, rows, groups, pattern, bits, group, dtype, scale, seed
):
    n, m = pattern
    packed = pack_scored(make_matrix(rows, groups * m, dtype, seed=seed) * scale, ScoreTerms(), n, m)
    quantized = quantize_nm(packed, bits, group)
    quantized.check()
    dense, rounded = unpack_nm(packed).double(), unpack_nm(quantized)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, unpack_nm_reference(quantized))
    for first in range(0, groups * m, group):
        before, after = dense[:, first : first + group], rounded[:, first : first + group].double()
        largest = before.abs().amax(1, keepdim=True)
        assert torch.equal(after.abs().amax(1, keepdim=True), largest)
        half_step = largest / {8: 127, 4: 7}[bits] / 2
        rounding = torch.finfo(dtype).eps * after.abs() + torch.finfo(dtype).smallest_normal
        assert bool(((after - before).abs() <= half_step * 1.0001 + rounding).all())
    again = quantize_nm(pack_nm(rounded, n, m), bits, group)
    assert torch.equal(again.absmax, quantized.absmax)
    assert torch.equal(unpack_nm(again), rounded)


def test_its_bytes_by_hand(device):
    weight = torch.zeros(1, 64, device=device)
    weight[0, [1, 2, 4, 5, 40]] = torch.tensor([0.5, -1.0, 0.25, 0.0625, 3.0], device=device)
    packed = pack_nm(weight, 2, 4)
    eight, four = quantize_nm(packed, 8, 32), quantize_nm(packed, 4, 32)
    assert eight.values[0, :4].tolist() == [64, -127, 32, 8]
    assert eight.absmax.tolist() == four.absmax.tolist() == [[1.0, 3.0]]
    assert quantized_steps(four)[0, :4].tolist() == [4, -7, 2, 0]
    assert four.values[0, :2].tolist() == [0x94, 0x02]
    assert (eight.values.dtype, four.values.dtype) == (torch.int8, torch.uint8)
    assert eight.packed_bytes == 32 + 8 + 8
    assert four.packed_bytes == 16 + 8 + 8
    assert eight.dense_bytes == 4 * 64
    assert (packed.bits, eight.bits, four.bits) == (None, 8, 4)


def test_an_odd_number_of_values_ends_in_an_empty_half_byte(device):
    packed = quantize_nm(pack_nm(torch.tensor([[0.0, 7.0, 0.0, 0.0]], device=device), 1, 4), 4, 32)
    assert packed.values.tolist() == [[0x07]]
    packed.values.add_(0x10)
    with pytest.raises(ArgumentError, match="a number that no quantization gives"):
        packed.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.full((3, 48), -128, dtype=torch.int8)}, "a number that no quantization gives"),
        ({"values": torch.full((3, 24), 0x18, dtype=torch.uint8)}, "a number that no quantization gives"),
        ({"values": torch.ones(3, 48)}, r"must be torch\.int8 \(8 bits\) or torch\.uint8 \(4 bits\)"),
        ({"values": torch.ones(3, 47, dtype=torch.int8)}, r"values of a 2:4 weight .* must be contiguous \(3, 48\)"),
        ({"absmax": torch.full((3, 2), -1.0)}, "NaN, infinity or a negative number"),
        ({"absmax": torch.full((3, 2), torch.nan)}, "NaN, infinity or a negative number"),
        ({"absmax": torch.full((3, 2), torch.inf)}, "NaN, infinity or a negative number"),
        ({"absmax": torch.ones(3, 3)}, r"absmax of a 2:4 weight .* must be contiguous \(3, 2\)"),
        ({"absmax": torch.ones(3, 2, dtype=torch.float64)}, "absmax must be float32, float16 or bfloat16"),
        ({"absmax": torch.ones(3, 2, device="meta")}, "absmax on meta: move one of them"),
        ({"group": 48}, "must be a multiple of 32 above 0 and at most 1048576; got 48"),
    ],
)
def test_an_invalid_weight_is_refused(change, message):
    sound = quantize_nm(pack_scored(torch.randn(3, 96), ScoreTerms(), 2, 4), 8, 64)
    with pytest.raises(ArgumentError, match=message):
        PackedNM(**{**vars(sound), **change}).check()


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [
        (5, 128, "bits must be one of 8, 4; got 5"),
        (True, 128, "bits must be one of 8, 4; got True"),
        (8.0, 128, "bits must be one of 8, 4; got 8.0"),
        (8, 0, "multiple of 32 above 0 and at most 1048576; got 0"),
        (8, 100, "multiple of 32 above 0 and at most 1048576; got 100"),
        (8, 64.0, "multiple of 32 above 0 and at most 1048576; got 64.0"),
    ],
)
def test_bits_and_groups_that_there_are_not(bits, group, message):
    with pytest.raises(ArgumentError, match=message):
        quantize_nm(pack_nm(torch.zeros(2, 64), 2, 4), bits, group)


def test_what_cannot_be_quantized():
    with pytest.raises(ArgumentError, match=r"can be quantized, got torch\.int8"):
        quantize_nm(pack_nm(torch.zeros(2, 64, dtype=torch.int8), 2, 4), 8, 32)
    weight = torch.zeros(2, 64)
    weight[1, 40] = torch.inf
    with pytest.raises(ArgumentError, match="with NaN or infinity cannot be quantized"):
        quantize_nm(pack_nm(weight, 2, 4), 8, 32)


def test_a_part_of_its_outputs_and_another_dtype():
    packed = quantize_nm(pack_scored(torch.randn(9, 96), ScoreTerms(), 2, 4), 4, 64)
    assert torch.equal(unpack_nm(packed.outputs(2, 5)), unpack_nm(packed)[2:5])
    assert dequantize_nm(packed, torch.bfloat16).values.dtype == torch.bfloat16
    into = torch.empty(9, 96)
    assert unpack_nm(packed, into) is into
    assert torch.equal(into, unpack_nm(packed))


@pytest.mark.parametrize("shape", [(0, 128), (4, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_without_rows_or_columns(shape, bits):
    packed = pack_scored(torch.zeros(shape), ScoreTerms(), 2, 4)
    quantized = quantize_nm(packed, bits, 32)
    assert dequantize_nm(quantized).values.shape == packed.values.shape
