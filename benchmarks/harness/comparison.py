"""Times several implementations of one operation in turn, with pytest-benchmark's fixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ace_triton.timing import Seconds

from .gate import Verdict
from .results import OURS, Outcome, Result, Setting
from .timer import Stopwatch

FEWEST_ROUNDS, MOST_ROUNDS = 2, 20
WALL_ROUNDS = 3
STAGES = ("calibration", "statistics", "select", "total")


@dataclass(frozen=True)
class Provider:
    """An implementation and its name."""

    name: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """What to time.

    Attributes:
        op: operation and variant.
        shape, dtype: shape and dtype of the weight or the tokens; for a whole model, the shape is its name.
        ours: the call to time.
        others: implementations to compare with.
        least_bytes: the fewest bytes that the operation can move; 0 if its time does not depend on them.
        check: runs all implementations on the input that is timed, and raises Disagreement if results differ.
        restore: restores the input; runs untimed before every call.
    """

    op: str
    shape: Sequence[int | str]
    dtype: torch.dtype
    ours: Callable[[], object]
    others: tuple[Provider, ...]
    least_bytes: int
    check: Callable[[], None]
    restore: Callable[[], object] = lambda: None


def time_in_turn(
    benchmark: Any, comparison: Comparison, stopwatch: Stopwatch, setting: Setting, verdict: Verdict, budget: float
) -> Outcome:
    """Check all implementations, then time them in alternating rounds (A B A B), ours by pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture.
        comparison: what to time.
        stopwatch: times the others, with the same clock as pytest-benchmark.
        setting: recorded with every result.
        verdict: result of the operation's tests.
        budget: seconds for all rounds together; FEWEST_ROUNDS run even if they take longer.

    Raises:
        Disagreement: if the check fails; nothing is timed then.
    """
    start = time.perf_counter()
    comparison.check()
    checked = time.perf_counter() - start
    providers = (Provider(OURS, comparison.ours), *comparison.others)

    def spent(provider: Provider) -> float:
        comparison.restore()
        return stopwatch.time(provider.call)

    rounds = FEWEST_ROUNDS
    if checked < budget:
        once = sum(spent(provider) for provider in providers)
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(budget / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {provider.name: [] for provider in providers}

    def others_first() -> None:
        for provider in comparison.others:
            seconds[provider.name].append(spent(provider))
        comparison.restore()
        stopwatch.flush()

    benchmark.pedantic(comparison.ours, setup=others_first, rounds=rounds)
    seconds[OURS] = list(benchmark.stats.stats.data)
    results = tuple(
        Result.of(
            comparison.op,
            provider.name,
            comparison.shape,
            comparison.dtype,
            seconds[provider.name],
            comparison.least_bytes,
            verdict,
            setting,
            _wall(provider, comparison, stopwatch),
        )
        for provider in providers
    )
    outcome = Outcome(results)
    benchmark.extra_info |= {
        "bytes": comparison.least_bytes,
        "GB/s": round(results[0].bandwidth, 1),
        "wall": results[0].wall,
        "seconds of others": {result.provider: result.p50 for result in results[1:]},
        "times faster than": outcome.speedups,
        "tests": verdict,
    }
    return outcome


def time_stages_in_turn(
    benchmark: Any,
    what: str,
    shape: Sequence[str],
    dtype: torch.dtype,
    ours: Callable[[], Seconds],
    theirs: Callable[[], Seconds],
    setting: Setting,
    verdict: Verdict,
) -> list[Outcome]:
    """Time whole runs in turn; one outcome for every stage, in the wall-clock seconds that the runs report."""
    reported: dict[str, list[Seconds]] = {OURS: [], "published": []}
    benchmark.pedantic(
        lambda: reported[OURS].append(ours()),
        setup=lambda: reported["published"].append(theirs()),
        rounds=FEWEST_ROUNDS,
    )
    by_wall = replace(setting, evidence=setting.evidence.replace("CPU time", "wall time").replace("GPU", "wall"))
    return [
        Outcome(
            tuple(
                Result.of(
                    f"{'score and mask' if stage == 'select' else stage} of {what}",
                    provider,
                    shape,
                    dtype,
                    [getattr(seconds, stage) for seconds in runs],
                    0,
                    verdict,
                    by_wall,
                )
                for provider, runs in reported.items()
            )
        )
        for stage in STAGES
    ]


def _wall(provider: Provider, comparison: Comparison, stopwatch: Stopwatch) -> float:
    """Median wall time on a GPU; 0 on a CPU, where the CPU time of one thread is the same and steadier."""
    if stopwatch.device.type != "cuda":
        return 0.0
    walls = []
    for _ in range(WALL_ROUNDS):
        comparison.restore()
        walls.append(stopwatch.wall(provider.call))
    return sorted(walls)[len(walls) // 2]
