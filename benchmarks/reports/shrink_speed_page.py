"""docs/shrink-speed.md and its picture, from the record in docs/shrink-speed.json, which decides every sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .drawing import Scale, grid, opening, text

BITS = 8
"""Bits of every matrix of a form that is not in float32: the blocks, the head and the embedding."""


@dataclass(frozen=True)
class Form:
    """A form of a model.

    Attributes:
        ratio: share of the blocks' parameters that is removed; 0 for none.
        pattern: n:m of the layers in the blocks; "" if they are not pruned.
        bits: bits of all matrices; None for float32.
    """

    ratio: float = 0.0
    pattern: str = ""
    bits: int | None = None

    def __str__(self) -> str:
        shrunken = f"shrunken {self.ratio:.0%}" if self.ratio else ""
        storage = "float32" if self.bits is None else f"{self.bits} bits"
        return f"{' then '.join(filter(None, (shrunken, self.pattern))) or 'dense'}, {storage}"


DENSE = Form()
FORMS = (
    DENSE,
    Form(bits=BITS),
    Form(0.2, bits=BITS),
    Form(pattern="8:16", bits=BITS),
    Form(0.2, "8:16", BITS),
    Form(0.1, bits=BITS),
    Form(0.3, bits=BITS),
    Form(pattern="2:4", bits=BITS),
    *(Form(ratio) for ratio in (0.2, 0.1, 0.3)),
)
"""What is measured, in this order."""

WIDTH, ROW, TITLE, LEFT, RIGHT, TOP, BOTTOM = 880, 420, 60, 62, 852, 52, 50
PERPLEXITIES = (10, 15, 20, 30, 40, 50, 60, 70, 80, 100, 150, 200, 300, 500, 1000)
SPEEDS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Point:
    """A form with its figures.

    Attributes:
        form: the form.
        perplexity: on the evaluation text.
        size: bytes of all weights.
        faster: tokens a second over those of the dense model in float32; None if not measured.
    """

    form: Form
    perplexity: float
    size: int
    faster: float | None


def points_of(found: dict[str, Any]) -> list[Point]:
    """The points of one model whose perplexity was measured, in the order of :data:`FORMS`."""
    speeds = {Form(**entry["form"]): entry["over_dense"] for entry in found["speed"]}
    points = {}
    for entry in found["perplexity"]:
        form = Form(**entry["form"])
        points[form] = Point(form, entry["perplexity"], entry["bytes"], speeds.get(form))
    return [
        points[form] for form in sorted(points, key=lambda f: (f.bits is not None, bool(f.pattern), f.ratio, str(f)))
    ]


def page(record: dict[str, Any]) -> str:
    """docs/shrink-speed.md."""
    lines = [
        "# Shrink, n:m, or both",
        "",
        "![Perplexity against tokens a second](images/shrink-speed.svg)",
        "",
        "Measured by `make shrink-speed`, which also writes the sentences below from the figures. *Shrunken* is "
        "`shrink` with SAAP and least squares. n:m is the preset balanced: Wanda, permuted, least squares. *Then* "
        f"means that the shrunken model was pruned. A form in {BITS} bits has all its matrices in {BITS} bits, rounded "
        f"to the nearest value (`pack --bits {BITS} --head-bits {BITS} --dense-bits {BITS}`). All forms decode with "
        "the [compiled step](guides/run-sparse.md#the-compiled-step) on one thread.",
    ]
    for name, found in record["models"].items():
        lines += ["", f"## {name}", "", *_section(found)]
    return "\n".join(lines).rstrip() + "\n"


def _section(found: dict[str, Any]) -> list[str]:
    setting, points = found["setting"], points_of(found)
    processors = sorted({entry["processor"] for step in ("perplexity", "speed") for entry in found[step]})
    lines = [
        f"{setting['samples']} x {setting['length']} tokens of {setting['calibration']}; {setting['windows']} windows "
        f"of {setting['window_length']} tokens of {setting['evaluation']}, on {', '.join(processors)}."
    ]
    if found["speed"]:
        (first, *_) = found["speed"]
        lines[0] += (
            " Speeds are tokens per CPU second over those of the dense model in float32, which ran in turn: medians "
            f"over {first['rounds']} rounds of {first['new_tokens']} tokens."
        )
    lines += ["", *sentences(points), "", *_table(points)]
    return lines


def sentences(points: Sequence[Point]) -> list[str]:
    """What is better at equal speed, and by how much, as Markdown."""
    timed = [point for point in points if point.form.bits is not None and point.faster is not None]
    missing = [form for form in FORMS if form.bits is not None and form not in {point.form for point in timed}]
    if missing:
        return [f"Not decided yet. These forms are not measured: {'; '.join(map(str, missing))}."]
    shrunken = [point for point in timed if not point.form.pattern]
    alone = [point for point in timed if point.form.pattern and not point.form.ratio]
    both = [point for point in timed if point.form.pattern and point.form.ratio]
    better, lines = [], []
    for point in (*alone, *both):
        words, wins = _beside(point, shrunken)
        lines.append(f"- {words}")
        better += [point] * wins
    for point in both:
        lines.append(f"- {_beside_alone(point, alone)}")
    if not better:
        verdict = "At equal speed, shrink alone (or nothing at all) has a lower perplexity than every n:m form here."
    else:
        named = " and ".join(str(point.form) for point in better)
        verb = "has" if len(better) == 1 else "have"
        rest = "" if len(better) == len(alone) + len(both) else " The other n:m forms do not."
        verdict = f"At equal speed, {named} {verb} a lower perplexity than shrink alone.{rest}"
    return [f"**{verdict}**", "", *lines]


def _beside(point: Point, line_of: Sequence[Point]) -> tuple[str, bool]:
    """A form with n:m beside shrink alone at its speed, and whether it has the lower perplexity.

    Between two shrunken forms the logarithm of the perplexity is interpolated. The dense model is the first of them.
    """
    line_of = sorted(line_of, key=_speed)
    slowest, fastest = line_of[0], line_of[-1]
    speed, value = _speed(point), point.perplexity
    own = f"{point.form} runs at {speed:.2f} times the dense speed with perplexity {value:.1f}"
    if speed <= _speed(slowest):
        words = f"{own}. {slowest.form} is not slower ({_speed(slowest):.2f}) and has {slowest.perplexity:.1f}"
        return f"{words}, {_times(value, slowest.perplexity)}.", value < slowest.perplexity
    if speed >= _speed(fastest):
        words = f"{own}. No shrunken form is as fast; the fastest, {fastest.form}, reaches {_speed(fastest):.2f}"
        return f"{words} with {fastest.perplexity:.1f}.", True
    right = next(index for index, other in enumerate(line_of) if _speed(other) > speed)
    low, high = line_of[right - 1], line_of[right]
    share = (speed - _speed(low)) / (_speed(high) - _speed(low))
    same = math.exp((1 - share) * math.log(low.perplexity) + share * math.log(high.perplexity))
    words = f"{own}. Shrink alone has {same:.1f} at that speed, between {low.form} and {high.form}"
    return f"{words}, {_times(value, same)}.", value < same


def _beside_alone(point: Point, alone: Sequence[Point]) -> str:
    """A shrunken form with n:m beside the best n:m form that is as fast."""
    as_fast = [other for other in alone if _speed(other) >= _speed(point)]
    if not as_fast:
        fastest = max(alone, key=_speed)
        return (
            f"No n:m form alone is as fast as {point.form}; the fastest, {fastest.form}, reaches "
            f"{_speed(fastest):.2f} times the dense speed with perplexity {fastest.perplexity:.1f}."
        )
    best = min(as_fast, key=lambda other: other.perplexity)
    return (
        f"{best.form} is as fast as {point.form} and has perplexity {best.perplexity:.1f}, "
        f"{_times(point.perplexity, best.perplexity)}."
    )


def _times(own: float, other: float) -> str:
    """How much lower or higher another perplexity is."""
    return f"{1 - other / own:.0%} lower" if other < own else f"{other / own - 1:.0%} higher"


def _speed(point: Point) -> float:
    assert point.faster is not None
    return point.faster


def _table(points: Sequence[Point]) -> list[str]:
    lines = ["| form | perplexity | over dense | weights | times the dense speed |", "|---|---:|---:|---:|---:|"]
    dense = next((point.perplexity for point in points if point.form == DENSE), None)
    for point in points:
        over = "" if dense is None else f"{point.perplexity / dense:.2f}x"
        speed = "1.00x" if point.form == DENSE else "not measured" if point.faster is None else f"{point.faster:.2f}x"
        lines.append(f"| {point.form} | {point.perplexity:.2f} | {over} | {point.size / 1e6:.0f} MB | {speed} |")
    return lines


def picture(record: dict[str, Any]) -> str:
    """docs/images/shrink-speed.svg: one row for each model, the same for the same record."""
    models = {name: [p for p in points_of(found) if p.faster is not None] for name, found in record["models"].items()}
    models = {name: points for name, points in models.items() if points}
    described = "; ".join(
        f"{name}: {', '.join(f'{p.form} {p.perplexity:.1f} at {_speed(p):.2f}' for p in points)}"
        for name, points in models.items()
    )
    title = "Shrink, n:m, or both: perplexity against speed"
    parts = [*opening(title, described, WIDTH, TITLE + ROW * len(models)), *_legend()]
    for row, (name, points) in enumerate(models.items()):
        parts += _row(name, points, TITLE + row * ROW)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(name: str, points: Sequence[Point], start: float) -> Iterable[str]:
    perplexities, speeds = [point.perplexity for point in points], [_speed(point) for point in points]
    up = Scale(0.85 * min(perplexities), 1.15 * max(perplexities), start + ROW - BOTTOM, start + TOP)
    across = Scale(0.9 * min(speeds), 1.15 * max(speeds), LEFT, RIGHT)
    yield text(20, start + 24, name, "title")
    yield from grid(across, up, SPEEDS, PERPLEXITIES)
    yield text(20, up.end - 9, "perplexity", "quiet")
    words = "tokens per CPU second, over dense float32"
    yield text((LEFT + RIGHT) / 2, up.start + 38, words, "quiet", "middle")
    for bits in (None, BITS):
        places = [(across(_speed(p)), up(p.perplexity)) for p in points if p.form.bits == bits and not p.form.pattern]
        if len(places) > 1:
            yield f'<path class="front" d="M{"L".join(f"{x:g} {y:g}" for x, y in places)}"/>'
    for point in points:
        x, y = across(_speed(point)), up(point.perplexity)
        yield _mark(point.form, x, y)
        shrunken = f"{point.form.ratio:.0%}" if point.form.ratio else ""
        label = " then ".join(filter(None, (shrunken, point.form.pattern))) or "dense"
        yield text(x + 9, y + 4.5, f"{label}, float32" if point.form.bits is None else label)


def _mark(form: Form, x: float, y: float) -> str:
    if not form.pattern:
        return f'<circle class="ours" cx="{x:g}" cy="{y:g}" r="5"/>'
    if form.ratio:
        return f'<circle class="beaten" cx="{x:g}" cy="{y:g}" r="5"/>'
    return f'<path class="theirs" d="M{x - 4.5:g} {y - 4.5:g}l9 9m0 -9l-9 9"/>'


def _legend() -> Iterable[str]:
    kinds = (
        (Form(0.2), "shrink alone (the share that is removed)"),
        (Form(pattern="2:4"), "n:m alone"),
        (Form(0.2, "2:4"), "both"),
    )
    x = 26.0
    for form, words in kinds:
        yield _mark(form, x, 49.5)
        yield text(x + 12, 54, words, "quiet")
        x += 7 * len(words) + 34
