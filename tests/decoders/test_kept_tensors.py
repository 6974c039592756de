"""Hidden states in files are the same as in memory, leave the memory of the process, and leave no file behind."""

import resource
from pathlib import Path

import pytest
import torch

from ace_triton import prune_model
from ace_triton.decoders.kept_tensors import TensorFiles, keeper
from ace_triton.errors import CheckpointError
from ace_triton.recipe import Recipe

TENSORS = {
    "plain": torch.randn(2, 3, 5),
    "bf16": torch.randn(1, 7, 4).bfloat16(),
    "transposed": torch.randn(3, 4, 5).transpose(1, 2),
    "with gaps": torch.randn(2, 6, 8)[:, ::2],
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_is_read_as_it_was_written(tmp_path, tensor):
    kept = TensorFiles(tmp_path)
    kept[0], kept["other"] = tensor, tensor * 2
    assert torch.equal(kept[0], tensor)
    assert torch.equal(kept["other"], tensor * 2)
    assert kept[0].dtype == tensor.dtype
    assert kept[0].stride() == torch.empty_like(tensor).stride()
    assert not list(tmp_path.iterdir())
    kept[0] = kept[0] + 1
    assert torch.equal(kept[0], tensor + 1)
    kept[0] = torch.ones(3)
    assert torch.equal(kept[0], torch.ones(3))
    assert list(kept) == [0, "other"]
    del kept[0]
    kept.clear()
    assert len(kept) == 0


def resident(folder: Path) -> int:
    """KiB of mapped files of a folder that are in the memory of this process."""
    kib, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib


def test_only_the_tensor_that_was_read_last_is_in_memory(tmp_path):
    kept = TensorFiles(tmp_path)
    for number in range(4):
        kept[number] = torch.full((2**18,), float(number))
        assert resident(tmp_path) == 0
    for number in range(4):
        assert float(kept[number].sum()) == number * 2**18
        assert resident(tmp_path) == 2**10
    kept.clear()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_in_memory_they_are_a_dict():
    assert keeper(None)() == {}


def test_a_full_disk_is_one_clear_error(tmp_path):
    kept, before = TensorFiles(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept[0] = torch.ones(100)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(CheckpointError, match=r"cannot hold the hidden states \(File too large\): free"):
            kept[1] = torch.ones(2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(kept[0], torch.ones(100))
    assert list(kept) == [0]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_hold_them_is_named(tmp_path, tiny_model):
    with pytest.raises(CheckpointError, match=r"nothing: cannot hold the hidden states \(No such file or directory\)"):
        TensorFiles(tmp_path / "nothing")[0] = torch.ones(1)
    before = tiny_model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with pytest.raises(CheckpointError, match="nothing: is no folder that can be written: name one"):
        prune_model(tiny_model, torch.ones(1, 8, dtype=torch.int64), offload_folder=tmp_path / "nothing")
    assert torch.equal(tiny_model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


@pytest.mark.parametrize("sequential", ["none", "blocks", "layers"])
def test_pruning_is_the_same_bit_for_bit(make_decoder, ids, tmp_path, sequential):
    recipe = Recipe("wanda", sequential=sequential, update="lstsq", permute=True)
    weights = []
    for folder in (None, tmp_path):
        model = make_decoder("llama")
        prune_model(model, ids, recipe, batch_size=2, offload_folder=folder)
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert not list(tmp_path.iterdir())


def test_every_family_is_pruned_the_same(make_decoder, ids, tmp_path, family):
    weights = []
    for folder in (None, tmp_path):
        model = make_decoder(family)
        prune_model(model, ids, "wanda", sequential="layers", batch_size=2, offload_folder=folder)
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert not list(tmp_path.iterdir())


def test_no_file_is_left_after_an_error(make_decoder, ids, tmp_path):
    model = make_decoder("llama")

    def stop(_done: int, _total: int, _name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(model, ids, "wanda", offload_folder=tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())
