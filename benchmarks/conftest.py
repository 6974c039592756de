"""What all benchmarks share: one core on a CPU, device time on a GPU, and the file of results.

--bench-device cpu|cuda   where to run; default: the GPU if there is one
--results FILE            append every figure to FILE
--budget SECONDS          time for all rounds of a comparison; default: 3
--tiny                    use small inputs: a dry run, marked as such
--tested FILE             JUnit report of tests that ran just before on that device; without it every
                          benchmark runs the tests of its operation first
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ace_triton.timing import Seconds
from benchmarks.harness.comparison import Comparison, time_in_turn, time_stages_in_turn
from benchmarks.harness.gate import Gate, ReadReport, RunTests, Verdict, verdict_of
from benchmarks.harness.matrices import SHAPE, TINY_SHAPE, Matrix
from benchmarks.harness.results import Outcome, Setting, append
from benchmarks.harness.timer import Stopwatch
from benchmarks.reports.report_bench import outcome_table

Compare = Callable[[Comparison], Outcome]
CompareStages = Callable[[str, tuple[str, ...], torch.dtype, Callable[[], Seconds], Callable[[], Seconds]], None]

_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("side by side")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--results", type=Path, default=None)
    group.addoption("--budget", type=float, default=3.0)
    group.addoption("--tiny", action="store_true")
    group.addoption("--tested", type=Path, default=None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of `make bench-quick`")
    on_gpu = config.getoption("--bench-device") == "cuda"
    config.option.benchmark_timer = f"benchmarks.harness.timer.{'device_time' if on_gpu else 'cpu_time'}"
    config.stash[_OUTCOMES] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--tiny"):
        seen: set[str] = set()
        inputs = ("shape", "tokens", "matrix")
        for item in items:
            callspec = getattr(item, "callspec", None)
            rest = {} if callspec is None else {k: v for k, v in callspec.params.items() if k not in inputs}
            name = f"{item.location[0]}::{getattr(item, 'originalname', item.name)}{sorted(rest.items())}"
            if name in seen:
                item.add_marker(pytest.mark.skip(reason="a dry run takes one input of each kind"))
            seen.add(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_OUTCOMES]:
        terminalreporter.section("side by side")
        terminalreporter.write_line(outcome_table(config.stash[_OUTCOMES]))


@pytest.fixture(autouse=True, scope="session")
def one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--bench-device"))


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(params=["bfloat16", "float32"], scope="module")
def matrix(request: pytest.FixtureRequest, device: torch.device, tiny: bool) -> Matrix:
    """The weight of LLaMA-7B's down projection, random."""
    return Matrix.random(TINY_SHAPE if tiny else SHAPE, getattr(torch, request.param), device)


@pytest.fixture(scope="session")
def gate(request: pytest.FixtureRequest, device: torch.device) -> Gate:
    report = request.config.getoption("--tested")
    if report is None:
        return RunTests()
    return ReadReport(report, must_name="cuda" if device.type == "cuda" else "")


@pytest.fixture(scope="session")
def stopwatch(device: torch.device) -> Stopwatch:
    return Stopwatch(device)


@pytest.fixture
def verdict(request: pytest.FixtureRequest, gate: Gate) -> Verdict:
    """Result of the tests in the module's TESTS; if they fail, so does the benchmark."""
    found, file = verdict_of(gate, request.module.TESTS)
    if found == "failed":
        pytest.fail(f"{file} fails: the speed of a wrong operation means nothing; make the tests pass first", False)
    return found


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """keep(outcome): add it to the summary and to the file of results."""
    path = request.config.getoption("--results")

    def keep(outcome: Outcome) -> None:
        request.config.stash[_OUTCOMES].append(outcome)
        if path is not None:
            append(path, outcome.results)

    return keep


@pytest.fixture
def compare(benchmark, request, verdict: Verdict, keep, stopwatch: Stopwatch, tiny: bool) -> Compare:
    """compare(comparison): check, time and keep the results."""
    budget = request.config.getoption("--budget")

    def run(comparison: Comparison) -> Outcome:
        setting = Setting.here(stopwatch.device, dry_run=tiny)
        outcome = time_in_turn(benchmark, comparison, stopwatch, setting, verdict, budget)
        keep(outcome)
        return outcome

    return run


@pytest.fixture
def compare_stages(benchmark, verdict: Verdict, keep, device: torch.device, tiny: bool) -> CompareStages:
    """compare_stages(what, shape, dtype, ours, theirs): time whole runs that return seconds by stage."""

    def run(
        what: str,
        shape: tuple[str, ...],
        dtype: torch.dtype,
        ours: Callable[[], Seconds],
        theirs: Callable[[], Seconds],
    ) -> None:
        setting = Setting.here(device, dry_run=tiny)
        for outcome in time_stages_in_turn(benchmark, what, shape, dtype, ours, theirs, setting, verdict):
            keep(outcome)

    return run
