"""Means and spreads over the cells of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..metrics import metric_names
from ..sparsity import Sparsity
from .cells import Cell, Variant
from .journal import Results
from .recipe import PLAIN
from .records import CellResult, Sample, StageSeconds

STAGES = ("calibration", "statistics", "select")

Measure = Callable[[CellResult], float]
"""What of a result is looked at."""

Draw = tuple[int | None, int | None]
"""Length and seed of calibration sequences."""


@dataclass(frozen=True)
class Spread:
    """Some values of one thing.

    Attributes:
        values: them, all finite.
        mean, deviation: and their standard deviation; 0 of a single one.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None where no value is finite."""
        finite = tuple(value for value in values if math.isfinite(value))
        if not finite:
            return None
        return cls(finite, statistics.mean(finite), statistics.stdev(finite) if len(finite) > 1 else 0.0)


class Tally:
    """The cells of a study by method, sparsity and length.

    Attributes:
        results: what it counts.
        variants: the methods with nothing added, in the registry's order, each before its variants with options.
        recipes: the methods with something added, likewise; those with recovery after others, published forms last.
        sparsities: fractions first, then patterns.
        lengths: ascending; methods without calibration have none.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        cells = list(results.cells)
        order = metric_names()
        found = sorted({cell.variant for cell in cells}, key=lambda v: (order.index(v.method), v.label))
        self.variants: list[Variant] = [variant for variant in found if variant.recipe == PLAIN]
        self.recipes: list[Variant] = sorted(
            (variant for variant in found if variant.recipe != PLAIN),
            key=lambda v: (v.recipe.published, v.recipe.minutes or 0.0),
        )
        self.sparsities: list[str] = sorted({cell.sparsity for cell in cells}, key=lambda s: (":" in s, len(s), s))
        self.lengths: list[int] = sorted({cell.length for cell in cells if cell.length is not None})

    @property
    def everything(self) -> list[Variant]:
        """The methods with nothing added, then those with something."""
        return self.variants + self.recipes

    @property
    def calibrated(self) -> list[Variant]:
        """The methods with nothing added that look at calibration tokens."""
        return [variant for variant in self.variants if variant.calibrated]

    def select(
        self, variant: Variant | None = None, sparsity: str | None = None, length: int | None = None
    ) -> list[CellResult]:
        """The results of those cells; a method without calibration has the same at every length."""
        return [
            found
            for cell, found in self.results.cells.items()
            if variant in (None, cell.variant)
            and sparsity in (None, cell.sparsity)
            and (length is None or cell.length in (None, length))
        ]

    def perplexity(self, variant: Variant, sparsity: str, length: int | None = None) -> Spread | None:
        """Over seeds; None where nothing was measured."""
        return Spread.of(found.perplexity for found in self.select(variant, sparsity, length))

    def cpu_seconds(self, variant: Variant, sparsity: str | None = None, length: int | None = None) -> float | None:
        """The median over seeds, and over sparsities where none is named; None where nothing was measured."""
        times = [found.cpu_seconds for found in self.select(variant, sparsity, length)]
        return statistics.median(times) if times else None

    def stages(self, variant: Variant, length: int) -> StageSeconds | None:
        """CPU seconds, split over the stages as wall clock was: medians over seeds and sparsities.

        None where nothing was measured.
        """
        found = self.select(variant, length=length)
        if not found:
            return None

        def median(stage: str) -> float:
            return statistics.median(f.cpu_seconds * getattr(f.seconds, stage) / f.seconds.total for f in found)

        return StageSeconds(median("calibration"), median("statistics"), median("select"), median("total"))

    def over(self, window_length: int) -> Measure:
        """Perplexity over windows of that length; NaN where it was not measured."""
        if window_length == self.results.setting.window_length:
            return _perplexity
        return lambda found: found.perplexity_over(window_length)

    def paired(self, one: Variant, other: Variant, sparsity: str, measure: Measure | None = None) -> dict[Draw, float]:
        """log(perplexity of one / of other), or of another measure, for every draw that both were measured on."""
        cells, ratios, measure = self.results.cells, {}, measure or _perplexity
        for cell, found in cells.items():
            twin = cells.get(Cell(other, sparsity, cell.length, cell.seed))
            if cell.variant == one and cell.sparsity == sparsity and twin is not None:
                ratio = measure(found) / measure(twin)
                if math.isfinite(ratio) and ratio > 0:
                    ratios[cell.length, cell.seed] = math.log(ratio)
        return ratios

    def samples(self, sparsity: str) -> list[Sample]:
        """Texts and divergences of the methods at a sparsity, in their order."""
        found = {cell.variant: s for cell, s in self.results.samples.items() if cell and cell.sparsity == sparsity}
        return [found[variant] for variant in self.everything if variant in found]


def _perplexity(found: CellResult) -> float:
    return found.perplexity


def shown_sparsity(sparsity: str) -> str:
    """ "50%" for "0.5"; a pattern as it is."""
    return sparsity if Sparsity(sparsity).n is not None else f"{float(sparsity) * 100:.4g}%"


def shown_variant(variant: Variant) -> str:
    """A method as its papers write it, with its options and what is added."""
    names = {"wanda": "Wanda", "ria": "RIA", "stade": "STADE", "dass": "DaSS", "cosp": "CosP", "varp": "VarP"}
    names |= {"ace": "ACE", "ace-paper": "ACE as published", "saap": "SAAP", "sparsegpt": "SparseGPT"}
    name = names.get(variant.method, variant.method)
    options = ", ".join(f"{key}={value}" for key, value in variant.options)
    return ", ".join([f"{name} ({options})" if options else name, *variant.recipe.words])


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
