"""Perplexity against time: what is run, how it is resumed, and what is said of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import Update, prune_model
from ace_triton.calibration import crop, token_stream
from ace_triton.checkpoint import load
from ace_triton.evaluate import perplexity
from ace_triton.study.cells import Cell, Grid, Variant
from ace_triton.study.curve import curve, frontier
from ace_triton.study.findings import Comparison, worst
from ace_triton.study.goals import (
    dominance,
    goals,
    metric_alone,
    permutation,
    perplexity_claim,
    recovery,
    weight_update,
)
from ace_triton.study.journal import FILE, Journal, Results, StudyError, read_results
from ace_triton.study.page import page
from ace_triton.study.quality_grid import BEST, PUBLISHED, RECIPES, SPARSEGPT, QualityGrid
from ace_triton.study.recipe import PLAIN, Recipe
from ace_triton.study.records import CellResult, DenseResult, Evaluation, RecoveryCost, Setting, StageSeconds
from ace_triton.study.run import RECOVERY_FOLDER, run_study
from ace_triton.study.tally import Tally, shown_variant
from ace_triton.study.workbench import Workbench
from ace_triton.text import read_documents

WANDA, RIA, ACE = map(Variant, ("wanda", "ria", "ace"))
PERMUTED = ACE.with_recipe(Recipe(permute=True))
UPDATED = ACE.with_recipe(BEST)
SETTING = Setting("tiny", "w", "float32", "c", "cs", "e", "es", 4, 8, 16, (32,))


def measured(
    values: dict[tuple[Variant, str], tuple[float, ...]], seconds: dict[Variant, float] | None = None
) -> Tally:
    """Results of (variant, sparsity) -> perplexity by seed; twice that over the further windows."""
    results = Results(SETTING, DenseResult(10.0, (Evaluation(32, 20.0),)))
    for (variant, sparsity), found in values.items():
        for seed, value in enumerate(found):
            minutes = variant.recipe.minutes
            results.add(
                CellResult(
                    Cell(variant, sparsity, 16, seed),
                    value,
                    0.5,
                    StageSeconds(1, 1, 1, 4),
                    (seconds or {}).get(variant, 1.0) * (1 + seed / 1000),
                    "a processor",
                    2,
                    (Evaluation(32, 2 * value),),
                    None if minutes is None else RecoveryCost(5, 50, 60 * minutes, 120 * minutes),
                )
            )
    return Tally(results)


@pytest.mark.parametrize("recipe", [*RECIPES, Recipe(minutes=5), PUBLISHED[0].recipe, Recipe(sequential="layers")])
def test_a_recipe_lives_in_a_cells_record(recipe):
    cell = Cell(ACE.with_recipe(recipe), "2:4", 16, 0)
    written = json.loads(json.dumps(cell.to_dict()))
    assert Cell.from_dict(written) == cell
    assert Cell.from_dict(written).variant.recipe == recipe
    assert cell != Cell(ACE, "2:4", 16, 0)
    assert cell.variant.alone == ACE


def test_a_changed_default_of_lstsq_leaves_records_of_rescale_as_they_were():
    written = Cell(ACE.with_recipe(Recipe(update=Update("rescale"))), "2:4", 16, 0).to_dict()
    assert written["recipe"]["update"] == {"kind": "rescale"}
    with_options = {**written, "recipe": {**written["recipe"], "update": {"kind": "rescale", "mask_rounds": 99}}}
    assert Cell.from_dict(with_options) == Cell.from_dict(written)


def test_records_from_before_recipes_are_plain():
    written = Cell(ACE, "2:4", 16, 0).to_dict()
    assert set(written) == {"method", "options", "sparsity", "length", "seed"}
    assert Cell.from_dict(written).variant.recipe == PLAIN
    result = CellResult(Cell(ACE, "2:4", 16, 0), 1.0, 0.5, StageSeconds(1, 1, 1, 3), 1.0, "a processor", 1)
    assert set(result.to_dict()) == {
        *("cell", "perplexity", "kept", "seconds", "cpu_seconds", "processor", "threads"),
    }
    assert "further_window_lengths" not in replace(SETTING, further_window_lengths=()).to_dict()


def test_what_is_said_of_a_recipe():
    assert shown_variant(UPDATED) == "ACE, permuted, lstsq"
    assert shown_variant(WANDA.with_recipe(Recipe(update=Update(damping=0.5), minutes=2.5))) == (
        "Wanda, lstsq, damping=0.5, 2.5 min of recovery"
    )
    assert shown_variant(PUBLISHED[2]) == "SparseGPT, published form"
    assert Variant("magnitude", recipe=Recipe(update=Update())).calibrated


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"published": True, "permute": True}, "nothing is added to a published form"),
        ({"published": True, "minutes": 5}, "nothing is added to a published form"),
        ({"minutes": 0}, "above 0"),
        ({"minutes": math.nan}, "above 0"),
    ],
)
def test_a_recipe_that_is_none(words, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**words)


def test_what_is_run_and_in_which_order():
    grid = QualityGrid((WANDA, ACE), ("50%", "2:4"), (128, 16), (0, 1), (20.0, 5.0))
    cells = grid.cells()
    assert len(cells) == len(set(cells)) == 4 * (2 * 2 + len(RECIPES) + 1 + len(PUBLISHED) + 2)
    assert {cell.variant.alone for cell in cells if cell.variant.recipe.update} == {ACE}
    assert all(cell.sparsity == "2:4" for cell in cells if cell.variant.recipe != PLAIN)
    long = [cell.variant.recipe.minutes for cell in cells if cell.variant.recipe.minutes]
    assert long == [5.0, 20.0] * 4
    assert [cell.variant.recipe.minutes for cell in cells][-len(long) :] == long
    assert (cells[0].length, cells[0].seed, grid.shown) == (16, 0, (128, 0))
    assert all(cell.sparsity == "0.5" for cell in QualityGrid((ACE,), ("0.5",), (16,), (0,), (5.0,)).cells())
    with pytest.raises(ValueError, match="at least one of its methods"):
        QualityGrid((), ("2:4",), (16,), (0,))


def test_a_study_of_quality_end_to_end(study, protocol, tmp_path):
    words = ("--quality", "--methods", "wanda,ace", "--sparsities", "50%,2:4", "--lengths", 16, "--seeds", 1)
    windows = ("--window-lengths", "16,32", "--windows", 4, "--minutes", "0.002")
    code, _, errors = study(tmp_path / "s", *words, *windows)
    assert code == 0, errors
    results = read_results(tmp_path / "s")
    assert len(results.cells) == 2 * 2 + len(RECIPES) + 1 + len(PUBLISHED) + 1
    assert results.setting.window_lengths == (16, 32)
    assert not (tmp_path / "s" / RECOVERY_FOLDER).exists()

    model, tokenizer = load(protocol.model, dtype=torch.float32)
    text = read_documents(protocol.calibration)
    ids = torch.tensor(tokenizer("\n\n".join(text))["input_ids"])
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert results.dense.further == (Evaluation(32, perplexity(model, ids, length=32, windows=2).perplexity),)
    for recipe in RECIPES:
        model.load_state_dict(dense)
        how = {"permute": recipe.permute, "update": recipe.update, "sequential": recipe.sequential}
        prune_model(model, crop(token_stream(text, tokenizer), 4, 16, 0), "ace", "2:4", **how)
        found = results.cells[Cell(ACE.with_recipe(recipe), "2:4", 16, 0)]
        assert found.perplexity == perplexity(model, ids, length=16, windows=4).perplexity
        assert found.further == (Evaluation(32, perplexity(model, ids, length=32, windows=2).perplexity),)
        assert found.recovery is None

    def value(variant):
        return results.cells[Cell(variant, "2:4", 16, 0)].perplexity

    assert value(PUBLISHED[0]) == value(WANDA)
    assert value(PUBLISHED[2]) == pytest.approx(value(SPARSEGPT), rel=1e-4)
    recovered = results.cells[Cell(ACE.with_recipe(replace(BEST, minutes=0.002)), "2:4", 16, 0)]
    assert recovered.recovery.steps >= 1
    assert recovered.seconds_in_all > recovered.seconds.total + 0.1
    assert recovered.perplexity != value(UPDATED)

    html = (tmp_path / "s" / "tiny.html").read_text()
    assert "How good for how much time" in html
    assert "Perplexity by calibration length" not in html
    for variant in Tally(results).everything:
        assert shown_variant(variant) in html
        assert f"{value(variant):,.1f}" in html
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert page(results) == html
    before = (tmp_path / "s" / FILE).read_bytes()
    assert study(tmp_path / "s", *words, *windows)[0] == 0
    assert (tmp_path / "s" / FILE).read_bytes() == before
    code, _, errors = study(tmp_path / "s", *words, "--windows", 5)
    assert code == 1
    assert "windows was 4, is 5" in errors


def test_further_windows_are_added_to_a_study(study, tmp_path):
    words = ("--quality", "--methods", "wanda,ace", "--sparsities", "50%", "--lengths", 16, "--windows", 4)
    assert study(tmp_path / "s", *words, "--seeds", 2, "--window-lengths", 16)[0] == 0
    before = read_results(tmp_path / "s")
    assert study(tmp_path / "s", *words, "--seeds", 1, "--window-lengths", "16,32")[0] == 0
    after = read_results(tmp_path / "s")
    assert after.setting == replace(before.setting, further_window_lengths=(32,))
    assert after.dense.perplexity == before.dense.perplexity
    assert [found.length for found in after.dense.further] == [32]
    assert after.cells.keys() == before.cells.keys()
    assert after.samples == before.samples
    for cell, found in after.cells.items():
        assert found.perplexity == before.cells[cell].perplexity
        assert [evaluation.length for evaluation in found.further] == ([32] if cell.seed == 0 else [])
    lines = (tmp_path / "s" / FILE).read_bytes()
    assert study(tmp_path / "s", *words, "--seeds", 2, "--window-lengths", 16)[0] == 0
    assert (tmp_path / "s" / FILE).read_bytes() == lines, "fewer windows take nothing back"


def test_a_recovery_that_was_stopped_goes_on(protocol, tmp_path):
    bench = Workbench(protocol)
    recovered = WANDA.with_recipe(Recipe(minutes=0.02))
    grid = Grid((recovered,), ("2:4",), (16,), (0,))
    (cell,) = grid.cells()
    states = tmp_path / RECOVERY_FOLDER

    def stop_when_saved(_done: int, _total: int, what: str) -> None:
        if "loss" in what and list(states.glob("*.pt")):
            raise KeyboardInterrupt

    with Journal(tmp_path, bench.setting) as journal, pytest.raises(KeyboardInterrupt):
        run_study(bench, journal, grid, stop_when_saved)
    (state,) = states.glob("*.pt")
    taken = torch.load(state)
    assert not read_results(tmp_path).cells
    with Journal(tmp_path, bench.setting) as journal:
        run_study(bench, journal, grid)
    found = read_results(tmp_path).cells[cell]
    assert found.recovery.steps >= taken["steps"] > 0
    assert found.recovery.seconds >= max(1.2, taken["seconds"])
    assert found.cpu_seconds_in_all > found.cpu_seconds + taken["cpu_seconds"] * 0.99
    assert not states.exists()


def test_a_published_form_is_there_for_patterns_only(protocol):
    bench = Workbench(protocol)
    with (
        pytest.raises(ValueError, match="published forms are there for n:m"),
        bench.pruned(Cell(PUBLISHED[0], "0.5", 16, 0)),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "5"), "--minutes is for --quality"),
        (("--quality", "--minutes", "5,soon"), "write numbers"),
        (("--quality", "--minutes", "0"), "above 0"),
        (("--quality", "--window-lengths", "16,256"), "128 positions"),
    ],
)
def test_a_mistake_is_one_line(study, tmp_path, words, message):
    code, _, errors = study(tmp_path / "s", *words)
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "s").exists()


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(1, 100)), min_size=1, max_size=8))
def test_the_curve_holds_what_nothing_beats(places):
    recipes = [ACE.with_recipe(Recipe(minutes=1.0 + number)) for number in range(len(places))]
    tally = measured(
        {(v, "2:4"): (value,) for v, (_, value) in zip(recipes, places, strict=True)},
        {v: seconds for v, (seconds, _) in zip(recipes, places, strict=True)},
    )
    points = curve(tally, "2:4", 16)
    assert [p.cpu_seconds for p in points] == sorted(p.cpu_seconds for p in points)
    best = frontier(points)
    values = [p.perplexity.mean for p in best]
    assert values == sorted(values, reverse=True)
    for point in points:
        beaten = any(
            q.cpu_seconds <= point.cpu_seconds
            and q.perplexity.mean <= point.perplexity.mean
            and (q.cpu_seconds, q.perplexity.mean) != (point.cpu_seconds, point.perplexity.mean)
            for q in best
        )
        assert point.dominated == beaten


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
def test_a_bound_is_reached_beyond_noise_only(change, error, pairs, most, verdict):
    assert Comparison(change, error, pairs).within(most) == verdict


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
def test_a_metric_alone(ace, patterns, verdict):
    better, other = (NEAR, tuple(2 * value for value in NEAR))
    values = {(v, s): p for s in patterns for v, p in ((WANDA, other), (RIA, better), (ACE, ace))}
    finding = metric_alone(measured(values))
    assert finding.verdict == verdict
    assert "of RIA's" in finding.text
    assert ("2 of these not measured yet" in finding.text) == (patterns != ALL)


@pytest.mark.parametrize(("share", "verdict"), [(0.90, "holds"), (0.99, "fails")])
def test_channels_permuted(share, verdict):
    tally = measured({(ACE, "2:4"): NEAR, (PERMUTED, "2:4"): tuple(share * value for value in NEAR)})
    finding = permutation(tally, PERMUTED)
    assert finding.verdict == verdict
    assert f"has {share:.2f} of the perplexity" in finding.headline


@pytest.mark.parametrize(
    ("share", "seconds", "verdict"),
    [(0.4, 0.9, "holds"), (0.4, 1.1, "fails"), (0.5, 0.9, "fails"), (0.44, 0.9, "fails")],
)
def test_a_weight_update(share, seconds, verdict):
    """SparseGPT has 0.55 of Wanda's perplexity, so that 0.44 is 0.8 of it."""
    values = {WANDA: 1.0, SPARSEGPT: 0.55, UPDATED: share}
    tally = measured(
        {(v, "2:4"): tuple(factor * value for value in NEAR) for v, factor in values.items()}, {UPDATED: seconds}
    )
    finding = weight_update(tally)
    assert finding.verdict == verdict
    assert f"{share:.2f} of Wanda's perplexity and {share / 0.55:.2f} of SparseGPT's" in finding.headline


@pytest.mark.parametrize(
    ("minutes", "share", "verdict"),
    [(5.0, 0.3, "holds"), (5.0, 0.35, "fails"), (20.0, 0.24, "holds"), (20.0, 0.3, "fails")],
)
def test_a_recovery(minutes, share, verdict):
    recovered = UPDATED.with_recipe(replace(BEST, minutes=minutes))
    tally = measured({(WANDA, "2:4"): NEAR, (recovered, "2:4"): tuple(share * value for value in NEAR)})
    finding = recovery(tally, minutes)
    assert finding.verdict == verdict
    assert "5 steps of 10 tokens on 2 threads" in finding.text
    assert recovery(tally, 25.0 - minutes) is None


@pytest.mark.parametrize(
    ("ours", "seconds", "verdict"),
    [(1.0, 0.9, "holds"), (1.0, 1.0, "holds"), (1.0, 1.1, "fails"), (1.1, 0.9, "fails"), (0.9, 0.9, "holds")],
)
def test_published_forms_are_dominated_or_not(ours, seconds, verdict):
    tally = measured({(PUBLISHED[0], "2:4"): NEAR, (ACE, "2:4"): tuple(ours * value for value in NEAR)}, {ACE: seconds})
    assert dominance(tally).verdict == verdict


def test_what_is_set_beside_a_published_form_takes_no_more_time_where_it_can():
    """Of a single pair everything is open: the better but dearer point is not the one to name."""
    rival = PUBLISHED[0]
    values = {(rival, "2:4"): (100.0,), (PERMUTED, "2:4"): (90.0,), (UPDATED, "2:4"): (50.0,)}
    found = dominance(measured(values, {rival: 10.0, PERMUTED: 9.0, UPDATED: 40.0}))
    assert found.verdict == "open"
    assert shown_variant(PERMUTED) + " has" in found.text


def test_nothing_is_claimed_where_cells_are_missing():
    recipes = [PERMUTED, UPDATED, UPDATED.with_recipe(replace(BEST, minutes=5.0)), *PUBLISHED]
    for variant in recipes:
        assert goals(measured({(variant, "2:4"): NEAR})) == []
    assert weight_update(measured({(UPDATED, "2:4"): NEAR, (WANDA, "2:4"): NEAR})) is None


def test_a_claim_says_over_which_windows_it_was_not_measured():
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


def test_another_setting_is_another_study(tmp_path):
    Journal(tmp_path, SETTING).close()
    with pytest.raises(StudyError, match="window_length was 16, is 64"):
        Journal(tmp_path, replace(SETTING, window_length=64))
    assert read_results(tmp_path).setting == SETTING
    Journal(tmp_path, replace(SETTING, further_window_lengths=())).close()
    assert read_results(tmp_path).setting == SETTING
    Journal(tmp_path, replace(SETTING, further_window_lengths=(64, 8))).close()
    assert read_results(tmp_path).setting.window_lengths == (16, 8, 32, 64)
