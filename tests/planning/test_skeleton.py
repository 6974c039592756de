"""A model without weights: the shapes, dtypes and ties of the loaded one, in no memory."""

import json

import pytest
import torch

from ace_triton.errors import CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.planning.skeleton import skeleton
from ace_triton.process_memory import resident_bytes


def shapes(model) -> dict:
    return {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_it_looks_like_the_loaded_model(tiny_checkpoint, dtype):
    built = skeleton(tiny_checkpoint, dtype=dtype)
    model, _ = checkpoint.load(tiny_checkpoint, dtype=dtype)
    assert shapes(built.model) == shapes(model)
    assert built.converts == (dtype is torch.bfloat16)
    assert built.stored_bytes == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert not built.model.training
    assert not any(parameter.is_meta or bool(parameter.any()) for parameter in built.model.parameters())
    own, loaded = dict(built.model.named_buffers()), dict(model.named_buffers())
    assert own.keys() == loaded.keys()
    assert all(torch.equal(buffer, loaded[name]) for name, buffer in own.items())


def test_tied_weights_stay_tied(make_decoder, tokenizer, tmp_path):
    make_decoder("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = skeleton(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_large_model_takes_no_memory_and_its_weights_are_not_read(tiny_checkpoint):
    """Two blocks of 800 MB each in bfloat16; the weights in the files are of another shape."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 16384, "dtype": "bfloat16"}
    (tiny_checkpoint / "config.json").write_text(json.dumps(config))
    before = resident_bytes()
    model = skeleton(tiny_checkpoint).model
    assert sum(parameter.nbytes for parameter in model.parameters()) > 1.6e9
    assert resident_bytes() - before < 1e8


def test_a_quantized_checkpoint_is_noticed(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tiny_checkpoint / "config.json").write_text(json.dumps(config))
    assert skeleton(tiny_checkpoint).quantization == {"quant_method": "gptq", "bits": 4}


def test_errors_are_those_of_loading(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        skeleton(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    with pytest.raises(CheckpointError, match="not a causal language model"):
        skeleton(tmp_path)
