"""Cases of the machine-code report for launches that take all layers of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ace_triton.kernels.column_scale import ColumnScale
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.variance_factor import VarianceNorm
from ace_triton.kernels.vector_group import VectorGroup, grouped_column_scale, grouped_variance_factor
from ace_triton.kernels.weight_sums_group import group_relative_importance

from .kernel_cases import DTYPES, TERMS, Case, terms

BLOCK = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
"""Shapes of the weights of a Llama block."""

SEQUENCES = 128


def block_cases() -> Iterator[Case]:
    """Sums and merge, check, selection by RIA's terms, and ACE's vectors."""
    for dtype in DTYPES:
        yield from weight_cases(dtype)
    channels = sum(cols for _, cols in BLOCK)
    call = lambda: vectors_of_layers([(SEQUENCES, cols) for _, cols in BLOCK], "frobenius")  # noqa: E731
    for launch, part in enumerate(("levels", "means")):
        name = f"variance_factor, {part}, a block"
        yield Case(name, torch.float32, call, SEQUENCES * channels, 4, 0, launch)
    yield Case("column_scale, a block", torch.float32, call, channels, 8, 0, launch=2)


def weight_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The launches that read weights of one dtype, and the merge of their sums."""
    size, elements = dtype.itemsize, sum(rows * cols for rows, cols in BLOCK)

    def weights() -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape in BLOCK]

    def select() -> object:
        every = [terms(*shape, TERMS["RIA"]) for shape in BLOCK]
        return select_nm_group(weights(), every, 2, 4, unless=[torch.empty(1, dtype=torch.int32)])

    sums = lambda: group_relative_importance(weights())  # noqa: E731
    yield Case("select_nm 2:4 RIA, a block", dtype, select, elements, size, 2 * size)
    yield Case("weight_sums, a block", dtype, sums, elements, size, size)
    yield Case("weight_sums, merge, a block", dtype, sums, sum(map(sum, BLOCK)), 4, 0, launch=1)
    yield Case("all_finite, a block", dtype, lambda: find_each_not_finite(weights()), elements, size, size)


def vectors_of_layers(shapes: Iterable[tuple[int, int]], norm: VarianceNorm) -> object:
    """A variance factor and ACE's column scale for each layer, of so many sequences and channels."""
    with VectorGroup():
        factors = [grouped_variance_factor(torch.empty(shape), norm, 1.0, 0.01) for shape in shapes]
        squares = [torch.empty(len(factor), dtype=torch.float64) for factor in factors]
        scales = [ColumnScale(s, 2.0, factor=f, sign=-1) for s, f in zip(squares, factors, strict=True)]
        return [grouped_column_scale(scale) for scale in scales]
