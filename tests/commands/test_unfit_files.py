"""Files of a model that do not fit each other: what a library raises about them becomes one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ace_triton import pack_model, prune_model, save_packed
from ace_triton.errors import CheckpointError
from ace_triton.inputs.checkpoint import save


@pytest.fixture
def one_line(command, tmp_path):
    """one_line(*words): the error of a command, which is one line, and leaves no output."""

    def run(*words):
        code, _, errors = command(*words)
        assert code == 1
        assert not (tmp_path / "out").exists()
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert errors.endswith(f"{line}\n")
        assert "bug" not in line
        assert "Traceback" not in errors
        return line

    return run


def test_a_tokenizer_that_fails(one_line, tiny_checkpoint, some_text, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tiny_checkpoint)
    text = "the model's tokenizer cannot tokenize the text (WordLevel error: Missing [UNK] token from the vocabulary)"
    assert text in one_line("evaluate", tiny_checkpoint, "--text", some_text, "--length", 16)
    assert text in one_line("generate", tiny_checkpoint, "--prompt", "b", "--max-new-tokens", 2)
    assert text in one_line("prune", tiny_checkpoint, tmp_path / "out", "--calibration", some_text, "--length", 16)


def test_a_tokenizer_of_a_larger_vocabulary(one_line, tiny_model, tiny_checkpoint, tokenizer, some_text, tmp_path):
    ids = tokenizer("The")["input_ids"]
    tiny_model.resize_token_embeddings(max(ids))
    tiny_model.save_pretrained(tiny_checkpoint)
    error = one_line("evaluate", tiny_checkpoint, "--text", some_text, "--length", 16)
    assert f"the model's vocabulary ends at {max(ids) - 1}: evaluate it with the model's own tokenizer" in error
    error = one_line("generate", tiny_checkpoint, "--prompt", "The", "--max-new-tokens", 2)
    assert f"the prompt has token id {max(ids)}, the model's vocabulary ends at {max(ids) - 1}" in error


def test_a_generation_config_that_transformers_does_not_save(tiny_model, tokenizer, tmp_path):
    tiny_model.generation_config.update(do_sample=False, temperature=0.7)
    text = "refuses to save the model, and nothing there was changed: GenerationConfig is invalid: .*`temperature`"
    with pytest.raises(CheckpointError, match=text):
        save(tiny_model, tokenizer, tmp_path / "out", {})
    prune_model(tiny_model, None, "magnitude")
    pack_model(tiny_model)
    with pytest.raises(CheckpointError, match=text):
        save_packed(tiny_model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_predictions_that_cannot_be_sampled(one_line, tiny_checkpoint):
    path = tiny_checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    error = one_line("generate", tiny_checkpoint, "--prompt", "a", "--temperature", 1, "--max-new-tokens", 2)
    assert "the model's predictions at temperature 1.0 are NaN or infinite: give a larger temperature, or 0" in error


def test_numbers_that_torch_does_not_compare(one_line, tmp_path):
    folder = tmp_path / "fp4"
    folder.mkdir()
    save_file({"a": torch.zeros(4, 4, dtype=torch.uint8)}, folder / "model.safetensors")
    header = (folder / "model.safetensors").read_bytes()
    swapped = header.replace(b'"U8"', b'"F4"').replace(b"[4,4]", b"[4,8]")
    (folder / "model.safetensors").write_bytes(swapped)
    assert "holds numbers that torch does not compare" in one_line("info", folder)
