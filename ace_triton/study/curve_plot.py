"""The figure of perplexity against time, and its legend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .cells import Variant
from .curve import Point, frontier
from .drawing import INK, PAPER, SERIES, canvas, drawing
from .plots import LegendEntry, plain_number, series
from .recipe import Recipe
from .tables import shown_point
from .tally import Tally, listed, shown_sparsity

LABEL_HEIGHT = 13.0
"""Least distance between two names at the curve, in points."""


@dataclass(frozen=True)
class Mark:
    """How points of one kind of recipe are drawn, and as which characters: on the curve, and dominated."""

    marker: str
    filled: str
    hollow: str
    size: float = 8.0


ALONE = Mark("o", "●", "○")
PERMUTED = Mark("s", "■", "□", 7.5)
RESCALED = Mark("v", "▼", "▽")
PERMUTED_RESCALED = Mark("^", "▲", "△")
FITTED = Mark("D", "◆", "◇", 7.5)
RECOVERED = Mark("*", "★", "☆", 13.0)
PUBLISHED = Mark("X", "✖", "✕", 8.5)


def mark_of(recipe: Recipe) -> Mark:
    """By the last thing that is added."""
    if recipe.published:
        return PUBLISHED
    if recipe.minutes is not None:
        return RECOVERED
    if recipe.update is not None:
        return FITTED if recipe.update.kind == "lstsq" else PERMUTED_RESCALED if recipe.permute else RESCALED
    return PERMUTED if recipe.permute else ALONE


def colour_of(tally: Tally, variant: Variant) -> int:
    """A method has one colour, whatever is added to it."""
    return series(tally, variant.alone if variant.alone in tally.variants else variant)


def curve_legend(tally: Tally, points: list[Point]) -> list[LegendEntry]:
    """Every point, from fast to slow."""
    entries = []
    for point in points:
        mark = mark_of(point.variant.recipe)
        glyph = mark.hollow if point.dominated else mark.filled
        entries.append(LegendEntry(shown_point(tally, point), glyph, colour_of(tally, point.variant)))
    return entries


def curve_figure(tally: Tally, points: list[Point], sparsity: str, window_length: int) -> Markup:
    """Mean perplexity against CPU seconds, both logarithmic, with the standard deviation over seeds.

    Dominated points are hollow; steps join the others. These, and the published forms, are named.
    """
    best = frontier(points)
    with canvas(9.2, 4.9) as (figure, axes):
        for point in points:
            _draw(axes, tally, point)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(x=0.05, y=0.1)
        left, right = axes.get_xlim()
        axes.set_xlim(left / (right / left) ** 0.25, right)
        times, values = [p.cpu_seconds for p in best], [p.perplexity.mean for p in best]
        axes.step([*times, axes.get_xlim()[1]], [*values, values[-1]], where="post", color=INK, linewidth=1.1, zorder=2)
        for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(plain_number))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("pruning and recovery, CPU seconds")
        axes.set_ylabel("perplexity")
        axes.set_title(f"{shown_sparsity(sparsity)}, windows of {window_length:,} tokens")
        figure.draw_without_rendering()
        _name(axes, tally, best, "left")
        _name(axes, tally, [p for p in points if p.variant.recipe.published and p.dominated], "right")
        described = [f"{shown_point(tally, p)} {p.perplexity.mean:,.1f} in {p.cpu_seconds:,.0f} s" for p in best]
        description = (
            f"Perplexity at {shown_sparsity(sparsity)} against CPU seconds. Not dominated are {listed(described)}. "
            "All values are in the table below."
        )
        name = f"curve{sparsity.replace(':', '-')}-{window_length}"
        return drawing(figure, name, f"Perplexity by time, {sparsity}, windows of {window_length}", description)


def _draw(axes: Any, tally: Tally, point: Point) -> None:
    mark = mark_of(point.variant.recipe)
    colour = SERIES[colour_of(tally, point.variant)]
    axes.errorbar(
        point.cpu_seconds,
        point.perplexity.mean,
        yerr=point.perplexity.deviation,
        color=colour,
        marker=mark.marker,
        markersize=mark.size,
        markerfacecolor=PAPER if point.dominated else colour,
        markeredgecolor=colour,
        markeredgewidth=1.3,
        capsize=2.5,
        elinewidth=1,
        zorder=3 if point.dominated else 4,
    )


def _name(axes: Any, tally: Tally, points: list[Point], side: Literal["left", "right"]) -> None:
    """Names beside points, moved down where two would touch.

    To the left of the curve there is room: what lay there would dominate it. To the right of what is dominated, too.
    """
    ceiling = math.inf
    for point in sorted(points, key=lambda p: -p.perplexity.mean):
        place = (point.cpu_seconds, point.perplexity.mean)
        height = axes.transData.transform(place)[1] * 72 / axes.figure.dpi
        middle = min(height - 4, ceiling)
        ceiling = middle - LABEL_HEIGHT
        axes.annotate(
            shown_point(tally, point),
            place,
            (-8 if side == "left" else 10, middle - height),
            textcoords="offset points",
            ha="right" if side == "left" else "left",
            va="center",
            fontsize=9.5,
            color=SERIES[colour_of(tally, point.variant)],
            zorder=5,
        )
