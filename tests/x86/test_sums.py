"""The sums, the check for finite numbers and the GEMMs over tokens as machine code, at the sizes of real layers.

The executor runs all kernels. ``tl.dot`` becomes plain multiply-adds in small tiles, so these tests do not cover the
rounding of tensor cores. Each kernel takes seconds to compile, so grids of three parameters are pairwise covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch

from ace_triton.kernels import launch, launch_sums
from ace_triton.kernels.adamw import GradientMoments, Step, adamw, adamw_reference
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.column_scale import checked_column_scale, column_scale_reference
from ace_triton.kernels.cosp_select import cosp_select, cosp_select_reference
from ace_triton.kernels.coupling import coupling, coupling_reference
from ace_triton.kernels.divergence import divergence, divergence_reference
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.join_gains import join_gains, join_gains_reference
from ace_triton.kernels.moments import moments, moments_reference
from ace_triton.kernels.round_groups import round_groups, round_groups_reference
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.token_norms import token_norms, token_norms_reference
from ace_triton.kernels.token_statistics import (
    NUMBERS,
    no_layer_sums,
    no_moments,
    token_statistics,
    token_statistics_reference,
)
from ace_triton.kernels.variance_factor import variance_factor, variance_factor_reference
from ace_triton.kernels.weight_sums import (
    relative_importance,
    relative_importance_reference,
    weight_sums,
    weight_sums_reference,
)
from ace_triton.kernels.weighted_squares import weighted_squares, weighted_squares_reference
from tests.kernels.test_column_scale import made_of
from tests.kernels.test_variance_factor import NORMS, make_squares
from tests.pairwise import pairwise
from tests.x86.executor import executed_on_x86

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (torch.bfloat16, torch.float32)
"""One dtype of each size of an element."""

SHAPES = [(576, 1536), (1536, 576), (37, 50)]


def each_width(cases: Sequence[Any]) -> list[tuple[torch.dtype, Any]]:
    """Every case in bf16 and in fp32, and the first in fp16.

    Launchers choose blocks by the size of an element, so those of fp16 are those of bf16. Only the conversion of each
    element to fp32 differs, and that one case shows it.
    """
    return [*product(WIDTHS, cases), (torch.float16, cases[0])]


@pytest.fixture
def small_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums are merged in small tiles, which compile faster; some tests keep the launchers' own."""
    for module, sums in (("weight_sums", "MERGED_SUMS"), ("moments", "MERGED_COLS")):
        for name in ("MERGED_PARTS", sums):
            monkeypatch.setattr(import_module(f"ace_triton.kernels.{module}"), name, 8)


def make_matrix(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "shape"), each_width(SHAPES))
def test_weight_sums(dtype, shape):
    weight = make_matrix(*shape, dtype=dtype)
    with executed_on_x86():
        sums = weight_sums(weight)
    for got, expected in zip(sums, weight_sums_reference(weight), strict=True):
        check(got, expected)


@pytest.mark.parametrize(
    ("dtype", "shape", "parts"), pairwise(DTYPES, SHAPES, [{"square", "base", "factor"}, {"square"}, {"base"}])
)
def test_relative_importance(small_merges, dtype, shape, parts):
    weight, scale = make_matrix(*shape, dtype=dtype), made_of(shape[1], parts, sign=-1, exponent=0.75)
    with executed_on_x86():
        terms = relative_importance(weight, scale)
    expected = relative_importance_reference(weight, scale)
    for name, tensor in terms.tensors.items():
        check(tensor, expected.tensors[name])
    assert terms.finite is not None
    assert terms.finite.passed(weight)
    assert all(terms.finite.passed(tensor, is_term=True) for tensor in terms.tensors.values())
    weight[-1, -1] = torch.inf
    with executed_on_x86():
        terms = relative_importance(weight, scale)
    assert terms.finite is not None
    assert terms.finite.passed(weight) is False


@pytest.mark.parametrize("cols", [1, 50, 1536])
@pytest.mark.parametrize(("sign", "exponent"), [(1, 0.5), (-1, 0.75)])
def test_column_scale(cols, sign, exponent):
    of = made_of(cols, {"square", "base", "factor"}, sign, exponent=exponent)
    with executed_on_x86():
        scale, not_finite = checked_column_scale(of)
    check(scale, column_scale_reference(of))
    assert not any(not_finite.tolist())
    assert of.base is not None
    of.base[-1] = torch.inf
    with executed_on_x86():
        assert any(checked_column_scale(of).not_finite.tolist())


@pytest.mark.parametrize(("norm", "power", "shape"), pairwise(NORMS, [1.0, 0.5], [(128, 1536), (3, 50), (1, 1)]))
def test_variance_factor(norm, power, shape):
    square = make_squares(*shape)
    with executed_on_x86():
        factor = variance_factor(square, norm, power, 0.01)
    torch.testing.assert_close(factor, variance_factor_reference(square, norm, power, 0.01), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize(("dtype", "shape"), each_width([(3, 49152), (37, 50), (2, 1)]))
def test_divergence(dtype, shape):
    logits, wanted = 4 * make_matrix(*shape, dtype=dtype), 4 * make_matrix(*shape, dtype=dtype).flip(0)
    exact = divergence_reference(logits, wanted)
    with executed_on_x86():
        loss, gradient = divergence(logits, wanted)
    check(loss, exact.loss)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=max(rounding, 1e-4), atol=1e-7)


@pytest.mark.parametrize(("dtype", "shape"), each_width(SHAPES))
def test_adamw(dtype, shape):
    values, gradient = make_matrix(*shape, dtype=torch.float32), make_matrix(*shape, dtype=dtype).flip(0)
    values[values.abs() < 0.5] = 0
    moments, rounded, factor = GradientMoments.like(values), torch.full_like(gradient, torch.nan), torch.tensor([0.3])
    pruned = values == 0
    for number in (1, 2):
        step = Step(1e-2, number, (0.9, 0.95))
        exact, exact_moments = adamw_reference(values, moments, gradient, step, factor=factor)
        with executed_on_x86():
            adamw(values, moments, gradient, step, factor=factor, rounded=rounded)
        torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments.first.double(), exact_moments.first, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(moments.second.double(), exact_moments.second, rtol=1e-5, atol=1e-12)
        assert torch.equal(rounded, values.to(dtype))
    assert torch.equal(values == 0, pruned)


@pytest.mark.parametrize(
    ("dtype", "bits", "group"), [(DTYPES[0], 8, 128), (DTYPES[1], 4, 32), (DTYPES[2], 4, 96), (DTYPES[0], 8, 2**20)]
)
def test_round_groups(dtype, bits, group):
    values = make_matrix(37, 1550, dtype=torch.float32)
    values[values.abs() < 0.5] = 0
    values[3, 5], values[4, 700] = 1e38, torch.inf
    for kept in (dtype, torch.float32):
        into = torch.full_like(values, 5.0, dtype=kept)
        with executed_on_x86():
            round_groups(values, bits, group, dtype, into)
        expected = round_groups_reference(values, bits, group, dtype).to(kept)
        torch.testing.assert_close(into, expected, rtol=0, atol=0, equal_nan=True)
        assert not into[into == 0].signbit().any()


@pytest.mark.parametrize(("dtype", "shape"), each_width(SHAPES))
def test_token_norms(dtype, shape):
    outputs = make_matrix(*shape, dtype=dtype)
    with executed_on_x86():
        norms = token_norms(outputs)
    check(norms, token_norms_reference(outputs))


@pytest.mark.parametrize(
    ("dtype", "shape", "n_layers"), [*pairwise(WIDTHS, SHAPES, [1, 3]), (torch.float16, SHAPES[0], 3)]
)
def test_weighted_squares(dtype, shape, n_layers):
    tokens = make_matrix(*shape, dtype=dtype)
    weights = torch.rand(n_layers, shape[0])
    weights[:, ::3] = 0.0
    tokens[::3] = torch.nan
    with executed_on_x86():
        squares = weighted_squares(tokens, weights)
    check(squares, weighted_squares_reference(tokens, weights))


@pytest.mark.parametrize(
    ("dtype", "shape", "masked"),
    [
        *pairwise(WIDTHS, [(3, 1024, 576), (40, 16, 576), (3, 37, 50)], [False, True]),
        (torch.float16, (3, 1024, 576), True),
    ],
)
def test_moments(small_merges, dtype, shape, masked):
    tokens = make_matrix(*shape, dtype=dtype) + 20
    valid = None
    if masked:
        valid = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.6
        valid[:, : shape[1] // 4] = False
        tokens[~valid] = torch.nan
    with executed_on_x86():
        got = moments(tokens, valid)
    expected = moments_reference(tokens, valid)
    assert got.count == expected.count
    assert torch.equal(got.sequence_count, expected.sequence_count)
    for name in ("total", "deviation", "sequence_square"):
        check(getattr(got, name), getattr(expected, name))


def test_moments_of_one_long_sequence_that_starts_late():
    """Sequences in chunks; in one chunk, the first valid token comes late."""
    tokens = make_matrix(1, 5000, 576, dtype=torch.bfloat16) + 20
    valid = torch.arange(5000)[None] >= 1200
    tokens[~valid] = torch.nan
    with executed_on_x86():
        got = moments(tokens, valid)
    expected = moments_reference(tokens, valid)
    assert got.count == expected.count == 3800
    for name in ("total", "deviation", "sequence_square"):
        check(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, True), (torch.float32, False)])
def test_token_statistics(monkeypatch, dtype, masked):
    """Two batches of two layers of different widths, in small tiles and several chunks; padding holds NaN."""
    monkeypatch.setattr(launch_sums, "moments", lambda tokens: launch_sums.Moments(2, 1, 16, 2, 18, 1))
    moments, layers, widths = (
        no_moments(200, torch.device("cpu")),
        no_layer_sums(2, 200, torch.device("cpu")),
        (150, 33),
    )
    for batch in range(2):
        tokens = make_matrix(3, 100, 200, dtype=dtype) + 20 + batch
        outputs = tuple(make_matrix(300, width, dtype=dtype) * 10 for width in widths)
        outputs[0][7] = 0
        valid = None
        if masked:
            valid = torch.rand(3, 100, generator=torch.Generator().manual_seed(batch)) < 0.6
            tokens[~valid] = torch.nan
            outputs[1][~valid.flatten()] = torch.inf
        expected = token_statistics_reference(tokens, valid, moments, outputs, layers, True)
        with executed_on_x86():
            got = token_statistics(tokens, valid, moments, outputs, layers, token_weights=True)
        assert torch.equal(got.sequence_count, expected.sequence_count)
        assert torch.equal(got.layers[:, [0, 2, 3]], expected.layers[:, [0, 2, 3]])
        assert got.token_weights is not None
        assert expected.token_weights is not None
        for mine, theirs in (
            *zip(got.moments, expected.moments, strict=True),
            (got.layers[:, 1], expected.layers[:, 1]),
        ):
            check(mine, theirs)
        check(got.layers[:, NUMBERS:], expected.layers[:, NUMBERS:])
        check(got.sequence_square, expected.sequence_square)
        check(got.token_weights, expected.token_weights)
        moments, layers = got.moments, got.layers


@pytest.mark.parametrize(("dtype", "size"), each_width([1536 * 576, 1001, 1]))
def test_all_finite(dtype, size):
    tensor = make_matrix(size, dtype=dtype)
    with executed_on_x86():
        assert all_finite(tensor)
        for place, value in ((0, torch.inf), (size // 2, -torch.inf), (size - 1, torch.nan)):
            one = tensor.clone()
            one[place] = value
            assert not all_finite(one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite_of_two(dtype):
    weight, coupling = make_matrix(576, 1001, dtype=dtype), make_matrix(576, 1001, dtype=torch.float32)
    with executed_on_x86():
        assert all_finite(weight, coupling)
        for one in (weight, coupling):
            for place in ((0, 0), (300, 7), (575, 1000)):
                kept = one[place].clone()
                one[place] = torch.nan
                assert not all_finite(weight, coupling)
                one[place] = kept
        assert all_finite(coupling, weight)


@pytest.mark.parametrize(("dtype", "reduce"), each_width(["abs", "rms"]))
def test_coupling(monkeypatch, dtype, reduce):
    monkeypatch.setattr(launch, "coupling", lambda matrix: launch.Coupling(16, 16, 16, "ieee", 1))
    tokens, outputs, weights = make_matrix(70, 45, dtype=dtype), make_matrix(70, 33, dtype=dtype), torch.rand(70)
    weights[::4] = 0.0
    tokens[::8] = torch.nan
    outputs[::4] = torch.inf
    with executed_on_x86():
        got = coupling(tokens, outputs, weights, reduce)
    check(got, coupling_reference(tokens, outputs, weights, reduce))


@pytest.mark.parametrize(("pools", "rows", "groups"), [(1, 576, 96), (3, 200, 37)])
def test_join_gains(monkeypatch, pools, rows, groups):
    monkeypatch.setattr(launch, "join_gains", lambda groups, candidates: launch.JoinGains(16, 16, 1))
    candidates = make_matrix(pools, rows, groups + 5, dtype=torch.float32).abs()
    thresholds = make_matrix(pools, rows, groups, dtype=torch.float32).abs()
    with executed_on_x86():
        gains = join_gains(candidates, thresholds)
    check(gains, join_gains_reference(candidates, thresholds))


@pytest.mark.parametrize(("dtype", "how"), each_width([("abs", 2, 4), ("rms", 4, 8)]))
def test_cosp_select(monkeypatch, dtype, how):
    reduce, n, m = how
    monkeypatch.setattr(launch, "coupling", lambda matrix: launch.Coupling(16, 16, 16, "ieee", 1))
    generator = torch.Generator().manual_seed(m)
    weight = make_matrix(33, 48, dtype=dtype)
    tokens, outputs = (torch.randint(-3, 4, (70, width), generator=generator).to(dtype) for width in (48, 33))
    token_weights = torch.randint(0, 2, (70,), generator=generator).float()
    tokens[token_weights == 0] = torch.nan
    terms = ScoreTerms(row=torch.rand(33), col=torch.rand(48), scale=torch.rand(48))
    expected = cosp_select_reference(weight.clone(), terms, tokens, outputs, token_weights, n, m, reduce=reduce)
    with executed_on_x86():
        cosp_select(weight, terms, tokens, outputs, token_weights, n, m, reduce=reduce)
    assert torch.equal(weight, expected)
