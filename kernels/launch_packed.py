"""Block sizes and warps of the Triton kernels that read or write packed weights (see also :mod:`.launch`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from . import launch


@dataclass(frozen=True)
class UnpackNm:
    """Tile of ``unpack_nm`` and of ``pack_cutlass``.

    Attributes:
        block_rows: rows per program.
        vector: packed values per thread and access.
        threads: threads side by side along a row.
    """

    block_rows: int
    vector: int
    threads: int


def unpack_nm(values: torch.Tensor, cols: int) -> UnpackNm:
    """One 16-byte access of packed values per thread, and the two accesses of weights that belong to them."""
    threads = launch.WARPS * launch.lanes(values.device)
    across = launch.narrowest(
        math.ceil(cols / (2 * launch.vector(values))), tuple(threads >> k for k in range(5) if threads >> k)
    )
    return UnpackNm(threads // across, launch.vector(values), across)


@dataclass(frozen=True)
class NmLinear:
    """Tile of ``nm_linear``.

    Attributes:
        tokens: tokens that share a read of the weight.
        block_rows: outputs per program, which share a read of the tokens.
        vector: packed values per thread and access.
        threads: threads per program, side by side along the inputs.
        num_warps: warps per program.
    """

    tokens: int
    block_rows: int
    vector: int
    threads: int
    num_warps: int


def nm_linear(values: torch.Tensor, n_tokens: int, cols: int) -> NmLinear:
    """Four times the warps that hide memory latency. To get them, the warps of a program share the inputs of an output,
    and a program takes fewer outputs if the weight has few rows."""
    block_rows = 4
    while block_rows > 1 and values.shape[0] // block_rows < launch.MOST_WARPS // 8:
        block_rows //= 2
    programs = math.ceil(values.shape[0] / block_rows)
    one_warp = 2 * launch.vector(values) * launch.lanes(values.device)
    num_warps = 1
    while num_warps < 8 and programs * num_warps < 4 * launch.MOST_WARPS and num_warps * one_warp < cols:
        num_warps *= 2
    tokens = min(4, 1 << (n_tokens - 1).bit_length())
    return NmLinear(tokens, block_rows, launch.vector(values), num_warps * launch.lanes(values.device), num_warps)


@dataclass(frozen=True)
class RowsLinear:
    """Tile of ``rows_linear`` and of ``unpack_rows``.

    Attributes:
        tokens: tokens that share a read of the weight.
        block_rows: outputs per program, which share a read of the tokens.
        words: words of metadata per row and trip; each describes 32 inputs.
        num_warps: warps per program.
    """

    tokens: int
    block_rows: int
    words: int
    num_warps: int


def rows_linear(meta: torch.Tensor, n_tokens: int) -> RowsLinear:
    """As for ``nm_linear``, with four inputs per thread and row."""
    rows, words = meta.shape
    block_rows = 4
    while block_rows > 1 and rows // block_rows < launch.MOST_WARPS // 8:
        block_rows //= 2
    of_warp = max(1, 4 * launch.lanes(meta.device) // 32)
    num_warps = 1
    while num_warps < 8 and rows // block_rows * num_warps < 4 * launch.MOST_WARPS and num_warps * of_warp < words:
        num_warps *= 2
    tokens = min(4, 1 << max(n_tokens - 1, 0).bit_length())
    return RowsLinear(tokens, block_rows, num_warps * of_warp, num_warps)


@dataclass(frozen=True)
class NmLinearDot:
    """Tile of ``nm_linear_dot``.

    Attributes:
        tokens, block_rows: tokens and outputs per program.
        words: words of metadata per row and trip; each describes 32 inputs.
        vector: packed values per thread and access.
        run: neighboring inputs that a thread supplies to the matrix units.
        splits: number of programs among which the inputs are split.
        num_warps: warps per program.
        num_stages: buffers for loads, including the one in use.
    """

    tokens: int
    block_rows: int
    words: int
    vector: int
    run: int
    splits: int
    num_warps: int
    num_stages: int


def nm_linear_dot(values: torch.Tensor, n_tokens: int) -> NmLinearDot:
    """64 outputs per program, and splits of at least four trips until there are enough warps.

    A program reads half as many bytes of its up to 32 tokens (from cache) as of the weight. A thread has eight 16-byte
    accesses in flight. Programs have two warps: with four, Triton would use Hopper's warp-group instructions, which
    read the weight from shared memory. Four threads hold a row, each with one word of metadata.
    """
    words, block_rows, num_warps = 4, 64, 2
    tokens = 16 if n_tokens <= 16 or values.element_size() == 4 else 32
    programs = math.ceil(values.shape[0] / block_rows) * math.ceil(n_tokens / tokens)
    trips = math.ceil(values.shape[1] / (16 * words))
    splits = max(1, min(trips // 4, launch.MOST_WARPS // (programs * num_warps)))
    run = 4 if values.element_size() == 2 else 2
    return NmLinearDot(tokens, block_rows, words, launch.vector(values), run, splits, num_warps, 2)


def suits_nm_linear_dot(tokens: torch.Tensor, values: torch.Tensor) -> bool:
    """True if ``nm_linear_dot`` is faster than ``nm_linear``'s own kernel, which reads 2:4 ``values`` once per four
    tokens.

    ``nm_linear_dot`` always multiplies by at least sixteen tokens: on matrix units, or for fp32 on the fp32 units, at
    the cost of about two reads of the weight. It needs aligned rows. On RDNA and on NVIDIA GPUs before Ampere it would
    spill registers.
    """
    least = 9 if values.element_size() == 4 else 3
    aligned = tokens.shape[1] % 16 == 0 and tokens.stride(0) % 16 == 0
    if len(tokens) < least or not aligned or launch.before_ampere(values.device):
        return False
    return not (launch.on_amd() and launch.lanes(values.device) == 32)


@dataclass(frozen=True)
class NmLinearFewBits:
    """Tile of ``nm_linear_few_bits``.

    Attributes:
        tokens, block_rows: tokens and outputs per program.
        splits: number of programs among which the inputs are split.
        num_warps: warps per program.
    """

    tokens: int
    block_rows: int
    splits: int
    num_warps: int


def nm_linear_few_bits(values: torch.Tensor, n_tokens: int, cols: int) -> NmLinearFewBits:
    """32 outputs per program, with 16 weights per thread and trip, and splits until there are enough warps.

    A trip has one word of metadata per output, so splits of at least eight trips.
    """
    tokens, block_rows, num_warps = 16 if n_tokens <= 16 else 32, 32, 2
    programs = math.ceil(values.shape[0] / block_rows) * math.ceil(n_tokens / tokens)
    splits = max(1, min(math.ceil(cols / 32) // 8, 2 * launch.MOST_WARPS // (programs * num_warps)))
    return NmLinearFewBits(tokens, block_rows, splits, num_warps)


def suits_nm_linear_few_bits(tokens: torch.Tensor) -> bool:
    """True if ``nm_linear_few_bits`` is faster than ``nm_linear``'s own kernel, which expands the weight once per four
    tokens. It needs matrix units for the tokens' dtype."""
    if len(tokens) <= 8 or tokens.dtype == torch.float32 or launch.before_ampere(tokens.device):
        return False
    return not (launch.on_amd() and launch.lanes(tokens.device) == 32)


@dataclass(frozen=True)
class NmLinearMma:
    """Tile of ``nm_linear_mma``.

    Attributes:
        row_tiles: tiles of 16 outputs per program, which share the loads of the tokens.
        token_tiles: tiles of 8 tokens per program, which share the loads of the weight.
        spans: spans of 64 or 128 inputs per warp and trip; the loads of a trip are in flight together.
        num_warps: warps per program, among which the inputs are split.
    """

    row_tiles: int
    token_tiles: int
    spans: int
    num_warps: int


def nm_linear_mma(rows: int, spans_of_row: int, n_tokens: int, bits: int | None) -> NmLinearMma:
    """Up to 64 tokens share a read of the weight, so that it is read once.

    Up to 8 tokens, the loads of the weight count, and a thread has at least 64 bytes of it in flight. More tokens than
    that are read by every program (from cache), so programs take 32 outputs if there are enough of them. Values of 8 or
    4 bits leave less time for instructions, so their programs take 32 outputs for few tokens too; for more than 32, the
    expanded values of 32 outputs and their sums would not fit the registers.
    """
    token_tiles = min(8, 1 << (math.ceil(n_tokens / 8) - 1).bit_length())
    shared = token_tiles > 1 if bits is None else token_tiles < 8
    row_tiles = 2 if shared and rows >= 32 * launch.MOST_WARPS // 8 else 1
    spans = 1 if token_tiles > 1 else 4 if bits == 4 else 2
    num_warps = 1
    while num_warps < 8 and num_warps * spans < spans_of_row:
        num_warps *= 2
    return NmLinearMma(row_tiles, token_tiles, spans, num_warps)


def has_sparse_units(device: torch.device) -> bool:
    """True for NVIDIA GPUs from Ampere on, whose matrix units multiply 2:4 weights."""
    return not launch.on_amd() and not launch.before_ampere(device)


def within_grid(tokens: torch.Tensor, outputs: torch.Tensor, of_program: int) -> Iterable[tuple[torch.Tensor, ...]]:
    """Split tokens and their outputs into pieces that fit one launch, with ``of_program`` tokens per program."""
    most = launch.MOST_ALONG_Y * of_program
    if len(tokens) <= most:
        return ((tokens, outputs),)
    return zip(tokens.split(most), outputs.split(most), strict=True)
