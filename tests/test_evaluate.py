import math
from types import SimpleNamespace

import pytest
import torch

from ace_triton.decoders.batches import check_positions, longest_sequence
from ace_triton.errors import TextError
from ace_triton.evaluate import perplexity


def test_against_the_formula(tiny_model):
    ids = torch.randint(0, 320, (70,))
    seen = []
    result = perplexity(tiny_model, ids, length=16, windows=3, progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        losses = []
        for window in ids[:48].reshape(3, 16):
            log_probabilities = tiny_model(window[None]).logits[0].double().log_softmax(-1)
            losses += [-log_probabilities[t, window[t + 1]] for t in range(15)]
    assert result.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert result.to_dict() == {
        "perplexity": result.perplexity,
        "windows": 3,
        "length": 16,
        "tokens": 45,
        "bos": "none",
    }
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_all_windows_and_too_little_text(tiny_model):
    ids = torch.randint(0, 320, (70,))
    assert perplexity(tiny_model, ids, length=16).windows == 4
    assert perplexity(tiny_model, ids, length=16, windows=99).windows == 4
    with pytest.raises(TextError, match="70 tokens, one window needs 71"):
        perplexity(tiny_model, ids, length=71)
    with pytest.raises(TextError, match="at least 2"):
        perplexity(tiny_model, ids, length=1)
    with pytest.raises(TextError, match="windows must be at least 1, got 0"):
        perplexity(tiny_model, ids, length=16, windows=0)


def test_positions_are_those_of_the_text_model():
    from transformers import Gemma3Config

    model = SimpleNamespace(config=Gemma3Config(text_config={"max_position_embeddings": 64}))
    assert longest_sequence(model) == 64
    check_positions(64, 64)
    check_positions(None, 65)
    with pytest.raises(ValueError, match="--length 65 is more than the model's 64 positions"):
        check_positions(64, 65)


def test_the_command_checks_before_it_loads_and_by_the_text_model(command, tmp_path, tiny_checkpoint, some_text):
    for words, message in (
        (("--windows", 0), "'--windows': it must be 1 or more; got 0"),
        (("--length", 1), "'--length': it must be 2 or more; got 1"),
    ):
        code, _, errors = command("evaluate", tmp_path / "nothing", "--text", some_text, *words)
        assert (code, message in errors) == (2, True), errors
    code, _, errors = command("evaluate", tiny_checkpoint, "--text", some_text, "--length", 129)
    assert code == 1
    assert "--length 129 is more than the model's 128 positions" in errors


def test_the_mode_is_given_back(tiny_model):
    tiny_model.train()
    perplexity(tiny_model, torch.randint(0, 320, (32,)), length=16)
    assert tiny_model.training
