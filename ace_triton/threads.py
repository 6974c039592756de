"""How many threads torch and the compiled library use: few for little work, none beyond the processors there are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMALL_WORK = 2**26
"""Multiply-adds of an operation that takes a thread about a millisecond. Sharing less among threads gains little, and
loses a scheduler's time slice at every barrier if another process has the core of one of the threads."""

CHOLESKY_BLOCK = 64
"""Columns of a matrix that LAPACK's Cholesky factorization takes at a time: an operation each."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """Inside, torch and the compiled library use one thread if the work is small; afterwards as many as before.

    The number belongs to the Python thread that enters. A thread that starts meanwhile keeps the lower number.

    Args:
        work: multiply-adds of the largest operation inside.
    """
    before = torch.get_num_threads()
    if before == 1 or work >= SMALL_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward_work(model: torch.nn.Module, tokens: int) -> int:
    """Multiply-adds of the largest operation of a forward of ``tokens`` tokens: its product with the largest weight."""
    return tokens * max((parameter.numel() for parameter in model.parameters() if parameter.dim() > 1), default=0)


def cholesky_work(width: int) -> int:
    """Multiply-adds of a step of the Cholesky factorization of a matrix [width, width]."""
    return CHOLESKY_BLOCK * width * width


def respect_processors() -> None:
    """Take no more threads than this process may use processors at once, unless the user has set a number.

    torch counts processors, not what share of them a container's quota allows.
    """
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return
    processors = usable_processors()
    if torch.get_num_threads() > processors:
        torch.set_num_threads(processors)


def usable_processors(root: Path = Path("/")) -> int:
    """Processors of this process by its affinity and, on Linux, the CPU quotas of its control groups.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    counted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([counted, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group of this process, or one above it, allows."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            if number == "0":  # version 2
                quota, _, period = _text(root / "sys/fs/cgroup" / folder / "cpu.max").partition(" ")
            elif "cpu" in controllers.split(","):
                version_1 = root / "sys/fs/cgroup/cpu" / folder
                quota, period = _text(version_1 / "cpu.cfs_quota_us"), _text(version_1 / "cpu.cfs_period_us")
            else:
                break
            if quota.strip().isdigit() and period.strip().isdigit() and int(period):
                yield int(quota) / int(period)


def _text(file: Path) -> str:
    """What the file says; "" if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
