"""token_statistics: everything that is summed over a batch of tokens for the layers that read them, added to the sums
of the batches before.

Per channel j:      count, mean_j and sum_t (x_tj - mean_j)^2;   per sequence s:  sum_t x_tj^2
Per layer k:        v_kj = sum_t d_kt x_tj^2,   d_kt = unit_k / s_kt,   s_kt = sum_i a_kti^2

a_k are the outputs of layer k. unit_k is the mean s_kt of the layer's first batch. A token gets no weight (d_kt = 0) if
it is padding, or if s_kt is at most NEGLIGIBLE_NORM times the batch's mean.

Three launches, and the host waits for none: the norms s_kt of all layers, one read of the tokens, and the merge of the
partial sums into new running sums. Without outputs there are two. Bytes per element of e bytes: e for a token's input
and e for its outputs. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import launch, launch_sums
from .errors import ArgumentError
from .moments import as_sequences, moments_reference
from .op import Op, Work, bytes_of
from .output_norms import output_norms
from .token_norms import token_norms_reference
from .token_sums import merge_batch, sum_batch
from .triton_import import triton
from .weighted_squares import MOST_LAYERS, weighted_squares_reference

NEGLIGIBLE_NORM = 1e-8
"""Tokens whose squared output norm is below this share of the batch's mean get no weight."""

NUMBERS = 4
"""Numbers before the vector in the running sums of a layer: the count of tokens with a weight, the unit, 1 if all
outputs were finite and 0 if not, and one that is not used."""

# Tile for merging partial sums: a few dozen loads in flight per warp.
MERGED_PARTS, MERGED_COLS = 16, 32


class RunningMoments(NamedTuple):
    """Moments of each channel over all batches.

    Attributes:
        count: fp64 [1], number of tokens.
        mean: fp64 [in_features].
        deviation: fp64 [in_features], sum of squared deviations from the mean.
    """

    count: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor


class TokenStatistics(NamedTuple):
    """The running sums with one more batch, and what is kept of the batch itself.

    Attributes:
        moments: running moments.
        layers: fp64 [n_layers, row], running sums of the layers (:func:`no_layer_sums`).
        sequence_square: fp32 [n_sequences, in_features], sum of x^2 over each sequence's tokens.
        sequence_count: int64 [n_sequences], tokens of each sequence.
        token_weights: fp32 [n_layers, n_tokens], d_kt, if it was asked for.
    """

    moments: RunningMoments
    layers: torch.Tensor
    sequence_square: torch.Tensor
    sequence_count: torch.Tensor
    token_weights: torch.Tensor | None


def no_moments(in_features: int, device: torch.device) -> RunningMoments:
    """Running moments before the first batch."""
    count, vectors = torch.zeros(1, dtype=torch.float64, device=device), (2, in_features)
    return RunningMoments(count, *torch.zeros(vectors, dtype=torch.float64, device=device))


def no_layer_sums(n_layers: int, in_features: int, device: torch.device) -> torch.Tensor:
    """Running sums of layers before the first batch, fp64 [n_layers, row].

    A row holds NUMBERS numbers, then v_k [in_features]. Rows are padded, so that each starts at a multiple of 32 bytes.
    """
    sums = torch.zeros(n_layers, NUMBERS * (1 + -(-in_features // NUMBERS)), dtype=torch.float64, device=device)
    sums[:, 2] = 1
    return sums


def token_statistics(
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    before: RunningMoments,
    outputs: Sequence[torch.Tensor] = (),
    layers: torch.Tensor | None = None,
    *,
    token_weights: bool = False,
) -> TokenStatistics:
    """Statistics of a batch, added to those of the batches before. No argument is changed.

    Args:
        tokens: [n_sequences, length, in_features], or [n_tokens, in_features] as one sequence; fp32, fp16 or bf16.
        valid: bool [n_sequences, length] (or [n_tokens]), False for padding, which may contain NaN. None to use all.
        before: running moments.
        outputs: for up to MOST_LAYERS layers, their outputs [n_tokens, out_features] in the dtype of the first.
        layers: running sums of these layers, one row for each; None without outputs.
        token_weights: also return d_kt.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    tokens, valid = as_sequences(tokens, valid)
    if layers is None:
        layers = torch.empty(0, NUMBERS, dtype=torch.float64, device=tokens.device)
    _check(tokens, before, outputs, layers)
    run = TOKEN_STATISTICS.on(tokens, valid, *before, *outputs, layers)
    return run(tokens, valid, before, tuple(outputs), layers, token_weights)


def token_statistics_reference(
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    before: RunningMoments,
    outputs: tuple[torch.Tensor, ...],
    layers: torch.Tensor,
    token_weights: bool,
) -> TokenStatistics:
    """The statistics, computed with plain torch in fp64."""
    batch = moments_reference(tokens, valid)
    in_features = tokens.shape[2]
    total = before.count + batch.count
    share = batch.count / total.clamp(min=1)
    delta = batch.total / max(batch.count, 1) - before.mean
    deviation = before.deviation + batch.deviation + delta.square() * before.count * share
    merged = RunningMoments(total, before.mean + delta * share, deviation)
    after, weights = layers.clone(), []
    used = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
    for row, output in zip(after, outputs, strict=True):
        norms = token_norms_reference(output)
        level = norms.where(used.flatten(), 0.0).double().sum() / max(batch.count, 1)
        if row[0] == 0:
            row[1] = torch.where(level == 0, 1.0, level)
        kept = used.flatten() & (norms > (NEGLIGIBLE_NORM * level).float())
        weights.append(torch.where(kept, row[1].float() / norms, 0.0))
        row[0] += kept.sum()
        row[2] *= level.isfinite()
        row[NUMBERS : NUMBERS + in_features] += weighted_squares_reference(tokens.flatten(0, 1), weights[-1][None])[0]
    stacked = torch.stack(weights) if token_weights and weights else None
    return TokenStatistics(merged, after, batch.sequence_square, batch.sequence_count, stacked)


def _check(tokens: torch.Tensor, before: RunningMoments, outputs: Sequence[torch.Tensor], layers: torch.Tensor) -> None:
    n_tokens, in_features = tokens.shape[:2].numel(), tokens.shape[2]
    if before.mean.shape != (in_features,):
        raise ArgumentError(f"tokens have {in_features} channels, the moments before {tuple(before.mean.shape)}")
    if len(outputs) > MOST_LAYERS or len(layers) != len(outputs):
        raise ArgumentError(
            f"there must be outputs of at most {MOST_LAYERS} layers, and running sums of each; got {len(outputs)} "
            f"outputs and {len(layers)} rows of sums"
        )
    for output in outputs:
        if output.dim() != 2 or len(output) != n_tokens or output.dtype != outputs[0].dtype:
            raise ArgumentError(
                f"outputs must be {outputs[0].dtype} [{n_tokens}, out_features] for tokens of shape "
                f"{tuple(tokens.shape)}, got {output.dtype} {tuple(output.shape)}"
            )


def _token_statistics_triton(
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    before: RunningMoments,
    outputs: tuple[torch.Tensor, ...],
    layers: torch.Tensor,
    token_weights: bool,
) -> TokenStatistics:
    if not tokens.numel():
        return token_statistics_reference(tokens, valid, before, outputs, layers, token_weights)
    tokens, device = tokens.detach(), tokens.device
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    flags = None if valid is None else valid.contiguous().view(torch.uint8)
    sequences, length, cols = tokens.shape
    n_layers, n_tokens = len(outputs), sequences * length
    tile = launch_sums.moments(tokens)
    across, chunks = triton.cdiv(cols, tile.block_cols), triton.cdiv(length, tile.chunk)
    parts = chunks * triton.cdiv(sequences, tile.sequences)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    inverses, norm_parts = output_norms(outputs, flags) if outputs else (None, None)
    squares, counts, lengths = floats(chunks, sequences, cols), floats(1 + n_layers, parts), floats(chunks, sequences)
    shifts, means, deviations = floats(3, parts, cols)
    weighted = floats(parts, n_layers, cols) if outputs else None
    levels = torch.empty(n_layers, dtype=torch.float64, device=device)
    weights = floats(n_layers, n_tokens) if token_weights and outputs else None
    sum_batch[(across * parts,)](
        *(tokens, flags, inverses, norm_parts, layers, squares, lengths, counts, shifts, means, deviations),
        *(weighted, levels, weights, sequences, length, cols, tokens.stride(0), tokens.stride(1), chunks, parts),
        *(tile.trips, 0 if norm_parts is None else norm_parts.shape[1], layers.shape[1]),
        LAYERS=n_layers,
        NEGLIGIBLE=NEGLIGIBLE_NORM,
        SEQUENCES=tile.sequences,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        BLOCK_NORMS=tile.num_warps * launch.lanes(device),
        PIECES=tile.pieces,
        num_warps=tile.num_warps,
    )
    after = RunningMoments(*map(torch.empty_like, before))
    after_layers = torch.empty_like(layers)
    sequence_square = squares[0] if chunks == 1 else torch.empty_like(squares[0])
    sequence_count = torch.empty(sequences, dtype=torch.int64, device=device)
    merged_across, of_counts = triton.cdiv(cols, MERGED_COLS), triton.cdiv(sequences, MERGED_COLS)
    of_squares = 0 if chunks == 1 else sequences * merged_across
    merge_batch[(merged_across * (1 + n_layers) + of_counts + of_squares,)](
        *(counts, shifts, means, deviations, weighted, levels, squares, lengths),
        *(*before, layers, *after, after_layers, sequence_square, sequence_count),
        *(parts, chunks, sequences, cols, of_counts, layers.shape[1]),
        LAYERS=n_layers,
        NUMBERS=NUMBERS,
        BLOCK_PARTS=MERGED_PARTS,
        BLOCK_COLS=MERGED_COLS,
        num_warps=1,
    )
    return TokenStatistics(after, after_layers, sequence_square, sequence_count, weights)


def _work(
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    before: RunningMoments,
    outputs: tuple[torch.Tensor, ...],
    layers: torch.Tensor,
    token_weights: bool,
) -> Work:
    sequences, _, cols = tokens.shape
    moved = bytes_of(tokens, valid, *outputs) + 2 * bytes_of(*before, layers) + (4 * cols + 8) * sequences
    flops = (6 + 2 * len(outputs)) * tokens.numel() + 2 * sum(output.numel() for output in outputs)
    return Work(moved, flops)


TOKEN_STATISTICS = Op(
    "token_statistics", _work, token_statistics_reference, token_statistics_reference, _token_statistics_triton
)
