"""What a recovery resumes from: only a whole state of the same training, which one process at a time has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ace_triton.recovery.state import RecoveryState, fingerprint, locked, remove_state
from ace_triton.solvers.kept_adamw import KeptAdamW


def optimizer() -> KeptAdamW:
    """Of a pruned matrix and a norm."""
    matrix = torch.arange(12.0).view(3, 4) * (torch.arange(4) % 2)
    return KeptAdamW({"matrix": nn.Parameter(matrix), "norm": nn.Parameter(torch.ones(4))}, torch.float32)


@pytest.fixture
def saved(tmp_path) -> tuple:
    """The path of a state after two steps, and what is in it."""
    path = tmp_path / "run" / "state.pt"
    run = RecoveryState("mine")
    run.record(1.5, 10.0, 20.0)
    run.record(1.25, 11.0, 22.0)
    run.save(path, optimizer())
    return path, torch.load(path)


def test_a_state_comes_back_as_it_was(saved):
    assert RecoveryState.begin(saved[0], "mine", optimizer()) == RecoveryState("mine", 2, 11.0, 22.0, [1.5, 1.25])


def without(name: str, key: str | None = None):
    def change(content: dict) -> dict:
        (content if key is None else content[name]).pop(name if key is None else key)
        return content

    return change


def with_tensor(part: str, name: str, tensor: object):
    def change(content: dict) -> dict:
        content["optimizer"][part][name] = tensor
        return content

    return change


def with_value(name: str, value: object):
    return lambda content: {**content, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [1, 2], "is not the state of a recovery of this version"),
        (lambda content: torch.ones(3), "is not the state of a recovery of this version"),
        (with_value("format", "ace_triton.recovery.3"), "is not the state of a recovery of this version"),
        (with_value("fingerprint", "yours"), "other settings, text, weights or teacher"),
        (without("fingerprint"), "other settings, text, weights or teacher"),
        (without("steps"), "damaged .invalid steps"),
        (with_value("seconds", float("nan")), "damaged .invalid seconds"),
        (with_value("losses", [1.5]), "damaged .invalid losses"),
        (with_value("losses", "ab"), "damaged .invalid losses"),
        (without("optimizer"), "must be a dict of first, second, taken, values"),
        (without("optimizer", "taken"), "must be a dict of first, second, taken, values"),
        (with_tensor("values", "other", torch.ones(4)), "values: it belongs to other parameters"),
        (with_tensor("values", "matrix", torch.zeros(1)), r"matrix, values: must be torch.float32 of shape .3, 4."),
        (with_tensor("first", "norm", torch.zeros(1)), r"norm, first: must be torch.float32 of shape .4,."),
        (with_tensor("second", "norm", torch.ones(4).double()), "norm, second: must be torch.float32"),
        (with_tensor("second", "norm", -torch.ones(4)), "norm, second: invalid numbers"),
        (with_tensor("values", "norm", torch.full((4,), torch.nan)), "norm, values: invalid numbers"),
        (with_tensor("values", "matrix", torch.ones(3, 4)), "matrix: a pruned weight is not 0"),
        (with_tensor("values", "norm", 3), "norm, values: must be"),
        (with_tensor("taken", "norm", -1), "norm: invalid number of steps"),
    ],
)
def test_what_is_no_whole_state_of_this_training_is_one_line(saved, change, message):
    path, content = saved
    torch.save(change(content), path)
    fresh = optimizer()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=f"{path}: .*{message}.*; remove it"):
        RecoveryState.begin(path, "mine", fresh)
    assert all(torch.equal(tensor, before["values"][name]) for name, tensor in fresh.values.items())


def test_everything_that_decides_a_training_is_in_its_fingerprint():
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.BatchNorm1d(4))

    base = fingerprint("settings", b"text", model(), model())
    assert base == fingerprint("settings", b"text", model(), model())
    other = model()
    with torch.no_grad():
        other[0].weight[1, 2] = -other[0].weight[1, 2]
    counted = model()
    counted[1].num_batches_tracked += 1
    different = [
        fingerprint("others", b"text", model(), model()),
        fingerprint("settings", b"texts", model(), model()),
        fingerprint("settings", b"text", other, model()),
        fingerprint("settings", b"text", model(), other),
        fingerprint("settings", b"text", counted, model()),
    ]
    assert len({base, *different}) == 6


def test_a_full_disk_is_one_line_and_keeps_the_state(saved):
    path, content = saved
    path.with_name(".state.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not be written .*resumes from the last saved state"):
        RecoveryState("mine").save(path, optimizer())
    assert torch.load(path)["losses"] == content["losses"]
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "run" / "state.pt"
    with locked(path):
        with pytest.raises(ValueError, match="another process runs this recovery"), locked(path):
            pass
        with locked(tmp_path / "run" / "other.pt"), locked(None):
            pass
    with locked(path):
        pass
    assert not list(path.parent.iterdir())


def test_what_a_kill_left_is_removed_with_the_state(saved):
    path, _ = saved
    path.with_name(".state.pt.partial").write_bytes(b"half")
    remove_state(path)
    assert not list(path.parent.iterdir())
    remove_state(path)
