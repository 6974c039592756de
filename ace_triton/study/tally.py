"""Means and spreads over the cells of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..methods.registry import metric_names
from ..sparsity import Sparsity
from .cells import Cell
from .journal import Results
from .records import CellResult, Sample, StageSeconds

STAGES = ("calibration", "statistics", "select")

Measure = Callable[[CellResult], float]
"""A number from a result, as its perplexity."""

Draw = tuple[int | None, int | None]
"""Length and seed of a calibration sample; None for methods without calibration."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number.

    Attributes:
        values: the finite ones.
        mean: mean of the values.
        deviation: their standard deviation; 0 for a single value.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """From any values; None if none is finite."""
        finite = tuple(value for value in values if math.isfinite(value))
        if not finite:
            return None
        return cls(finite, statistics.mean(finite), statistics.stdev(finite) if len(finite) > 1 else 0.0)


class Tally:
    """The cells of a study by method, sparsity and length.

    Attributes:
        results: what was measured.
        variants: methods with nothing added, in the registry's order, each before its variants with options.
        recipes: methods with something added, in the same order; then those with recovery; then published forms.
        sparsities: fractions first, then patterns.
        lengths: tokens in a calibration sequence, ascending.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        cells = list(results.cells)
        order = metric_names()
        found = sorted({cell.variant for cell in cells}, key=lambda v: (order.index(v.recipe.method), v.label))
        self.variants: list[Cell] = [variant for variant in found if not variant.additions]
        self.recipes: list[Cell] = sorted(
            (variant for variant in found if variant.additions),
            key=lambda v: (v.published, v.minutes or 0.0),
        )
        self.sparsities: list[str] = sorted({cell.sparsity for cell in cells}, key=lambda s: (":" in s, len(s), s))
        self.lengths: list[int] = sorted({cell.length for cell in cells if cell.length is not None})

    @property
    def everything(self) -> list[Cell]:
        """Methods with nothing added, then recipes."""
        return self.variants + self.recipes

    @property
    def calibrated(self) -> list[Cell]:
        """Methods with nothing added that depend on calibration tokens."""
        return [variant for variant in self.variants if variant.recipe.calibrated]

    def select(
        self, variant: Cell | None = None, sparsity: str | None = None, length: int | None = None
    ) -> list[CellResult]:
        """The results of matching cells; one without calibration matches every length."""
        return [
            found
            for cell, found in self.results.cells.items()
            if variant in (None, cell.variant)
            and sparsity in (None, cell.sparsity)
            and (length is None or cell.length in (None, length))
        ]

    def perplexity(self, variant: Cell, sparsity: str, length: int | None = None) -> Spread | None:
        """Perplexity over seeds; None if nothing was measured."""
        return Spread.of(found.perplexity for found in self.select(variant, sparsity, length))

    def cpu_seconds(self, variant: Cell, sparsity: str | None = None, length: int | None = None) -> float | None:
        """Median CPU seconds over seeds, and over sparsities if none is given; None if nothing was measured."""
        times = [found.cpu_seconds for found in self.select(variant, sparsity, length)]
        return statistics.median(times) if times else None

    def stages(self, variant: Cell, length: int) -> StageSeconds | None:
        """CPU seconds by stage, in the proportions of the wall clock: medians over seeds and sparsities.

        None if nothing was measured.
        """
        found = self.select(variant, length=length)
        if not found:
            return None

        def median(stage: str) -> float:
            return statistics.median(f.cpu_seconds * getattr(f.seconds, stage) / f.seconds.total for f in found)

        return StageSeconds(median("calibration"), median("statistics"), median("select"), median("total"))

    def over(self, window_length: int) -> Measure:
        """The measure of perplexity over windows of a length; NaN if it was not measured."""
        if window_length == self.results.setting.window_length:
            return _perplexity
        return lambda found: found.perplexity_over(window_length)

    def dense_over(self, window_length: int) -> float:
        """The dense model's perplexity over windows of a length; NaN if it was not measured."""
        dense = self.results.dense
        if dense is None:
            return math.nan
        found = {self.results.setting.window_length: dense.perplexity}
        found |= {evaluation.length: evaluation.perplexity for evaluation in dense.further}
        return found.get(window_length, math.nan)

    def paired(self, one: Cell, other: Cell, sparsity: str, measure: Measure | None = None) -> dict[Draw, float]:
        """log(one / other) of perplexity, or of another measure, for every draw that both were measured on."""
        measure = measure or _perplexity
        theirs = {(found.cell.length, found.cell.seed): found for found in self.select(other, sparsity)}
        ratios = {}
        for found in self.select(one, sparsity):
            draw = found.cell.length, found.cell.seed
            ratio = measure(found) / measure(theirs[draw]) if draw in theirs else math.nan
            if math.isfinite(ratio) and ratio > 0:
                ratios[draw] = math.log(ratio)
        return ratios

    def samples(self, sparsity: str) -> list[Sample]:
        """Texts and divergences at a sparsity, in the order of :attr:`everything`."""
        found = {cell.variant: s for cell, s in self.results.samples.items() if cell and cell.sparsity == sparsity}
        return [found[variant] for variant in self.everything if variant in found]


def _perplexity(found: CellResult) -> float:
    return found.perplexity


def shown_sparsity(sparsity: str) -> str:
    """ "50%" for "0.5"; a pattern unchanged."""
    return sparsity if Sparsity(sparsity).n is not None else f"{float(sparsity) * 100:.4g}%"


def shown_variant(variant: Cell) -> str:
    """A method as its paper writes it, with options and what is added."""
    names = {"wanda": "Wanda", "ria": "RIA", "stade": "STADE", "dass": "DaSS", "cosp": "CosP", "varp": "VarP"}
    names |= {"ace": "ACE", "ace-paper": "ACE as published", "saap": "SAAP", "sparsegpt": "SparseGPT"}
    name = names.get(variant.recipe.method, variant.recipe.method)
    options = ", ".join(f"{key}={value}" for key, value in variant.recipe.options.items())
    return ", ".join([f"{name} ({options})" if options else name, *variant.additions])


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
