"""Pruned in files and packed in one run: the same bytes as in memory, also after an interruption."""

import json
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from ace_triton import Recipe, Sparsity, pack_model, prune_checkpoint, prune_model, save_packed
from ace_triton.decoders.replay import Replay
from ace_triton.errors import ArgumentError, CheckpointError
from ace_triton.inputs import checkpoint, output_folder
from ace_triton.inputs.output_folder import reserved
from ace_triton.packed.inspect import inspect_packed
from ace_triton.streaming import streamed_prune
from ace_triton.streaming.file_store import FileStore

BALANCED = Recipe("wanda", permute=True, update="lstsq")
ALONG_OUTPUTS = Sparsity("2:4", axis="out")
VARYING = ("ace_triton.json", "ace_triton_packed.json", "README.md")
"""Files with times, dates or checksums of such files."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in VARYING}


def manifest(folder):
    found = json.loads((folder / "ace_triton_packed.json").read_text())
    return {key: found[key] for key in ("dtype", "layers", "tied")}


def packed_in_memory(source, out, ids, recipe=BALANCED, **options):
    model, tokenizer = checkpoint.load(source, own_memory=True, **options)
    report = prune_model(model, ids, recipe)
    pack_model(model)
    save_packed(model, tokenizer, out, report=report.to_dict())


class Stop(BaseException):
    """Stands for anything that ends a run."""


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gpt2", {"dtype": torch.bfloat16}), ("qwen3_moe", {})])
def test_the_bytes_are_those_of_a_run_in_memory(family, options, make_decoder, save, tmp_path, ids):
    source = save(make_decoder(family, tie_word_embeddings=True))
    packed_in_memory(source, tmp_path / "memory", ids, **options)
    prune_checkpoint(source, tmp_path / "streamed", ids, BALANCED, packed=True, **options)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert manifest(tmp_path / "streamed") == manifest(tmp_path / "memory")
    assert (tmp_path / "streamed").stat().st_mode == (tmp_path / "memory").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", source.name, "streamed"]


@pytest.mark.parametrize("moment", ["prune", "pack", "write", "publish"])
def test_it_resumes_in_either_half(moment, make_decoder, save, tmp_path, ids, monkeypatch):
    source, out = save(make_decoder("llama")), tmp_path / "out"
    packed_in_memory(source, tmp_path / "memory", ids)
    places = {
        "prune": (FileStore, "finish"),
        "pack": (streamed_prune, "pack_layers"),
        "write": (streamed_prune, "write_packed_files"),
        "publish": (streamed_prune, "publish"),
    }
    owner, name = places[moment]
    method, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if moment == "prune" else 1):
            raise Stop
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(Stop):
        prune_checkpoint(source, out, ids, BALANCED, packed=True)
    monkeypatch.undo()
    assert not out.exists()
    runs, run = [], Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, *args, **kwargs: (runs.append(1), run(self, *args, **kwargs))[1])
    prune_checkpoint(source, out, ids, BALANCED, packed=True)
    assert contents(out) == contents(tmp_path / "memory")
    assert len(checkpoint.read_report(out)["streamed"]["resumed_units"]) == (1 if moment == "prune" else 3)
    assert bool(runs) == (moment == "prune"), "once all blocks are pruned, a resumed run only packs"
    assert not list(tmp_path.glob(".*"))


def test_what_was_pruned_for_a_packed_checkpoint_can_become_a_dense_one(tiny_checkpoint, tmp_path, monkeypatch):
    def stop(*_args, **_options):
        raise Stop

    monkeypatch.setattr(streamed_prune, "pack_layers", stop)
    with pytest.raises(Stop):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, "magnitude", packed=True)
    prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, "magnitude")
    prune_checkpoint(tiny_checkpoint, tmp_path / "expected", None, "magnitude")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_command_says_that_it_resumes(command, tiny_checkpoint, some_text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = (
        "--calibration",
        some_text,
        "--samples",
        "4",
        "--length",
        "16",
        "--packed",
        "--overwrite",
        "--device",
        "cpu",
    )
    assert command("prune", tiny_checkpoint, tmp_path / "memory", *words)[0] == 0
    assert command("prune", tiny_checkpoint, out, *words)[0] == 0
    finish, done = FileStore.finish, []

    def failing(self, *args):
        done.append(1)
        if len(done) == 2:
            self.wait()
            raise OSError(28, "No space left on device")
        finish(self, *args)

    monkeypatch.setattr(FileStore, "finish", failing)
    code, _, errors = command("prune", tiny_checkpoint, out, *words, "--stream")
    assert (code, "the same command resumes the run" in errors, "resuming" in errors) == (1, True, False)
    monkeypatch.undo()
    code, told, errors = command("prune", tiny_checkpoint, out, *words, "--stream")
    assert code == 0, errors
    assert errors.splitlines().count("resuming: 1 of 2 blocks are done") == 1
    assert "layers packed 2:4" in told
    assert contents(out) == contents(tmp_path / "memory")
    assert not list(tmp_path.glob(".*"))


def test_progress_starts_with_the_blocks_that_are_done(tiny_checkpoint, tmp_path, monkeypatch):
    write = streamed_prune.StreamedModel.publish
    monkeypatch.setattr(streamed_prune.StreamedModel, "publish", lambda *_args, **_more: (_ for _ in ()).throw(Stop))
    steps = []
    with pytest.raises(Stop):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, "magnitude", progress=lambda *s: steps.append(s[:2]))
    monkeypatch.setattr(streamed_prune.StreamedModel, "publish", write)
    prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, "magnitude", progress=lambda *s: steps.append(s[:2]))
    assert steps == [(1, 2), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("magnitude", sparsity=0.3), "needs n:m, as 2:4, or a fraction of 0.44 or more; got 0.3"),
        (Recipe("magnitude", sparsity="31:32"), "no smaller than dense"),
        (Recipe("magnitude", sparsity=ALONG_OUTPUTS, quantize=4), "can be packed in 4 bits: leave the axis out, or do"),
        (Recipe("magnitude", sparsity=replace(ALONG_OUTPUTS, pattern="3:4")), "prunes 0.25: leave the axis out"),
        (Recipe("dass", quantize=4), "can be packed in 4 bits: use another method, or do not quantize"),
    ],
)
def test_a_recipe_that_cannot_be_packed_is_refused_before_anything_is_pruned(
    tiny_checkpoint, tmp_path, recipe, message
):
    with pytest.raises(ArgumentError, match=message):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, recipe, packed=True)
    assert [path.name for path in tmp_path.iterdir()] == [tiny_checkpoint.name]


def test_groups_along_the_outputs_are_packed_by_row(tiny_checkpoint, tmp_path):
    recipe = Recipe("magnitude", sparsity=ALONG_OUTPUTS)
    report = prune_checkpoint(tiny_checkpoint, tmp_path / "out", None, recipe, packed=True)
    packed = [tensor for tensor in inspect_packed(tmp_path / "out") if tensor.packed]
    assert len(packed) == len(report.layers)
    assert {(tensor.pattern, tensor.zeros) for tensor in packed} == {("unstructured", 0.5)}


def test_a_copied_work_folder_keeps_its_state(tiny_checkpoint, tmp_path, monkeypatch):
    """Only where the content is decides whether a run is unfinished: a copy has other inodes."""
    out, work = tmp_path / "out", tmp_path / ".out.ace-triton"
    monkeypatch.setattr(streamed_prune, "publish", lambda *_args, **_more: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        prune_checkpoint(tiny_checkpoint, out, None, "magnitude")
    monkeypatch.undo()
    work.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", work)
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="an interrupted run has left its state"):
        checkpoint.save(*checkpoint.load(tiny_checkpoint), out, {})
    prune_checkpoint(tiny_checkpoint, out, None, "magnitude")
    assert len(checkpoint.read_report(out)["streamed"]["resumed_units"]) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_is_killed_once_its_output_is_there_is_finished(tiny_checkpoint, tmp_path, packed, exists):
    out = tmp_path / "out"
    if exists:
        prune_checkpoint(tiny_checkpoint, out, None, "magnitude")
    child = os.fork()
    if not child:
        put = output_folder._put
        output_folder._put = lambda *args, **more: (put(*args, **more), os.kill(os.getpid(), signal.SIGKILL))
        with suppress(BaseException):
            prune_checkpoint(tiny_checkpoint, out, None, "magnitude", packed=packed, overwrite=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (out / "ace_triton_packed.json").exists() == packed
    with pytest.warns(UserWarning, match="left by a killed run"), reserved(out, overwrite=True):
        pass
    assert not list(tmp_path.glob(".*"))
