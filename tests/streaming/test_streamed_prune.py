"""A checkpoint pruned block by block in its files: the same bytes as in memory, also after an interruption."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ace_triton import Recipe, prune_checkpoint, selection
from ace_triton.decoders.replay import WholeForward
from ace_triton.errors import AceError
from ace_triton.inputs import checkpoint
from tests.streaming.whole_runs import BALANCED, RECIPES, Stop, contents, pruned_in_memory


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_files_are_those_of_a_model_pruned_in_memory(tiny_checkpoint, tmp_path, tiny_ids, recipe):
    whole = pruned_in_memory(tiny_checkpoint, tmp_path / "memory", tiny_ids, recipe)
    streamed = prune_checkpoint(tiny_checkpoint, tmp_path / "streamed", tiny_ids, recipe)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert (tmp_path / "streamed").stat().st_mode == (tmp_path / "memory").stat().st_mode
    same = ("layers", "skipped", "excluded", "account", "fits")
    assert [getattr(streamed, name) for name in same] == [getattr(whole, name) for name in same]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "streamed", tiny_checkpoint.name]


def test_the_trial_of_orders_writes_no_file(tiny_checkpoint, tmp_path, tiny_ids, monkeypatch):
    """The weights of all blocks would be written twice."""
    find, seen = selection.find_folds, []

    def watching(model, *args, **more):
        [path] = tmp_path.glob(".out.ace-triton/new/*.safetensors")
        clean(path)
        folds = find(model, *args, **more)
        seen.append((len(folds.proven), dirty_bytes(path)))
        return folds

    monkeypatch.setattr(selection, "find_folds", watching)
    prune_checkpoint(tiny_checkpoint, tmp_path / "out", tiny_ids, BALANCED)
    assert seen == [(4, 0)]


def clean(path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def dirty_bytes(path):
    """Bytes of a mapped file that this process has written and the system has not."""
    dirty, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(f" {path}")
        elif inside and line.startswith(("Shared_Dirty", "Private_Dirty")):
            dirty += 1024 * int(line.split()[1])
    return dirty


def test_blocks_that_are_trained(tiny_checkpoint, tmp_path, tiny_ids, stopped_after):
    recipe = replace(BALANCED, update={"kind": "lstsq", "block_epochs": 1})
    whole = pruned_in_memory(tiny_checkpoint, tmp_path / "memory", tiny_ids, recipe, batch_size=2)
    stopped_after(1)
    with pytest.raises(Stop):
        prune_checkpoint(tiny_checkpoint, tmp_path / "streamed", tiny_ids, recipe, batch_size=2)
    stopped_after(10)
    streamed = prune_checkpoint(tiny_checkpoint, tmp_path / "streamed", tiny_ids, recipe, batch_size=2)
    assert streamed.fits == whole.fits
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_every_family(make_decoder, save, tmp_path, ids, family):
    source = save(make_decoder(family))
    pruned_in_memory(source, tmp_path / "memory", ids, BALANCED)
    prune_checkpoint(source, tmp_path / "streamed", ids, BALANCED)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_experts_that_the_checkpoint_stores_one_by_one(save, tmp_path, ids, monkeypatch):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=101, num_hidden_layers=2, num_local_experts=4, **sizes)
    source = save(MixtralForCausalLM(config).eval())
    pruned_in_memory(source, tmp_path / "memory", ids, "fast")
    prune_checkpoint(source, tmp_path / "streamed", ids, "fast")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    for folder, large in (("converted first", 2**22), ("converted later", 0)):
        monkeypatch.setattr("ace_triton.inputs.large_weights.LARGE", large)
        prune_checkpoint(source, tmp_path / folder, ids, "fast", dtype=torch.bfloat16)
    assert contents(tmp_path / "converted first") == contents(tmp_path / "converted later")
    expert = load_file(tmp_path / "streamed" / "model.safetensors")[
        "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    ]
    assert (expert == 0).float().mean() == 0.5


def test_budgets_count_the_outliers_of_stacked_experts(make_decoder, save, tmp_path, ids):
    recipe = Recipe("wanda", sparsity=0.6, budgets="outliers")
    source = save(make_decoder("qwen3_moe"))
    in_memory = pruned_in_memory(source, tmp_path / "memory", ids, recipe)
    streamed = prune_checkpoint(source, tmp_path / "streamed", ids, recipe)
    assert [layer.pattern for layer in streamed.layers] == [layer.pattern for layer in in_memory.layers]
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_stacked_experts_of_a_model_without_replay(make_decoder, save, tmp_path, ids, monkeypatch):
    def runner(model, blocks, batches, clock, masks, _trial, *, keep):
        return WholeForward(model, batches, clock, blocks, masks)

    monkeypatch.setattr("ace_triton.tower_pass.make_runner", runner)
    source = save(make_decoder("qwen3_moe"))
    recipe = Recipe("wanda", sequential="none")
    pruned_in_memory(source, tmp_path / "memory", ids, recipe)
    report = prune_checkpoint(source, tmp_path / "streamed", ids, recipe)
    assert any("experts" in layer.name for layer in report.layers)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


@pytest.mark.parametrize("large", [0, 2**22])
def test_shards_and_another_dtype(tiny_model, save, tmp_path, tiny_ids, large, monkeypatch):
    """Whether or not transformers converts a weight before it is copied."""
    monkeypatch.setattr("ace_triton.inputs.large_weights.LARGE", large)
    source = save(tiny_model, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    pruned_in_memory(source, tmp_path / "memory", tiny_ids, BALANCED, dtype=torch.bfloat16)
    prune_checkpoint(source, tmp_path / "streamed", tiny_ids, BALANCED, dtype=torch.bfloat16)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_large_models_have_several_files(tiny_model, save, tmp_path, tiny_ids, monkeypatch):
    monkeypatch.setattr("ace_triton.streaming.weight_files.LARGEST_FILE", "40KB")
    source = save(tiny_model, max_shard_size="40KB")
    prune_checkpoint(source, tmp_path / "streamed", tiny_ids, Recipe("magnitude", include=("*.q_proj",)))
    assert contents(tmp_path / "streamed").keys() == {*contents(source), "README.md"}
    index, dense = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "streamed", source)
    )
    assert index["metadata"] == dense["metadata"]
    assert index["weight_map"].keys() == dense["weight_map"].keys()
    model, _ = checkpoint.load(tmp_path / "streamed")
    for name, weight in model.named_parameters():
        assert torch.equal(weight != 0, tiny_model.get_parameter(name) != 0) != ("q_proj.weight" in name)


def test_bad_input_leaves_nothing(tiny_checkpoint, tmp_path, tiny_ids):
    with pytest.raises(AceError, match="vocabulary"):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", tiny_ids + 300, BALANCED)
    assert [path.name for path in tmp_path.iterdir()] == [tiny_checkpoint.name]


def test_a_model_that_changes_its_own_weights_is_refused(save, tmp_path, ids):
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=101, hidden_size=32, num_hidden_layers=8, attention_hidden_size=32, rescale_every=2)
    source = save(RwkvForCausalLM(config).eval())
    with pytest.raises(AceError, match="without --stream"):
        prune_checkpoint(source, tmp_path / "out", ids, "fast")


def test_a_model_that_does_not_fit_is_streamed(command, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ace_triton.streaming.fits.available_memory", lambda: 1000)
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", "--method", "magnitude")
    assert code == 0
    assert "so its weights stay in files (--stream)" in errors
    assert "streamed" in checkpoint.read_report(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": [{"input_ids": torch.ones(1, 4)}]}, "takes token ids"),
        ({"calibration": "text"}, "takes token ids"),
        ({"device": "nowhere"}, "device"),
        ({"offload": "elsewhere"}, "offload"),
    ],
)
def test_bad_arguments_are_one_line(tiny_checkpoint, tmp_path, tiny_ids, options, message):
    with pytest.raises(AceError, match=message):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", **{"calibration": tiny_ids, **options})
    assert [path.name for path in tmp_path.iterdir()] == [tiny_checkpoint.name]
