"""The pool of threads of the compiled library: forks, several Python threads, changing numbers of threads, and exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ace_triton.kernels import cpu, cpu_library
from ace_triton.kernels.backend import interpreting

pytestmark = pytest.mark.skipif(interpreting() or not cpu_library.available(), reason="for the compiled library")


@pytest.fixture
def product() -> Iterator[Callable[[int], torch.Tensor]]:
    """A product with a given number of threads; large enough that all of them get a share."""
    generator = torch.Generator().manual_seed(0)
    weight, tokens = (torch.randn(n, 2048, generator=generator) for n in (1024, 3))
    before = torch.get_num_threads()
    assert cpu_library.library().ace_threads_for(2 * weight.nbytes, 1024, 4) == 4

    def multiply(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return cpu.dense_linear(tokens, weight)

    yield multiply
    torch.set_num_threads(before)


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def test_results_do_not_depend_on_the_number_of_threads(product):
    alone = product(1)
    for threads in (4, 2, 7, 1, 3):
        assert torch.equal(product(threads), alone)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_threads_are_kept_between_calls(product):
    product(4)
    there = threads_of_process()
    for _ in range(20):
        product(4)
        product(2)
    assert threads_of_process() == there


def test_several_python_threads_at_once(product):
    expected, found = product(3), []
    started = threading.Barrier(4)

    def run() -> None:
        started.wait()
        found.extend(torch.equal(cpu_product(), expected) for _ in range(5))

    def cpu_product() -> torch.Tensor:
        return product(3)

    callers = [threading.Thread(target=run) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_threads_of_its_own(product):
    expected = product(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(3), expected) and torch.equal(product(2), expected) else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child waits for threads that it does not have")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert torch.equal(product(3), expected)


def test_the_process_ends_while_threads_wait():
    script = (
        "import torch; from ace_triton.kernels import cpu; torch.set_num_threads(3); "
        "cpu.dense_linear(torch.ones(1, 2048), torch.ones(1024, 2048)); print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
