"""All operations of the compiled CPU library on one matrix, to compare instruction sets and numbers of threads."""

from __future__ import annotations

from typing import get_args

import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.assignment import assignment
from ace_triton.kernels.column_scale import ColumnScale
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import GROUP_SIZES, select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import VarianceNorm, variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weighted_squares import weighted_squares

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKED_PATTERNS = ((2, 4), (1, 4), (3, 4), (3, 8), (7, 8), (8, 16), (5, 32), (31, 32))
Results = dict[str, torch.Tensor]


def matrix(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normally distributed values, with some ties, subnormals and signed zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator)
    few = torch.tensor([0.0, -0.0, 0.5, -0.5, torch.finfo(dtype).smallest_normal / 8])
    drawn = few[torch.randint(len(few), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < 0.2, drawn, values).to(dtype)


def full_terms(rows: int, cols: int, power: int = 1) -> ScoreTerms:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.rand(shape, generator=generator) for shape in ((rows,), (cols,), (cols,), (rows, cols))]
    return ScoreTerms(*draw, power=power)


def every_operation(rows: int, cols: int, dtype: torch.dtype) -> Results:
    """The results of all operations on one matrix."""
    weight = matrix(rows, cols, dtype)
    wanda = ScoreTerms(scale=full_terms(rows, cols).scale)
    ria = ScoreTerms(row=full_terms(rows, cols).row, col=full_terms(rows, cols).col, scale=wanda.scale)
    results: Results = {}
    for name, terms in {"wanda": wanda, "ria": ria, "full": full_terms(rows, cols, power=2)}.items():
        for m in GROUP_SIZES:
            if cols % m == 0:
                results[f"{name} {m} in"] = select_nm(weight, terms, m // 2, m, output="bits")
            if rows % m == 0:
                results[f"{name} {m} out"] = select_nm(weight, terms, m // 2, m, axis="out", output="mask")
        results[f"{name} rows"] = select_rows(weight, terms, cols // 3, output="mask")
        results[f"{name} layer"] = select_rows(weight, terms, rows * cols // 3, scope="layer", output="bits")
        if cols % 4 == 0:
            results[f"{name} pruned"] = select_nm(weight.clone(), terms, 2, 4).view(torch.uint8)
    for n, m in PACKED_PATTERNS:
        if cols % m == 0:
            packed = pack_scored(weight, wanda, n, m)
            results[f"unpacked {n}:{m}"] = unpack_nm(packed).view(torch.uint8)
            for count in (1, 5):
                tokens = matrix(count, cols, torch.float32, seed=3)
                results[f"{count} rows of outputs, {n}:{m}"] = nm_linear(tokens, packed)
    valid = torch.arange(rows) % 5 > 0
    sums = moments(weight, valid)
    results |= {"total": sums.total, "deviation": sums.deviation, "square": sums.sequence_square}
    results["row sums"], results["column sums"], _ = weight_sums(weight)
    square, factor = weight.double().square().sum(0), 1 + weight[0].float().abs()
    scaled = relative_importance(weight, ColumnScale(square, 3.0, factor=factor, sign=-1))
    results |= {f"importance: {part}": vector for part, vector in scaled.tensors.items()}
    for norm in get_args(VarianceNorm):
        results[f"variance {norm}"] = variance_factor(weight.float().square(), norm, 0.5, 0.01)
    results["losses"], results["gradient"] = divergence(weight, weight.flip(0))
    values, trained = weight.float(), weight.clone()
    kept = GradientMoments.like(values)
    for number in (1, 2):
        adamw(values, kept, weight.flip(0), Step(0.1, number), factor=torch.tensor(0.3), rounded=trained)
    results |= {
        "trained": values,
        "rounded": trained.view(torch.uint8),
        "means": kept.first,
        "squares' means": kept.second,
    }
    for bits, group in ((8, 128), (4, 32)):
        rounded = round_groups(values, bits, group, dtype, torch.empty_like(weight))
        results[f"rounded to {bits} bits"] = rounded.view(torch.uint8)
    results["norms"] = token_norms(weight)
    results["squares"] = weighted_squares(weight, torch.stack([valid.float(), torch.arange(rows).float()]))
    scores = weight.float().abs()[None]
    results["gains"] = join_gains(scores, scores.flip(2)[:, :, :37])
    few = scores[:, :, :300]  # The time of an assignment grows with the cube of its groups.
    results["assignment"] = assignment(join_gains(few, few.flip(2)))
    results["finite"] = torch.tensor(all_finite(weight))
    return results


def assert_same(got: Results, expected: Results, where: str) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), f"{name} differs on {where}"
