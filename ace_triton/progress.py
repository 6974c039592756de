"""Progress of long calls: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

MOST_LINES = 20
"""Approximate number of lines for a stage: the time between two lines grows to a twentieth of the time so far."""


def bars(console: Console) -> Progress:
    """A bar for each stage, with its time so far and an estimate of the time left."""
    name = TextColumn("{task.description:<32}", markup=False)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(name, BarColumn(), _DoneColumn(), *times, console=console)


class _DoneColumn(MofNCompleteColumn):
    """What is done and all, with the unit of the task, as "3/8 blocks"."""

    def render(self, task: Task) -> Text:
        return super().render(task).append(_unit_of(task))


class ProgressLines(Progress):
    """Progress for a console that is not a terminal: a line when a stage starts, at intervals, and when it is done.

    Args:
        console: where lines are printed.
        every: least number of seconds between two lines of a stage.
    """

    def __init__(self, console: Console, every: float = SECONDS_BETWEEN_LINES) -> None:
        super().__init__(console=console, disable=True)
        self._every = every
        self._ended = threading.Event()
        self._first: dict[TaskID, float] = {}
        self._last_line = 0.0
        self._thread = threading.Thread(target=self._print_at_intervals, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        task = super().add_task(description, *args, **fields)
        self._first[task] = self._tasks[task].completed
        self._print(f"{description} ...")
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:  # type: ignore[override]
        task = self._tasks[task_id]
        was_finished = task.finished
        super().update(task_id, **fields)
        if task.finished and not was_finished:
            self._print(f"{task.description}: done in {_duration(task.elapsed or 0.0)}")

    def _print_at_intervals(self) -> None:
        while not self._ended.wait(self._every / 10):
            running = [task for task in list(self.tasks) if not task.finished]
            if running and self._is_time(running[-1]):
                self._print(self._state(running[-1]))

    def _is_time(self, task: Task) -> bool:
        return time.monotonic() - self._last_line >= max(self._every, (task.elapsed or 0.0) / MOST_LINES)

    def _state(self, task: Task) -> str:
        """For example "prune: 3 of 30 blocks, 12 s so far, about 1:48 left"."""
        spent = task.elapsed or 0.0
        parts, total = [f"{_duration(spent)} so far"], task.total or 1
        if total > 1:
            parts.insert(0, f"{task.completed:,.0f} of {total:,.0f}{_unit_of(task)}")
        done = task.completed - self._first[task.id]
        if total > 1 and done > 0:
            parts.append(f"about {_duration(spent * (total - task.completed) / done)} left")
        return f"{task.description}: {', '.join(parts)}"

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


def progress_bar(progress: Progress, label: str, unit: str) -> Callable[..., None]:
    """Add a bar. Returns the callback (done, total, ...) that moves it.

    Args:
        progress: shows the bar.
        label: what is done.
        unit: what is counted, in the plural.
    """
    task = progress.add_task(label, total=None, unit=unit)

    def move(done: float, total: float, *_: object) -> None:
        progress.update(task, completed=done, total=total)

    return move


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[None]:
    """Show a stage without steps, which is done if the block succeeds."""
    task = progress.add_task(name, total=1)
    yield
    progress.update(task, completed=1)


def _unit_of(task: Task) -> str:
    """The unit of a task's counts with a space before it; nothing for a task without a unit."""
    unit = task.fields.get("unit")
    return f" {unit}" if unit else ""


def _duration(seconds: float) -> str:
    """Seconds as text: "8.0 s", "1:05" or "2:01:05"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
