"""The tables of a study's page."""

from __future__ import annotations

from dataclasses import dataclass

from .cells import Variant
from .curve import Point, curve
from .findings import WANDA, Comparison, compare
from .quality_grid import SPARSEGPT
from .tally import Spread, Tally, shown_sparsity, shown_variant


@dataclass(frozen=True)
class TableRow:
    """A method and its values."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def best(tally: Tally, sparsity: str) -> TableRow:
    """The lowest mean perplexity at a sparsity, and whose it is."""
    found = [
        (spread.mean, shown_variant(variant), "" if length is None else f"L={length}")
        for variant in tally.everything
        for length in (tally.lengths if variant.calibrated else [None])
        if (spread := tally.perplexity(variant, sparsity, length)) is not None
    ]
    if not found:
        return TableRow(shown_sparsity(sparsity), ("-", ""))
    mean, name, length = min(found)
    return TableRow(shown_sparsity(sparsity), (f"{mean:,.1f}", f"{name} {length}".strip()))


def perplexity_table(tally: Tally, sparsity: str) -> NumberTable:
    """Mean, spread and number of seeds."""
    columns: list[int | None] = list(tally.lengths) or [None]
    rows = tuple(
        TableRow(shown_variant(v), tuple(shown_spread(tally.perplexity(v, sparsity, length)) for length in columns))
        for v in tally.variants
    )
    return NumberTable(
        f"Perplexity at {shown_sparsity(sparsity)}: mean ± standard deviation over seeds (number of seeds)",
        tuple("any L" if length is None else f"L={length}" for length in columns),
        rows,
    )


def time_table(tally: Tally) -> NumberTable:
    """Median CPU seconds."""
    columns: list[int | None] = list(tally.lengths) or [None]

    def shown(variant: Variant, length: int | None) -> str:
        seconds = tally.cpu_seconds(variant, None, length)
        return "" if seconds is None else f"{seconds:,.2f}"

    rows = tuple(TableRow(shown_variant(v), tuple(shown(v, length) for length in columns)) for v in tally.variants)
    return NumberTable(
        "Pruning in CPU seconds: median over seeds and sparsities, loading and evaluation left out",
        tuple("any L" if length is None else f"L={length}" for length in columns),
        rows,
    )


def curve_table(tally: Tally, sparsity: str) -> NumberTable:
    """Every point of a study of quality: time, perplexity, and paired differences from Wanda and SparseGPT."""
    lengths = tally.results.setting.window_lengths
    curves = [{(p.variant, p.length): p for p in curve(tally, sparsity, length)} for length in lengths]
    rivals = [rival for rival in (WANDA, SPARSEGPT) if tally.select(rival, sparsity)]

    def row(point: Point) -> TableRow:
        spreads = [p.perplexity if (p := found.get((point.variant, point.length))) else None for found in curves]
        against = [
            shown_change(None if rival == point.variant else compare(tally, point.variant, rival, sparsity, measure))
            for rival in rivals
            for measure in map(tally.over, lengths)
        ]
        times = (f"{point.cpu_seconds:,.1f}", f"{point.seconds:,.1f}")
        return TableRow(shown_point(tally, point), (*times, *map(shown_spread, spreads), *against))

    columns = (
        "CPU s",
        "wall s",
        *(f"perplexity ({length:,})" for length in lengths),
        *(f"against {shown_variant(rival)} ({length:,})" for rival in rivals for length in lengths),
    )
    return NumberTable(
        f"{shown_sparsity(sparsity)}, from fast to slow: median time; by tokens of a window, mean perplexity ± "
        "standard deviation over seeds (number of seeds), and mean paired change ± its standard error (of pairs)",
        columns,
        tuple(map(row, curves[0].values())),
    )


def shown_point(tally: Tally, point: Point) -> str:
    """A method with what is added to it, and its calibration length where there are several."""
    length = f", L={point.length}" if point.length is not None and len(tally.lengths) > 1 else ""
    return f"{shown_variant(point.variant)}{length}"


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
