"""Deals the cells of a study to processes: each takes the next one, and the first process keeps all results.

The first process answers each of the others in a thread, while it measures cells itself. So every result is in the
journal as soon as it is measured, and only one process writes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from ..processes import Processes
from .records import Record


class Dealer:
    """The first process's side: numbers the tasks, and keeps the records of all processes.

    Args:
        processes: this process, which is the first, and the others, each of which has a :class:`Worker`.
        tasks: number of tasks.
        keep: called with each record, by one thread at a time, in the order in which the records arrive.
    """

    def __init__(self, processes: Processes, tasks: int, keep: Callable[[Record], None]) -> None:
        self._processes, self._tasks, self._keep = processes, tasks, keep
        self._lock = threading.Lock()
        self._taken, self._working = 0, set[int]()
        self._failure: Exception | None = None
        self._closed = False
        others = range(1, processes.size)
        self._threads = [threading.Thread(target=self._serve, args=(rank,), daemon=True) for rank in others]

    @property
    def finished(self) -> int:
        """Number of tasks that are finished, in all processes."""
        return self._taken - len(self._working)

    def take(self) -> int | None:
        """The next task's index; None if all are taken. Raises what keeping another process's record raised."""
        if self._failure is not None:
            raise self._failure
        return self._take(self._processes.rank)

    def append(self, record: Record) -> None:
        """Keep a record."""
        with self._lock:
            if not self._closed:
                self._keep(record)

    def __enter__(self) -> Dealer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:  # Others may still measure their last cells.
            for thread in self._threads:
                thread.join()
        with self._lock:
            self._closed = True
        if kind is None and self._failure is not None:
            raise self._failure

    def _take(self, rank: int) -> int | None:
        with self._lock:
            self._working.discard(rank)
            if self._taken == self._tasks or self._failure is not None:
                return None
            self._working.add(rank)
            self._taken += 1
            return self._taken - 1

    def _serve(self, rank: int) -> None:
        try:
            while True:
                record = self._processes.receive(rank)
                if record is not None:
                    self.append(record)
                    continue
                task = self._take(rank)
                self._processes.send(task, to=rank)
                if task is None:
                    return
        except Exception as error:
            self._failure = error


class Worker:
    """The side of any other process.

    Args:
        processes: this process and the others; the first has a :class:`Dealer`.
    """

    finished = 0
    """Known to the first process only."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def take(self) -> int | None:
        """The next task's index; None if all are taken."""
        self._processes.send(None, to=0)
        task: int | None = self._processes.receive(0)
        return task

    def append(self, record: Record) -> None:
        """Send a record to the first process."""
        self._processes.send(record, to=0)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        pass
