"""Times of decoding with dense and packed layers."""

import json

import pytest
import torch

from ace_triton import load
from ace_triton.decoding_times import decoding_times


@pytest.fixture
def packed(command, tiny_checkpoint, tmp_path):
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "packed", "--method", "magnitude", "--packed")
    assert code == 0, errors
    return tmp_path / "packed"


def test_the_parts_are_those_of_the_decoding(packed, tokenizer):
    """A layer that waits shows up in its own part; both models give the same tokens, and stay as they were."""
    import time

    model = load(packed, dtype=torch.float32)
    before = [name for name, _ in model.named_modules()]
    model.lm_head.register_forward_hook(lambda *_: time.sleep(0.004))
    found = decoding_times(model, tokenizer, [5, 6, 7], 4, rounds=2)
    assert (found.new_tokens, found.rounds, found.same_tokens) == (4, 2, 4)
    for side in (found.dense, found.packed):
        assert side.other_layers > 4
        assert side.packed_layers > 0
        assert side.rest > 0
        assert 0 < side.tokens_per_second < 250
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert found.dense_step is found.packed_step is None
    assert found.refusal == "lm_head has hooks or a forward of its own"


def test_the_command_prints_and_writes_both(command, packed, tmp_path):
    code, out, errors = command("bench", "--model", packed, "--tokens", 4, "--json", tmp_path / "times.json")
    assert code == 0, errors
    found = json.loads((tmp_path / "times.json").read_text())
    assert found["decoding"]["same_tokens"] == 4
    speed = found["decoding"]["packed"]["tokens_per_second"]
    assert f"{speed:.1f}" in out
    assert "ms in everything else" in out
    step = found["decoding"]["packed_step"]
    assert found["decoding"]["same_tokens_of_step"] == 4
    assert min(step["products"], step["attention"], step["rest"], found["decoding"]["dense_step"]["products"]) > 0
    assert f"{step['tokens_per_second']:.1f}" in out
    dense, dense_step = (found["decoding"][name]["tokens_per_second"] for name in ("dense", "dense_step"))
    fast = step["tokens_per_second"]
    lines = [
        f"packed is {speed / dense:.2f} times as fast as dense, both in transformers",
        f"packed is {fast / dense_step:.2f} times as fast as dense, both with the compiled step",
        f"packed with the compiled step is {fast / dense:.2f} times as fast as dense in transformers, by packing "
        "and the decoder together",
    ]
    assert [line for line in out.splitlines() if " times as fast as dense" in line] == lines
    side = found["decoding"]["packed"]
    whole = side["packed_layers"] + side["other_layers"] + side["rest"]
    assert f"{whole:.2f}" in next(line for line in out.splitlines() if "ms a token in all" in line)
    code, _, errors = command("bench", "--tokens", 4)
    assert code == 1
    assert "name it with --model" in errors
