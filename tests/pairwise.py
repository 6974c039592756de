"""Fewer cells of a grid of parameters, for cells that take long: every two values of two axes still meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


def every_cell(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The whole grid."""
    return list(product(*axes))


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Tuples of one value from each axis, such that each value meets all values of each other axis in some tuple."""
    cells = every_cell(*(range(len(axis)) for axis in axes))
    missing = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(missing.intersection(_pairs(cell))))
        missing.difference_update(_pairs(best))
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen


def _pairs(cell: tuple[int, ...]) -> Iterable[tuple[tuple[int, int], ...]]:
    """Every two axes of a cell, each with its value's place on it."""
    return combinations(enumerate(cell), 2)
