"""Models are saved and loaded through one registry of formats, and a new format needs nothing else."""

import json
from pathlib import Path

import pytest
import torch

from ace_triton import NMLinear, pack_model, prune_model
from ace_triton.errors import CheckpointError, PackedError
from ace_triton.formats import registry
from ace_triton.formats.format import Format
from ace_triton.formats.registry import format_of, inspect_checkpoint, load_model, register_format, save_model

IDS = torch.arange(3, 19).reshape(1, 16)


class Pickled(Format):
    """The tensors in one file of torch.save, beside the config."""

    name = "pickled"

    def check(self, model):
        return "only float32 is pickled" if model.dtype != torch.float32 else None

    def write(self, model, tokenizer, folder, report):
        model.config.save_pretrained(folder)
        (folder / "inside").mkdir()
        torch.save(model.state_dict(), folder / "inside" / "tensors.pt")
        if model.config.vocab_size == 1:
            raise OSError("no space left")

    def recognizes(self, source):
        return (Path(source) / "inside" / "tensors.pt").is_file()

    def load(self, source, *, dtype, device, trust_remote_code):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        model.load_state_dict(torch.load(Path(source) / "inside" / "tensors.pt", weights_only=True))
        return model.to(device, None if dtype == "auto" else dtype).eval(), None


@pytest.fixture
def pickled(monkeypatch) -> Pickled:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    format = Pickled()
    register_format(format)
    return format


@pytest.fixture
def model(make_decoder):
    """A small Llama, pruned to 2:4 and packed."""
    model = make_decoder("llama", attention="sdpa")
    prune_model(model, None, "magnitude")
    pack_model(model)
    return model


def test_dense_and_packed_are_formats(make_decoder, model, tokenizer, tmp_path):
    dense = make_decoder("llama", attention="sdpa")
    save_model(dense, tokenizer, tmp_path / "dense", report={"method": "none"})
    save_model(model, tokenizer, tmp_path / "packed", "packed", report={"method": "magnitude"})
    for name, saved in (("dense", dense), ("packed", model)):
        assert format_of(tmp_path / name).name == name
        again, words = load_model(tmp_path / name, dtype=torch.float32)
        assert torch.equal(again(IDS).logits, saved(IDS).logits)
        assert words("fox")["input_ids"] == tokenizer("fox")["input_ids"]
    assert json.loads((tmp_path / "packed" / "ace_triton.json").read_text())["method"] == "magnitude"
    assert json.loads((tmp_path / "dense" / "ace_triton.json").read_text())["method"] == "none"
    assert {tensor.packed for tensor in inspect_checkpoint(tmp_path / "packed")} == {True, False}
    assert {tensor.packed for tensor in inspect_checkpoint(tmp_path / "dense")} == {False}
    assert format_of("someone/nosuch").name == format_of(tmp_path / "nosuch").name == "dense"
    (tmp_path / "packed" / "packed.safetensors").write_bytes(b"")
    with pytest.raises(PackedError, match="truncated"):
        load_model(tmp_path / "packed")


def test_a_registered_format_is_written_read_and_replaced(pickled, make_decoder, tmp_path):
    model, out = make_decoder("llama", attention="sdpa"), tmp_path / "out"
    for report in (None, {"method": "again"}):
        save_model(model, None, out, "pickled", report=report, overwrite=True)
        again, _ = load_model(out)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    facts = json.loads((out / "ace_triton.json").read_text())
    assert facts["method"] == "again"
    assert set(facts["files"]) >= {"inside/tensors.pt", "config.json"}
    with pytest.raises(CheckpointError, match="already exists"):
        save_model(model, None, out, "pickled")


def test_what_a_format_refuses_or_fails_to_write_leaves_nothing(pickled, make_decoder, model, tmp_path):
    dense, out = make_decoder("llama", attention="sdpa"), tmp_path / "out"
    with pytest.raises(CheckpointError, match="only float32 is pickled"):
        save_model(make_decoder("llama", attention="sdpa").half(), None, out, "pickled")
    with pytest.raises(CheckpointError, match="no packed layer"):
        save_model(dense, None, out, "packed")
    assert any(isinstance(module, NMLinear) for module in model.modules())
    with pytest.raises(CheckpointError, match="has packed layers: save it as 'packed'"):
        save_model(model, None, out)
    dense.config.vocab_size = 1
    with pytest.raises(CheckpointError, match=r"out: could not be written .*no space left.*nothing there was changed"):
        save_model(dense, None, out, "pickled")
    assert list(tmp_path.iterdir()) == []


def test_names_of_formats(pickled, make_decoder, tmp_path):
    with pytest.raises(CheckpointError, match="unknown format 'nosuch': use one of dense, packed, pickled"):
        save_model(make_decoder("llama", attention="sdpa"), None, tmp_path / "out", "nosuch")
    with pytest.raises(CheckpointError, match="there is a format 'pickled' already"):
        register_format(Pickled())


def test_commands_name_the_format_that_they_do_not_read(pickled, make_decoder, command, tmp_path, monkeypatch):
    folder = tmp_path / "pickled"
    save_model(make_decoder("llama", attention="sdpa"), None, folder, "pickled")
    for words, message in (
        (("pack", folder, tmp_path / "out"), "is in the format 'pickled', and this command reads dense checkpoints"),
        (("recover", folder, tmp_path / "out"), "is pickled: recover the dense checkpoint with zeros"),
        (("info", folder), "is in the format 'pickled', which ace-triton info does not read"),
    ):
        code, _, errors = command(*words)
        assert code == 1
        assert message in " ".join(errors.split())
    monkeypatch.delattr(Pickled, "load")
    code, _, errors = command("generate", folder, "--prompt", "a")
    assert code == 1
    assert "is in the format 'pickled', which ace-triton writes and does not load" in " ".join(errors.split())
    assert not (tmp_path / "out").exists()
