"""Block sizes and warps of the Triton bodies that read or write packed weights (see also :mod:`.launch`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from . import launch


@dataclass(frozen=True)
class UnpackNm:
    """Tile of ``unpack_nm``, and of ``pack_cutlass`` on the way back.

    Attributes:
        block_rows: rows of a program.
        vector: values of a thread in one access.
        threads: side by side along a row.
    """

    block_rows: int
    vector: int
    threads: int


def unpack_nm(values: torch.Tensor, cols: int) -> UnpackNm:
    """One 16-byte access of values a thread, and the two of weights that belong to them."""
    threads = launch.WARPS * launch.lanes(values.device)
    across = launch.narrowest(
        math.ceil(cols / (2 * launch.vector(values))), tuple(threads >> k for k in range(5) if threads >> k)
    )
    return UnpackNm(threads // across, launch.vector(values), across)


@dataclass(frozen=True)
class NmLinear:
    """Tile of ``nm_linear``.

    Attributes:
        tokens: rows of tokens that share a read of the weight.
        block_rows: outputs of a program, which share a read of the tokens.
        vector: values of a thread in one access.
        threads: of a program, side by side along the inputs.
        num_warps: threads over the lanes of a warp.
    """

    tokens: int
    block_rows: int
    vector: int
    threads: int
    num_warps: int


def nm_linear(values: torch.Tensor, n_tokens: int, cols: int) -> NmLinear:
    """Enough warps to hide the latency of memory four times over, by splitting the inputs of an output among the warps
    of a program; fewer outputs a program where the matrix is narrow."""
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
class NmLinearDot:
    """Tile of ``nm_linear_dot``.

    Attributes:
        tokens, block_rows: tokens and outputs of a program.
        words: words of metadata of a row in one trip, each with the 32 inputs around it.
        vector: values of a thread in one access.
        run: neighbouring inputs that a thread of the matrix units wants.
        splits: programs that share out the inputs.
        num_warps: of a program.
        num_stages: buffers of loads, the one in use among them.
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
    """64 outputs a program, which read half as much of up to 32 tokens as of the weight, from the cache, and splits of
    four trips at least until there are enough warps: a thread has eight accesses of 16 bytes under way.

    Two warps a program, since four would choose Hopper's units for warp groups, which read the weight from shared
    memory. Four threads hold a row, with a word of metadata each.
    """
    words, block_rows, num_warps = 4, 64, 2
    tokens = 16 if n_tokens <= 16 or values.element_size() == 4 else 32
    programs = math.ceil(values.shape[0] / block_rows) * math.ceil(n_tokens / tokens)
    trips = math.ceil(values.shape[1] / (16 * words))
    splits = max(1, min(trips // 4, launch.MOST_WARPS // (programs * num_warps)))
    run = 4 if values.element_size() == 2 else 2
    return NmLinearDot(tokens, block_rows, words, launch.vector(values), run, splits, num_warps, 2)


def suits_nm_linear_dot(tokens: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether that takes less than ``nm_linear``'s own body, which reads 2:4 ``values`` once for four tokens.

    It multiplies by sixteen tokens or more, whatever their number: on matrix units, or in fp32 on the fp32 units, for
    which two reads of the weight are as good. Rows that are not aligned are too much for it, and so are the registers
    of RDNA and of NVIDIA's GPUs before Ampere, where it spills.
    """
    least = 9 if values.element_size() == 4 else 3
    aligned = tokens.shape[1] % 16 == 0 and tokens.stride(0) % 16 == 0
    if len(tokens) < least or not aligned or launch.before_ampere(values.device):
        return False
    return not (launch.on_amd() and launch.lanes(values.device) == 32)


def within_grid(tokens: torch.Tensor, outputs: torch.Tensor, of_program: int) -> Iterable[tuple[torch.Tensor, ...]]:
    """Tokens and their outputs in pieces of which each fits into one launch, ``of_program`` tokens to a program."""
    most = launch.MOST_ALONG_Y * of_program
    if len(tokens) <= most:
        return ((tokens, outputs),)
    return zip(tokens.split(most), outputs.split(most), strict=True)
