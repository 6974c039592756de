"""Clocks: CPU time of this process, or device time between two events on a GPU's stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSHED_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU."""


@dataclass(frozen=True)
class Instant:
    """A point in a GPU's stream; the difference of two is in seconds, and waits for the later one."""

    event: torch.cuda.Event

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def cpu_time() -> float:
    """Seconds of user and system time of this process, all its threads."""
    return time.process_time()


def device_time() -> Instant:
    """The present point in the GPU's stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return Instant(event)


class Stopwatch:
    """Times calls on one device, on a GPU with an L2 cache that was overwritten before each call.

    The write that overwrites the cache is still running when the call is made. This hides the time to prepare the first
    launch, as in a stream of work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read: Callable[[], Any] = device_time if device.type == "cuda" else cpu_time
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def flush(self) -> None:
        """Overwrite a GPU's L2 cache. Does nothing on a CPU, where a model's weights are larger than the caches."""
        if self._flushed is not None:
            self._flushed.zero_()

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.flush()
        start = self._read()
        call()
        return self._read() - start

    def wall(self, call: Callable[[], object]) -> float:
        """Seconds of one call by the wall clock, from an idle device to an idle device."""
        self.flush()
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
