"""Block sizes and warps of every Triton body, from shape, dtype and device; nothing is tuned at run time.

Each choice is argued here, once, from machine code (docs/kernels.md), so that a kernel can be read
without its constants and a constant changed without its kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ACCESS_BYTES = 16

# Enough programs to fill every current GPU twice over; more of them only reload what a program shares.
MOST_PROGRAMS = 4096


def lanes(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).warp_size
    return 32


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
    """128 threads, each with whole groups in its registers: two accesses of 16 bytes for 2:4."""
    threads = 128
    split = min(m, vector(weight)) if axis == "in" else 1
    accesses = m // split
    held = max(vector(weight) * 2 // accesses, vector(weight) if axis == "in" else 2)
    tile = threads * held
    width = threads * min(held, vector(weight))
    rows, cols = weight.shape
    rows, cols = (rows, cols // accesses) if axis == "in" else (rows // m, cols)
    block_cols = narrowest(cols, tuple(width >> k for k in range(5)))
    block_rows = tile // block_cols
    tiles = math.ceil(rows / block_rows) * math.ceil(cols / block_cols)
    trips = min(8, max(1, tiles // MOST_PROGRAMS))
    return SelectNm(split, block_rows, block_cols, trips, threads // lanes(weight.device))
