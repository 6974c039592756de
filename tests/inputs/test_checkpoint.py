import copy
import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ace_triton
from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.checkpoint import CheckpointError
from ace_triton.study.workbench import Protocol, Workbench

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def test_what_was_saved_loads_the_same(tmp_path, tiny_model, tokenizer):
    out = tmp_path / "deep" / "out"
    checkpoint.save(tiny_model, tokenizer, out, {"method": "ace"})
    again, words = checkpoint.load(out)
    assert words("fox")["input_ids"] == tokenizer("fox")["input_ids"]
    for (name, one), other in zip(tiny_model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not again.training
    report = json.loads((out / "ace_triton.json").read_text())
    assert report["method"] == "ace"
    assert report["files"] == sorted(path.name for path in out.iterdir())
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_nothing_is_overwritten_unasked(tmp_path, tiny_model, tokenizer):
    out = tmp_path / "out"
    checkpoint.save(tiny_model, tokenizer, out, {})
    with pytest.raises(CheckpointError, match="--overwrite"):
        checkpoint.save(tiny_model, tokenizer, out, {})
    checkpoint.save(tiny_model, tokenizer, out, {"again": True}, overwrite=True)
    assert checkpoint.read_report(out)["again"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_failure_midway_leaves_the_old_whole(tmp_path, tiny_model, tokenizer, stop):
    out = tmp_path / "out"
    checkpoint.save(tiny_model, tokenizer, out, {"method": "ace"})

    def fail_midway():
        with checkpoint.replacing(out, overwrite=True) as folder:
            (folder / "half").write_text("half")
            raise stop

    with pytest.raises(stop):
        fail_midway()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert checkpoint.read_report(out)["method"] == "ace"
    assert not (out / "half").exists()


@pytest.fixture
def full_disk():
    """full_disk(most) limits the size of new files, so that a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [100, 2_000, 20_000])
def test_a_full_disk_is_one_line(full_disk, tmp_path, tiny_model, tokenizer, most):
    """The disk is full at the config, at the tokenizer (packed models write it first), or at the weights."""
    packed = copy.deepcopy(tiny_model)
    ace_triton.prune_model(packed, None, "magnitude")
    ace_triton.pack_model(packed)
    full_disk(most)
    for save in (
        lambda: checkpoint.save(tiny_model, tokenizer, tmp_path / "out", {}),
        lambda: ace_triton.save_packed(packed, tokenizer, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"could not be written .*too large.*; nothing there was changed"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.check_out(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.check_out(tmp_path / "file" / "out", overwrite=False)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load(tmp_path / "broken.gguf")


def test_a_report_that_is_no_object_is_none(tmp_path):
    for content in ("[1]", "3", "{", "[" * 100_000, '{"a": 1'):
        (tmp_path / "ace_triton.json").write_text(content)
        assert checkpoint.read_report(tmp_path) is None
    (tmp_path / "ace_triton.json").write_bytes(b"\xff\xfe")
    assert checkpoint.read_report(tmp_path) is None


def test_no_family_raises_a_false_alarm(family, make_decoder, tokenizer, tmp_path):
    """Checkpoints that transformers saved are loaded: with tied and untied weights, in several files."""
    for tied in (True, False):
        model = make_decoder(family, tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        model.save_pretrained(folder, max_shard_size="60KB")
        tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        again, _ = checkpoint.load(folder)
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


UP = "model.layers.1.mlp.up_proj.weight"


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configured(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: rewritten(f, lambda t: t.pop(UP)), rf"1 missing \({UP}\)"),
        (lambda f: rewritten(f, lambda t: t.update(more=torch.ones(1))), r"1 unexpected \(more\)"),
        (
            lambda f: rewritten(f, lambda t: t.update({UP: torch.ones(3, 32)})),
            rf"1 of another shape \({UP} \(3, 32\) instead of \(64, 32\)\)",
        ),
        (lambda f: configured(f, num_hidden_layers=3), r"9 missing \(model\.layers\.2\.input_layernorm.*and 5 more\)"),
        (lambda f: configured(f, num_hidden_layers=1), r"9 unexpected \(model\.layers\.1\."),
        (lambda f: configured(f, num_hidden_layers=10**6), "asks for 1,000,000 layers, .* holds only 21 tensors"),
        (lambda f: configured(f, vocab_size=10), r"2 of another shape \(lm_head.weight"),
        (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:2000]), r"model\.safetensors: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_checkpoint_with_a_fault_is_never_filled_with_random_weights(tiny_checkpoint, change, message):
    change(tiny_checkpoint)
    for load in (checkpoint.load, load_model):
        with pytest.raises(CheckpointError, match=message) as error:
            load(tiny_checkpoint)
        assert "\n" not in str(error.value)


def test_faults_of_an_index(tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    named = {name: shard for name, shard in index["weight_map"].items() if shard != shards[-1]}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": named}))
    with pytest.raises(CheckpointError, match=r"\d+ missing \(.*; a file is missing"):
        checkpoint.load(folder)
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "more": shards[0]}}))
    with pytest.raises(CheckpointError, match="lacks more, which"):
        checkpoint.load(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        checkpoint.load(folder)
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint.load(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1]}: is missing"):
        checkpoint.load(folder)


def test_experts_that_do_not_fit_each_other_are_named(make_decoder, tokenizer, tmp_path):
    make_decoder("qwen3_moe").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    rewritten(tmp_path, lambda t: t.update({name: torch.ones(3, 3)}))
    with pytest.raises(CheckpointError, match=r"do not fit each other: model\.layers\.0\.mlp\.experts\.down_proj"):
        checkpoint.load(tmp_path)
    rewritten(tmp_path, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj \(3, 32, 16\) instead of \(4, 32, 16\)"):
        checkpoint.load(tmp_path)


def test_other_models_are_refused_by_name(tokenizer, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPConfig, LlamaConfig, LlamaModel

    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    small["intermediate_size"] = 48
    for name, model, message in (
        (
            "encoder",
            BertModel(BertConfig(**small)),
            r"is a BertModel \(feature-extraction\), not a causal language model",
        ),
        (
            "masked",
            BertForMaskedLM(BertConfig(**small)),
            r"is a BertForMaskedLM \(fill-mask\), not a causal language model",
        ),
        (
            "headless",
            LlamaModel(LlamaConfig(**small)),
            r"saved as a LlamaModel, .*1 missing \(lm_head\.weight\)",
        ),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / name)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="is a clip model, not a causal language model"):
        checkpoint.load(tmp_path / "clip")


CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path("SENTINEL").touch()
class CustomConfig(LlamaConfig):
    model_type = "custom_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_custom import CustomConfig
class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def own_code(tiny_checkpoint, tmp_path, monkeypatch) -> Iterator[Path]:
    """The path of a file that the tiny checkpoint's own code creates when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    sentinel = tmp_path / "sentinel"
    (tiny_checkpoint / "configuration_custom.py").write_text(CONFIGURATION.replace("SENTINEL", str(sentinel)))
    (tiny_checkpoint / "modeling_custom.py").write_text(MODELING)
    places = {"AutoConfig": "configuration_custom.CustomConfig"}
    places["AutoModelForCausalLM"] = "modeling_custom.CustomForCausalLM"
    configured(tiny_checkpoint, model_type="custom_llama", architectures=["CustomForCausalLM"], auto_map=places)
    yield sentinel
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(own_code, tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"needs its own Python code; .*--trust-remote-code"):
        checkpoint.load(tiny_checkpoint)
    assert not own_code.exists()
    model, tokenizer = checkpoint.load(tiny_checkpoint, trust_remote_code=True)
    assert own_code.exists()
    assert type(model).__name__ == "CustomForCausalLM"
    ace_triton.prune_model(model, None, "magnitude")
    ace_triton.pack_model(model)
    ace_triton.save_packed(model, tokenizer, tmp_path / "packed")
    own_code.unlink()
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        ace_triton.load(tmp_path / "packed")
    assert not own_code.exists()
    again = ace_triton.load(tmp_path / "packed", trust_remote_code=True)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_commands_run_code_of_a_checkpoint_only_if_they_are_told(
    own_code, command, tiny_checkpoint, some_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.stdin", None)
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    small = ("--calibration", some_text, "--samples", 2)
    for words in (
        ("prune", tiny_checkpoint, pruned, "--method", "magnitude"),
        ("pack", pruned, packed),
        ("evaluate", packed, "--text", some_text, "--length", 16),
        ("generate", pruned, "--prompt", "a", "--max-new-tokens", 2),
        ("recover", pruned, tmp_path / "out", "--teacher", tiny_checkpoint, *small, "--length", 16, "--steps", 1),
    ):
        own_code.unlink(missing_ok=True)
        code, _, errors = command(*words)
        assert (code, own_code.exists()) == (1, False), words
        assert "--trust-remote-code" in errors
        code, _, errors = command(*words, "--trust-remote-code")
        assert code == 0, errors
    study = Protocol(str(tiny_checkpoint), str(some_text), str(some_text), window_length=16)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        Workbench(study)
    assert type(Workbench(replace(study, trust_remote_code=True)).model).__name__ == "CustomForCausalLM"


@pytest.mark.parametrize("source", ["./nosuch", "/nosuch", "a/b/c", "model.gguf", "no such", "..", Path("gpt2"), ""])
def test_a_path_that_is_not_there_never_goes_to_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(CheckpointError, match=r"no such file or folder|has no config\.json"):
        checkpoint.load(source)


def test_a_hub_name_is_tried_once(monkeypatch):
    """The hub is a server that knows no model, and then it cannot be reached."""
    asked = []

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(CheckpointError, match="no such model on the Hugging Face hub"):
            checkpoint.load("someone/nosuch")
        server.shutdown()
    with pytest.raises(CheckpointError, match=r"someone/nosuch: no such folder here, and .*hub cannot be reached"):
        checkpoint.load("someone/nosuch")
    assert asked == ["/someone/nosuch/resolve/main/config.json"]


def test_sources_that_are_something_else(tiny_checkpoint, tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.gguf").touch()
    for source, message in (
        (tmp_path, r"has no config\.json, so it is not a checkpoint; name the file itself: .*model\.gguf"),
        (tmp_path / "link", "is a link to nothing, which does not exist"),
        (tmp_path / "notes.txt", r"is a file; name a folder or a \.gguf file"),
        ("/dev/null", "is a device or a pipe"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(source)
    (tiny_checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter; merge it"):
        checkpoint.load(tiny_checkpoint)
    shutil.copy(tiny_checkpoint / "config.json", tiny_checkpoint / "ace_triton_packed.json")
    with pytest.raises(CheckpointError, match=r"is a packed checkpoint, .* name the dense checkpoint that it was made"):
        checkpoint.load(tiny_checkpoint)


def test_a_device_that_is_not_there(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="device 'nosuch' is not available here"):
        checkpoint.load(tiny_checkpoint, device="nosuch")
    with pytest.raises(CheckpointError, match="device 'meta' holds no data: use cpu or cuda"):
        checkpoint.load(tiny_checkpoint, device="meta")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_not_called_missing(tiny_checkpoint):
    (tiny_checkpoint / WEIGHTS).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.load(tiny_checkpoint)


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from; empty if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return Path(name).name
    raise AssertionError("a tensor without memory")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_with_memory_of_their_own_can_be_freed_one_by_one(tiny_model, tokenizer, tmp_path):
    tiny_model.lm_head.weight = tiny_model.model.embed_tokens.weight
    tiny_model.config.tie_word_embeddings = True
    checkpoint.save(tiny_model, tokenizer, tmp_path / "model", {})
    shared, own = (checkpoint.load(tmp_path / "model", own_memory=own)[0] for own in (False, True))
    assert {mapped_from(parameter) for parameter in shared.parameters()} == {WEIGHTS}
    assert WEIGHTS not in {mapped_from(parameter) for parameter in own.parameters()}
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert all(map(torch.equal, shared.parameters(), own.parameters()))
    own.model.embed_tokens.weight.data.zero_()
    assert bool(shared.model.embed_tokens.weight.any())
