"""What a study of quality runs: metrics alone, then what can be added to one, beside the published forms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..sparsity import Sparsity
from ..update import Update
from .cells import Cell, Variant, check_axes, draws, shown_draw
from .recipe import Recipe

PATTERN = "2:4"
"""At which more than the metrics alone is run."""

RESCALE, LEAST_SQUARES = Update("rescale"), Update()

BEST = Recipe(permute=True, update=LEAST_SQUARES)
"""What recovery goes on from."""

RECIPES = (
    Recipe(update=RESCALE),
    Recipe(permute=True),
    Recipe(permute=True, update=RESCALE),
    Recipe(update=LEAST_SQUARES),
    BEST,
)
"""From cheap to dear."""

SPARSEGPT = Variant("sparsegpt")

PUBLISHED = tuple(Variant(method, recipe=Recipe(published=True)) for method in ("wanda", "ria", "sparsegpt"))
"""The published forms, as points of the same run."""


@dataclass(frozen=True)
class QualityGrid:
    """The cells of one call of a study of quality.

    Attributes:
        metrics: run alone at every sparsity; the last of them also with each of :data:`RECIPES`, at :data:`PATTERN`.
        sparsities: patterns or pruned fractions.
        lengths: tokens of a calibration sequence.
        seeds: of the calibration crops.
        minutes: budgets of recovery, on top of :data:`BEST`.
        recoveries: the recipes that follow from them.

    Raises:
        ValueError: an axis but ``minutes`` is empty, or holds what is none of its kind.
    """

    metrics: tuple[Variant, ...]
    sparsities: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    minutes: tuple[float, ...] = ()
    recoveries: tuple[Recipe, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        check_axes(self.lengths, methods=self.metrics, sparsities=self.sparsities, seeds=self.seeds)
        object.__setattr__(self, "sparsities", tuple(str(Sparsity(pattern)) for pattern in self.sparsities))
        object.__setattr__(self, "recoveries", tuple(replace(BEST, minutes=m) for m in sorted(self.minutes)))

    def cells(self) -> list[Cell]:
        """All cells, each once: seed by seed what takes a minute, then, seed by seed again, recovery."""
        last = self.metrics[-1]
        added = [last.with_recipe(recipe) for recipe in RECIPES]
        quick = [(variant, sparsity) for sparsity in self.sparsities for variant in self.metrics]
        long: list[tuple[Variant, str]] = []
        if PATTERN in self.sparsities:
            quick += [(variant, PATTERN) for variant in (*added, SPARSEGPT, *PUBLISHED)]
            long = [(last.with_recipe(recipe), PATTERN) for recipe in self.recoveries]
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
