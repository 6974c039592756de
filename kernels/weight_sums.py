"""weight_sums: RIA's row and column sums of |W| in one read of the weight.

R_i = sum_j |W_ij|,   C_j = sum_i |W_ij|      (RIA, "Plug-and-Play", ICLR 2024)
"""

from __future__ import annotations

import torch

from . import cpu, launch
from .backend import choose_backend
from .triton_import import tl, triton


def weight_sums(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums [out_features] and column sums [in_features] of |weight|, fp32, deterministic.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    backend = choose_backend(weight)
    if backend == "cpu":
        return cpu.weight_sums(weight)
    if backend == "triton":
        with torch.cuda.device_of(weight):
            return _weight_sums_triton(weight.detach())
    return weight_sums_reference(weight)


def weight_sums_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, summed in fp64."""
    magnitude = weight.detach().double().abs()
    return magnitude.sum(1).float(), magnitude.sum(0).float()


def _weight_sums_triton(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, cols = weight.shape
    tile = launch.along_rows(weight)
    across, down = triton.cdiv(cols, tile.block_cols), triton.cdiv(rows, tile.block_rows * tile.trips)
    row_parts = torch.empty(across, rows, dtype=torch.float32, device=weight.device)
    col_parts = torch.empty(down, cols, dtype=torch.float32, device=weight.device)
    if weight.numel():
        _sum_magnitudes[(across * down,)](
            *(weight, row_parts, col_parts, rows, cols, weight.stride(0)),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            TRIPS=tile.trips,
            num_warps=1,
        )
    return row_parts.sum(0), col_parts.sum(0)


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
    TRIPS: tl.constexpr,
):
    """A program's share of TRIPS * BLOCK_ROWS rows and BLOCK_COLS columns."""
    across = tl.cdiv(cols, BLOCK_COLS)
    block = tl.program_id(0) % across
    part = tl.program_id(0) // across
    i = part * (TRIPS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    j = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    start = i.to(tl.int64) * stride
    step = tl.full([], BLOCK_ROWS, tl.int64) * stride
    col_sums = tl.zeros([1, BLOCK_COLS], tl.float32)
    for _ in tl.range(TRIPS):
        magnitude = tl.abs(tl.load(weight_ptr + start + j, mask=(i < rows) & (j < cols), other=0.0).to(tl.float32))
        row_sums = tl.sum(magnitude, 1, keep_dims=True)
        tl.store(row_parts_ptr + block.to(tl.int64) * rows + i, row_sums, mask=i < rows)
        col_sums += tl.sum(magnitude, 0, keep_dims=True)
        i += BLOCK_ROWS
        start += step
    tl.store(col_parts_ptr + part.to(tl.int64) * cols + j, col_sums, mask=j < cols)
