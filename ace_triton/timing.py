"""Splits the time of a run over its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Stage = Literal["calibration", "statistics", "permute", "select", "update"]


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

    On a CUDA device every change of stage waits for the device: work is charged to the stage that
    launched it.
    """

    def __init__(self, device: torch.device) -> None:
        self._synchronize = device.type == "cuda"
        self._spent: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._open: list[Stage] = []
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
        return Seconds(load=0.0, **self._spent, total=time.perf_counter() - self._start)

    def _charge(self) -> None:
        if self._synchronize:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self._spent[self._open[-1]] += now - self._last
        self._last = now
