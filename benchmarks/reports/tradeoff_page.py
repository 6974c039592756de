"""docs/tradeoff.md, from the content of docs/tradeoff.json. No sentence knows the result beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ace_triton.study.tally import listed

from .tradeoff_forms import DENSE, DENSE_FORM, FORMS, HEAD_BITS, RECOVERY, STEP_FORMS, Form

SIZES = (4.0, 2.0, 1.1, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Limits of bytes a weight for which the page names the best form."""

SPEEDS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""The same for tokens a second, over those of the dense model in float32."""

SHOWN_DIGITS = 2
"""Digits after the point of a size or a speed on the page. Limits are compared with the rounded values."""

SPEED_WORDS = "times the tokens a second of dense fp32"
"""What all speeds are: each is measured beside the dense model in float32, in the same rounds."""


@dataclass(frozen=True)
class Point:
    """A measured form.

    Attributes:
        form: the form.
        perplexity: on the evaluation text.
        size: bytes of a weight in the blocks.
        file_bytes: bytes of the weights' files; None for the dense model in transformers.
        faster: tokens a second over those of the dense model in float32, 1 for that model; None if not measured.
    """

    form: Form
    perplexity: float
    size: float
    file_bytes: int | None
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
        faster = speeds.get(form, {}).get("over_dense")
        if form == DENSE_FORM and speeds:
            faster = 1.0
        points.append(Point(form, entry["perplexity"], entry["bytes_per_weight"], entry["file_bytes"], faster))
    measured = {point.form: point for point in points}
    for form in STEP_FORMS:
        same = measured.get(Form(DENSE, "", form.weights))
        if form in speeds and same is not None:
            points.append(replace(same, form=form, faster=speeds[form]["over_dense"]))
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
        "![Perplexity against bytes of a weight, and against speed](images/tradeoff.svg)",
        "",
        "Measured by `make tradeoff`, which also writes the sentences below from the figures. Pruned forms are packed "
        "folders of this package. Forms that are not pruned are the model in transformers, in 8 bits in this package, "
        "and in llama.cpp, whose files its own converter makes from float32. All perplexities are of the same token "
        "ids in the same windows, by the same code, from the logits of each engine. Bytes of a weight count the linear "
        "layers in the blocks, with zeros counted as weights, and scales and positions included. llama.cpp also "
        "quantizes embeddings and the head; here a form of 8 or 4 bits has the head, and an embedding that shares its "
        f"weight, in {HEAD_BITS} bits (`pack --head-bits`), and computes in float32, with scales in float32 too. An "
        "embedding of its own, as in Qwen2.5-Coder-0.5B, stays in float32 here (`pack --embedding-bits` would round "
        "it): that is why files of 8 bits are larger than llama.cpp's there. " + _decoders(content),
        "",
        "Sizes and speeds are compared with a limit as they are shown, with two digits after the point: a speed of "
        "3.996 is shown as 4.00, and counts as at least 4.",
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
            "of the calibration text after pruning; the weights are rounded to their bits at the start and after each "
            "step."
        )
    versions = {entry["version"] for step in ("perplexity", "speed") for entry in found[step]}
    lines[-1] += f" With {'; '.join(sorted(versions))}." if versions else ""
    if found["speed"]:
        (first, *_) = speeds = found["speed"]
        tokens, rounds = (_from_to([entry[key] for entry in speeds], 0) for key in ("new_tokens", "rounds"))
        lines += [
            f"Speed: one thread of {first['processor']}, {tokens} greedy tokens, medians over {rounds} rounds. "
            f"All speeds are {SPEED_WORDS}, each measured beside it in the same rounds. {_dense_speed(speeds)}"
        ]
    return [*lines, "", *decision(points, timed), "", *_table(points), ""]


def _dense_speed(speeds: Sequence[dict[str, Any]]) -> str:
    """Tokens a second of the dense model in all runs, and how far apart two measurements of it are."""
    made = _from_to([entry["dense_tokens_per_second"] for entry in speeds], 1)
    itself = [entry["over_dense"] for entry in speeds if Form(**entry["form"]) == DENSE_FORM]
    noise = ""
    if itself:
        noise = (
            f" Noise: a second copy of the dense model, measured in the same way, came out at {itself[0]:.2f} times "
            "its own speed."
        )
    return f"The dense model made {made} tokens a second in these runs.{noise}"


def _from_to(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def decision(points: Sequence[Point], timed: Sequence[Point]) -> list[str]:
    """What the figures of a model say, as Markdown."""
    dense = next((point for point in points if point.form == DENSE_FORM), None)
    if dense is None or not any(point.pruned for point in points):
        return ["Not measured yet: the dense model in float32, or any pruned form."]
    by_size, by_speed = _best_by_size(points), _best_by_speed(timed)
    missing = _missing(points)
    lines = []
    if missing:
        lines += [
            f"**Not decided yet. Not measured: {'; '.join(map(str, missing))}. The tables show the best of the forms "
            "that are measured so far.**",
            "",
        ]
    lines += _limits("bytes a weight, at most", by_size, dense)
    if by_speed:
        lines += ["", *_limits(f"{SPEED_WORDS}, at least", by_speed, dense)]
    taken = [entry for entry in (*by_size, *by_speed) if entry.best.pruned]
    asked = "size and speed" if by_speed else "size"
    if not missing and not taken:
        smallest = next(entry.best for entry in reversed(by_size) if not entry.best.pruned)
        lines += [
            "",
            f"**Do not prune for {asked}: at every limit in the tables a form that is not pruned has the lowest "
            f"perplexity. The smallest of them is {smallest.form} ({smallest.size:.{SHOWN_DIGITS}f} bytes a weight, "
            f"{_times(smallest, dense)}).**",
        ]
    elif not missing:
        where = {entry.best.form: entry.best for entry in taken}
        named = "; ".join(
            f"{form} ({_place(point)}, {_times(point, dense)}{_rivals(point, points)})" for form, point in where.items()
        )
        lines += ["", f"**A pruned form is the best one at some limit of {asked}: {named}. Elsewhere do not prune.**"]
    lines += ["", *_fronts(points, timed)]
    if not by_speed:
        lines += ["", "Speeds are not measured yet."]
    return lines


def advice(name: str, points: Sequence[Point]) -> str:
    """Within which limits a pruned form of a model is the best one, in a sentence, by the rule of :func:`decision`."""
    missing = _missing(points)
    if missing or not any(point.pruned for point in points):
        return f"Whether to prune {name} is not decided yet: some forms are not measured."
    by_speed = _best_by_speed([point for point in points if point.faster is not None])
    asked = "size or speed" if by_speed else "size"
    limits = [f"at most {entry.limit:g} bytes a weight" for entry in _best_by_size(points) if entry.best.pruned]
    limits += [f"at least {entry.limit:g} {SPEED_WORDS}" for entry in by_speed if entry.best.pruned]
    if not limits:
        return (
            f"Do not prune {name} for {asked}: within every limit that was compared, a form that is not pruned has the "
            "lowest perplexity."
        )
    return (
        f"A pruned form of {name} is the best one only if you need {listed(limits)}; within every other limit of "
        f"{asked} that was compared, a form that is not pruned has the lowest perplexity."
    )


def _missing(points: Sequence[Point]) -> list[Form]:
    """Forms without pruning that are not measured."""
    measured = {point.form for point in points}
    return [form for form in FORMS if not form.pattern and form not in measured]


def _best_by_size(points: Sequence[Point]) -> list[_Limit]:
    return _by_limit(points, SIZES, lambda point, limit: _as_shown(point.size) <= limit)


def _best_by_speed(timed: Sequence[Point]) -> list[_Limit]:
    return _by_limit(timed, SPEEDS, lambda point, limit: _as_shown(point.faster or 0) >= limit)


def _as_shown(value: float) -> float:
    return round(value, SHOWN_DIGITS)


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
    speed = "" if point.faster is None else f", {point.faster:.{SHOWN_DIGITS}f} times the dense speed"
    return f"{point.size:.{SHOWN_DIGITS}f} bytes a weight{speed}"


def _rivals(point: Point, points: Sequence[Point]) -> str:
    """Whether a form that is not pruned is as small."""
    smaller = [other for other in points if not other.pruned and _as_shown(other.size) <= _as_shown(point.size)]
    return "" if smaller else "; no form without pruning is as small"


def _fronts(points: Sequence[Point], timed: Sequence[Point]) -> list[str]:
    lines = []
    for what, of, cost in (("size", points, size_cost), ("speed", timed, speed_cost)):
        if of:
            front = front_of(of, cost)
            named = "; ".join(str(point.form) for point in front)
            count = sum(point.pruned for point in front)
            pruned = f"{count or 'None'} of these {len(front)} forms {'are' if count > 1 else 'is'} pruned."
            lines.append(
                f"Pareto front of perplexity and {what} (no other form is better in one and as good in the other): "
                f"{named}. {pruned}"
            )
    return list(itertools.chain.from_iterable((entry, "") for entry in lines))[:-1]


def _table(points: Sequence[Point]) -> list[str]:
    lines = [
        f"| form | perplexity | bytes a weight | files | {SPEED_WORDS} |",
        "|---|---:|---:|---:|---:|",
    ]
    for point in points:
        size = "" if point.file_bytes is None else f"{point.file_bytes / 1e6:.0f} MB"
        speed = "" if point.faster is None else f"{point.faster:.{SHOWN_DIGITS}f}"
        lines.append(f"| {point.form} | {point.perplexity:.2f} | {point.size:.{SHOWN_DIGITS}f} | {size} | {speed} |")
    return lines
