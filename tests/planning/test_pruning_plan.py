"""The plan of a run: its sizes, its warnings and its JSON."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ace_triton import PruningPlan, Recipe, plan_pruning, prune_checkpoint
from ace_triton.errors import AceError, ArgumentError, CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.pack_model import pack_model
from ace_triton.planning.layers import planned
from ace_triton.planning.skeleton import skeleton
from ace_triton.prune_blocks import prune_model


def size_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def wide_checkpoint(tmp_path, make_decoder, tokenizer):
    folder = tmp_path / "wide"
    make_decoder("llama", hidden_size=128, intermediate_size=256, vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_plan_is_what_pruning_does(tiny_checkpoint, tmp_path):
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    plan = plan_pruning(tiny_checkpoint, "balanced", samples=4, length=16, out=tmp_path / "out")
    report = prune_checkpoint(tiny_checkpoint, tmp_path / "out", ids, "balanced")
    assert plan.layers == tuple(layer.name for layer in report.layers)
    assert plan.account == report.account
    assert plan.warnings == ()
    assert plan.blocks == 2
    assert plan.time is None


def test_the_size_of_the_output(wide_checkpoint, tmp_path):
    plan = plan_pruning(wide_checkpoint, "magnitude", out=tmp_path / "out")
    prune_checkpoint(wide_checkpoint, tmp_path / "out", None, "magnitude")
    assert plan.disk.output_bytes == pytest.approx(size_of(tmp_path / "out"), rel=0.05)
    assert plan.disk.work_bytes == plan.disk.output_bytes
    assert plan.disk.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_the_size_of_a_packed_output(wide_checkpoint, tmp_path):
    plan = plan_pruning(wide_checkpoint, "magnitude", packed=True)
    model, tokenizer = checkpoint.load(wide_checkpoint)
    prune_model(model, None, "magnitude")
    pack_model(model)
    save_packed(model, tokenizer, tmp_path / "packed")
    assert plan.disk.output_bytes == pytest.approx(size_of(tmp_path / "packed"), rel=0.1)


def test_experts_in_another_form_are_in_the_work_folder_twice_more(tmp_path, make_decoder, tokenizer):
    make_decoder("qwen3_moe").save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    disk = plan_pruning(tmp_path / "moe", "magnitude", stream=True).disk
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert disk.work_bytes - disk.output_bytes == 2 * experts > 0


def test_json_holds_everything(tiny_checkpoint):
    plan = plan_pruning(tiny_checkpoint, "best", samples=4, length=16, text="pydoc:calibration")
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["memory"]["in_memory"]["peak_bytes"] == plan.in_memory.peak > 0
    assert content["memory"]["streamed"]["phases"].keys() == plan.streamed.phases.keys()
    assert content["recipe"] == plan.recipe.to_dict()
    assert content["account"]["pruned_share"] == 1.0
    assert not content["streams"]


def test_streams_if_the_model_does_not_fit(tiny_checkpoint, monkeypatch):
    def plan(**options) -> PruningPlan:
        return plan_pruning(tiny_checkpoint, "fast", **options)

    assert not plan().streams
    in_files = plan(stream=True)
    assert in_files.memory is in_files.streamed
    monkeypatch.setattr("ace_triton.planning.pruning_plan.fits_in_memory", lambda bytes_needed: False)
    assert plan().streams
    assert not plan(stream=False).streams
    assert plan(packed=True).streams


def test_each_known_problem_is_one_warning(make_decoder, tokenizer, tmp_path, monkeypatch):
    make_decoder("llama", max_position_embeddings=128).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("ace_triton.planning.pruning_plan.available_memory", lambda: 2**20)
    (tmp_path / "out").mkdir()
    recipe = Recipe("wanda", sparsity="8:32")
    plan = plan_pruning(tmp_path / "llama", recipe, length=1000, out=tmp_path / "out", stream=False)
    unfit, positions, exists, disk, memory = plan.warnings
    assert unfit == (
        "the pattern does not fit model.layers.0.mlp.down_proj and 2 more: its 48 inputs are not a multiple of 32"
    )
    assert positions == "--length 1000 is more than the model's 128 positions: use a smaller number"
    assert "already exists" in exists
    assert "of disk, but only 0.0 KB are free there" in disk
    assert memory.endswith("but only 1.0 MB are available; add --stream to keep the weights in files")


def test_a_text_that_is_not_read_is_named(tiny_checkpoint):
    plan = plan_pruning(tiny_checkpoint, "fast", text="some/dataset:en")
    assert "the text some/dataset:en, which was not read; 20,000 documents are assumed" in plan.unchecked
    assert plan.in_memory.phases["tokenize the text"] > 1e9


def test_a_probe_prunes_two_blocks_with_their_weights(tiny_checkpoint):
    plan = plan_pruning(tiny_checkpoint, "balanced", samples=4, length=16, probe=True)
    assert plan.time.real_weights
    assert plan.time.blocks == ("model.layers.0", "model.layers.1")
    assert set(plan.time.stages) == {"permute", "select", "update", "statistics", "calibration"}
    assert all(seconds > 0 for seconds in plan.time.stages.values())


def test_a_probe_of_a_rotation_has_its_time(tiny_checkpoint):
    plan = plan_pruning(tiny_checkpoint, Recipe("wanda", rotate=True), samples=4, length=16, probe=True)
    assert plan.time.stages["rotate"] > 0
    assert "which values can be rotated" in plan.unchecked


def test_a_probe_of_a_block_fit_trains_blocks(tiny_checkpoint):
    fitted = Recipe("wanda", update={"kind": "lstsq", "block_epochs": 1})
    stages = plan_pruning(tiny_checkpoint, fitted, samples=40, length=16, probe=True).time.stages
    assert stages["block_fit"] > stages["update"]


def test_a_probe_of_experts_in_another_form_says_that_weights_are_random(tmp_path, make_decoder, tokenizer):
    make_decoder("qwen3_moe").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not plan_pruning(tmp_path, "fast", samples=4, length=16, probe=True).time.real_weights


def test_bad_input_is_refused_as_in_pruning(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        plan_pruning(tmp_path / "missing")
    with pytest.raises(ArgumentError, match="at least 1 sequence of 2 tokens"):
        plan_pruning(tiny_checkpoint, samples=0)
    with pytest.raises(AceError, match="no such file"):
        plan_pruning(tiny_checkpoint, text=str(tmp_path / "missing.txt"))
    with pytest.raises(AceError, match="unknown method"):
        plan_pruning(tiny_checkpoint, "nothing")


def test_a_packed_run_that_streams_needs_disk_for_the_dense_and_twice_the_packed_layers(tiny_checkpoint):
    dense, packed = (plan_pruning(tiny_checkpoint, "fast", stream=True, packed=value).disk for value in (False, True))
    pruned = [layer for unit in plan_layers(tiny_checkpoint).units for layer in unit.layers if layer.is_pruned]
    layers = sum(layer.bytes // 2 + layer.elements // 8 for layer in pruned)
    assert packed.output_bytes == dense.output_bytes - sum(layer.bytes for layer in pruned) + layers
    assert packed.work_bytes == dense.output_bytes + packed.output_bytes + layers
    assert "pack" in plan_pruning(tiny_checkpoint, "fast", packed=True).streamed.phases


def plan_layers(source):
    recipe = plan_pruning(source, "fast").recipe
    return planned(skeleton(source).model, recipe)
