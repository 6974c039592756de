"""Small work runs on one thread, and there are never more threads than usable processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ace_triton import prune_linear, prune_model, threads
from ace_triton.command_environment import is_command, set_environment
from ace_triton.evaluate import perplexity
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.recovery.train import recover
from ace_triton.threads import few_threads, forward_work, respect_processors, usable_processors

ROOT = Path(__file__).parents[1]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of(monkeypatch, owner: object, name: str) -> list[int]:
    """A list that gets the number of threads of each later call of a function."""
    found, function = [], getattr(owner, name)

    def watched(*arguments, **named):
        found.append(torch.get_num_threads())
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)
    return found


def test_little_work_takes_one_thread_and_gives_the_others_back(three_threads):
    with few_threads(2**26 - 1):
        assert torch.get_num_threads() == 1
        with few_threads(2**40):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    with few_threads(2**26):
        assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), few_threads(0):
        _ = 1 // 0
    assert torch.get_num_threads() == 3


def test_the_work_of_a_forward_is_its_largest_product():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4), torch.nn.LayerNorm(1000))
    assert forward_work(model, 10) == 10 * 8 * 16
    assert forward_work(torch.nn.LayerNorm(4), 10) == 0


@pytest.mark.parametrize(("method", "update"), [("wanda", "lstsq"), ("sparsegpt", None), ("wanda", "rescale")])
def test_the_fit_of_a_small_layer_runs_on_one_thread(monkeypatch, three_threads, method, update):
    fits = threads_of(monkeypatch, sys.modules["ace_triton.prune"], "_solve")
    prune_linear(torch.nn.Linear(64, 32), torch.randn(100, 64), method, update=update)
    assert fits == [1]
    assert torch.get_num_threads() == 3


def test_a_small_model_is_calibrated_read_and_recovered_on_one_thread(monkeypatch, three_threads, tiny_model, ids):
    found = threads_of(monkeypatch, torch.nn.functional, "linear")
    teacher = type(tiny_model)(tiny_model.config)
    prune_model(tiny_model, ids, "wanda", update="lstsq")
    perplexity(tiny_model, ids.flatten(), length=16)
    recover(tiny_model, teacher, ids, RecoverySettings(steps=1, forward_dtype=torch.float32))
    assert set(found) == {1}
    assert torch.get_num_threads() == 3


def test_large_matrices_are_factored_on_all_threads(three_threads):
    assert threads.cholesky_work(1024) >= threads.SMALL_WORK > threads.cholesky_work(1023)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({}, 8),
    ],
)
def test_processors_are_those_of_the_affinity_and_the_quotas(monkeypatch, tmp_path, files, most):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_processors(tmp_path) == most


def test_the_command_line_takes_no_more_threads_than_processors(monkeypatch, three_threads):
    monkeypatch.setattr(threads, "usable_processors", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    respect_processors()
    assert torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("MKL_NUM_THREADS", "")
    respect_processors()
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "usable_processors", lambda: 64)
    respect_processors()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("argv", "original", "command"),
    [
        (["/usr/bin/ace-triton", "prune"], ["python", "/usr/bin/ace-triton", "prune"], True),
        (["C:/Scripts/ace-triton.exe"], ["python", "C:/Scripts/ace-triton.exe"], True),
        (["C:/Scripts/ace-triton-script.py"], ["python", "C:/Scripts/ace-triton-script.py"], True),
        (["-m", "info", "x"], ["python", "-X", "dev", "-m", "ace_triton", "info", "x"], True),
        (["-m"], ["python", "-Imace_triton"], True),
        (["-m", "ace_triton"], ["python", "-m", "pytest", "ace_triton"], False),
        (["-m"], ["python", "-m", "other_ace_triton"], False),
        (["train.py", "ace-triton"], ["python", "train.py", "ace-triton"], False),
        (["-c"], ["python", "-c", "import ace_triton"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_line_changes_its_environment(argv, original, command):
    assert is_command(argv, original) == command
    environment: dict[str, str] = {}
    set_environment(argv, original, environment)
    assert environment == ({"OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"} if command else {})


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_variables_of_the_user_stay(variable):
    environment = {variable: "1", "TQDM_DISABLE": "0"}
    set_environment(["ace-triton"], ["python", "ace-triton"], environment)
    assert environment == {variable: "1", "TQDM_DISABLE": "0"}


def test_the_variables_are_set_before_torch_is_imported():
    code = (
        "import sys, os; sys.argv[:] = ['/bin/ace-triton']\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'torch': return\n"
        "        print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('TQDM_DISABLE'))\n"
        "        sys.exit()\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import ace_triton"
    )
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TQDM_DISABLE")
    unset = {name: value for name, value in os.environ.items() if name not in variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unset, capture_output=True, text=True)
    assert done.stdout == "PASSIVE 1\n", done.stderr
