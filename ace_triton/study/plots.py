"""The figures of perplexity, time and divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .cells import Cell
from .drawing import GRID, MARKERS, PAPER, SERIES, STAGE_COLORS, canvas, drawing, plain_number
from .marks import mark_of, series
from .tally import STAGES, Tally, listed, shown_sparsity, shown_variant

STAGE_NAMES = {"calibration": "calibration forwards", "statistics": "statistics", "select": "score and mask"}

NAME_WIDTH, WIDE_NAME_WIDTH = 18, 24
"""Characters on a line of a name beside its bar, for metrics alone and for recipes."""

LEAST_RANGE = 8.0
"""The least ratio of a time axis's ends."""

MOST_NUMBERS = 60.0
"""Up to this ratio of its ends, a time axis has numbers between the powers of ten."""


def perplexity_by_length(tally: Tally, sparsity: str, number: int) -> Markup | None:
    """Mean perplexity against calibration length, with the standard deviation over seeds.

    The vertical axis spans the methods with calibration. The dense model, and methods without calibration, which lie
    far outside, are written at its ends.
    """
    variants = [v for v in tally.calibrated if any(tally.perplexity(v, sparsity, n) for n in tally.lengths)]
    if not variants:
        return None
    with canvas(4.6, 3.7) as (figure, axes):
        lows, highs = [], []
        for place, variant in enumerate(variants):
            points = [(n, s) for n in tally.lengths if (s := tally.perplexity(variant, sparsity, n)) is not None]
            if not points:
                continue
            aside = 1 + 0.035 * (place - (len(variants) - 1) / 2)
            axes.errorbar(
                [length * aside for length, _ in points],
                [spread.mean for _, spread in points],
                yerr=[spread.deviation for _, spread in points],
                **_line(tally, variant),
                capsize=2.5,
                elinewidth=1,
            )
            lows += [spread.mean - spread.deviation for _, spread in points]
            highs += [spread.mean + spread.deviation for _, spread in points]
        low, high = min(lows), max(highs)
        margin = max(0.12 * (high - low), 0.02 * high)
        axes.set_ylim(low - 1.6 * margin, high + 1.6 * margin)
        _log_axis(axes, tally.lengths)
        axes.set_xlabel("tokens in a calibration sequence, L")
        axes.set_ylabel("perplexity")
        axes.set_title(shown_sparsity(sparsity))
        dense = tally.results.dense
        if dense is not None:
            axes.annotate(f"dense: {dense.perplexity:,.1f} ↓", (0.02, 0.03), xycoords="axes fraction", fontsize=10)
        for variant in tally.variants:
            spread = None if variant.recipe.calibrated else tally.perplexity(variant, sparsity)
            if spread is not None:
                text = f"{shown_variant(variant)}: {spread.mean:,.0f} ↑"
                axes.annotate(text, (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=10)
        best = min(variants, key=lambda v: _lowest(tally, v, sparsity))
        description = (
            f"Perplexity at {shown_sparsity(sparsity)} against calibration length for "
            f"{listed([shown_variant(v) for v in variants])}; the lowest mean is "
            f"{_lowest(tally, best, sparsity):,.1f}, of {shown_variant(best)}. All values are in the table below."
        )
        return drawing(figure, f"length{number}", f"Perplexity by calibration length, {sparsity}", description)


def perplexity_by_time(tally: Tally, sparsity: str, number: int) -> Markup | None:
    """Mean perplexity against CPU seconds of pruning; a line joins a method's calibration lengths, written below."""
    variants = [v for v in tally.calibrated if any(tally.perplexity(v, sparsity, n) for n in tally.lengths)]
    if not variants:
        return None
    with canvas(4.6, 3.7) as (figure, axes):
        times: dict[int, float] = {}
        for variant in variants:
            points = []
            for length in tally.lengths:
                spread = tally.perplexity(variant, sparsity, length)
                seconds = tally.cpu_seconds(variant, sparsity, length)
                if spread is not None and seconds is not None:
                    points.append((seconds, spread.mean))
                    times.setdefault(length, seconds)
            axes.plot(*zip(*points, strict=True), **_line(tally, variant))
        for length, seconds in times.items():
            label, place = f"{'L=' * (length == tally.lengths[0])}{length:,}", (seconds, 0.02)
            axes.annotate(label, place, xycoords=("data", "axes fraction"), ha="center", fontsize=9.5)
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.18)
        left, right = axes.get_xlim()
        widen = max(1.0, LEAST_RANGE / (right / left)) ** 0.5
        axes.set_xlim(left / widen, right * widen)
        narrow = widen * right < MOST_NUMBERS * left / widen
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("pruning, CPU seconds")
        axes.set_ylabel("perplexity")
        axes.set_title(shown_sparsity(sparsity))
        description = (
            f"Perplexity at {shown_sparsity(sparsity)} against CPU seconds of pruning, a point for each calibration "
            f"length of {listed([shown_variant(v) for v in variants])}. All values are in the tables below."
        )
        return drawing(figure, f"time{number}", f"Perplexity by pruning time, {sparsity}", description)


def time_bars(tally: Tally, length: int) -> Markup | None:
    """CPU seconds of a pruning, by stage."""
    rows = [(v, times) for v in tally.variants if (times := tally.stages(v, length)) is not None]
    if not any(variant.recipe.calibrated for variant, _ in rows):
        return None
    with canvas(4.6, 0.9 + 0.33 * len(rows)) as (figure, axes):
        names = [fill(shown_variant(variant), NAME_WIDTH) for variant, _ in rows]
        ends = [0.0] * len(rows)
        for stage, color in zip(STAGES, STAGE_COLORS, strict=True):
            widths = [getattr(times, stage) for _, times in rows]
            axes.barh(names, widths, left=ends, color=color, edgecolor=PAPER, linewidth=0.8, height=0.7)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for row, (_, times) in enumerate(rows):
            axes.annotate(
                f"{times.total:,.1f} s", (ends[row], row), (5, 0), textcoords="offset points", va="center", fontsize=10
            )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("CPU seconds")
        axes.set_title(f"L = {length}")
        parts = [f"{shown_variant(variant)} {times.total:,.1f} s" for variant, times in rows]
        description = f"CPU seconds of pruning with sequences of {length} tokens: {listed(parts)}."
        return drawing(figure, f"bars{length}", f"Time by stage, L = {length}", description)


def divergence(tally: Tally, sparsity: str, number: int) -> Markup | None:
    """KL(dense || pruned) over positions: median, quartiles, and the range from 5 to 95 %."""
    rows = [(s.cell.variant, s.divergence) for s in tally.samples(sparsity) if s.cell and s.divergence]
    if not rows:
        return None
    names = [
        fill(shown_variant(variant), NAME_WIDTH if tally.recipes == [] else WIDE_NAME_WIDTH) for variant, _ in rows
    ]
    height = max(0.36, 0.2 * max(name.count("\n") + 1 for name in names))
    with canvas(4.6, 0.9 + height * len(rows)) as (figure, axes):
        for row, (variant, far) in enumerate(rows):
            low, left, middle, right, high = (max(value, 1e-4) for value in far.quantiles)
            color = SERIES[series(tally, variant)]
            marker = mark_of(variant).marker if tally.recipes else MARKERS[series(tally, variant)]
            axes.plot([low, high], [row, row], color=color, linewidth=1.5)
            axes.plot([left, right], [row, row], color=color, linewidth=7, alpha=0.45, solid_capstyle="butt")
            axes.plot(middle, row, marker=marker, color=color, markersize=8, markeredgecolor=PAPER)
            axes.annotate(
                f"{far.agreement:.0%}", (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=10
            )
        axes.set_yticks(range(len(rows)), names)
        axes.annotate("same\ntop token", (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("KL(dense || pruned) at a position, nats")
        axes.set_title(shown_sparsity(sparsity))
        parts = [f"{shown_variant(v)} {far.quantiles[2]:.2f} ({far.agreement:.0%})" for v, far in rows]
        description = (
            f"Divergence of next-token distributions from the dense model at {shown_sparsity(sparsity)}, median in "
            f"nats and share of positions with the same top token: {listed(parts)}."
        )
        return drawing(figure, f"divergence{number}", f"Divergence from the dense model, {sparsity}", description)


def _line(tally: Tally, variant: Cell) -> dict[str, Any]:
    index = series(tally, variant)
    ours = variant.recipe.method == "ace"
    return {
        "color": SERIES[index],
        "marker": MARKERS[index],
        "markersize": 12 if MARKERS[index] == "*" else 6.5,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
        "linewidth": 2.4 if ours else 1.5,
        "zorder": 4 if ours else 3,
    }


def _lowest(tally: Tally, variant: Cell, sparsity: str) -> float:
    spreads = [tally.perplexity(variant, sparsity, length) for length in tally.lengths]
    return min((spread.mean for spread in spreads if spread is not None), default=math.inf)


def _log_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
    axes.grid(axis="x", color=GRID, linewidth=0.4)
