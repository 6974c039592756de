"""select_rows: scores the weight and keeps exactly k weights of every row, or of the whole layer.

    threshold = the k-th highest score; kept if above it, or equal to it, highest index first, until k are kept

Among equal scores, the lower index is pruned first, as in a stable ascending sort. Bytes per weight of e bytes: e read
and e written if a row fits on chip.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu, launch
from .bit_planes import highest, planes_of, valid_words
from .errors import ArgumentError
from .op import Op, Work, launch_metadata
from .registers import joined_bits, masked, unzip
from .score_terms import ScoreTerms, score, scores_reference
from .select_nm import (
    Output,
    bytes_of_selection,
    check_selection,
    finished_output,
    flops_of_scores,
    output_like,
    output_of_mask,
    with_unit_stride,
)
from .threshold_search import select_by_threshold
from .triton_import import tl, triton

Scope = Literal["row", "layer"]


def select_rows(
    weight: torch.Tensor,
    terms: ScoreTerms,
    k: int,
    *,
    scope: Scope = "row",
    output: Output = "weight",
) -> torch.Tensor:
    """Keep exactly the k weights with the highest score in every row, or in the whole layer.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        terms: the score's factors.
        k: how many weights are kept, per row (0 to in_features) or in the layer (0 to its size).
        scope: "row", or "layer" for one threshold over the whole weight, whose indices are row-major.
        output: as in :func:`~ace_triton.kernels.select_nm.select_nm`.

    Raises:
        ArgumentError: if the count, a shape or a dtype is not supported (the message says what is), or, on the CPU, if
            a score term is negative or not finite.
    """
    check_selection(weight, terms, output)
    if scope not in ("row", "layer"):
        raise ArgumentError(f"scope must be 'row' or 'layer', got {scope!r}")
    most = weight.shape[1] if scope == "row" else weight.numel()
    if not 0 <= k <= most:
        raise ArgumentError(
            f"k must be between 0 and {most} for scope {scope!r} and a weight of shape {tuple(weight.shape)}, got {k}"
        )
    select = SELECT_ROWS.on(weight, *terms.tensors.values(), writes=(weight,) if output == "weight" else ())
    return select(weight, terms, k, scope=scope, output=output)


def select_rows_reference(
    weight: torch.Tensor,
    terms: ScoreTerms,
    k: int,
    *,
    scope: Scope = "row",
    output: Output = "weight",
) -> torch.Tensor:
    """The same selection in plain torch, by a stable sort."""
    terms.check_range()
    scores = scores_reference(weight, terms)
    rows = scores if scope == "row" else scores.reshape(1, -1)
    pruned_first = rows.argsort(dim=-1, stable=True)
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep.scatter_(-1, pruned_first[:, : rows.shape[1] - k], False)
    return output_of_mask(weight, keep.reshape(weight.shape), output)


def _select_rows_triton(weight: torch.Tensor, terms: ScoreTerms, k: int, scope: Scope, output: Output) -> torch.Tensor:
    source = with_unit_stride(weight)
    out = output_like(source, output)
    rows, cols = source.shape
    tile = launch.select_rows(source)
    if k == 0 or not source.numel():
        out.zero_()
    elif scope == "row" and tile is not None:
        _select_row[(rows,)](
            source,
            out,
            *(terms.row, terms.col, terms.scale, terms.coupling),
            *(cols, source.stride(0), out.stride(0), k),
            VECTOR=tile.vector,
            LOG_THREADS=tile.log_threads,
            PARTS=tile.parts,
            OUTPUT=output,
            POWER=terms.power,
            num_warps=tile.num_warps,
        )
    else:
        select_by_threshold(source, out, terms, k, by_row=scope == "row", output=output)
    return finished_output(weight, out, output)


def _work(weight: torch.Tensor, terms: ScoreTerms, k: int, *, scope: Scope, output: Output) -> Work:
    return Work(bytes_of_selection(weight, terms, output), flops_of_scores(weight, terms))


SELECT_ROWS = Op("select_rows", _work, select_rows_reference, cpu.select_rows, _select_rows_triton)


@triton.jit(launch_metadata=launch_metadata)
def _select_row(
    weight_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    cols,
    stride,
    out_stride,
    k,
    VECTOR: tl.constexpr,
    LOG_THREADS: tl.constexpr,
    PARTS: tl.constexpr,
    OUTPUT: tl.constexpr,
    POWER: tl.constexpr,
):
    """A program scores its row and keeps only bit planes of the scores; it reads the row again to write the output."""
    THREADS: tl.constexpr = 1 << LOG_THREADS
    SHARE: tl.constexpr = 32 // VECTOR
    i = tl.program_id(0).to(tl.int64)
    row = None if row_ptr is None else tl.load(row_ptr + i)
    planes = ()
    valid = ()
    indices = ()
    for p in tl.static_range(len(PARTS)):
        j = _part_columns(p, PARTS, SHARE, THREADS * VECTOR)
        inside = j < cols
        weight = tl.load(weight_ptr + i * stride + j, mask=inside, other=0.0, eviction_policy="evict_last")
        value = score(
            weight.to(tl.float32),
            row,
            None if col_ptr is None else tl.load(col_ptr + j, mask=inside, other=0.0),
            None if scale_ptr is None else tl.load(scale_ptr + j, mask=inside, other=0.0),
            None if coupling_ptr is None else tl.load(coupling_ptr + i * cols + j, mask=inside, other=0.0),
            POWER,
        )
        keys = tl.reshape(value.to(tl.uint32, bitcast=True), [PARTS[p], SHARE, THREADS, VECTOR])
        planes = planes + (planes_of(tl.reshape(tl.permute(keys, (0, 2, 1, 3)), [PARTS[p] * THREADS, 32])),)
        index = p * PARTS[0] * THREADS + tl.arange(0, PARTS[p] * THREADS)[:, None]
        valid = valid + (valid_words(index, cols // VECTOR, VECTOR, LOG_THREADS),)
        indices = indices + (index,)
    words = highest(planes, valid, indices, k, VECTOR, LOG_THREADS)
    for p in tl.static_range(len(PARTS)):
        j = _part_columns(p, PARTS, SHARE, THREADS * VECTOR)
        bits = tl.reshape((words[p] >> tl.arange(0, 32)[None, :]) & 1, [PARTS[p], THREADS, SHARE, VECTOR])
        bit = tl.reshape(tl.permute(bits, (0, 2, 1, 3)), [PARTS[p] * SHARE, THREADS * VECTOR]).to(tl.int32)
        if OUTPUT == "weight":
            weight = tl.load(weight_ptr + i * stride + j, mask=j < cols, other=0.0, eviction_policy="evict_first")
            tl.store(out_ptr + i * out_stride + j, masked(weight, 0 - bit), mask=j < cols)
        elif OUTPUT == "mask":
            tl.store(out_ptr + i * out_stride + j, bit.to(tl.int8), mask=j < cols)
        else:
            byte = _part_columns(p, PARTS, SHARE, THREADS * VECTOR // 8)
            packed = joined_bits(unzip(bit, 8), 1).to(tl.uint8)
            tl.store(out_ptr + i * out_stride + byte, packed, mask=byte < out_stride)


@triton.jit
def _part_columns(PART: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [PARTS[PART] * SHARE, WIDTH] of a part; each row of this tile is one access of all threads."""
    access = PART * PARTS[0] * SHARE + tl.arange(0, PARTS[PART] * SHARE)
    return access[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
