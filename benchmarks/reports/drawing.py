"""The parts of the pictures of docs/images: their style, their axes, and text and lines as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
.card { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #e4e8ec } .lead { stroke: #a5adb5 }
text { fill: #1f2328 } .quiet { fill: #59636e } .title { font-size: 17px; font-weight: 600 }
.ours { stroke: #0969da; fill: #0969da } .front { stroke: #0969da; fill: none; stroke-width: 1.6 }
.beaten { stroke: #0969da; fill: #ffffff } .theirs { stroke: #bc4c00; stroke-width: 2.2 }
.dense { stroke: #1a7f37; stroke-width: 1.6; stroke-dasharray: 7 5 } text.dense { fill: #1a7f37; stroke: none }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #232a33 } .lead { stroke: #59636e }
text { fill: #e6edf3 } .quiet { fill: #9198a1 }
.ours { stroke: #58a6ff; fill: #58a6ff } .front { stroke: #58a6ff }
.beaten { stroke: #58a6ff; fill: #0d1117 } .theirs { stroke: #f0883e }
.dense { stroke: #3fb950 } text.dense { fill: #3fb950 }
}
"""


LEGEND_CHARACTER = 7.0
"""Width of a character in a legend, in pixels."""

Place = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis: ``low`` lies at ``start``, ``high`` at ``end``, in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)


def opening(title: str, description: str, width: int, height: int) -> Iterable[str]:
    """The first lines of a picture: its size, what it says in words, its style, its card and its title."""
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    yield f"<title>{title}</title><desc>{escape(description)}</desc><style>{STYLE}</style>"
    yield f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    yield text(20, 32, title, "title")


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{of_kind}{placed}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def grid(across: Scale, up: Scale, columns: Sequence[float], rows: Sequence[float]) -> Iterable[str]:
    """Lines with their numbers at the values within the scales: ``columns`` below the plot, ``rows`` to its left."""
    for value in columns:
        if across.low <= value <= across.high:
            yield line(across(value), up.end, across(value), up.start, "grid")
            yield text(across(value), up.start + 18, f"{value:g}", "quiet", "middle")
    for value in rows:
        if up.low <= value <= up.high:
            yield line(across.start, up(value), across.end, up(value), "grid")
            yield text(across.start - 8, up(value) + 4.5, f"{value:g}", "quiet", "end")


def front_corners(places: Sequence[Place]) -> list[Place]:
    """The corners of the stairs that lead from mark to mark of a Pareto front, the first mark left out."""
    return [corner for (_, above), (x, y) in itertools.pairwise(places) for corner in ((x, above), (x, y))]


def front(start: Place, corners: Iterable[Place]) -> str:
    """The stairs of a Pareto front."""
    path = f"M{start[0]:g} {start[1]:g}" + "".join(f"L{x:g} {y:g}" for x, y in corners)
    return f'<path class="front" d="{path}"/>'


def circle(x: float, y: float, kind: str, radius: int) -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius}"/>'


def cross(x: float, y: float) -> str:
    return f'<path class="theirs" d="M{x - 4.5:g} {y - 4.5:g}l9 9m0 -9l-9 9"/>'


def legend(marks: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Marks with their words, from left to right: an SVG mark with "{x}" for its middle and "{a}" for its left end."""
    x = 26.0
    for mark, words in marks:
        yield mark.format(x=x, a=x - 4.5)
        yield text(x + 12, 54, words, "quiet")
        x += math.ceil(LEGEND_CHARACTER * len(words)) + 34
