"""Terms of a score that no selection takes, and what is known of terms that were looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ace_triton.kernels.backend import choose_backend
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows

SELECTIONS = {
    "select_nm": lambda weight, terms: select_nm(weight, terms, 2, 4),
    "select_nm along out": lambda weight, terms: select_nm(weight, terms, 2, 4, axis="out", output="bits"),
    "select_rows": lambda weight, terms: select_rows(weight, terms, 5),
    "select_rows of a layer": lambda weight, terms: select_rows(weight, terms, 50, scope="layer", output="mask"),
    "pack_scored": lambda weight, terms: pack_scored(weight, terms, 2, 4),
}
SHAPES = {"row": (8,), "col": (16,), "scale": (16,), "coupling": (8, 16)}

on_a_gpu = pytest.mark.skipif(choose_backend(torch.ones(1)) == "triton", reason="Triton's bodies do not look")


@on_a_gpu
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bad", [-1e-30, -torch.inf, torch.inf, torch.nan])
def test_terms_out_of_range_are_refused_and_nothing_is_written(selection, name, bad):
    weight = torch.ones(8, 16)
    named = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    named[name].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"score term '{name}' contains NaN, infinity or a negative number"):
        SELECTIONS[selection](weight, ScoreTerms(**named))
    assert torch.equal(weight, torch.ones(8, 16))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_zeros_of_either_sign_are_taken(selection):
    named = {name: torch.full(shape, -0.0) for name, shape in SHAPES.items()}
    SELECTIONS[selection](torch.ones(8, 16), ScoreTerms(**named))


def test_what_was_looked_at_is_known_of_these_very_terms_alone():
    terms = ScoreTerms(scale=torch.ones(16))
    assert not terms.checked
    terms.vouch()
    assert terms.checked
    assert not replace(terms, row=torch.ones(8)).checked
