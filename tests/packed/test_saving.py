"""Packed models are saved with save_packed and with their own save_pretrained."""

import copy
import gc
import io
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPConfig, LlamaModel

import ace_triton
from ace_triton import NMLinear, prune_linear, prune_model
from ace_triton.formats.registry import load_model
from ace_triton.inputs.checkpoint import CheckpointError
from ace_triton.packed.checkpoint import load, save_packed
from ace_triton.packed.pack_model import pack_model

IDS = torch.arange(3, 35).reshape(2, 16)
NOT_PUSHED = {"optimizer.pt", "README.md"}


def packed(make_decoder):
    model = make_decoder("llama", attention="sdpa")
    prune_model(model, None, "magnitude")
    pack_model(model)
    return model


@pytest.fixture
def model(make_decoder):
    """A small packed Llama."""
    return packed(make_decoder)


def test_save_pretrained_writes_the_packed_format(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    again, _ = load_model(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", max_shard_size="1MB", safe_serialization=True)
    last = load(tmp_path / "two")
    assert torch.equal(last(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    modes = {path.stat().st_mode for path in (tmp_path / "two").iterdir()}
    assert modes == {(tmp_path / "two" / "config.json").stat().st_mode}


def test_save_pretrained_goes_into_a_folder_that_is_there(model, tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / ".ace-triton").mkdir()
    (tmp_path / ".ace-triton" / "half").touch()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    assert (tmp_path / "trainer_state.json").exists()
    assert not (tmp_path / ".ace-triton").exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub is a folder here: everything up to its network interface is transformers' own."""
    from types import SimpleNamespace

    from huggingface_hub import ModelCard
    from transformers.utils import hub

    found = SimpleNamespace(asked=[], folder=tmp_path / "hub", tags=[])
    found.folder.mkdir()

    def commit(repo_id, operations, **options):
        found.asked.append((repo_id, options["commit_message"]))
        for operation in operations:
            (found.folder / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    def card(_repo_id, tags, **_):
        found.tags = tags
        return ModelCard("---\nlicense: mit\n---\n")

    api = SimpleNamespace(
        create_repo=lambda repo_id, **options: SimpleNamespace(repo_id=f"someone/{repo_id}"), create_commit=commit
    )
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", card)
    return found


@pytest.mark.parametrize("by_saving", [False, True])
def test_what_goes_to_the_hub_loads(model, tokenizer, tmp_path, hub, by_saving):
    if by_saving:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="packed", max_shard_size="1MB")
        assert "It needs the package ace-triton" in (tmp_path / "mine" / "README.md").read_text()
    else:
        model.push_to_hub("mine", commit_message="packed")
    assert hub.asked == [("someone/mine", "packed")]
    tokenizer.save_pretrained(hub.folder)  # It is pushed by itself.
    assert torch.equal(AutoModelForCausalLM.from_pretrained(hub.folder)(IDS).logits, model(IDS).logits)


def test_the_hub_gets_the_files_that_were_written(model, tmp_path, hub):
    state = {name: 2 * tensor if "norm" in name else tensor for name, tensor in model.state_dict().items()}
    out = tmp_path / "mine"
    out.mkdir()
    (out / "optimizer.pt").touch()
    model.add_model_tags("own")
    model.save_pretrained(out, state_dict=state, push_to_hub=True, tags=["given"])
    assert hub.asked == [("someone/mine", "Upload model")]
    assert hub.tags == ["own", "given"]
    written = {path.name for path in out.iterdir()}
    assert {path.name for path in hub.folder.iterdir()} == written - {"optimizer.pt"}
    assert all((out / name).read_bytes() == (hub.folder / name).read_bytes() for name in written - NOT_PUSHED)
    assert not torch.equal(load(hub.folder)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        (".", {}, r"the name of the folder '\.' cannot name a repository; nothing was written"),
        ("mine", {"repo_id": None}, "repo_id None cannot name a repository"),
        ("mine", {"repo_id": "a/b/c"}, "repo_id 'a/b/c'.*give repo_id='name' or repo_id='owner/name'"),
    ],
)
def test_a_name_that_is_no_repository_is_refused_first(model, tmp_path, monkeypatch, folder, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        model.save_pretrained(folder, push_to_hub=True, **options)
    assert not [*tmp_path.iterdir()]


def test_a_card_is_not_written_through_a_link(model, tmp_path):
    out, outside = tmp_path / "mine", tmp_path / "outside.md"
    out.mkdir()
    (out / "README.md").symlink_to(outside)
    model.save_pretrained(out)
    assert not outside.exists()
    assert (out / "README.md").is_symlink()


def test_save_pretrained_refuses_what_would_mislead(model, make_decoder, tmp_path):
    make_decoder("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"contains model\.safetensors of a dense model"):
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_save_themselves(model, tmp_path, duplicate):
    other = duplicate(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "other")(IDS).logits, other(IDS).logits)
    assert torch.equal(load(tmp_path / "model")(IDS).logits, model(IDS).logits)


def test_a_model_is_freed_without_the_garbage_collector(make_decoder):
    model = packed(make_decoder)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_that_was_unpacked_is_saved_dense(model, tmp_path):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NMLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(layer.unpack())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dense)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_models_that_would_not_come_back(model, tmp_path):
    headless = LlamaModel(model.config)
    for block in headless.layers:
        prune_linear(block.mlp.up_proj, method="magnitude")
    pack_model(headless)
    headless.config = CLIPConfig()
    plain = nn.Sequential(nn.Linear(16, 16))
    prune_linear(plain[0], method="magnitude")
    pack_model(plain)
    assert "save_pretrained" not in vars(plain)
    for wrong, message in (
        (headless, "a LlamaModel cannot be loaded by an AutoModel class"),
        (plain, "got a Sequential"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_packed(wrong, None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="LlamaModel"):
        headless.save_pretrained(tmp_path / "out")
    model.config = CLIPConfig()
    with pytest.raises(CheckpointError, match="LlamaForCausalLM cannot be loaded by an AutoModel class"):
        save_packed(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overlapping_weights_are_tied():
    memory = torch.randn(24, 16)
    layers = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("one", "two", "alone")})
    layers["one"].weight, layers["two"].weight = nn.Parameter(memory[:16]), nn.Parameter(memory[8:])
    for layer in (layers["two"], layers["one"], layers["alone"]):
        with torch.no_grad():
            layer.weight.view(-1, 4)[:, :2] = 0
    report = ace_triton.pack_model(layers)
    assert [layer.name for layer in report.layers] == ["alone"]
    assert {skipped.name: skipped.reason for skipped in report.skipped} == dict.fromkeys(
        ("one", "two"), "its weight is tied to another layer's"
    )
