"""One recipe against another over paired calibration draws, with the standard error of the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

from .cells import Cell
from .tally import Measure, Tally

FEWEST_PAIRS = 3
"""With fewer paired draws than this no difference is called clear."""


@dataclass(frozen=True)
class Comparison:
    """The mean relative change of perplexity, or of another measure, from a second recipe to the first.

    Attributes:
        change: relative change, from the mean log ratio; negative if the first recipe has less.
        error: standard error of ``change``; NaN for a single pair.
        pairs: number of draws (length and seed) that both recipes were measured on.
    """

    change: float
    error: float
    pairs: int

    @classmethod
    def of(cls, ratios: Collection[float]) -> Comparison | None:
        """From log ratios of paired draws; None without any."""
        if not ratios:
            return None
        error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        return cls(math.expm1(statistics.mean(ratios)), error, len(ratios))

    @property
    def clear(self) -> bool:
        """Whether the change is larger than two standard errors, over at least FEWEST_PAIRS pairs."""
        return self.pairs >= FEWEST_PAIRS and abs(self.change) > 2 * self.error


def compare(
    tally: Tally, one: Cell, other: Cell, sparsity: str, measure: Measure | None = None, length: int | None = None
) -> Comparison | None:
    """Compare two recipes by perplexity, or by another measure.

    Args:
        tally: the results.
        one, other: the recipes.
        sparsity: pattern or pruned fraction.
        measure: what to compare; None for perplexity.
        length: only draws of this calibration length; None for all draws.

    Returns:
        None if no draw was measured with both.
    """
    ratios = tally.paired(one, other, sparsity, measure)
    return Comparison.of([ratio for draw, ratio in ratios.items() if length is None or draw[0] == length])
