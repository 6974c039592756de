"""How much memory is available: to the machine, or to the control groups of the process if they leave less."""

import psutil
import pytest

from ace_triton.available_memory import available_memory
from ace_triton.streaming.fits import fits_in_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """machine(cgroup, **files): a root folder with 8 GiB available; the other files by their paths below /sys."""

    def make(cgroup: str, files: dict[str, str]):
        content = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n", "proc/self/cgroup": cgroup}
        for path, text in {**content, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return make


def test_a_machine_without_limits(machine):
    assert available_memory(machine("0::/\n", {"memory.max": "max\n"})) == 8 * GIB


def test_the_limit_of_a_group_counts_without_file_pages_that_can_be_dropped(machine):
    files = {
        "a/b/memory.max": f"{4 * GIB}\n",
        "a/b/memory.current": f"{3 * GIB}\n",
        "a/b/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n",
    }
    assert available_memory(machine("0::/a/b\n", files)) == 2 * GIB


def test_the_limit_of_an_outer_group_counts_too(machine):
    outer = {"a/memory.max": str(3 * GIB), "a/memory.current": str(GIB), "a/memory.stat": "inactive_file 0\n"}
    inner = {"a/b/memory.max": "max", "a/b/memory.current": "1", "a/b/memory.stat": "anon 1\n"}
    assert available_memory(machine("0::/a/b\n", {**outer, **inner})) == 2 * GIB


@pytest.mark.parametrize(("limit", "available"), [(5 * GIB, 4 * GIB), (2**63 - 4096, 8 * GIB)])
def test_version_1(machine, limit, available):
    files = {
        "memory/job/memory.limit_in_bytes": str(limit),
        "memory/job/memory.usage_in_bytes": str(GIB),
        "memory/job/memory.stat": "cache 0\n",
    }
    assert available_memory(machine("7:cpu,cpuacct:/job\n4:memory:/job\n", files)) == available


def test_this_machine():
    total = psutil.virtual_memory().total
    assert 0 < available_memory() <= total
    assert fits_in_memory(1)
    assert not fits_in_memory(0.71 * total)
