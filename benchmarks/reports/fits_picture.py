"""docs/images/fits.svg: perplexity against the time of pruning, by model and pattern, from docs/fits.json."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ace_triton.study.tally import shown_sparsity

from .drawing import Scale, circle, cross, front, front_corners, grid, legend, line, opening, text
from .fit_advice import Measured, beats, is_published, measured
from .fit_recipes import BASIC, LABELS
from .labels import Box, placed

PATTERNS = ("2:4", "8:16")
"""The patterns of the panels, from left to right."""

LEAST = 3
"""A model is drawn if each of the patterns has as many results."""

WIDTH, ROW, TITLE = 1000, 420, 60
PANELS = ((62, 484), (550, 972))
TOP, BOTTOM = 58, 50
"""Free space above and below the plots of a model."""

RATIOS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10)
SECONDS = (20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000)


def picture(record: Mapping[str, Any]) -> str:
    """The picture: one row for each model with enough results, the same for the same records."""
    models = [name for name in record["models"] if all(len(drawn(record, name, p)) >= LEAST for p in PATTERNS)]
    described = ". ".join(_in_words(record, name, pattern) for name in models for pattern in PATTERNS)
    title = "Perplexity over the dense model's, against the CPU seconds of pruning"
    parts = [*opening(title, described, WIDTH, TITLE + ROW * len(models)), *_legend()]
    for row, name in enumerate(models):
        start = TITLE + row * ROW
        parts.append(text(20, start + 24, name, "title"))
        for pattern, (left, right) in zip(PATTERNS, PANELS, strict=True):
            parts += _panel(record, name, pattern, start, left, right)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _in_words(record: Mapping[str, Any], model: str, pattern: str) -> str:
    values = (f"{words(r)} {ratio(record, model, r):.2f}" for r in drawn(record, model, pattern))
    return f"{model} at {pattern}: {'; '.join(values)}"


def drawn(record: Mapping[str, Any], model: str, pattern: str) -> list[Measured]:
    """The results of a panel: metrics with other options are left out."""
    found = measured(record, model, pattern)
    return sorted((r for r in found if r.recipe in BASIC), key=lambda result: (result.seconds, result.perplexity))


def words(result: Measured) -> str:
    """The name of a mark; channels are permuted and weights fitted in all recipes that say so."""
    name = LABELS[result.recipe].replace("Wanda, permuted, lstsq, ", "the fit, ")
    return name.replace("recovered", "recovery") + (f" of {result.steps} steps" if result.steps else "")


def ratio(record: Mapping[str, Any], model: str, result: Measured) -> float:
    """Perplexity over the dense model's."""
    return result.perplexity / record["models"][model]["dense"]


def _panel(
    record: Mapping[str, Any], model: str, pattern: str, start: float, left: float, right: float
) -> Iterable[str]:
    results = drawn(record, model, pattern)
    every = [ratio(record, model, result) for each in PATTERNS for result in drawn(record, model, each)]
    times = [result.seconds for result in results]
    up = Scale(1, 1.25 * max(every), start + ROW - BOTTOM, start + TOP)
    across = Scale(0.75 * min(times), 1.4 * max(times), left, right)
    yield from grid(across, up, SECONDS, RATIOS)
    yield line(left, up(1), right, up(1), "dense")
    yield text(left - 42, up.end - 9, f"{shown_sparsity(pattern)}: perplexity over dense", "quiet")
    yield text((left + right) / 2, up.start + 38, "CPU seconds of pruning and recovery", "quiet", "middle")
    places = [(across(result.seconds), up(ratio(record, model, result)), words(result)) for result in results]
    best = [place for place, result in zip(places, results, strict=True) if not beaten(result, results)]
    corners = front_corners([place[:2] for place in best])
    yield front(best[0][:2], corners)
    stairs = list(itertools.pairwise([best[0][:2], *corners]))
    for label in placed(places, Box(left, up.end, right, up.start), stairs):
        yield from label.drawn()
    for (x, y, _), result in zip(places, results, strict=True):
        yield cross(x, y) if is_published(result) else circle(x, y, "ours", 5)


def beaten(result: Measured, results: Sequence[Measured]) -> bool:
    """True if another result has a lower perplexity in no more time."""
    return any(beats(other, result) for other in results)


def _legend() -> Iterable[str]:
    return legend(
        (
            ('<path class="theirs" d="M{a} 45l9 9m0 -9l-9 9"/>', "published methods, by the code of this package"),
            ('<circle class="ours" cx="{x}" cy="49.5" r="5"/>', "ACE as changed here, fits and recovery"),
        )
    )
