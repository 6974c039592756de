"""Block sizes and warps of every Triton body, from shape, dtype and device; nothing is tuned at run time.

Each choice is argued here, once, from machine code (docs/kernels.md), so that a kernel can be read
without its constants and a constant changed without its kernel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

ACCESS_BYTES = 16

# Warps of a program where nothing argues for another number.
WARPS = 4

# Enough programs to fill every current GPU twice over; more of them only reload what a program shares.
MOST_PROGRAMS = 4096

# Enough programs of one warp, with four accesses of 16 bytes a lane in flight, to hide an H100's latency:
# 1024 * 2 KiB is its bandwidth over 600 ns.
MOST_WARPS = 1024
LEAST_TRIPS = 4

# Warps of a sum on each multiprocessor: two programs of WIDE_WARPS, so that none waits for a second turn.
SUM_WARPS = 16

# Programs along the second and third axis of a grid.
MOST_ALONG_Y = 65535

# Warps of a program that sums down a matrix: the more of them meet, the fewer partial sums are written.
WIDE_WARPS = 8


def on_amd() -> bool:
    """True where torch drives AMD GPUs."""
    return torch.version.hip is not None


def lanes(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    if device.type == "cuda" and on_amd():
        return torch.cuda.get_device_properties(device).warp_size
    return 32


def before_ampere(device: torch.device) -> bool:
    """True on an NVIDIA GPU older than Ampere, whose matrix units take neither bf16 nor asynchronous copies."""
    return device.type == "cuda" and not on_amd() and _capability(device)[0] < 8


def multiprocessors(device: torch.device) -> int | None:
    """Multiprocessors (compute units on AMD) of a GPU; None for any other device."""
    return _multiprocessors(device) if device.type == "cuda" else None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def sum_warps(device: torch.device) -> int:
    """Warps of all programs of a sum: SUM_WARPS on each multiprocessor, MOST_WARPS where no GPU is known.

    The number of partial sums, and with it the last bits of a sum in fp32, depends on the GPU's multiprocessors, as it
    does on the lanes of a warp: GPUs of one kind agree bit by bit, others to rounding. Without a GPU (in the
    interpreter, on x86, in the machine-code report) sizes are always the same.
    """
    there = multiprocessors(device)
    return MOST_WARPS if there is None else SUM_WARPS * there


def vector(tensor: torch.Tensor) -> int:
    """Elements of one 16-byte access."""
    return ACCESS_BYTES // tensor.element_size()


def narrowest(size: int, widths: tuple[int, ...]) -> int:
    """The width that covers ``size`` with the fewest elements beyond it; of equals, the widest."""
    return min(widths, key=lambda width: (math.ceil(size / width) * width, -width))


@dataclass(frozen=True)
class SelectNm:
    """Tile of ``select_nm``.

    Attributes:
        split: members of a group that lie in one access; a group takes m // split accesses.
        block_rows, block_cols: tile of one access, in rows (of groups, along "out") and columns.
        trips: tiles that one program walks down, with the column terms held.
    """

    split: int
    block_rows: int
    block_cols: int
    trips: int
    num_warps: int


def select_nm(weight: torch.Tensor, m: int, axis: str) -> SelectNm:
    """Four warps, each thread with whole groups in its registers: two accesses of 16 bytes for 2:4 along "in"."""
    threads = WARPS * lanes(weight.device)
    rows, cols = weight.shape
    if axis == "in":
        split = min(m, vector(weight))
        held = max(1, 2 * split // m) * vector(weight)
        cols = cols * split // m
    else:
        split = 1
        held = max(2, min(vector(weight), 32 // m))
        rows = rows // m
    width = threads * min(held, vector(weight))
    block_cols = narrowest(cols, tuple(width >> k for k in range(5) if width >> k >= 8))
    block_rows = threads * held // block_cols
    tiles = math.ceil(rows / block_rows) * math.ceil(cols / block_cols)
    return SelectNm(split, block_rows, block_cols, min(8, max(1, tiles // MOST_PROGRAMS)), WARPS)


@dataclass(frozen=True)
class Reduction:
    """Tile of a sum over rows or columns, made by one warp on its own: no shared memory, no barrier.

    Attributes:
        block_rows, block_cols: what is loaded at once, 16 bytes a lane at a time.
        trips: tiles that one program adds up in registers before it writes its partial sums.
    """

    block_rows: int
    block_cols: int
    trips: int


def down_rows(rows: int, like: torch.Tensor) -> Reduction:
    """Sums over ``rows`` rows of a matrix like ``like`` [..., cols], one access a row: four rows are in flight."""
    block_cols = lanes(like.device) * vector(like)
    blocks = math.ceil(like.shape[-1] / block_cols) * rows
    return Reduction(4, block_cols, _trips(math.ceil(rows / 4), blocks // 4, sum_warps(like.device), most=64))


def along_rows(matrix: torch.Tensor) -> Reduction:
    """Sums along each row of ``matrix``, and down its columns in the same read where they are wanted."""
    access = lanes(matrix.device) * vector(matrix)
    block_cols = narrowest(matrix.shape[1], (access * 4, access * 2, access))
    blocks = math.ceil(matrix.shape[1] / block_cols) * math.ceil(matrix.shape[0] / 2)
    return Reduction(2, block_cols, _trips(math.ceil(matrix.shape[0] / 2), blocks, sum_warps(matrix.device), most=32))


def _trips(needed: int, blocks: int, warps: int, most: int) -> int:
    """As many as leave ``warps`` of all ``blocks``, and LEAST_TRIPS: each program writes partial sums of its own."""
    return max(1, min(most, needed, max(LEAST_TRIPS, blocks // warps)))


@dataclass(frozen=True)
class WeightSums:
    """Tile of ``weight_sums``, whose warps each take rows of their own and meet once, at a program's end.

    Attributes:
        block_rows: rows of a trip, one for each warp.
        block_cols: columns of one piece, 16 bytes a lane.
        pieces: pieces side by side.
        trips: blocks of rows that one program adds up in registers.
        num_warps: of a program.
    """

    block_rows: int
    block_cols: int
    pieces: int
    trips: int
    num_warps: int


def weight_sums(weight: torch.Tensor) -> WeightSums:
    """As many programs of eight warps as make :func:`sum_warps`: what one sums leaves 8 bytes a row and a column.

    At 4096 x 11008 in bf16 that is 1.5 % of the weight with MOST_WARPS; small weights are waited for, not their bytes.
    """
    rows, cols = weight.shape
    block_cols = lanes(weight.device) * vector(weight)
    pieces = max(1, min(4, math.ceil(cols / block_cols)))
    across = math.ceil(cols / (pieces * block_cols))
    down = max(1, sum_warps(weight.device) // WIDE_WARPS // max(1, across))
    trips = max(LEAST_TRIPS, math.ceil(rows / (WIDE_WARPS * down)))
    return WeightSums(WIDE_WARPS, block_cols, pieces, min(trips, max(1, math.ceil(rows / WIDE_WARPS))), WIDE_WARPS)


def all_finite(tensor: torch.Tensor) -> int:
    """Elements of a program: four accesses of 16 bytes a thread."""
    return 4 * WARPS * lanes(tensor.device) * vector(tensor)


def adamw(values: torch.Tensor) -> int:
    """Values of a program: 8 a thread, so that those in 16 bits come 16 bytes at a time too."""
    return WARPS * lanes(values.device) * 8


def divergence(logits: torch.Tensor) -> int:
    """Logits of a token in one trip: eight a thread of WIDE_WARPS, of each of the two rows; four of fp32 spill."""
    return WIDE_WARPS * lanes(logits.device) * 8


def column_scale(like: torch.Tensor) -> int:
    """Channels of a program of one warp: the vector is short, and the more programs share it, the less each waits."""
    return 4 * lanes(like.device)


@dataclass(frozen=True)
class VarianceFactor:
    """Tiles of ``variance_factor``, each of one warp.

    Attributes:
        levels_block: channels of a sequence that are loaded at once where its level is found.
        block_rows, block_cols: sequences and channels that are loaded at once.
    """

    levels_block: int
    block_rows: int
    block_cols: int


def variance_factor(square: torch.Tensor) -> VarianceFactor:
    """Four accesses of 16 bytes a lane where a level is found; a channel a lane, of 16 sequences, where they meet."""
    return VarianceFactor(4 * lanes(square.device) * vector(square), 16, lanes(square.device))


@dataclass(frozen=True)
class Moments:
    """Tile of ``moments``, whose warps each take tokens of their own and meet once a sequence.

    Attributes:
        sequences: neighbouring sequences of which a program takes one chunk each.
        block_rows, block_cols: what is loaded at once: a token for each warp, 16 bytes a lane.
        pieces: loads in flight.
        trips: steps of ``pieces`` loads that make a chunk.
        num_warps: of a program.
    """

    sequences: int
    block_rows: int
    block_cols: int
    pieces: int
    trips: int
    num_warps: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.trips * self.pieces * self.block_rows


def moments(tokens: torch.Tensor) -> Moments:
    """As many programs as make :func:`sum_warps`: what each sums leaves 12 bytes a channel, written and read again.

    Short sequences are taken several at a time, by few warps; long ones are cut into chunks only where there are few.
    """
    n_sequences, length, cols = tokens.shape
    block_cols = lanes(tokens.device) * vector(tokens)
    num_warps = next(w for w in (WIDE_WARPS, 4, 2, 1) if length >= 4 * w or w == 1)
    step = num_warps * 4
    wanted = max(1, math.ceil(sum_warps(tokens.device) / (num_warps * math.ceil(cols / block_cols))))
    chunks = max(1, min(math.ceil(length / (step * LEAST_TRIPS)), wanted // n_sequences))
    return Moments(
        max(1, n_sequences // wanted), num_warps, block_cols, 4, math.ceil(length / chunks / step), num_warps
    )


@dataclass(frozen=True)
class SelectRows:
    """Tiles of ``select_rows``: a row in the registers of one program, 32 weights a word.

    Attributes:
        vector: neighbouring weights in a thread, 16 bytes of them, or 1 where rows are not aligned.
        log_threads: binary logarithm of the program's threads.
        parts: words of a thread, as at most two powers of two.
        num_warps: threads over the lanes of a warp.
    """

    vector: int
    log_threads: int
    parts: tuple[int, ...]
    num_warps: int


def select_rows(weight: torch.Tensor) -> SelectRows | None:
    """As few warps as hold a row, since warps must meet for every bit; None where eight do not.

    A thread holds four words, 124 registers of bit planes; two of fp32 weights or on AMD; one where rows
    are not aligned and every weight has an address of its own: more would spill.
    """
    threads = lanes(weight.device)
    aligned = weight.data_ptr() % ACCESS_BYTES == 0 and all(n % 16 == 0 for n in (weight.stride(0), weight.shape[1]))
    most = 1 if not aligned else 2 if on_amd() or weight.element_size() == 4 else 4
    words = math.ceil(weight.shape[1] / (32 * threads))
    num_warps = 1
    while words > most * num_warps:
        num_warps *= 2
    if num_warps > 8:
        return None
    words = math.ceil(words / num_warps)
    log_threads = (threads * num_warps).bit_length() - 1
    return SelectRows(vector(weight) if aligned else 1, log_threads, (2, 1) if words == 3 else (words,), num_warps)


def threshold_search(weight: torch.Tensor) -> int:
    """Columns of a program of ``threshold_search``: 32 a thread, so that a count is rare beside its keys."""
    return min(32 * WARPS * lanes(weight.device), max(8, 1 << (weight.shape[1] - 1).bit_length()))


@dataclass(frozen=True)
class JoinGains:
    """Tile of ``join_gains``: groups and candidates of one program, and its warps."""

    block_rows: int
    block_cols: int
    num_warps: int


def join_gains(groups: int, candidates: int) -> JoinGains:
    """Thirty-two pairs a thread, which reuse each number loaded four to eight times; smaller where pairs are few."""
    side = 64 if groups * candidates >= 64 * 64 * 64 else 32
    return JoinGains(side, side, side * side // (32 * 32))


@dataclass(frozen=True)
class Coupling:
    """Tile of ``coupling``'s GEMM.

    Attributes:
        block_rows, block_cols, block_tokens: tile of the matrix, and tokens of a step.
        precision: of the products; ``tl.dot``'s ``input_precision``.
        num_warps: of a program.
    """

    block_rows: int
    block_cols: int
    block_tokens: int
    precision: str
    num_warps: int


def coupling(matrix: torch.Tensor) -> Coupling:
    """Large tiles where there are enough of them to fill a GPU.

    On NVIDIA three TF32 products make one of fp32 accuracy, still at twice the rate of the fp32 units:
    one alone errs by 5e-4, which reorders near ties of the score. CDNA's matrix units multiply fp32; RDNA's
    do not, and its fp32 units take a small tile.
    """
    precision = "ieee" if on_amd() else "tf32x3"
    if on_amd() and lanes(matrix.device) == 32:
        return Coupling(64, 64, 16, precision, 8)
    if matrix.numel() >= 128 * 128 * 256:
        return Coupling(128, 128, 16, precision, 8)
    return Coupling(64, 64, 32, precision, 4)
