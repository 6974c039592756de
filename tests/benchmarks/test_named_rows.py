"""The rows of a report by name, and the report on quantized weights, which has many of them."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.reports import fits, quantization, rotations, structured, tradeoff, trials
from benchmarks.reports.named_rows import chosen_rows


def test_rows_are_chosen_by_any_of_the_patterns_in_their_own_order():
    assert chosen_rows(["2:4 a", "2:4 b", "8:16 a"], str, ["8:16 *", "* b", "*a"]) == ["2:4 a", "2:4 b", "8:16 a"]
    assert chosen_rows(["2:4 a", "2:4 b"], str, ["*b"]) == ["2:4 b"]
    assert chosen_rows(["2:4 a", "2:4 b"], str, None) == ["2:4 a", "2:4 b"]


def test_each_pattern_must_fit_a_row():
    with pytest.raises(typer.BadParameter, match="--only '3:4 a': no row has such a name; --list prints all names"):
        chosen_rows(["2:4 a"], str, ["2:4 a", "3:4 a"])


def test_every_row_of_the_large_reports_has_a_name_of_its_own():
    for report, rows in ((quantization, quantization.cells()), (structured, list(structured.cells(every=True)))):
        assert len({report.label(row) for row in rows}) == len(rows) > 30


def test_recoveries_in_few_bits_are_measured_from_one_pruning(
    tmp_path, tiny_checkpoint, some_text, monkeypatch, capsys
):
    for name, value in (("SAMPLES", 8), ("LENGTH", 16), ("WINDOW_LENGTH", 16), ("GROUP", 32)):
        monkeypatch.setattr(quantization, name, value)
    text, options = str(some_text), {"model": str(tiny_checkpoint), "name": "small", "windows": 1, "out": tmp_path}
    wanted = ["8:16 recovered 16", "8:16 recovered 4", "8:16 fit 4 absmax"]
    quantization.main(text, text, steps=2, kept=tmp_path / "kept", only=wanted, **options)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    _, *found = json.loads((tmp_path / "quantization.json").read_text())["outcomes"]
    named = {quantization.label((*(o[k] for k in ("method", "pattern", "bits", "rule", "steps")),)): o for o in found}
    assert named.keys() == set(wanted)
    assert [named[name]["steps"] for name in wanted] == [2, 2, 0]
    base, four = (named[name]["perplexity"] for name in wanted[:2])
    page = (tmp_path / "quantization.md").read_text()
    assert "| weights | 8:16, fit | 8:16, recovered for 2 steps |\n" in page
    assert f"| 4 bits, rounded in the recovery |  | {four:.2f} ({four / base - 1:+.1%}) |\n" in page
    quantization.main(text, text, steps=2, list_rows=True, **options)
    listed = capsys.readouterr().out
    assert f"8:16 recovered 4: perplexity {four:.2f}\n" in listed
    assert "8:16 recovered 4 gptq: not measured\n" in listed


def test_one_cell_of_the_quantized_models_is_measured_alone(tmp_path, tiny_checkpoint, some_text, monkeypatch, capsys):
    for name, value in (("SAMPLES", 8), ("LENGTH", 16), ("WINDOW_LENGTH", 16), ("GROUP", 32)):
        monkeypatch.setattr(quantization, name, value)
    text, options = str(some_text), {"model": str(tiny_checkpoint), "name": "small", "windows": 1, "out": tmp_path}
    quantization.main(text, text, only=["2:4 wanda 4 gptq"], **options)
    dense, cell = json.loads((tmp_path / "quantization.json").read_text())["outcomes"]
    assert (dense["method"], cell["method"], cell["pattern"], cell["bits"]) == ("", "wanda", "2:4", 4)
    page = (tmp_path / "quantization.md").read_text()
    assert f"| Wanda, 2:4 |  |  |  |  | {cell['perplexity']:.2f} |\n" in page
    assert "Cells without a number are not measured yet." in page
    quantization.main(text, text, list_rows=True, **options)
    listed = capsys.readouterr().out
    assert f"2:4 wanda 4 gptq: perplexity {cell['perplexity']:.2f}\n" in listed
    assert "8:16 ace 16: not measured\n" in listed


@pytest.mark.parametrize("report", [fits, quantization, rotations, structured, trials])
def test_only_the_list_of_rows_needs_no_texts(report, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(report.main)
    listed = CliRunner().invoke(app, ["--list", "--out", str(tmp_path)])
    assert listed.exit_code == 0, listed.output
    assert listed.output.startswith("SmolLM2-135M (--name)\n")
    assert list(tmp_path.iterdir()) == []
    for given, missing in ((["--evaluation", "wiki"], "--calibration"), (["--calibration", "c4"], "--evaluation")):
        refused = CliRunner().invoke(app, [*given, "--out", str(tmp_path)])
        assert refused.exit_code == 2
        assert f"'{missing}': is missing: name a text (only --list needs none)" in refused.output


def test_the_tradeoff_needs_a_text_to_measure():
    with pytest.raises(typer.BadParameter, match="--evaluation is missing"):
        tradeoff.main(only="perplexity")
