"""Perplexity against time: what is run, how it is resumed, and what is said of it."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from html import escape

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import Update, prune_model
from ace_triton.errors import StudyError
from ace_triton.evaluate import perplexity
from ace_triton.inputs.calibration import crop, token_stream
from ace_triton.inputs.checkpoint import load
from ace_triton.inputs.text import read_documents
from ace_triton.recipe import Recipe
from ace_triton.sparsity import Sparsity
from ace_triton.study.advice import advice
from ace_triton.study.cells import Cell, Grid
from ace_triton.study.command_line import commands_of, without_folders
from ace_triton.study.curve import curve, frontier
from ace_triton.study.journal import FILE, Journal, read_results
from ace_triton.study.marks import series
from ace_triton.study.page import page
from ace_triton.study.recipes_grid import BEST, RECIPES, SPARSEGPT, RecipesGrid
from ace_triton.study.records import CellResult, Evaluation, Run, Setting, StageSeconds
from ace_triton.study.run import RECOVERY_FOLDER, run_study
from ace_triton.study.tables import best, curve_table, perplexity_table
from ace_triton.study.tally import Tally, shown_variant
from ace_triton.study.workbench import Workbench

WANDA, RIA, ACE = map(Cell, map(Recipe, ("wanda", "ria", "ace")))
PERMUTED = ACE.with_recipe(permute=True)
UPDATED = ACE.with_recipe(**BEST)
PUBLISHED = replace(SPARSEGPT, published=True)
SETTING = Setting("tiny", "w", "float32", "c", "cs", "e", "es", 4, 8, 16, (32,))


@pytest.mark.parametrize(
    "variant",
    [
        *(ACE.with_recipe(**parts) for parts in RECIPES),
        ACE.with_recipe(sequential="layers", budgets="outliers"),
        replace(ACE, minutes=5),
        replace(ACE, published=True),
    ],
    ids=str,
)
def test_a_recipe_lives_in_a_cells_record(variant):
    cell = variant.at("4:8", 16, 0)
    written = json.loads(json.dumps(cell.to_dict()))
    assert Cell.from_dict(written) == cell
    assert Cell.from_dict(written).variant == cell.variant == variant
    assert cell.alone == ACE.at("4:8", 16, 0) != cell


def test_a_changed_default_of_lstsq_leaves_records_of_rescale_as_they_were():
    written = ACE.with_recipe(update="rescale").at("2:4", 16, 0).to_dict()
    assert written["recipe"]["update"] == {"kind": "rescale"}
    with_options = {**written, "recipe": {**written["recipe"], "update": {"kind": "rescale", "mask_rounds": 99}}}
    assert Cell.from_dict(with_options) == Cell.from_dict(written)


def test_records_from_before_recipes_are_plain():
    written = ACE.at("2:4", 16, 0).to_dict()
    assert set(written) == {"method", "options", "sparsity", "length", "seed"}
    assert not Cell.from_dict(written).additions
    result = CellResult(ACE.at("2:4", 16, 0), 1.0, 0.5, StageSeconds(1, 1, 1, 3), 1.0, "a processor", 1)
    assert set(result.to_dict()) == {
        *("cell", "perplexity", "kept", "seconds", "cpu_seconds", "processor", "threads"),
    }
    assert "further_window_lengths" not in replace(SETTING, further_window_lengths=()).to_dict()


def test_what_is_said_of_a_recipe():
    assert shown_variant(UPDATED) == "ACE, permuted, lstsq"
    assert shown_variant(replace(WANDA.with_recipe(update=Update(damping=0.5)), minutes=2.5)) == (
        "Wanda, lstsq, damping=0.5, 2.5 min of recovery"
    )
    assert shown_variant(PUBLISHED) == "SparseGPT, published form"
    assert Cell(Recipe("magnitude", update="lstsq")).at("2:4", 16, 0).length == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"published": True, "recipe": Recipe(permute=True)}, "nothing can be added to a published form"),
        ({"published": True, "minutes": 5}, "nothing can be added to a published form"),
        ({"minutes": 0}, "above 0"),
        ({"minutes": math.nan}, "above 0"),
        ({"recipe": Recipe(exclude="*.o_proj")}, "prunes all layers"),
        ({"recipe": Recipe(sparsity=Sparsity("0.5", scope="layer"))}, "of every row"),
        ({"recipe": Recipe(sparsity=1 / 3)}, "at most 4 digits"),
    ],
)
def test_a_cell_that_is_none(words, message):
    with pytest.raises(StudyError, match=message):
        Cell(**{"recipe": Recipe(), **words})


@pytest.mark.parametrize(
    ("method", "recipe", "message"),
    [("wnada", {}, "unknown method 'wnada'"), ("ace", {"permuted": True}, "no entry 'permuted'")],
)
def test_a_record_with_an_invalid_recipe_names_its_file(tmp_path, method, recipe, message):
    with Journal(tmp_path, SETTING) as journal:
        journal.append(CellResult(ACE.at("2:4", 16, 0), 1.0, 0.5, StageSeconds(1, 1, 1, 3), 1.0, "a processor", 1))
    first, last = (tmp_path / FILE).read_text().splitlines()
    record = json.loads(last)
    record["cell"] |= {"method": method, "recipe": recipe}
    (tmp_path / FILE).write_text(f"{first}\n{json.dumps(record)}\n")
    with pytest.raises(StudyError, match=f"{FILE}: .*{message}"):
        read_results(tmp_path)


def test_what_is_run_and_in_which_order():
    grid = RecipesGrid((WANDA, ACE), ("50%", "2:4"), (128, 16), (0, 1), (20.0, 5.0))
    cells = grid.cells()
    assert len(cells) == len(set(cells)) == 4 * (2 * 2 + len(RECIPES) + 1 + 2)
    assert {cell.variant.alone for cell in cells if cell.recipe.update} == {ACE}
    assert all(cell.sparsity == "2:4" for cell in cells if cell.additions)
    long = [cell.minutes for cell in cells if cell.minutes]
    assert long == [5.0, 20.0] * 4
    assert [cell.minutes for cell in cells][-len(long) :] == long
    assert (cells[0].length, cells[0].seed, grid.shown) == (16, 0, (128, 0))
    with pytest.raises(ValueError, match="at least one of its methods"):
        RecipesGrid((), ("2:4",), (16,), (0,))


@pytest.mark.parametrize(
    ("sparsities", "compared_at", "permuted"),
    [(("0.5", "4:8", "2:4"), "2:4", True), (("0.5", "4:8", "1:4"), "4:8", True), (("50%", "0.7"), "0.5", False)],
)
def test_recipes_run_at_a_pattern_that_was_asked_for(sparsities, compared_at, permuted):
    cells = RecipesGrid((ACE,), sparsities, (16,), (0,), (5.0,)).cells()
    added = [cell.variant for cell in cells if cell.additions]
    assert {cell.sparsity for cell in cells if cell.additions} == {compared_at}
    assert any(variant.recipe.permute for variant in added) == permuted
    assert added[-1] == replace(ACE.with_recipe(permute=permuted, update="lstsq"), minutes=5.0)


def test_a_study_of_quality_end_to_end(study, protocol, tmp_path):
    words = ("--quality", "--methods", "wanda,ace", "--sparsities", "50%,2:4", "--lengths", 16, "--seeds", 1)
    windows = ("--window-lengths", "16,32", "--windows", 4, "--minutes", "0.002")
    code, _, errors = study(tmp_path / "s", *words, *windows)
    assert code == 0, errors
    results = read_results(tmp_path / "s")
    assert len(results.cells) == 2 * 2 + len(RECIPES) + 1 + 1
    assert results.setting.window_lengths == (16, 32)
    assert not (tmp_path / "s" / RECOVERY_FOLDER).exists()

    model, tokenizer = load(protocol.model, dtype=torch.float32)
    text = read_documents(protocol.calibration)
    ids = torch.tensor(tokenizer("\n\n".join(text))["input_ids"])
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert results.dense.further == (Evaluation(32, perplexity(model, ids, length=32, windows=2).perplexity),)
    for parts in RECIPES:
        model.load_state_dict(dense)
        prune_model(model, crop(token_stream(text, tokenizer), 4, 16, 0), "ace", "2:4", **parts)
        found = results.cells[Cell(Recipe("ace", **parts), 16, 0)]
        assert found.perplexity == perplexity(model, ids, length=16, windows=4).perplexity
        assert found.further == (Evaluation(32, perplexity(model, ids, length=32, windows=2).perplexity),)
        assert found.recovery is None

    def value(variant):
        return results.cells[variant.at("2:4", 16, 0)].perplexity

    recovered = results.cells[replace(UPDATED, minutes=0.002).at("2:4", 16, 0)]
    assert recovered.recovery.steps >= 1
    assert recovered.seconds_in_all > recovered.seconds.total + 0.1
    assert recovered.perplexity != value(UPDATED)

    html = (tmp_path / "s" / "tiny.html").read_text()
    assert "Perplexity against time" in html
    assert [words for words in ("targets of this project", "claims of", 'class="verdict"') if words in html] == []
    (run,) = results.runs
    assert run.command.startswith("ace-triton study tiny s --calibration some.txt")
    assert escape(run.command) in html
    assert str(tmp_path) not in html + (tmp_path / "s" / FILE).read_text()
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
    recovered = replace(WANDA, minutes=0.02)
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "5"), "--minutes needs --quality"),
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
def test_the_curve_holds_what_nothing_beats(measured, places):
    recipes = [replace(ACE, minutes=1.0 + number) for number in range(len(places))]
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


def test_another_setting_is_another_study(tmp_path):
    Journal(tmp_path, SETTING).close()
    with pytest.raises(StudyError, match="window_length was 16, is 64"):
        Journal(tmp_path, replace(SETTING, window_length=64))
    assert read_results(tmp_path).setting == SETTING
    Journal(tmp_path, replace(SETTING, further_window_lengths=())).close()
    assert read_results(tmp_path).setting == SETTING
    Journal(tmp_path, replace(SETTING, further_window_lengths=(64, 8))).close()
    assert read_results(tmp_path).setting.window_lengths == (16, 8, 32, 64)


NEAR = (100.0, 101.0, 102.0)
CELLS = (
    Cell(Recipe("magnitude", sparsity="0.7")),
    Cell(Recipe("ace", {"sign": 1, "reduce": "abs"}, "4:8"), 16, 0),
    Cell(Recipe("wanda", permute=True, update=Update(mask_rounds=1), sequential="layers"), 16, 0),
)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_command_of_a_cell_makes_what_was_measured(cell, protocol, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Workbench(protocol)
    (line,) = commands_of(bench.setting, cell)
    code, _, errors = command(*shlex.split(line)[1:])
    assert code == 0, errors
    written, _ = load("pruned", dtype=torch.float32)
    with bench.pruned(cell):
        for name, tensor in bench.model.state_dict().items():
            torch.testing.assert_close(written.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_a_recovery_is_two_commands_and_a_published_form_is_none():
    prune, recover = commands_of(SETTING, replace(UPDATED, minutes=2.5).at("2:4", 16, 0))
    assert prune.endswith("--permute --update lstsq --calibration c --samples 4 --length 16 --dtype float32")
    assert recover == "ace-triton recover pruned recovered --minutes 2.5 --calibration c"
    with pytest.raises(ValueError, match="no command"):
        commands_of(SETTING, PUBLISHED.at("2:4", 16, 0))


def test_a_recorded_command_names_no_folder(tmp_path):
    words = ["/usr/bin/ace-triton", "study", str(tmp_path), f"--calibration={tmp_path}", "--lengths", "16,32", "a b"]
    name = tmp_path.name
    assert without_folders(words) == f"ace-triton study {name} --calibration={name} --lengths 16,32 'a b'"


def test_what_to_take(measured):
    recovered = replace(UPDATED, minutes=5.0)
    values = {WANDA: 60, ACE: 50.0, PERMUTED: 31.0, UPDATED: 30.0, recovered: 20.0, PUBLISHED: 10.0}
    tally = measured(
        {(variant, "2:4"): (value, value + 1, value + 2) for variant, value in values.items()}, {UPDATED: 9.0}
    )
    found = advice(tally, "2:4")
    assert [(choice.wanted, choice.name) for choice in found.choices] == [
        ("Lowest perplexity", "ACE, permuted, lstsq, 5 min of recovery"),
        ("Lowest perplexity without recovery", "ACE, permuted, lstsq"),
        ("At most 5% more perplexity in less time", "ACE, permuted"),
    ]
    assert found.choices[1].figures == "perplexity 31.0 ± 1.0 (3); 3.1 times the dense model's; 9.0 s of CPU time"
    assert [len(choice.commands) for choice in found.choices] == [2, 1, 1]
    assert "every other recipe of this calibration length is clearly worse" in found.note
    assert advice(tally, "4:8") is None


def test_how_sure_the_advice_is(measured):
    near = {(ACE, "2:4"): (50.0, 51.0, 52.0), (WANDA, "2:4"): (52.0, 50.0, 52.0), (RIA, "2:4"): (90.0, 91.0, 92.0)}
    assert advice(measured(near), "2:4").note == "Not clearly worse than the first over the same seeds: Wanda."
    single = {key: values[:1] for key, values in near.items()}
    assert "a single seed: differences of a few percent may be noise" in advice(measured(single), "2:4").note


def test_a_method_has_one_color_whatever_is_added(measured):
    recovered = replace(WANDA.with_recipe(**BEST), minutes=5.0)
    variants = (Cell(Recipe("magnitude")), RIA, WANDA, recovered, UPDATED)
    tally = measured({(variant, "2:4"): (9.0,) for variant in variants})
    assert series(tally, Cell(Recipe("magnitude"))) == 0
    assert series(tally, recovered) == series(tally, WANDA)
    assert len({series(tally, variant) for variant in (WANDA, RIA, ACE)} - {0}) == 3


def test_tables_have_perplexity_over_the_dense_model_s(measured):
    tally = measured({(WANDA, "2:4"): (40.0, 44.0), (UPDATED, "2:4"): (20.0,)})
    rows = {row.name: row.values for row in curve_table(tally, "2:4").rows}
    assert rows["Wanda"][:3] == ("42.0 ± 2.8 (2)", "4.2", "84.0 ± 5.7 (2)")
    assert rows["ACE, permuted, lstsq"][:3] == ("20.0 (1)", "2.0", "40.0 (1)")
    assert best(tally, "2:4").values == ("20.0", "2.0", "ACE, permuted, lstsq L=16")
    assert perplexity_table(tally, "2:4").rows[0].values == ("42.0 ± 2.8 (2)", "4.2")


def test_a_page_has_a_table_of_contents_and_its_command(measured):
    tally = measured({(WANDA, "2:4"): NEAR, (UPDATED, "2:4"): NEAR})
    tally.results.add(Run("2026-11-28", "0.1.0", "ace-triton study tiny out --quality"))
    html = page(tally.results)
    headings = re.findall(r'<h2 id="([\w-]+)"', html)
    assert re.findall(r'<li><a href="#([\w-]+)">', html) == headings
    assert headings[0] == "take"
    assert "2026-11-28, ace-triton 0.1.0" in html
    assert "ace-triton study tiny out --quality" in html
    assert "<title>tiny: perplexity against time</title>" in html


def test_a_table_leaves_out_what_was_not_measured_at_its_sparsity(measured):
    tally = measured({(WANDA, "2:4"): NEAR, (WANDA, "0.5"): NEAR, (SPARSEGPT, "2:4"): NEAR})
    names = {sparsity: [row.name for row in perplexity_table(tally, sparsity).rows] for sparsity in tally.sparsities}
    assert names == {"0.5": ["Wanda"], "2:4": ["Wanda", "SparseGPT"]}
