"""Signals during a recovery: the first one waits for the step and its state, a second one does not."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch

from ace_triton import RecoverySettings, prune_model, recover, recover_model
from ace_triton.recovery.state import saved_steps
from ace_triton.recovery.stopping import HeldSignals
from ace_triton.solvers.kept_adamw import KeptAdamW

SHORT = RecoverySettings(steps=6, tokens_per_step=32, learning_rate=0.01)

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


@pytest.fixture
def pair(make_decoder, ids):
    """pair(): a pruned model and its teacher."""

    def make():
        model, teacher = make_decoder("llama"), make_decoder("llama")
        prune_model(model, ids, "wanda", "2:4")
        return model, teacher

    return make


@pytest.fixture
def text():
    return torch.randint(3, 101, (24, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def signal_in_step(monkeypatch):
    """signal_in_step(step, *numbers): this process gets these signals in the middle of a step."""

    def arm(step: int, *numbers: int) -> None:
        take, taken = KeptAdamW.step, []

        def interrupted(self, *words):
            taken.append(1)
            if len(taken) == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            take(self, *words)

        monkeypatch.setattr(KeptAdamW, "step", interrupted)

    return arm


def train(kind, model, teacher, text, settings=SHORT, **options):
    if kind == "any model":
        return recover_model(model, teacher, [{"input_ids": part} for part in text.split(2)], settings, **options)
    return recover(model, teacher, text, settings, **options)


@pytest.mark.parametrize("kind", ["decoder", "any model"])
def test_ctrl_c_waits_for_the_step_and_the_same_call_resumes(kind, pair, text, signal_in_step, tmp_path, monkeypatch):
    whole, teacher = pair()
    report = train(kind, whole, teacher, text)
    path, told = tmp_path / "run" / "state.pt", []
    signal_in_step(3, signal.SIGINT)
    with pytest.warns(UserWarning, match="a second signal stops at once"), pytest.raises(KeyboardInterrupt) as stopped:
        train(kind, pair()[0], teacher, text, state=path, progress=lambda *spent: told.append(spent[0]))
    assert told == [1, 2]
    assert stopped.value.__notes__ == [f"3 optimizer steps are saved in {path}: the same command resumes after them"]
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    again = pair()[0]
    assert train(kind, again, teacher, text, state=path).losses == report.losses
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:stopping after this step")
def test_a_second_ctrl_c_stops_in_the_step(pair, text, signal_in_step, tmp_path):
    model, teacher = pair()
    path = tmp_path / "state.pt"
    signal_in_step(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        recover(model, teacher, text, SHORT, state=path)
    assert not hasattr(stopped.value, "__notes__")
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [OSError(5, "no terminal"), SystemExit(1)])
@pytest.mark.parametrize("kind", ["decoder", "any model"])
def test_a_warning_that_cannot_be_printed_does_not_end_the_step(
    kind, error, pair, text, signal_in_step, tmp_path, monkeypatch
):
    def fail(*_words):
        raise error

    monkeypatch.setattr(warnings, "showwarning", fail)
    model, teacher = pair()
    path = tmp_path / "state.pt"
    signal_in_step(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(kind, model, teacher, text, state=path, progress=lambda *spent: spent[0] < 2 or fail())
    assert saved_steps(path) == 2


def test_without_a_state_nothing_waits(pair, text, signal_in_step):
    model, teacher = pair()
    told = []
    signal_in_step(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher, text, SHORT, progress=lambda *spent: told.append(spent[0]))
    assert told == [1]


@pytest.mark.filterwarnings("ignore:stopping after this step")
def test_a_budget_of_minutes_goes_on_where_it_was(pair, text, signal_in_step, tmp_path):
    model, teacher = pair()
    settings, path = RecoverySettings(minutes=0.02, tokens_per_step=32), tmp_path / "state.pt"
    signal_in_step(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher, text, settings, state=path)
    saved = torch.load(path)
    assert saved["steps"] == 2
    report = recover(pair()[0], teacher, text, settings, state=path)
    assert report.losses[:2] == tuple(saved["losses"])
    assert report.seconds >= 1.2


@pytest.mark.filterwarnings("ignore:stopping after this step")
def test_a_handler_that_returns_lets_the_training_go_on(pair, text, signal_in_step, tmp_path):
    seen, path = [], tmp_path / "state.pt"
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(saved_steps(path)))
    model, teacher = pair()
    signal_in_step(2, signal.SIGTERM)
    assert recover(model, teacher, text, SHORT, state=path).steps == 6
    assert seen == [2]


@pytest.mark.filterwarnings("ignore:stopping after this step")
def test_sigterm_ends_a_program_without_a_handler_after_the_step(pair, text, signal_in_step, tmp_path):
    model, teacher = pair()
    path = tmp_path / "state.pt"
    child = os.fork()
    if not child:
        signal_in_step(4, signal.SIGTERM)
        recover(model, teacher, text, SHORT, state=path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert saved_steps(path) == 4


@pytest.mark.filterwarnings("ignore:stopping after this step")
@pytest.mark.parametrize("shard", [None, "cpu"])
def test_processes_agree_on_the_step(pair, text, together, tmp_path, monkeypatch, shard):
    """Only the second process gets the signal; both stop after the same step, which the first one saves."""
    path = tmp_path / "state.pt"
    settings = RecoverySettings(steps=6, tokens_per_step=64, learning_rate=0.01)

    def stop(rank):
        take, taken = KeptAdamW.step, []

        def interrupted(self, *words):
            taken.append(1)
            if (rank, len(taken)) == (1, 3):
                os.kill(os.getpid(), signal.SIGINT)
            take(self, *words)

        KeptAdamW.step = interrupted
        model, teacher = pair()
        with pytest.raises(KeyboardInterrupt) as stopped:
            recover(model, teacher, text, settings, state=path, shard=shard)
        assert len(taken) == 3
        assert hasattr(stopped.value, "__notes__") == (rank == 0)
        KeptAdamW.step = take

    assert together(2, stop) == [0, 0]
    assert saved_steps(path) == 3
    model, teacher = pair()
    assert recover(model, teacher, text, settings, state=path).steps == 6


def test_ignored_signals_and_other_threads_change_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with HeldSignals(True) as held:
        os.kill(os.getpid(), signal.SIGHUP)
        assert held.number is None
    handlers = []

    def look():
        with HeldSignals(True):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


@pytest.mark.filterwarnings("ignore:stopping after this step")
def test_a_signal_at_the_very_end_is_not_lost():
    with pytest.raises(KeyboardInterrupt), HeldSignals(True):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("error:stopping after this step")
def test_warnings_as_errors_do_not_break_a_step():
    with pytest.raises(KeyboardInterrupt), HeldSignals(True):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_steps_of_what_is_no_state(tmp_path, content):
    path = tmp_path / "state.pt"
    if content is not None:
        path.write_bytes(content)
    assert saved_steps(path) is None
    assert saved_steps(None) is None
