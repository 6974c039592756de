"""weight_sums: RIA's row and column sums of |W|, or their inverses, in one read of the weight.

R_i = sum_j |W_ij|,   C_j = sum_i |W_ij|      (RIA, "Plug-and-Play", ICLR 2024)

Two launches: sums of a few hundred rows and columns each, and their merge. Bytes per weight of e bytes: e read, and
the partial sums, 1 % of them at the size of a layer.
"""

from __future__ import annotations

import torch

from . import cpu, launch
from .backend import choose_backend
from .triton_import import tl, triton

# Tile of the merge of partial sums: a few dozen loads in flight for a warp.
MERGED_PARTS, MERGED_SUMS = 16, 32

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def weight_sums(weight: torch.Tensor, *, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums [out_features] and column sums [in_features] of |weight|, fp32, deterministic.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        inverse: 1 / R and 1 / C instead. That of a sum of 0 is large, but finite: its weights are 0 too. That of a
            sum which is not finite is NaN, so that NaN and infinity in a weight are seen in both vectors.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    backend = choose_backend(weight)
    if backend == "cpu":
        return cpu.weight_sums(weight, inverse)
    if backend == "triton":
        with torch.cuda.device_of(weight):
            return _weight_sums_triton(weight.detach(), inverse)
    return weight_sums_reference(weight, inverse=inverse)


def weight_sums_reference(weight: torch.Tensor, *, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, summed in fp64."""
    magnitude = weight.detach().double().abs()
    rows, cols = magnitude.sum(1).float(), magnitude.sum(0).float()
    return (_inverse(rows), _inverse(cols)) if inverse else (rows, cols)


def _inverse(sums: torch.Tensor) -> torch.Tensor:
    return torch.where(sums.isfinite(), sums.clamp(min=SMALLEST_NORMAL).reciprocal(), torch.nan)


def _weight_sums_triton(weight: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, cols = weight.shape
    tile = launch.weight_sums(weight)
    across = triton.cdiv(cols, tile.pieces * tile.block_cols)
    down = triton.cdiv(rows, tile.block_rows * tile.trips)
    row_parts = torch.empty(across, rows, dtype=torch.float32, device=weight.device)
    col_parts = torch.empty(down, cols, dtype=torch.float32, device=weight.device)
    if weight.numel():
        _sum_magnitudes[(across * down,)](
            *(weight, row_parts, col_parts, rows, cols, weight.stride(0)),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            PIECES=tile.pieces,
            TRIPS=tile.trips,
            num_warps=tile.num_warps,
        )
    row_sums, col_sums = (torch.empty(n, dtype=torch.float32, device=weight.device) for n in (rows, cols))
    if rows + cols:
        col_blocks = triton.cdiv(cols, MERGED_SUMS)
        _merge_parts[(col_blocks + triton.cdiv(rows, MERGED_SUMS),)](
            *(row_parts, col_parts, row_sums, col_sums, across, down, rows, cols, col_blocks),
            INVERSE=inverse,
            SMALLEST=SMALLEST_NORMAL,
            BLOCK_PARTS=MERGED_PARTS,
            BLOCK_SUMS=MERGED_SUMS,
            num_warps=1,
        )
    return row_sums, col_sums


@triton.jit
def _sum_magnitudes(
    weight_ptr,
    row_parts_ptr,
    col_parts_ptr,
    rows,
    cols,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    TRIPS: tl.constexpr,
):
    """A program's share of TRIPS * BLOCK_ROWS rows and PIECES * BLOCK_COLS columns.

    A piece is as wide as one access of a warp: every warp sums rows of its own, and they meet once, at the end.
    """
    across = tl.cdiv(cols, PIECES * BLOCK_COLS)
    block = tl.program_id(0) % across
    part = tl.program_id(0) // across
    i = part * (TRIPS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    j = block * (PIECES * BLOCK_COLS) + tl.arange(0, BLOCK_COLS)[None, :]
    start = i.to(tl.int64) * stride
    step = tl.full([], BLOCK_ROWS, tl.int64) * stride
    col_sums = ()
    for _ in tl.static_range(PIECES):
        col_sums = col_sums + (tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32),)
    for _ in tl.range(TRIPS):
        row_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        added = ()
        for k in tl.static_range(PIECES):
            inside = (i < rows) & (j < cols - k * BLOCK_COLS)
            weight = tl.load(weight_ptr + start + k * BLOCK_COLS + j, mask=inside, other=0.0).to(tl.float32)
            row_sums += tl.abs(weight)
            added = added + (col_sums[k] + tl.abs(weight),)
        col_sums = added
        place = row_parts_ptr + block.to(tl.int64) * rows + i
        tl.store(place, tl.sum(row_sums, 1, keep_dims=True), mask=i < rows)
        i += BLOCK_ROWS
        start += step
    for k in tl.static_range(PIECES):
        place = col_parts_ptr + part.to(tl.int64) * cols + k * BLOCK_COLS + j
        tl.store(place, tl.sum(col_sums[k], 0, keep_dims=True), mask=j < cols - k * BLOCK_COLS)


@triton.jit
def _merge_parts(
    row_parts_ptr,
    col_parts_ptr,
    row_sums_ptr,
    col_sums_ptr,
    across,
    down,
    rows,
    cols,
    col_blocks,
    INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """Column sums in the first ``col_blocks`` programs, row sums in the others."""
    block = tl.program_id(0)
    if block < col_blocks:
        _merge(col_parts_ptr, col_sums_ptr, block, down, cols, INVERSE, SMALLEST, BLOCK_PARTS, BLOCK_SUMS)
    else:
        _merge(
            row_parts_ptr, row_sums_ptr, block - col_blocks, across, rows, INVERSE, SMALLEST, BLOCK_PARTS, BLOCK_SUMS
        )


@triton.jit
def _merge(
    parts_ptr,
    sums_ptr,
    block,
    parts,
    size,
    INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    k = block * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)[None, :]
    sums = tl.zeros([1, BLOCK_SUMS], tl.float32)
    for first in tl.range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        inside = (part < parts) & (k < size)
        sums += tl.sum(tl.load(parts_ptr + part.to(tl.int64) * size + k, mask=inside, other=0.0), 0, keep_dims=True)
    if INVERSE:
        sums = tl.where(sums - sums == 0, 1.0 / tl.maximum(sums, SMALLEST), float("nan"))
    tl.store(sums_ptr + k, sums, mask=k < size)
