"""Models that accelerate has spread are pruned where they lie, with the same result as a model in memory."""

import copy
import json

import accelerate
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import load_offloaded_parameter

from ace_triton import ArgumentError, Recipe, RecipeError, pack_model, prune_model
from ace_triton.dispatched.hooks import input_device
from ace_triton.evaluate import perplexity_of

IDS = torch.randint(0, 258, (4, 16), generator=torch.Generator().manual_seed(0))
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MIXED |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.fixture
def pruned(tiny_model):
    """The pruned weights of the model in memory, and the options."""
    options = {"method": "ace", "sparsity": "2:4", "permute": True, "update": "rescale"}
    plain = copy.deepcopy(tiny_model)
    prune_model(plain, IDS, **options)
    return plain, options


def by_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def by_disk(model, folder):
    return accelerate.disk_offload(model, folder / "disk", execution_device=torch.device("cpu"))


def by_map(model, folder):
    return accelerate.dispatch_model(model, MIXED, offload_dir=folder / "disk")


def loaded(model, folder, **options):
    model.save_pretrained(folder / "source")
    return AutoModelForCausalLM.from_pretrained(folder / "source", **options)


def from_checkpoint(model, folder):
    return loaded(model, folder, device_map=MIXED, offload_folder=folder / "disk")


def on_one_device(model, folder):
    return loaded(model, folder, device_map={"": "cpu"})


@pytest.mark.parametrize("spread", [by_memory, by_disk, by_map, from_checkpoint, on_one_device])
def test_a_spread_model_gets_the_weights_of_one_in_memory(tiny_model, pruned, tmp_path, spread):
    plain, options = pruned
    dense = spread(copy.deepcopy(tiny_model), tmp_path)
    source = {p: p.read_bytes() for p in (tmp_path / "source").glob("*")}
    offloaded = {name for name, parameter in dense.named_parameters() if parameter.is_meta}
    assert bool(offloaded) == (spread is not on_one_device)

    report = prune_model(dense, IDS, **options)

    assert {name for name, parameter in dense.named_parameters() if parameter.is_meta} == offloaded
    assert torch.equal(dense(IDS).logits, plain(IDS).logits)
    assert perplexity_of(dense, IDS) == perplexity_of(plain, IDS)
    assert {round(layer.kept, 2) for layer in report.layers} == {0.5}
    values = {n: load_offloaded_parameter(dense, n) if n in offloaded else v for n, v in dense.state_dict().items()}
    assert all(torch.equal(values[name], weight) for name, weight in plain.state_dict().items())
    if hasattr(dense, "hf_device_map"):  # transformers saves no other offloaded model.
        dense.save_pretrained(tmp_path / "pruned")
        saved = load_file(tmp_path / "pruned" / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in plain.state_dict().items())
    assert all(path.read_bytes() == before for path, before in source.items())


def test_budgets_count_the_outliers_of_offloaded_experts(make_decoder, ids, tmp_path):
    plain, recipe = make_decoder("qwen3_moe"), Recipe("wanda", sparsity=0.6, budgets="outliers")
    offloaded = by_memory(copy.deepcopy(plain), tmp_path)
    in_memory, report = prune_model(plain, ids, recipe), prune_model(offloaded, ids, recipe)
    assert [layer.pattern for layer in report.layers] == [layer.pattern for layer in in_memory.layers]
    assert all(torch.equal(load_offloaded_parameter(offloaded, n), p) for n, p in plain.named_parameters())


def test_an_offloaded_model_is_not_packed(make_decoder, ids, tmp_path):
    model = make_decoder("qwen3_moe")
    prune_model(model, ids, "magnitude", "2:4")
    by_memory(model, tmp_path)
    with pytest.raises(ArgumentError, match=r"can be packed: its weight is on the meta device .* \(ace-triton pack\)$"):
        pack_model(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_weight_that_is_loaded_in_another_dtype_is_pruned_in_that_dtype(tiny_model, tmp_path):
    plain = loaded(tiny_model, tmp_path, dtype=torch.bfloat16)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "disk"}
    spread = loaded(tiny_model, tmp_path, dtype=torch.bfloat16, **on_disk)
    for model in (plain, spread):
        prune_model(model, IDS)
    assert torch.equal(spread(IDS).logits, plain(IDS).logits)
    assert not [path for path in (tmp_path / "disk").iterdir() if path.is_dir()]


def test_the_pruned_weights_stay_in_the_offload_folder(tiny_model, pruned, tmp_path):
    """accelerate reads its index from the folder if it loads the same folder again."""
    plain, options = pruned
    prune_model(by_disk(copy.deepcopy(tiny_model), tmp_path), IDS, **options)
    folder = tmp_path / "disk"
    kept = OffloadedWeightsLoader(save_folder=folder)
    assert set(json.loads((folder / "index.json").read_text())) == set(plain.state_dict())
    assert all(torch.equal(kept[name], weight) for name, weight in plain.state_dict().items())


def test_tied_weights_stay_tied(tiny_model, tmp_path):
    """A head that is tied to the embedding has a file of its own on disk; pruning it would prune the embedding."""
    tiny_model.config.tie_word_embeddings = True
    plain = type(tiny_model)(tiny_model.config).eval()
    spread = by_disk(copy.deepcopy(plain), tmp_path)
    reports = [prune_model(model, IDS, include=["lm_head", "*.up_proj"]) for model in (plain, spread)]
    assert [entry.reason for entry in reports[1].skipped] == [entry.reason for entry in reports[0].skipped]
    assert any("tied" in entry.reason for entry in reports[1].skipped)
    assert torch.equal(spread(IDS).logits, plain(IDS).logits)


def test_weights_on_disk_without_a_folder_are_refused(tiny_model, tmp_path):
    model = loaded(tiny_model, tmp_path, device_map={"": "disk"})
    with pytest.raises(RecipeError, match=r"offloaded to the disk without a folder.*offload_folder=.*--stream"):
        prune_model(model, IDS)
    assert model(IDS).logits.shape == (4, 16, 320)


def test_inputs_go_to_the_device_of_the_first_hook(tiny_model):
    assert input_device(tiny_model) == torch.device("cpu")
    assert input_device(by_memory(tiny_model, None)) == torch.device("cpu")
