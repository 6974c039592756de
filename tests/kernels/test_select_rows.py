"""select_rows against its reference: exact counts, masks equal exactly, kept bits untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import pack_bits
from ace_triton.kernels.select_rows import select_rows, select_rows_reference
from tests.pairwise import every_cell, pairwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TERMS = ("row", "col", "scale", "coupling")
MOST_ROWS = 4 if interpreting() else 20
MOST_COLS = 70 if interpreting() else 300
cells = pairwise if interpreting() else every_cell
"""Of the larger grids of parameters: the interpreter is slow, so it runs a pairwise cover."""


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_every_output(weight: torch.Tensor, terms: ScoreTerms, k: int, scope: str) -> None:
    before = weight.clone()
    keep = select_rows_reference(weight, terms, k, scope=scope, output="mask")
    torch.testing.assert_close(select_rows(weight, terms, k, scope=scope, output="mask"), keep)
    torch.testing.assert_close(select_rows(weight, terms, k, scope=scope, output="bits"), pack_bits(keep))
    assert torch.equal(bits_of(weight), bits_of(before)), "only output='weight' may change the weight"
    assert select_rows(weight, terms, k, scope=scope) is weight
    assert torch.equal(bits_of(weight), torch.where(keep, bits_of(before), 0))


@given(
    rows=st.integers(0, MOST_ROWS),
    cols=st.integers(0, MOST_COLS),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.99, 1.0]),
    scope=st.sampled_from(["row", "layer"]),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(["normal", "ties", "special"]),
    present=st.sets(st.sampled_from(TERMS)),
    power=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, make_terms, rows, cols, share, scope, dtype, values, present, power, seed):
    weight = make_matrix(rows, cols, dtype, values, seed)
    terms = make_terms(rows, cols, tuple(sorted(present)), power, seed)
    k = int(share * (cols if scope == "row" else weight.numel()))
    check_every_output(weight, terms, k, scope)


@pytest.mark.parametrize(
    ("dtype", "scope", "value", "k"),
    cells(DTYPES, ["row", "layer"], [0.0, -0.0, 1.0, 2.0**-24], [0, 1, 13, 37]),
)
def test_equal_scores_prune_the_lower_index(make_matrix, dtype, scope, value, k):
    weight = torch.full_like(make_matrix(3, 37, dtype), value)
    mask = select_rows(weight, ScoreTerms(), k, scope=scope, output="mask")
    index = torch.arange(37, device=weight.device).expand(3, 37)
    if scope == "layer":
        index = torch.arange(111, device=weight.device).reshape(3, 37)
    assert torch.equal(mask, index >= (37 if scope == "row" else 111) - k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_exactly_k_survive_infinities_and_nans(make_matrix, dtype, scope):
    weight = make_matrix(9, 65, dtype, "special")
    weight[::2, ::3] = torch.nan
    mask = select_rows(weight, ScoreTerms(), 30, scope=scope, output="mask")
    assert (mask.sum(1) == 30).all() if scope == "row" else int(mask.sum()) == 30


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("present", [("scale",), ("row", "col", "scale")])
def test_layer_sized(make_matrix, make_terms, dtype, scope, present):
    weight = make_matrix(120, 4099, dtype)
    check_every_output(weight, make_terms(120, 4099, present), 2049 * (1 if scope == "row" else 120), scope)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_any_strides(make_matrix, make_terms, scope, layout):
    wide = make_matrix(7, 16, torch.bfloat16) if interpreting() else make_matrix(20, 50, torch.bfloat16)
    untouched = wide.clone()
    weight, original = {
        "row stride": (wide[:, 3:-3], untouched[:, 3:-3]),
        "transposed": (wide.t(), untouched.t()),
        "column stride": (wide[:, ::3], untouched[:, ::3]),
    }[layout]
    terms = make_terms(*weight.shape, ("scale",))
    keep = select_rows_reference(weight, terms, 4, scope=scope, output="mask")
    select_rows(weight, terms, 4, scope=scope)
    original.masked_fill_(~keep, 0)
    assert torch.equal(wide, untouched), "wrong weights pruned, or something outside the view written"


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("output", ["weight", "mask", "bits"])
def test_nothing_to_do(device, shape, scope, output):
    result = select_rows(torch.empty(shape, device=device), ScoreTerms(), 0, scope=scope, output=output)
    assert result.shape == ((shape[0], -(-shape[1] // 8)) if output == "bits" else shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": -1}, "k must be between 0 and 16"),
        ({"k": 17}, "k must be between 0 and 16"),
        ({"k": 129, "scope": "layer"}, "k must be between 0 and 128"),
        ({"scope": "model"}, "scope must be"),
        ({"output": "sparse"}, "output must be"),
        ({"weight": torch.zeros(8, 16, dtype=torch.int8)}, "float32, float16 or bfloat16"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    given_arguments = {"weight": torch.zeros(8, 16), "terms": ScoreTerms(), "k": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        select_rows(**given_arguments)
