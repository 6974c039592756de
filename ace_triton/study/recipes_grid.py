"""What ``ace-triton study --quality`` runs: metrics alone, then recipes from cheap to expensive on one of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..solvers.update import Update
from ..sparsity import Sparsity
from .cells import Cell, Variant, check_axes, draws, shown_draw
from .recipe import StudyRecipe

PATTERN = "2:4"
"""The pattern that recipes are compared at, if it is among the sparsities."""

RESCALE, LEAST_SQUARES = Update("rescale"), Update()

BEST = StudyRecipe(permute=True, update=LEAST_SQUARES)
"""The recipe that recovery starts from."""

RECIPES = (
    StudyRecipe(update=RESCALE),
    StudyRecipe(permute=True),
    StudyRecipe(permute=True, update=RESCALE),
    StudyRecipe(update=LEAST_SQUARES),
    BEST,
)
"""From cheap to expensive."""

SPARSEGPT = Variant("sparsegpt")


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
        recipes: what is added to the last metric, from cheap to expensive; recoveries come last.

    Raises:
        ValueError: if an axis other than ``minutes`` is empty, or has an invalid value.
    """

    metrics: tuple[Variant, ...]
    sparsities: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    minutes: tuple[float, ...] = ()
    compared_at: str = field(init=False, default=PATTERN)
    recipes: tuple[StudyRecipe, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        check_axes(self.lengths, methods=self.metrics, sparsities=self.sparsities, seeds=self.seeds)
        patterns = [Sparsity(pattern) for pattern in self.sparsities]
        grouped = [str(pattern) for pattern in patterns if pattern.n is not None]
        compared_at = PATTERN if PATTERN in grouped else next(iter(grouped), str(patterns[0]))
        recipes = [recipe for recipe in RECIPES if grouped or not recipe.permute]
        recoveries = [replace(recipes[-1], minutes=minutes) for minutes in sorted(self.minutes)]
        object.__setattr__(self, "sparsities", tuple(map(str, patterns)))
        object.__setattr__(self, "compared_at", compared_at)
        object.__setattr__(self, "recipes", (*recipes, *recoveries))

    def cells(self) -> list[Cell]:
        """All cells, each once: for every seed what takes seconds, then for every seed the recoveries."""
        added = [self.metrics[-1].with_recipe(recipe) for recipe in self.recipes]
        quick = [(variant, sparsity) for sparsity in self.sparsities for variant in self.metrics]
        quick += [(v, self.compared_at) for v in (*added, SPARSEGPT) if v.recipe.minutes is None]
        long = [(v, self.compared_at) for v in added if v.recipe.minutes is not None]
        ordered = [
            Cell.of(variant, sparsity, length, seed)
            for part in (quick, long)
            for length, seed in draws(self.lengths, self.seeds)
            for variant, sparsity in part
        ]
        return list(dict.fromkeys(ordered))

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown."""
        return shown_draw(self.lengths, self.seeds)
