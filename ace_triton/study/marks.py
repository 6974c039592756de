"""How points are marked: a method has one color on the whole page, a recipe one marker."""

from __future__ import annotations

from dataclasses import dataclass

from .cells import Cell
from .drawing import GLYPHS, MARKERS
from .tally import Tally

GREY = "magnitude"
"""The only method that is drawn in the first color, which is grey."""


@dataclass(frozen=True)
class LegendEntry:
    """A method as the figures mark it."""

    name: str
    glyph: str
    series: int


@dataclass(frozen=True)
class Mark:
    """How points of one kind of recipe are drawn.

    Attributes:
        name: what the recipe adds, for the legend.
        marker: as matplotlib names it.
        glyph: the marker as a character.
        size: in points.
    """

    name: str
    marker: str
    glyph: str
    size: float = 8.0


ALONE = Mark("metric alone", "o", "●")
PERMUTED = Mark("permuted", "s", "■", 7.5)
RESCALED = Mark("rescale", "v", "▼")
PERMUTED_RESCALED = Mark("permuted, rescale", "^", "▲")
FITTED = Mark("lstsq", "D", "◆", 7.5)
RECOVERED = Mark("recovery", "*", "★", 13.0)
PUBLISHED = Mark("published form", "X", "✖", 8.5)
MARKS = (ALONE, PERMUTED, RESCALED, PERMUTED_RESCALED, FITTED, RECOVERED, PUBLISHED)


def mark_of(variant: Cell) -> Mark:
    """The marker of the last thing that is added to a metric."""
    recipe = variant.recipe
    if variant.published:
        return PUBLISHED
    if variant.minutes is not None:
        return RECOVERED
    if recipe.update is not None:
        return FITTED if recipe.update.kind == "lstsq" else PERMUTED_RESCALED if recipe.permute else RESCALED
    return PERMUTED if recipe.permute else ALONE


def series(tally: Tally, variant: Cell) -> int:
    """The color of a method, whatever is added to it, as an index into SERIES."""
    methods = dict.fromkeys(found.alone for found in tally.everything)
    if variant.recipe.method == GREY:
        return 0
    colored = [method for method in methods if method.recipe.method != GREY]
    return 1 + colored.index(variant.alone) % (len(MARKERS) - 1)


def glyph(tally: Tally, variant: Cell) -> str:
    """The marker of a method with nothing added, as a character."""
    return GLYPHS[series(tally, variant)]
