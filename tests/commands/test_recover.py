"""``ace-triton recover``: what it writes, and what it refuses before any training."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest
import torch

import ace_triton
from ace_triton import Quantization
from ace_triton.commands.recover_models import rounding_note, was_pruned
from ace_triton.inputs import checkpoint
from ace_triton.inputs.output_folder import LOCK, SUFFIX
from ace_triton.recovery.checks import pruned_masks


def test_the_command(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert command("prune", tiny_checkpoint, pruned, "--method", "wanda", *small)[0] == 0
    told = tmp_path / "told.json"
    words = ("--steps", 3, "--tokens-per-step", 32, "--hidden-states", 0.5, "--json", told)
    code, shown, errors = command("recover", pruned, out, *small, *words)
    assert code == 0, errors
    assert "mean loss, last step" in shown
    assert "3 steps of " in shown
    assert "too few to gain much" in shown
    assert "The text was read more than once" in shown
    assert json.loads(told.read_text())["steps"] == 3
    assert json.loads(told.read_text())["passes"] == 3 * 32 / (4 * 16)
    before, after = (checkpoint.load(folder)[0] for folder in (pruned, out))
    masks = pruned_masks(before)
    assert masks.keys() == pruned_masks(after).keys()
    assert all(torch.equal(mask, pruned_masks(after)[name]) for name, mask in masks.items())
    facts = json.loads((out / checkpoint.REPORT_FILE).read_text())
    assert (facts["source"], facts["source_path"]) == ("tiny", "../tiny")
    assert facts["recovery"]["steps"] == 3
    assert facts["recovery"]["settings"]["hidden_states"] == 0.5
    assert not list(tmp_path.glob(".out*"))
    code, shown, errors = command("recover", pruned, tmp_path / "once", *small, "--steps", 2, "--tokens-per-step", 32)
    assert code == 0, errors
    assert "read more than once" not in shown
    own = ("--calibration", "self", "--length", 16, "--steps", 9, "--tokens-per-step", 64)
    code, shown, errors = command("recover", pruned, tmp_path / "self", *own, "--json", told)
    assert code == 0, errors
    assert "read more than once" not in shown
    assert (json.loads(told.read_text())["tokens"], json.loads(told.read_text())["passes"]) == (9 * 64, 1.0)
    code, _, errors = command("recover", tiny_checkpoint, tmp_path / "other", *small, "--steps", 1)
    assert code == 1
    assert f"{tiny_checkpoint} is not pruned, no weight has 5% zeros or more: prune it first; if another" in errors
    assert "--teacher" in errors
    assert command("pack", pruned, tmp_path / "packed")[0] == 0
    code, _, errors = command("recover", tmp_path / "packed", tmp_path / "other", *small, "--steps", 1)
    assert code == 1
    assert "then pack" in errors


def test_recovered_weights_do_not_count_as_quantized(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    few = ("--bits", 4, "--group", 32)
    assert command("prune", tiny_checkpoint, pruned, "--method", "magnitude", *few, "--quantize", "absmax")[0] == 0
    code, shown, errors = command("recover", pruned, out, *small, "--steps", 1, "--tokens-per-step", 32)
    assert code == 0, errors
    assert "no longer rounded to 4 bits; ace-triton pack --bits 4 --group 32 rounds" in " ".join(shown.split())
    before, after = (json.loads((folder / checkpoint.REPORT_FILE).read_text()) for folder in (pruned, out))
    assert before["recipe"].pop("quantize")["bits"] == 4
    assert after["recipe"] == before["recipe"]
    assert "Quantization" not in (out / "README.md").read_text()
    code, _, errors = command("pack", out, tmp_path / "packed", *few)
    assert code == 0, errors
    assert "rounded to the nearest value of 4 bits" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("steps", "option", "pruned"),
    [
        (["shrink"], "--dense-bits", True),
        (["shrink", "recover"], "--dense-bits", False),
        (["shrink", "recover", "prune"], "--bits", True),
        (["prune", "shrink", "recover"], "--bits", True),
        (["prune", "recover"], "--bits", True),
    ],
)
def test_the_history_says_how_zeros_and_bits_are_treated(steps, option, pruned):
    settings = {"quantize": {"bits": 4, "group": 32, "rule": "absmax"}}
    facts = {"history": [{"command": name, "did": ""} for name in steps], "recovery": {"settings": settings}}
    assert was_pruned(facts) is pruned
    assert was_pruned({}) is None
    for by in (None, Quantization(4, 32, "absmax")):
        assert f"; ace-triton pack {option} 4 --group 32 " in rounding_note(by, facts)


def test_rounded_weights_are_trained_and_packed_as_they_are(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16, "--steps", 2, "--tokens-per-step", 32)
    pruned, out, packed = (tmp_path / name for name in ("pruned", "out", "packed"))
    few = ("--bits", 4, "--group", 32)
    assert command("prune", tiny_checkpoint, pruned, "--method", "magnitude", *few, "--quantize", "absmax")[0] == 0
    code, shown, errors = command("recover", pruned, out, *small, "--bits", 4)
    assert code == 0, errors
    assert "rounded to 4 bits; ace-triton pack --bits 4 --group 32 keeps each value" in " ".join(shown.split())
    facts = json.loads((out / checkpoint.REPORT_FILE).read_text())
    assert facts["recovery"]["settings"]["quantize"] == {"bits": 4, "group": 32, "rule": "absmax"}
    assert facts["recipe"]["quantize"]["group"] == 32
    assert facts["history"][-1]["did"].endswith(" tokens, 4 bits in groups of 32 by absmax")
    assert "of the kept weights | 4 bits, groups of 32 inputs, by absmax |" in (out / "README.md").read_text()
    code, _, errors = command("pack", out, packed, *few)
    assert code == 0, errors
    assert "rounded to the nearest" not in errors
    trained, same = checkpoint.load(out)[0], ace_triton.load(packed)
    ace_triton.unpack_model(same)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in trained.state_dict().items())
    code, shown, errors = command("recover", pruned, out, *small, "--bits", 8, "--overwrite")
    assert code == 0, errors
    assert "pack --bits 8 --group 128 keeps" in " ".join(shown.split())
    assert "kept weights were rounded to 0 when DIR was rounded to 4 bits. They count as pruned now" in " ".join(
        shown.split()
    )
    facts = json.loads((out / checkpoint.REPORT_FILE).read_text())
    assert "quantize" not in facts["recipe"]
    assert facts["recovery"]["settings"]["quantize"]["bits"] == 8
    for words, message in (
        (("--group", 64), "--group is for rounded weights: add --bits 8 or --bits 4, or leave it out"),
        (("--bits", 5), "--bits: bits must be one of 8, 4; got 5"),
        (("--bits", 4, "--tune", "groups"), "leave quantize (--bits) out, or recover without groups (--tune weights)"),
    ):
        code, _, errors = command("recover", pruned, tmp_path / "none", *small, *words)
        assert (code, message in " ".join(errors.split())) == (1, True), errors


def test_the_command_refuses_what_is_no_dense_teacher(command, tiny_checkpoint, some_text, tokenizer, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    pruned, packed, renamed = tmp_path / "pruned", tmp_path / "packed", tmp_path / "renamed"
    shutil.copytree(tiny_checkpoint, renamed)
    changed = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(changed))
    assert command("prune", tiny_checkpoint, pruned, "--method", "wanda", *small)[0] == 0
    assert command("pack", pruned, packed)[0] == 0
    shutil.copytree(tiny_checkpoint, tmp_path / "dense")
    shutil.rmtree(tiny_checkpoint)
    shutil.copytree(pruned, tiny_checkpoint)

    def refusal(folder, *words) -> str:
        code, _, errors = command("recover", folder, tmp_path / "out", *small, "--steps", 1, *words)
        assert code == 1
        assert not list(tmp_path.glob(".out*"))
        return errors

    assert "that is the pruned model itself; it replaced the dense one" in refusal(tiny_checkpoint)
    assert "that is a pruned model (it has ace_triton.json)" in refusal(pruned)
    assert "that is the pruned model itself: name" in refusal(pruned, "--teacher", pruned)
    assert f"{packed}: is a packed checkpoint" in refusal(pruned, "--teacher", packed)
    shown = f"token {tokenizer.convert_tokens_to_ids('a')} is 'a' in the pruned model and 'b' in the teacher"
    assert shown in refusal(pruned, "--teacher", renamed)
    dense = ("--teacher", tmp_path / "dense")
    assert "--length 129 is more than the model's 128" in refusal(pruned, *dense, "--length", 129)
    assert "no such file" in refusal(pruned, *dense, "--calibration", "none.txt")
    for content in ("[1, 2]", '{"source": 3}'):
        (pruned / checkpoint.REPORT_FILE).write_text(content)
        unknown = "does not say where its dense model is: name it with --teacher; if DIR is not pruned yet, prune it"
        assert unknown in refusal(pruned)
    assert command("recover", pruned, tmp_path / "out", *small, "--steps", 1, *dense)[0] == 0


def test_a_model_in_float32_is_trained_in_it(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16, "--dtype", "float32")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert command("prune", tiny_checkpoint, pruned, "--method", "wanda", *small)[0] == 0
    few = ("--steps", 1, "--tokens-per-step", 32)
    code, _, errors = command("recover", pruned, out, *small, *few, "--teacher", tiny_checkpoint)
    assert code == 0, errors
    assert "--dtype float32 trains" not in errors
    assert json.loads((out / checkpoint.REPORT_FILE).read_text())["recovery"]["settings"]["forward_dtype"] == "float32"
    before, after = (checkpoint.load(folder)[0] for folder in (pruned, out))
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    assert all(torch.equal(mask, pruned_masks(after)[name]) for name, mask in pruned_masks(before).items())
    code, _, errors = command("recover", pruned, out, *small[:-1], "float16", *few)
    assert (code, "--dtype 'float16': use auto or float32" in errors) == (1, True)


def test_a_model_that_shrink_wrote_is_a_teacher(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    shrunk, pruned, few = tmp_path / "shrunk", tmp_path / "pruned", ("--steps", 1, "--tokens-per-step", 32)
    assert command("shrink", tiny_checkpoint, shrunk, *small, "--method", "depth", "--ratio", 0.5)[0] == 0
    assert command("prune", shrunk, pruned, "--method", "magnitude")[0] == 0
    code, _, errors = command("recover", pruned, tmp_path / "out", *small, *few)
    assert code == 0, errors
    code, _, errors = command("recover", tiny_checkpoint, tmp_path / "other", *small, *few, "--tune", "groups")
    assert (code, "--tune groups is for a model that shrink wrote" in errors) == (1, True)


def test_a_model_that_was_shrunk_and_recovered_is_a_teacher(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    shrunk, trained, pruned = (tmp_path / name for name in ("shrunk", "trained", "pruned"))
    few = ("--steps", 1, "--tokens-per-step", 32)
    assert command("shrink", tiny_checkpoint, shrunk, *small, "--method", "depth", "--ratio", 0.5)[0] == 0
    assert command("recover", shrunk, trained, *small, *few)[0] == 0
    assert command("prune", trained, pruned, "--method", "magnitude")[0] == 0
    for words in ((), ("--teacher", trained)):
        code, _, errors = command("recover", pruned, tmp_path / "out", *small, *few, *words, "--overwrite")
        assert code == 0, errors
    again = tmp_path / "again"
    assert command("recover", pruned, again, *small, *few)[0] == 0
    code, _, errors = command("recover", pruned, tmp_path / "none", *small, *few, "--teacher", again)
    assert (code, "that is a pruned model (it has ace_triton.json)" in errors) == (1, True)


def test_a_shrunk_model_that_was_rounded_to_4_bits_is_recovered_again_and_is_a_teacher(
    command, tiny_checkpoint, some_text, tmp_path
):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    few = (*small, "--steps", 1, "--tokens-per-step", 32)
    shrunk, rounded, pruned, smaller = (tmp_path / name for name in ("shrunk", "rounded", "pruned", "smaller"))
    assert command("shrink", tiny_checkpoint, shrunk, *small, "--method", "depth", "--ratio", 0.5)[0] == 0
    assert command("recover", shrunk, rounded, *few, "--bits", 4, "--group", 32)[0] == 0
    assert command("prune", rounded, pruned, "--method", "magnitude")[0] == 0
    assert command("shrink", rounded, smaller, "--method", "magnitude", "--ratio", 0.3, "--multiple", 8)[0] == 0
    for model in (rounded, pruned, smaller):
        code, _, errors = command("recover", model, tmp_path / "out", *few, "--overwrite")
        assert code == 0, errors


def test_two_commands_at_once_are_refused(command, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "wanda", *small)[0] == 0
    recovering = ("recover", tmp_path / "pruned", tmp_path / "out", *small, "--steps", 1)
    work = tmp_path / f".out{SUFFIX}"
    work.mkdir()
    with (work / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = command(*recovering)
    assert code == 1
    assert "another ace-triton is writing to it" in errors
    code, _, errors = command(*recovering)
    assert code == 0, errors
    assert not list(tmp_path.glob(".out*"))
