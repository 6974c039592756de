"""What this project claims: the paper's order, its own targets, and the study that they are read from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.comparison import Comparison
from ace_triton.study.journal import Results, read_results
from ace_triton.study.recipes_grid import BEST, SPARSEGPT
from ace_triton.study.records import CellResult, DenseResult, Setting, StageSeconds
from ace_triton.study.tally import Tally, shown_variant
from ace_triton.study.workbench import Workbench
from benchmarks.claims.findings import end_to_end, findings, ordering, within, worst
from benchmarks.claims.goals import (
    dominance,
    goals,
    metric_alone,
    permutation,
    perplexity_claim,
    recovery,
    weight_update,
)
from benchmarks.claims.published_workbench import PublishedWorkbench
from benchmarks.claims.quality_grid import PUBLISHED, QualityGrid
from benchmarks.claims.quality_study import measure

ROOT = Path(__file__).parents[2]
SETTING = Setting("tiny", "w", "float32", "c", "cs", "e", "es", 4, 2, 16)
WANDA, RIA, ACE = map(Cell, map(Recipe, ("wanda", "ria", "ace")))
PERMUTED = ACE.with_recipe(permute=True)
UPDATED = ACE.with_recipe(**BEST)


def results_of(values: dict[tuple, tuple[float, float]], sparsity: str = "2:4") -> Tally:
    """Results of (method, length, seed) -> (perplexity, CPU seconds)."""
    results = Results(SETTING, DenseResult(10.0))
    for (method, length, seed), (value, seconds) in values.items():
        cell = Cell(Recipe(method, sparsity=sparsity), length, seed)
        results.add(CellResult(cell, value, 0.5, StageSeconds(1, 1, 1, 4), seconds, "a processor", 1))
    return Tally(results)


@pytest.mark.parametrize(
    ("ace", "ria", "wanda", "verdict", "words"),
    [
        ((90, 92, 91), (95, 97, 96.5), (99, 102, 101), "holds", "holds here"),
        ((99, 102, 101), (95, 97, 96.5), (99, 102, 101), "fails", "ACE is worse than RIA"),
        ((90, 92, 91), (95, 97, 96.5), (99, 92, 97), "open", "between RIA and Wanda"),
        ((90, 92), (95, 97), (99, 102), "open", "is open"),
        ((90, 92, math.inf), (95, 97, 96.5), (99, 102, 101), "open", "between ACE and RIA"),
    ],
)
def test_an_ordering_needs_clear_differences(ace, ria, wanda, verdict, words):
    values = {}
    for method, found in (("ace", ace), ("ria", ria), ("wanda", wanda)):
        values |= {(method, 16, seed): (value, 1.0) for seed, value in enumerate(found)}
    finding = ordering(results_of(values), "2:4")
    assert finding.verdict == verdict
    assert words in finding.headline


def test_a_mean_change_is_over_pairs():
    tally = results_of(
        {("ace", 16, 0): (50, 1), ("ria", 16, 0): (100, 1), ("wanda", 16, 0): (100, 1), ("ria", 16, 1): (1, 1)}
    )
    assert "ACE against RIA: -50.0% (a single draw); RIA against Wanda: +0.0%" in ordering(tally, "2:4").text
    tally.results.add(replace(next(iter(tally.results.cells.values())), cell=Cell(Recipe("ace-paper"), 16, 0)))
    assert "ACE as published against Wanda: -50.0% (a single draw)" in ordering(tally, "2:4").text


@pytest.mark.parametrize(
    ("ours", "theirs", "long", "verdict"),
    [
        ((104.0, 9.0), (100.0, 100.0), 2048, "holds"),
        ((106.0, 9.0), (100.0, 100.0), 2048, "fails"),
        ((90.0, 11.0), (100.0, 100.0), 2048, "fails"),
        ((104.0, 9.0), (100.0, 100.0), 512, "open"),
    ],
)
def test_the_end_to_end_claim(ours, theirs, long, verdict):
    finding = end_to_end(results_of({("ace", 16, 0): ours, ("wanda", long, 0): theirs}), "2:4")
    assert finding.verdict == verdict
    assert f"{ours[1] / theirs[1]:.1%} of the time of Wanda at L={long}" in finding.headline
    assert f"{abs(ours[0] / theirs[0] - 1):.1%} {'above' if ours[0] > theirs[0] else 'below'}" in finding.headline


@pytest.mark.parametrize(
    ("change", "error", "pairs", "most", "verdict"),
    [
        (-0.1, 0.01, 5, 0.95, "holds"),
        (-0.1, 0.03, 5, 0.95, "open"),
        (-0.1, 0.01, 2, 0.95, "open"),
        (-0.1, math.nan, 1, 0.95, "open"),
        (0.0, 0.0, 5, 1.0, "holds"),
        (0.1, 0.01, 5, 1.0, "fails"),
        (-0.6, 0.01, 5, 0.45, "holds"),
        (-0.5, 0.01, 5, 0.45, "fails"),
    ],
)
def test_a_bound_needs_two_standard_errors(change, error, pairs, most, verdict):
    assert within(Comparison(change, error, pairs), most) == verdict


def test_the_worst_of_claims():
    assert worst(["holds", "open"]) == "open"
    assert worst(["open", "fails", "holds"]) == "fails"
    assert worst([]) == "open"


NEAR = (100.0, 101.0, 102.0)
ALL = ("0.5", "2:4", "4:8")


@pytest.mark.parametrize(
    ("ace", "patterns", "verdict"),
    [
        ((90.0, 91.0, 92.0), ALL, "holds"),
        ((110.0, 111.0, 112.0), ALL, "fails"),
        ((90.0, 111.0, 92.0), ALL, "open"),
        ((90.0, 91.0, 92.0), ("2:4",), "open"),
    ],
)
def test_a_metric_alone(measured, ace, patterns, verdict):
    better, other = (NEAR, tuple(2 * value for value in NEAR))
    values = {(v, s): p for s in patterns for v, p in ((WANDA, other), (RIA, better), (ACE, ace))}
    finding = metric_alone(measured(values))
    assert finding.verdict == verdict
    assert "times RIA's" in finding.text
    assert ("2 of these not measured yet" in finding.text) == (patterns != ALL)


@pytest.mark.parametrize(("share", "verdict"), [(0.90, "holds"), (0.99, "fails")])
def test_channels_permuted(measured, share, verdict):
    tally = measured({(ACE, "2:4"): NEAR, (PERMUTED, "2:4"): tuple(share * value for value in NEAR)})
    finding = permutation(tally, PERMUTED)
    assert finding.verdict == verdict
    assert f"has {share:.2f} times the perplexity of the metric alone" in finding.headline


@pytest.mark.parametrize(
    ("share", "seconds", "verdict"),
    [(0.4, 0.9, "holds"), (0.4, 1.1, "fails"), (0.5, 0.9, "fails"), (0.44, 0.9, "fails")],
)
def test_a_weight_update(measured, share, seconds, verdict):
    """SparseGPT has 0.55 of Wanda's perplexity, so that 0.44 is 0.8 of it."""
    values = {WANDA: 1.0, SPARSEGPT: 0.55, UPDATED: share}
    tally = measured(
        {(v, "2:4"): tuple(factor * value for value in NEAR) for v, factor in values.items()}, {UPDATED: seconds}
    )
    finding = weight_update(tally)
    assert finding.verdict == verdict
    assert f"{share:.2f} times Wanda's perplexity and {share / 0.55:.2f} times SparseGPT's" in finding.headline


@pytest.mark.parametrize(
    ("minutes", "share", "verdict"),
    [(5.0, 0.3, "holds"), (5.0, 0.35, "fails"), (20.0, 0.24, "holds"), (20.0, 0.3, "fails")],
)
def test_a_recovery(measured, minutes, share, verdict):
    recovered = replace(UPDATED, minutes=minutes)
    tally = measured({(WANDA, "2:4"): NEAR, (recovered, "2:4"): tuple(share * value for value in NEAR)})
    finding = recovery(tally, minutes)
    assert finding.verdict == verdict
    assert "5 steps of 10 tokens on 2 threads" in finding.text
    assert recovery(tally, 25.0 - minutes) is None


@pytest.mark.parametrize(
    ("ours", "seconds", "verdict"),
    [(1.0, 0.9, "holds"), (1.0, 1.0, "holds"), (1.0, 1.1, "fails"), (1.1, 0.9, "fails"), (0.9, 0.9, "holds")],
)
def test_published_forms_are_dominated_or_not(measured, ours, seconds, verdict):
    tally = measured({(PUBLISHED[0], "2:4"): NEAR, (ACE, "2:4"): tuple(ours * value for value in NEAR)}, {ACE: seconds})
    assert dominance(tally).verdict == verdict


def test_a_published_form_is_compared_with_a_recipe_that_takes_no_more_time(measured):
    """With a single pair everything is open; a better recipe that takes more time is still not the one to name."""
    rival = PUBLISHED[0]
    values = {(rival, "2:4"): (100.0,), (PERMUTED, "2:4"): (90.0,), (UPDATED, "2:4"): (50.0,)}
    found = dominance(measured(values, {rival: 10.0, PERMUTED: 9.0, UPDATED: 40.0}))
    assert found.verdict == "open"
    assert shown_variant(PERMUTED) + " has" in found.text


def test_nothing_is_claimed_if_cells_are_missing(measured):
    recipes = [PERMUTED, UPDATED, replace(UPDATED, minutes=5.0), *PUBLISHED]
    for variant in recipes:
        assert goals(measured({(variant, "2:4"): NEAR})) == []
    assert weight_update(measured({(UPDATED, "2:4"): NEAR, (WANDA, "2:4"): NEAR})) is None


def test_a_claim_names_the_windows_that_are_missing(measured):
    tally = measured({(PERMUTED, "2:4"): NEAR, (ACE, "2:4"): NEAR})
    claims = []
    for seeds in (3, 2, 0):
        for cell, found in list(tally.results.cells.items()):
            tally.results.cells[cell] = replace(found, further=found.further[: cell.seed < seeds])
        claims.append(perplexity_claim(tally, PERMUTED, ACE, "2:4", 1.5))
    assert [claim.verdict for claim in claims] == ["holds", "open", "open"]
    assert [str(claim) for claim in claims] == [
        "1.000 ± 0.000 (16; 3 pairs), 1.000 ± 0.000 (32; 3 pairs)",
        "1.000 ± 0.000 (16; 3 pairs), 1.000 ± 0.000 (32; 2 pairs)",
        "1.000 ± 0.000 (16; 3 pairs), not measured over 32",
    ]


def test_a_published_form_needs_a_pattern_and_its_own_workbench(protocol):
    bench = PublishedWorkbench(protocol)
    with pytest.raises(ValueError, match="needs an n:m pattern"), bench.pruned(PUBLISHED[0].at("0.5", 16, 0)):
        pass
    with (
        pytest.raises(ValueError, match="not part of ace_triton"),
        Workbench(protocol).pruned(PUBLISHED[0].at("2:4", 16, 0)),
    ):
        pass


@dataclass(frozen=True)
class SmallGrid(QualityGrid):
    """A few cells of the project's grid, on short sequences."""

    lengths: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0,)

    def cells(self) -> list[Cell]:
        wanted = (WANDA, SPARSEGPT, *PUBLISHED)
        return [cell for cell in super().cells() if cell.variant in wanted and cell.sparsity == "2:4"]


def test_published_forms_run_beside_ours_and_the_page_has_the_claims(protocol, tmp_path):
    path = measure(protocol, SmallGrid(), tmp_path / "s", "make quality-study")
    results = read_results(tmp_path / "s")

    def perplexity(variant):
        return results.cells[variant.at("2:4", 16, 0)].perplexity

    assert len(results.cells) == 2 + len(PUBLISHED)
    assert perplexity(PUBLISHED[0]) == perplexity(WANDA)
    assert perplexity(PUBLISHED[2]) == pytest.approx(perplexity(SPARSEGPT), rel=1e-4)
    html = path.read_text()
    assert "The targets of this project" in html
    assert "as good as every published form" in html
    assert "make quality-study" in html
    assert "SparseGPT, published form" in html


def test_the_records_are_cells_of_the_grid():
    grid = {*QualityGrid().cells(), *QualityGrid(recovery=True).cells()}
    assert len(grid) == len(QualityGrid().cells()) + len(QualityGrid(recovery=True).cells())
    assert set(read_results(ROOT / "docs" / "curve").cells) <= grid


def test_the_project_s_records_still_give_findings():
    for folder, count in (("study", 6), ("curve", 11)):
        tally = Tally(read_results(ROOT / "docs" / folder))
        assert len([*findings(tally), *goals(tally)]) == count
