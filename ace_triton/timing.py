"""Measures how much time a run spends in each stage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

Stage = Literal["calibration", "statistics", "rotate", "permute", "select", "update", "quantize", "block_fit"]

MOST_EVENTS = 4096
"""Largest number of unread CUDA events."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of a run by stage.

    Attributes:
        load: loading the model; 0 if it was loaded before the run.
        calibration: forwards of the model and its blocks.
        statistics: computing the statistics that the metric needs from inputs and outputs.
        select: computing scores and masks.
        total: the whole run, including time outside all stages.
        permute: finding which channels can be reordered, and searching for their order.
        update: updating the kept weights, including the masks chosen during the update.
        block_fit: training the kept weights of each pruned block, with the forwards that this needs.
        rotate: finding which values can be rotated, and learning the rotations, without the forwards.
        quantize: rounding the kept weights.
    """

    load: float
    calibration: float
    statistics: float
    select: float
    total: float
    permute: float = 0.0
    update: float = 0.0
    block_fit: float = 0.0
    rotate: float = 0.0
    quantize: float = 0.0

    @property
    def other(self) -> float:
        """The time outside all stages: making batches, finding blocks, writing files."""
        stages = asdict(self)
        return max(stages.pop("total") - sum(stages.values()), 0.0)

    def to_dict(self) -> dict[str, float]:
        """As JSON types; all but the total sum to the total."""
        return {**asdict(self), "other": self.other}


@dataclass(frozen=True)
class Moment:
    """A point in time.

    Attributes:
        wall: seconds of the wall clock.
        cpu: CPU seconds of the process, all threads together.
    """

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        """The present."""
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> tuple[float, float]:
        """Wall-clock seconds and CPU seconds since then."""
        now = Moment.now()
        return now.wall - self.wall, now.cpu - self.cpu


class Stopwatch:
    """Adds the elapsed time to the innermost open stage, so nested stages are not counted twice.

    On a CUDA device, events on the current stream mark the start and end of a stage's kernels. The host waits for the
    device only in :meth:`seconds`, or if there are more than MOST_EVENTS unread events.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._seconds: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._open: list[Stage] = []
        self._events: deque[tuple[Stage | None, torch.cuda.Event]] = deque()
        self._start = Moment.now()
        self._last = self._start.wall

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Add the time spent inside to ``stage``."""
        self._record()
        self._open.append(stage)
        try:
            yield
        finally:
            self._record()
            self._open.pop()

    def seconds(self) -> Seconds:
        """The seconds spent so far."""
        self._read_events(1)
        return Seconds(load=0.0, **self._seconds, total=self._start.since()[0])

    def cpu_seconds(self) -> float:
        """The CPU seconds of the process so far, all threads together."""
        return self._start.since()[1]

    def _record(self) -> None:
        stage = self._open[-1] if self._open else None
        if self._device is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append((stage, event))
            if len(self._events) > MOST_EVENTS:
                self._read_events(MOST_EVENTS // 2)
            return
        now = time.perf_counter()
        if stage is not None:
            self._seconds[stage] += now - self._last
        self._last = now

    def _read_events(self, keep: int) -> None:
        """Add the time between the oldest events to their stages, until ``keep`` events are left."""
        while len(self._events) > keep:
            _, start = self._events.popleft()
            stage, end = self._events[0]
            end.synchronize()
            if stage is not None:
                self._seconds[stage] += start.elapsed_time(end) / 1000
