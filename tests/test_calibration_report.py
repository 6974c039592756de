"""The calibration report: counts checked by hand, the dense model's perplexity, and the warnings."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from ace_triton.calibration_report import CalibrationReport, repeated_share, report_on
from ace_triton.inputs.calibration import load_calibration

PLAIN = CalibrationReport(
    source="some.jsonl",
    sequences=4,
    length=16,
    bos="none",
    documents=1200,
    distinct_documents=1200,
    text_tokens=320_000,
    distinct_tokens=60,
    repeated=0.5,
    perplexity=200.0,
    limit=200.0,
)


@pytest.mark.parametrize(("vocabulary", "span"), [(2, 3), (2, 16), (3, 5), (50_000, 4), (2, 99)])
def test_repeated_spans_are_counted_as_by_hand(vocabulary, span):
    sequences = torch.randint(0, vocabulary, (7, 30), generator=torch.Generator().manual_seed(2))
    spans = [tuple(row[i : i + span]) for row in sequences.tolist() for i in range(max(1, 31 - span))]
    assert repeated_share(sequences, span) == pytest.approx(1 - len(set(spans)) / len(spans))


def test_counts_and_perplexity(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "three.jsonl"
    texts = ["Some words about the weather.", "Other words, of ships.", "And of trees, too."] * 20
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    calibration = load_calibration(str(path), tokenizer, samples=8, length=100)
    report = report_on(calibration, tiny_model, str(path))
    assert (report.source, report.sequences, report.length, report.bos) == ("three.jsonl", 8, 100, "none")
    assert (report.documents, report.distinct_documents) == (60, 3)
    assert report.text_tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert report.distinct_tokens == len(set(calibration.ids.flatten().tolist()))
    assert report.limit == math.sqrt(320)
    with torch.no_grad():  # five sequences are the first 500 tokens
        losses = [
            -tiny_model(row[None]).logits[0, :-1].double().log_softmax(-1).gather(1, row[1:, None])
            for row in calibration.ids[:5]
        ]
    assert report.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    repeats, mismatch = report.warnings()
    assert "repeats itself (distinct documents: 3)" in repeats
    assert f"perplexity {report.perplexity:.0f}, warned above 18" in mismatch
    assert "from three.jsonl (60 documents, 3 distinct, " in report.lines()[0]
    assert f"dense perplexity on it: {report.perplexity:.1f}" in report.lines()[0]
    assert json.loads(json.dumps(report.to_dict()))["warnings"] == [repeats, mismatch]


def test_what_the_model_writes_has_no_documents(tiny_model, tokenizer):
    report = report_on(load_calibration("self", tokenizer, samples=2, length=9, model=tiny_model), tiny_model, "self")
    assert (report.source, report.documents, report.text_tokens) == ("self", None, None)
    assert "written by the model itself" in report.lines()[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"repeated": 0.51}, ["51% of the calibration text repeats itself (distinct documents: 1,200)"]),
        ({"repeated": 0.51, "documents": None}, ["51% of the calibration text repeats itself: "]),
        ({"perplexity": 201.0}, ["perplexity 201, warned above 200"]),
        ({"perplexity": None}, ["perplexity not finite"]),
    ],
)
def test_when_it_warns(changes, words):
    warnings = dataclasses.replace(PLAIN, **changes).warnings()
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_prune_says_what_it_calibrated_on(command, tiny_checkpoint, some_text, tmp_path):
    told = tmp_path / "told.json"
    words = ("--calibration", some_text, "--samples", 4, "--length", 16, "--json", told)
    code, shown, errors = command("prune", tiny_checkpoint, tmp_path / "wanda", "--method", "wanda", *words)
    assert code == 0, errors
    assert "calibration: 4 sequences of 16 tokens from some.txt (1 document, " in shown
    assert "Calibrate on text like the text that the model will be used on." in shown
    assert "warning: the dense model hardly predicts the calibration text" in errors
    assert json.loads(told.read_text())["calibration_report"]["source"] == "some.txt"
    beside = json.loads((tmp_path / "wanda" / "ace_triton.json").read_text())
    assert beside["calibration_report"] == json.loads(told.read_text())["calibration_report"]
    code, shown, errors = command("prune", tiny_checkpoint, tmp_path / "plain", "--method", "magnitude", *words)
    assert code == 0, errors
    assert "calibration:" not in shown
    assert "calibration_report" not in json.loads(told.read_text())
