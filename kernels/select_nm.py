"""select_nm: scores the weight and keeps the n highest of every m, in one read and one write.

    rank_k = #{l in the group : s_l < s_k, or s_l = s_k and l < k};  kept if rank_k >= m - n

Among equal scores, the lower index is pruned first. Bytes per weight of e bytes: e read, e written in place (or 1 for a
mask, 1/8 for a bit mask). The vectors of the score are read once.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu, launch
from .errors import ArgumentError
from .group_choice import best_of_group
from .op import Op, Work, bytes_of, launch_metadata
from .pattern import GROUP_SIZES, Axis, check_pattern
from .registers import joined_bits, masked, unzip, zipped
from .score_terms import ScoreTerms, score, scores_reference
from .triton_import import tl, triton

__all__ = [
    "GROUP_SIZES",
    "Axis",
    "Output",
    "bytes_of_selection",
    "check_pattern",
    "check_selection",
    "columns",
    "finished_output",
    "flops_of_scores",
    "members",
    "output_like",
    "output_of_mask",
    "pack_bits",
    "select_nm",
    "select_nm_reference",
    "select_tiles",
    "store_bits",
    "with_unit_stride",
]

Output = Literal["weight", "mask", "bits"]


def select_nm(
    weight: torch.Tensor,
    terms: ScoreTerms,
    n: int,
    m: int,
    *,
    axis: Axis = "in",
    output: Output = "weight",
    unless: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the n weights with the highest score in every group of m.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        terms: the score's factors.
        n: how many weights of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides the size of the grouped axis.
        axis: "in" groups consecutive inputs of one row (sparse tensor cores need this); "out" groups consecutive
            outputs of one column.
        output: "weight" sets pruned weights to +0.0 in place and returns ``weight``. "mask" returns bool
            [out_features, in_features], True if kept. "bits" returns uint8 [out_features, ceil(in_features / 8)]; bit
            j % 8 of byte j // 8 is set if weight j of the row is kept. Only "weight" changes ``weight``.
        unless: int32 [1] on the weight's device, or None. If it is not 0 when the kernel runs, ``weight`` stays as it
            is. So a check of the terms needs no wait: a launch before this one writes its finding there.

    Raises:
        ArgumentError: if the pattern, a shape or a dtype is not supported (the message says what is), or, on the CPU,
            if a score term is negative or not finite.
    """
    check_selection(weight, terms, output)
    check_pattern(weight, n, m, axis)
    if unless is not None and output != "weight":
        raise ArgumentError(f"unless= is for output='weight', got output={output!r}")
    select = SELECT_NM.on(weight, *terms.tensors.values(), unless, writes=(weight,) if output == "weight" else ())
    return select(weight, terms, n, m, axis=axis, output=output, unless=unless)


def select_nm_reference(
    weight: torch.Tensor,
    terms: ScoreTerms,
    n: int,
    m: int,
    *,
    axis: Axis = "in",
    output: Output = "weight",
    unless: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same selection in plain torch, by a stable sort of every group."""
    if unless is not None and bool(unless):
        return weight
    terms.check_range()
    scores = scores_reference(weight, terms)
    grouped = scores if axis == "in" else scores.t()
    groups = grouped.reshape(grouped.shape[0], grouped.shape[1] // m, m)
    pruned_first = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(-1, pruned_first[..., : m - n], False)
    keep = keep.reshape(grouped.shape)
    return output_of_mask(weight, keep if axis == "in" else keep.t(), output)


def output_of_mask(weight: torch.Tensor, keep: torch.Tensor, output: Output) -> torch.Tensor:
    """The requested output for a bool mask [out_features, in_features]; "weight" prunes ``weight`` in place."""
    if output == "mask":
        return keep.contiguous()
    if output == "bits":
        return pack_bits(keep)
    with torch.no_grad():
        weight.masked_fill_(~keep, 0.0)
    return weight


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """Pack bool [rows, cols] to uint8 [rows, ceil(cols / 8)], lowest bit first; unused bits are 0."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    place = (2 ** torch.arange(8, device=keep.device)).to(torch.uint8)
    return (padded.reshape(keep.shape[0], padded.shape[1] // 8, 8) * place).sum(-1, dtype=torch.uint8)


def check_selection(weight: torch.Tensor, terms: ScoreTerms, output: Output) -> None:
    """Raise ArgumentError if the terms, the weight's dtype or the output are not supported."""
    terms.check_shape(weight)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ArgumentError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if output not in ("weight", "mask", "bits"):
        raise ArgumentError(f"output must be 'weight', 'mask' or 'bits', got {output!r}")


def _select_nm_cpu(
    weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, axis: Axis, output: Output, unless: torch.Tensor | None
) -> torch.Tensor:
    if unless is not None and bool(unless):
        return weight
    return cpu.select_nm(weight, terms, n, m, axis, output)


def _select_nm_triton(
    weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, axis: Axis, output: Output, unless: torch.Tensor | None
) -> torch.Tensor:
    source = with_unit_stride(weight)
    out = output_like(source, output)
    if source.numel():
        tile = launch.select_nm(source, m, axis)
        _select_nm_body[(tile.programs(source, m, axis),)](
            source,
            out,
            *(terms.row, terms.col, terms.scale, terms.coupling, unless),
            *(*source.shape, source.stride(0), out.stride(0)),
            N=n,
            M=m,
            SPLIT=tile.split,
            AXIS=axis,
            OUTPUT=output,
            POWER=terms.power,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            TRIPS=tile.trips,
            num_warps=tile.num_warps,
        )
    return finished_output(weight, out, output)


def with_unit_stride(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` itself if consecutive inputs are adjacent in memory, else a contiguous copy."""
    weight = weight.detach()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def output_like(source: torch.Tensor, output: Output) -> torch.Tensor:
    """The tensor that a Triton kernel writes to: the weight itself, or a new uint8 tensor for a mask or bits."""
    if output == "weight":
        return source
    rows, cols = source.shape
    return torch.empty(rows, cols if output == "mask" else -(-cols // 8), dtype=torch.uint8, device=source.device)


def finished_output(weight: torch.Tensor, out: torch.Tensor, output: Output) -> torch.Tensor:
    """The requested output from the tensor ``out`` that a Triton kernel wrote."""
    if output == "mask":
        return out.view(torch.bool)
    if output == "bits":
        return out
    if out.data_ptr() != weight.data_ptr():
        with torch.no_grad():
            weight.copy_(out)
    return weight


def bytes_of_selection(weight: torch.Tensor, terms: ScoreTerms, output: Output) -> int:
    """Bytes of the weight, of the terms and of the requested output."""
    rows, cols = weight.shape
    written = {"weight": weight.nbytes, "mask": rows * cols, "bits": rows * -(-cols // 8)}[output]
    return bytes_of(weight, *terms.tensors.values()) + written


def flops_of_scores(weight: torch.Tensor, terms: ScoreTerms) -> int:
    """One operation per weight for the power, for each factor, and for the sum of row and column."""
    return weight.numel() * (terms.power - 1 + len(terms.tensors))


def _work(
    weight: torch.Tensor,
    terms: ScoreTerms,
    n: int,
    m: int,
    *,
    axis: Axis,
    output: Output,
    unless: torch.Tensor | None = None,
) -> Work:
    return Work(bytes_of_selection(weight, terms, output), flops_of_scores(weight, terms))


SELECT_NM = Op("select_nm", _work, select_nm_reference, _select_nm_cpu, _select_nm_triton)


@triton.jit(launch_metadata=launch_metadata)
def _select_nm_body(
    weight_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    unless_ptr,
    rows,
    cols,
    stride,
    out_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    AXIS: tl.constexpr,
    OUTPUT: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TRIPS: tl.constexpr,
):
    stored = rows if unless_ptr is None else tl.where(tl.load(unless_ptr) == 0, rows, 0)
    select_tiles(
        *(tl.program_id(0), weight_ptr, out_ptr, row_ptr, col_ptr, scale_ptr, coupling_ptr),
        *(rows, cols, stride, out_stride, stored, TRIPS),
        *(N, M, SPLIT, AXIS, OUTPUT, POWER, BLOCK_ROWS, BLOCK_COLS),
    )


@triton.jit
def select_tiles(
    program,
    weight_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    rows,
    cols,
    stride,
    out_stride,
    stored,
    trips,
    N: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    AXIS: tl.constexpr,
    OUTPUT: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program processes ``trips`` tiles of whole groups, one below the other; it writes the first ``stored`` rows.

    A group consists of M // SPLIT accesses of SPLIT neighbors. Along "in", the accesses are consecutive in a row. Along
    "out", they are in M consecutive rows.
    """
    ACCESSES: tl.constexpr = M // SPLIT
    DOWN: tl.constexpr = 1 if AXIS == "in" else M
    width = cols // ACCESSES if AXIS == "in" else cols
    blocks_across = tl.cdiv(width, BLOCK_COLS)
    block = program % blocks_across
    top = program // blocks_across * (trips * BLOCK_ROWS)

    col_terms = ()
    scale_terms = ()
    for access in tl.static_range(ACCESSES):
        j = columns(block, access, SPLIT, M, AXIS, BLOCK_COLS)
        col_terms = col_terms + members(col_ptr, j, j < cols, SPLIT)
        scale_terms = scale_terms + members(scale_ptr, j, j < cols, SPLIT)

    row = (top + tl.arange(0, BLOCK_ROWS))[:, None] * DOWN
    start = row.to(tl.int64) * stride
    coupling_start = row.to(tl.int64) * cols
    out_start = start if OUTPUT == "weight" else row.to(tl.int64) * out_stride
    step = tl.full([], BLOCK_ROWS * DOWN, tl.int64)
    for _ in tl.range(trips):
        weights = ()
        keys = ()
        for access in tl.static_range(ACCESSES):
            down = access if AXIS == "out" else 0
            j = columns(block, access, SPLIT, M, AXIS, BLOCK_COLS)
            inside = (row < rows - down) & (j < cols)
            piece = members(weight_ptr, start + down * stride + j, inside, SPLIT)
            factors = members(coupling_ptr, coupling_start + down * cols + j, inside, SPLIT)
            row_term = None if row_ptr is None else tl.load(row_ptr + row + down, mask=row < rows - down, other=0.0)
            for k in tl.static_range(SPLIT):
                value = score(
                    piece[k].to(tl.float32),
                    row_term,
                    None if col_ptr is None else col_terms[access * SPLIT + k],
                    None if scale_ptr is None else scale_terms[access * SPLIT + k],
                    None if coupling_ptr is None else factors[k],
                    POWER,
                )
                keys = keys + (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
            weights = weights + piece
        kept = best_of_group(keys, N)
        if OUTPUT == "bits":
            store_bits(out_ptr, out_start, kept, block, row < rows, cols, out_stride, AXIS, BLOCK_COLS)
        else:
            for access in tl.static_range(ACCESSES):
                down = access if AXIS == "out" else 0
                j = columns(block, access, SPLIT, M, AXIS, BLOCK_COLS)
                piece = ()
                for k in tl.static_range(SPLIT):
                    keep = kept[access * SPLIT + k]
                    if OUTPUT == "weight":
                        piece = piece + (masked(weights[access * SPLIT + k], keep),)
                    else:
                        piece = piece + ((keep & 1).to(tl.int8),)
                inside = (row < stored - down) & (j < cols)
                tl.store(out_ptr + out_start + down * out_stride + j, zipped(piece), mask=inside)
        row += BLOCK_ROWS * DOWN
        start += step * stride
        coupling_start += step * cols
        out_start += step * out_stride


@triton.jit
def columns(block, access, SPLIT: tl.constexpr, M: tl.constexpr, AXIS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Columns [1, BLOCK_COLS] of one access."""
    lane = tl.arange(0, BLOCK_COLS)
    if AXIS == "in" and SPLIT < M:
        j = block * (BLOCK_COLS // SPLIT * M) + lane // SPLIT * M + access * SPLIT + lane % SPLIT
    else:
        j = block * BLOCK_COLS + lane
    return j[None, :]


@triton.jit
def members(pointer, offset, inside, SPLIT: tl.constexpr):
    """Load the elements at ``offset``, split into the members of their groups; () if there is no pointer."""
    if pointer is None:
        members = ()
    else:
        members = unzip(tl.load(pointer + offset, mask=inside, other=0.0), SPLIT)
    return members


@triton.jit
def store_bits(out_ptr, start, kept, block, valid_rows, cols, out_stride, AXIS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Write one bit per column; a byte holds eight neighboring columns, also if they belong to several groups."""
    if AXIS == "out":
        byte = block * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)[None, :]
        valid = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :] < cols
        for k in tl.static_range(len(kept)):
            packed = joined_bits(unzip(tl.where(valid, kept[k] & 1, 0), 8), 1)
            inside = valid_rows & (byte < out_stride)
            tl.store(out_ptr + start + k * out_stride + byte, packed.to(tl.uint8), mask=inside)
    else:
        group = block * kept[0].shape[1] + tl.arange(0, kept[0].shape[1])[None, :]
        valid = group * len(kept) < cols
        if len(kept) < 8:
            packed = joined_bits(unzip(tl.where(valid, joined_bits(kept, 1), 0), 8 // len(kept)), len(kept))
            byte = block * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)[None, :]
            tl.store(out_ptr + start + byte, packed.to(tl.uint8), mask=valid_rows & (byte < out_stride))
        else:
            for b in tl.static_range(len(kept) // 8):
                packed = joined_bits(kept[8 * b : 8 * b + 8], 1)
                byte = group * (len(kept) // 8) + b
                tl.store(out_ptr + start + byte, packed.to(tl.uint8), mask=valid_rows & valid)
