"""The figure of perplexity against time, and its legend."""

from __future__ import annotations

import math
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .curve import Point, frontier
from .drawing import INK, PAPER, SERIES, canvas, drawing, plain_number
from .marks import MARKS, LegendEntry, Mark, mark_of, series
from .tables import shown_point
from .tally import Tally, listed, shown_sparsity, shown_variant

LABEL_HEIGHT = 13.0
"""Least distance between two names, in points."""


def curve_marks(points: list[Point]) -> tuple[Mark, ...]:
    """The markers that occur, from metrics alone to recovery."""
    there = {mark_of(point.variant) for point in points}
    return tuple(mark for mark in MARKS if mark in there)


def curve_methods(tally: Tally, points: list[Point]) -> tuple[LegendEntry, ...]:
    """The methods that occur, in the order of the registry, with their colors."""
    there = {point.variant.alone for point in points}
    methods = dict.fromkeys(variant.alone for variant in tally.everything if variant.alone in there)
    return tuple(LegendEntry(shown_variant(method), "", series(tally, method)) for method in methods)


def curve_figure(tally: Tally, points: list[Point], sparsity: str, window_length: int) -> Markup:
    """Mean perplexity against CPU seconds, both logarithmic, with the standard deviation over seeds.

    Dominated points are hollow; steps join the others. These, and the published forms, are named. The right axis
    counts in perplexities of the dense model.
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
        _ticks(axes.xaxis, (1, 2, 5))
        _ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
        _times_dense(axes, tally.dense_over(window_length))
        axes.set_xlabel("pruning and recovery, CPU seconds")
        axes.set_ylabel("perplexity")
        axes.set_title(f"{shown_sparsity(sparsity)}, windows of {window_length:,} tokens")
        figure.draw_without_rendering()
        _name(axes, tally, best, "left")
        _name(axes, tally, [p for p in points if p.variant.published and p.dominated], "right")
        described = [f"{shown_point(tally, p)} {p.perplexity.mean:,.1f} in {p.cpu_seconds:,.0f} s" for p in best]
        description = (
            f"Perplexity at {shown_sparsity(sparsity)} against CPU seconds. Not dominated are {listed(described)}. "
            "All values are in the table below."
        )
        name = f"curve{sparsity.replace(':', '-')}-{window_length}"
        return drawing(figure, name, f"Perplexity by time, {sparsity}, windows of {window_length}", description)


def _draw(axes: Any, tally: Tally, point: Point) -> None:
    mark = mark_of(point.variant)
    color = SERIES[series(tally, point.variant)]
    axes.errorbar(
        point.cpu_seconds,
        point.perplexity.mean,
        yerr=point.perplexity.deviation,
        color=color,
        marker=mark.marker,
        markersize=mark.size,
        markerfacecolor=PAPER if point.dominated else color,
        markeredgecolor=color,
        markeredgewidth=1.3,
        capsize=2.5,
        elinewidth=1,
        zorder=3 if point.dominated else 4,
    )


def _name(axes: Any, tally: Tally, points: list[Point], side: Literal["left", "right"]) -> None:
    """Write names beside points, moved down if two would touch.

    To the left of the front there is room: a point there would be on it. To the right of dominated points, too.
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
            color=SERIES[series(tally, point.variant)],
            zorder=5,
        )


def _ticks(axis: Any, subs: tuple[float, ...]) -> None:
    """Numbers on a logarithmic axis: at ``subs`` of every decade, or evenly if the axis spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=subs) if high > 3 * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


def _times_dense(axes: Any, dense: float) -> None:
    """A second vertical axis in perplexities of the dense model."""
    if not math.isfinite(dense):
        return
    right = axes.secondary_yaxis("right", functions=(lambda value: value / dense, lambda times: times * dense))
    low, high = (value / dense for value in axes.get_ylim())
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)) if high > 3 * low else MaxNLocator(5))
    right.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}\N{MULTIPLICATION SIGN}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("times dense")
