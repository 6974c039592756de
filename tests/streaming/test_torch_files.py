"""Checkpoints in files that torch.save wrote stream, and are counted like safetensors files."""

import json

import pytest
import torch

from ace_triton import plan_pruning, prune_checkpoint
from ace_triton.errors import CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.inputs.model_source import weight_file_bytes


@pytest.fixture
def torch_checkpoint(tiny_model, save):
    """torch_checkpoint(shards): a folder with the tiny model in this many .bin files; 0 for one without an index."""

    def make(shards=0, **options):
        source = save(tiny_model)
        (source / "model.safetensors").unlink()
        state = dict(tiny_model.state_dict())
        if not shards:
            torch.save(state, source / "pytorch_model.bin", **options)
            return source
        places = {}
        for number in range(shards):
            name = f"pytorch_model-{number}.bin"
            part = {key: state[key] for key in list(state)[number::shards]}
            torch.save(part, source / name, **options)
            places |= dict.fromkeys(part, name)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (source / "training_args.bin").write_bytes(b"0" * 1000)
        return source

    return make


@pytest.mark.parametrize("shards", [0, 2])
def test_they_stream_by_themselves_if_the_model_does_not_fit(command, torch_checkpoint, shards, tmp_path, monkeypatch):
    source = torch_checkpoint(shards)
    assert weight_file_bytes(source) == sum(path.stat().st_size for path in source.glob("pytorch_model*.bin"))
    assert command("prune", source, tmp_path / "memory", "--method", "magnitude")[0] == 0
    monkeypatch.setattr("ace_triton.streaming.fits.available_memory", lambda: 1000)
    code, _, errors = command("prune", source, tmp_path / "streamed", "--method", "magnitude")
    assert code == 0, errors
    assert "so its weights stay in files (--stream)" in errors
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("memory", "streamed")]
    assert weights[0] == weights[1]


def test_the_plan_counts_their_copy(torch_checkpoint, tiny_model):
    """transformers writes each weight to a file of its own before it can stay there."""
    source = torch_checkpoint()
    size = sum(parameter.nbytes for parameter in tiny_model.parameters())
    in_memory, in_files = (plan_pruning(source, "fast", stream=stream).disk for stream in (False, True))
    assert in_files.work_bytes - in_memory.work_bytes == size
    pages = plan_pruning(source, "fast", dtype=torch.bfloat16).in_memory.file_pages
    assert pages == {"load the model": weight_file_bytes(source)}


def test_files_that_cannot_be_mapped_are_refused(torch_checkpoint, tmp_path):
    source = torch_checkpoint(_use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"written by torch before 1.6 and cannot be mapped.*leave --stream out"):
        prune_checkpoint(source, tmp_path / "out", None, "magnitude")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    assert checkpoint.load(source)[0].num_parameters()
