"""What to take for this model: the best recipe at each sparsity, its cost, and the commands that run it."""

from __future__ import annotations

from dataclasses import dataclass

from .command_line import commands_of
from .comparison import FEWEST_PAIRS, compare
from .curve import Point, curve
from .tables import shown_point, shown_spread, shown_times
from .tally import Tally, shown_sparsity

NEARLY = 1.05
"""Perplexity over the best's that still counts as nearly as good."""

MOST_TIME = 0.5
"""CPU time over the best's up to which a nearly as good recipe is worth naming."""

MOST_NAMED = 4
"""Recipes without a clear difference that are named; further ones are counted."""


@dataclass(frozen=True)
class Choice:
    """A recipe to take.

    Attributes:
        wanted: for what, as "Lowest perplexity".
        name: the recipe.
        figures: its perplexity and cost, in words.
        commands: what runs it.
    """

    wanted: str
    name: str
    figures: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """The choices at one sparsity, and how sure they are."""

    sparsity: str
    choices: tuple[Choice, ...]
    note: str


def advice(tally: Tally, sparsity: str) -> Advice | None:
    """What to take at a sparsity; None if nothing was measured that a command can run."""
    points = [p for p in curve(tally, sparsity, tally.results.setting.window_length) if not p.variant.published]
    if not points:
        return None
    best = _lowest(points)
    quick = [point for point in points if point.variant.minutes is None]
    choices = [("Lowest perplexity", best)]
    if best.variant.minutes is not None and quick:
        choices.append(("Lowest perplexity without recovery", _lowest(quick)))
    chosen = choices[-1][1]
    near = [
        point
        for point in points
        if point.perplexity.mean <= NEARLY * chosen.perplexity.mean
        and point.cpu_seconds <= MOST_TIME * chosen.cpu_seconds
    ]
    if near:
        choices.append((f"At most {NEARLY - 1:.0%} more perplexity in less time", near[0]))
    return Advice(
        shown_sparsity(sparsity),
        tuple(_choice(tally, sparsity, wanted, point) for wanted, point in choices),
        _note(tally, sparsity, best, [point for point in points if point is not best]),
    )


def _lowest(points: list[Point]) -> Point:
    return min(points, key=lambda point: point.perplexity.mean)


def _choice(tally: Tally, sparsity: str, wanted: str, point: Point) -> Choice:
    times = shown_times(tally, point.perplexity.mean)
    figures = [
        f"perplexity {shown_spread(point.perplexity)}",
        *([f"{times} times the dense model's"] if times else []),
        f"{_duration(point.cpu_seconds)} of CPU time",
    ]
    commands = commands_of(tally.results.setting, point.variant.at(sparsity, point.length, 0))
    return Choice(wanted, shown_point(tally, point), "; ".join(figures), commands)


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _note(tally: Tally, sparsity: str, best: Point, others: list[Point]) -> str:
    """Which other recipes the study cannot tell from the best one."""
    seeds = len(best.perplexity.values)
    if best.variant.recipe.calibrated and seeds < FEWEST_PAIRS:
        count = "a single seed" if seeds == 1 else f"{seeds} seeds"
        return (
            f"The first rests on {count}: differences of a few percent may be noise. Run the study with --seeds "
            f"{FEWEST_PAIRS} or more."
        )
    found = {
        shown_point(tally, point): compare(tally, point.variant, best.variant, sparsity, length=best.length)
        for point in others
        if point.length == best.length
    }
    compared = {name: comparison for name, comparison in found.items() if comparison is not None}
    if not compared:
        return ""
    unclear = [name for name, comparison in compared.items() if not (comparison.clear and comparison.change > 0)]
    if not unclear:
        return "Over the same seeds, every other recipe of this calibration length is clearly worse than the first."
    named = "; ".join(unclear[:MOST_NAMED])
    further = f"; and {len(unclear) - MOST_NAMED} more" if len(unclear) > MOST_NAMED else ""
    return f"Not clearly worse than the first over the same seeds: {named}{further}."
