"""Each format of quantized weights is read as its formula says, exactly."""

import dataclasses
import json

import pytest
import torch

from ace_triton.errors import CheckpointError
from ace_triton.inputs.quantization_config import format_of
from ace_triton.inputs.quantized_formats import CompressedTensors, unpacked
from tests.inputs.quantizing import FORMATS, awq, gptq, group, mxfp4, nf4, packed, torchao_config

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


def test_experts_in_mxfp4_are_those_of_the_formula():
    tensors, dense = mxfp4(weight := torch.randn(2, 64, 24) * torch.tensor([1e-30, 1e30]).view(2, 1, 1))
    read = format_of({"quant_method": "mxfp4"}).weight(tensors)
    assert torch.equal(read.float(), dense)
    assert (dense / weight - 1).abs().median() < 0.15


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("_scales", None, "it lacks its scales"),
        ("_scales", torch.full((1, 2, 1), 255).byte(), "its scales have NaN"),
        ("_scales", torch.full((1, 2, 1), 254).byte(), "its values exceed the range of bfloat16"),
        ("_scales", torch.zeros(2, 1).byte(), r"its scales are torch.uint8 \(2, 1\) and not torch.uint8 \(1, 2, 1\)"),
        ("_blocks", torch.zeros(2, 1, 16).byte(), r"its blocks are torch.uint8 \(2, 1, 16\), not uint8 in 4 dim"),
    ],
)
def test_malformed_experts_are_named(part, value, message):
    parts = {"_blocks": torch.full((1, 2, 1, 16), 0x77).byte(), "_scales": torch.zeros(1, 2, 1).byte(), part: value}
    parts = {end: tensor for end, tensor in parts.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        format_of({"quant_method": "mxfp4"}).weight(parts)


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
        ({"quant_method": "awq", "bits": 3}, "its quantization_config has bits 3 instead of 4$"),
        (
            torchao_config("Int4WeightOnlyConfig"),
            "configuration Int4WeightOnlyConfig of torchao is unknown",
        ),
        (torchao_config("Int8WeightOnlyConfig", "Int4WeightOnlyConfig"), "configuration Int4WeightOnlyConfig of"),
        (
            {"quant_method": "torchao", "quant_type": {"default": "int4_weight_only"}},
            "configuration int4_weight_only of",
        ),
        ({**group(4), "format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized of compressed-tensors"),
        ({**group(4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "format sparse of compressed-tensors"),
        ({"quant_method": "gptq", "bits": "four"}, "its quantization_config has bits 'four' instead of 2, 4 or 8"),
    ],
)
def test_another_variant_is_refused(stated, message):
    with pytest.raises(CheckpointError, match=message):
        format_of(stated)


def test_block_sizes_of_older_versions_are_read():
    stated = {**group(8, strategy="block", block_structure="32x16"), "format": "float-quantized"}
    assert format_of(stated) == CompressedTensors((8,), (16,), (32,))


def compressed_config(**others):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", **others}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "gptq", "bits": 0}, "bits 0 instead of 2, 4 or 8"),
        ({"quant_method": "gptq", "bits": True}, "bits True instead of 2, 4 or 8"),
        ({"quant_method": "gptq", "group_size": "8"}, "group_size '8' instead of -1 or an integer of at least 1"),
        ({"quant_method": "gptq", "group_size": 0}, "group_size 0 instead of -1 or"),
        ({"quant_method": "awq", "q_group_size": None}, "q_group_size None instead of -1 or"),
        (compressed_config(config_groups=[1]), r"config_groups \[1\] instead of an object"),
        (compressed_config(config_groups={"a": 1}), r"config_groups\.a 1 instead of an object"),
        (
            compressed_config(config_groups={"a": {"weights": "x"}}),
            r"config_groups\.a\.weights 'x' instead of an object",
        ),
        (compressed_config(sparsity_config="x"), "sparsity_config 'x' instead of an object"),
        (compressed_config(**group(3)), "weights.num_bits 3 instead of 2, 4 or 8"),
        (group("x"), r"config_groups\.group_0\.weights\.num_bits 'x' instead of an integer from 1 to 16"),
        (group(None), "num_bits None instead of"),
        (group(8, group_size="8"), "group_size '8' instead of -1 or an integer of at least 1"),
        (group(8, block_structure=5), "block_structure 5 instead of a list of 2 integers of at least 1"),
        (group(8, block_structure=[0, 16]), r"block_structure \[0, 16\] instead of a list of 2"),
    ],
)
def test_an_invalid_field_is_named_with_its_value(stated, message):
    with pytest.raises(CheckpointError, match=f"^its quantization_config has .*{message}"):
        format_of(stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "it lacks scales"),
        ({"scales": torch.ones(3, 32)}, "qzeros and scales do not fit"),
        ({"g_idx": torch.full((64,), 4)}, "g_idx and scales do not fit"),
        ({"qweight": torch.zeros(8, 32)}, "instead of an int32 matrix"),
        ({"g_idx": torch.zeros(85).int()}, "it has 3 bits per weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    tensors = {end: tensor for end, tensor in {**gptq(WEIGHT)[0], **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        format_of(FORMATS["gptq"][1]).weight(tensors)


WORDS = torch.zeros(4, 32, dtype=torch.int32)
STATE = "weight.quant_state.bitsandbytes__nf4"


def encoded(**changes):
    """The state of nf4 with changed fields; None takes a field away."""
    state = {**json.loads(bytes(nf4(WEIGHT)[0][STATE].tolist())), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("gptq", "scales", torch.ones(32), r"scales is float32 \(32,\) instead of a matrix"),
        ("gptq", "scales", torch.tensor(1.0), r"scales is float32 \(\) instead of a matrix"),
        ("gptq", "scales", torch.full((4, 32), torch.nan), "scales has NaN or infinite values"),
        ("gptq", "qweight", WORDS.unsqueeze(2), r"qweight is int32 \(4, 32, 1\) instead of an int32 matrix"),
        ("gptq", "g_idx", torch.zeros(64, 1).int(), r"g_idx is int32 \(64, 1\) instead of a list of integers"),
        ("awq", "qweight", WORDS[:0], r"qweight is int32 \(0, 32\) instead of an int32 matrix"),
        ("awq", "scales", torch.full((4, 32), torch.inf), "scales has NaN or infinite values"),
        ("int4", "weight_shape", torch.ones(0).int(), "weight_packed and weight_shape do not fit each other"),
        ("int4", "weight_shape", torch.ones(3).int(), "weight_packed and weight_shape do not fit each other"),
        ("int4", "weight_shape", torch.tensor([32, 32]), r"\(32, 8\) of 32 bits and \(32, 32\) of 4 bits"),
        ("int4", "weight_packed", WORDS[0], r"weight_packed is int32 \(32,\) instead of an int32 matrix"),
        ("int4", "weight_g_idx", torch.full((64,), 4), "weight_g_idx and weight_scale do not fit each other"),
        ("int4", "weight_g_idx", torch.zeros(63).int(), "weight and weight_g_idx do not fit each other"),
        ("int4 with zero points", "weight_zero_point", WORDS[0], "weight_zero_point is int32"),
        ("fp8", "weight", torch.ones(32), r"weight is float32 \(32,\) instead of a matrix"),
        ("fp8", "weight_scale", torch.full((2, 4), torch.nan), "weight_scale has NaN"),
        ("bitsandbytes of 8 bits", "SCB", torch.full((32,), torch.nan), "SCB has NaN"),
        ("torchao", "_weight_scale", torch.ones(32, 3), r"its scale \(32, 3\) does not fit its qdata \(32, 64\)"),
        ("torchao", "_weight_scale", torch.full((1,), torch.nan), "it has NaN or infinite values"),
        ("torchao", "_weight_act_pre_scale", torch.ones(64), "its inputs are multiplied by act_pre_scale"),
        ("torchao", "_weight_qdata", WORDS, r"its qdata is torch.int32 \(4, 32\), not an int8 or FP8 matrix"),
        ("bitsandbytes of 4 bits", STATE, torch.ones(3).byte(), f"{STATE} is no JSON object"),
        ("bitsandbytes of 4 bits", STATE, torch.ones(3), f"{STATE} is no JSON object"),
        ("bitsandbytes of 4 bits", STATE, encoded(shape=None), f"{STATE} lacks shape, a list of 2 integers"),
        ("bitsandbytes of 4 bits", STATE, encoded(shape=[64, 64]), r"weight has 2,048 codes, .* \(64, 64\) needs more"),
        (
            "bitsandbytes of 4 bits",
            STATE,
            encoded(blocksize=None),
            f"{STATE} lacks blocksize, an integer of at least 1",
        ),
        ("bitsandbytes of 4 bits", STATE, encoded(blocksize=0), f"{STATE} has blocksize 0 instead of an integer of at"),
        (
            "bitsandbytes of 4 bits",
            STATE,
            encoded(nested_offset="x"),
            f"{STATE} has nested_offset 'x' instead of a num",
        ),
        (
            "bitsandbytes of 4 bits",
            "weight.quant_map",
            torch.ones(8),
            r"quant_map is float32 \(8,\) instead of 16 values",
        ),
        ("bitsandbytes of 4 bits", "weight.absmax", torch.ones(32), "codes of weight.nested_quant_map are float32"),
    ],
)
def test_a_malformed_tensor_is_named(name, part, value, message):
    quantize, stated = FORMATS[name]
    layout = format_of(stated)
    parts = {end: tensor for end, tensor in {**quantize(WEIGHT)[0], part: value}.items() if end in layout.parts}
    with pytest.raises(CheckpointError, match=message):
        layout.weight(parts)


def test_a_wrong_group_size_of_awq_is_named():
    layout = dataclasses.replace(format_of(FORMATS["awq"][1]), group_size=32)
    with pytest.raises(CheckpointError, match="qweight and scales do not fit"):
        layout.weight(awq(WEIGHT)[0])
