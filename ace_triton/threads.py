"""The number of threads of torch and the compiled library: one for small work, never more than usable processors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMALL_WORK = 2**26
"""Multiply-adds that take one thread about a millisecond. Splitting less work over threads gains little. It can cost a
scheduler time slice at every barrier, if another process occupies the core of one thread."""

CHOLESKY_BLOCK = 64
"""Columns per operation of LAPACK's blocked Cholesky factorization."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """Use one thread inside the context if the work is small; restore the number of threads afterwards.

    The setting applies to torch and the compiled library, in the Python thread that enters the context. A thread that
    starts during the context keeps the lower number.

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
    """Multiply-adds of the largest operation in a forward of ``tokens`` tokens: the product with the largest weight."""
    return tokens * max((parameter.numel() for parameter in model.parameters() if parameter.dim() > 1), default=0)


def cholesky_work(width: int) -> int:
    """Multiply-adds of one step of the Cholesky factorization of a matrix [width, width]."""
    return CHOLESKY_BLOCK * width * width


def respect_processors() -> None:
    """Limit the number of threads to the usable processors, unless the user has set a number of threads.

    torch counts all processors and ignores the CPU quota of a container.
    """
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return
    processors = usable_processors()
    if torch.get_num_threads() > processors:
        torch.set_num_threads(processors)


def usable_processors(root: Path = Path("/")) -> int:
    """Number of processors that this process may use: by its affinity and, on Linux, the CPU quotas of its cgroups.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    counted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([counted, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process's control groups (cgroups) and their parents, in processors."""
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
    """The text of the file; "" if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
