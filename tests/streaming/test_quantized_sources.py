"""Checkpoints with quantized weights: FP8 is dequantized tensor by tensor, and the others are refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ace_triton import Recipe, prune_checkpoint
from ace_triton.errors import CheckpointError
from ace_triton.planning.pruning_plan import plan_pruning

MAGNITUDE = Recipe("magnitude")
SIZES = {"hidden_size": 128, "intermediate_size": 128}
BLOCK = 128


def quantized(source, target, stated):
    """A copy of a checkpoint whose configuration says that its weights are quantized."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return target


def test_fp8_weights_are_dequantized(make_decoder, save, tmp_path):
    model = make_decoder("llama", **SIZES, num_hidden_layers=2).to(torch.bfloat16)
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    source = quantized(save(model), tmp_path / "fp8", stated)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors[name].float()
        # A block has one scale; a power of two makes the dequantized weights exact.
        scale = 2.0 ** (weight.abs().amax() / 448).log2().ceil()
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        model.get_parameter(name).data = (tensors[name].float() * scale).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_pruning(source, MAGNITUDE, stream=True)
    assert not any("quantized" in line for line in plan.warnings)
    assert plan.disk.work_bytes >= 2 * sum(parameter.nbytes for parameter in model.parameters())
    prune_checkpoint(source, tmp_path / "streamed", None, MAGNITUDE)
    prune_checkpoint(save(model, "dense"), tmp_path / "expected", None, MAGNITUDE)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "expected"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "quantization_config" not in json.loads((tmp_path / "streamed" / "config.json").read_text())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "of tomorrow"])
def test_other_quantized_weights_are_refused_in_one_line(tiny_checkpoint, tmp_path, method):
    source = quantized(tiny_checkpoint, tmp_path / "quantized", {"quant_method": method, "bits": 4})
    message = rf"its weights are quantized \({method}\) and cannot be streamed: name the floating-point model"
    assert any(f"quantized ({method})" in line for line in plan_pruning(source, MAGNITUDE).warnings)
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(source, tmp_path / "out", None, MAGNITUDE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", tiny_checkpoint.name]
