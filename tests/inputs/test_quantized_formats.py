"""Each format of quantized weights is read as its formula says, exactly."""

import dataclasses

import pytest
import torch

from ace_triton.errors import CheckpointError
from ace_triton.inputs.quantized_formats import format_of, unpacked
from tests.inputs.quantizing import FORMATS, awq, gptq, group, packed

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_one_of_the_formula(name):
    quantize, stated = FORMATS[name]
    tensors, dense = quantize(WEIGHT)
    layout = format_of(stated)
    read = layout.weight({end: tensor for end, tensor in tensors.items() if end in layout.parts})
    assert read.dtype == torch.float32
    assert torch.equal(read, dense)
    assert (dense - WEIGHT).norm() < 0.5 * WEIGHT.norm()
    assert set(tensors) <= {*layout.parts, *layout.ignored}
    assert any(mark in tensors for mark in layout.marks)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_lowest_bits_come_first(bits):
    integers = torch.randint(0, 2**bits, (3, 64))
    assert torch.equal(unpacked(packed(integers, bits), bits), integers.int())


def test_groups_come_from_the_size_if_no_layer_has_an_index():
    tensors, dense = gptq(WEIGHT)
    del tensors["g_idx"]
    assert torch.equal(format_of(FORMATS["gptq"][1]).weight(tensors), dense)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "layout marlin of GPTQ is unknown"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv of AWQ is unknown here; gemm"),
        ({"quant_method": "awq", "bits": 3}, "AWQ of 3 bits is unknown"),
        ({**group(4), "format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized of compressed-tensors"),
        ({**group(4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "format sparse of compressed-tensors"),
        ({"quant_method": "gptq", "bits": "four"}, "bits 'four' instead of a number"),
    ],
)
def test_another_variant_is_refused(stated, message):
    with pytest.raises(CheckpointError, match=message):
        format_of(stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "it lacks scales"),
        ({"scales": torch.ones(3, 32)}, "qzeros and scales do not fit"),
        ({"g_idx": torch.full((64,), 4)}, "g_idx and scales do not fit"),
        ({"qweight": torch.zeros(8, 32)}, "instead of an int32 matrix"),
        ({"g_idx": torch.zeros(85)}, "it has 3 bits per weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    tensors = {end: tensor for end, tensor in {**gptq(WEIGHT)[0], **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        format_of(FORMATS["gptq"][1]).weight(tensors)


def test_a_wrong_group_size_of_awq_is_named():
    layout = dataclasses.replace(format_of(FORMATS["awq"][1]), group_size=32)
    with pytest.raises(CheckpointError, match="qweight and scales do not fit"):
        layout.weight(awq(WEIGHT)[0])
