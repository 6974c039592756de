"""A pruned checkpoint packed layer by layer in files: the same bytes as packing in memory."""

import json

import pytest
import torch

from ace_triton import NMLinear, load, pack_checkpoint, pack_model, prune_model, save_packed
from ace_triton.errors import ArgumentError
from ace_triton.inputs import checkpoint
from ace_triton.packed import pack_model as packing


@pytest.fixture
def pruned(make_decoder, save, ids):
    """pruned(family): a folder of a model of a family, pruned to 2:4."""

    def prune(family, **changes):
        model = make_decoder(family, **changes)
        prune_model(model, ids, "magnitude", "2:4")
        return save(model)

    return prune


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed_in_memory(source, out, dtype="auto", **options):
    model, tokenizer = checkpoint.load(source, dtype=dtype)
    result = pack_model(model, **options)
    save_packed(model, tokenizer, out)
    return result


def test_every_family_is_packed_to_the_same_bytes(family, pruned, tmp_path):
    source = pruned(family)
    whole = packed_in_memory(source, tmp_path / "memory")
    assert pack_checkpoint(source, tmp_path / "streamed") == whole
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "streamed", source.name}


@pytest.mark.parametrize(
    ("family", "include"), [("llama", "*.q_proj"), ("qwen3_moe", ("*.experts.[12].*", "*.q_proj"))]
)
def test_another_dtype_some_layers_and_tied_weights(family, include, pruned, tmp_path):
    options = {"pattern": "2:4", "include": include, "exclude": "*.layers.0.*"}
    source = pruned(family, tie_word_embeddings=True, attention_bias=True)
    whole = packed_in_memory(source, tmp_path / "memory", dtype=torch.bfloat16, **options)
    assert pack_checkpoint(source, tmp_path / "streamed", dtype=torch.bfloat16, **options) == whole
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert json.loads((tmp_path / "streamed" / "ace_triton_packed.json").read_text())["tied"]
    assert any(isinstance(module, NMLinear) for module in load(tmp_path / "streamed").modules())


def test_no_weight_stays_in_memory(pruned, tmp_path, monkeypatch):
    """Once a layer is packed or skipped, its parameters are on the meta device and its buffers are maps of files."""
    left = []
    replace = packing._replace

    def watching(model, layer, replacement):
        replace(model, layer, replacement)
        left.extend(name for name, parameter in model.named_parameters() if not parameter.is_meta)
        left.extend(name for name, b in replacement.named_buffers() if b.untyped_storage().filename is None)

    monkeypatch.setattr(packing, "_replace", watching)
    pack_checkpoint(pruned("llama"), tmp_path / "out")
    assert left == []


def test_bad_input_leaves_nothing(make_decoder, save, tmp_path):
    source = save(make_decoder("llama"))
    with pytest.raises(ArgumentError, match="no layer of LlamaForCausalLM can be packed: it is dense"):
        pack_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_the_command(command, pruned, tmp_path):
    source = pruned("llama")
    for folder, words in (("memory", ()), ("streamed", ("--stream",))):
        code, out, errors = command("pack", source, tmp_path / folder, *words, "--json", tmp_path / f"{folder}.json")
        assert code == 0, errors
        assert "layers packed 2:4" in out
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    one, other = (json.loads((tmp_path / f"{folder}.json").read_text()) for folder in ("memory", "streamed"))
    assert one["layers"] == other["layers"]
