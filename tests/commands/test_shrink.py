"""``ace-triton shrink``: its checkpoint, its report and its errors."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_triton.commands import shrink_run
from ace_triton.commands.sources import loaded_bytes
from ace_triton.inputs.model_source import weight_file_bytes

SMALL = ("--samples", "4", "--length", "16", "--multiple", "16", "--dtype", "float32")


def test_it_writes_an_ordinary_checkpoint_that_can_be_pruned(command, tiny_checkpoint, some_text, tmp_path):
    out, result = tmp_path / "smaller", tmp_path / "result.json"
    text = ("--calibration", some_text, "--evaluation", some_text, "--windows", "2", "--window-length", "16")
    code, printed, errors = command("shrink", tiny_checkpoint, out, *SMALL, *text, "--groups", "1", "--json", result)
    assert code == 0, errors
    assert "perplexity after" in printed
    assert "does not record where its dense model is" not in printed
    assert "key-value groups in a block" in printed
    facts = json.loads(result.read_text())
    assert facts["shrink"]["widths"]["groups"] == [2, 1]
    assert facts["shrink"]["removed"] >= 0.2
    assert facts["shrink"]["settings"] == {**facts["shrink"]["settings"], "method": "saap", "update": "lstsq"}
    assert facts["perplexity"].keys() == {"before", "after"}
    assert facts["calibration"]["text"] == some_text.name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 1
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(tiny_checkpoint))
    card = (out / "README.md").read_text()
    assert "# tiny made smaller by structured pruning" in card
    assert "| Key-value groups in a block | 1 of 2 |" in card
    assert "with zeros" not in card
    pruned = tmp_path / "pruned"
    code, _, errors = command("prune", out, pruned, "--method", "magnitude")
    assert code == 0, errors
    assert json.loads((pruned / "ace_triton.json").read_text())["shrink"] == facts["shrink"]
    code, _, errors = command("pack", pruned, tmp_path / "packed")
    assert code == 0, errors
    history = json.loads((tmp_path / "packed" / "ace_triton.json").read_text())["history"]
    assert [step["command"] for step in history] == ["shrink", "prune", "pack"]
    assert history[0]["perplexity"] == [facts["perplexity"][which]["perplexity"] for which in ("before", "after")]
    assert history[0]["parameters"] == [facts["shrink"]["model_before"], facts["shrink"]["model_after"]]
    assert history[0]["seconds"] == pytest.approx(sum(facts["shrink"]["seconds"].values()))
    assert history[1]["did"].endswith("2:4")
    assert history[2]["bytes"][1] < history[2]["bytes"][0]
    code, printed, errors = command("info", tmp_path / "packed")
    assert code == 0, errors
    assert "what it brought" in printed
    strange = [3, {"command": 1}, {"command": "prune", "did": "x", "bytes": [1], "zeros": "many", "seconds": []}]
    (out / "ace_triton.json").write_text(json.dumps({**facts, "history": strange}))
    code, printed, errors = command("info", out)
    assert code == 0, errors
    assert "prune" in printed
    (out / "ace_triton.json").write_text(json.dumps(facts))
    code, _, errors = command("shrink", pruned, tmp_path / "again", "--method", "magnitude")
    assert code == 1
    assert "is pruned to 2:4, which does not outlive the removal of channels: shrink the dense model" in errors
    recovered = tmp_path / "recovered"
    words = ("--calibration", some_text, "--length", "16", "--steps", "1", "--tune-group", "16")
    code, _, errors = command("recover", out, recovered, *words)
    assert (code, errors.splitlines()[-1][:38]) == (1, "error: --tune-bits, --tune-group and -")
    code, printed, errors = command("recover", out, recovered, *words, "--tune", "groups", "--rank", "2")
    assert code == 0, errors
    assert "adapter values trained" in printed
    assert "still 0" not in printed
    tensors = AutoModelForCausalLM.from_pretrained(recovered).state_dict()
    values = tensors["model.layers.0.mlp.down_proj.weight"][:, :16]
    assert max(len(row.mul(1e5).round().unique()) for row in values) <= 16
    assert AutoModelForCausalLM.from_pretrained(recovered).config.num_key_value_heads == 1
    steps = json.loads((recovered / "ace_triton.json").read_text())["history"]
    assert [step["command"] for step in steps] == ["shrink", "recover"]
    assert steps[1]["did"].startswith("1 optimizer steps, ")


def test_it_says_that_the_report_does_not_name_the_dense_model(command, tiny_checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "smaller"
    code, printed, errors = command("shrink", tiny_checkpoint, out, "--method", "magnitude", "--multiple", "16")
    assert code == 0, errors
    told = f"{out} does not record where its dense model is: name it in recover --teacher and evaluate --dense"
    assert told in printed.splitlines()


def test_its_report_repeats_it(command, tiny_checkpoint, some_text, tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    text = ("--calibration", some_text, "--samples", "4", "--length", "16")
    words = ("--method", "flap", "--ratio", "0.1", "--multiple", "16", "--update", "lstsq")
    assert command("shrink", tiny_checkpoint, first, *text, *words)[0] == 0
    code, _, errors = command("shrink", tiny_checkpoint, again, "--recipe", first / "ace_triton.json")
    assert code == 0, errors
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    changed = ("--recipe", first / "ace_triton.json", "--method", "wanda-sp", "--groups", "0")
    assert command("shrink", tiny_checkpoint, other, *changed)[0] == 0
    settings = json.loads((other / "ace_triton.json").read_text())["shrink"]["settings"]
    assert {name: settings[name] for name in ("method", "update", "multiple", "ratio", "groups")} == {
        "method": "wanda-sp",
        "update": "none",
        "multiple": 16,
        "ratio": 0.1,
        "groups": 0,
    }
    some_text.write_text(some_text.read_text() + "More.")
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "no", "--recipe", first / "ace_triton.json")
    assert code == 1
    assert "is not the text that the recipe was used with" in errors
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "no", "--recipe", tiny_checkpoint / "config.json")
    assert code == 1
    assert "holds no settings of shrink" in errors


def test_a_dry_run_writes_nothing(command, tiny_checkpoint, tmp_path):
    words = ("--method", "magnitude", "--multiple", "16", "--dry-run")
    code, printed, _ = command("shrink", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 0
    assert "nothing was written (--dry-run)" in printed
    assert "64 -> 32" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_run_takes(command, tiny_checkpoint, some_text, tmp_path):
    words = (*SMALL, "--calibration", some_text, "--groups", "0", "--json")
    code, printed, errors = command(
        "shrink", tiny_checkpoint, tmp_path / "o", *words, tmp_path / "dry.json", "--dry-run"
    )
    assert code == 0, errors
    assert "size of the checkpoint" in printed
    assert "time, estimated" in printed
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words, tmp_path / "run.json")
    assert code == 0, errors
    dry, run = (json.loads((tmp_path / f"{name}.json").read_text())["shrink"] for name in ("dry", "run"))
    assert run["estimate"] is None
    for name in ("widths", "config", "bytes_before", "bytes_after", "model_after"):
        assert dry[name] == run[name]
    weights = 4 * run["model_before"]
    assert dry["estimate"]["phases"].keys() >= {"build and check", "update", "save"}
    assert weights < dry["estimate"]["peak_bytes"] < 6 * weights
    assert 0 < dry["estimate"]["seconds"] < 10 * sum(run["seconds"].values()) + 1
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.9 * run["bytes_after"] < written <= run["bytes_after"]


@pytest.mark.parametrize("method", ["depth", "flap"])
def test_the_checkpoint_has_the_size_that_is_asked_for(method, command, tiny_checkpoint, some_text, tmp_path):
    before = (tiny_checkpoint / "model.safetensors").stat().st_size
    asked = before - 20_000
    words = ("--method", method, "--multiple", "8", "--calibration", some_text, "--samples", "2", "--length", "16")
    code, printed, errors = command("shrink", tiny_checkpoint, tmp_path / "out", "--size", f"{asked}", *words)
    assert code == 0, errors
    assert f"asked for at most {asked / 1e3:.1f} KB)" in " ".join(printed.split())
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert asked - 20_000 - 10_000 * (method == "depth") < written <= asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "slice"], "error: method must be one of saap, flap, llm-pruner, wanda-sp, magnitude, depth; got"),
        (["--method", "depth", "--update", "bias"], "error: method 'depth' removes whole blocks, so no layer can make"),
        (["--method", "flap", "--terms", "mixed"], "error: terms is a setting of method 'llm-pruner'"),
        (["--method", "magnitude", "--ratio", "0.95"], "error: ratio 0.95 leaves nothing of a feed-forward"),
        (["--method", "depth", "--length", "129"], "error: --length 129 is more than the model's 128 positions"),
        (["--method", "magnitude", "--size", "1GB"], "error: size 1,000,000,000 bytes: the model has"),
        (["--method", "magnitude", "--size", "10KB"], "error: size 10,000 bytes: what lies outside the blocks has"),
        (
            ["--size", "5 parsecs"],
            "error: --size '5 parsecs': give a number of bytes above 0, with or without one of B,",
        ),
        (["--size", "1MB", "--ratio", "0.3"], "error: give --ratio, --size or --speedup, one of them"),
        (["--evaluation", "missing.txt", "--window-length", "16"], "error: missing.txt"),
    ],
)
def test_a_mistake_is_one_line(command, tiny_checkpoint, tmp_path, words, message):
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 1
    assert errors.splitlines()[-1].startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def little_memory(monkeypatch):
    from ace_triton.streaming import fits

    for module in (shrink_run, fits):
        monkeypatch.setattr(module, "available_memory", lambda: 1000)


def test_a_model_larger_than_memory_streams_or_is_refused_before_it_loads(
    command, tiny_checkpoint, tmp_path, little_memory
):
    words = ("--method", "llm-pruner", "--no-stream")
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words)
    assert (code, "are available: add --stream, or use a machine with more memory" in errors) == (1, True)
    assert "load the model" not in errors
    words = ("--method", "magnitude", "--multiple", "16")
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words, "--no-stream")
    assert (code, "are available: add --stream, or use a machine with more memory" in errors) == (1, True)
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 0, errors
    assert "so its weights stay in files (--stream)" in " ".join(errors.split())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 32


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.bfloat16, 0.5), ("auto", 1)])
def test_the_memory_is_that_of_the_weights_as_they_are_loaded(dtype, times, tiny_checkpoint):
    assert loaded_bytes(tiny_checkpoint, dtype) == times * weight_file_bytes(tiny_checkpoint)


def test_a_dry_run_warns_if_the_run_would_not_fit(command, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink_run, "available_memory", lambda: 1000)
    words = ("--method", "magnitude", "--multiple", "16", "--dry-run")
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 0
    assert "beside the loaded model, 1.0 KB are available: add --stream" in " ".join(errors.split())


def test_a_streamed_run_writes_the_same_bytes(command, tiny_checkpoint, some_text, tmp_path):
    text = ("--calibration", some_text, "--evaluation", some_text, "--windows", "2", "--window-length", "16")
    results = {}
    for how, more in (("memory", ("--no-stream",)), ("files", ("--stream", "--offload", "disk"))):
        told = tmp_path / f"{how}.json"
        words = (*SMALL, *text, "--groups", "1", *more, "--json", told)
        code, _, errors = command("shrink", tiny_checkpoint, tmp_path / how, *words)
        assert code == 0, errors
        results[how] = json.loads(told.read_text())
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    memory, files = results["memory"], results["files"]
    for which in ("before", "after"):
        assert files["perplexity"][which]["perplexity"] == pytest.approx(memory["perplexity"][which]["perplexity"])
    same = ("widths", "config", "removed", "bytes_after", "output_error", "notes", "refused")
    assert {name: files["shrink"][name] for name in same} == {name: memory["shrink"][name] for name in same}
    code, _, errors = command("shrink", tiny_checkpoint, tmp_path / "no", *SMALL, "--offload", "disk")
    assert (code, "--offload disk needs --stream" in errors) == (1, True)
    words = (*SMALL, *text, "--stream", "--dry-run", "--importance", "taylor")
    code, printed, errors = command("shrink", tiny_checkpoint, tmp_path / "no", *words)
    assert code == 0, errors
    assert "nothing was written (--dry-run)" in printed
    assert not (tmp_path / "no").exists()
