"""How figures look: one palette, text and lines in the page's own colors, and SVG inside HTML.

A figure is drawn once in stand-in colors. CSS replaces them: ``currentColor`` for text and axes, ``var(--grid)`` and
``var(--s0)`` ... for grids and series. So a figure follows the page into dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")

from markupsafe import Markup
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, GRID, PAPER = "#010101", "#020202", "#030303"
MARKERS = ("X", "o", "s", "^", "D", "*", "P", "v", "<", ">")
GLYPHS = ("✖", "●", "■", "▲", "◆", "★", "✚", "▼", "◀", "▶")
SERIES = tuple(f"#0404{index:02x}" for index in range(len(MARKERS)))
STAGE_COLORS = ("#050500", "#050501", "#050502")

HEAT = LinearSegmentedColormap.from_list("heat", pyplot.get_cmap("viridis")(np.linspace(0.25, 1, 128)))
"""For heat maps: viridis without its darkest colors, which vanish on a dark page."""

_STAND_INS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    **{color: f"var(--s{index})" for index, color in enumerate(SERIES)},
    **{color: f"var(--t{index})" for index, color in enumerate(STAGE_COLORS)},
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def canvas(width: float, height: float, **layout: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of a size in inches and its axes, in the page's style; the figure is closed at the end."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **layout)
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def drawing(figure: Figure, name: str, title: str, description: str) -> Markup:
    """A figure as inline SVG: an ``<svg>`` element that a template inserts unchanged.

    Args:
        figure: drawn inside :func:`canvas`.
        name: unique on the page; every id in the SVG begins with it.
        title, description: for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for color, css in _STAND_INS.items():
        svg = svg.replace(color, css)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    label = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    spoken = escape(f"{title}. {description}", quote=True)
    return Markup(f'{head} role="img" aria-label="{spoken}">{label}{body}')


def plain_number(value: float, _: int) -> str:
    """For ticks: "1,000", "20", "0.5"."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
