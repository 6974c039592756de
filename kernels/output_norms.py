"""output_norms: 1 / s_kt, s_kt = sum_i a_kti^2, for every token and every layer k of those that share an input.

One launch, which reads each output once. Each program also stores the sum of its norms over the tokens that are no
padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import launch_sums
from .op import launch_metadata
from .triton_import import tl, triton
from .weighted_squares import MOST_LAYERS


def output_norms(outputs: Sequence[torch.Tensor], flags: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse norms, fp32 [n_layers, n_tokens], and partial sums of the norms, fp32 [n_layers + 1, n_parts].

    Called by :func:`~ace_triton.kernels.token_statistics.token_statistics`, which has checked the arguments. An inverse
    is 0 for padding, and infinite for a norm of 0. The last row of the partial sums holds counts of valid tokens.

    Args:
        outputs: for 1 to MOST_LAYERS layers, [n_tokens, out_features] in one dtype.
        flags: uint8, n_tokens of them in one block of memory, 0 for padding; None to use all tokens.
    """
    n_tokens = len(outputs[0])
    outputs = tuple(output if output.stride(1) == 1 else output.contiguous() for output in outputs)
    widest = max(outputs, key=lambda output: output.shape[1])
    tile = launch_sums.along_rows_of(widest, len(outputs))
    blocks = triton.cdiv(n_tokens, tile.block_rows * tile.trips)
    inverses, parts = (
        torch.empty(size, dtype=torch.float32, device=widest.device)
        for size in ((len(outputs), n_tokens), (len(outputs) + 1, blocks))
    )
    absent = MOST_LAYERS - len(outputs)
    _sum_output_squares[(blocks, len(outputs))](
        *(*outputs, *[None] * absent, *[o.shape[1] for o in outputs], *[0] * absent),
        *(*[o.stride(0) for o in outputs], *[0] * absent, flags, inverses, parts, n_tokens, blocks, tile.trips),
        LAYERS=len(outputs),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        num_warps=1,
    )
    return inverses, parts


@triton.jit(do_not_specialize=["n_tokens", "blocks", "trips"], launch_metadata=launch_metadata)
def _sum_output_squares(
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    a4_ptr,
    a5_ptr,
    a6_ptr,
    a7_ptr,
    cols0,
    cols1,
    cols2,
    cols3,
    cols4,
    cols5,
    cols6,
    cols7,
    stride0,
    stride1,
    stride2,
    stride3,
    stride4,
    stride5,
    stride6,
    stride7,
    valid_ptr,
    inverses_ptr,
    parts_ptr,
    n_tokens,
    blocks,
    trips,
    LAYERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Squared norms of ``trips`` * BLOCK_ROWS tokens of one layer, and their sum over valid tokens."""
    layer = tl.program_id(1)
    pointers = (a1_ptr, a2_ptr, a3_ptr, a4_ptr, a5_ptr, a6_ptr, a7_ptr)
    widths = (cols1, cols2, cols3, cols4, cols5, cols6, cols7)
    strides = (stride1, stride2, stride3, stride4, stride5, stride6, stride7)
    line = a0_ptr
    cols = tl.cast(cols0, tl.int32)
    stride = tl.cast(stride0, tl.int64)
    for k in tl.static_range(LAYERS - 1):
        line = tl.where(layer == k + 1, pointers[k], line)
        cols = tl.where(layer == k + 1, widths[k], cols)
        stride = tl.where(layer == k + 1, strides[k], stride)
    block = tl.program_id(0)
    total = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    count = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for trip in tl.range(trips):
        t = (block * trips + trip) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for first in tl.range(0, cols, BLOCK_COLS):
            i = first + tl.arange(0, BLOCK_COLS)[None, :]
            a = tl.load(line + t * stride + i, mask=(t < n_tokens) & (i < cols), other=0.0).to(tl.float32)
            squares += a * a
        norm = tl.sum(squares, 1, keep_dims=True)
        used = t < n_tokens
        if valid_ptr is not None:
            used &= tl.load(valid_ptr + t, mask=used, other=0) != 0
        inverse = tl.where(used, 1.0 / norm, 0.0)
        tl.store(inverses_ptr + layer.to(tl.int64) * n_tokens + t, inverse, mask=t < n_tokens)
        total += tl.where(used, norm, 0.0)
        count += used.to(tl.float32)
    first = block + tl.zeros([1, 1], tl.int32)
    tl.store(parts_ptr + layer * blocks + first, tl.sum(total, 0, keep_dims=True))
    tl.store(parts_ptr + LAYERS * blocks + first, tl.sum(count, 0, keep_dims=True), mask=(layer == 0) & (first >= 0))
