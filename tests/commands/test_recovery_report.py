"""What ``ace-triton recover`` says of its result, and of the training that it resumes."""

import io

import pytest
import torch
from rich.console import Console

from ace_triton.commands.recovery_report import gain_note, recovery_bar, recovery_table
from ace_triton.commands.report import history_table
from ace_triton.progress import ProgressLines
from ace_triton.recovery.settings import RecoveryReport, RecoverySettings


def result_of(*losses: float) -> RecoveryReport:
    return RecoveryReport(len(losses), 256 * len(losses), 0.5, 12.0 * len(losses), 20.0, losses, trained=8, zeros=8)


def text_of(table) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return " ".join(out.getvalue().replace("│", " ").split())


def test_mean_losses_are_of_ten_steps_or_of_half_of_them():
    assert result_of(*range(30)).mean_losses == (4.5, 24.5)
    assert result_of(3.0, 1.0, 2.0, 0.0, 5.0).mean_losses == (2.0, 2.5)
    assert result_of(0.5).mean_losses == (0.5, 0.5)


def test_the_table_and_the_history_give_the_same_named_losses():
    result = result_of(*[0.9, 0.5] * 5, *[0.7] * 5, *[0.3, 0.5] * 5)
    shown = text_of(recovery_table(result, "weights"))
    assert "mean loss, first 10 steps 0.700 nats a token mean loss, last 10 steps 0.400 nats a token" in shown
    step = {"command": "recover", "did": "25 optimizer steps", "mean_loss": list(result.mean_losses)}
    assert "mean loss of first and last steps 0.700 -> 0.400" in text_of(history_table([step]))


def test_a_run_of_few_steps_is_said_to_be_too_short():
    for losses in ([0.389, 0.4, 0.4, 0.4, 0.399], [0.9, 0.1] * 9 + [0.01]):
        note = gain_note(result_of(*losses))
        assert note is not None
        assert note.startswith(f"{len(losses)} steps of 12.0 s: too few to gain much, or to tell a gain from the loss")
        assert "Give more --minutes or --steps" in note
        assert "docs/guides/recover.md" in note
    assert gain_note(result_of(0.5)).startswith("1 step of 12.0 s: ")


@pytest.mark.parametrize("last", [0.4, 0.41])
def test_a_loss_that_did_not_fall_is_named(last):
    note = gain_note(result_of(*[0.4] * 10, *[last] * 10))
    assert note is not None
    assert note.startswith(f"The mean loss did not fall in 20 steps, from 0.400 to {last:.3f}. Give more --minutes")


def test_nothing_is_said_of_a_loss_that_fell():
    assert gain_note(result_of(*[0.4] * 10, *[0.39] * 10)) is None


@pytest.mark.parametrize(
    ("settings", "note", "line"),
    [
        (RecoverySettings(minutes=1), "resuming after 4 steps; 31 of 60 seconds are spent", "45 of 60 seconds"),
        (RecoverySettings(steps=60), "resuming after 4 steps", "45 of 60 steps"),
    ],
)
def test_a_resumed_training_says_so(tmp_path, capsys, settings, note, line):
    state = tmp_path / "state.pt"
    torch.save({"steps": 4, "seconds": 31.2}, state)
    progress = ProgressLines(Console(file=io.StringIO(), width=200))
    recovery_bar(progress, settings, state)(45.0, 60.0, 0.4636)
    assert capsys.readouterr().err.splitlines() == [note]
    (task,) = progress._tasks.values()
    assert progress._first[task.id] == (31 if settings.minutes else 4)
    assert progress._state(task).startswith(f"set up and recover, loss 0.464: {line}, ")


def test_a_training_from_the_start_says_nothing(tmp_path, capsys):
    recovery_bar(ProgressLines(Console(file=io.StringIO())), RecoverySettings(steps=3), tmp_path / "state.pt")
    assert capsys.readouterr().err == ""
