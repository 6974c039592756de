"""A terminal that is gone: the run ends as by SIGHUP, with its state saved."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest

from ace_triton.inputs import checkpoint
from ace_triton.recovery.state import saved_steps
from ace_triton.terminal import is_lost_terminal

HANG_UP = 128 + signal.SIGHUP


def lead_the_terminal() -> None:
    """Make stdin the controlling terminal of this process, which then gets SIGHUP if the terminal is gone.

    A process that nohup started ignores SIGHUP, and so do its children.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def run_until(seen: str, words: list[str], *, leads: bool) -> int:
    """Run a command in a terminal of its own, which is gone once its output matches ``seen``: the exit status.

    The command never outlives this function.
    """
    ours, its = pty.openpty()
    code = "import sys; from ace_triton.commands.cli import main; sys.argv[0] = 'ace-triton'; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lead_the_terminal if leads else None,
    )
    os.close(its)
    try:
        wait_for(seen, ours)
        os.close(ours)
        return run.wait(120)
    finally:
        run.kill()
        run.wait()


def wait_for(seen: str, terminal: int) -> None:
    """Read a command's output until it matches ``seen``; the test fails if the command ends before."""
    output = ""
    while not re.search(seen, output):
        try:
            output += os.read(terminal, 4096).decode(errors="replace")
        except OSError as error:  # EIO: it has ended.
            pytest.fail(f"it ended before {seen!r} ({error}): {output}")


@pytest.fixture
def recovery(command, tiny_checkpoint, some_text, tmp_path):
    """recovery(steps): the words of a recovery of tmp_path / "pruned" into tmp_path / "out"."""
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "magnitude")[0] == 0
    words = ["recover", str(tmp_path / "pruned"), str(tmp_path / "out"), "--calibration", str(some_text)]
    return lambda steps: [*words, "--length", "16", "--tokens-per-step", "32", "--steps", str(steps)]


def test_a_recovery_that_is_hung_up_saves_its_state(recovery, tmp_path):
    assert run_until(r"[1-9]\d*/100,?000 steps", recovery(100_000), leads=True) == HANG_UP
    assert (saved_steps(tmp_path / ".out.recovery" / "state.pt") or 0) > 0
    assert not (tmp_path / "out").exists()


def test_a_recovery_that_only_cannot_print_runs_to_its_end(recovery, tmp_path):
    assert run_until(r"[1-9]\d*/300 steps", recovery(300), leads=False) == HANG_UP
    assert checkpoint.read_report(tmp_path / "out")["recovery"]["steps"] == 300
    assert not list(tmp_path.glob(".out*"))


def test_an_error_of_a_disk_is_no_lost_terminal():
    assert not is_lost_terminal(OSError(errno.EIO, "Input/output error"))
    ours, its = pty.openpty()
    usual = os.dup(2)
    os.dup2(its, 2)
    try:
        assert not is_lost_terminal(OSError(errno.EIO, "Input/output error"))
        os.close(ours)
        assert is_lost_terminal(OSError(errno.EIO, "Input/output error"))
        assert not is_lost_terminal(OSError(errno.ENOSPC, "No space left on device"))
        assert not is_lost_terminal(ValueError())
    finally:
        os.dup2(usual, 2)
        os.close(usual)
        os.close(its)
