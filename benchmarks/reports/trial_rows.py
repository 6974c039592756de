"""The rows of docs/trials.md: what is pruned, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ace_triton.recipe import Recipe
from ace_triton.solvers.update import Update

from .trial_metric import NAME

Idea = Literal["exchanges", "centered", "low rank"]


@dataclass(frozen=True)
class Row:
    """A pruned model.

    Attributes:
        name: on the page and for ``--only``.
        recipe: how it is pruned.
        idea: the section; None for a row that only others are compared with.
        base: name of the row that it is compared with.
        bias: which layers take their mean error into a bias; None for no layer.
    """

    name: str
    recipe: Recipe
    idea: Idea | None = None
    base: str | None = None
    bias: Literal["layers with a bias", "every layer"] | None = None


def _fit(pattern: str, **options: Any) -> Recipe:
    return Recipe(NAME, {"fit": True, **options}, pattern, permute=True)


ALONE, FIT = "Wanda 2:4", "fit 2:4"
PATTERN_FITS = (FIT, "fit 8:16", "fit 9:16", "fit 10:16")
"""What low-rank products are compared with: the row with the most bytes that has no more than the product's row."""

ROWS = (
    Row(ALONE, Recipe("wanda")),
    Row(f"{ALONE}, exchanges", Recipe(NAME, {"sweeps": 3}), "exchanges", ALONE),
    Row(FIT, Recipe("wanda", permute=True, update="lstsq")),
    Row(f"{FIT}, exchanges", _fit("2:4", sweeps=2), "exchanges", FIT),
    Row(f"{FIT}, 8 mask rounds", Recipe("wanda", permute=True, update=Update(mask_rounds=8)), "exchanges", FIT),
    Row(f"{FIT}, centered by 1, biases in every layer", _fit("2:4", fit_center=1.0), "centered", FIT, "every layer"),
    Row(f"{FIT}, rank 22", _fit("2:4", rank=22), "low rank"),
    Row("fit 8:16", Recipe("wanda", sparsity="8:16", permute=True, update="lstsq"), "low rank"),
    Row(f"{ALONE}, score centered by 1", Recipe(NAME, {"score_center": 1.0}), "centered", ALONE),
    Row("fit 9:16", Recipe("wanda", sparsity="9:16", permute=True, update="lstsq"), "low rank"),
    Row("fit 8:16, rank 22", _fit("8:16", rank=22), "low rank"),
    Row(f"{FIT}, centered by 0.5", _fit("2:4", fit_center=0.5), "centered", FIT),
    Row("Wanda 8:16", Recipe("wanda", sparsity="8:16")),
    Row(f"{ALONE}, exchanges in one pass", Recipe(NAME, {"sweeps": 1}), "exchanges", ALONE),
    Row("Wanda 8:16, exchanges", Recipe(NAME, {"sweeps": 3}, "8:16"), "exchanges", "Wanda 8:16"),
    Row(f"{ALONE}, score centered by 0.5", Recipe(NAME, {"score_center": 0.5}), "centered", ALONE),
    Row(f"{FIT}, centered by 1", _fit("2:4", fit_center=1.0), "centered", FIT),
    Row(f"{FIT}, biases in every layer", _fit("2:4"), "centered", FIT, "every layer"),
    Row(f"{FIT}, centered by 1, biases", _fit("2:4", fit_center=1.0), "centered", FIT, "layers with a bias"),
    Row(f"{FIT}, rank 16", _fit("2:4", rank=16), "low rank"),
    Row(f"{FIT}, rank 22, twice", _fit("2:4", rank=22, rounds=2), "low rank"),
    Row("fit 10:16", Recipe("wanda", sparsity="10:16", permute=True, update="lstsq"), "low rank"),
)
"""In order of measurement."""
