"""``ace-triton plan`` and ``ace-triton prune --dry-run``."""

import inspect
import json

import pytest

from ace_triton import plan_pruning
from ace_triton.commands.plan import plan
from ace_triton.commands.prune import prune


@pytest.fixture
def small(some_text) -> list:
    return ["--calibration", some_text, "--samples", "4", "--length", "16"]


def test_plan_takes_the_options_of_prune():
    own, whole = (inspect.signature(function).parameters for function in (plan, prune))
    assert own.keys() - whole.keys() == {"probe"}
    assert whole.keys() - own.keys() == {"dry_run"}
    assert own["out"].default is None


def test_it_says_what_would_be_pruned(command, tiny_checkpoint, small, tmp_path):
    told = tmp_path / "plan.json"
    code, out, errors = command("plan", tiny_checkpoint, *small, "--exclude", "*.q_proj", "--json", told)
    assert code == 0, errors
    assert "layers to prune" in out
    assert "12, in 2 blocks" in out
    assert "wanda, permuted, lstsq, 2:4" in out
    assert "not checked: whether weights have NaN or infinity" in out
    content = json.loads(told.read_text())
    assert len(content["layers"]) == 12
    assert [entry["name"] for entry in content["excluded"]] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert content["calibration"]["samples"] == 4


def test_a_dry_run_is_the_plan_and_writes_nothing(command, tiny_checkpoint, small, tmp_path):
    words = [tiny_checkpoint, tmp_path / "out", *small, "--sparsity", "1:4"]
    code, dry, errors = command("prune", *words, "--dry-run")
    assert code == 0, errors
    assert not (tmp_path / "out").exists()
    _, planned, _ = command("plan", *words)
    rows = ("layers to prune", "pruned, of", "size of the output", "stays dense", "not checked")
    assert [line for line in dry.splitlines() if any(row in line for row in rows)] == [
        line for line in planned.splitlines() if any(row in line for row in rows)
    ]


def test_a_problem_is_a_warning_in_the_plan(command, tiny_checkpoint, small, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, errors = command("plan", tiny_checkpoint, tmp_path / "out", *small)
    assert code == 0
    assert errors.splitlines() == [
        f"warning: {tmp_path / 'out'} already exists: name another folder, or pass --overwrite to replace it"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "nothing"), "unknown method 'nothing'"),
        (("--sparsity", "5:4"), "5:4"),
        (("--packed", "--sparsity", "0.3"), "a packed checkpoint needs n:m"),
        (("--include", "*.nothing"), "matches no linear layer"),
        (("--calibration", "missing.txt"), "missing.txt: no such file"),
        (("--dtype", "int8"), "--dtype 'int8'"),
    ],
)
def test_bad_input_is_one_error_as_in_prune(command, tiny_checkpoint, tmp_path, words, message):
    code, _, errors = command("plan", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 1
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_prune_decides_by_the_plan_that_the_command_prints(command, tiny_checkpoint, small, tmp_path, monkeypatch):
    """Among others the calibration text counts in both."""
    asked = []

    def planning(source, recipe, **options):
        asked.append((source, recipe, options))
        return plan_pruning(source, recipe, **options)

    monkeypatch.setattr("ace_triton.commands.prune_run.plan_pruning", planning)
    monkeypatch.setattr("ace_triton.commands.prune_run.surely_fits", lambda _size: False)
    words = [tiny_checkpoint, tmp_path / "out", *small, "--packed", "--dtype", "bfloat16"]
    for name in ("plan", "prune"):
        assert command(name, *words)[0] == 0
    of_plan, of_prune = (options for _, _, options in asked)
    assert asked[0][:2] == asked[1][:2]
    assert of_prune.items() <= of_plan.items()
    assert of_prune["text"] == str(small[1])
    assert of_plan.keys() - of_prune.keys() == {"out", "device", "overwrite", "stream", "probe"}
