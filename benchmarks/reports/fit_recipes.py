"""The cells of the report on fits: a recipe for each pattern, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ace_triton.recipe import Recipe
from ace_triton.solvers.update import Update

PATTERNS = ("2:4", "8:16", "0.5", "4:8", "16:32")
"""In order of measurement; tables show them in the order of SHOWN."""

SHOWN = ("2:4", "4:8", "8:16", "16:32", "0.5")

METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("wanda", {}),
    "ace": ("ace", {}),
    "ria": ("ria", {}),
    "ace a=0.5": ("ace", {"a": 0.5}),
    "ace a=0.75": ("ace", {"a": 0.75}),
}
"""Method and options of each metric alone."""

SPARSEGPT, FIT, BLOCK_FIT, RECOVERED = "sparsegpt", "fit", "block fit", "recovered"
RECIPES = (*METRICS, SPARSEGPT, FIT, BLOCK_FIT, RECOVERED)
BASIC = ("wanda", "ace", "ria", SPARSEGPT, FIT, BLOCK_FIT, RECOVERED)
"""The recipes whose metric has its default options."""
PUBLISHED = ("wanda", "ria", SPARSEGPT)
LABELS = {
    "wanda": "Wanda",
    "ace": "ACE",
    "ria": "RIA",
    "ace a=0.5": "ACE, a=0.5",
    "ace a=0.75": "ACE, a=0.75",
    SPARSEGPT: "SparseGPT",
    FIT: "Wanda, permuted, lstsq",
    BLOCK_FIT: "Wanda, permuted, lstsq, block_epochs=2",
    RECOVERED: "Wanda, permuted, lstsq, recovered",
}


SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512
"""The calibration sample, and the windows of the evaluation, in tokens."""


@dataclass(frozen=True)
class Result:
    """A pruned model.

    Attributes:
        model: name on the page.
        pattern: n:m, or the pruned fraction.
        recipe: one of :data:`RECIPES`.
        seed: random seed of the calibration sample.
        steps: number of optimizer steps of the recovery; 0 without one.
        perplexity: on the evaluation text.
        seconds: CPU seconds of pruning and recovery, all threads together, without loading and evaluation.
        threads: number of torch's threads.
        processor: its name.
        date: UTC, ISO 8601.
    """

    model: str
    pattern: str
    recipe: str
    seed: int
    steps: int
    perplexity: float
    seconds: float
    threads: int
    processor: str
    date: str


def cells(seed: int, steps: int) -> list[tuple[str, str, int]]:
    """Pattern, recipe, and steps of recovery of all cells of a seed: what takes seconds first, recoveries last."""
    ordered = [(pattern, recipe) for pattern in PATTERNS for recipe in (*METRICS, SPARSEGPT, FIT)]
    ordered += [(pattern, BLOCK_FIT) for pattern in PATTERNS]
    without = [(pattern, recipe, 0) for pattern, recipe in ordered]
    return without + [(pattern, RECOVERED, steps) for pattern in PATTERNS if steps]


def label(cell: tuple[str, str, int]) -> str:
    """The name of a cell, such as "2:4 block fit"."""
    pattern, recipe, _ = cell
    return f"{pattern} {recipe}"


def recipe_of(name: str, pattern: str) -> Recipe:
    """The recipe of a cell; a fraction has no groups, so its channels are not permuted."""
    if name in METRICS:
        method, options = METRICS[name]
        return Recipe(method, options, pattern)
    if name == SPARSEGPT:
        return Recipe("sparsegpt", sparsity=pattern)
    update = Update(block_epochs=2) if name == BLOCK_FIT else Update()
    return Recipe("wanda", sparsity=pattern, permute=":" in pattern, update=update)
