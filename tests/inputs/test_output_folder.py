"""Folders are written atomically, also with links, races, signals and kills."""

import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from ace_triton.errors import CheckpointError
from ace_triton.inputs import output_folder
from ace_triton.inputs.output_folder import check_out, replacing, reserved, write_report

MINE = "years of work"
EXCHANGE = output_folder._exchange


def write(out, *names, overwrite=False):
    """Write a folder as the commands do."""
    with replacing(out, overwrite=overwrite) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        write_report(folder, {})


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder with files of the user."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.tex").write_text(MINE)
    return tmp_path / "victim"


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """With and without a file system that can exchange two folders."""
    if not request.param:
        monkeypatch.setattr(output_folder, "_exchange", lambda *_: False)


def test_only_what_was_written_here_is_replaced(tmp_path, exchange):
    out = tmp_path / "out"
    write(out, "a", "sub/b")
    with pytest.raises(CheckpointError, match="--overwrite to replace it"):
        write(out, "c")
    write(out, "c", overwrite=True)
    assert contents(out) == ["README.md", "ace_triton.json", "c"]
    (out / "results.jsonl").write_text(MINE)
    (out / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"also contains notes, results\.jsonl, not written by ace-triton"):
        write(out, "d", overwrite=True)
    assert contents(out) == ["README.md", "ace_triton.json", "c", "results.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_stays(tmp_path, victim, overwrite):
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out in (victim, tmp_path / "newdir" / ".." / "victim", tmp_path, tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(CheckpointError, match="--overwrite" if not overwrite else r"thesis\.tex|victim|link"):
            write(out, "a", overwrite=overwrite)
    assert (victim / "thesis.tex").read_text() == MINE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "victim"]


def test_the_error_names_what_would_be_lost(victim):
    with pytest.raises(CheckpointError, match=r"contains thesis\.tex: name another folder, or remove it yourself"):
        check_out(victim, overwrite=True)
    for index in range(9):
        (victim / f"part{index}").touch()
    with pytest.raises(CheckpointError, match=r"contains part0, part1, part2, part3 and 6 more"):
        check_out(victim, overwrite=True)


@pytest.mark.parametrize(("marker", "content"), [("ace_triton.json", {"method": "ace"}), ("ace_triton_packed.json", 1)])
def test_a_folder_that_does_not_list_its_files_stays(tmp_path, marker, content):
    version_1 = {"version": 1, "files": {"config.json": {}}}
    (tmp_path / marker).write_text(json.dumps(version_1 if content == 1 else content))
    with pytest.raises(CheckpointError, match="written by an older ace-triton, which did not list its files"):
        check_out(tmp_path, overwrite=True)


def test_places_that_are_never_replaced(tmp_path, monkeypatch):
    home, here = tmp_path / "a" / "home", tmp_path / "b" / "here"
    for folder in (home, here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for out, message in (
        (home, "home folder"),
        (home.parent, "home folder"),
        (here, "working directory"),
        (".", "working directory"),
        ("..", "working directory"),
        ("/proc", "mount point"),
        ("/dev/null", "a device or a pipe"),
        (tmp_path / ("n" * 250), "too long; at most 243 bytes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_out(out, overwrite=True)


def test_what_appears_meanwhile_stays(tmp_path, exchange):
    out = tmp_path / "out"

    def write_while_another_does(overwrite):
        with replacing(out, overwrite=overwrite) as folder:
            (folder / "a").touch()
            out.mkdir(exist_ok=True)
            (out / "thesis.tex").write_text(MINE)

    with pytest.raises(CheckpointError, match="nothing there was changed"):
        write_while_another_does(False)
    (out / "thesis.tex").unlink()
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*; nothing there was changed"):
        write_while_another_does(True)
    assert contents(tmp_path) == ["out/thesis.tex"]
    assert (out / "thesis.tex").read_text() == MINE


def test_what_appears_at_the_last_moment_stays(tmp_path, monkeypatch, exchange):
    out = tmp_path / "out"
    write(out, "a")
    flush = output_folder._flush

    def flush_and_change(folder):
        flush(folder)
        (out / "thesis.tex").write_text(MINE)

    monkeypatch.setattr(output_folder, "_flush", flush_and_change)
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*; nothing there was changed"):
        write(out, "b", overwrite=True)
    assert contents(tmp_path) == ["out/README.md", "out/a", "out/ace_triton.json", "out/thesis.tex"]


def test_there_is_always_a_complete_folder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    if not output_folder._exchange(one, two):
        pytest.skip("this file system cannot let two folders change places")
    out = tmp_path / "out"
    write(out, "a")
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if not (out / "ace_triton.json").exists():
                missing.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        write(out, "a", overwrite=True)
    stop.set()
    watcher.join()
    assert missing == []


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out", overwrite=False) as folder:
            (folder / "weights").touch(mode=0o600)
            (folder / "sub").mkdir()
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in (".", "weights", "sub")}
    assert modes == {".": 0o750, "weights": 0o640, "sub": 0o750}


def test_what_a_killed_run_left_is_named(tmp_path):
    left = tmp_path / ".out.ace-triton"
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    with pytest.warns(UserWarning, match=r"removed .*\.out\.ace-triton, left by a killed run that wrote .*out"):
        write(tmp_path / "out", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (left / "old").mkdir(parents=True)
    (tmp_path / "out").rename(left / "old")
    with pytest.warns(UserWarning, match="out was restored"), pytest.raises(CheckpointError, match="already exists"):
        write(tmp_path / "out", "b")
    assert contents(tmp_path) == ["out/README.md", "out/a", "out/ace_triton.json"]


def test_a_reserved_folder_may_be_written_several_times(tmp_path, exchange):
    with reserved(tmp_path / "out", overwrite=True) as place:
        for name in "abc":
            write(tmp_path / "out", name, overwrite=True)
            assert place.written
    assert contents(tmp_path) == ["out/README.md", "out/ace_triton.json", "out/c"]


def test_parents_that_a_failed_run_made_are_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped, reserved(tmp_path / "a" / "b" / "out", overwrite=False):
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == [f"nothing was written to {tmp_path / 'a' / 'b' / 'out'}"]
    assert list(tmp_path.iterdir()) == []


def in_a_child(task) -> int:
    """Run a task in a forked process and return its process id."""
    child = os.fork()
    if not child:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_two_runs_on_one_folder_are_kept_apart(tmp_path):
    out, (reading, writing) = tmp_path / "out", os.pipe()

    def hold():
        with reserved(out, overwrite=False):
            os.write(writing, b".")
            time.sleep(60)

    child = in_a_child(hold)
    try:
        os.read(reading, 1)
        with pytest.raises(CheckpointError, match="another ace-triton is writing to it"):
            write(out, "a")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write(out, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"}
"""Audit events of what a run changes on disk. The last one comes before two folders are exchanged."""


@pytest.mark.filterwarnings("ignore")
def test_a_run_killed_at_any_step_leaves_nothing_after_the_next_one(tmp_path, exchange):
    out = tmp_path / "out"
    write(out, "old")

    def run_until(step):
        steps = iter(range(step))

        def count(event, arguments):
            if (event in CHANGES or (event == "open" and arguments[1] == "w")) and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(out, "a", overwrite=True)

    for step in range(100):
        child = in_a_child(lambda step=step: run_until(step))
        status = os.waitpid(child, 0)[1]
        assert out.exists() or output_folder._exchange is not EXCHANGE
        write(out, "a", overwrite=True)
        assert contents(tmp_path) == ["out/README.md", "out/a", "out/ace_triton.json"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert 8 < step < 99


def test_a_folder_in_the_way_is_not_touched(tmp_path):
    (tmp_path / ".out.ace-triton").mkdir()
    (tmp_path / ".out.ace-triton" / "thesis.tex").write_text(MINE)
    with pytest.raises(CheckpointError, match="was not made by ace-triton"):
        write(tmp_path / "out", "a")
    assert contents(tmp_path) == [".out.ace-triton/thesis.tex"]
