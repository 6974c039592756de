"""Short recoveries: the pattern that tightens ends at 8:16, and the page has what was measured."""

from __future__ import annotations

import pytest
import torch

from ace_triton import RecoverySettings
from ace_triton.recovery.checks import pruned_masks
from benchmarks.reports import held_out, recovery_short
from benchmarks.reports.recovery_short import TIGHTENED, Texts


@pytest.fixture
def texts(tiny_checkpoint, some_text, monkeypatch) -> Texts:
    sizes = {"SAMPLES": 4, "LENGTH": 16, "WINDOWS": 1, "WINDOW_LENGTH": 16}
    for name, value in {**sizes, "HELD_OUT_SEQUENCES": 2, "HELD_OUT_LENGTH": 16}.items():
        monkeypatch.setattr(recovery_short, name, value)
    settings = RecoverySettings(steps=1, tokens_per_step=32, forward_dtype=torch.float32)
    monkeypatch.setattr(recovery_short, "TRIALS", {TIGHTENED: settings})
    return Texts(str(tiny_checkpoint), *[str(some_text)] * 3)


def test_the_pattern_tightens_to_8_16(texts, tmp_path, monkeypatch):
    most_kept = []

    def divergence(bench, ids):
        masks = pruned_masks(bench.model).values()
        most_kept.append({int(mask.unflatten(1, (-1, 16)).sum(2).max()) for mask in masks})
        return held_out.divergence(bench, ids)

    monkeypatch.setattr(recovery_short, "divergence", divergence)
    outcomes = recovery_short.measure(texts, tmp_path, (), 10, kept=tmp_path / "kept")
    assert [outcome.trial for outcome in outcomes] == [TIGHTENED, ""]
    assert most_kept == [{8}, {8}]
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert recovery_short.measure(texts, tmp_path, (), 10) == outcomes
    page = "\n".join(recovery_short.section(outcomes))
    assert f"| {TIGHTENED} | {outcomes[0].divergence:.3f} | {outcomes[0].perplexity:.1f} | " in page
