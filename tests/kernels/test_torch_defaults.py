"""Every operation gives the same bits under any default dtype and default device of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.assignment import assignment
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.column_scale import ColumnScale, checked_column_scale
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.gram_product import gram_product
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_cutlass, pack_nm, pack_scored
from ace_triton.kernels.pack_rows import pack_rows, unpack_rows
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weighted_squares import weighted_squares

ROWS, COLS, TOKENS = 32, 64, 24


def inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    made = {
        "weight": draw(ROWS, COLS).to(dtype),
        "tokens": draw(2, TOKENS // 2, COLS).to(dtype),
        "outputs": draw(TOKENS, ROWS).to(dtype),
        "row": draw(ROWS).abs(),
        "col": draw(COLS).abs(),
        "coupling": draw(ROWS, COLS).abs(),
        "scores": draw(2, 8, 12).abs(),
        "token_weights": draw(TOKENS).abs(),
        "valid": draw(2, TOKENS // 2) > -1,
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def every_operation(of: dict[str, torch.Tensor]) -> Iterator[tuple[str, object]]:
    """The results of all public launchers, by name."""
    weight, tokens, outputs, valid = of["weight"], of["tokens"], of["outputs"], of["valid"]
    flat, token_weights = tokens.flatten(0, 1), of["token_weights"]
    terms = ScoreTerms(of["row"], of["col"], of["col"], of["coupling"])
    sums = moments(tokens, valid)
    yield "moments", (sums.count, sums.total, sums.deviation, sums.sequence_square, sums.sequence_count)
    scale = ColumnScale(sums.total.square(), 3.0, of["col"], of["col"], -1)
    yield "column_scale", tuple(checked_column_scale(scale))
    yield "weight_sums", tuple(weight_sums(weight))
    yield "relative_importance", tuple(relative_importance(weight, scale).tensors.values())
    for norm in ("max_layer", "max_sequence", "channel", "frobenius"):
        yield f"variance_factor {norm}", variance_factor(sums.sequence_square, norm, 0.5, 0.01)
    for output in ("weight", "mask", "bits"):
        for axis in ("in", "out"):
            yield f"select_nm {output} {axis}", select_nm(weight.clone(), terms, 2, 4, axis=axis, output=output)
        for scope, k in (("row", 20), ("layer", 700)):
            yield f"select_rows {output} {scope}", select_rows(weight.clone(), terms, k, scope=scope, output=output)
    vectors = ScoreTerms(scale=of["col"])
    yield "cosp_select", cosp_select(weight.clone(), vectors, flat, outputs, token_weights, 2, 4)
    yield "coupling", coupling(flat, outputs, token_weights)
    yield "token_norms", token_norms(outputs)
    yield "weighted_squares", weighted_squares(flat, torch.stack([token_weights, 2 * token_weights]))
    yield "gram_product", gram_product(flat)
    yield "all_finite", (all_finite(weight, outputs, terms=[of["coupling"]]), all_finite(terms=[-of["col"]]))
    gains = join_gains(of["scores"], of["scores"].flip(2))
    yield "join_gains", gains
    yield "assignment", assignment(gains)
    packed = pack_scored(weight, terms, 2, 4)
    yield "pack_scored", (packed.values, packed.meta)
    pruned = unpack_nm(packed)
    yield "unpack_nm", pruned
    again = pack_nm(pruned, 2, 4)
    again.check()
    yield "pack_nm", (again.values, again.meta)
    if weight.element_size() == 2:
        yield "pack_cutlass", pack_cutlass(packed)
    yield "nm_linear", nm_linear(flat, packed, of["row"])
    by_rows = pack_rows(pruned)
    by_rows.check()
    yield "pack_rows", (by_rows.values, by_rows.meta, by_rows.starts)
    quantized = quantize_dense(pruned, 4, 32)
    yield "quantized_linear", (quantized.values, quantized.absmax, quantized_linear(flat, quantized, of["row"]))
    yield "rows_linear", (unpack_rows(by_rows), rows_linear(flat, by_rows, of["row"]))
    loss, gradient = divergence(outputs, outputs.flip(0))
    yield "divergence", (loss, gradient)
    values, rounded = weight.float().clone(), weight.clone()
    kept = GradientMoments.like(values)
    adamw(values, kept, weight.flip(0), Step(0.1, 1), rounded=rounded)
    yield "adamw", (values, kept.first, kept.second, rounded)
    yield "round_groups", (round_groups(values, 4, 32, rounded.dtype),)


def assert_same(got: object, expected: object, what: str) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, what)
    elif isinstance(expected, torch.Tensor):
        assert (got.dtype, got.device) == (expected.dtype, expected.device), what
        assert torch.equal(got, expected), what
    else:
        assert got == expected, what


@pytest.fixture
def put_back() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.mark.skipif(interpreting(), reason="hundreds of launches, which take minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_torchs_defaults(device, dtype, put_back):
    given = inputs(device, dtype)
    expected = dict(every_operation(given))
    for default in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(default)
        for name, result in every_operation(given):
            assert_same(result, expected[name], f"{name} under {default}")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    for name, result in every_operation(given):
        assert_same(result, expected[name], f"{name} with the meta device as default")
