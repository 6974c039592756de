"""What prune does by default, by preset and by its parts; metrics of one's own on the command line; the demo."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from ace_triton import Recipe, Update, prune_model
from ace_triton.commands.demo_run import DemoSettings, demo_json, demo_table, run_demo
from ace_triton.inputs.checkpoint import load
from ace_triton.methods.registry import _REGISTRY
from ace_triton.presets import BALANCED, BEST, PRESETS
from ace_triton.progress import ProgressLines

TIED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def prune(command, tiny_checkpoint, some_text, tmp_path):
    """prune(*words): the report of a pruning of the tiny checkpoint, and what was shown."""

    def run(*words, calibrated=("--samples", 4, "--length", 16)):
        out = tmp_path / "out"
        code, shown, errors = command(
            "prune", tiny_checkpoint, out, "--calibration", some_text, *calibrated, "--overwrite", *words
        )
        assert code == 0, errors
        return json.loads((out / "ace_triton.json").read_text()), shown

    return run


LSTSQ = Update().to_dict()


@pytest.mark.parametrize(
    ("words", "method", "permute", "update", "sequential"),
    [
        ((), "wanda", True, LSTSQ, "blocks"),
        (("--sparsity", "0.5"), "wanda", False, LSTSQ, "blocks"),
        (("--preset", "balanced"), "wanda", True, LSTSQ, "blocks"),
        (("--preset", "fast"), "ace", False, None, "blocks"),
        (("--preset", "best"), "wanda", True, {**LSTSQ, "mask_rounds": 8}, "layers"),
        (("--method", "ria"), "ria", False, None, "blocks"),
        (("--method", "ria", "--permute"), "ria", True, None, "blocks"),
        (("--method", "ria", "--preset", "balanced"), "ria", True, LSTSQ, "blocks"),
        (("--no-permute",), "wanda", False, LSTSQ, "blocks"),
        (("--update", "none"), "wanda", True, None, "blocks"),
        (("--update", "rescale"), "wanda", True, {"kind": "rescale"}, "blocks"),
        (("-u", "damping=0.1"), "wanda", True, {**LSTSQ, "damping": 0.1}, "blocks"),
        (("--preset", "best", "--sequential", "none"), "wanda", True, {**LSTSQ, "mask_rounds": 8}, "none"),
    ],
)
def test_a_recipe_and_its_parts(prune, words, method, permute, update, sequential):
    report, shown = prune(*words)
    assert (report["method"], report["permute"], report["sequential"]) == (method, permute, sequential)
    assert report["update"] == update
    assert (report["permutation"] is not None) == permute
    assert ("weight update" in shown) == (update is not None)
    assert ("permuted" in shown.splitlines()[0]) == permute


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_call_that_it_says(prune, tmp_path, tiny_checkpoint, tokenizer, some_text, name):
    from ace_triton.inputs.calibration import load_calibration

    prune("--preset", name)
    model, _ = load(tiny_checkpoint)
    sequences = load_calibration(str(some_text), tokenizer, samples=4, length=16)
    assert prune_model(model, sequences, name).recipe == PRESETS[name]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[TIED], model.state_dict()[TIED])


def test_presets_differ_in_their_words():
    assert BALANCED.words == "wanda, permuted, lstsq"
    assert BEST.words == "wanda, permuted, lstsq, 8 mask rounds, layer by layer"


def weight_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_saved_recipe_repeats_the_model_bit_for_bit(command, prune, tiny_checkpoint, tmp_path):
    words = ("--preset", "best", "--method", "ria", "-o", "a=0.3", "-u", "damping=0.1", "--sparsity", "4:8")
    further = ("--exclude", "*.q_proj", "--seed", 5, "--bos", "each", "--batch-size", 3, "--dtype", "bfloat16")
    report, _ = prune(*words, *further)
    file = tmp_path / "out" / "ace_triton.json"
    again = tmp_path / "again"
    code, _, errors = command("prune", tiny_checkpoint, again, "--recipe", file)
    assert code == 0, errors
    assert "is replaced by" not in errors
    assert weight_bytes(again) == weight_bytes(tmp_path / "out")
    second = json.loads((again / "ace_triton.json").read_text())
    assert [second[name] for name in ("recipe", "calibration", "dtype_option")] == [
        report[name] for name in ("recipe", "calibration", "dtype_option")
    ]
    assert report["calibration"]["bos"] == "each"
    assert Recipe.load(file).to_dict() == report["recipe"]


def test_flags_beside_a_recipe_replace_its_parts_and_the_output_says_so(command, prune, tiny_checkpoint, tmp_path):
    prune("--exclude", "*.q_proj")
    out, file = tmp_path / "again", tmp_path / "out" / "ace_triton.json"
    words = ("--recipe", file, "--sparsity", "0.5", "--update", "rescale", "--samples", 2)
    code, _, errors = command("prune", tiny_checkpoint, out, *words)
    assert code == 0, errors
    report = json.loads((out / "ace_triton.json").read_text())
    asked = Recipe("wanda", sparsity="0.5", update="rescale", exclude="*.q_proj")
    assert Recipe.from_dict(report["recipe"]) == asked
    assert (report["calibration"]["samples"], report["calibration"]["length"]) == (2, 16)
    told = [line for line in errors.splitlines() if "is replaced by" in line]
    assert [line.split()[0] for line in told] == ["sparsity", "update", "permute", "samples"]
    assert told[0] == f"sparsity 2:4, scope=row of {file} is replaced by 0.5, scope=row"
    assert told[-1] == f"samples 4 of {file} is replaced by 2"


def test_a_bare_recipe_has_the_default_calibration(command, tiny_checkpoint, some_text, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(Recipe("ria", {"a": 0.4}, "4:8").to_json())
    words = ("--recipe", file, "--calibration", some_text, "--samples", 4)
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert Recipe.from_dict(report["recipe"]) == Recipe.load(file)
    assert (report["calibration"]["samples"], report["calibration"]["length"]) == (4, 128)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"recipe": {"method": "wanda", "sparsty": "2:4"}}, (), "a recipe has no entry 'sparsty'; its entries: method"),
        ({"calibration": {"sample": 4}}, (), "calibration has no entry 'sample'; its entries: text, samples"),
        ({"calibration": {"samples": 0}}, (), "calibration: samples must be a whole number, 1 or more; got 0"),
        ({"calibration": {"text": "gone.txt"}}, (), "the calibration text gone.txt was not found here or near"),
        ({"calibration": {"text": "some.txt", "sha256": "0"}}, (), "some.txt is not the text that the recipe was used"),
        ({"dtype_option": "int3"}, (), "dtype_option must be one of auto, float32, float16, bfloat16; got 'int3'"),
        ({"dtype_option": []}, (), "dtype_option must be one of auto, float32, float16, bfloat16; got []"),
        ({"recipe": {"method": "wanda", "sparsity": 10**400}}, (), "the pruned fraction must lie in [0, 1)"),
        ({"recipe": {"method": "wanda", "update": {"kind": "lstsq", "damping": 10**400}}}, (), "damping must be"),
        ({}, ("--preset", "fast"), "--preset and --recipe both name a recipe: give one of them"),
        ({}, ("--sparsity", "0.5", "--permute"), "permute orders channels into the groups of n:m"),
    ],
)
def test_a_recipe_file_that_cannot_be_used(command, tiny_checkpoint, some_text, tmp_path, change, words, message):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"recipe": {"method": "wanda"}, **change}))
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", "--recipe", file, *words)
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_report_says_what_was_done_to_what_with_what(prune, tmp_path):
    report, _ = prune("--seed", 3, "--exclude", "*.q_proj", "--json", tmp_path / "told.json")
    files = report.pop("files")
    assert "model.safetensors" in files
    assert report == json.loads((tmp_path / "told.json").read_text())
    assert report["calibration"] == {
        "text": "some.txt",
        "samples": 4,
        "length": 16,
        "seed": 3,
        "bos": "auto",
        "batch_size": None,
        "sha256": hashlib.sha256((tmp_path / "some.txt").read_bytes()).hexdigest(),
    }
    assert report["recipe"] == dataclasses.replace(BALANCED, exclude="*.q_proj").to_dict()
    assert (report["source"], report["source_path"]) == ("tiny", "../tiny")
    assert (report["dtype"], report["device"], report["scope"]) == ("float32", "cpu", "row")
    assert (report["include"], report["exclude"]) == (None, ["*.q_proj"])
    assert report["options"] == {}
    versions = report["versions"]
    assert versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(versions) == {"ace_triton", "torch", "transformers", "triton", "python"}
    assert report["date"].startswith("20")
    assert str(tmp_path) not in json.dumps(report)
    assert 0 < report["seconds"]["update"] < report["seconds"]["total"]


def test_no_path_of_this_machine_is_written(command, tiny_checkpoint, tmp_path):
    out = tmp_path / "deep" / "out"
    code, _, errors = command("prune", tiny_checkpoint, out, "--method", "magnitude")
    assert code == 0, errors
    report = json.loads((out / "ace_triton.json").read_text())
    assert (report["source"], report["source_path"], report["calibration"]) == ("tiny", None, None)
    assert str(tmp_path) not in (out / "ace_triton.json").read_text()


def test_pack_carries_the_report_on(command, prune, tmp_path):
    prune("--method", "wanda")
    told = tmp_path / "pack.json"
    code, _, errors = command("pack", tmp_path / "out", tmp_path / "there" / "packed", "--json", told)
    assert code == 0, errors
    report = json.loads((tmp_path / "there" / "packed" / "ace_triton.json").read_text())
    assert (report["method"], report["source"], report["source_path"]) == ("wanda", "tiny", None)
    assert json.loads(told.read_text())["model"] == "out"


def test_every_command_says_once_what_it_runs_on(command, tiny_checkpoint, some_text, tmp_path):
    text = ("--text", some_text, "--length", 16)
    for words in (
        ("prune", tiny_checkpoint, tmp_path / "out", "--method", "magnitude"),
        ("pack", tmp_path / "out", tmp_path / "packed"),
        ("evaluate", tmp_path / "packed", *text),
        ("generate", tmp_path / "packed", "--prompt", "a", "--max-new-tokens", 2),
        ("bench", "--shape", "32x64", "--rows", 1),
    ):
        code, _, errors = command(*words)
        assert code == 0, errors
        assert errors.count("running on compiled CPU library (") == 1
        assert " thread" in errors


PLUGIN = """
import ace_triton

@ace_triton.register_metric("norm_to")
def norm_to(weight, stats, power: float = 1.0, kind=float):
    return ace_triton.ScoreTerms(scale=stats.norm**power)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file that registers a metric, forgotten after the test."""
    monkeypatch.setattr("ace_triton.methods.registry._REGISTRY", dict(_REGISTRY))
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_a_metric_of_ones_own_is_pruned_by(command, prune, plugin, tmp_path):
    prune("--method", "wanda")
    wanda = load_file(tmp_path / "out" / "model.safetensors")
    report, _ = prune("--plugin", plugin, "--method", "norm_to")
    assert report["options"] == {"power": 1.0, "kind": "<class 'float'>"}
    mine = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(mine[name], wanda[name]) for name in wanda)
    report, _ = prune("--plugin", plugin, "--method", "norm_to", "-o", "power=2", "--permute", "--update", "lstsq")
    assert report["options"]["power"] == 2.0
    code, shown, _ = command("methods", "--plugin", plugin)
    assert code == 0
    assert "norm_to" in shown


def test_a_metric_of_ones_own_is_studied(study, plugin, tmp_path, monkeypatch):
    monkeypatch.setattr("ace_triton.commands.study._page_writer", lambda: lambda results, page: None)
    plugin.write_text(PLUGIN.replace(", kind=float", ""))
    words = ("--plugin", plugin, "--methods", "wanda,norm_to:power=2", "--sparsities", "2:4")
    code, _, errors = study(tmp_path / "s", *words, "--lengths", "8", "--seeds", "1")
    assert code == 0, errors
    records = [json.loads(line) for line in (tmp_path / "s" / "results.jsonl").read_text().splitlines()]
    cells = [record["cell"] for record in records if "perplexity" in record and "cell" in record]
    assert {cell["method"] for cell in cells} == {"wanda", "norm_to"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_that_name", "cannot be imported (ModuleNotFoundError"),
        ("x = 1", "registers no metric"),
        ("1 / 0", "cannot be imported (ZeroDivisionError"),
        ("import ace_triton\n@ace_triton.register_metric('m')\ndef m(w, s, name='x'): ...", "name of an argument"),
    ],
)
def test_a_plugin_that_is_none(command, tiny_checkpoint, tmp_path, plugin, code, message):
    plugin.write_text(code)
    exit_code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", "--plugin", plugin)
    assert exit_code == 1
    assert message in errors
    assert errors.count("\n") == 1


def test_bench_gives_limits_as_a_line_of_python(command, monkeypatch):
    """Which product is faster differs from run to run, so here another one always is."""
    import ace_triton

    monkeypatch.setattr("ace_triton.packed.bench.RowTimes.fits", False)
    code, shown, errors = command("bench", "--shape", "32x64", "--rows", "1,8")
    assert code == 0, errors
    (line,) = [line.strip() for line in shown.splitlines() if "set_row_limits" in line]
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    ace_triton.prune_linear(model[0], None, "magnitude")
    ace_triton.pack_model(model)
    exec(line, {"ace_triton": ace_triton, "model": model})
    assert model[0].limits is not None


def test_the_demo_shows_what_each_step_gains(tiny_checkpoint, some_text, tmp_path):
    import io

    from rich.console import Console

    text = str(some_text)
    settings = DemoSettings(
        source=str(tiny_checkpoint),
        calibration=text,
        evaluation=text,
        text=text,
        samples=4,
        length=16,
        windows=2,
        window_length=32,
        minutes=0.01,
        recovery_length=16,
        prompt="The quick",
        new_tokens=4,
    )
    console = Console(file=io.StringIO(), width=100)
    with ProgressLines(console) as progress:
        rows = run_demo(settings, tmp_path / "out", overwrite=False, progress=progress)
    assert [row.model for row in rows] == [
        "dense",
        "ace",
        "wanda, permuted, lstsq",
        "+ 0.01 min of recovery",
        "+ packed",
    ]
    assert rows[0].seconds is None
    assert all(row.seconds > 0 and row.tokens_per_second > 0 and row.written for row in rows[1:])
    assert rows[4].perplexity == pytest.approx(rows[3].perplexity, rel=1e-4)
    assert rows[0].own_text_perplexity == pytest.approx(rows[0].perplexity)
    console.print(demo_table(rows, settings))
    assert f"{rows[2].perplexity:.2f}" in console.file.getvalue()
    json.dumps(demo_json(rows, settings))
    saved, _ = load(tmp_path / "out")
    assert float((saved.state_dict()[TIED] == 0).float().mean()) == 0.5
    assert json.loads((tmp_path / "out" / "ace_triton.json").read_text())["recovery"]["steps"] > 0
