"""``ace-triton recover`` of encoders and vision models."""

from __future__ import annotations

import json

import pytest
import torch

from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.recovery.checks import pruned_masks
from tests.inputs.small_checkpoints import save_bert, save_masked_bert, save_vit, write_images

TEXT = "the fox jumps over the dog. a short one of five words! these are the words of the last sentence."
"""Three sentences; the last one is longer than the model's 32 positions, so it is cut into two pieces."""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(("save", "task"), [(save_bert, "feature-extraction"), (save_masked_bert, "fill-mask")])
def test_an_encoder_is_trained_on_sentences(save, task, command, text, tmp_path):
    save(tmp_path / "dense")
    pruned, out, told = tmp_path / "pruned", tmp_path / "out", tmp_path / "told.json"
    small = ("--calibration", text, "--dtype", "float32")
    assert command("prune", tmp_path / "dense", pruned, "--method", "wanda", *small, "--length", 16)[0] == 0
    code, shown, errors = command("recover", pruned, out, *small, "--steps", 3, "--inputs-per-step", 2, "--json", told)
    assert code == 0, errors
    assert "passes over the inputs" in shown
    found = json.loads(told.read_text())
    assert (found["steps"], found["task"], found["calibration"]["inputs"]) == (3, task, {"sequences": 4})
    assert found["calibration"]["length"] == 32, "the model's longest"
    assert ("pooling" in found) == (task == "feature-extraction")
    before, after = (load_model(folder, task=task)[0] for folder in (pruned, out))
    masks = pruned_masks(before)
    assert all(torch.equal(mask, pruned_masks(after)[name]) for name, mask in masks.items())
    assert not torch.equal(*(next(p for n, p in m.named_parameters() if n in masks) for m in (before, after)))
    facts = json.loads((out / checkpoint.REPORT_FILE).read_text())
    assert [step["command"] for step in facts["history"]] == ["prune", "recover"]
    assert (out / "tokenizer.json").read_bytes() == (pruned / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".out*"))


def test_a_vision_model_is_trained_on_images(command, tmp_path):
    save_vit(tmp_path / "dense")
    images = ("--images", write_images(tmp_path / "pictures"), "--dtype", "float32")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert command("prune", tmp_path / "dense", pruned, "--method", "wanda", *images)[0] == 0
    words = ("--steps", 2, "--inputs-per-step", 4, "--bits", 8, "--group", 32)
    code, shown, errors = command("recover", pruned, out, *images, *words)
    assert code == 0, errors
    assert "pack --bits 8 --group 32 keeps each value" in " ".join(shown.split())
    found = json.loads((out / checkpoint.REPORT_FILE).read_text())["recovery"]
    assert found["settings"]["quantize"] == {"bits": 8, "group": 32, "rule": "absmax"}
    assert (found["tokens"], found["calibration"]["inputs"]) == (0, {"images": 6})


def test_options_of_the_other_kind_are_refused(command, tiny_checkpoint, text, tmp_path):
    save_bert(tmp_path / "bert")

    def refusal(*words) -> str:
        code, _, errors = command("recover", *words, "--steps", 1, "--calibration", text)
        assert code == 1
        return " ".join(errors.split())

    bert = (tmp_path / "bert", tmp_path / "out", "--teacher", tiny_checkpoint)
    assert "--tokens-per-step: for causal language models on text only; leave it out" in refusal(
        *bert, "--tokens-per-step", 32
    )
    assert "--pieces: not for causal language models on text; leave it out" in refusal(
        tiny_checkpoint, tmp_path / "out", "--teacher", tmp_path / "bert", "--pieces", "sentences"
    )
    assert "--images: a BertModel does not read that" in refusal(*bert, "--images", tmp_path)
