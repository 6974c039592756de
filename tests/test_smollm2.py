"""The real model: masks against the published formulas on every layer, the commands from end to end, and packed."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from ace_triton import ActivationStats, NMLinear, load, prune_model
from ace_triton.evaluate import perplexity
from ace_triton.formats.registry import inspect_checkpoint
from ace_triton.generation import generate
from ace_triton.inputs import checkpoint
from ace_triton.inputs.calibration import crop, token_stream
from ace_triton.inputs.text import read_documents
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.methods.registry import metric
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.manifest import TENSORS_FILE
from ace_triton.packed.pack_model import pack_model

BLOCKS = ("0", "9", "20", "29")
"""Blocks whose masks are compared with the formulas."""


@pytest.fixture(scope="module")
def smollm2():
    """The model in float32: without vector instructions for bfloat16 it is faster."""
    return checkpoint.load("smollm2", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(smollm2):
    """The inputs of all linear layers of some blocks, of 8 sequences of 32 tokens: name -> (layer, [8, 32, in])."""
    model, tokenizer = smollm2
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen.update({name: (layer, args[0].detach())}))
        for name, layer in model.model.layers.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.partition(".")[0] in BLOCKS
    ]
    stream = token_stream(read_documents("pydoc:calibration"), tokenizer)
    with torch.no_grad():
        model(crop(stream, 8, 32, seed=0), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 7 * len(BLOCKS)
    return seen


def published_scores(method: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The papers' formulas in fp64, over tokens [n_sequences, length, in_features]."""
    magnitude = weight.double().abs()
    norm = (tokens.double().square().sum((0, 1)) / tokens.shape[0]).sqrt()
    if method == "wanda":
        return magnitude * norm
    return (magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)) * norm.sqrt()


@pytest.mark.parametrize("method", ["wanda", "ria"])
@pytest.mark.parametrize("size", [4, None], ids=["2:4", "50 % of a row"])
def test_masks_are_those_of_the_published_formulas(inputs, method, size):
    for name, (layer, tokens) in inputs.items():
        weight = layer.weight.detach()
        terms = metric(method).terms(weight, ActivationStats.from_tokens(tokens))
        if size:
            mask = select_nm(weight, terms, 2, 4, output="mask")
        else:
            mask = select_rows(weight, terms, weight.shape[1] // 2, output="mask")
        groups = mask.reshape(-1, size or weight.shape[1])
        scores = published_scores(method, weight, tokens).reshape(groups.shape)
        assert bool((groups.sum(1) == groups.shape[1] // 2).all()), name
        least_kept = torch.where(groups, scores, torch.inf).amin(1)
        most_pruned = torch.where(groups, 0.0, scores).amax(1)
        assert bool((least_kept >= most_pruned * (1 - 1e-5)).all()), f"{name}: a higher score was pruned"


def test_the_command_line_from_end_to_end(smollm2, tmp_path, command):
    out, text = tmp_path / "pruned", "pydoc:evaluation"
    small = ("--samples", 8, "--length", 32)
    fast = ("--preset", "fast", "--calibration", "pydoc:calibration", *small)
    prune = ("prune", "smollm2", out, *fast, "--dtype", "float32", "--json", tmp_path / "prune.json")
    done = subprocess.run([sys.executable, "-m", "ace_triton", *map(str, prune)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluate = ("evaluate", out, "--text", text, "--length", 256, "--windows", 1)
    code, _, errors = command(*evaluate, "--json", tmp_path / "evaluate.json")
    assert code == 0, errors
    report = json.loads((tmp_path / "prune.json").read_text())
    assert len(report["layers"]) == 210
    patterns = [tensor.pattern for tensor in inspect_checkpoint(out)]
    assert patterns.count("2:4") == 210
    model, tokenizer = smollm2
    ids = torch.tensor(tokenizer("\n\n".join(read_documents(text)), verbose=False)["input_ids"])
    dense = perplexity(model, ids, length=256, windows=1).perplexity
    pruned = json.loads((tmp_path / "evaluate.json").read_text())["perplexity"]
    assert 5 < dense < 40
    assert dense < pruned < 30 * dense


@pytest.fixture(scope="module")
def packed(smollm2, tmp_path_factory):
    """The model pruned to 2:4 in fp32, the same out of a packed folder, its tokenizer, and the folder."""
    dense, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    stream = token_stream(read_documents("pydoc:calibration"), tokenizer)
    prune_model(dense, crop(stream, 8, 32, seed=0), "wanda", "2:4", sequential="none")
    sparse = copy.deepcopy(dense)
    assert len(pack_model(sparse).layers) == 210
    folder = tmp_path_factory.mktemp("smollm2") / "packed"
    save_packed(sparse, tokenizer, folder)
    return dense, load(folder), tokenizer, folder


@pytest.mark.parametrize("prompt", ["The capital of France is", "def fibonacci(n):\n"])
def test_packed_it_writes_the_same_words_as_with_its_zeros_in_place(packed, prompt):
    dense, sparse, tokenizer, _ = packed
    texts = [generate(model, tokenizer, prompt, max_new_tokens=16).text for model in (dense, sparse)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 12


def test_packed_it_gives_the_same_logits_for_a_prompt_of_many_tokens(packed):
    dense, sparse, tokenizer, _ = packed
    ids = torch.tensor(tokenizer(read_documents("pydoc:evaluation")[0])["input_ids"])[None, :96]
    with torch.inference_mode():
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=2e-4, atol=2e-3)


def test_packed_its_layers_take_little_more_than_half(packed):
    dense, sparse, _, folder = packed
    layers = [module for module in sparse.modules() if isinstance(module, NMLinear)]
    before = sum(layer.packed.dense_bytes for layer in layers)
    assert sum(layer.packed.packed_bytes for layer in layers) == pytest.approx(0.53125 * before)
    whole = sum(parameter.nbytes for parameter in dense.parameters())
    assert (folder / TENSORS_FILE).stat().st_size == pytest.approx(whole - 0.46875 * before, rel=1e-3)
