import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ace_triton
from ace_triton.commands import console


@pytest.fixture
def prune(command, tiny_checkpoint, some_text):
    """prune(*words): prune the tiny checkpoint on a small text."""

    def run(out, *words):
        small = ("--calibration", some_text, "--samples", 4, "--length", 16)
        return command("prune", tiny_checkpoint, out, *small, *words)

    return run


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "stade", "cosp", "varp", "ace", "ace-paper", "saap"])
def test_prune_writes_what_it_says(prune, tmp_path, tiny_checkpoint, method):
    code, out, _ = prune(tmp_path / "out", "--method", method, "--json", tmp_path / "report.json")
    assert code == 0, out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= {"method", "sparsity", "seconds", "peak_bytes", "layers"}
    assert (report["method"], report["sparsity"]) == (method, "2:4")
    assert set(report["seconds"]) == {
        "load",
        "calibration",
        "statistics",
        "rotate",
        "permute",
        "select",
        "update",
        "quantize",
        "block_fit",
        "other",
        "total",
    }
    saved = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert saved.pop("files") == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert report == saved
    parts = [report["seconds"][part] for part in ("load", "calibration", "statistics", "select")]
    assert 0 < sum(parts) <= report["seconds"]["total"] * 1.001
    assert len(report["layers"]) == 14
    assert all(layer["kept"] == 0.5 and layer["pattern"] == "2:4" for layer in report["layers"])
    dense = load_file(tiny_checkpoint / "model.safetensors")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    named = {f"{layer['name']}.weight" for layer in report["layers"]}
    for name, weight in dense.items():
        if name in named:
            assert bool((pruned[name].reshape(-1, 4) != 0).sum(1).le(2).all())
            assert torch.equal(pruned[name], torch.where(pruned[name] != 0, weight, 0.0))
        else:
            assert torch.equal(pruned[name], weight)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_sequential_and_options_change_the_result(prune, tmp_path):
    outs = {}
    for name, words in {
        "plain": (),
        "again": (),
        "at once": ("--sequential", "none"),
        "layers": ("--sequential", "layers"),
        "option": ("-o", "base=wanda", "-o", "reduce=abs"),
        "seed": ("--seed", 1),
        "half": ("--sparsity", "50%"),
        "layer": ("--sparsity", "0.5", "--scope", "layer"),
        "self": ("--calibration", "self"),
        "one block": ("--include", "*layers.1.*", "--exclude", "*mlp*"),
    }.items():
        code, _, errors = prune(tmp_path / name, "--method", "ace", *words)
        assert code == 0, errors
        outs[name] = load_file(tmp_path / name / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(outs["plain"][key], outs["again"][key])
    for name in outs.keys() - {"plain", "again"}:
        assert not torch.equal(outs["plain"][key], outs[name][key]), name
    assert bool((outs["one block"][key] != 0).all())
    assert not bool((outs["one block"]["model.layers.1.self_attn.q_proj.weight"] != 0).all())


def test_an_unknown_turn_is_refused_before_anything_is_read(command, tmp_path):
    code, _, errors = command("prune", tmp_path / "none", tmp_path / "out", "--sequential", "sideways")
    assert code == 2
    assert "sideways" in errors
    assert "'layers'" in errors


def test_evaluate_and_info(command, prune, some_text, tmp_path):
    prune(tmp_path / "out")
    code, out, _ = command(
        "evaluate", tmp_path / "out", "--text", some_text, "--length", 32, "--windows", 3, "--json", tmp_path / "e.json"
    )
    assert code == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert set(result) >= {"perplexity", "windows", "length", "tokens", "bos"}
    assert (result["model"], result["text"], result["dtype"]) == ("out", "some.txt", "float32")
    assert result["protocol"] == "ours: text not given with --wikitext, not the whole text"
    assert result["protocol"] in out
    assert (result["windows"], result["length"], result["tokens"]) == (3, 32, 93)
    assert 1 < result["perplexity"] < 1000
    assert f"{result['perplexity']:.3f}" in out
    code, out, _ = command("info", tmp_path / "out", "--json", tmp_path / "i.json")
    assert code == 0
    assert "14 2:4" in out
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "i.json").read_text())["layers"]}
    assert layers["model.layers.0.self_attn.q_proj.weight"]["pattern"] == "2:4"
    assert layers["model.embed_tokens.weight"]["pattern"] == "dense"


def test_a_raw_file_of_wikitext_is_hinted_at(command, tiny_checkpoint, some_text, tmp_path):
    wiki = tmp_path / "wikitext2-raw-test.txt"
    wiki.write_bytes(some_text.read_bytes())
    for text, hints in ((wiki, True), (some_text, False)):
        code, _, errors = command("evaluate", tiny_checkpoint, "--text", text, "--length", 32, "--windows", 1)
        assert (code, "for a raw file of WikiText-2 add --wikitext" in errors) == (0, hints)


def test_an_existing_folder_is_left_alone_unless_told(prune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    code, _, errors = prune(tmp_path / "out")
    assert code == 1
    assert "--overwrite" in errors
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    code, _, errors = prune(tmp_path / "out", "--overwrite")
    assert code == 1
    assert "contains mine" in errors
    (tmp_path / "out" / "mine").unlink()
    for seed in range(2):
        assert prune(tmp_path / "out", "--overwrite", "--seed", seed)[0] == 0
        assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "2:3"), "n:m needs m in"),
        (("--sparsity", "half"), "not a sparsity"),
        (("--method", "wnada"), "use one of magnitude, wanda"),
        (("-o", "a=0.3"), "method 'wanda' has no option 'a'; its options: none"),
        (("--method", "ace", "-o", "bsae=ria"), "no option 'bsae'"),
        (("--method", "ace", "-o", "base"), "write name=value"),
        (("--method", "ace", "-o", "base=obs"), "base must be one of 'none', 'relative', 'wanda', 'ria'; got 'obs'"),
        (("--calibration", "./none.txt"), "no such file"),
        (("--length", "99999"), "--length 99999 is more than the model's 128 positions"),
        (("--dtype", "int3"), "use one of auto"),
        (("--device", "cuda:77"), "device 'cuda:77' is not available here"),
        (("--json", "no-such-folder/x.json"), "folder that exists"),
        (("--include", "nothing*"), "nothing*"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(prune, tmp_path, words, message):
    code, _, errors = prune(tmp_path / "out", *words)
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_wrong_call_exits_with_two(command):
    assert command("prune")[0] == 2
    assert command("prune", "a", "b", "--no-such-flag")[0] == 2


def test_a_source_that_is_none(command, tmp_path):
    code, _, errors = command("prune", tmp_path / "none", tmp_path / "out", "--method", "magnitude")
    assert code == 1
    assert errors == f"error: {tmp_path / 'none'}: cannot be loaded: no such file or folder\n"
    code, _, errors = command("info", tmp_path)
    assert code == 1
    assert ".safetensors" in errors


def test_a_layer_with_nan_is_named(prune, tiny_checkpoint, tmp_path):
    path = tiny_checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, errors = prune(tmp_path / "out")
    assert code == 1
    assert "model.layers.1.mlp.up_proj" in errors
    assert not (tmp_path / "out").exists()


def test_a_window_longer_than_the_model(command, tiny_checkpoint, some_text):
    code, _, errors = command("evaluate", tiny_checkpoint, "--text", some_text, "--length", 256)
    assert code == 1
    assert "128 positions" in errors


def test_version_and_help(command):
    code, out, _ = command("--version")
    assert code == 0
    assert out.startswith("ace-triton ")
    code, out, _ = command("--help")
    assert all(name in out for name in ("prune", "evaluate", "info", "demo"))


def test_libraries_show_no_bars_of_their_own(command, capsys):
    import datasets
    from transformers.utils import logging

    logging.enable_progress_bar()
    if not datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS:
        datasets.enable_progress_bars()
    command("--version")
    assert list(logging.tqdm(range(3))) == [0, 1, 2]
    assert list(datasets.utils.tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_program_that_uses_tqdm_keeps_its_bars(command, capsys):
    from tqdm.auto import tqdm

    command("--version")
    assert list(tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        ace_triton.TextError("a mistake"),
        ace_triton.BackendError("a mistake"),
        OSError("a mistake"),
        MemoryError("a mistake"),
        RuntimeError("a mistake: CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_bug_is_one_line(command, monkeypatch, tmp_path, error):
    monkeypatch.setattr("ace_triton.commands.info.inspect_checkpoint", failing(error))
    assert command("info", tmp_path) == (1, "", f"error: {error}\n")
    monkeypatch.setenv("ACE_TRITON_TRACEBACK", "1")
    with pytest.raises(type(error)):
        command("info", tmp_path)


@pytest.mark.parametrize("error", [ValueError("[/]"), RuntimeError("[/]"), KeyError("[/]"), AssertionError("[/]")])
def test_a_bug_shows_its_traceback_and_asks_for_a_report(command, monkeypatch, tmp_path, error):
    monkeypatch.setattr("ace_triton.commands.info.inspect_checkpoint", failing(error))
    code, out, errors = command("info", tmp_path)
    assert (code, out) == (1, "")
    *lines, last = errors.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"{type(error).__name__}: ")
    assert last == (
        f"error: this is a bug in ace-triton {ace_triton.__version__}: please open an issue, with the command and the "
        "lines above"
    )


def test_permute_reorders_and_says_so(prune, tmp_path, tiny_checkpoint):
    code, out, _ = prune(tmp_path / "out", "--permute", "--json", tmp_path / "report.json")
    assert code == 0
    assert "layers reordered" in out
    told = json.loads((tmp_path / "report.json").read_text())["permutation"]
    names = {layer["name"].rpartition(".")[2] for layer in told["reordered"]}
    assert names == {"o_proj", "down_proj"}
    assert all(layer["after"] > layer["before"] for layer in told["reordered"])
    assert told["unfolded"] == []
    dense = load_file(tiny_checkpoint / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    pruned = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    in_place = pruned[pruned != 0] == dense[pruned != 0]
    assert not bool(in_place.all())


def test_rotate_turns_values_and_says_so(prune, command, tmp_path, tiny_checkpoint):
    """Kept weights of all other layers are those of the dense model, and the recipe repeats the same bytes."""
    code, out, _ = prune(tmp_path / "out", "--method", "wanda", "--rotate", "--json", tmp_path / "report.json")
    assert code == 0
    assert "layers rotated" in out
    assert "rotation of values" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["name"] for layer in report["rotation"]["rotated"]] == [
        f"model.layers.{index}.self_attn.o_proj" for index in (0, 1)
    ]
    assert all(layer["after"] > layer["before"] for layer in report["rotation"]["rotated"])
    assert (report["rotation"]["unrotated"], report["rotate"], report["recipe"]["rotate"]) == ([], True, True)
    assert "rotated" in report["history"][-1]["did"]
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "out"))
    turned = {name for name in dense if not torch.equal(pruned[name], torch.where(pruned[name] != 0, dense[name], 0.0))}
    assert {name.split(".")[-2] for name in turned if "proj" in name} == {"v_proj", "o_proj"}
    code, _, errors = command(
        "prune", tiny_checkpoint, tmp_path / "again", "--recipe", tmp_path / "out" / "ace_triton.json"
    )
    assert code == 0, errors
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("stored", "dtype", "says"), [("bf16", "auto", 1), ("bf16", "bfloat16", 0), ("fp32", "auto", 0)]
)
@pytest.mark.parametrize("name", ["prune", "shrink"])
def test_it_says_so_if_the_cpu_multiplies_bfloat16_slowly(
    name, stored, dtype, says, command, save, tiny_model, some_text, tmp_path, monkeypatch
):
    monkeypatch.setattr(console, "multiplies_bfloat16", lambda device: False)
    source = save(tiny_model.to(torch.bfloat16 if stored == "bf16" else torch.float32))
    few = ("--calibration", some_text, "--samples", "2", "--length", "8", "--dtype", dtype)
    code, _, errors = command(name, source, tmp_path / "out", *few, *(["--multiple", "16"] if name == "shrink" else []))
    assert code == 0, errors
    assert errors.count("this CPU multiplies bfloat16 slowly: --dtype float32 calibrates several times as fast") == says


def test_permute_needs_groups(prune, tmp_path):
    code, _, errors = prune(tmp_path / "out", "--permute", "--sparsity", "0.5")
    assert code == 1
    assert "n:m" in errors
