"""moments: the token statistics that activation-aware metrics need, in one read of the tokens.

    per sequence s:  sum_t x_tj^2;   over all tokens:  count, sum_t x_tj, sum_t (x_tj - mean_j)^2

Deviations are computed relative to a token of the same chunk and merged by Chan's rule, so a large mean causes no
cancellation. Bytes per token element of e bytes: e read; a few fp32 vectors are written per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu, launch_sums
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

# Tile for merging partial sums: a few dozen loads in flight per warp.
MERGED_PARTS, MERGED_COLS = 16, 32


@dataclass(frozen=True)
class Moments:
    """Channel sums of one batch of tokens.

    Attributes:
        count: number of tokens counted.
        total: fp64 [in_features], sum of x. In fp32, a large mean would round away what merging batches needs.
        deviation: fp64 [in_features], sum of squared deviations from the batch's own mean.
        sequence_square: fp32 [n_sequences, in_features], sum of x^2 over each sequence's tokens.
        sequence_count: int64 [n_sequences], tokens counted in each sequence.
    """

    count: int
    total: torch.Tensor
    deviation: torch.Tensor
    sequence_square: torch.Tensor
    sequence_count: torch.Tensor


def moments(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> Moments:
    """Channel moments of a batch.

    Args:
        tokens: [n_sequences, length, in_features], or [n_tokens, in_features] as one sequence; fp32,
            fp16 or bf16.
        valid: bool [n_sequences, length] (or [n_tokens]), False for tokens to ignore (padding), even if they contain
            NaN. The host reads how many are valid, so a GPU call synchronizes and cannot be captured in a CUDA graph.
            None to use all tokens.

    Raises:
        ArgumentError: if a shape or the dtype of ``valid`` does not fit.
    """
    tokens, valid = as_sequences(tokens, valid)
    return MOMENTS.on(tokens, valid)(tokens, valid)


def moments_reference(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> Moments:
    """The moments, computed with plain torch in fp64."""
    tokens, valid = as_sequences(tokens, valid)
    x = tokens.detach().double()
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    kept = valid[..., None]
    x = torch.where(kept, x, 0.0)
    sequence_count = valid.sum(1)
    count = int(sequence_count.sum())
    total = x.sum((0, 1))
    deviation = torch.where(kept, x - total / max(count, 1), 0.0).square().sum((0, 1))
    return Moments(count, total, deviation, x.square().sum(1).float(), sequence_count)


def as_sequences(tokens: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens as [n_sequences, length, in_features] and ``valid`` as bool [n_sequences, length] or None."""
    if tokens.dim() == 2:
        tokens = tokens[None]
        valid = None if valid is None else valid.reshape(1, -1)
    if tokens.dim() != 3:
        raise ArgumentError(
            "tokens must be [n_tokens, in_features] or [n_sequences, length, in_features], "
            f"got shape {tuple(tokens.shape)}"
        )
    if valid is not None and (valid.shape != tokens.shape[:2] or valid.dtype != torch.bool):
        raise ArgumentError(
            f"valid must be bool of shape {tuple(tokens.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
        )
    return tokens, valid


def _moments_cpu(tokens: torch.Tensor, valid: torch.Tensor | None) -> Moments:
    return Moments(*cpu.moments(tokens, valid))


def _moments_triton(tokens: torch.Tensor, valid: torch.Tensor | None) -> Moments:
    if not tokens.numel():
        return moments_reference(tokens, valid)
    tokens = tokens.detach()
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    sequences, length, cols = tokens.shape
    if valid is None:
        sequence_count = torch.full((sequences,), length, dtype=torch.int64, device=tokens.device)
        count = sequences * length
    else:
        valid = valid.contiguous()
        sequence_count = valid.sum(1)
        count = int(sequence_count.sum())
    tile = launch_sums.moments(tokens)
    across, chunks = triton.cdiv(cols, tile.block_cols), triton.cdiv(length, tile.chunk)
    parts = chunks * triton.cdiv(sequences, tile.sequences)
    squares = torch.empty(chunks, sequences, cols, dtype=torch.float32, device=tokens.device)
    counts = torch.empty(parts, dtype=torch.int32, device=tokens.device)
    shifts, means, deviations = torch.empty(3, parts, cols, dtype=torch.float32, device=tokens.device)
    _sum_moments[(across * parts,)](
        *(tokens, None if valid is None else valid.view(torch.uint8), squares, counts, shifts, means, deviations),
        *(sequences, length, cols, tokens.stride(0), tokens.stride(1), chunks, tile.trips),
        SEQUENCES=tile.sequences,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        PIECES=tile.pieces,
        num_warps=tile.num_warps,
    )
    total, deviation = torch.empty(2, cols, dtype=torch.float64, device=tokens.device)
    sequence_square = squares[0] if chunks == 1 else torch.empty_like(squares[0])
    merged_across = triton.cdiv(cols, MERGED_COLS)
    _merge_parts[(merged_across * (1 if chunks == 1 else 1 + sequences),)](
        *(counts, shifts, means, deviations, total, deviation, squares, sequence_square),
        *(count, parts, chunks, sequences, cols),
        BLOCK_PARTS=MERGED_PARTS,
        BLOCK_COLS=MERGED_COLS,
        num_warps=1,
    )
    return Moments(count, total, deviation, sequence_square, sequence_count)


def _work(tokens: torch.Tensor, valid: torch.Tensor | None) -> Work:
    sequences, _, cols = tokens.shape
    return Work(bytes_of(tokens, valid) + (4 * sequences + 16) * cols + 8 * sequences, 6 * tokens.numel())


MOMENTS = Op("moments", _work, moments_reference, _moments_cpu, _moments_triton)


# Sizes that vary between batches and experts must not cause recompilation.
@triton.jit(do_not_specialize=["sequences", "length", "chunks", "trips"], launch_metadata=launch_metadata)
def _sum_moments(
    tokens_ptr,
    valid_ptr,
    squares_ptr,
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    sequences,
    length,
    cols,
    sequence_stride,
    token_stride,
    chunks,
    trips,
    SEQUENCES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Sums of one part: a chunk of ``trips`` * PIECES * BLOCK_ROWS tokens in each of SEQUENCES neighboring sequences.

    A tile is as wide as one access of a warp, so every warp sums its own tokens, and warps are combined once per
    sequence. The shift and the mean relative to it are stored separately, because their fp32 sum would lose precision.
    """
    STEP: tl.constexpr = PIECES * BLOCK_ROWS
    chunk_tokens = trips * STEP
    across = tl.cdiv(cols, BLOCK_COLS)
    block = tl.program_id(0) % across
    part = (tl.program_id(0) // across).to(tl.int64)
    chunk = part % chunks
    first_sequence = part // chunks * SEQUENCES
    first_token = chunk * chunk_tokens
    j = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]

    origin = first_valid(
        *(valid_ptr, first_sequence, first_token, sequences, length, chunk_tokens), SEQUENCES, 128 * BLOCK_ROWS
    )
    start = (first_sequence + origin // chunk_tokens) * sequence_stride
    start += (first_token + origin % chunk_tokens) * token_stride
    there = tl.where(origin < SEQUENCES * chunk_tokens, cols, 0)
    shift = tl.load(tokens_ptr + start + j, mask=j < there, other=0.0).to(tl.float32)

    counts = tl.zeros([BLOCK_ROWS, 1], tl.int32)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    deviations = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for s in tl.range(SEQUENCES):
        sequence = first_sequence + s
        inside = tl.where(sequence < sequences, length, 0)
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for trip in tl.range(trips):
            for k in tl.static_range(PIECES):
                t = first_token + trip * STEP + k * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
                used = t < inside
                if valid_ptr is not None:
                    used &= tl.load(valid_ptr + sequence * length + t, mask=used, other=0) != 0
                offset = sequence * sequence_stride + t * token_stride + j
                x = tl.load(tokens_ptr + offset, mask=used & (j < cols), other=0.0).to(tl.float32)
                off = tl.where(used, x - shift, 0.0)
                counts += used.to(tl.int32)
                totals += off
                deviations += off * off
                squares += x * x
        line = (chunk * sequences + sequence) * cols
        square = tl.sum(squares, 0, keep_dims=True)
        tl.store(squares_ptr + line + j, square, mask=j < tl.where(sequence < sequences, cols, 0))

    count = tl.sum(counts, 0, keep_dims=True)
    total = tl.sum(totals, 0, keep_dims=True)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    first = block + tl.zeros([1, 1], tl.int32)
    tl.store(counts_ptr + part + first, count, mask=first == 0)
    tl.store(shifts_ptr + part * cols + j, shift, mask=j < cols)
    tl.store(means_ptr + part * cols + j, mean, mask=j < cols)
    tl.store(deviations_ptr + part * cols + j, tl.sum(deviations, 0, keep_dims=True) - total * mean, mask=j < cols)


@triton.jit(do_not_specialize=["count", "parts", "chunks", "sequences"], launch_metadata=launch_metadata)
def _merge_parts(
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    total_ptr,
    deviation_ptr,
    squares_ptr,
    sequence_square_ptr,
    count,
    parts,
    chunks,
    sequences,
    cols,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The first programs merge all parts for BLOCK_COLS channels each; later ones merge the chunks of one sequence."""
    across = tl.cdiv(cols, BLOCK_COLS)
    j = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    if tl.program_id(0) >= across:
        sequence = tl.program_id(0) // across - 1
        merge_squares(squares_ptr, sequence_square_ptr, sequence, j, chunks, sequences, cols, BLOCK_PARTS)
    else:
        _merge_moments(
            *(counts_ptr, shifts_ptr, means_ptr, deviations_ptr, total_ptr, deviation_ptr, j, count, parts, cols),
            BLOCK_PARTS,
        )


@triton.jit
def merge_squares(squares_ptr, sequence_square_ptr, sequence, j, chunks, sequences, cols, BLOCK_PARTS: tl.constexpr):
    """Sums of squares of one sequence over all its chunks, for the channels j."""
    place = sequence.to(tl.int64) * cols + j
    step = tl.cast(sequences, tl.int64) * cols
    square = tl.zeros(j.shape, tl.float32)
    for first in tl.range(0, chunks, BLOCK_PARTS):
        chunk = first + tl.arange(0, BLOCK_PARTS)[:, None]
        inside = (chunk < chunks) & (j < cols)
        square += tl.sum(tl.load(squares_ptr + chunk * step + place, mask=inside, other=0.0), 0, keep_dims=True)
    tl.store(sequence_square_ptr + place, square, mask=j < cols)


@triton.jit
def _merge_moments(
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    total_ptr,
    deviation_ptr,
    j,
    count,
    parts,
    cols,
    BLOCK_PARTS: tl.constexpr,
):
    """Total and deviation of the channels j over all parts, in fp64: the mean first, then the deviations from it."""
    total = tl.zeros(j.shape, tl.float64)
    for first in tl.range(0, parts, BLOCK_PARTS):
        counted, mean = part_means(counts_ptr, shifts_ptr, means_ptr, first, j, parts, cols, BLOCK_PARTS)
        total += tl.sum(mean * counted, 0, keep_dims=True)
    middle = total / tl.cast(tl.maximum(count, 1), tl.float64)
    deviation = tl.zeros(j.shape, tl.float64)
    for first in tl.range(0, parts, BLOCK_PARTS):
        counted, mean = part_means(counts_ptr, shifts_ptr, means_ptr, first, j, parts, cols, BLOCK_PARTS)
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        own = tl.load(deviations_ptr + part.to(tl.int64) * cols + j, mask=(part < parts) & (j < cols), other=0.0)
        apart = mean - middle
        deviation += tl.sum(own.to(tl.float64) + apart * apart * counted, 0, keep_dims=True)
    tl.store(total_ptr + j, total, mask=j < cols)
    tl.store(deviation_ptr + j, deviation, mask=j < cols)


@triton.jit
def part_means(counts_ptr, shifts_ptr, means_ptr, first, j, parts, cols, BLOCK_PARTS: tl.constexpr):
    """Token counts [BLOCK_PARTS, 1] and means [BLOCK_PARTS, columns of j] of consecutive parts, in fp64."""
    part = first + tl.arange(0, BLOCK_PARTS)[:, None]
    place = part.to(tl.int64) * cols + j
    inside = (part < parts) & (j < cols)
    counted = tl.load(counts_ptr + part, mask=part < parts, other=0).to(tl.float64)
    shift = tl.load(shifts_ptr + place, mask=inside, other=0.0).to(tl.float64)
    return counted, shift + tl.load(means_ptr + place, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def first_valid(
    valid_ptr,
    first_sequence,
    first_token,
    sequences,
    length,
    chunk_tokens,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Index of a part's first valid token, counted over its chunks; the number of its tokens if none is valid."""
    if valid_ptr is None:
        return tl.full([], 0, tl.int32)
    else:
        none = SEQUENCES * chunk_tokens
        origin = tl.zeros([], tl.int32) + none
        for s in tl.range(SEQUENCES):
            tokens_here = tl.where(first_sequence + s < sequences, tl.minimum(length - first_token, chunk_tokens), 0)
            line = valid_ptr + (first_sequence + s) * length + first_token
            for first in tl.range(0, chunk_tokens, BLOCK):
                place = first + tl.arange(0, BLOCK)
                flags = tl.load(line + place, mask=place < tokens_here, other=0)
                origin = tl.minimum(origin, tl.min(tl.where(flags != 0, s * chunk_tokens + place, none), 0))
        return origin
