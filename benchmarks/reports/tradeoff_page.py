"""docs/tradeoff.md and its picture, from the content of docs/tradeoff.json. No sentence knows the result beforehand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .drawing import Scale, grid, opening, text
from .tradeoff_forms import DENSE, DENSE_FORM, FORMS, HEAD_BITS, LLAMA, PATTERNS, RECOVERY, STEP_FORMS, Form

SIZES = (4.0, 2.0, 1.1, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Limits of bytes a weight for which the page names the best form."""

SPEEDS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""The same for tokens a second, over those of the dense model in float32."""

WIDTH, ROW, TITLE = 880, 380, 60
PANELS = ((62, 424), (490, 852))
TOP, BOTTOM = 58, 50
"""Free space above and below the plots of a model."""

PERPLEXITIES = (5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
BYTE_TICKS = (0.125, 0.25, 0.5, 1, 2, 4)
SPEED_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
CHARACTER, LINE_HEIGHT = 7.0, 15.0


@dataclass(frozen=True)
class Point:
    """A measured form.

    Attributes:
        form: the form.
        perplexity: on the evaluation text.
        size: bytes of a weight in the blocks.
        file_bytes: bytes of the weights' files; None for the dense model in transformers.
        speed, faster: tokens a second, and the same over the dense model's in float32; None if not measured.
    """

    form: Form
    perplexity: float
    size: float
    file_bytes: int | None
    speed: float | None
    faster: float | None

    @property
    def pruned(self) -> bool:
        """True if the form is pruned."""
        return bool(self.form.pattern)


Cost = Callable[[Point], float]


def points_of(found: dict[str, Any]) -> list[Point]:
    """The points of one model whose perplexity was measured."""
    speeds = {Form(**entry["form"]): entry for entry in found["speed"]}
    points = []
    for entry in found["perplexity"]:
        form = Form(**entry["form"])
        speed = speeds.get(form, {})
        numbers = entry["perplexity"], entry["bytes_per_weight"], entry["file_bytes"]
        points.append(Point(form, *numbers, speed.get("tokens_per_second"), speed.get("over_dense")))
    measured = {point.form: point for point in points}
    for form in STEP_FORMS:
        same = measured.get(Form(DENSE, "", form.weights))
        if form in speeds and same is not None:
            timed = {"speed": speeds[form]["tokens_per_second"], "faster": speeds[form]["over_dense"]}
            points.append(replace(same, form=form, **timed))
    return sorted(points, key=lambda point: (point.pruned, -point.size))


def size_cost(point: Point) -> float:
    """Smaller is better."""
    return point.size


def speed_cost(point: Point) -> float:
    """Time of a token, over the dense model's."""
    assert point.faster is not None
    return 1 / point.faster


def front_of(points: Sequence[Point], cost: Cost) -> list[Point]:
    """The points that no other beats in perplexity and cost, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), point.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front


def best(points: Iterable[Point]) -> Point | None:
    """The point with the lowest perplexity."""
    return min(points, key=lambda point: point.perplexity, default=None)


def page(content: dict[str, Any]) -> str:
    """docs/tradeoff.md."""
    lines = [
        "# Prune, quantize, or both",
        "",
        "![Perplexity against bytes of a weight, and against tokens a second](images/tradeoff.svg)",
        "",
        "Measured by `make tradeoff`, which also writes the sentences below from the figures. Pruned forms are packed "
        "folders of this package. Forms that are not pruned are the model in transformers, in 8 bits in this package, "
        "and in llama.cpp, whose files its own converter makes from float32. All perplexities are of the same token "
        "ids in the same windows, by the same code, from the logits of each engine. Bytes of a weight count the linear "
        "layers in the blocks, with zeros counted as weights, and scales and positions included. llama.cpp also "
        "quantizes embeddings and the head; here a form of 8 or 4 bits has the head, and an embedding that shares its "
        f"weight, in {HEAD_BITS} bits (`pack --head-bits`), and computes in float32. " + _decoders(content),
        "",
    ]
    lines += [] if content["models"] else ["No model is measured yet."]
    for name, found in content["models"].items():
        lines += _section(name, found)
    return "\n".join(lines).rstrip() + "\n"


def _decoders(content: dict[str, Any]) -> str:
    """What decodes the pruned forms, from the records of their speeds."""
    speeds = [entry for found in content["models"].values() for entry in found["speed"] if entry["form"]["pattern"]]
    compiled = sum(entry.get("decoder") == "compiled" for entry in speeds)
    step = "the [compiled step](guides/run-sparse.md#the-compiled-step)"
    if compiled == len(speeds):
        return f"Pruned forms decode with {step}."
    return (
        f"{compiled} of {len(speeds)} speeds of pruned forms are with {step}, the others in transformers with `--fuse`."
    )


def _section(name: str, found: dict[str, Any]) -> list[str]:
    setting, points = found["setting"], points_of(found)
    timed = [point for point in points if point.faster is not None]
    lines = [
        f"## {name}",
        "",
        f"Pruned with the preset {setting['preset']} on {setting['samples']} x {setting['length']} tokens, bits by "
        f"GPTQ; {setting['windows']} windows of {setting['window_length']} tokens of {setting['evaluation']}, on "
        f"{setting['processor']}.",
    ]
    if any(point.form.recovered for point in points):
        lines[-1] += (
            f" Recovered forms are trained for {RECOVERY.steps} optimizer steps of {RECOVERY.tokens_per_step} tokens "
            "of the calibration text after pruning, and then rounded to the nearest values."
        )
    versions = {entry["version"] for step in ("perplexity", "speed") for entry in found[step]}
    lines[-1] += f" With {'; '.join(sorted(versions))}." if versions else ""
    if found["speed"]:
        (first, *_) = found["speed"]
        lines += [
            f"Speed: one thread of {first['processor']}, {first['new_tokens']} greedy tokens, medians over "
            f"{first['rounds']} rounds, each beside the dense model in float32."
        ]
    return [*lines, "", *decision(points, timed), "", *_table(points), ""]


def decision(points: Sequence[Point], timed: Sequence[Point]) -> list[str]:
    """What the figures of a model say, as Markdown."""
    dense = next((point for point in points if point.form == DENSE_FORM), None)
    if dense is None or not any(point.pruned for point in points):
        return ["Not measured yet: the dense model in float32, or any pruned form."]
    by_size = _by_limit(points, SIZES, lambda point, limit: point.size <= limit)
    by_speed = _by_limit(timed, SPEEDS, lambda point, limit: (point.faster or 0) >= limit)
    lines = _limits("bytes a weight, at most", by_size, dense)
    if by_speed:
        lines += ["", *_limits("times the tokens a second of dense fp32, at least", by_speed, dense)]
    taken = [entry for entry in (*by_size, *by_speed) if entry.best.pruned]
    asked = "size and speed" if by_speed else "size"
    lines += [""]
    missing = [form for form in FORMS if not form.pattern and form not in {point.form for point in points}]
    if missing:
        lines += [f"**Not decided yet: {', '.join(map(str, missing))} not measured.**"]
    elif not taken:
        smallest = next(entry for entry in reversed(by_size) if not entry.best.pruned)
        lines += [
            f"**Do not prune for {asked}: at every limit in the tables a form that is not pruned has the lowest "
            f"perplexity. The smallest of them is {smallest.best.form} ({smallest.best.size:.2f} bytes a weight, "
            f"{_times(smallest.best, dense)}).**"
        ]
    else:
        where = {entry.best.form: entry.best for entry in taken}
        named = "; ".join(
            f"{form} ({_place(point)}, {_times(point, dense)}{_rivals(point, points)})" for form, point in where.items()
        )
        lines += [f"**A pruned form is the best one at some limit of {asked}: {named}. Elsewhere do not prune.**"]
    lines += ["", *_fronts(points, timed)]
    if not by_speed:
        lines += ["", "Speeds are not measured yet."]
    return lines


@dataclass(frozen=True)
class _Limit:
    """The best forms within a limit: of all, and of the pruned ones."""

    limit: float
    best: Point
    pruned: Point | None


def _by_limit(points: Sequence[Point], limits: Sequence[float], within: Callable[[Point, float], bool]) -> list[_Limit]:
    found = []
    for limit in limits:
        inside = [point for point in points if within(point, limit)]
        if inside:
            least = min(inside, key=lambda point: point.perplexity)
            found.append(_Limit(limit, least, best(point for point in inside if point.pruned)))
    return found


def _limits(title: str, entries: Sequence[_Limit], dense: Point) -> list[str]:
    lines = [
        f"| {title} | the best form | perplexity | the best pruned form | perplexity |",
        "|---:|---|---:|---|---:|",
    ]
    for entry in entries:
        pruned = "none | " if entry.pruned is None else f"{entry.pruned.form} | {_shown(entry.pruned, dense)}"
        lines.append(f"| {entry.limit:g} | {entry.best.form} | {_shown(entry.best, dense)} | {pruned} |")
    return lines


def _shown(point: Point, dense: Point) -> str:
    return f"{point.perplexity:.1f} ({point.perplexity / dense.perplexity:.2f}x)"


def _times(point: Point, dense: Point) -> str:
    return f"{point.perplexity / dense.perplexity:.2f} times the dense perplexity"


def _place(point: Point) -> str:
    speed = "" if point.faster is None else f", {point.faster:.2f} times the dense speed"
    return f"{point.size:.2f} bytes a weight{speed}"


def _rivals(point: Point, points: Sequence[Point]) -> str:
    """Whether a form that is not pruned is as small."""
    smaller = [other for other in points if not other.pruned and other.size <= point.size]
    return "" if smaller else "; no form without pruning is as small"


def _fronts(points: Sequence[Point], timed: Sequence[Point]) -> list[str]:
    lines = []
    for what, of, cost in (("size", points, size_cost), ("speed", timed, speed_cost)):
        if of:
            front = front_of(of, cost)
            named = ", ".join(str(point.form) for point in front)
            pruned = sum(point.pruned for point in front)
            lines.append(f"Pareto front of perplexity and {what}, {pruned} of {len(front)} forms pruned: {named}.")
    return list(itertools.chain.from_iterable((entry, "") for entry in lines))[:-1]


def _table(points: Sequence[Point]) -> list[str]:
    lines = [
        "| form | perplexity | bytes a weight | files | tokens a second | over dense fp32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        size = "" if point.file_bytes is None else f"{point.file_bytes / 1e6:.0f} MB"
        speed = "|" if point.speed is None else f"{point.speed:.1f} | {point.faster:.2f}x"
        lines.append(f"| {point.form} | {point.perplexity:.2f} | {point.size:.2f} | {size} | {speed} |")
    return lines


def picture(content: dict[str, Any]) -> str:
    """docs/images/tradeoff.svg: one row for each model, the same for the same records."""
    models = {name: points_of(found) for name, found in content["models"].items()}
    models = {name: points for name, points in models.items() if points}
    height = TITLE + ROW * len(models)
    described = "; ".join(
        f"{name}: on the front of size {', '.join(f'{p.form} {p.perplexity:.1f}' for p in front_of(points, size_cost))}"
        for name, points in models.items()
    )
    title = "Prune, quantize, or both: perplexity against size and speed"
    parts = [*opening(title, described, WIDTH, height), *_legend()]
    for row, (name, points) in enumerate(models.items()):
        parts += _row(name, points, TITLE + row * ROW)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(name: str, points: Sequence[Point], start: float) -> Iterable[str]:
    perplexities = [point.perplexity for point in points]
    low, high = 0.72 * min(perplexities), 1.25 * max(perplexities)
    up = Scale(low, high, start + ROW - BOTTOM, start + TOP)
    timed = [point for point in points if point.speed is not None]
    yield text(20, start + 24, name, "title")
    sizes = [point.size for point in points]
    across = Scale(0.8 * min(sizes), 1.25 * max(sizes), *PANELS[0])
    yield from _panel(points, lambda point: point.size, across, up, BYTE_TICKS, "bytes a weight", size_cost)
    if not timed:
        yield text(sum(PANELS[1]) / 2, start + ROW / 2, "tokens a second: not measured yet", "quiet", "middle")
        return
    speeds = [point.speed or 0.0 for point in timed]
    across = Scale(0.8 * min(speeds), 1.35 * max(speeds), *PANELS[1])
    words = "tokens a second, one thread"
    yield from _panel(timed, lambda point: point.speed or 0.0, across, up, SPEED_TICKS, words, speed_cost)


def _panel(
    points: Sequence[Point],
    value: Callable[[Point], float],
    across: Scale,
    up: Scale,
    ticks: Sequence[float],
    words: str,
    cost: Cost,
) -> Iterable[str]:
    yield from grid(across, up, ticks, PERPLEXITIES)
    yield text(across.start - 42, up.end - 9, "perplexity", "quiet")
    yield text((across.start + across.end) / 2, up.start + 38, words, "quiet", "middle")
    front = front_of(points, cost)
    places = [(across(value(point)), up(point.perplexity)) for point in front]
    path = f"M{places[0][0]:g} {places[0][1]:g}" + "".join(f"H{x:g}V{y:g}" for x, y in places[1:])
    yield f'<path class="front" d="{path}"/>'
    for point in points:
        x, y = across(value(point)), up(point.perplexity)
        if point.pruned:
            kind, radius = ("ours", 5) if point in front else ("beaten", 4)
            yield f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius}"/>'
        else:
            yield f'<path class="theirs" d="M{x - 4.5:g} {y - 4.5:g}l9 9m0 -9l-9 9"/>'
    yield from _names(points, value, across, up)


def _names(points: Sequence[Point], value: Callable[[Point], float], across: Scale, up: Scale) -> Iterable[str]:
    """Names below forms that are not pruned; bits above pruned ones, and the pattern beside the last of each."""
    ends: list[float] = []
    for point in sorted((point for point in points if not point.pruned), key=value):
        name = point.form.weights if point.form.engine == LLAMA else str(point.form)
        width = CHARACTER * len(name)
        x = min(max(across(value(point)), across.start + width / 2), across.end - width / 2)
        level = next((level for level, end in enumerate(ends) if x - width / 2 > end), len(ends))
        ends[level : level + 1] = [x + width / 2]
        yield text(x, up(point.perplexity) + 20 + LINE_HEIGHT * level, name, "", "middle")
    for pattern in PATTERNS:
        own = [point for point in points if point.form.pattern == pattern]
        for point in own:
            bits = {"fp32": "32", "bf16": "16"}.get(point.form.weights, point.form.weights.partition(" ")[0])
            below = 21 if point.form.recovered else -8  # Above would be the same form without a recovery.
            words = f"{bits}, recovered" if point.form.recovered else bits
            yield text(across(value(point)), up(point.perplexity) + below, words, "quiet", "middle")
        if own:
            last = max(own, key=value)
            yield text(across(value(last)) + 9, up(last.perplexity) + 4.5, pattern)


def _legend() -> Iterable[str]:
    marks = (
        ('<path class="theirs" d="M{a} 45l9 9m0 -9l-9 9"/>', "not pruned"),
        ('<circle class="ours" cx="{x}" cy="49.5" r="5"/>', "pruned, on the Pareto front (the number: bits)"),
        ('<circle class="beaten" cx="{x}" cy="49.5" r="4"/>', "pruned, beaten by another"),
    )
    x = 26.0
    for mark, words in marks:
        yield mark.format(x=x, a=x - 4.5)
        yield text(x + 12, 54, words, "quiet")
        x += math.ceil(CHARACTER * len(words)) + 34
