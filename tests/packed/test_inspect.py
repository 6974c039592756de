import json

import pytest
import torch
from safetensors.torch import save_file

from ace_triton.errors import CheckpointError, PackedError
from ace_triton.formats.registry import inspect_checkpoint
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.packed.inspect import surely_not_pruned
from ace_triton.packed.manifest import Manifest


def test_a_folder(tmp_path):
    pruned = select_nm(torch.randn(8, 16), ScoreTerms(), 2, 4)
    save_file({"b.weight": pruned, "norm": torch.ones(8)}, tmp_path / "model-1.safetensors")
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model-2.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert [(t.name, t.shape, t.zeros, t.pattern) for t in found] == [
        ("a.weight", (4, 4), 0.0, "dense"),
        ("b.weight", (8, 16), 0.5, "2:4"),
    ]


def test_a_quick_look_tells_that_nothing_is_pruned(tmp_path):
    dense, pruned = torch.ones(4, 8), torch.ones(4, 8)
    dense[0, 0] = pruned[0, :2] = 0
    save_file({"a": dense, "norm": torch.zeros(8)}, tmp_path / "model.safetensors")
    assert surely_not_pruned(tmp_path, 0.05)
    assert not surely_not_pruned(tmp_path, 1 / 32)
    for name, other in (("pruned", pruned), ("integers", torch.ones(4, 8, dtype=torch.int32))):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"a": dense, "b": other}, folder / "model.safetensors")
        assert not surely_not_pruned(folder, 0.05), name
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    for unknown in (damaged, tmp_path / "none", tmp_path / "model.safetensors", "owner/name"):
        assert not surely_not_pruned(unknown, 0.05)


def test_a_matrix_without_elements_is_dense(tmp_path, command):
    save_file({"[/]": torch.ones(0, 4), "b": torch.ones(4, 0)}, tmp_path / "model.safetensors")
    assert [(t.name, t.zeros, t.pattern) for t in inspect_checkpoint(tmp_path)] == [
        ("[/]", 0.0, "dense"),
        ("b", 0.0, "dense"),
    ]
    code, _, errors = command("info", tmp_path)
    assert code == 0, errors


def test_an_index_says_which_files_count(tmp_path):
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model-1.safetensors")
    save_file({"stale": torch.ones(4, 4)}, tmp_path / "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert [tensor.name for tensor in inspect_checkpoint(tmp_path)] == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: is missing, and .*index\.json names it"):
        inspect_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: lacks b, which"):
        inspect_checkpoint(tmp_path)


def test_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect_checkpoint(tmp_path / "nosuch")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        CheckpointError, match=r"a\.gguf: is a file; name the folder .*; ace-triton plan shows the layers"
    ):
        inspect_checkpoint(tmp_path / "a.gguf")
    with pytest.raises(PackedError, match=r"a\.gguf: is a file; name a folder"):
        Manifest.read(tmp_path / "a.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\x00" * 20)
    with pytest.raises(CheckpointError, match="may be damaged"):
        inspect_checkpoint(tmp_path)
