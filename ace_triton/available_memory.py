"""How much memory this process can still allocate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_UNLIMITED = 2**60
"""A limit of a control group above this is no limit."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate without swapping. A lower limit of its control group counts.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    return min([_of_the_machine(root), *_of_control_groups(root)])


def _of_the_machine(root: Path) -> int:
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import psutil  # Systems other than Linux have no meminfo.

    return int(psutil.virtual_memory().available)


def _of_control_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups (cgroups) and their parents leave, in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.lstrip("/"))
        if number == "0":  # version 2
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # The root group has no limit; another may not be visible.
                allowed = int((top / folder / limit).read_text())
                if allowed < _UNLIMITED:
                    used = int((top / folder / usage).read_text()) - _file_pages(top / folder)
                    yield max(0, allowed - max(0, used))


def _file_pages(folder: Path) -> int:
    """Bytes of file pages that a control group can drop at once."""
    kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(kinds.get("inactive_file", 0)) + int(kinds.get("active_file", 0))
