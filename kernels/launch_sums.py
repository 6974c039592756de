"""Block sizes and warps of the Triton kernels that sum over rows or columns (see also :mod:`.launch`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import launch

# Loads that a program makes, one after the other, before it writes its partial sums.
LEAST_TRIPS = 4

# Warps per multiprocessor for sums: two programs of WIDE_WARPS, so that all programs run in one wave.
SUM_WARPS = 16


def sum_warps(device: torch.device) -> int:
    """Total warps of a sum: SUM_WARPS per multiprocessor, or MOST_WARPS of :mod:`.launch` if the device is not a GPU.

    The number of partial sums depends on the multiprocessors and on the lanes of a warp. So fp32 sums are equal bit for
    bit on GPUs of the same model, and up to rounding on others. Without a GPU (in the interpreter, on x86, in the
    machine-code report) the number is always the same.
    """
    there = launch.multiprocessors(device)
    return launch.MOST_WARPS if there is None else SUM_WARPS * there


@dataclass(frozen=True)
class Reduction:
    """Tile of a sum over rows or columns by programs of one warp: no shared memory, no barrier.

    Attributes:
        block_rows, block_cols: tile that is loaded at once, with 16-byte accesses per lane.
        trips: tiles that one program sums in registers before it writes its partial sums.
    """

    block_rows: int
    block_cols: int
    trips: int


def down_rows(rows: int, like: torch.Tensor) -> Reduction:
    """Sums over ``rows`` rows of a matrix like ``like`` [..., cols]: one access per row, four rows in flight."""
    block_cols = launch.lanes(like.device) * launch.vector(like)
    blocks = math.ceil(like.shape[-1] / block_cols) * rows
    return Reduction(4, block_cols, _trips(math.ceil(rows / 4), blocks // 4, sum_warps(like.device), most=64))


def along_rows(matrix: torch.Tensor) -> Reduction:
    """Sums along each row of ``matrix``, and, if needed, down its columns in the same read."""
    access = launch.lanes(matrix.device) * launch.vector(matrix)
    block_cols = launch.narrowest(matrix.shape[1], (access * 4, access * 2, access))
    blocks = math.ceil(matrix.shape[1] / block_cols) * math.ceil(matrix.shape[0] / 2)
    return Reduction(2, block_cols, _trips(math.ceil(matrix.shape[0] / 2), blocks, sum_warps(matrix.device), most=32))


def along_rows_of(widest: torch.Tensor, matrices: int) -> Reduction:
    """Sums along each row of ``matrices`` matrices in one launch; ``widest`` has the most columns.

    As few programs as fill the GPU, because each writes partial sums over its rows, which all later programs read.
    """
    tile, rows = along_rows(widest), math.ceil(widest.shape[0] / 2)
    return Reduction(tile.block_rows, tile.block_cols, max(1, rows * matrices // sum_warps(widest.device)))


def _trips(needed: int, blocks: int, warps: int, most: int) -> int:
    """Trips per program, so that about ``warps`` programs cover all ``blocks``.

    Between LEAST_TRIPS and ``most``, but never more than ``needed``. Each program writes its own partial sums, so fewer
    programs write less.
    """
    return max(1, min(most, needed, max(LEAST_TRIPS, blocks // warps)))


@dataclass(frozen=True)
class WeightSums:
    """Tile of ``weight_sums``. Each warp of a program sums its own rows; one reduction at the end combines the warps.

    Attributes:
        block_rows: rows per trip, one for each warp.
        block_cols: columns of one piece, 16 bytes per lane.
        pieces: number of pieces side by side.
        trips: blocks of rows that one program sums in registers.
        num_warps: warps per program.
    """

    block_rows: int
    block_cols: int
    pieces: int
    trips: int
    num_warps: int


def weight_sums(weight: torch.Tensor) -> WeightSums:
    """As many programs of eight warps as :func:`sum_warps` allows.

    The partial sums of a program cost 8 bytes per row and column, written and read again. For small weights, latency
    matters rather than these bytes.
    """
    rows, cols = weight.shape
    block_cols = launch.lanes(weight.device) * launch.vector(weight)
    pieces = max(1, min(4, math.ceil(cols / block_cols)))
    across = math.ceil(cols / (pieces * block_cols))
    down = max(1, sum_warps(weight.device) // launch.WIDE_WARPS // max(1, across))
    trips = max(LEAST_TRIPS, math.ceil(rows / (launch.WIDE_WARPS * down)))
    trips = min(trips, max(1, math.ceil(rows / launch.WIDE_WARPS)))
    return WeightSums(launch.WIDE_WARPS, block_cols, pieces, trips, launch.WIDE_WARPS)


@dataclass(frozen=True)
class Moments:
    """Tile of ``moments``. Each warp sums its own tokens; the warps are combined once per sequence.

    Attributes:
        sequences: neighboring sequences per program; the program processes one chunk of each.
        block_rows, block_cols: tile that is loaded at once: one token per warp, 16 bytes per lane.
        pieces: loads in flight.
        trips: steps of ``pieces`` loads per chunk.
        num_warps: warps per program.
    """

    sequences: int
    block_rows: int
    block_cols: int
    pieces: int
    trips: int
    num_warps: int

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.trips * self.pieces * self.block_rows


def moments(tokens: torch.Tensor) -> Moments:
    """As many programs as :func:`sum_warps` allows. Each program writes 12 bytes of partial sums per channel, which are
    read again.

    Short sequences share a program, with few warps. Long ones are cut into chunks only if there are few sequences.
    """
    n_sequences, length, cols = tokens.shape
    block_cols = launch.lanes(tokens.device) * launch.vector(tokens)
    num_warps = next(w for w in (launch.WIDE_WARPS, 4, 2, 1) if length >= 4 * w or w == 1)
    step = num_warps * 4
    wanted = max(1, math.ceil(sum_warps(tokens.device) / (num_warps * math.ceil(cols / block_cols))))
    chunks = max(1, min(math.ceil(length / (step * LEAST_TRIPS)), wanted // n_sequences))
    return Moments(
        max(1, n_sequences // wanted), num_warps, block_cols, 4, math.ceil(length / chunks / step), num_warps
    )
