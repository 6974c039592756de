"""Which recipe for which model, pattern and time: tables of docs/guides/which-recipe.md, from docs/fits.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ace_triton.study.tally import listed, shown_sparsity

from .fit_recipes import BLOCK_FIT, FIT, LABELS, METRICS, PUBLISHED, RECOVERED, SHOWN, SPARSEGPT

LEAST_CHANGE = 0.03
"""A smaller change of perplexity counts as none: calibration seeds differ by about as much."""

COMPARED = (
    ("ACE instead of Wanda", "ace", "wanda"),
    ("RIA instead of Wanda", "ria", "wanda"),
    ("RIA instead of ACE", "ria", "ace"),
    ("ACE with a=0.5 instead of Wanda", "ace a=0.5", "wanda"),
    ("ACE with a=0.75 instead of Wanda", "ace a=0.75", "wanda"),
    ("permuted and lstsq added to Wanda", FIT, "wanda"),
    ("block_epochs=2 added to that", BLOCK_FIT, FIT),
    ("recovery added to that, without block_epochs", RECOVERED, FIT),
    ("SparseGPT instead of Wanda", SPARSEGPT, "wanda"),
    ("Wanda, permuted, lstsq instead of SparseGPT", FIT, SPARSEGPT),
)
"""A change, the recipe with it, and the recipe without it."""


@dataclass(frozen=True)
class Measured:
    """Means over calibration seeds.

    Attributes:
        recipe: as in docs/fits.json.
        steps: number of recovery steps; 0 without recovery.
        perplexity, seconds: perplexity of the pruned model, and CPU seconds that it took to make.
    """

    recipe: str
    steps: int
    perplexity: float
    seconds: float

    def shown(self, dense: float) -> str:
        """Label, perplexity over the dense model's, and CPU seconds."""
        label = LABELS[self.recipe] + (f" for {self.steps} steps" if self.steps else "")
        return f"{label}: {self.perplexity / dense:.2f}x, {self.seconds:,.0f} s"


def measured(record: Mapping[str, Any], model: str, pattern: str) -> list[Measured]:
    """Every recipe of a model and pattern."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in record["results"]:
        if (result["model"], result["pattern"]) == (model, pattern):
            found.setdefault((result["recipe"], result["steps"]), []).append(result)
    return [
        Measured(*key, *(statistics.fmean(result[part] for result in results) for part in ("perplexity", "seconds")))
        for key, results in found.items()
    ]


def is_published(result: Measured) -> bool:
    """True if the recipe is a method as its authors published it, with our code."""
    return result.recipe in PUBLISHED


def beats(result: Measured, other: Measured) -> bool:
    """True if it has a lower perplexity in no more time."""
    return result.perplexity < other.perplexity and result.seconds <= other.seconds


def published(record: Mapping[str, Any]) -> list[str]:
    """Each published method by model and pattern, and the fastest better result that is not published."""
    lines = [
        "| model | pattern | published method | the fastest better recipe besides these three | more time |",
        "|---|---|---|---|---:|",
    ]
    for model, entry in record["models"].items():
        for pattern in SHOWN:
            found = measured(record, model, pattern)
            for theirs in (result for result in found if is_published(result)):
                better = [r for r in found if not is_published(r) and r.perplexity < theirs.perplexity]
                best = min(better, key=lambda result: result.seconds, default=None)
                ours = "none measured" if best is None else best.shown(entry["dense"])
                change = "" if best is None else f"{best.seconds / theirs.seconds - 1:+.0%}"
                shown = f"{shown_sparsity(pattern)} | {theirs.shown(entry['dense'])} | {ours} | {change}"
                lines.append(f"| {model} | {shown} |")
    return lines


def published_beaten(record: Mapping[str, Any]) -> list[str]:
    """Where a published method beats another, by model and pattern."""
    lines = []
    for model in record["models"]:
        for pattern in SHOWN:
            found = [result for result in measured(record, model, pattern) if is_published(result)]
            for worse in found:
                if better := [LABELS[result.recipe] for result in found if beats(result, worse)]:
                    verb = "beats" if len(better) == 1 else "beat"
                    lines.append(
                        f"- {model}, {shown_sparsity(pattern)}: {listed(better)} {verb} {LABELS[worse.recipe]}."
                    )
    if not lines:
        return ["None of the three has a lower perplexity than another in no more time."]
    return ["One published method beats another if it has a lower perplexity in no more time:", "", *lines]


def choices(record: Mapping[str, Any]) -> list[str]:
    """The best metric alone, the best recipe without recovery, and the best recipe, by model and pattern."""
    lines = [
        "| model | pattern | a metric alone | the best without recovery | the best with recovery |",
        "|---|---|---|---|---|",
    ]
    for model, entry in record["models"].items():
        for pattern in SHOWN:
            found = measured(record, model, pattern)
            groups = (
                [result for result in found if result.recipe in METRICS],
                [result for result in found if result.recipe in (SPARSEGPT, FIT, BLOCK_FIT)],
                [result for result in found if result.recipe == RECOVERED],
            )
            best = (min(group, key=lambda result: result.perplexity, default=None) for group in groups)
            shown = ["not measured" if result is None else result.shown(entry["dense"]) for result in best]
            if found:
                lines.append(f"| {model} | {shown_sparsity(pattern)} | {' | '.join(shown)} |")
    return lines


def changes(record: Mapping[str, Any]) -> list[str]:
    """What each choice does to the perplexity, by model and pattern, and what holds on some models only."""
    lines = [
        f"| change | model | {' | '.join(shown_sparsity(pattern) for pattern in SHOWN)} |",
        "|---|---|" + "---:|" * len(SHOWN),
    ]
    differing = []
    for what, with_it, without in COMPARED:
        by_pattern = {pattern: dict(_changes(record, pattern, with_it, without)) for pattern in SHOWN}
        for model in record["models"]:
            cells = [by_pattern[pattern].get(model) for pattern in SHOWN]
            if any(cell is not None for cell in cells):
                shown = " | ".join("" if cell is None else f"{cell:+.1%}" for cell in cells)
                lines.append(f"| {what} | {model} | {shown} |")
        for pattern, of_models in by_pattern.items():
            if len({_sign(change) for change in of_models.values()}) > 1:
                parts = [f"{_verb(change)} on {model} ({change:+.1%})" for model, change in of_models.items()]
                differing.append(f"- {what}, {shown_sparsity(pattern)}: {listed(parts)}.")
    note = f"Changes below {LEAST_CHANGE:.0%} count as none."
    if len(record["models"]) < 2:
        return [*lines, "", "Fewer than two models are measured, so nothing is known to hold on both."]
    if not differing:
        return [*lines, "", f"Every change has the same sign on all models. {note}"]
    return [*lines, "", f"Not the same on all models. {note}", "", *differing]


def _changes(record: Mapping[str, Any], pattern: str, with_it: str, without: str) -> Iterator[tuple[str, float]]:
    """By model, the relative change of perplexity; a recovery counts with its largest number of steps."""
    for model in record["models"]:
        found = sorted(measured(record, model, pattern), key=lambda result: result.steps)
        values = {result.recipe: result.perplexity for result in found}
        if with_it in values and without in values:
            yield model, values[with_it] / values[without] - 1


def _sign(change: float) -> int:
    return 0 if abs(change) < LEAST_CHANGE else 1 if change > 0 else -1


def _verb(change: float) -> str:
    return {0: "no change", 1: "worse", -1: "better"}[_sign(change)]


def setting(record: Mapping[str, Any]) -> list[str]:
    """With what the figures were measured."""
    machines: Sequence[str] = sorted({result["processor"] for result in record["results"]})
    seeds = sorted({result["seed"] for result in record["results"]})
    windows = sorted({model["setting"]["windows"] for model in record["models"].values()})
    parts = (
        f"windows of 512 tokens: {listed(list(map(str, windows)))}",
        f"calibration seeds: {listed(list(map(str, seeds)))}",
        f"processor: {listed(list(machines))}",
    )
    return ["; ".join(parts) + "."] if record["results"] else ["Not measured yet."]
