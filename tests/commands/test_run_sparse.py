"""The commands that pack a model and run it; evaluate and info on packed folders."""

import json

import pytest
import torch

from ace_triton import NMLinear, load
from ace_triton.commands import bench as bench_command
from ace_triton.inputs.checkpoint import load as load_dense
from ace_triton.packed.bench import LayerKind, bench_layer
from ace_triton.packed.dispatch import default_limits


@pytest.fixture
def pruned(command, tiny_checkpoint, tmp_path):
    """A folder pruned to 2:4."""
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "magnitude")
    assert code == 0, errors
    return tmp_path / "pruned"


@pytest.fixture
def packed(command, pruned, tmp_path):
    """The same, packed."""
    code, _, errors = command("pack", pruned, tmp_path / "packed")
    assert code == 0, errors
    return tmp_path / "packed"


def test_pack_says_what_it_packed_and_left(command, pruned, tmp_path):
    code, out, _ = command("pack", pruned, tmp_path / "out", "--exclude", "*.q_proj", "--json", tmp_path / "pack.json")
    assert code == 0
    result = json.loads((tmp_path / "pack.json").read_text())
    assert len(result["layers"]) == 12
    assert result["packed_bytes"] < 0.54 * result["dense_bytes"]
    assert f"{result['packed_bytes'] / result['dense_bytes']:.1%}" in out
    assert "lm_head: it is dense" in out
    layers = [name for name, module in load(tmp_path / "out").named_modules() if isinstance(module, NMLinear)]
    assert layers == [layer["name"] for layer in result["layers"]]
    report = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert report["method"] == "magnitude"


@pytest.mark.parametrize(("shard", "files"), [("1GB", 1), ("40KB", 4)])
def test_the_source_may_be_one_file_without_an_index_or_many(command, pruned, packed, tmp_path, shard, files):
    model, tokenizer = load_dense(str(pruned), dtype="auto", device="cpu")
    model.save_pretrained(tmp_path / "source", max_shard_size=shard)
    tokenizer.save_pretrained(tmp_path / "source")
    found = sorted((tmp_path / "source").glob("*.safetensors"))
    assert len(found) == files
    assert (tmp_path / "source" / "model.safetensors.index.json").exists() == (files > 1)
    code, _, errors = command("pack", tmp_path / "source", tmp_path / "out")
    assert code == 0, errors
    one, other = load(tmp_path / "out").state_dict(), load(packed).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prune_packed_writes_what_pack_would(command, tiny_checkpoint, packed, tmp_path):
    code, out, _ = command("prune", tiny_checkpoint, tmp_path / "one", "--method", "magnitude", "--packed")
    assert code == 0
    assert "layers packed 2:4" in out
    one, other = load(tmp_path / "one").state_dict(), load(packed).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluate_and_info_take_a_packed_folder(command, pruned, packed, some_text, tmp_path):
    found = []
    for folder in (pruned, packed):
        words = ("--text", some_text, "--length", 32, "--windows", 3, "--json", tmp_path / "e.json")
        assert command("evaluate", folder, *words)[0] == 0
        assert command("info", folder, "--json", tmp_path / "i.json")[0] == 0
        layers = json.loads((tmp_path / "i.json").read_text())["layers"]
        found.append((json.loads((tmp_path / "e.json").read_text())["perplexity"], layers))
    (dense_value, dense_layers), (packed_value, packed_layers) = found
    assert packed_value == pytest.approx(dense_value, rel=1e-5)
    for dense, here in zip(dense_layers, packed_layers, strict=True):
        assert here.pop("zeros") == pytest.approx(dense.pop("zeros"))
        assert here == {**dense, "packed": dense["pattern"] == "2:4"}


def test_generate_streams_the_same_text_packed_or_dense(command, pruned, packed, tmp_path):
    texts = []
    for folder in (pruned, packed):
        words = ("--prompt", "The quick", "--max-new-tokens", 12, "--json", tmp_path / "g.json")
        code, out, errors = command("generate", folder, *words)
        assert code == 0
        result = json.loads((tmp_path / "g.json").read_text())
        assert out == result["text"] + "\n"
        assert (result["prompt_tokens"], result["new_tokens"]) == (9, 12)
        assert f"12 new tokens, {result['tokens_per_second']:.1f} per second" in errors
        texts.append(result["text"])
    assert texts[0] == texts[1]
    model, tokenizer = load_dense(pruned)
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert texts[0] == tokenizer.decode(whole, skip_special_tokens=True)


def test_generate_continues_several_prompts_together(command, packed, tmp_path):
    words = ("--max-new-tokens", 6, "--json", tmp_path / "g.json")
    code, out, errors = command("generate", packed, "--prompt", "The quick", "--prompt", "a", *words)
    assert code == 0, errors
    result = json.loads((tmp_path / "g.json").read_text())
    assert result["prompt"] == ["The quick", "a"]
    assert out == "[1: The quick] {}\n[2: a] {}\n".format(*result["texts"])
    assert f"{sum(result['new_tokens'])} new tokens of 2 texts, {result['tokens_per_second']:.1f} per second" in errors
    code, out, _ = command("generate", packed, "--prompt", "a", "--max-new-tokens", 6)
    assert (code, out) == (0, result["texts"][1] + "\n")
    code, _, errors = command("generate", packed, "--prompt", "a", "--prompt", "b", "--compile")
    assert code == 1
    assert "--compile continues one --prompt" in errors


def test_generate_draws_by_seed(command, packed):
    def text(*words):
        code, out, errors = command("generate", packed, "--prompt", "a", "--max-new-tokens", 16, *words)
        assert code == 0, errors
        return out

    hot = ("--temperature", 5.0)
    assert text(*hot, "--seed", 1) == text(*hot, "--seed", 1)
    assert text(*hot, "--seed", 1) != text(*hot, "--seed", 2)


def test_a_pruned_fraction_is_packed_and_timed(command, tiny_checkpoint, tmp_path):
    words = ("--method", "magnitude", "--packed", "--sparsity", 0.55)
    code, out, errors = command("prune", tiny_checkpoint, tmp_path / "one", *words)
    assert code == 0, errors
    assert "layers packed unstructured" in out, out
    assert "unstructured, packed" in command("info", tmp_path / "one")[1]
    code, out, errors = command("bench", "--shape", "8x64", "--sparsity", "45%", "--rows", "1")
    assert code == 0, errors
    assert "8x64 unstructured, 55% kept, float32" in " ".join(out.split())


def test_bench_times_every_side_and_says_where_sparse_loses(command, packed, tmp_path):
    small = ("--rows", "1,200", "--json", tmp_path / "b.json")
    code, out, errors = command("bench", "--shape", "32x64", "--dtype", "bfloat16", *small)
    assert code == 0, errors
    (layer,) = json.loads((tmp_path / "b.json").read_text())["layers"]
    kind = {"shape": [32, 64], "n": 2, "m": 4, "dtype": "bfloat16", "count": 1, "bits": None, "group": 0}
    assert layer["kind"] == kind
    most = default_limits(torch.device("cpu"), torch.bfloat16).packed  # Differs between instruction sets.
    products = {rows: "packed" if rows <= most else "dense" for rows in (1, 200)}
    assert {entry["rows"]: entry["product"] for entry in layer["times"]} == products
    assert all(entry[side] > 0 for entry in layer["times"] for side in ("dense", "packed", "unpacked"))
    assert layer["packed_bytes"] / layer["dense_bytes"] == 0.5625
    lost = [
        e for e in layer["times"] if {"packed": e["packed"], "dense": e["unpacked"]}[e["product"]] > 1.02 * e["dense"]
    ]
    assert ("slower than dense at rows" in out) == bool(lost)
    assert all(f"{entry['rows']} (" in out for entry in lost)
    code, out, errors = command("bench", "--model", packed, *small)
    assert code == 0, errors
    layers = json.loads((tmp_path / "b.json").read_text())["layers"]
    assert sum(layer["kind"]["count"] for layer in layers) == 14
    assert "NMLinear takes" in out
    assert "all 14 packed layers" in out
    summed = json.loads((tmp_path / "b.json").read_text())["totals"]
    (line,) = (line for line in out.splitlines() if line.startswith("all packed layers together are "))
    for entry in summed:
        slower = f"{entry['rows']} ({entry['taken'] / entry['dense']:.2f}x the time)"
        assert (slower in line) == (entry["taken"] > 1.02 * entry["dense"])
    refused = [line for line in out.splitlines() if line.endswith(" was not timed: torch has no 2:4 product for cpu")]
    assert refused == ["torch 2:4 was not timed: torch has no 2:4 product for cpu"]


@pytest.mark.parametrize("words", [(), ("--tokens", 4)])
def test_bench_refuses_a_dense_model_before_it_is_loaded(command, tiny_checkpoint, monkeypatch, words):
    monkeypatch.setattr("ace_triton.commands.bench.load_model", None)
    code, _, errors = command("bench", "--model", tiny_checkpoint, *words)
    assert code == 1
    assert f"{tiny_checkpoint} is not pruned, so it has no layers to pack and time: prune it first" in errors


@pytest.mark.parametrize("words", [(), ("--tokens", 4)])
def test_bench_refuses_bits_for_a_packed_model_before_it_is_loaded(command, packed, monkeypatch, words):
    monkeypatch.setattr("ace_triton.commands.bench.load_model", None)
    code, _, errors = command("bench", "--model", packed, "--bits", 8, *words)
    assert code == 1
    assert f"--bits 8: {packed} is packed already, and is timed as it is stored: leave --bits out" in errors


def test_bench_decodes_with_the_bits_that_are_asked_for(command, pruned, monkeypatch):
    found = []
    times = bench_command.decoding_times

    def spy(model, *args, **options):
        found.extend(layer.bits for layer in model.modules() if isinstance(layer, NMLinear))
        return times(model, *args, **options)

    monkeypatch.setattr(bench_command, "decoding_times", spy)
    code, _, errors = command("bench", "--model", pruned, "--tokens", 2, "--bits", 4)
    assert code == 0, errors
    assert found == [4] * 14


@pytest.mark.parametrize(
    ("cpu", "device", "says"), [(3.0, "cpu", True), (9.0, "cpu", False), (40.0, "cpu", False), (3.0, "cuda:0", False)]
)
def test_bench_says_when_other_work_runs_on_the_machine(capsys, cpu, device, says):
    bench_command._note_other_work(10.0, cpu, device)
    assert ("the process had a processor for 30% of the time" in capsys.readouterr().err) == says


def test_the_number_of_threads_is_in_words(monkeypatch):
    for threads, words in ((1, "cpu, 1 thread"), (3, "cpu, 3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        kind = LayerKind((8, 64), 2, 4, torch.float32)
        assert bench_layer(kind, "cpu", rows=(1,), seconds=0.0).device == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pack", "DENSE", "OUT"), "prune it first"),
        (("pack", "PACKED", "OUT"), "is packed already"),
        (("pack", "PRUNED", "OUT", "--sparsity", "1:4"), "row 0, group 0"),
        (("pack", "PRUNED", "PRUNED"), "--overwrite"),
        (
            ("prune", "DENSE", "OUT", "--method", "magnitude", "--packed", "--sparsity", "0.3"),
            "a fraction of 0.44 or more; got 0.3",
        ),
        (("generate", "PACKED", "--prompt", "a", "--max-new-tokens", "500"), "128 positions"),
        (("generate", "PACKED", "--prompt", "a", "--chat"), "no chat template"),
        (("generate", "PACKED", "--prompt", "a\udcff"), "not valid Unicode text"),
        (("bench", "--shape", "32by64"), "write OUTxIN"),
        (("bench", "--shape", "32x66"), "multiple of 4"),
        (("bench", "--rows", "1,0"), "write numbers from 1 to 999,999,999 with commas, as 1,16,256"),
        (("bench", "--shape", "4x4", "--model", "PACKED"), "give only one of them"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, tiny_checkpoint, pruned, packed, tmp_path, words, message):
    folders = {"DENSE": tiny_checkpoint, "PRUNED": pruned, "PACKED": packed, "OUT": tmp_path / "out"}
    code, _, errors = command(*[folders.get(word, word) for word in words])
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_without_a_prompt_it_starts_at_the_start(command, packed):
    code, _, errors = command("generate", packed, "--prompt", "", "--max-new-tokens", 2)
    assert code == 0
    assert "1 tokens of prompt" in errors


def test_a_chat_template_that_fails_is_one_line(command, tiny_checkpoint):
    (tiny_checkpoint / "chat_template.jinja").write_text("{{ nothing.of.that }}")
    code, _, errors = command("generate", tiny_checkpoint, "--prompt", "a", "--chat", "--max-new-tokens", 2)
    assert code == 1
    assert errors.splitlines()[-1].startswith("error: the chat template fails (")


def test_a_damaged_folder_is_one_line(command, packed, some_text):
    path = packed / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for words in (
        ("generate", packed, "--prompt", "a"),
        ("evaluate", packed, "--text", some_text, "--length", 9),
        ("info", packed),
    ):
        code, _, errors = command(*words)
        assert code == 1
        assert "truncated" in errors
