"""Perplexity against time: a point for everything that was measured, and which of them no other beats."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .cells import Variant
from .tally import Spread, Tally


@dataclass(frozen=True)
class Point:
    """One method with what is added to it, at one calibration length.

    Attributes:
        variant: the method.
        length: of a calibration sequence; None where the method looks at none.
        perplexity: over seeds.
        cpu_seconds: of pruning and recovery, the median over seeds.
        seconds: the same by the clock on the wall.
        dominated: another point is no slower and no worse, and one of both better.
    """

    variant: Variant
    length: int | None
    perplexity: Spread
    cpu_seconds: float
    seconds: float
    dominated: bool


def curve(tally: Tally, sparsity: str, window_length: int) -> list[Point]:
    """The points at a sparsity, from fast to slow; empty where nothing was measured over such windows."""
    measured = []
    for variant in tally.everything:
        for length in tally.lengths if variant.calibrated else [None]:
            found = [f for f in tally.select(variant, sparsity, length) if f.cell.length == length]
            spread = Spread.of(map(tally.over(window_length), found))
            if spread is not None:
                cpu = statistics.median(f.cpu_seconds_in_all for f in found)
                wall = statistics.median(f.seconds_in_all for f in found)
                measured.append((cpu, spread.mean, Point(variant, length, spread, cpu, wall, dominated=False)))
    points = []
    for cpu, mean, point in sorted(measured, key=lambda entry: entry[:2]):
        beaten = any(c <= cpu and m <= mean and (c, m) != (cpu, mean) for c, m, _ in measured)
        points.append(Point(point.variant, point.length, point.perplexity, cpu, point.seconds, beaten))
    return points


def frontier(points: list[Point]) -> list[Point]:
    """Those that no other dominates, from fast to slow: perplexity falls along them."""
    return [point for point in points if not point.dominated]


def curved_sparsities(tally: Tally) -> list[str]:
    """The sparsities at which more than metrics alone was measured."""
    return [s for s in tally.sparsities if any(tally.select(variant, s) for variant in tally.recipes)]
