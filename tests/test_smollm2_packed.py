"""The real model, packed: the same words as with its zeros in place, from a smaller file."""

import copy

import pytest
import torch

from ace_triton import NMLinear, checkpoint, load, prune_model, sparsify
from ace_triton.calibration import crop, token_stream
from ace_triton.generation import generate
from ace_triton.packed_checkpoint import save_packed
from ace_triton.packed_manifest import TENSORS_FILE
from ace_triton.text import read_documents


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SmolLM2 pruned to 2:4 in fp32, the same out of a packed folder, its tokenizer, and the folder."""
    dense, tokenizer = checkpoint.load("smollm2", dtype=torch.float32)
    stream = token_stream(read_documents("pydoc:calibration"), tokenizer)
    prune_model(dense, crop(stream, 8, 32, seed=0), "wanda", "2:4", one_shot=True)
    packed = copy.deepcopy(dense)
    report = sparsify(packed)
    assert len(report.layers) == 210
    folder = tmp_path_factory.mktemp("smollm2") / "packed"
    save_packed(packed, tokenizer, folder)
    del packed
    return dense, load(folder), tokenizer, folder


@pytest.mark.parametrize("prompt", ["The capital of France is", "def fibonacci(n):\n"])
def test_the_same_words_as_with_its_zeros_in_place(models, prompt):
    dense, packed, tokenizer, _ = models
    texts = [generate(model, tokenizer, prompt, max_new_tokens=16).text for model in (dense, packed)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 12


def test_the_same_logits_for_a_prompt_of_many_tokens(models):
    dense, packed, tokenizer, _ = models
    ids = torch.tensor(tokenizer(read_documents("pydoc:evaluation")[0])["input_ids"])[None, :96]
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=2e-4, atol=2e-3)


def test_the_layers_take_little_more_than_half(models):
    dense, packed, _, folder = models
    layers = [module for module in packed.modules() if isinstance(module, NMLinear)]
    before = sum(layer.packed.dense_bytes for layer in layers)
    assert sum(layer.packed.packed_bytes for layer in layers) == pytest.approx(0.53125 * before)
    whole = sum(parameter.nbytes for parameter in dense.parameters())
    assert (folder / TENSORS_FILE).stat().st_size == pytest.approx(whole - 0.46875 * before, rel=1e-3)
