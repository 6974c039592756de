"""Ctrl-C and signals: what is cleaned up, what is said, and the exit code."""

import os
import signal

import pytest
from transformers import BertConfig, BertModel

from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.solvers.kept_adamw import KeptAdamW
from ace_triton.study.journal import FILE, read_results
from ace_triton.study.workbench import Workbench

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


@pytest.fixture
def stopped_while_saving(monkeypatch):
    """stopped_while_saving(number): the process gets this signal in the middle of writing a checkpoint."""

    def arm(number):
        write_report = checkpoint.write_report

        def stop(folder, report):
            write_report(folder, report)
            os.kill(os.getpid(), number)

        monkeypatch.setattr(checkpoint, "write_report", stop)

    return arm


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")]
)
def test_a_run_that_is_stopped_leaves_nothing_and_says_so(
    command, stopped_while_saving, tiny_checkpoint, tmp_path, number, how
):
    stopped_while_saving(number)
    out = tmp_path / "deep" / "out"
    code, _, errors = command("prune", tiny_checkpoint, out, "--method", "magnitude")
    assert code == 128 + number
    assert f"{how}; nothing was written to {out}" in errors
    assert [path.name for path in tmp_path.iterdir()] == [tiny_checkpoint.name]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_there_stays_if_a_run_is_stopped(command, stopped_while_saving, tiny_checkpoint, tmp_path, number):
    words = ("prune", tiny_checkpoint, tmp_path / "out", "--method", "magnitude")
    assert command(*words)[0] == 0
    before = checkpoint.read_report(tmp_path / "out")
    stopped_while_saving(number)
    assert command(*words, "--overwrite")[0] == 128 + number
    assert checkpoint.read_report(tmp_path / "out") == before
    assert load_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", tiny_checkpoint.name]


def test_without_an_output_it_says_that_nothing_was_written(command, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("ace_triton.commands.generate.load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = command("generate", tiny_checkpoint, "--prompt", "a")
    assert code == 130
    assert "stopped; nothing was written\n" in errors


@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated")])
def test_a_study_that_is_stopped_shows_what_it_has_and_resumes(study, monkeypatch, tmp_path, number, how):
    out = tmp_path / "s"
    words = ("--methods", "magnitude,wanda,ria", "--sparsities", "2:4", "--lengths", 8, "--seeds", 1)
    prune = Workbench.prune

    def stop_at_ria(bench, cell, ids):
        if cell.recipe.method == "ria":
            os.kill(os.getpid(), number)
        return prune(bench, cell, ids)

    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "prune", stop_at_ria)
        code, printed, errors = study(out, *words)
    assert code == 128 + number
    assert f"{how}; the same command resumes the study in {out}\n" in errors
    assert f"2 cells; the page is {out / 'tiny.html'}\n" in printed
    assert "Wanda" in (out / "tiny.html").read_text()
    before = (out / FILE).read_bytes()
    assert study(out, *words)[0] == 0
    assert (out / FILE).read_bytes().startswith(before)
    assert len(read_results(out).cells) == 3


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated")])
def test_a_recovery_saves_the_step_that_it_is_in_and_resumes(
    command, monkeypatch, tiny_checkpoint, some_text, tmp_path, save, family, number, how
):
    dense = tiny_checkpoint
    few = ("--calibration", some_text, "--steps", 4, "--length", 16)
    few += ("--tokens-per-step", 32) if family == "llama" else ("--inputs-per-step", 2, "--samples", 8)
    if family == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        dense = save(BertModel(BertConfig(vocab_size=320, **sizes)), "bert")
    assert command("prune", dense, tmp_path / "pruned", "--method", "magnitude")[0] == 0
    words = ("recover", tmp_path / "pruned", tmp_path / "out", *few)
    take, taken = KeptAdamW.step, []

    def stopping(self, *rates):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), number)
        take(self, *rates)

    with monkeypatch.context() as patched:
        patched.setattr(KeptAdamW, "step", stopping)
        code, _, errors = command(*words)
    assert code == 128 + number
    state = tmp_path / ".out.recovery" / "state.pt"
    assert "stopping after this step; a second signal stops at once" in errors
    assert (
        f"{how}; 2 optimizer steps are saved in {state}: the same command resumes after them; nothing was written to "
        f"{tmp_path / 'out'}\n"
    ) in errors
    assert "resuming" not in errors
    code, _, errors = command(*words)
    assert code == 0, errors
    assert "resuming after 2 steps\n" in errors
    assert checkpoint.read_report(tmp_path / "out")["recovery"]["steps"] == 4
    assert not list(tmp_path.glob(".out*"))


def test_a_second_run_on_the_same_folder_is_refused_before_any_work(command, tiny_checkpoint, tmp_path):
    child_holds, parent_done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with checkpoint.reserved(tmp_path / "out", overwrite=False):
            os.write(child_holds[1], b".")
            os.read(parent_done[0], 1)
        os._exit(0)
    os.read(child_holds[0], 1)
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", "--method", "magnitude")
    os.write(parent_done[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    assert code == 1
    assert "another ace-triton is writing to it" in errors
    assert "load the model" not in errors
    assert [path.name for path in tmp_path.iterdir()] == [tiny_checkpoint.name]


def test_a_warning_is_one_line(command, monkeypatch, tiny_checkpoint, tmp_path):
    left = tmp_path / ".out.ace-triton"
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", "--method", "magnitude")
    assert code == 0
    assert f"warning: removed {left}, left by a killed run that wrote {tmp_path / 'out'}\n" in errors
