"""nm_linear for weights of 8 or 4 bits on matrix units, for more tokens than share a read in nm_linear's own kernel.

    y_ti = sum_g absmax_ig / Q sum_(j in g) x_tj q_ij + b_i

A program expands the integers q of 32 inputs of its outputs, zeros included, and multiplies them by a tile of tokens.
The integers are exact in fp16 and bf16, so the products are exact too; they are summed in fp32 and then scaled, since a
group has a multiple of 32 inputs. If there are few outputs, the inputs are split among programs, and a second kernel
adds their sums in a fixed order.

Bytes per weight of b bits: b / 8 * n / m + 1/8 once per 32 tokens, and absmax.
"""

from __future__ import annotations

import torch

from . import launch_packed
from .backend import interpreting
from .linear_call import few_bits_constants, launched
from .op import launch_metadata
from .packed_dense import PackedDense
from .packed_nm import PackedNM
from .registers import kept_before
from .triton_import import tl, triton


def nm_linear_few_bits(tokens: torch.Tensor, packed: PackedNM | PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    """Outputs [n_tokens, out_features] of fp16 or bf16 tokens [n_tokens, in_features] with contiguous rows.

    Called by :func:`~ace_triton.kernels.nm_linear.nm_linear`, which has checked the arguments; no size is 0.
    """
    rows, cols = packed.shape
    tile = launch_packed.nm_linear_few_bits(packed.values, len(tokens), cols)
    constants = few_bits_constants(packed) | {
        "N": packed.n,
        "M": packed.m,
        "TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.block_rows,
        "WIDEN": interpreting(),
    }
    return launched(
        *(_few_bits_dot_body, tokens, (packed.values, packed.meta, packed.absmax), bias, rows),
        triton.cdiv(triton.cdiv(cols, 32), tile.splits),
        block_rows=tile.block_rows,
        block_tokens=tile.tokens,
        constants=constants,
        splits=tile.splits,
        num_warps=tile.num_warps,
    )


@triton.jit(launch_metadata=launch_metadata)
def _few_bits_dot_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    absmax_ptr,
    bias_ptr,
    sums_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    trips,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of rows and tokens, over one split of the inputs; a trip takes 32 inputs: one word of metadata, if there
    are metadata, of every row.

    WIDEN multiplies in fp32, for the interpreter: NumPy has no bf16.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    # Rows past the last one are clamped, so their loads need no mask; their results are not stored.
    i = tl.minimum(row, rows - 1).to(tl.int64)
    t = tl.minimum(tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), n_tokens - 1)[:, None].to(tl.int64)
    value_start = i * tl.cdiv(cols // M * N * BITS, 8)
    word_start = i * tl.cdiv(cols, 32)
    group_start = i * tl.cdiv(cols, GROUP)
    place = tl.arange(0, 32)[None, :]
    sums = tl.zeros([BLOCK_ROWS, TOKENS], tl.float32)
    begin = tl.program_id(2) * trips
    for word in tl.range(begin, tl.minimum(begin + trips, tl.cdiv(cols, 32))):
        j = word * 32 + place
        value, kept = j, j < cols
        if meta_ptr is not None:
            words = tl.load(meta_ptr + word_start + word)
            value = j // M * N + kept_before(words, j, M)
            # Damaged metadata could count past the values of a row.
            kept = kept & (words >> j % 32 & 1 != 0) & (value < cols // M * N)
        step = tl.load(values_ptr + value_start + value * BITS // 8, mask=kept, other=0).to(tl.int32)
        if BITS == 4:
            step = tl.where(kept, (step >> value % 2 * 4 & 15 ^ 8) - 8, 0)
        x = tl.load(tokens_ptr + t * stride + j, mask=j < cols, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        products = tl.dot(step.to(tl.float32).to(x.dtype), tl.trans(x), input_precision="ieee")
        largest = tl.load(absmax_ptr + group_start + word * 32 // GROUP).to(tl.float32)
        sums += products * (largest * (1.0 / LARGEST))
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    target = (tl.program_id(2) * n_tokens + token).to(tl.int64) * rows + row
    tl.store(sums_ptr + target, sums.to(sums_ptr.dtype.element_ty), mask=(row < rows) & (token < n_tokens))
