"""Exact top-k for sets that one program cannot hold: a whole layer, or rows of more than 32768 weights.

    each pass counts the keys >= prefix + d * 2^shift for d = 1..7, which gives three bits of the threshold

Eleven passes read the weight and write a few counts each. A twelfth pass counts ties, and the last one writes the
output. torch sums the counts as integers, so every run gives the same result.
"""

from __future__ import annotations

import torch

from . import launch
from .op import launch_metadata
from .registers import joined_bits, masked, unzip
from .score_terms import ScoreTerms, score
from .triton_import import tl, triton

DIGIT_BITS = 3
KEY_BITS = 31


def select_by_threshold(
    weight: torch.Tensor, out: torch.Tensor, terms: ScoreTerms, k: int, *, by_row: bool, output: str
) -> None:
    """Select the k highest scores and write the result into ``out``.

    Args:
        weight: [out_features, in_features], last stride 1, not empty.
        out: the tensor to write; may be ``weight``.
        terms: the score's factors.
        k: how many weights to keep, at least 1.
        by_row: keep k weights of each row; otherwise k of the whole weight.
        output: format of ``out``: "weight", "mask" or "bits".
    """
    rows, cols = weight.shape
    block = launch.threshold_search(weight)
    blocks = triton.cdiv(cols, block)
    groups, parts = (rows, blocks) if by_row else (1, rows * blocks)
    counts = torch.empty(7, groups, parts, dtype=torch.int32, device=weight.device)
    scored = (weight, terms.row, terms.col, terms.scale, terms.coupling, rows, cols, weight.stride(0))
    constants = {"BY_ROW": by_row, "POWER": terms.power, "BLOCK": block, "num_warps": launch.WARPS}

    def count_above(base: torch.Tensor, shift: int, candidates: int) -> torch.Tensor:
        _count_above[(rows * blocks,)](*scored, base, counts, shift, CANDIDATES=candidates, **constants)
        return counts[:candidates].sum(2)

    threshold = torch.zeros(groups, dtype=torch.int32, device=weight.device)
    for top in range(KEY_BITS, 0, -DIGIT_BITS):
        shift = max(top - DIGIT_BITS, 0)
        at_least_k = count_above(threshold + ((1 << shift) - 1), shift, (1 << (top - shift)) - 1) >= k
        threshold += (at_least_k.sum(0) << shift).to(torch.int32)
    above = count_above(threshold - 1, 0, 2)[1]
    ties = counts[0] - counts[1]
    later = ties.flip(1).cumsum(1).flip(1) - ties
    spare = (k - above)[:, None] - later
    _write[(rows * blocks,)](*scored, threshold, spare, out, out.stride(0), OUTPUT=output, **constants)


@triton.jit
def _keys(weight_ptr, row_ptr, col_ptr, scale_ptr, coupling_ptr, i, j, cols, stride, POWER: tl.constexpr):
    """Weights and the bits of their scores (int32); -1 outside the row."""
    inside = j < cols
    weight = tl.load(weight_ptr + i * stride + j, mask=inside, other=0.0)
    value = score(
        weight.to(tl.float32),
        None if row_ptr is None else tl.load(row_ptr + i),
        None if col_ptr is None else tl.load(col_ptr + j, mask=inside, other=0.0),
        None if scale_ptr is None else tl.load(scale_ptr + j, mask=inside, other=0.0),
        None if coupling_ptr is None else tl.load(coupling_ptr + i * cols + j, mask=inside, other=0.0),
        POWER,
    )
    return weight, tl.where(inside, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit(do_not_specialize=["shift"], launch_metadata=launch_metadata)
def _count_above(
    weight_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    rows,
    cols,
    stride,
    base_ptr,
    counts_ptr,
    shift,
    CANDIDATES: tl.constexpr,
    BY_ROW: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the keys of one block of a row that are above each candidate: base, base + 2^shift and so on."""
    blocks = tl.cdiv(cols, BLOCK)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    _, keys = _keys(weight_ptr, row_ptr, col_ptr, scale_ptr, coupling_ptr, i, j, cols, stride, POWER)
    base = tl.load(base_ptr + i * BY_ROW)
    place = tl.program_id(0) + tl.zeros([1], tl.int64)
    for candidate in tl.static_range(CANDIDATES):
        tl.store(counts_ptr + place, tl.sum((keys > base + (candidate << shift)).to(tl.int32), 1))
        place += rows * blocks


@triton.jit(launch_metadata=launch_metadata)
def _write(
    weight_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    rows,
    cols,
    stride,
    threshold_ptr,
    spare_ptr,
    out_ptr,
    out_stride,
    OUTPUT: tl.constexpr,
    BY_ROW: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep the keys above the threshold, and the last ``spare`` keys of the block that are equal to it."""
    blocks = tl.cdiv(cols, BLOCK)
    block = tl.program_id(0) % blocks
    i = (tl.program_id(0) // blocks).to(tl.int64)
    j = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight, keys = _keys(weight_ptr, row_ptr, col_ptr, scale_ptr, coupling_ptr, i, j, cols, stride, POWER)
    threshold = tl.load(threshold_ptr + i * BY_ROW)
    tied = (keys == threshold).to(tl.int32)
    here_and_later = tl.sum(tied, 1, keep_dims=True) - tl.cumsum(tied, 1) + tied
    kept = (keys > threshold) | ((tied == 1) & (here_and_later <= tl.load(spare_ptr + tl.program_id(0))))
    if OUTPUT == "weight":
        tl.store(out_ptr + i * out_stride + j, masked(weight, 0 - kept.to(tl.int32)), mask=j < cols)
    elif OUTPUT == "mask":
        tl.store(out_ptr + i * out_stride + j, kept.to(tl.int8), mask=j < cols)
    else:
        byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        packed = joined_bits(unzip(kept.to(tl.int32), 8), 1).to(tl.uint8)
        tl.store(out_ptr + i * out_stride + byte, packed, mask=byte < out_stride)
