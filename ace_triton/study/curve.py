"""Perplexity against time: a point for every recipe, and the Pareto front."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .cells import Cell
from .tally import Spread, Tally


@dataclass(frozen=True)
class Point:
    """One recipe at one calibration length.

    Attributes:
        variant: the method and what is added to it.
        length: tokens in a calibration sequence; None for a method without calibration.
        perplexity: over seeds.
        cpu_seconds: median CPU seconds of pruning and recovery over seeds.
        seconds: median wall-clock seconds.
        dominated: whether another point is at least as fast and as good, and better in one of the two.
    """

    variant: Cell
    length: int | None
    perplexity: Spread
    cpu_seconds: float
    seconds: float
    dominated: bool


def curve(tally: Tally, sparsity: str, window_length: int) -> list[Point]:
    """The points at a sparsity, from fast to slow; empty if nothing was measured over windows of this length."""
    measured = []
    for variant in tally.everything:
        for length in tally.lengths if variant.recipe.calibrated else [None]:
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
    """The points that are not dominated, from fast to slow; perplexity falls along them."""
    return [point for point in points if not point.dominated]


def curved_sparsities(tally: Tally) -> list[str]:
    """The sparsities with more than metrics alone."""
    return [s for s in tally.sparsities if any(tally.select(variant, s) for variant in tally.recipes)]
