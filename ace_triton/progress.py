"""Bars that show how far a long call has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress


def progress_bar(progress: Progress, label: str) -> Callable[..., None]:
    """A new bar, as the callback (done, total, ...) that moves it."""
    task = progress.add_task(label, total=None)

    def move(done: int, total: int, *_: object) -> None:
        progress.update(task, completed=done, total=total)

    return move


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[None]:
    """A stage that is either done or not."""
    task = progress.add_task(name, total=1)
    yield
    progress.update(task, completed=1)
