"""nm_linear for 2:4 weights on matrix units, for more tokens than share a read in nm_linear's own kernel.

A program expands a tile of the weight in registers and multiplies it by a tile of up to 32 tokens, summed in fp32. The
inputs of a tile may be summed in any order. The kernel uses the order in which the threads of a warp hold them, which
is also the order that NVIDIA's matrix units expect, so the expanded weight never goes through shared memory. If there
are few outputs, the inputs are split among programs, and a second kernel adds their sums in a fixed order.

Bytes per weight of e bytes: e / 2 + 1/8 once per 32 tokens, and 8 * splits / in_features per token.
"""

from __future__ import annotations

import torch

from . import launch_packed
from .backend import interpreting
from .linear_call import launched
from .op import launch_metadata
from .packed_nm import PackedNM
from .registers import bits_of, spread, unzip, zipped
from .triton_import import tl, triton


def nm_linear_dot(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    """Outputs [n_tokens, out_features] of tokens [n_tokens, in_features] in the weight's dtype with contiguous rows.

    Called by :func:`~ace_triton.kernels.nm_linear.nm_linear`, which has checked the arguments; no size is 0.
    """
    rows, cols = packed.shape
    tile = launch_packed.nm_linear_dot(packed.values, len(tokens))
    width = 32 * tile.words
    constants = {
        "TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.block_rows,
        "WORDS": tile.words,
        "VECTOR": tile.vector,
        "RUN": tile.run,
        "EVEN": cols % width == 0,
        "WARPS": tile.num_warps,
        "WIDEN": interpreting(),
    }
    return launched(
        *(_dot_body, tokens, (packed.values, packed.meta), bias, rows),
        triton.cdiv(triton.cdiv(cols, width), tile.splits),
        block_rows=tile.block_rows,
        block_tokens=tile.tokens,
        constants=constants,
        splits=tile.splits,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit(launch_metadata=launch_metadata)
def _dot_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    bias_ptr,
    sums_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    trips,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    WARPS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of rows and tokens, over one split of the inputs; in every trip a thread expands one word of metadata.

    WIDEN multiplies in fp32, for the interpreter: NumPy has no bf16.
    """
    WIDTH: tl.constexpr = 32 * WORDS
    # Indices past the last row or token are clamped, so loads need no mask; their results are not stored.
    i = tl.minimum(tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), rows - 1)[:, None].to(tl.int64)
    t = tl.minimum(tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), n_tokens - 1)[:, None].to(tl.int64)
    words_of_row = tl.cdiv(cols, 32)
    word = tl.arange(0, WORDS)[None, :]
    place = tl.arange(0, VECTOR * WORDS)[None, :]
    value = place // VECTOR * 16 + place % VECTOR
    # Column k of the tile belongs to word k // RUN % WORDS, and there to run k // RUN // WORDS of RUN inputs.
    k = tl.arange(0, WIDTH)[None, :]
    j = k // RUN % WORDS * 32 + k // (RUN * WORDS) * RUN + k % RUN
    sums = tl.zeros([BLOCK_ROWS, TOKENS], tl.float32)
    begin = tl.program_id(2) * trips * WIDTH
    for first in tl.range(begin, tl.minimum(begin + trips * WIDTH, cols), WIDTH):
        words = _loaded(meta_ptr + i * words_of_row, word, first // 32, words_of_row, EVEN)
        members = ()
        for access in tl.static_range(16 // VECTOR):
            at = value + access * VECTOR
            kept = unzip(_loaded(values_ptr + i * (cols // 2), at, first // 2, cols // 2, EVEN), VECTOR)
            for g in tl.static_range(VECTOR // 2):
                bits = bits_of(kept[2 * g]), bits_of(kept[2 * g + 1])
                members = members + spread(bits[0], bits[1], words, (access * VECTOR + 2 * g) * 2)
        # [row, word, input of the word], in thread order: rows are split into two per thread, warps, eight per warp.
        tile = tl.reshape(zipped(members), [BLOCK_ROWS // (16 * WARPS), 2, WARPS, 8, WORDS, 32 // RUN, RUN])
        tile = tl.reshape(tl.permute(tile, (0, 2, 1, 3, 5, 4, 6)), [BLOCK_ROWS, WIDTH])
        weight = tile.to(values_ptr.dtype.element_ty, bitcast=True)
        x = _loaded(tokens_ptr + t * stride, j, first, cols, EVEN)
        if WIDEN:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    of_tile = tl.arange(0, BLOCK_ROWS)
    of_block = of_tile // 8 % 2 * (8 * WARPS) + of_tile // 16 % WARPS * 8 + of_tile % 8
    row = (tl.program_id(0) * BLOCK_ROWS + of_tile // (16 * WARPS) * (16 * WARPS) + of_block)[:, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    target = (tl.program_id(2) * n_tokens + token).to(tl.int64) * rows + row
    tl.store(sums_ptr + target, sums.to(sums_ptr.dtype.element_ty), mask=(row < rows) & (token < n_tokens))


@triton.jit
def _loaded(line, place, first, size, EVEN: tl.constexpr):
    """Elements ``place + first`` of each line; 0 from index ``size`` on. EVEN: no index reaches ``size``."""
    if EVEN:
        found = tl.load(line + place + first)
    else:
        found = tl.load(line + place + first, mask=place + first < size, other=0)
    return found
