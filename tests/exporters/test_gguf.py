"""GGUF: which types keep zeros, and that transformers reads back what was written."""

import json

import numpy as np
import pytest
import torch

import ace_triton
from ace_triton.exporters.gguf import TYPES
from ace_triton.inputs.checkpoint import load

gguf = pytest.importorskip("gguf")


@pytest.fixture
def merging(tokenizer):
    """A byte-level tokenizer with one merge."""
    from transformers import PreTrainedTokenizerFast

    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    stored["model"]["vocab"]["th"] = 300
    stored["model"]["merges"] = [["t", "h"]]
    from tokenizers import Tokenizer

    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), bos_token="<s>", eos_token="</s>"
    )
    own.chat_template = "{{ messages[0].content }}"
    return own


@pytest.fixture
def pruned(make_decoder, merging, tmp_path):
    """pruned(family): the folder of a model pruned to 2:4. Each row of its weights holds whole blocks."""

    def make(family, **changes):
        sizes = {"vocab_size": 320, "intermediate_size": 64, "max_position_embeddings": 128}
        model = make_decoder(family, **{**sizes, **changes})
        ids = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(0))
        ace_triton.prune_model(model, ids, "magnitude", "2:4")
        model.save_pretrained(tmp_path / family)
        merging.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_model_back(pruned, command, tmp_path, family):
    source = pruned(family)
    code, out, errors = command("export", source, tmp_path / "out", "--to", "gguf", "--weight-type", "f32")
    assert code == 0, errors
    assert "2:4" in out
    read, tokenizer = load(tmp_path / "out" / "model.gguf", dtype=torch.float32)
    expected, own = load(source, dtype=torch.float32)
    state = read.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    text = "the other moth\n"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert 300 in own(text).input_ids
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == own.chat_template


@pytest.mark.parametrize("weight_type", TYPES)
def test_every_type_that_is_written_keeps_zeros(pruned, tmp_path, weight_type):
    """Read here with the package gguf alone."""
    report = ace_triton.export_model(pruned("llama"), tmp_path / "out", "gguf", weight_type=weight_type)
    assert [matrix.pattern for matrix in report.matrices].count("2:4") == 21
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    tensor = written["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == TYPES[weight_type]
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(32, 64)
    assert (weight != 0).reshape(32, 16, 4).sum(-1).max() == 2
    assert report.largest_difference < {"f32": 1e-6, "f16": 1e-3, "q8_0": 1e-2}.get(weight_type, 0.2)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_types_with_an_offset_lose_zeros(kind):
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    weight[:, ::2] = 0
    known = gguf.GGMLQuantizationType[kind]
    read = gguf.quants.dequantize(gguf.quants.quantize(weight, known), known)
    assert np.mean(read[weight == 0] == 0) < 0.1


def test_a_row_that_is_no_multiple_of_a_block_is_f16(pruned, tmp_path):
    ace_triton.export_model(pruned("llama", intermediate_size=48), tmp_path / "out", "gguf", weight_type="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {}, "a mistral model: export to gguf supports llama, qwen2"),
        ("llama", {"attention_bias": True}, "the model has a bias"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
    ],
)
def test_what_it_does_not_support_is_one_error(pruned, command, tmp_path, family, changes, message):
    code, _, errors = command("export", pruned(family, **changes), tmp_path / "out", "--to", "gguf")
    assert code == 1
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_an_unknown_tokenizer_is_one_error(pruned, command, tmp_path):
    source = pruned("llama")
    stored = json.loads((source / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(stored))
    code, _, errors = command("export", source, tmp_path / "out", "--to", "gguf")
    assert code == 1
    assert "words split by Whitespace" in errors
