"""Splits the time of a run over its stages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Stage = Literal["calibration", "statistics", "permute", "select", "update"]

MOST_EVENTS = 4096


@dataclass(frozen=True)
class Seconds:
    """Seconds of a run by stage.

    Attributes:
        load: reading the model; 0 where it was given loaded.
        calibration: forwards of the model and its blocks.
        statistics: reducing inputs and outputs to what the metric needs.
        select: scores and masks.
        total: all of it, and what lies between.
        permute: where channels can be reordered, and the search for their order.
        update: of the kept weights, and the masks chosen on the way.
    """

    load: float
    calibration: float
    statistics: float
    select: float
    total: float
    permute: float = 0.0
    update: float = 0.0


class Stopwatch:
    """Charges every moment to the innermost stage that is open, so nested stages are not counted twice.

    On a CUDA device a stage lasts from its launches' start to their end on the device's current stream, which events
    mark: nothing waits for the device before :meth:`seconds`, or before more than MOST_EVENTS marks are open.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._spent: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._open: list[Stage] = []
        self._marks: deque[tuple[Stage | None, torch.cuda.Event]] = deque()
        self._start = self._last = time.perf_counter()

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Charge the time inside to ``stage``."""
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self) -> Seconds:
        """What was spent so far."""
        self._read_marks(1)
        return Seconds(load=0.0, **self._spent, total=time.perf_counter() - self._start)

    def _charge(self) -> None:
        stage = self._open[-1] if self._open else None
        if self._device is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((stage, event))
            if len(self._marks) > MOST_EVENTS:
                self._read_marks(MOST_EVENTS // 2)
            return
        now = time.perf_counter()
        if stage is not None:
            self._spent[stage] += now - self._last
        self._last = now

    def _read_marks(self, keep: int) -> None:
        """Charge what lies between the oldest marks, until ``keep`` are left."""
        while len(self._marks) > keep:
            _, start = self._marks.popleft()
            stage, end = self._marks[0]
            end.synchronize()
            if stage is not None:
                self._spent[stage] += start.elapsed_time(end) / 1000
