import json

import pytest
import torch

from ace_triton import checkpoint
from ace_triton.checkpoint import CheckpointError


def test_what_was_saved_loads_the_same(tmp_path, tiny_model, tokenizer):
    out = tmp_path / "deep" / "out"
    checkpoint.save(tiny_model, tokenizer, out, {"method": "ace"})
    again, words = checkpoint.load(out)
    assert words("fox")["input_ids"] == tokenizer("fox")["input_ids"]
    for (name, one), other in zip(tiny_model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not again.training
    assert json.loads((out / "ace_triton.json").read_text()) == {"method": "ace"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_nothing_is_overwritten_unasked(tmp_path, tiny_model, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="--overwrite"):
        checkpoint.save(tiny_model, tokenizer, out, {})
    assert (out / "mine").read_text() == "mine"
    checkpoint.save(tiny_model, tokenizer, out, {}, overwrite=True)
    assert not (out / "mine").exists()
    assert (out / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_midway_leaves_the_old_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")

    def fail_midway():
        with checkpoint.replacing(out, overwrite=True) as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "mine"


def test_what_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.check_out(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.check_out(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load(tmp_path / "broken.gguf")


def test_a_damaged_checkpoint_says_so(tiny_checkpoint):
    weights = tiny_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load(tiny_checkpoint)
