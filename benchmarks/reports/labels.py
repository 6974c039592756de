"""Places for the names of marks in a picture, so that no name covers another name or a mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .drawing import line, text

CHARACTER, HEIGHT, SPACE = 7.4, 15.0, 6.0
"""Width of a character, height of a line, and space between names, in pixels."""

REACH = 8.0
"""Distance of a name beside its mark, in pixels."""

ACROSS, DOWN = 16, 10
"""Steps between the other places that are tried, in pixels."""

NEAR = 9.0
"""A name that is not farther from its mark has no leader line."""

MARK = 7.0
"""Half the width of the free space around a mark."""

ASIDE = 4.0
"""Least distance of the middle of a leader from the lines of the plot, in pixels."""

SWEEPS = 3
"""How often each name is placed again, after all have a place."""

FAULT = 100.0
"""Cost of a leader that passes through a mark, a name or a leader, and of a covered line, in pixels of a leader."""

Place = tuple[float, float]
Segment = tuple[Place, Place]


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downward."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """True if the two share some area."""
        apart_across = self.right <= other.left or other.right <= self.left
        return not (apart_across or self.bottom <= other.top or other.bottom <= self.top)

    def inside(self, other: Box) -> bool:
        """True if no part lies outside the other."""
        within_across = other.left <= self.left and self.right <= other.right
        return within_across and other.top <= self.top and self.bottom <= other.bottom

    def nearest(self, place: Place) -> Place:
        """Its point that is the nearest one to a place."""
        return min(max(place[0], self.left), self.right), min(max(place[1], self.top), self.bottom)

    def meets(self, segment: Segment) -> bool:
        """True if a straight line passes through the inside."""
        first, last = 0.0, 1.0
        for axis, low, high in ((0, self.left, self.right), (1, self.top, self.bottom)):
            start, change = segment[0][axis], segment[1][axis] - segment[0][axis]
            if change == 0:
                if not low < start < high:
                    return False
                continue
            ends = sorted(((low - start) / change, (high - start) / change))
            first, last = max(first, ends[0]), min(last, ends[1])
        return first < last


def mark_box(x: float, y: float) -> Box:
    """The free space around a mark."""
    return Box(x - MARK, y - MARK, x + MARK, y + MARK)


@dataclass(frozen=True)
class Label:
    """A name with its place.

    Attributes:
        words: the name.
        box: the space of the name.
        mark: the center of its mark.
    """

    words: str
    box: Box
    mark: Place

    @cached_property
    def leader(self) -> Segment:
        """The line from the mark to the name."""
        return self.mark, self.box.nearest(self.mark)

    @cached_property
    def length(self) -> float:
        """Length of the leader."""
        return math.dist(*self.leader)

    def drawn(self) -> Iterator[str]:
        """The name and, if it is far from its mark, its leader, as SVG."""
        if self.length > NEAR:
            (x, y), (to_x, to_y) = self.leader
            yield line(x, y, to_x, to_y, "lead")
        sides = {"start": self.box.left, "end": self.box.right, "middle": (self.box.left + self.box.right) / 2}
        anchor = "start" if self.box.left > self.mark[0] else "end" if self.box.right < self.mark[0] else "middle"
        yield text(round(sides[anchor], 1), self.box.bottom - 3.5, self.words, "", anchor)


def placed(marks: Sequence[tuple[float, float, str]], within: Box, lines: Sequence[Segment] = ()) -> list[Label]:
    """Names of marks (x, y, name), each at a place near its mark where it covers no mark and no other name.

    Two orders are tried, and the cheapest result is taken: the length of all leaders, with a cost for each fault of a
    leader and each line that a name covers.

    Args:
        marks: centers and names.
        within: where names may stand.
        lines: lines along an axis that no name should cover.

    Raises:
        ValueError: if no order has a free place for every name.
    """
    around = [mark_box(x, y) for x, y, _ in marks]
    candidates: dict[tuple[float, float, str], list[Label]] = {}
    for x, y, words in marks:
        boxes = _boxes(x, y, CHARACTER * len(words) + SPACE, within)
        free = (Label(words, box, (x, y)) for box in boxes if not any(box.overlaps(other) for other in around))
        candidates[x, y, words] = sorted(free, key=lambda label: label.length)
    orders: tuple[Callable[[tuple[float, float, str]], object], ...] = (
        lambda mark: mark,
        lambda mark: (-len(mark[2]), mark),
    )
    found = [_in_order([candidates[mark] for mark in sorted(marks, key=order)], around, lines) for order in orders]
    whole = [(cost, labels) for cost, labels in found if len(labels) == len(marks)]
    if not whole:
        raise ValueError(f"there is no free place for all of {len(marks)} names: make the picture larger")
    return min(whole, key=lambda entry: entry[0])[1]


def _in_order(
    candidates: Sequence[Sequence[Label]], around: Sequence[Box], lines: Sequence[Segment]
) -> tuple[float, list[Label]]:
    """The names placed one after the other, until one has no free place, then each again beside all others."""
    labels: list[Label] = []
    for of_mark in candidates:
        best = _best(of_mark, around, labels, lines)
        if best is None:
            return math.inf, labels
        labels.append(best)
    for _ in range(SWEEPS):
        for number, of_mark in enumerate(candidates):
            others = labels[:number] + labels[number + 1 :]
            labels[number] = _best(of_mark, around, others, lines) or labels[number]
    costs = (_cost(label, around, labels[:number], lines) for number, label in enumerate(labels))
    return sum(costs), labels


def _best(
    candidates: Iterable[Label], around: Sequence[Box], labels: Sequence[Label], lines: Sequence[Segment]
) -> Label | None:
    """The cheapest candidate, of those sorted by length, that covers no name; None if there is none."""
    best, least = None, math.inf
    for label in candidates:
        if label.length >= least:
            break
        if not any(label.box.overlaps(other.box) for other in labels):
            cost = _cost(label, around, labels, lines)
            best, least = (label, cost) if cost < least else (best, least)
    return best


def _cost(label: Label, around: Iterable[Box], labels: Iterable[Label], lines: Iterable[Segment]) -> float:
    return label.length + FAULT * _faults(label, around, labels, lines)


def _boxes(x: float, y: float, width: float, within: Box) -> Iterator[Box]:
    """Boxes beside, above and below a mark, then those of a grid."""
    for left, top in (
        (x + REACH, y - HEIGHT / 2),
        (x - REACH - width, y - HEIGHT / 2),
        (x - width / 2, y - REACH - HEIGHT),
        (x - width / 2, y + REACH),
    ):
        box = Box(round(left, 1), round(top, 1), round(left + width, 1), round(top + HEIGHT, 1))
        if box.inside(within):
            yield box
    for left in range(math.ceil(within.left), int(within.right - width), ACROSS):
        for top in range(math.ceil(within.top), int(within.bottom - HEIGHT), DOWN):
            yield Box(left, top, round(left + width, 1), top + HEIGHT)


def _faults(label: Label, around: Iterable[Box], labels: Iterable[Label], lines: Iterable[Segment]) -> int:
    """How often a leader passes through a mark, a name or a leader, and how many lines the name and leader cover."""
    x, y = label.mark
    others = (box for box in around if not (box.left < x < box.right and box.top < y < box.bottom))
    through = sum(box.meets(label.leader) for box in others)
    for other in labels:
        through += label.box.meets(other.leader) + other.box.meets(label.leader) + _cross(label.leader, other.leader)
    return through + sum(_on_line(label, segment) for segment in lines)


def _on_line(label: Label, segment: Segment) -> bool:
    """True if a name covers a line along an axis, or its leader runs along it."""
    (x1, y1), (x2, y2) = segment
    beside = Box(min(x1, x2) - ASIDE, min(y1, y2) - ASIDE, max(x1, x2) + ASIDE, max(y1, y2) + ASIDE)
    (from_x, from_y), (to_x, to_y) = label.leader
    x, y = (from_x + to_x) / 2, (from_y + to_y) / 2
    along = label.length > NEAR and beside.left < x < beside.right and beside.top < y < beside.bottom
    return along or label.box.meets(segment)


def _cross(one: Segment, other: Segment) -> bool:
    """True if two straight lines have a point between their ends in common."""

    def side(a: Place, b: Place, c: Place) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    (a, b), (c, d) = one, other
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
