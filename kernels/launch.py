"""Block sizes and warps of every Triton kernel, chosen from shape, dtype and device; nothing is tuned at run time.

This file gives the reason for each choice, based on machine code (docs/kernels.md). Kernels hold no such constants, so
a constant can change without its kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ACCESS_BYTES = 16

# Warps per program unless there is a reason for another number.
WARPS = 4

# Enough programs to fill every current GPU twice; more programs only load shared data again.
MOST_PROGRAMS = 4096

# Enough one-warp programs, each lane with four 16-byte accesses in flight, to hide the memory latency of an H100:
# 1024 * 2 KiB is what its bandwidth transfers in 600 ns.
MOST_WARPS = 1024
LEAST_TRIPS = 4

# Warps per multiprocessor for sums: two programs of WIDE_WARPS, so that all programs run in one wave.
SUM_WARPS = 16

# The largest number of programs along the second and third axis of a grid.
MOST_ALONG_Y = 65535

# Warps per program that sums down a matrix: with more warps per program, fewer partial sums are written.
WIDE_WARPS = 8


def on_amd() -> bool:
    """True if torch was built for AMD GPUs."""
    return torch.version.hip is not None


def lanes(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    if device.type == "cuda" and on_amd():
        return torch.cuda.get_device_properties(device).warp_size
    return 32


def before_ampere(device: torch.device) -> bool:
    """True for an NVIDIA GPU older than Ampere, which has neither bf16 matrix units nor asynchronous copies."""
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
    """Total warps of a sum: SUM_WARPS per multiprocessor, or MOST_WARPS if the device is not a GPU.

    The number of partial sums depends on the multiprocessors and on the lanes of a warp. So fp32 sums are equal bit for
    bit on GPUs of the same model, and up to rounding on others. Without a GPU (in the interpreter, on x86, in the
    machine-code report) the number is always the same.
    """
    there = multiprocessors(device)
    return MOST_WARPS if there is None else SUM_WARPS * there


def vector(tensor: torch.Tensor) -> int:
    """Elements of one 16-byte access."""
    return ACCESS_BYTES // tensor.element_size()


def is_aligned(tensor: torch.Tensor) -> bool:
    """True if the first element starts a 16-byte access, which kernels are specialized for."""
    return tensor.data_ptr() % ACCESS_BYTES == 0


def narrowest(size: int, widths: tuple[int, ...]) -> int:
    """The width whose multiples cover ``size`` with the least padding; on a tie, the widest."""
    return min(widths, key=lambda width: (math.ceil(size / width) * width, -width))


@dataclass(frozen=True)
class SelectNm:
    """Tile of ``select_nm``.

    Attributes:
        split: members of a group in one access; a group takes m // split accesses.
        block_rows, block_cols: tile of one access, in rows (rows of groups along "out") and columns.
        trips: tiles, one below the other, that one program processes; it loads the column terms once.
    """

    split: int
    block_rows: int
    block_cols: int
    trips: int
    num_warps: int

    def programs(self, weight: torch.Tensor, m: int, axis: str) -> int:
        """Programs of the launch for a weight [rows, cols]."""
        rows, cols = weight.shape
        groups, width = (rows, cols * self.split // m) if axis == "in" else (rows // m, cols)
        return math.ceil(width / self.block_cols) * math.ceil(groups / (self.block_rows * self.trips))


def select_nm(weight: torch.Tensor, m: int, axis: str) -> SelectNm:
    """Four warps; each thread holds whole groups in registers: two 16-byte accesses for 2:4 along "in"."""
    return select_nm_group([weight], m, axis)


def select_nm_group(weights: Sequence[torch.Tensor], m: int, axis: str) -> SelectNm:
    """One tile for several weights of one dtype, with the least padding in all."""
    like = weights[0]
    threads = WARPS * lanes(like.device)
    if axis == "in":
        split = min(m, vector(like))
        held = max(1, 2 * split // m) * vector(like)
        sizes = [(weight.shape[0], weight.shape[1] * split // m) for weight in weights]
    else:
        split = 1
        held = max(2, min(vector(like), 32 // m))
        sizes = [(weight.shape[0] // m, weight.shape[1]) for weight in weights]
    width = threads * min(held, vector(like))
    widths = tuple(width >> k for k in range(5) if width >> k >= 8)
    block_cols = min(widths, key=lambda w: (sum(rows * math.ceil(cols / w) * w for rows, cols in sizes), -w))
    block_rows = threads * held // block_cols
    tiles = sum(math.ceil(rows / block_rows) * math.ceil(cols / block_cols) for rows, cols in sizes)
    return SelectNm(split, block_rows, block_cols, min(8, max(1, tiles // MOST_PROGRAMS)), WARPS)


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
    block_cols = lanes(like.device) * vector(like)
    blocks = math.ceil(like.shape[-1] / block_cols) * rows
    return Reduction(4, block_cols, _trips(math.ceil(rows / 4), blocks // 4, sum_warps(like.device), most=64))


def along_rows(matrix: torch.Tensor) -> Reduction:
    """Sums along each row of ``matrix``, and, if needed, down its columns in the same read."""
    access = lanes(matrix.device) * vector(matrix)
    block_cols = narrowest(matrix.shape[1], (access * 4, access * 2, access))
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
    block_cols = lanes(weight.device) * vector(weight)
    pieces = max(1, min(4, math.ceil(cols / block_cols)))
    across = math.ceil(cols / (pieces * block_cols))
    down = max(1, sum_warps(weight.device) // WIDE_WARPS // max(1, across))
    trips = max(LEAST_TRIPS, math.ceil(rows / (WIDE_WARPS * down)))
    return WeightSums(WIDE_WARPS, block_cols, pieces, min(trips, max(1, math.ceil(rows / WIDE_WARPS))), WIDE_WARPS)


def all_finite(tensor: torch.Tensor) -> int:
    """Elements per program: four 16-byte accesses per thread."""
    return 4 * WARPS * lanes(tensor.device) * vector(tensor)


def adamw(values: torch.Tensor) -> int:
    """Values per program: 8 per thread, so that 16-bit tensors also use 16-byte accesses."""
    return WARPS * lanes(values.device) * 8


@dataclass(frozen=True)
class RoundGroups:
    """Tile of ``round_groups``.

    Attributes:
        groups: groups of one program, side by side.
        block: values of a group that are loaded at once, a power of two; a longer group is read twice.
    """

    groups: int
    block: int


def round_groups(values: torch.Tensor, group: int) -> RoundGroups:
    """Values of a program as in :func:`adamw`; up to four times as many if one group needs them."""
    tile = adamw(values)
    block = min(4 * tile, 1 << (group - 1).bit_length())
    return RoundGroups(max(1, tile // block), block)


def divergence(logits: torch.Tensor) -> int:
    """Logits of a token per trip: eight per thread from each of the two rows, with WIDE_WARPS. With four
    warps, fp32 would spill registers."""
    return WIDE_WARPS * lanes(logits.device) * 8


def column_scale(like: torch.Tensor) -> int:
    """Channels per one-warp program: the vector is short, so many small programs hide latency best."""
    return 4 * lanes(like.device)


@dataclass(frozen=True)
class VarianceFactor:
    """Tiles of ``variance_factor`` for programs of one warp.

    Attributes:
        levels_block: channels of a sequence that are loaded at once to find its level.
        block_rows, block_cols: sequences and channels that are loaded at once to average.
    """

    levels_block: int
    block_rows: int
    block_cols: int


def variance_factor(square: torch.Tensor) -> VarianceFactor:
    """To find a level: four 16-byte accesses per lane. To average: one channel per lane, 16 sequences at a time."""
    return VarianceFactor(4 * lanes(square.device) * vector(square), 16, lanes(square.device))


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
    """Tiles of ``select_rows``: one program holds a row in its registers, 32 weights per word.

    Attributes:
        vector: neighboring weights per thread and access: 16 bytes of them, or 1 if rows are not aligned.
        log_threads: binary logarithm of the threads per program.
        parts: words per thread, as a sum of at most two powers of two.
        num_warps: warps per program.
    """

    vector: int
    log_threads: int
    parts: tuple[int, ...]
    num_warps: int


def select_rows(weight: torch.Tensor) -> SelectRows | None:
    """The fewest warps that hold a row, since warps synchronize for every bit; None if eight warps cannot hold it.

    A thread holds four words, 124 registers of bit planes; two words for fp32 weights or on AMD; one word if rows are
    not aligned, because every weight then needs its own address. More would spill registers.
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
    """Columns per program of ``threshold_search``: 32 per thread, so that counts are few compared with keys."""
    return min(32 * WARPS * lanes(weight.device), max(8, 1 << (weight.shape[1] - 1).bit_length()))


@dataclass(frozen=True)
class JoinGains:
    """Tile of ``join_gains``: groups, candidates and warps per program."""

    block_rows: int
    block_cols: int
    num_warps: int


def join_gains(groups: int, candidates: int) -> JoinGains:
    """Thirty-two pairs per thread, which use each loaded number four to eight times; fewer if there are few pairs."""
    side = 64 if groups * candidates >= 64 * 64 * 64 else 32
    return JoinGains(side, side, side * side // (32 * 32))


@dataclass(frozen=True)
class Coupling:
    """Tile of ``coupling``'s GEMM.

    Attributes:
        block_rows, block_cols, block_tokens: tile of the matrix, and tokens per step.
        precision: precision of the products, ``tl.dot``'s ``input_precision``.
        num_warps: warps per program.
    """

    block_rows: int
    block_cols: int
    block_tokens: int
    precision: str
    num_warps: int


def coupling(matrix: torch.Tensor) -> Coupling:
    """Large tiles if there are enough of them to fill a GPU.

    On NVIDIA, three TF32 products make one of fp32 accuracy, at twice the rate of the fp32 units. A single TF32 product
    has a relative error of up to 5e-4, which would reorder scores that are nearly equal. CDNA's matrix units multiply
    fp32. RDNA's do not, and its fp32 units need a small tile.
    """
    precision = "ieee" if on_amd() else "tf32x3"
    if on_amd() and lanes(matrix.device) == 32:
        return Coupling(64, 64, 16, precision, 8)
    if matrix.numel() >= 128 * 128 * 256:
        return Coupling(128, 128, 16, precision, 8)
    return Coupling(64, 64, 32, precision, 4)
