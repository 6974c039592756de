"""The report on fits, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer

from ace_triton.recipe import Recipe
from benchmarks.reports import fit_advice, fits, fits_picture
from benchmarks.reports.fit_recipes import recipe_of


@pytest.fixture
def files(tmp_path, tiny_checkpoint, some_text, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(fits, "SAMPLES", 8)
    monkeypatch.setattr(fits, "LENGTH", 16)
    monkeypatch.setattr(fits, "WINDOW_LENGTH", 16)
    text = str(some_text)
    return {"calibration": text, "evaluation": text, "model": str(tiny_checkpoint), "out": tmp_path}


def measured(out: Path) -> list[tuple[str, str]]:
    return [(r["pattern"], r["recipe"]) for r in json.loads((out / "fits.json").read_text())["results"]]


def run(files, **options) -> None:
    whole = {"name": "small", "dtype": "float32", "windows": 2, "seed": 0, "steps": 0, "only": None, "most": None}
    fits.main(**{**whole, **files, **options})


def test_a_stopped_run_continues_and_the_page_has_every_cell(files):
    run(files, most=1)
    assert measured(files["out"]) == [("2:4", "wanda")]
    run(files, only=["2:4 *", "0.5 fit"], most=7)
    metrics = ("ace", "ria", "ace a=0.5", "ace a=0.75", "sparsegpt")
    again = [*(("2:4", recipe) for recipe in metrics), ("2:4", "fit"), ("0.5", "fit")]
    assert measured(files["out"]) == [("2:4", "wanda"), *again]
    run(files, steps=1, only=["4:8 recovered"])
    page = (files["out"] / "fits.md").read_text()
    assert "| Wanda, permuted, lstsq for 1 steps" not in page
    assert "| Wanda, permuted, lstsq, recovered for 1 steps |  | " in page
    run(files, seed=1, only=["2:4 wanda"])
    assert " (2), " in (files["out"] / "fits.md").read_text()


def test_a_recovery_starts_from_kept_weights(files, monkeypatch):
    kept = files["out"] / "kept"
    run(files, only=["2:4 fit"], kept=kept)
    monkeypatch.setattr(fits.Workbench, "prune", None)  # Pruning again would fail.
    run(files, steps=1, only=["2:4 recovered"], kept=kept)
    pruned, recovered = json.loads((files["out"] / "fits.json").read_text())["results"]
    assert recovered["steps"] == 1
    assert recovered["seconds"] > pruned["seconds"]


def test_results_of_two_settings_are_not_mixed(files):
    run(files, most=0, only=["2:4 wanda"])
    run(files, most=1)
    with pytest.raises(typer.BadParameter, match="results of small have windows 2, not windows 3: use that setting"):
        run(files, windows=3)


def test_all_cells_are_listed(files, capsys):
    run(files, list_rows=True)
    assert "2:4 wanda: not measured\n" in capsys.readouterr().out
    assert not (files["out"] / "fits.md").exists()


def test_channels_of_a_fraction_are_not_permuted():
    assert recipe_of("fit", "0.5") == Recipe("wanda", sparsity=0.5, update="lstsq")
    assert recipe_of("block fit", "2:4").permute


def record(**models: dict[str, float]) -> dict[str, Any]:
    """Perplexities at 2:4 by model and recipe; the dense models have 10."""
    results = [
        {"model": model, "pattern": "2:4", "recipe": recipe, "steps": 0, "perplexity": value, "seconds": 7.0}
        for model, values in models.items()
        for recipe, value in values.items()
    ]
    return {"models": {model: {"dense": 10.0} for model in models}, "results": results}


def test_advice_names_the_best_and_what_holds_on_one_model_only():
    found = record(
        small={"wanda": 50, "ace": 40, "fit": 30, "block fit": 25}, large={"wanda": 40, "ace": 44, "fit": 30}
    )
    row = "| small | 2:4 | ACE: 4.00x, 7 s | Wanda, permuted, lstsq, block_epochs=2: 2.50x, 7 s | not measured |"
    assert row in fit_advice.choices(found)
    lines = fit_advice.changes(found)
    assert "| permuted and lstsq added to Wanda | large | -25.0% |  |  |  |  |" in lines
    differing = [line for line in lines if line.startswith("- ")]
    assert differing == ["- ACE instead of Wanda, 2:4: better on small (-20.0%) and worse on large (+10.0%)."]
    assert "Fewer than two models" in fit_advice.changes(record(small={"wanda": 50, "ace": 40}))[-1]


def test_a_change_within_the_noise_is_none():
    found = record(small={"wanda": 50, "ace": 51}, large={"wanda": 40, "ace": 39.5})
    assert fit_advice.changes(found)[-1].startswith("Every change has the same sign on all models.")


def test_the_fastest_better_result_stands_beside_each_published_method():
    seconds = {"wanda": 10.0, "ace": 12.0, "sparsegpt": 20.0, "fit": 30.0}
    found = record(small={"wanda": 50, "ace": 40, "sparsegpt": 35, "fit": 30})
    found["results"] = [{**result, "seconds": seconds[result["recipe"]]} for result in found["results"]]
    assert fit_advice.published(found)[2:] == [
        "| small | 2:4 | Wanda: 5.00x, 10 s | ACE: 4.00x, 12 s | +20% |",
        "| small | 2:4 | SparseGPT: 3.50x, 20 s | Wanda, permuted, lstsq: 3.00x, 30 s | +50% |",
    ]


def test_a_published_method_that_beats_another_is_named():
    found = record(small={"wanda": 50, "ria": 55, "ace": 40, "sparsegpt": 60})
    assert fit_advice.published_beaten(found)[2:] == [
        "- small, 2:4: Wanda beats RIA.",
        "- small, 2:4: Wanda and RIA beat SparseGPT.",
    ]
    found["results"][0]["seconds"] = found["results"][1]["seconds"] = 9.0
    assert fit_advice.published_beaten(found)[2:] == ["- small, 2:4: Wanda beats RIA."]
    nothing = record(small={"wanda": 50, "ace": 40})
    assert fit_advice.published_beaten(nothing) == [
        "None of the three has a lower perplexity than another in no more time."
    ]


def test_the_picture_has_every_result_of_a_model_with_enough_of_them():
    few, enough = {"wanda": 50, "ace": 40}, {"wanda": 50, "ace": 40, "fit": 30, "ace a=0.5": 45}
    found = record(few=few, enough=enough)
    found["results"] += [{**result, "pattern": "8:16", "perplexity": 20.0} for result in found["results"]]
    root = ElementTree.fromstring(fits_picture.picture(found))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(words) for words in ("Wanda", "ACE", "Wanda, permuted, lstsq", "ACE, a=0.5")] == [2, 2, 2, 0]
    assert "enough" in texts
    assert "few" not in texts
