"""The time of a run by stage."""

from __future__ import annotations

import pytest
import torch

from ace_triton import timing
from ace_triton.timing import Stopwatch


class Device:
    """A fake GPU that runs behind the host. It has its own clock, and events record the time of that clock."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def event(self, enable_timing: bool):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: object) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        self.device.waits += 1

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000


@pytest.fixture
def gpu(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return device


def run(clock: Stopwatch, gpu: Device) -> None:
    with clock.measure("calibration"):
        gpu.now += 1
        with clock.measure("statistics"):
            gpu.now += 2
        gpu.now += 4
    gpu.now += 8
    with clock.measure("select"):
        gpu.now += 16


def test_the_host_waits_for_the_gpu_only_at_the_end(gpu):
    clock = Stopwatch(torch.device("cuda"))
    run(clock, gpu)
    assert gpu.waits == 0
    seconds = clock.seconds()
    assert (seconds.calibration, seconds.statistics, seconds.select, seconds.permute) == (5, 2, 16, 0)
    run(clock, gpu)
    assert clock.seconds().statistics == 4


def test_events_do_not_pile_up(gpu, monkeypatch):
    monkeypatch.setattr(timing, "MOST_EVENTS", 8)
    clock = Stopwatch(torch.device("cuda"))
    for _ in range(50):
        run(clock, gpu)
        assert len(clock._events) <= 8
    assert clock.seconds().calibration == 250


def test_a_cpu_is_timed_by_its_clock(monkeypatch):
    gpu = Device()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.now)
    clock = Stopwatch(torch.device("cpu"))
    run(clock, gpu)
    seconds = clock.seconds()
    assert (seconds.calibration, seconds.statistics, seconds.select, seconds.total) == (5, 2, 16, 31)
