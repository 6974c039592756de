"""Runs that keep the hidden states on disk write the same model, and leave no file behind."""

import pytest
import torch

from ace_triton import plan_pruning, prune_checkpoint
from ace_triton.decoders.kept_tensors import TensorFiles
from ace_triton.errors import ArgumentError


@pytest.fixture
def folders(monkeypatch):
    """The folders in which hidden states were kept."""
    seen, write = set(), TensorFiles.__setitem__

    def writing(self, key, tensor):
        seen.add(self._folder)
        write(self, key, tensor)

    monkeypatch.setattr(TensorFiles, "__setitem__", writing)
    return seen


def test_a_streamed_run_keeps_them_beside_its_output(tiny_checkpoint, tmp_path, folders):
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    for offload in ("memory", "disk"):
        prune_checkpoint(tiny_checkpoint, tmp_path / offload, ids, "wanda", offload=offload)
    files = [(tmp_path / offload / "model.safetensors").read_bytes() for offload in ("memory", "disk")]
    assert files[0] == files[1]
    assert [folder.parent.parent for folder in folders] == [tmp_path]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ArgumentError, match="offload must be one of memory, disk; got 'cloud'"):
        prune_checkpoint(tiny_checkpoint, tmp_path / "other", ids, "wanda", offload="cloud")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_the_command_keeps_them_beside_its_output(command, tiny_checkpoint, some_text, tmp_path, folders, stream):
    words = ("--calibration", some_text, "--samples", 4, "--length", 16, "--device", "cpu", stream)
    for offload in ("memory", "disk"):
        assert command("prune", tiny_checkpoint, tmp_path / offload, *words, "--offload", offload)[0] == 0
    files = [(tmp_path / offload / "model.safetensors").read_bytes() for offload in ("memory", "disk")]
    assert files[0] == files[1]
    assert all(tmp_path in folder.parents for folder in folders)
    assert folders
    assert not list(tmp_path.glob(".*"))
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "other", *words, "--offload", "cloud")
    assert code == 2
    assert "'cloud' is not one of 'memory', 'disk'" in errors


def test_a_plan_counts_the_hidden_states_of_one_batch(tiny_checkpoint):
    sizes = {"samples": 2**16, "length": 128}
    memory, disk = (plan_pruning(tiny_checkpoint, "wanda", **sizes, offload=where) for where in ("memory", "disk"))
    saved = (2**16 * 128 - 2048) * 32 * 4
    assert memory.in_memory.peak - disk.in_memory.peak == pytest.approx(saved, rel=0.1)
    assert memory.streamed.peak - disk.streamed.peak == pytest.approx(saved, rel=0.1)
    with pytest.raises(ArgumentError, match="offload must be one of"):
        plan_pruning(tiny_checkpoint, "wanda", offload="cloud")
