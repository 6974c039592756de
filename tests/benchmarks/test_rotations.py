"""The report on rotated values, on a small model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from benchmarks.reports import rotations


def outcome(model: str, rotated: bool, perplexity: float, seed: int = 0) -> dict[str, Any]:
    words = {"recipe": rotations.label(rotations.PRESET), "windows": 10, "seconds": 5.0, "processor": "a processor"}
    return {**words, "model": model, "seed": seed, "rotated": rotated, "perplexity": perplexity}


def test_a_stopped_run_continues_and_pairs_are_compared(tmp_path, tiny_checkpoint, some_text, monkeypatch):
    for name, value in (("SAMPLES", 8), ("LENGTH", 16), ("WINDOW_LENGTH", 16)):
        monkeypatch.setattr(rotations, name, value)
    text, only = str(some_text), ["wanda, 2:4"]
    options = {"model": str(tiny_checkpoint), "name": "small", "windows": 2, "seed": 0, "out": tmp_path}
    rotations.main(text, text, only=only, most=1, **options)
    rotations.main(text, text, only=only, most=None, **options)
    found = json.loads((tmp_path / "rotations.json").read_text())["outcomes"]
    assert [(entry["recipe"], entry["rotated"]) for entry in found] == [("wanda, 2:4", False), ("wanda, 2:4", True)]
    (pair,) = rotations.pairs({"outcomes": found})
    assert pair.change == found[1]["perplexity"] / found[0]["perplexity"] - 1 != 0
    assert f"| wanda, 2:4 | 0 | 2 | {found[0]['perplexity']:.2f} |" in (tmp_path / "rotations.md").read_text()
    with pytest.raises(typer.BadParameter, match="--only 'none': no row has such a name; --list prints all names"):
        rotations.main(text, text, only=["none"], most=None, **options)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (90.0, "-5.0% on one (calibration seeds: 0) and -10.0% on two (calibration seeds: 0)"),
        (90.0, "A fall of 2% or more pays: on every measured model. The presets"),
        (99.0, "pays: on one only. The presets"),
        (None, "pays: on every measured model. One model is measured, so nothing is known to hold on others."),
    ],
)
def test_where_a_rotation_pays_is_said_from_the_figures(second, said):
    outcomes = [outcome("one", False, 100.0), outcome("one", True, 95.0)]
    if second is not None:
        outcomes += [outcome("two", False, 100.0), outcome("two", True, second)]
    assert said in rotations.verdict(rotations.pairs({"outcomes": outcomes}))


def test_a_change_without_its_pair_is_not_compared():
    alone = [outcome("one", False, 100.0), outcome("one", True, 95.0, seed=1)]
    assert rotations.pairs({"outcomes": alone}) == []
    assert "not measured yet" in rotations.verdict([])
