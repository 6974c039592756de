"""The report on fits, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from ace_triton.recipe import Recipe
from benchmarks.reports import fits


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
    run(files, only=["2:4 *", "0.5 fit"], most=4)
    again = [("2:4", "ace"), ("2:4", "ria"), ("2:4", "fit"), ("0.5", "fit")]
    assert measured(files["out"]) == [("2:4", "wanda"), *again]
    run(files, steps=1, only=["4:8 recovered"])
    page = (files["out"] / "fits.md").read_text()
    assert "| Wanda, permuted, lstsq for 1 steps" not in page
    assert "| Wanda, permuted, lstsq, recovered for 1 steps |  | " in page
    run(files, seed=1, only=["2:4 wanda"])
    assert " (2), " in (files["out"] / "fits.md").read_text()


def test_results_of_two_settings_are_not_mixed(files):
    run(files, most=0, only=["2:4 wanda"])
    run(files, most=1)
    with pytest.raises(typer.BadParameter, match="results of small have windows 2, not windows 3: use that setting"):
        run(files, windows=3)


def test_a_pattern_that_matches_nothing_lists_the_cells(files):
    with pytest.raises(typer.BadParameter, match="--only 3:4 matches no cell: the cells are '2:4 wanda', "):
        run(files, only=["3:4"])


def test_channels_of_a_fraction_are_not_permuted():
    assert fits.recipe_of("fit", "0.5") == Recipe("wanda", sparsity=0.5, update="lstsq")
    assert fits.recipe_of("block fit", "2:4").permute
