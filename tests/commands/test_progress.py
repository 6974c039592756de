"""Progress where stderr is no terminal: a line at a stage's start and end, and at intervals, with the time left."""

import io
import re
import time

from rich.console import Console

from ace_triton.commands.console import progress_bars
from ace_triton.progress import ProgressLines, _duration, bars, progress_bar, stage


def lines_of(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def test_a_pipe_gets_lines_as_the_work_goes_on():
    out = io.StringIO()
    with ProgressLines(Console(file=out, width=40), every=0.05) as progress:
        with stage(progress, "load the model"):
            time.sleep(0.2)
            assert len(lines_of(out)) >= 2
        move = progress_bar(progress, "prune [/] :m:", "blocks")
        for done in range(4):
            move(done + 1, 8)
            time.sleep(0.06)
        running = lines_of(out)[-1]
        move(8, 8)
    lines = lines_of(out)
    assert lines[0] == "load the model ..."
    assert re.fullmatch(r"load the model: 0\.\d s so far", lines[1])
    assert any(re.fullmatch(r"load the model: done in 0\.[2-9] s", line) for line in lines)
    assert "prune [/] :m: ..." in lines
    found = re.fullmatch(r"prune \[/\] :m:: 4 of 8 blocks, (0\.\d) s so far, about (0\.\d) s left", running)
    assert found
    assert abs(float(found[1]) - float(found[2])) <= 0.1
    assert lines[-1].startswith("prune [/] :m:: done in 0.")


def test_what_was_done_before_does_not_count_as_time_spent():
    out = io.StringIO()
    with ProgressLines(Console(file=out, width=200), every=0.05) as progress:
        task = progress.add_task("study", total=100, completed=90)
        time.sleep(0.1)
        assert "left" not in out.getvalue()
        progress.update(task, completed=91)
        time.sleep(0.15)
    assert re.search(r"study: 91 of 100, (\d\.\d) s so far, about [12]\.\d s left", out.getvalue())


def test_a_stage_that_fails_is_not_called_done():
    out = io.StringIO()
    try:
        with ProgressLines(Console(file=out)) as progress, stage(progress, "load the model"):
            raise ValueError
    except ValueError:
        pass
    assert lines_of(out) == ["load the model ..."]


def test_later_lines_come_further_apart():
    progress = ProgressLines(Console(file=io.StringIO()))
    task = progress._tasks[progress.add_task("study")]
    progress._last_line = time.monotonic() - 30
    assert progress._is_time(task)
    task.start_time -= 3600
    assert not progress._is_time(task)
    progress._last_line -= 160
    assert progress._is_time(task)


def test_a_terminal_gets_bars(monkeypatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100)
    with bars(terminal) as progress:
        progress_bar(progress, "prune [/] :m:", "blocks")(3, 8)
    assert "prune [/] :m:" in out.getvalue()
    assert "3/8 blocks" in out.getvalue()
    assert isinstance(progress_bars(), ProgressLines)
    monkeypatch.setattr("ace_triton.commands.console.errors", terminal)
    assert not isinstance(progress_bars(), ProgressLines)


def test_durations():
    assert [_duration(s) for s in (0.04, 9.96, 59.4, 65, 7265)] == ["0.0 s", "10 s", "59 s", "1:05", "2:01:05"]
