"""variance_factor: VarP's factor for every input channel (ACE, arXiv 2505.21987).

    f_j = mean_s (1 - y_sj)^(-power),   y_sj = square_sj / level      (square_sj = sum over sequence s of x_tj^2)

The energy of a channel is divided by a level; :func:`variance_factor` lists the four kinds of level. Two launches
compute the levels of the sequences and the means. The level "channel" needs only one launch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from . import cpu, launch
from .errors import ArgumentError
from .op import Op, Work, launch_metadata
from .triton_import import tl, triton

VarianceNorm = Literal["max_layer", "max_sequence", "channel", "frobenius"]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def variance_factor(sequence_square: torch.Tensor, norm: VarianceNorm, power: float, eps: float) -> torch.Tensor:
    """VarP's factors, fp32 [in_features].

    Args:
        sequence_square: fp32 [n_sequences, in_features], sums of squares.
        norm: kind of level: "max_layer", the largest sum of all; "max_sequence", the largest of each sequence;
            "channel", the largest of each channel; "frobenius", the total of each sequence.
        power: exponent of 1 / (1 - y).
        eps: y is clamped to at most 1 - eps.

    Raises:
        ArgumentError: if the shape, dtype or norm is invalid, or if eps is not in (0, 1).
    """
    check_squares(sequence_square, norm, eps)
    return VARIANCE_FACTOR.on(sequence_square)(sequence_square, norm, power, eps)


def check_squares(sequence_square: torch.Tensor, norm: VarianceNorm, eps: float) -> None:
    """Raise ArgumentError if the arguments of :func:`variance_factor` are invalid."""
    if not 0 < eps < 1:
        raise ArgumentError(f"eps must be in (0, 1), got {eps!r}")
    if sequence_square.dim() != 2 or sequence_square.dtype != torch.float32:
        raise ArgumentError(
            "sums of squares must be float32 [n_sequences, in_features], got "
            f"{sequence_square.dtype} {tuple(sequence_square.shape)}"
        )
    if norm not in get_args(VarianceNorm):
        raise ArgumentError(f"norm must be 'max_layer', 'max_sequence', 'channel' or 'frobenius', got {norm!r}")


def variance_factor_reference(
    sequence_square: torch.Tensor, norm: VarianceNorm, power: float, eps: float
) -> torch.Tensor:
    """The factors, computed with plain torch in fp64."""
    square = sequence_square.double()
    if norm == "max_layer":
        level = square.amax().reshape(1, 1) if square.numel() else square.new_zeros(1, 1)
    elif norm == "max_sequence":
        level = square.amax(1, keepdim=True)
    elif norm == "channel":
        level = square.amax(0, keepdim=True)
    else:
        level = square.sum(1, keepdim=True)
    level = level.clamp(min=SMALLEST_NORMAL / eps)
    rest = torch.maximum(level - square, eps * level) if norm == "frobenius" else level - (1 - eps) * square
    return (level / rest).pow(power).mean(0).float()


def _variance_factor_triton(
    sequence_square: torch.Tensor, norm: VarianceNorm, power: float, eps: float
) -> torch.Tensor:
    square = sequence_square.contiguous()
    sequences, channels = square.shape
    tile = launch.variance_factor(square)
    levels = torch.empty(0 if norm == "channel" else sequences, dtype=torch.float32, device=square.device)
    if len(levels):
        _find_levels[(sequences,)](
            square, levels, channels, ADD=norm == "frobenius", BLOCK=tile.levels_block, num_warps=1
        )
    factor = torch.empty(channels, dtype=torch.float32, device=square.device)
    if channels:
        _average_inverses[(triton.cdiv(channels, tile.block_cols),)](
            *(square, levels, factor, sequences, channels, power, eps, SMALLEST_NORMAL / eps),
            NORM=norm,
            IS_POWER=power != 1,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            num_warps=1,
        )
    return factor


def variance_factor_work(sequence_square: torch.Tensor, norm: VarianceNorm, power: float, eps: float) -> Work:
    """Per number: difference, division and sum; a power unless it is 1; the total of "frobenius"."""
    operations = 3 + (power != 1) + (norm == "frobenius")
    return Work(sequence_square.nbytes + 4 * sequence_square.shape[1], operations * sequence_square.numel())


VARIANCE_FACTOR = Op(
    "variance_factor", variance_factor_work, variance_factor_reference, cpu.variance_factor, _variance_factor_triton
)


@triton.jit(launch_metadata=launch_metadata)
def _find_levels(square_ptr, levels_ptr, channels, ADD: tl.constexpr, BLOCK: tl.constexpr):
    find_level(tl.program_id(0), square_ptr, levels_ptr, channels, ADD, BLOCK)


@triton.jit
def find_level(sequence, square_ptr, levels_ptr, channels, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """The level of one sequence per program: the sum of its channels if ADD, else the largest."""
    row = square_ptr + sequence.to(tl.int64) * channels
    found = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, channels, BLOCK):
        j = first + tl.arange(0, BLOCK)
        square = tl.load(row + j, mask=j < channels, other=0.0)
        found = found + square if ADD else tl.maximum(found, square)
    tl.store(levels_ptr + sequence, tl.sum(found, 0) if ADD else tl.max(found, 0))


@triton.jit(launch_metadata=launch_metadata)
def _average_inverses(
    square_ptr,
    levels_ptr,
    factor_ptr,
    sequences,
    channels,
    power,
    eps,
    least,
    NORM: tl.constexpr,
    IS_POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    average_inverses(
        *(tl.program_id(0), square_ptr, levels_ptr, factor_ptr, sequences, channels, power, eps, least),
        *(NORM, IS_POWER, BLOCK_ROWS, BLOCK_COLS),
    )


@triton.jit
def average_inverses(
    program,
    square_ptr,
    levels_ptr,
    factor_ptr,
    sequences,
    channels,
    power,
    eps,
    least,
    NORM: tl.constexpr,
    IS_POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The factors of a program's channels, BLOCK_ROWS sequences at a time; levels are clamped to at least ``least``."""
    j = program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    level = tl.zeros([1, BLOCK_COLS], tl.float32) + least
    if NORM == "channel":
        for first in tl.range(0, sequences, BLOCK_ROWS):
            s = first + tl.arange(0, BLOCK_ROWS)[:, None]
            inside = (s < sequences) & (j < channels)
            square = tl.load(square_ptr + s.to(tl.int64) * channels + j, mask=inside, other=0.0)
            level = tl.maximum(level, tl.max(square, 0, keep_dims=True))
    elif NORM == "max_layer":
        for first in tl.range(0, sequences, BLOCK_ROWS):
            s = first + tl.arange(0, BLOCK_ROWS)[:, None]
            levels = tl.load(levels_ptr + s, mask=s < sequences, other=0.0)
            level = tl.maximum(level, tl.max(levels, 0, keep_dims=True))
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in tl.range(0, sequences, BLOCK_ROWS):
        s = first + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (s < sequences) & (j < channels)
        square = tl.load(square_ptr + s.to(tl.int64) * channels + j, mask=inside, other=0.0)
        if NORM == "max_sequence" or NORM == "frobenius":
            levels = tl.maximum(tl.load(levels_ptr + s, mask=s < sequences, other=0.0), least)
        else:
            levels = level
        rest = (levels - square) + eps * square
        if NORM == "frobenius":
            rest = tl.maximum(levels - square, eps * levels, propagate_nan=tl.PropagateNan.ALL)
        inverse = levels / rest
        if IS_POWER:
            inverse = tl.exp2(power * tl.log2(inverse))
        total += tl.where(s < sequences, inverse, 0.0)
    mean = tl.sum(total, 0, keep_dims=True) / sequences
    tl.store(factor_ptr + j, mean, mask=j < channels)
