"""Checkpoints with quantized weights are dequantized tensor by tensor, or refused in one line."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ace_triton import Recipe, prune_checkpoint
from ace_triton.errors import CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.inputs.quantized_formats import Gptq
from ace_triton.planning.pruning_plan import plan_pruning
from tests.inputs.quantizing import FORMATS, mxfp4

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


def stored_in(layout, folder, target, layers="_proj.", transposed=False):
    """A checkpoint's copy with its blocks' layers quantized, and beside it a dense copy of what its weights are."""
    quantize, stated = FORMATS[layout]
    dense = shutil.copytree(folder, target.with_name("dense"))
    source = quantized(folder, target, {**stated, "ignore": ["lm_head"]})
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if layers in name]:
        ends, dense_weight = quantize(tensors.pop(name).t().contiguous() if transposed else tensors.pop(name))
        values[name] = dense_weight.t().contiguous() if transposed else dense_weight
        tensors |= {f"{name.removesuffix('weight')}{end}": tensor.contiguous() for end, tensor in ends.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    save_file({**load_file(folder / "model.safetensors"), **values}, dense / "model.safetensors", {"format": "pt"})
    return source, dense


def same_files(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "layout", ["gptq in another order", "awq", "torchao", "int4 with zero points", "bitsandbytes of 4 bits"]
)
def test_the_dense_model_of_a_quantized_one_is_pruned(tiny_checkpoint, tmp_path, layout):
    source, dense = stored_in(layout, tiny_checkpoint, tmp_path / "quantized")
    assert not any("quantized" in line for line in plan_pruning(source, MAGNITUDE, stream=True).warnings)
    model, tokenizer = checkpoint.load(source)
    expected, _ = checkpoint.load(dense)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.named_parameters())
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    checkpoint.save(model, tokenizer, tmp_path / "loaded", {})
    prune_checkpoint(source, tmp_path / "streamed", None, MAGNITUDE)
    prune_checkpoint(dense, tmp_path / "expected", None, MAGNITUDE)
    assert same_files(tmp_path / "streamed", tmp_path / "expected")
    for folder in ("streamed", "loaded"):
        assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())
    assert not list(tmp_path.glob(".*"))


def test_the_experts_of_a_mixture_are_dequantized_one_by_one(make_decoder, save, tmp_path):
    folder = save(make_decoder("qwen3_moe", num_hidden_layers=1))
    source, dense = stored_in("gptq", folder, tmp_path / "quantized")
    prune_checkpoint(source, tmp_path / "streamed", None, MAGNITUDE)
    prune_checkpoint(dense, tmp_path / "expected", None, MAGNITUDE)
    assert same_files(tmp_path / "streamed", tmp_path / "expected")


def gpt_oss():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", vocab_size=101, **sizes)).bfloat16()


def test_experts_in_mxfp4_are_dequantized_one_parameter_at_a_time(save, tmp_path):
    model = gpt_oss()
    source = quantized(save(model), tmp_path / "quantized", {"quant_method": "mxfp4"})
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        ends, dense = mxfp4(tensors.pop(name))
        tensors |= {f"{name}{end}": tensor for end, tensor in ends.items()}
        model.get_parameter(name).data = dense.to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert not any("quantized" in line for line in plan_pruning(source, MAGNITUDE, stream=True).warnings)
    prune_checkpoint(source, tmp_path / "streamed", None, MAGNITUDE)
    prune_checkpoint(save(model, "dense"), tmp_path / "expected", None, MAGNITUDE)
    assert same_files(tmp_path / "streamed", tmp_path / "expected")


@pytest.mark.parametrize("layout", ["gptq", "bitsandbytes of 8 bits"])
def test_weights_that_gpt2_stores_transposed_are_turned(make_decoder, save, tmp_path, layout):
    """One of its matrices is square, so its shape does not show which way round it is."""
    folder = save(make_decoder("gpt2", n_layer=1))
    source, dense = stored_in(layout, folder, tmp_path / "quantized", "c_proj.weight", transposed=True)
    model, expected = (checkpoint.load(one)[0] for one in (source, dense))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.named_parameters())


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "it lacks scales"),
        (torch.ones(3), r"scales is float32 \(3,\) instead of a matrix"),
    ],
)
def test_a_malformed_layer_is_one_error_every_time(tiny_checkpoint, tmp_path, scales, message):
    """Threads of transformers still read the files when the error comes."""
    source, _ = stored_in("gptq", tiny_checkpoint, tmp_path / "quantized")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    if scales is not None:
        tensors["model.layers.0.mlp.up_proj.scales"] = scales
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for _ in range(10):
        with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.up_proj\.weight cannot be dequantized: {message}"):
            checkpoint.load(source)


def test_an_error_that_no_check_foresees_names_the_layer(tiny_checkpoint, tmp_path, monkeypatch):
    source, _ = stored_in("gptq", tiny_checkpoint, tmp_path / "quantized")
    monkeypatch.setattr(Gptq, "weight", lambda self, parts: torch.ones(2) + torch.ones(3))
    with pytest.raises(CheckpointError, match=r"_proj\.weight cannot be dequantized: The size of tensor a \(2\)"):
        checkpoint.load(source)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "gptq", "bits": 0}, "has bits 0 instead of 2, 4 or 8"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, r"has config_groups \[1\] instead of an object"),
        ({"quant_method": "compressed-tensors", "sparsity_config": "x"}, "has sparsity_config 'x' instead of an obj"),
    ],
)
def test_an_invalid_configuration_is_a_warning_of_the_plan(tiny_checkpoint, tmp_path, stated, message):
    source = quantized(tiny_checkpoint, tmp_path / "quantized", stated)
    assert any(re.search(message, line) for line in plan_pruning(source, MAGNITUDE).warnings)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(source)


def test_an_unknown_variant_is_refused_with_what_can_be_read(tiny_checkpoint, tmp_path):
    stated = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    source = quantized(tiny_checkpoint, tmp_path / "quantized", stated)
    message = r"its weights are quantized \(awq\): the version gemv of AWQ is unknown here; gemm can be read; name the"
    assert any("version gemv" in line for line in plan_pruning(source, MAGNITUDE).warnings)
    for call in (lambda: checkpoint.load(source), lambda: prune_checkpoint(source, tmp_path / "out", None, MAGNITUDE)):
        with pytest.raises(CheckpointError, match=message):
            call()


@pytest.mark.parametrize("method", ["quanto", "hqq", "of tomorrow"])
def test_other_quantized_weights_are_refused_in_one_line(tiny_checkpoint, tmp_path, method):
    source = quantized(tiny_checkpoint, tmp_path / "quantized", {"quant_method": method, "bits": 4})
    message = rf"its weights are quantized \({method}\) and cannot be streamed: name the floating-point model"
    assert any(f"quantized ({method})" in line for line in plan_pruning(source, MAGNITUDE).warnings)
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(source, tmp_path / "out", None, MAGNITUDE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", tiny_checkpoint.name]
