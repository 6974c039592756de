"""The tables of a study's page."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import Recipe
from .cells import Cell
from .comparison import Comparison, compare
from .curve import Point, curve
from .recipes_grid import SPARSEGPT
from .tally import Spread, Tally, shown_sparsity, shown_variant

WANDA = Cell(Recipe("wanda"))


@dataclass(frozen=True)
class TableRow:
    """A method or recipe and its values."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def best(tally: Tally, sparsity: str) -> TableRow:
    """The lowest mean perplexity at a sparsity, that over the dense model's, and the method."""
    found = [
        (spread.mean, shown_variant(variant), "" if length is None else f"L={length:,}")
        for variant in tally.everything
        for length in (tally.lengths if variant.recipe.calibrated else [None])
        if (spread := tally.perplexity(variant, sparsity, length)) is not None
    ]
    if not found:
        return TableRow(shown_sparsity(sparsity), ("-", "", ""))
    mean, name, length = min(found)
    return TableRow(shown_sparsity(sparsity), (f"{mean:,.1f}", shown_times(tally, mean), f"{name} {length}".strip()))


def perplexity_table(tally: Tally, sparsity: str) -> NumberTable:
    """Mean, spread and number of seeds, and the lowest mean over the dense model's perplexity."""
    lengths: list[int | None] = list(tally.lengths) or [None]

    def row(variant: Cell) -> TableRow:
        spreads = [tally.perplexity(variant, sparsity, length) for length in lengths]
        means = [spread.mean for spread in spreads if spread is not None]
        return TableRow(
            shown_variant(variant), (*map(shown_spread, spreads), shown_times(tally, min(means)) if means else "")
        )

    return NumberTable(
        f"Perplexity at {shown_sparsity(sparsity)}: mean ± standard deviation over seeds (number of seeds), and the "
        "lowest mean over the dense model's",
        (*_length_columns(lengths), "times dense, at best"),
        tuple(row(variant) for variant in tally.variants if tally.select(variant, sparsity)),
    )


def time_table(tally: Tally) -> NumberTable:
    """Median CPU seconds."""
    lengths: list[int | None] = list(tally.lengths) or [None]

    def shown(variant: Cell, length: int | None) -> str:
        seconds = tally.cpu_seconds(variant, None, length)
        return "" if seconds is None else f"{seconds:,.2f}"

    rows = tuple(TableRow(shown_variant(v), tuple(shown(v, length) for length in lengths)) for v in tally.variants)
    return NumberTable(
        "CPU seconds of pruning: median over seeds and sparsities, without loading and evaluation",
        _length_columns(lengths),
        rows,
    )


def _length_columns(lengths: list[int | None]) -> tuple[str, ...]:
    return tuple("any L" if length is None else f"L={length:,}" for length in lengths)


def curve_table(tally: Tally, sparsity: str) -> NumberTable:
    """Every recipe at a sparsity, from fast to slow: perplexity and time."""
    lengths = tally.results.setting.window_lengths
    curves = _curves(tally, sparsity)

    def row(point: Point) -> TableRow:
        further = [found.get((point.variant, point.length)) for found in curves[1:]]
        spreads = [None if p is None else p.perplexity for p in further]
        return TableRow(
            shown_point(tally, point),
            (
                shown_spread(point.perplexity),
                shown_times(tally, point.perplexity.mean),
                *map(shown_spread, spreads),
                f"{point.cpu_seconds:,.1f}",
                f"{point.seconds:,.1f}",
            ),
        )

    return NumberTable(
        f"{shown_sparsity(sparsity)}, from fast to slow: mean perplexity ± standard deviation over seeds (number of "
        "seeds), by tokens in a window; median time",
        (
            f"perplexity ({lengths[0]:,})",
            "times dense",
            *(f"perplexity ({length:,})" for length in lengths[1:]),
            "CPU s",
            "wall s",
        ),
        tuple(map(row, curves[0].values())),
    )


def paired_table(tally: Tally, sparsity: str) -> NumberTable | None:
    """Every recipe against Wanda and SparseGPT, in pairs of the same seed; None if neither was measured."""
    lengths = tally.results.setting.window_lengths
    rivals = [rival for rival in (WANDA, SPARSEGPT) if tally.select(rival, sparsity)]
    if not rivals:
        return None

    def row(point: Point) -> TableRow:
        changes = [
            shown_change(None if rival == point.variant else compare(tally, point.variant, rival, sparsity, measure))
            for rival in rivals
            for measure in map(tally.over, lengths)
        ]
        return TableRow(shown_point(tally, point), tuple(changes))

    return NumberTable(
        f"{shown_sparsity(sparsity)}: mean change of perplexity ± its standard error over pairs of the same seed "
        "(number of pairs), by tokens in a window",
        tuple(f"against {shown_variant(rival)} ({length:,})" for rival in rivals for length in lengths),
        tuple(map(row, _curves(tally, sparsity)[0].values())),
    )


def _curves(tally: Tally, sparsity: str) -> list[dict[tuple[Cell, int | None], Point]]:
    """For every window length, the points by method and calibration length."""
    lengths = tally.results.setting.window_lengths
    return [{(p.variant, p.length): p for p in curve(tally, sparsity, length)} for length in lengths]


def shown_point(tally: Tally, point: Point) -> str:
    """A recipe, and its calibration length if the study has several."""
    length = f", L={point.length:,}" if point.length is not None and len(tally.lengths) > 1 else ""
    return f"{shown_variant(point.variant)}{length}"


def shown_times(tally: Tally, perplexity: float) -> str:
    """ "3.3", the perplexity over the dense model's; "" if that was not measured."""
    dense = tally.results.dense
    return "" if dense is None else f"{perplexity / dense.perplexity:,.1f}"


def shown_spread(spread: Spread | None) -> str:
    """ "264.8 ± 6.2 (3)"."""
    if spread is None:
        return ""
    around = f" ± {spread.deviation:,.1f}" if len(spread.values) > 1 else ""
    return f"{spread.mean:,.1f}{around} ({len(spread.values)})"


def shown_change(comparison: Comparison | None) -> str:
    """ "-54.2% ± 0.6% (5)"."""
    if comparison is None:
        return ""
    around = f" ± {comparison.error:.1%}" if comparison.pairs > 1 else ""
    return f"{comparison.change:+.1%}{around} ({comparison.pairs})"
