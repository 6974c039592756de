"""Block sizes and warps of the Triton kernels, chosen from shape, dtype and device; nothing is tuned at run time.

Those of sums are in :mod:`.launch_sums`, those of packed weights in :mod:`.launch_packed`. These files give the reason
for each choice, based on machine code (docs/kernels.md). Kernels hold no such constants, so a constant can change
without its kernel.
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

# The largest number of programs along the second and third axis of a grid.
MOST_ALONG_Y = 65535

# Warps per program whose threads add up one result: with more warps per program, fewer partial results are written.
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


def vector(tensor: torch.Tensor) -> int:
    """Elements of one 16-byte access."""
    return ACCESS_BYTES // tensor.element_size()


def is_aligned(tensor: torch.Tensor) -> bool:
    """True if the first element starts a 16-byte access, which kernels are specialized for."""
    return tensor.data_ptr() % ACCESS_BYTES == 0


def has_memory(tensor: torch.Tensor) -> bool:
    """True if the tensor has an address: one without elements, or whose storage was freed, has none."""
    return tensor.data_ptr() != 0


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
