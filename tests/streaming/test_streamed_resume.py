"""An interrupted run of pruning in files resumes, and refuses a state or a source that is another."""

import json
import os
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from ace_triton import Recipe, prune_checkpoint
from ace_triton.decoders.replay import WholeForward
from ace_triton.errors import CheckpointError
from ace_triton.inputs import checkpoint
from ace_triton.streaming.file_store import FileStore
from ace_triton.streaming.journal import Journal
from ace_triton.streaming.mapped_model import MappedModel
from ace_triton.streaming.streamed_prune import sampled_digest
from tests.streaming.whole_runs import BALANCED, RECIPES, Stop, contents, pruned_in_memory


@pytest.mark.parametrize("units", [0, 1, 2])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_call_resumes_a_run(tiny_checkpoint, tmp_path, tiny_ids, recipe, units, stopped_after, monkeypatch):
    expected, out = tmp_path / "expected", tmp_path / "out"
    whole = prune_checkpoint(tiny_checkpoint, expected, tiny_ids, recipe)
    stopped_after(units)
    try:
        prune_checkpoint(tiny_checkpoint, out, tiny_ids, recipe)
    except Stop:
        assert not out.exists()
    monkeypatch.undo()
    if not out.exists():
        resumed = prune_checkpoint(tiny_checkpoint, out, tiny_ids, recipe)
        assert resumed.layers == whole.layers
        assert (resumed.skipped, resumed.account) == (whole.skipped, whole.account)
        reordered = None if whole.permutation is None else whole.permutation.reordered
        assert (None if resumed.permutation is None else resumed.permutation.reordered) == reordered
        rotated = None if whole.rotation is None else whole.rotation.rotated
        assert (None if resumed.rotation is None else resumed.rotation.rotated) == rotated
        assert len(checkpoint.read_report(out)["streamed"]["resumed_units"]) == units
    assert contents(out) == contents(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", tiny_checkpoint.name]


def test_a_resumed_run_that_has_no_replay(make_decoder, save, tmp_path, ids, stopped_after, monkeypatch):
    def runner(model, blocks, batches, clock, masks, _trial, *, keep):
        return WholeForward(model, batches, clock, blocks, masks)

    source = save(make_decoder("llama"))
    for sequential in ("none", "blocks"):
        recipe = Recipe("wanda", sequential=sequential)
        expected, out = tmp_path / f"expected-{sequential}", tmp_path / f"out-{sequential}"
        monkeypatch.setattr("ace_triton.tower_pass.make_runner", runner)
        prune_checkpoint(source, expected, ids, recipe)
        stopped_after(1)
        with pytest.raises(Stop):
            prune_checkpoint(source, out, ids, recipe)
        monkeypatch.undo()
        monkeypatch.setattr("ace_triton.tower_pass.make_runner", runner)
        prune_checkpoint(source, out, ids, recipe)
        assert contents(out) == contents(expected)


def test_another_recipe_text_or_source_is_refused_by_name(
    tiny_model, save, tmp_path, tiny_ids, stopped_after, monkeypatch
):
    source, out = save(tiny_model), tmp_path / "out"
    stopped_after(1)
    with pytest.raises(Stop):
        prune_checkpoint(source, out, tiny_ids, BALANCED)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"another recipe.method .'wanda', now 'ria'"):
        prune_checkpoint(source, out, tiny_ids, replace(BALANCED, method="ria"))
    with pytest.raises(CheckpointError, match="another calibration"):
        prune_checkpoint(source, out, tiny_ids + 1, BALANCED)
    with pytest.raises(CheckpointError, match=r"another dtype .'torch.float32', now 'torch.bfloat16'"):
        prune_checkpoint(source, out, tiny_ids, BALANCED, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="an interrupted run has left its state"):
        pruned_in_memory(source, out, tiny_ids, BALANCED)
    save(tiny_model)
    with pytest.raises(CheckpointError, match=r"another source.files.*add --restart"):
        prune_checkpoint(source, out, tiny_ids, BALANCED)
    prune_checkpoint(source, out, tiny_ids, replace(BALANCED, method="ria"), restart=True)
    assert json.loads((out / "ace_triton.json").read_text())["method"] == "ria"
    assert not list(tmp_path.glob(".*"))


MOMENTS = {
    "the weights are copied": (MappedModel, "fill", 1, True),
    "the second block is pruned": (FileStore, "finish", 2, False),
    "the first block of this run is on its way to the disk": (FileStore, "finish", 1, True),
    "a block is in the journal": (Journal, "add", 2, True),
    "all blocks are there": (MappedModel, "write_converted", 1, True),
}


def kill_at(owner: type, name: str, call: int, after: bool) -> None:
    """Kill this process at a call of a method: before or after it runs."""
    method, calls = getattr(owner, name), []

    def killed(self, *args, **kwargs):
        calls.append(1)
        result = method(self, *args, **kwargs) if after or len(calls) < call else None
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killed)


def test_a_killed_run_resumes(make_decoder, save, tmp_path, ids):
    """One run is killed at several moments, one after the other, and then finishes."""
    source = save(make_decoder("llama", num_hidden_layers=6))
    for moment in MOMENTS.values():
        child = os.fork()
        if not child:
            kill_at(*moment)
            with suppress(BaseException):
                prune_checkpoint(source, tmp_path / "out", ids, BALANCED)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
    prune_checkpoint(source, tmp_path / "out", ids, BALANCED)
    prune_checkpoint(source, tmp_path / "expected", ids, BALANCED)
    assert len(checkpoint.read_report(tmp_path / "out")["streamed"]["resumed_units"]) == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated")])
def test_a_stopped_command_says_that_it_resumes(
    command, tiny_checkpoint, some_text, tmp_path, monkeypatch, number, how
):
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    finish, done = FileStore.finish, []

    def stopping(self, *args):
        done.append(1)
        if len(done) == 2:
            self.wait()
            os.kill(os.getpid(), number)
        finish(self, *args)

    monkeypatch.setattr(FileStore, "finish", stopping)
    words = ("prune", tiny_checkpoint, tmp_path / "out", "--stream", "--calibration", some_text, "--samples", "4")
    try:
        code, _, errors = command(*words, "--length", "16")
    finally:
        signal.signal(number, before)
    assert code == 128 + number
    assert f"{how}; {tmp_path / 'out'} is not finished: the same command resumes it" in errors
    monkeypatch.undo()
    code, _, errors = command(*words, "--length", "32")
    assert code == 1
    assert "the interrupted run had another calibration.length (16, now 32)" in errors
    assert command(*words, "--length", "16")[0] == 0
    assert checkpoint.read_report(tmp_path / "out")["streamed"]["resumed_units"] == ["model.layers.0"]


def interrupted(source, out, ids, stopped_after, monkeypatch, units=1, **options):
    stopped_after(units)
    with pytest.raises(Stop):
        prune_checkpoint(source, out, ids, BALANCED, **options)
    monkeypatch.undo()


def test_a_refused_run_leaves_the_state_as_it_was(make_decoder, save, tmp_path, ids, stopped_after, monkeypatch):
    source, out = save(make_decoder("gpt2", n_embd=64)), tmp_path / "out"
    interrupted(source, out, ids, stopped_after, monkeypatch, units=2)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(CheckpointError, match="another dtype"):
            prune_checkpoint(source, out, ids, BALANCED, dtype=dtype)
    with pytest.raises(CheckpointError, match="another calibration"):
        prune_checkpoint(source, out, ids.reshape(12, 8), BALANCED)
    prune_checkpoint(source, out, ids, BALANCED)
    prune_checkpoint(source, tmp_path / "expected", ids, BALANCED)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "header", "journal"])
def test_a_damaged_state_is_refused(tiny_checkpoint, tmp_path, tiny_ids, stopped_after, monkeypatch, damage):
    out = tmp_path / "out"
    interrupted(tiny_checkpoint, out, tiny_ids, stopped_after, monkeypatch)
    kept = tmp_path / ".out.ace-triton"
    weights, journal = kept / "new" / "model.safetensors", kept / "kept" / "journal.jsonl"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "journal":
        journal.write_text(journal.read_text().replace('"parameters"', '"others"'))
    else:
        changed = {"shorter": content[:-8], "longer": content + b"\0" * 8, "header": content[:9] + b"?" + content[10:]}
        weights.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=r"damaged: add --restart"):
        prune_checkpoint(tiny_checkpoint, out, tiny_ids, BALANCED)
    (kept / "new" / "of-somebody-else").write_text("")
    prune_checkpoint(tiny_checkpoint, out, tiny_ids, BALANCED, restart=True)
    assert not (out / "of-somebody-else").exists()


def test_a_changed_file_of_any_kind_is_noticed(tiny_model, save, tmp_path, tiny_ids, stopped_after, monkeypatch):
    source = save(tiny_model)
    (source / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), source / "pytorch_model.bin")
    interrupted(source, tmp_path / "out", tiny_ids, stopped_after, monkeypatch)
    torch.save({name: tensor * 2 for name, tensor in tiny_model.state_dict().items()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"another source.files.pytorch_model.bin"):
        prune_checkpoint(source, tmp_path / "out", tiny_ids, BALANCED)


def test_changed_weights_are_noticed_if_size_and_time_are_those_before(
    tiny_model, save, tmp_path, tiny_ids, stopped_after, monkeypatch
):
    source = save(tiny_model)
    interrupted(source, tmp_path / "out", tiny_ids, stopped_after, monkeypatch)
    weights = source / "model.safetensors"
    state, content = weights.stat(), weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header] + bytes(len(content) - header))
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"another source.files.model.safetensors"):
        prune_checkpoint(source, tmp_path / "out", tiny_ids, BALANCED)


@pytest.mark.parametrize("size", [0, 100, 64 * 2**10, 3 * 2**20 + 5])
def test_samples_of_a_file_are_spread_over_all_of_it(tmp_path, size):
    path = tmp_path / "weights"
    path.write_bytes(bytes(size))
    before = sampled_digest(path)
    assert sampled_digest(path) == before
    for part in range(8 if size else 0):
        start = part * size // 8
        path.write_bytes(bytes(start) + b"\1" * (size // 8) + bytes(size - start - size // 8))
        assert sampled_digest(path) != before


def test_a_disk_that_fills_up_is_one_line_and_the_run_resumes(tiny_checkpoint, tmp_path, tiny_ids, monkeypatch):
    sync, calls = MappedModel.sync, []

    def full(self, names):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(self, names)

    monkeypatch.setattr(MappedModel, "sync", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space.*the same command resumes"):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", tiny_ids, BALANCED)
    prune_checkpoint(tiny_checkpoint, tmp_path / "out", tiny_ids, BALANCED)
    assert len(checkpoint.read_report(tmp_path / "out")["streamed"]["resumed_units"]) == 1
