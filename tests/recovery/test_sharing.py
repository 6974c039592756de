"""Several processes recover a model together: the same text and steps as in one, and weights that agree to rounding."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ace_triton import RecoverySettings, WrittenText, prune_model, recover
from ace_triton.errors import RecoveryError
from ace_triton.inputs import checkpoint
from ace_triton.processes import Processes
from ace_triton.recovery import text as recovery_text
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.distillation import Distillation
from ace_triton.recovery.state import RecoveryState
from ace_triton.recovery.text import WrittenBatches
from ace_triton.solvers.kept_adamw import KeptAdamW

SHORT = RecoverySettings(steps=4, tokens_per_step=64, learning_rate=0.01)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (24, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pair(make_decoder, ids):
    """pair(family): a pruned model and its dense teacher."""

    def make(family: str = "llama"):
        model, teacher = make_decoder(family), make_decoder(family)
        with torch.no_grad():  # random weights predict next to nothing
            for decoder in (model, teacher):
                decoder.get_output_embeddings().weight.mul_(20)
        prune_model(model, ids, "wanda", "2:4")
        return model, teacher

    return make


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (3, "qwen3_moe")])
def test_it_agrees_with_one_process(pair, text, together, family, size):
    alone, teacher = pair(family)
    before = weights_of(alone)
    settings = RecoverySettings(steps=4, tokens_per_step=64, learning_rate=0.01, forward_dtype=torch.float32)
    report = recover(alone, teacher, text, settings)

    def train(rank):
        model, teacher = pair(family)
        shared = recover(model, teacher, text, settings)
        found = weights_of(model)
        assert shared.losses == pytest.approx(report.losses, rel=1e-4)
        assert (shared.steps, shared.tokens, shared.passes) == (report.steps, report.tokens, report.passes)
        assert float((found - weights_of(alone)).norm() / (before - weights_of(alone)).norm()) < 0.02
        of_first = found.clone()
        dist.broadcast(of_first, src=0)
        assert torch.equal(found, of_first)
        assert torch.equal(found == 0, before == 0)

    assert together(size, train) == [0] * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_the_sum_of_all_gradients(together, dtype):
    """Bit for bit if the sums are exact; a gradient that only some processes have counts, and one that none has not."""

    def parameters():
        return {name: nn.Parameter(torch.full((3, 4), value)) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}

    alone = parameters()
    expected = KeptAdamW(alone, dtype)
    alone["a"].grad, alone["b"].grad = torch.full((3, 4), 0.75, dtype=dtype), torch.full((3, 4), -0.5, dtype=dtype)
    expected.step(0.1, 1.0)

    def step(rank):
        trained = parameters()
        optimizer = KeptAdamW(trained, dtype, Processes(rank, 2))
        trained["a"].grad = torch.full((3, 4), (0.5, 0.25)[rank], dtype=dtype)
        if rank:
            trained["b"].grad = torch.full((3, 4), -0.5, dtype=dtype)
        optimizer.step(0.1, 1.0)
        found, wanted = optimizer.state_dict(), expected.state_dict()
        assert found["taken"] == wanted["taken"] == {"a": 1, "b": 1, "c": 0}
        for part in ("values", "first", "second"):
            assert all(torch.equal(found[part][name], tensor) for name, tensor in wanted[part].items())
        assert all(torch.equal(trained[name], parameter) for name, parameter in alone.items())

    assert together(2, step) == [0, 0]


def test_the_text_that_the_teacher_writes_is_that_of_one_process(make_decoder, together, monkeypatch):
    teacher, text = make_decoder("llama").eval(), WrittenText(start=1, length=8)
    monkeypatch.setattr(recovery_text, "AT_ONCE", 4)
    alone = WrittenBatches(text, teacher, tokens_per_step=24, seed=3)
    expected = torch.cat([alone.of(step) for step in range(4)])

    def read(rank):
        shared = WrittenBatches(text, teacher, tokens_per_step=24, seed=3, processes=Processes(rank, 2))
        assert torch.equal(torch.cat([shared.of(step) for step in range(4)]), expected)

    assert together(2, read) == [0, 0]


def test_a_killed_run_resumes_bit_for_bit_or_in_another_number_of_processes(pair, text, together, tmp_path):
    def train(out: str, *, kill: bool = False) -> None:
        def stop(spent: float, *_: float) -> None:
            if kill and spent == 2:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

        model, teacher = pair()
        path = tmp_path / ("expected.pt" if out == "expected" else "state.pt")
        report = recover(model, teacher, text, SHORT, state=path, save_every=0, progress=stop)
        assert len(report.losses) == 4
        if Processes.now().is_first:
            torch.save((report.losses, weights_of(model)), tmp_path / out)

    assert together(2, lambda _: train("killed", kill=True)) == [-signal.SIGKILL] * 2
    saved = (tmp_path / "state.pt").read_bytes()
    assert together(2, lambda _: train("expected")) == [0, 0]
    assert together(2, lambda _: train("resumed")) == [0, 0]
    expected, resumed = (torch.load(tmp_path / name) for name in ("expected", "resumed"))
    assert expected[0] == resumed[0]
    assert torch.equal(expected[1], resumed[1])
    (tmp_path / "state.pt").write_bytes(saved)
    train("alone")
    assert torch.load(tmp_path / "alone")[0] == pytest.approx(expected[0], rel=0.01)


def test_minutes_end_all_processes_after_the_same_step(pair, text, together):
    def train(_rank):
        model, teacher = pair()
        report = recover(model, teacher, text, RecoverySettings(minutes=0.002, tokens_per_step=32))
        assert len(set(Processes.now().gather((report.steps, report.seconds, report.cpu_seconds)))) == 1

    assert together(2, train) == [0, 0]


def refused(together, task, message: str) -> None:
    """Check that both of two processes raise a RecoveryError."""

    def run(rank):
        with pytest.raises(RecoveryError, match=message):
            task(rank)

    assert together(2, run) == [0, 0]


def test_a_step_with_fewer_sequences_than_processes_is_refused(pair, text, together):
    settings = RecoverySettings(steps=1, tokens_per_step=16)
    message = "a step of 16 tokens has 1 sequences of 16 tokens, fewer than the 2 processes: use --tokens-per-step 32"
    refused(together, lambda _: recover(*pair(), text, settings), message)


def test_processes_with_different_text_are_refused(pair, text, together):
    refused(together, lambda rank: recover(*pair(), text.roll(rank, 0), SHORT), "the processes have different settings")


def test_a_full_memory_says_what_each_process_holds(pair, text, together, monkeypatch):
    def backward(*_, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(Distillation, "backward", backward)
    message = r"each of the 2 processes holds the whole model.*not the weights.*\(CUDA out of memory. Tried .* GiB.\)$"
    refused(together, lambda _: recover(*pair(), text, SHORT), message)
    message = r"each of the 2 processes holds its share of the blocks' weights, 14 bytes.*more processes"
    refused(together, lambda _: recover(*pair(), text, SHORT, shard="cpu"), message)


def test_the_first_process_alone_reads_and_writes_the_state(pair, text, together, tmp_path, monkeypatch):
    save = RecoveryState.save

    def save_in_the_first(self, path, optimizer):
        assert Processes.now().is_first
        save(self, path, optimizer)

    monkeypatch.setattr(RecoveryState, "save", save_in_the_first)
    paths = [tmp_path / "first" / "state.pt", tmp_path / "second" / "state.pt"]
    assert together(2, lambda rank: recover(*pair(), text, SHORT, state=paths[rank]) and None) == [0, 0]
    assert [path.is_file() for path in paths] == [True, False]
    assert list(paths[0].parent.iterdir()) == [paths[0]]


def test_the_command(command, command_together, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 8, "--length", 16)
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "wanda", *small)[0] == 0
    words = (*small, "--steps", 2, "--tokens-per-step", 32, "--json", tmp_path / "told.json")
    (code, shown, errors), other = command_together(2, "recover", tmp_path / "pruned", tmp_path / "out", *words)
    assert code == 0, errors
    assert other == (0, "", "")
    assert shown.count("written to") == 1
    assert json.loads((tmp_path / "told.json").read_text())["processes"] == 2
    facts = checkpoint.read_report(tmp_path / "out")
    assert (facts["recovery"]["steps"], facts["recovery"]["tokens"]) == (2, 64)
    before, after = (pruned_masks(checkpoint.load(tmp_path / name)[0]) for name in ("pruned", "out"))
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert not list(tmp_path.glob(".out*"))
