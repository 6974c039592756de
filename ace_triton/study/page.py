"""A study's results as one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jinja2
from markupsafe import Markup

from .. import __version__
from ..kernels.variance_factor import VarianceNorm
from .advice import advice
from .curve import curve, curved_sparsities
from .curve_plot import curve_figure, curve_marks, curve_methods
from .journal import Results
from .marks import LegendEntry, Mark, glyph, series
from .norm_plots import kinds, norm_map, pole_map
from .notes import longer_calibration, nearest_text, poles
from .plots import STAGE_NAMES, divergence, perplexity_by_length, perplexity_by_time, time_bars
from .records import Sample
from .tables import NumberTable, best, curve_table, paired_table, perplexity_table, time_table
from .tally import Tally, shown_sparsity, shown_variant

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Card:
    """A model's text after one prompt.

    Attributes:
        name: the recipe, or "dense".
        shared, rest: the text, split where it leaves the dense model's.
        note: the divergence from the dense model, in words.
    """

    name: str
    shared: str
    rest: str
    note: str


@dataclass(frozen=True)
class TextGroup:
    """All models' texts at one sparsity: for every prompt, a card for each."""

    sparsity: str
    prompts: tuple[tuple[str, tuple[Card, ...]], ...]


@dataclass(frozen=True)
class CurveGroup:
    """Perplexity against time at one sparsity: a legend, a figure for every window length, and tables."""

    marks: tuple[Mark, ...]
    methods: tuple[LegendEntry, ...]
    figures: tuple[Markup, ...]
    tables: tuple[NumberTable, ...]


def write_page(results: Results, path: str | Path) -> None:
    """Draw the results into a file, atomically."""
    write_text(path, page(results))


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)


def page(results: Results) -> str:
    """The page of a study, as HTML."""
    return environment().get_template(TEMPLATE).render(page_values(results))


def environment(*folders: str | Path) -> jinja2.Environment:
    """Where templates come from: this package, then ``folders``, whose templates may extend the page."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("ace_triton.study", "."), jinja2.FileSystemLoader(folders)]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def page_values(results: Results) -> dict[str, Any]:
    """What the page's template is filled with."""
    tally = Tally(results)
    norms = results.norms
    curved = curved_sparsities(tally)
    curves = [curves_of(tally, sparsity) for sparsity in curved]
    drawn = list(enumerate(tally.sparsities if len(tally.lengths) > 1 or not curves else []))
    return {
        "setting": results.setting,
        "version": __version__,
        "runs": list(dict.fromkeys(results.runs)),
        "machine": machine(results),
        "dense": results.dense,
        "cells": len(results.cells),
        "seeds": len({cell.seed for cell in results.cells if cell.seed is not None}),
        "best": [best(tally, sparsity) for sparsity in tally.sparsities],
        "advice": [found for sparsity in tally.sparsities if (found := advice(tally, sparsity)) is not None],
        "lengths": tally.lengths,
        "curves": curves,
        "others": [curve_table(tally, s) for s in tally.sparsities if curves and s not in curved],
        "legend": [LegendEntry(shown_variant(v), glyph(tally, v), series(tally, v)) for v in tally.variants],
        "stages": list(STAGE_NAMES.values()),
        "by_length": _drawn(perplexity_by_length(tally, sparsity, number) for number, sparsity in drawn),
        "by_time": _drawn(perplexity_by_time(tally, sparsity, number) for number, sparsity in drawn),
        "longer": longer_calibration(tally),
        "bars": _drawn(time_bars(tally, length) for length in tally.lengths),
        "divergences": _drawn(divergence(tally, sparsity, number) for number, sparsity in enumerate(tally.sparsities)),
        "nearest": nearest_text(tally),
        "norms": norms,
        "norm_maps": [] if norms is None else [norm_map(norms, kind, n) for n, kind in enumerate(kinds(norms))],
        "pole_maps": [] if norms is None else [pole_map(norms, normalizer) for normalizer in get_args(VarianceNorm)],
        "poles": poles(tally),
        "tables": [*(perplexity_table(tally, sparsity) for sparsity in tally.sparsities), time_table(tally)],
        "texts": [group for sparsity in tally.sparsities if (group := texts(tally, sparsity)) is not None],
        "drawn_at": next((cell for cell in results.samples if cell is not None and cell.length is not None), None),
    }


def machine(results: Results) -> str:
    """What the times were measured on."""
    places = {
        f"{found.processor}, {found.threads} thread{'s' if found.threads > 1 else ''}"
        for found in results.cells.values()
    }
    return "; ".join(sorted(places)) or "nothing yet"


def curves_of(tally: Tally, sparsity: str) -> CurveGroup:
    """The figures and tables of one sparsity."""
    lengths = tally.results.setting.window_lengths
    points = [curve(tally, sparsity, length) for length in lengths]
    figures = [curve_figure(tally, found, sparsity, n) for found, n in zip(points, lengths, strict=True) if found]
    tables = (curve_table(tally, sparsity), paired_table(tally, sparsity))
    return CurveGroup(
        curve_marks(points[0]),
        curve_methods(tally, points[0]),
        tuple(figures),
        tuple(table for table in tables if table is not None),
    )


def texts(tally: Tally, sparsity: str) -> TextGroup | None:
    """The texts at a sparsity, the dense model's first; None if there are none."""
    dense, pruned = tally.results.samples.get(None), tally.samples(sparsity)
    if dense is None or not pruned:
        return None
    prompts = []
    for number, prompt in enumerate(dense.prompts):
        original = dense.texts[number]
        cards = [Card("dense", original, "", "")]
        for sample in pruned:
            text = sample.texts[number]
            same = shared_words(original, text)
            cards.append(Card(_name(sample), text[:same], text[same:], _note(sample)))
        prompts.append((prompt, tuple(cards)))
    return TextGroup(shown_sparsity(sparsity), tuple(prompts))


def shared_words(one: str, other: str) -> int:
    """Number of characters of ``other`` in the whole words that both texts begin with."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same if same == len(other) else other.rfind(" ", 0, same) + 1


def _name(sample: Sample) -> str:
    return "dense" if sample.cell is None else shown_variant(sample.cell.variant)


def _note(sample: Sample) -> str:
    far = sample.divergence
    return "" if far is None else f"KL {far.mean:.2f} nats, same top token {far.agreement:.0%}"


def _drawn(drawings: Iterable[Markup | None]) -> list[Markup]:
    return [drawn for drawn in drawings if drawn is not None]
