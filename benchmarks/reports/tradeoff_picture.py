"""docs/images/tradeoff.svg: perplexity against size and speed, from the content of docs/tradeoff.json."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .drawing import Scale, circle, cross, front, front_corners, grid, legend, opening, text
from .labels import Box, Label, Segment, placed
from .tradeoff_points import SPEED_WORDS, Cost, Point, front_of, points_of, shown_speeds, size_cost, speed_cost

LEAST_FORMS = 4
"""A model with fewer measured forms is not drawn."""

WIDTH, ROW, TITLE = 1000, 480, 60
PANELS = ((62, 484), (550, 972))
TOP, BOTTOM = 58, 50
"""Free space above and below the plots of a model."""

PERPLEXITIES = (5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
BYTE_TICKS = (0.125, 0.25, 0.5, 1, 2, 4)
SPEED_TICKS = (0.5, 1, 2, 4, 8, 16)
NOTE = 26
"""Height of the line that names the models left out."""

Value = Callable[[Point], float]


def picture(content: dict[str, Any]) -> str:
    """The picture: one row for each model with enough forms, the same for the same records."""
    measured = {name: points_of(found, shown_speeds(content, found)) for name, found in content["models"].items()}
    models = {name: points for name, points in measured.items() if len(points) >= LEAST_FORMS}
    left_out = {name: len(points) for name, points in measured.items() if name not in models}
    height = TITLE + ROW * len(models) + (NOTE if left_out else 0)
    described = ". ".join(
        f"{name}: on the front of size {'; '.join(f'{p.form} {p.perplexity:.1f}' for p in front_of(points, size_cost))}"
        for name, points in models.items()
    )
    title = "Prune, quantize, or both: perplexity against size and speed"
    parts = [*opening(title, described, WIDTH, height), *_legend()]
    for row, (name, points) in enumerate(models.items()):
        parts += _row(name, points, content.get("shown"), TITLE + row * ROW)
    if left_out:
        parts.append(text(20, height - 12, _left_out(left_out), "quiet"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _left_out(models: Mapping[str, int]) -> str:
    counts = "; ".join(f"{name}, {count} measured" for name, count in models.items())
    return f"Not drawn, since fewer than {LEAST_FORMS} forms are measured: {counts}"


def _row(name: str, points: Sequence[Point], machine: str | None, start: float) -> Iterable[str]:
    perplexities = [point.perplexity for point in points]
    up = Scale(0.6 * min(perplexities), 1.3 * max(perplexities), start + ROW - BOTTOM, start + TOP)
    yield text(20, start + 24, name, "title")
    sizes = [point.size for point in points]
    across = Scale(0.6 * min(sizes), 1.4 * max(sizes), *PANELS[0])
    yield from _panel(points, lambda point: point.size, across, up, BYTE_TICKS, "bytes a weight", size_cost)
    timed = [point for point in points if point.faster is not None]
    if not timed:
        yield text(sum(PANELS[1]) / 2, start + ROW / 2, "speeds: not measured yet", "quiet", "middle")
        return
    yield text(PANELS[1][1], start + 24, f"speeds: {machine}", "quiet", "end")
    speeds = [faster_of(point) for point in timed]
    across = Scale(0.7 * min(speeds), 1.3 * max(speeds), *PANELS[1])
    yield from _panel(timed, faster_of, across, up, SPEED_TICKS, f"{SPEED_WORDS}, one thread", speed_cost)


def faster_of(point: Point) -> float:
    """Tokens a second over those of the dense model in float32."""
    assert point.faster is not None
    return point.faster


def _panel(
    points: Sequence[Point], value: Value, across: Scale, up: Scale, ticks: Sequence[float], words: str, cost: Cost
) -> Iterable[str]:
    yield from grid(across, up, ticks, PERPLEXITIES)
    yield text(across.start - 42, up.end - 9, "perplexity", "quiet")
    yield text((across.start + across.end) / 2, up.start + 38, words, "quiet", "middle")
    best = front_of(points, cost)
    places = [(across(value(point)), up(point.perplexity)) for point in best]
    corners = front_corners(places)
    yield front(places[0], corners)
    stairs = list(itertools.pairwise([places[0], *corners]))
    for label in names(points, value, across, up, stairs):
        yield from label.drawn()
    for point in points:
        x, y = across(value(point)), up(point.perplexity)
        if point.pruned:
            yield circle(x, y, *(("ours", 5) if point in best else ("beaten", 4)))
        else:
            yield cross(x, y)


def names(points: Sequence[Point], value: Value, across: Scale, up: Scale, stairs: Sequence[Segment]) -> list[Label]:
    """The names of all forms, as in the tables, inside the plot and off the front."""
    marks = [(across(value(point)), up(point.perplexity), str(point.form)) for point in points]
    return placed(marks, Box(across.start, up.end, across.end, up.start), stairs)


def _legend() -> Iterable[str]:
    return legend(
        (
            ('<path class="theirs" d="M{a} 45l9 9m0 -9l-9 9"/>', "not pruned"),
            ('<circle class="ours" cx="{x}" cy="49.5" r="5"/>', "pruned, on the Pareto front"),
            ('<circle class="beaten" cx="{x}" cy="49.5" r="4"/>', "pruned, beaten by another"),
        )
    )
