"""Draws the README's picture: perplexity against CPU time at 2:4, from the records in docs/curve, as a small SVG.

python -m benchmarks.reports.readme_picture [--check]

Methods with changed options are left out. Colors follow the reader's light or dark scheme. The picture has a background
of its own, so it is readable on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ace_triton.study.curve import Point, curve
from ace_triton.study.journal import read_results
from ace_triton.study.tally import Tally, shown_variant

from .drawing import Scale, line, opening, text

PICTURE = Path("docs/images/curve.svg")

WIDTH, HEIGHT = 880, 500
LEFT, RIGHT, TOP, BOTTOM = 64, 806, 82, 446
"""The edges of the plot."""

SECONDS = {
    10: "10 s",
    20: "20 s",
    60: "1 min",
    120: "2 min",
    300: "5 min",
    600: "10 min",
    1200: "20 min",
    2400: "40 min",
}
FIRST_SECOND, LAST_SECOND = 2.2, 3600.0
PERPLEXITIES = (30, 40, 50, 70, 100, 150, 200, 300)
LEAST, MOST = 29.0, 330.0
TIMES_DENSE = (1, 2, 3, 4, 6, 8)

LABEL_HEIGHT = 16.0
"""Least distance between two names, in pixels."""

across = Scale(FIRST_SECOND, LAST_SECOND, LEFT, RIGHT)
up = Scale(LEAST, MOST, BOTTOM, TOP)


def picture(tally: Tally) -> str:
    """The SVG, the same for the same records."""
    length, dense = tally.results.setting.window_length, tally.results.dense
    assert dense is not None
    points = [point for point in curve(tally, "2:4", length) if not point.variant.recipe.options]
    front = [point for point in points if not any(_beats(other, point) for other in points)]
    published = [point for point in points if point.variant.published]
    described = ", ".join(
        f"{shown_variant(point.variant)} {point.perplexity.mean:.1f} in {point.cpu_seconds:.0f} s" for point in front
    )
    description = f"Dense {dense.perplexity:.1f}. On the Pareto front: {described}."
    title = "What pruning SmolLM2-135M to 2:4 costs, and what each minute wins back"
    under = f"perplexity on WikiText-2, windows of {length}, against CPU time: lower and further left is better"
    parts = [
        *opening(title, description, WIDTH, HEIGHT),
        text(20, 53, under, "quiet"),
        *_axes(dense.perplexity),
        _front(front),
        *(_bar(point) for point in [*front, *published]),
        *(_mark(point, point in front) for point in points),
        *_names(front, left=True),
        *_names(published, left=False),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _beats(one: Point, other: Point) -> bool:
    """Whether a point is no slower and no worse than another, and not as good in both."""
    mine, theirs = ((point.cpu_seconds, point.perplexity.mean) for point in (one, other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def _axes(dense: float) -> Iterable[str]:
    """Grids and their numbers: seconds below, perplexity on the left, times dense on the right; the dense model."""
    for seconds, words in SECONDS.items():
        yield line(across(seconds), TOP, across(seconds), BOTTOM, "grid")
        yield text(across(seconds), BOTTOM + 20, words, "quiet", "middle")
    for perplexity in PERPLEXITIES:
        yield line(LEFT, up(perplexity), RIGHT, up(perplexity), "grid")
        yield text(LEFT - 9, up(perplexity) + 4.5, str(perplexity), "quiet", "end")
    for times in TIMES_DENSE:
        yield line(RIGHT, up(times * dense), RIGHT + 5, up(times * dense), "lead")
        yield text(RIGHT + 10, up(times * dense) + 4.5, f"{times}\N{MULTIPLICATION SIGN}", "quiet")
    yield text(20, TOP - 8, "perplexity", "quiet")
    yield text(WIDTH - 14, TOP - 8, "times dense", "quiet", "end")
    yield text(
        (LEFT + RIGHT) / 2, BOTTOM + 42, "CPU time of pruning and recovery, all cores together", "quiet", "middle"
    )
    yield line(LEFT, up(dense), RIGHT, up(dense), "dense")
    yield text(LEFT + 10, up(dense) - 7, f"dense: {dense:.1f}", "dense")


def _front(front: Sequence[Point]) -> str:
    """Steps from each point to the next, and on to the edge."""
    path = f"M{across(front[0].cpu_seconds):g} {up(front[0].perplexity.mean):g}"
    for point in front[1:]:
        path += f"H{across(point.cpu_seconds):g}V{up(point.perplexity.mean):g}"
    return f'<path class="front" d="{path}H{RIGHT}"/>'


def _bar(point: Point) -> str:
    """A standard deviation up and down."""
    x, mean, deviation = across(point.cpu_seconds), point.perplexity.mean, point.perplexity.deviation
    kind = "theirs" if point.variant.published else "ours"
    return f'<path class="{kind}" stroke-width="1" d="M{x:g} {up(mean - deviation):g}V{up(mean + deviation):g}"/>'


def _mark(point: Point, best: bool) -> str:
    x, y = across(point.cpu_seconds), up(point.perplexity.mean)
    if point.variant.published:
        return f'<path class="theirs" d="M{x - 4.5:g} {y - 4.5:g}l9 9m0 -9l-9 9"/>'
    return f'<circle class="{"ours" if best else "beaten"}" cx="{x:g}" cy="{y:g}" r="{5 if best else 4}"/>'


def _names(points: Sequence[Point], *, left: bool) -> Iterable[str]:
    """Names and perplexities beside points, moved down if two would touch, with a line to what they name.

    To the left of the front there is room: a point there would be on it.
    """
    ceiling = -math.inf
    named = [shown_variant(point.variant) for point in points]
    for point in sorted(points, key=lambda point: -point.perplexity.mean):
        x, y = across(point.cpu_seconds), up(point.perplexity.mean)
        late = point.variant.minutes is not None
        middle = max(y + 19 if late else y, ceiling + LABEL_HEIGHT)
        ceiling = middle
        name = _after(shown_variant(point.variant), named) if late else shown_variant(point.variant)
        words = f"{name}: {point.perplexity.mean:.1f}"
        end = x + 9 if late else x - 17 if left else x + 17
        if not late:
            yield line(x + (-6 if left else 6), y, end, middle, "lead")
        yield text(end + (-3 if left else 3), middle + 4.5, words, anchor="end" if left else "start")


def _after(name: str, others: Iterable[str]) -> str:
    """What a name has beyond the longest of the others that it begins with."""
    start = max((other for other in others if name.startswith(f"{other}, ")), key=len, default=None)
    return name if start is None else f"+ {name.removeprefix(f'{start}, ')}"


def _legend() -> Iterable[str]:
    x, y = RIGHT - 262, TOP + 24
    for place, (mark, words) in enumerate(
        (
            ('<circle class="ours" cx="{x}" cy="{y}" r="5"/>', "ours, on the Pareto front"),
            ('<circle class="beaten" cx="{x}" cy="{y}" r="4"/>', "ours, beaten by another"),
            ('<path class="theirs" d="M{a} {b}l9 9m0 -9l-9 9"/>', "as the authors' code computes it"),
        )
    ):
        down = y + 20 * place
        yield mark.format(x=x, y=down, a=x - 4.5, b=down - 4.5)
        yield text(x + 14, down + 4.5, words, "quiet")


def main(check: Annotated[bool, typer.Option("--check", help="Fail if the picture is out of date.")] = False) -> None:
    """Write docs/images/curve.svg, or compare."""
    drawn = picture(Tally(read_results(Path("docs/curve"))))
    if check and (not PICTURE.is_file() or PICTURE.read_text() != drawn):
        raise typer.BadParameter(f"{PICTURE} does not show the records of docs/curve: run make picture")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(drawn)


if __name__ == "__main__":
    typer.run(main)
