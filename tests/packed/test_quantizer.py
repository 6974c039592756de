"""transformers loads packed folders itself, as ``ace_triton.load`` does."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import ace_triton
from ace_triton.errors import CheckpointError, PackedError
from ace_triton.packed.manifest import MANIFEST_FILE, TENSORS_FILE
from ace_triton.packed.quantizer import PackedConfig, _check_devices
from ace_triton.packed.registration import register_with_transformers

IDS = torch.arange(3, 35).reshape(2, 16)


def pack(make_decoder, folder, family="llama", **changes):
    model = make_decoder(family, attention="sdpa", **changes)
    ace_triton.prune_model(model, IDS, "magnitude", "2:4")
    ace_triton.pack_model(model)
    ace_triton.save_packed(model, None, folder)
    return model


@pytest.fixture
def folder(make_decoder, tmp_path):
    """A packed Llama with a tied head."""
    pack(make_decoder, tmp_path / "packed", tie_word_embeddings=True)
    return tmp_path / "packed"


def tensors(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def assert_same(one, other):
    for (name, tensor), (other_name, other_tensor) in zip(tensors(one), tensors(other), strict=True):
        assert name == other_name
        assert tensor.dtype == other_tensor.dtype
        assert torch.equal(tensor, other_tensor)
        assert tensor.requires_grad == other_tensor.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma4_text"])
def test_it_is_the_model_of_our_loader(family, make_decoder, tmp_path):
    model = pack(make_decoder, tmp_path / "packed", family, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same(loaded, ace_triton.load(tmp_path / "packed"))
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_it_saves_the_packed_format(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "again" / TENSORS_FILE).read_bytes() == (folder / TENSORS_FILE).read_bytes()
    assert_same(ace_triton.load(tmp_path / "again"), loaded)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_one_device_and_another_dtype(folder, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.bfloat16)
    assert_same(loaded, ace_triton.load(folder, dtype=torch.bfloat16))
    assert loaded.half().dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, r"dtype torch\.float64: packed checkpoints can be loaded as float32, float16, bflo"),
        ({"device_map": {"": "disk"}}, "device_map leaves layers on disk: packed layers cannot be offloaded"),
    ],
)
def test_what_it_cannot_give(folder, options, message):
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_layers_beside_a_gpu_are_not_offloaded():
    _check_devices({"model": 0, "lm_head": 1})
    with pytest.raises(CheckpointError, match="leaves layers on cpu: packed layers cannot be offloaded"):
        _check_devices({"model": 0, "lm_head": "cpu"})


def test_other_classes_and_dense_models_are_refused(folder, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="is a packed LlamaForCausalLM, not a LlamaModel"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"call ace_triton\.pack_model\(model\) on a pruned model"):
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint, quantization_config=PackedConfig())


def test_a_damaged_folder_is_refused(folder):
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(content)
    with pytest.raises(PackedError, match="does not match its checksum"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(PackedError, match=f"has no {MANIFEST_FILE}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_from_before_loads_with_our_loader(folder):
    model = ace_triton.load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    content = json.loads((folder / MANIFEST_FILE).read_text())
    stored = (folder / "config.json").read_bytes()
    content["files"]["config.json"] = {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert_same(ace_triton.load(folder), model)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def in_cache(folder, cache):
    """The folder as the hub's cache has it after transformers asked for the weights alone."""
    snapshot = cache / "models--someone--packed" / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_model_of_the_hub(folder, tmp_path):
    snapshot = in_cache(folder, tmp_path / "cache")
    (snapshot / "generation_config.json").unlink()  # Not asked for yet, so it is not an error.
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained("someone/packed", **options)
    assert_same(loaded, ace_triton.load(folder))


def test_a_manifest_that_the_hub_does_not_give(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (in_cache(folder, tmp_path / "cache") / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"snapshot_download\('someone/packed'\)"):
        AutoModelForCausalLM.from_pretrained("someone/packed", cache_dir=tmp_path / "cache", local_files_only=True)


@pytest.fixture
def unregistered(monkeypatch):
    """transformers as it is without this package."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "ace_triton")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ace_triton")


def test_without_the_package_transformers_names_it_and_stops(folder, unregistered, monkeypatch):
    """Without an error transformers would fill the packed layers with random weights."""
    said: list[str] = []
    monkeypatch.setattr(auto.logger, "warning", said.append)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "Unknown quantization type, got ace_triton" in said[0]


def test_it_is_registered_once(unregistered):
    register_with_transformers()
    assert "ace_triton" in auto.AUTO_QUANTIZER_MAPPING
    ace_triton.register_quantizer()
