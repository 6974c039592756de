"""What docs/curve holds: metrics alone, recipes, recoveries and the published forms, on SmolLM2-135M."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ace_triton.recipe import Recipe
from ace_triton.solvers.update import Update
from ace_triton.study.cells import Cell, draws, shown_draw
from ace_triton.study.recipes_grid import BEST, PATTERN, RECIPES, SPARSEGPT

WANDA, RIA, COSP, ACE = map(Cell, map(Recipe, ("wanda", "ria", "cosp", "ace")))
ACE_TIMES = Cell(Recipe("ace", {"sign": 1}))
"""ACE multiplied by VarP, as its paper has it, in place of divided."""

SPARSITIES = ("0.5", "2:4", "4:8")
METRICS = (WANDA, RIA, COSP, ACE, ACE_TIMES)
"""Run alone at every sparsity."""

ADDED = (
    *(metric.with_recipe(**parts) for metric in (WANDA, ACE, ACE_TIMES) for parts in RECIPES),
    COSP.with_recipe(**BEST),
)
"""Run at PATTERN."""

PUBLISHED = tuple(Cell(Recipe(method), published=True) for method in ("wanda", "ria", "sparsegpt"))
"""The methods' published forms, run at PATTERN."""

RECOVERED = (
    replace(WANDA.with_recipe(**BEST), minutes=5.0),
    replace(WANDA.with_recipe(permute=True, update=Update(mask_rounds=8)), minutes=20.0),
)
"""Run at PATTERN."""


@dataclass(frozen=True)
class QualityGrid:
    """The cells of the study in docs/curve.

    Attributes:
        recovery: run the recoveries; False runs everything else.
        lengths: tokens in a calibration sequence.
        seeds: random seeds of the calibration samples.
    """

    recovery: bool = False
    lengths: tuple[int, ...] = (128,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def cells(self) -> list[Cell]:
        """All cells, each once, seed by seed."""
        at_pattern = RECOVERED if self.recovery else (*ADDED, SPARSEGPT, *PUBLISHED)
        alone = () if self.recovery else METRICS
        wanted = [(metric, sparsity) for sparsity in SPARSITIES for metric in alone]
        wanted += [(variant, PATTERN) for variant in at_pattern]
        return [
            variant.at(sparsity, length, seed)
            for length, seed in draws(self.lengths, self.seeds)
            for variant, sparsity in wanted
        ]

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown."""
        return shown_draw(self.lengths, self.seeds)
