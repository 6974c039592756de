"""select_nm against its reference: masks equal exactly, kept bits untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.score_terms import ScoreTerms, scores_reference
from ace_triton.kernels.select_nm import GROUP_SIZES, pack_bits, select_nm, select_nm_reference
from tests.pairwise import every_cell, pairwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = [(n, m) for m in GROUP_SIZES for n in sorted({1, m // 2, m - 1})]
TERMS = ("row", "col", "scale", "coupling")
MOST_GROUPS = 6 if interpreting() else 40
cells = pairwise if interpreting() else every_cell
"""Of the larger grids of parameters: the interpreter is slow, so it runs a pairwise cover."""


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_every_output(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, axis: str = "in") -> None:
    before = weight.clone()
    keep = select_nm_reference(weight, terms, n, m, axis=axis, output="mask")
    mask = select_nm(weight, terms, n, m, axis=axis, output="mask")
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    torch.testing.assert_close(mask, keep)
    packed = select_nm(weight, terms, n, m, axis=axis, output="bits")
    torch.testing.assert_close(packed, pack_bits(keep))
    assert torch.equal(bits_of(weight), bits_of(before)), "only output='weight' may change the weight"
    pruned = select_nm(weight, terms, n, m, axis=axis)
    assert pruned is weight
    assert torch.equal(bits_of(weight), torch.where(keep, bits_of(before), 0))


@given(
    groups=st.integers(0, MOST_GROUPS),
    across=st.integers(0, MOST_GROUPS),
    pattern=st.sampled_from(PATTERNS),
    axis=st.sampled_from(["in", "out"]),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(["normal", "ties", "special"]),
    present=st.sets(st.sampled_from(TERMS)),
    power=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, make_terms, groups, across, pattern, axis, dtype, values, present, power, seed):
    n, m = pattern
    rows, cols = (across, groups * m) if axis == "in" else (groups * m, across)
    weight = make_matrix(rows, cols, dtype, values, seed)
    terms = make_terms(rows, cols, tuple(sorted(present)), power, seed)
    check_every_output(weight, terms, n, m, axis)


@pytest.mark.parametrize(
    ("dtype", "pattern", "axis", "value"),
    cells(DTYPES, [(2, 4), (4, 8), (1, 2), (8, 16), (5, 32)], ["in", "out"], [0.0, -0.0, 1.0, 2.0**-24]),
)
def test_equal_scores_prune_the_lower_index(make_matrix, dtype, pattern, axis, value):
    n, m = pattern
    weight = torch.full_like(make_matrix(m, m, dtype), value)
    mask = select_nm(weight, ScoreTerms(), n, m, axis=axis, output="mask")
    expected = (torch.arange(m, device=weight.device) >= m - n).expand(m, m)
    assert torch.equal(mask, expected if axis == "in" else expected.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 16), (31, 32)])
def test_exactly_n_survive_infinities_and_nans(make_matrix, dtype, axis, n, m):
    weight = make_matrix(64, 64, dtype, "special")
    weight[::3, ::5] = torch.nan
    mask = select_nm(weight, ScoreTerms(), n, m, axis=axis, output="mask")
    groups = mask if axis == "in" else mask.t()
    assert (groups.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize(
    ("dtype", "present", "power", "cols"),
    cells(DTYPES, [(), ("scale",), ("row", "col", "scale"), TERMS], [1, 2], [4, 12, 36, 100, 260]),
)
def test_two_of_four_at_odd_widths(make_matrix, make_terms, dtype, present, power, cols):
    rows = 3 if interpreting() else 9
    for values in ("normal", "ties"):
        weight = make_matrix(rows, cols, dtype, values)
        check_every_output(weight, make_terms(rows, cols, present, power), 2, 4)


@pytest.mark.skipif(interpreting(), reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", [("scale",), ("row", "col", "scale")])
@pytest.mark.parametrize(("rows", "cols"), [(515, 1032), (2048, 576)])
def test_layer_sized(make_matrix, make_terms, dtype, present, rows, cols):
    weight = make_matrix(rows, cols, dtype)
    check_every_output(weight, make_terms(rows, cols, present), 2, 4)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_any_strides(make_matrix, make_terms, axis, layout):
    wide = make_matrix(48, 96, torch.bfloat16)
    untouched = wide.clone()
    weight, original = {
        "row stride": (wide[:, 16:48], untouched[:, 16:48]),
        "transposed": (wide.t(), untouched.t()),
        "column stride": (wide[:, ::2], untouched[:, ::2]),
    }[layout]
    terms = make_terms(*weight.shape, ("scale",))
    keep = select_nm_reference(weight, terms, 2, 4, axis=axis, output="mask")
    assert torch.equal(select_nm(weight, terms, 2, 4, axis=axis, output="mask"), keep)
    select_nm(weight, terms, 2, 4, axis=axis)
    original.masked_fill_(~keep, 0)
    assert torch.equal(wide, untouched), "wrong weights pruned, or something outside the view written"


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("output", ["weight", "mask", "bits"])
def test_nothing_to_do(device, shape, axis, output):
    weight = torch.empty(shape, device=device)
    result = select_nm(weight, ScoreTerms(), 2, 4, axis=axis, output=output)
    assert result.shape == ((shape[0], -(-shape[1] // 8)) if output == "bits" else shape)


def test_retains_the_highest_scores(make_matrix, make_terms):
    weight = make_matrix(32, 64, torch.float32)
    terms = make_terms(32, 64, ("scale", "row"))
    mask = select_nm(weight, terms, 2, 4, output="mask")
    scores = scores_reference(weight, terms).reshape(-1, 4)
    kept = scores[mask.reshape(-1, 4)].reshape(-1, 2).sum(1)
    assert torch.allclose(kept, scores.topk(2).values.sum(1))


def test_parameters_are_pruned_in_place(make_matrix):
    weight = torch.nn.Parameter(make_matrix(8, 16, torch.float32))
    assert select_nm(weight, ScoreTerms(), 2, 4) is weight
    assert int((weight != 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 3}, "m must be one of"),
        ({"n": 0}, "between 1 and 3"),
        ({"n": 4}, "between 1 and 3"),
        ({"m": 32, "n": 8}, "multiple of 32"),
        ({"axis": "rows"}, "axis must be"),
        ({"output": "sparse"}, "output must be"),
        ({"weight": torch.zeros(8, 16, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"weight": torch.zeros(16)}, r"\[out_features, in_features\]"),
        ({"terms": ScoreTerms(scale=torch.ones(8))}, "'scale' has shape"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    given_arguments = {"weight": torch.zeros(8, 16), "terms": ScoreTerms(), "n": 2, "m": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        select_nm(**given_arguments)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_flag_keeps_the_weight_as_it_is(make_matrix, axis):
    weight = make_matrix(8, 40, torch.bfloat16)
    before, pruned = weight.clone(), select_nm(weight.clone(), ScoreTerms(), 2, 4, axis=axis)
    flag = torch.ones(1, dtype=torch.int32, device=weight.device)
    assert select_nm(weight, ScoreTerms(), 2, 4, axis=axis, unless=flag) is weight
    assert torch.equal(weight, before)
    select_nm(weight, ScoreTerms(), 2, 4, axis=axis, unless=flag.zero_())
    assert torch.equal(weight, pruned)
    with pytest.raises(ValueError, match="unless= is for output='weight'"):
        select_nm(weight, ScoreTerms(), 2, 4, output="mask", unless=flag)
