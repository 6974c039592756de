"""What ``ace-triton study --quality`` runs: metrics alone, then recipes from cheap to expensive on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..recipe import Recipe
from ..solvers.update import Update
from ..sparsity import Sparsity
from .cells import Cell, check_axes, draws, shown_draw

PATTERN = "2:4"
"""The pattern that recipes are compared at, if it is among the sparsities."""

RESCALE, LEAST_SQUARES = Update("rescale"), Update()

BEST: Mapping[str, Any] = {"permute": True, "update": LEAST_SQUARES}
"""Parts of the recipe that recovery starts from."""

RECIPES: tuple[Mapping[str, Any], ...] = (
    {"update": RESCALE},
    {"permute": True},
    {"permute": True, "update": RESCALE},
    {"update": LEAST_SQUARES},
    BEST,
)
"""Parts of a recipe that are added to a metric, from cheap to expensive."""

SPARSEGPT = Cell(Recipe("sparsegpt"))


@dataclass(frozen=True)
class RecipesGrid:
    """The cells of one call.

    Attributes:
        metrics: run alone at every sparsity; the last one also with the recipes.
        sparsities: patterns or pruned fractions.
        lengths: tokens in a calibration sequence.
        seeds: random seeds of the calibration samples.
        minutes: budgets of recovery, each added to the last recipe.
        compared_at: the sparsity that recipes and SparseGPT run at: PATTERN if it is asked for, else the first n:m,
            else the first fraction (without channel orders, which need n:m).
        added: the last metric with each of RECIPES; recoveries come last.

    Raises:
        ValueError: if an axis other than ``minutes`` is empty, or has an invalid value.
    """

    metrics: tuple[Cell, ...]
    sparsities: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    minutes: tuple[float, ...] = ()
    compared_at: str = field(init=False, default=PATTERN)
    added: tuple[Cell, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        check_axes(self.lengths, methods=self.metrics, sparsities=self.sparsities, seeds=self.seeds)
        patterns = [Sparsity(pattern) for pattern in self.sparsities]
        grouped = [str(pattern) for pattern in patterns if pattern.n is not None]
        compared_at = PATTERN if PATTERN in grouped else next(iter(grouped), str(patterns[0]))
        added = [self.metrics[-1].with_recipe(**parts) for parts in RECIPES if grouped or not parts.get("permute")]
        recoveries = [replace(added[-1], minutes=minutes) for minutes in sorted(self.minutes)]
        object.__setattr__(self, "sparsities", tuple(map(str, patterns)))
        object.__setattr__(self, "compared_at", compared_at)
        object.__setattr__(self, "added", (*added, *recoveries))

    def cells(self) -> list[Cell]:
        """All cells, each once: for every seed what takes seconds, then for every seed the recoveries."""
        quick = [(variant, sparsity) for sparsity in self.sparsities for variant in self.metrics]
        quick += [(v, self.compared_at) for v in (*self.added, SPARSEGPT) if v.minutes is None]
        long = [(v, self.compared_at) for v in self.added if v.minutes is not None]
        ordered = [
            variant.at(sparsity, length, seed)
            for part in (quick, long)
            for length, seed in draws(self.lengths, self.seeds)
            for variant, sparsity in part
        ]
        return list(dict.fromkeys(ordered))

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown."""
        return shown_draw(self.lengths, self.seeds)
