"""The figures of a pruned model, dense and packed, taken of a tiny one, and where the guide gets them from."""

import json
import mmap
from pathlib import Path

import pytest
import torch

from ace_triton import prune_model
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.dispatch import CPU_LIMITS
from ace_triton.packed.pack_model import pack_model
from benchmarks.harness.resident import resident
from benchmarks.reports.readme import row_limits
from benchmarks.reports.sparse import FORMS, main, page, run_in_turn, table, tokens_in_common

ROOT = Path(__file__).resolve().parents[2]


def test_all_forms_of_a_tiny_model(tiny_checkpoint, tmp_path):
    out = tmp_path / "sparse"
    main(str(tiny_checkpoint), "pydoc:calibration", new_tokens=6, rounds=2, dtypes=["bf16"], out=out)
    content = json.loads(out.with_suffix(".json").read_text())
    forms = content["forms"]["bf16"]
    assert list(forms) == list(FORMS)
    dense, packed, eight_bits = forms.values()
    assert (dense["layer_bytes"], packed["layer_bytes"]) == (1, 0.5625)
    assert eight_bits["file_bytes"] < packed["file_bytes"] < dense["file_bytes"]
    assert (dense["same_tokens"], packed["same_tokens"]) == (6, 6)
    assert (dense["faster"], dense["prompt_faster"]) == (1, 1)
    for form in forms.values():
        assert min(form["tokens_per_second"], form["faster"], form["prompt_seconds"], form["prompt_faster"]) > 0
        assert 10**7 < form["resident"]["after"] <= form["resident"]["peak"]
    assert out.with_suffix(".md").read_text() == "\n".join(page(content)) + "\n"


def test_models_that_differ_are_seen_to(tiny_model, tokenizer, tmp_path):
    """One side is given other weights: what it writes is not called the same."""
    prune_model(tiny_model, torch.randint(3, 99, (4, 16)), "magnitude", "2:4")
    pack_model(tiny_model)
    save_packed(tiny_model, tokenizer, tmp_path / "one")
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight.copy_(torch.randn_like(tiny_model.model.embed_tokens.weight))
    save_packed(tiny_model, tokenizer, tmp_path / "other")
    one, other = run_in_turn([tmp_path / "one", tmp_path / "other"], torch.tensor([[3, 4, 5]]), 8, 1)
    assert (len(one.tokens), len(other.tokens)) == (8, 8)
    assert tokens_in_common(one.tokens, other.tokens) < 8
    assert [len(run.seconds) for run in (one, other)] == [len(run.prompt_seconds) for run in (one, other)] == [1, 1]


def test_resident_memory_grows_by_what_is_held():
    """New pages of the system's: an allocator may hand out what is resident already."""
    size = 2**26
    before = resident()
    with mmap.mmap(-1, size) as pages:
        held = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        after = resident()
        del held
    assert after.after - before.after == pytest.approx(size, rel=0.2)
    assert after.peak >= after.after


def test_the_table_has_a_column_for_each_form():
    lines = table(json.loads((ROOT / "docs" / "sparse.json").read_text()))
    assert {line.count("|") for line in lines} == {2 + 2 * len(FORMS)}
    assert (ROOT / "docs" / "sparse.md").read_text().endswith("\n".join(lines) + "\n")


def test_the_guide_has_the_figures_and_the_limits_of_the_dispatch():
    guide = (ROOT / "docs" / "guides" / "run-sparse.md").read_text()
    limits = "\n".join(row_limits())
    assert "\n".join(table(json.loads((ROOT / "docs" / "sparse.json").read_text()))) in guide
    assert limits in guide
    assert f"| AVX2 | any | up to {CPU_LIMITS['avx2'][torch.float32].two_of_four} | any |" in limits
