"""Launches for many layers against those for one layer, bit for bit: sums, checks, vectors and the selection."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels import layer_table
from ace_triton.kernels.column_scale import ColumnScale, checked_column_scale
from ace_triton.kernels.errors import ArgumentError
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.vector_group import VectorGroup, grouped_column_scale, grouped_variance_factor
from ace_triton.kernels.weight_sums import relative_importance
from ace_triton.kernels.weight_sums_group import group_relative_importance

SHAPES = ((16, 64), (33, 20), (4, 8), (0, 4), (1, 1))
GROUPED = ((16, 32), (8, 40), (0, 8), (8, 8))
"""Shapes that patterns of up to 8 divide along both axes, aligned and not."""


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.cpu().numpy().tobytes() == other.cpu().numpy().tobytes()


def flag(device: str, value: int) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.int32, device=device)


def test_sums_and_checks(make_matrix):
    dtypes = (torch.float32, torch.float16, torch.float32, torch.float16, torch.float32)
    weights = [make_matrix(*shape, dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    weights.append(make_matrix(8, 24, torch.float32).t())
    weights[1][3, 5], weights[2][0, 7] = torch.nan, torch.inf
    every, flags = group_relative_importance(weights), find_each_not_finite(weights)
    for place, (weight, terms) in enumerate(zip(weights, every, strict=True)):
        alone = relative_importance(weight)
        assert set(terms.tensors) == {"row", "col"}
        for name, vector in alone.tensors.items():
            assert same_bits(terms.tensors[name], vector)
        assert terms.finite is not None
        assert terms.finite.passed(weight) is (place not in (1, 2))
        assert bool(flags[place]) is (place in (1, 2))


@pytest.mark.parametrize(
    ("names", "dtype", "pattern", "axis"),
    [
        (("row", "col", "scale"), torch.float32, (2, 4), "in"),
        (("scale",), torch.float16, (2, 4), "out"),
        ((), torch.float32, (3, 8), "in"),
    ],
)
def test_selection(make_matrix, make_terms, device, names, dtype, pattern, axis):
    weights = [make_matrix(*shape, dtype, "ties") for shape in GROUPED]
    wide = make_matrix(16, 48, dtype)
    weights += [wide[:, 8:40], make_matrix(16, 8, dtype).t()]
    every = [make_terms(*weight.shape, names, power=1 + (axis == "out")) for weight in weights]
    before = [weight.clone() for weight in weights]
    expected = [select_nm(w.clone(), t, *pattern, axis=axis) for w, t in zip(weights, every, strict=True)]
    good = flag(device, 0)
    select_nm_group(weights, every, *pattern, axis=axis, unless=[good, flag(device, 1)])
    assert all(map(same_bits, weights, before))
    select_nm_group(weights, every, *pattern, axis=axis, unless=[good, flag(device, 0), good])
    assert all(map(same_bits, weights, expected))
    assert same_bits(wide[:, 40:], make_matrix(16, 48, dtype)[:, 40:])


def test_more_layers_and_flags_than_a_launch_takes(monkeypatch, make_matrix, device):
    monkeypatch.setattr(layer_table, "MOST_LAYERS", 16)
    weights = [make_matrix(1, 4, torch.float32, seed=seed) for seed in range(18)]
    every = [ScoreTerms() for _ in weights]
    expected = [select_nm_reference(weight.clone(), own, 2, 4) for weight, own in zip(weights, every, strict=True)]
    flags = [flag(device, 0) for _ in weights]
    select_nm_group(weights, every, 2, 4, unless=[*flags, flag(device, -1)])
    assert all(weight.count_nonzero() == 4 for weight in weights)
    select_nm_group(weights, every, 2, 4, unless=flags)
    assert all(map(same_bits, weights, expected))


@pytest.mark.parametrize(
    ("norm", "power", "sign", "exponent"), [("frobenius", 1.0, -1, 0.75), ("channel", 0.5, 1, 0.5)]
)
def test_vectors(device, norm, power, sign, exponent):
    generator = torch.Generator().manual_seed(0)
    squares = [torch.rand(shape, generator=generator).to(device) for shape in ((5, 48), (3, 20), (1, 1), (2, 0))]
    sums = [torch.rand(square.shape[1], dtype=torch.float64, generator=generator).to(device) for square in squares]

    def scale_of(place: int, factor: torch.Tensor) -> ColumnScale:
        return ColumnScale(sums[place], 3.0 + place, factor=factor, sign=sign, exponent=exponent)

    with VectorGroup():
        factors = [grouped_variance_factor(square, norm, power, 0.01) for square in squares]
        made = [grouped_column_scale(scale_of(place, factor)) for place, factor in enumerate(factors)]
    for place, square in enumerate(squares):
        alone = variance_factor(square, norm, power, 0.01)
        assert same_bits(factors[place], alone)
        expected = checked_column_scale(scale_of(place, alone))
        assert same_bits(made[place].scale, expected.scale)
        assert made[place].not_finite.tolist() == expected.not_finite.tolist() == [0]


def test_sums_inside_a_group_wait_for_its_vectors(make_matrix, device):
    weight, square = make_matrix(8, 16, torch.float32), torch.rand(3, 16, dtype=torch.float32, device=device)
    base = torch.rand(16, dtype=torch.float32, device=device)
    with VectorGroup():
        factor = grouped_variance_factor(square, "frobenius", 1.0, 0.01)
        terms = relative_importance(weight, ColumnScale(base=base, factor=factor))
    expected = relative_importance(
        weight, ColumnScale(base=base, factor=variance_factor(square, "frobenius", 1.0, 0.01))
    )
    for name, vector in expected.tensors.items():
        assert same_bits(terms.tensors[name], vector)
    assert terms.finite is not None
    assert terms.finite.passed(terms.tensors["scale"], is_term=True)
    assert terms.finite.passed(weight)


def test_says_what_is_wrong(make_matrix, make_terms):
    weight = make_matrix(4, 8, torch.float32)
    with pytest.raises(ArgumentError, match="pass at least one"):
        group_relative_importance([])
    with pytest.raises(ArgumentError, match="got 1 weights, 0 terms"):
        select_nm_group([weight], [], 2, 4)
    with pytest.raises(ArgumentError, match="use select_nm for scores with a coupling"):
        select_nm_group([weight], [make_terms(4, 8, ("coupling",))], 2, 4)
    with pytest.raises(ArgumentError, match="6"):
        select_nm_group([weight, make_matrix(4, 6, torch.float32)], [ScoreTerms(), ScoreTerms()], 2, 4)
    assert weight.count_nonzero() == weight.numel()
