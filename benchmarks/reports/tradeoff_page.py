"""docs/tradeoff.md, from the content of docs/tradeoff.json. No sentence knows the result beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ace_triton.study.tally import listed

from .machines import title
from .tradeoff_forms import DENSE_FORM, FORMS, HEAD_BITS, RECOVERY, Form
from .tradeoff_points import (
    SPEED_WORDS,
    Cost,
    Point,
    best,
    front_of,
    machines_of,
    points_of,
    size_cost,
    speed_cost,
)

SIZES = (4.0, 2.0, 1.1, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Limits of bytes a weight for which the page names the best form."""

SPEEDS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""The same for tokens a second, over those of the dense model in float32."""

NOT_MEASURED = "Not measured yet: the dense model in float32, or any pruned form."

SHOWN_DIGITS = 2
"""Digits after the point of a size or a speed on the page. Limits are compared with the rounded values."""


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
        "3.996 is shown as 4.00, and counts as at least 4. Speeds are of one machine each: a processor, and the "
        "instruction set that the compiled library of this package uses on it; llama.cpp and torch choose their own. "
        "Perplexities and sizes do not depend on the machine.",
        "",
    ]
    lines += [] if content["models"] else ["No model is measured yet."]
    for name, found in content["models"].items():
        lines += _section(name, found, machines_of(content, found))
    return "\n".join(lines).rstrip() + "\n"


def _decoders(content: dict[str, Any]) -> str:
    """What decodes the pruned forms, from the records of their speeds."""
    machines = [machine for found in content["models"].values() for machine in found["machines"]]
    speeds = [entry for machine in machines for entry in machine["speed"] if entry["form"]["pattern"]]
    compiled = sum(entry.get("decoder") == "compiled" for entry in speeds)
    step = "the [compiled step](guides/run-sparse.md#the-compiled-step)"
    if compiled == len(speeds):
        return f"Pruned forms decode with {step}."
    return (
        f"{compiled} of {len(speeds)} speeds of pruned forms are with {step}, the others in transformers with `--fuse`."
    )


def _section(name: str, found: dict[str, Any], machines: Sequence[dict[str, Any]]) -> list[str]:
    points = points_of(found)
    lines = [f"## {name}", "", _setting(found, points), "", *size_decision(points), ""]
    timed_on = [[point for point in points_of(found, of["speed"]) if point.faster is not None] for of in machines]
    anywhere = {point.form for timed in timed_on for point in timed}
    for machine, timed in zip(machines, timed_on, strict=True):
        lines += [f"### Speed on {title(machine['environment'])}", "", _speed_setting(machine["speed"]), ""]
        lines += [*speed_decision(points, timed, anywhere), ""]
    lines += [] if machines else ["Speeds are not measured yet.", ""]
    return [*lines, "### All forms", "", *_table(found, machines), ""]


def _setting(found: dict[str, Any], points: Sequence[Point]) -> str:
    """What the perplexities of a model were measured with."""
    setting = found["setting"]
    text = (
        f"Pruned with the preset {setting['preset']} on {setting['samples']} x {setting['length']} tokens, bits by "
        f"GPTQ; {setting['windows']} windows of {setting['window_length']} tokens of {setting['evaluation']}."
    )
    if any(point.form.recovered for point in points):
        text += (
            f" Recovered forms are trained for {RECOVERY.steps} optimizer steps of {RECOVERY.tokens_per_step} tokens "
            "of the calibration text after pruning; the weights are rounded to their bits at the start and after each "
            "step."
        )
    return text + _versions(found["perplexity"])


def _versions(entries: Sequence[dict[str, Any]]) -> str:
    versions = sorted({entry["version"] for entry in entries})
    return f" With {'; '.join(versions)}." if versions else ""


def _speed_setting(speeds: Sequence[dict[str, Any]]) -> str:
    """What the speeds of a model on one machine were measured with."""
    tokens, rounds = (_from_to([entry[key] for entry in speeds], 0) for key in ("new_tokens", "rounds"))
    return (
        f"One thread, {tokens} greedy tokens, medians over {rounds} rounds. All speeds are {SPEED_WORDS}, each "
        f"measured beside it in the same rounds. {_dense_speed(speeds)}{_versions(speeds)}"
    )


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


def size_decision(points: Sequence[Point]) -> list[str]:
    """What the perplexities and sizes of a model say, as Markdown."""
    dense = dense_of(points)
    if dense is None:
        return [NOT_MEASURED]
    missing, entries = _missing(points), _best_by_size(points)
    lines = []
    if missing:
        lines += [
            f"**Not decided yet. Not measured: {'; '.join(map(str, missing))}. The tables show the best of the forms "
            "that are measured so far.**",
            "",
        ]
    lines += _limits("bytes a weight, at most", entries, dense)
    if not missing:
        lines += ["", _verdict("size", "smallest", entries, points, dense)]
    return [*lines, "", _front("size", points, size_cost)]


def speed_decision(points: Sequence[Point], timed: Sequence[Point], anywhere: Collection[Form]) -> list[str]:
    """What the perplexities and speeds of a model on one machine say, as Markdown.

    Args:
        points: all forms.
        timed: the forms whose speed was measured there.
        anywhere: the forms whose speed was measured on some machine. Without those that are not pruned, a machine
            decides nothing.
    """
    dense, entries = dense_of(points), _best_by_speed(timed)
    if dense is None or not entries:
        return [NOT_MEASURED]
    here = {point.form for point in timed}
    untimed = [form for form in anywhere if not form.pattern and form not in here]
    lines = []
    if untimed:
        lines += [
            f"**Not decided on this machine. Not timed on it: {'; '.join(sorted(map(str, untimed)))}. The table shows "
            "the best of the forms that are.**",
            "",
        ]
    lines += _limits(f"{SPEED_WORDS}, at least", entries, dense)
    if not untimed and not _missing(points):
        lines += ["", _verdict("speed", "fastest", entries, points, dense)]
    return [*lines, "", _front("speed", timed, speed_cost)]


def dense_of(points: Sequence[Point]) -> Point | None:
    """The dense model in float32; None if it, or any pruned form, is missing, so that nothing can be compared."""
    if not any(point.pruned for point in points):
        return None
    return next((point for point in points if point.form == DENSE_FORM), None)


def _verdict(asked: str, most: str, entries: Sequence[_Limit], points: Sequence[Point], dense: Point) -> str:
    """Whether to prune for a size or a speed, in a sentence."""
    taken = {entry.best.form: entry.best for entry in entries if entry.best.pruned}
    if not taken:
        last = entries[-1].best
        return (
            f"**Do not prune for {asked}: at every limit in the table a form that is not pruned has the lowest "
            f"perplexity. The {most} of them is {last.form} ({_place(last)}, {_times(last, dense)}).**"
        )
    named = "; ".join(
        f"{form} ({_place(point)}, {_times(point, dense)}{_rivals(point, points)})" for form, point in taken.items()
    )
    return f"**A pruned form is the best one at some limit of {asked}: {named}. Elsewhere do not prune.**"


def advice(name: str, points: Sequence[Point]) -> str:
    """Within which limits a pruned form of a model is the best one, in a sentence, by the rule of the page."""
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


def _limits(heading: str, entries: Sequence[_Limit], dense: Point) -> list[str]:
    lines = [
        f"| {heading} | the best form | perplexity | the best pruned form | perplexity |",
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


def _front(what: str, points: Sequence[Point], cost: Cost) -> str:
    front = front_of(points, cost)
    count = sum(point.pruned for point in front)
    return (
        f"Pareto front of perplexity and {what} (no other form is better in one and as good in the other): "
        f"{'; '.join(str(point.form) for point in front)}. {count or 'None'} of these {len(front)} forms "
        f"{'are' if count > 1 else 'is'} pruned."
    )


def _table(found: dict[str, Any], machines: Sequence[dict[str, Any]]) -> list[str]:
    """All forms, with their speeds on each machine."""
    columns = [f"{SPEED_WORDS}, {title(machine['environment'])}" for machine in machines]
    lines = [
        f"| {' | '.join(['form', 'perplexity', 'bytes a weight', 'files', *columns])} |",
        "|---" + "|---:" * (3 + len(columns)) + "|",
    ]
    speeds = [{p.form: p.faster for p in points_of(found, machine["speed"])} for machine in machines]
    for point in points_of(found, [entry for machine in machines for entry in machine["speed"]]):
        size = "" if point.file_bytes is None else f"{point.file_bytes / 1e6:.0f} MB"
        cells = [str(point.form), f"{point.perplexity:.2f}", f"{point.size:.{SHOWN_DIGITS}f}", size]
        cells += [_speed_cell(of_machine.get(point.form)) for of_machine in speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _speed_cell(faster: float | None) -> str:
    return "" if faster is None else f"{faster:.{SHOWN_DIGITS}f}"
