"""join_gains: how much more score a group of channels retains if a candidate channel joins it.

    G_gy = sum_i max(s_iy - t_ig, 0)

s_iy is the score of candidate y in row i. t_ig is the n-th largest score of group g's other channels in that row, which
y must exceed to be among the n highest. Each row, group and candidate takes three instructions (a matrix product takes
one), so the kernel is bound by arithmetic. It reads rows * (groups + candidates) numbers.
"""

from __future__ import annotations

import torch

from . import cpu, launch
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

STRIP = 128
"""Rows per partial sum, so that fp32 rounding errors do not grow with the number of rows."""

REFERENCE_ELEMENTS = 2**24


def join_gains(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Gains of every pool, fp32 [n_pools, groups, candidates].

    Args:
        candidates: fp32 [n_pools, rows, candidates].
        thresholds: fp32 [n_pools, rows, groups].

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_join(candidates, thresholds)
    return JOIN_GAINS.on(candidates, thresholds)(candidates, thresholds)


def join_gains_reference(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The gains, computed with plain torch in fp64, a few groups at a time."""
    n_pools, groups, n_candidates = candidates.shape[0], thresholds.shape[2], candidates.shape[2]
    gains = candidates.new_zeros(n_pools, groups, n_candidates)
    at_once = max(1, REFERENCE_ELEMENTS // max(1, candidates.numel()))
    wide = candidates.double()[:, :, None, :]
    for first in range(0, groups, at_once):
        chunk = thresholds[:, :, first : first + at_once, None]
        gains[:, first : first + at_once] = (wide - chunk).clamp_(min=0).sum(1)
    return gains


def check_join(candidates: torch.Tensor, thresholds: torch.Tensor) -> None:
    """Raise ArgumentError if a shape or dtype does not fit."""
    fits = candidates.dim() == thresholds.dim() == 3 and candidates.shape[:2] == thresholds.shape[:2]
    if not fits:
        raise ArgumentError(
            "candidates must be [n_pools, rows, candidates] and thresholds [n_pools, rows, groups], got "
            f"{tuple(candidates.shape)} and {tuple(thresholds.shape)}"
        )
    if candidates.dtype != torch.float32 or thresholds.dtype != torch.float32:
        raise ArgumentError(f"scores must be float32, got {candidates.dtype} and {thresholds.dtype}: use .float()")


def _join_gains_cpu(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return cpu.join_gains(candidates.contiguous(), thresholds.contiguous())


def _join_gains_triton(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    candidates, thresholds = candidates.contiguous(), thresholds.contiguous()
    n_pools, rows, n_candidates = candidates.shape
    groups = thresholds.shape[2]
    gains = torch.empty(n_pools, groups, n_candidates, dtype=torch.float32, device=candidates.device)
    if gains.numel():
        tile = launch.join_gains(groups, n_candidates)
        tiles = triton.cdiv(n_candidates, tile.block_cols) * triton.cdiv(groups, tile.block_rows)
        for first in range(0, n_pools, launch.MOST_ALONG_Y):
            pools = slice(first, min(first + launch.MOST_ALONG_Y, n_pools))
            _join_gains_body[(tiles, pools.stop - first)](
                *(candidates[pools], thresholds[pools], gains[pools], rows, groups, n_candidates),
                STRIP=STRIP,
                BLOCK_GROUPS=tile.block_rows,
                BLOCK_CANDIDATES=tile.block_cols,
                num_warps=tile.num_warps,
            )
    return gains


def _work(candidates: torch.Tensor, thresholds: torch.Tensor) -> Work:
    n_pools, rows, groups = thresholds.shape
    pairs = n_pools * groups * candidates.shape[2]
    return Work(bytes_of(candidates, thresholds) + 4 * pairs, 2 * rows * pairs)


JOIN_GAINS = Op("join_gains", _work, join_gains_reference, _join_gains_cpu, _join_gains_triton)


@triton.jit(launch_metadata=launch_metadata)
def _join_gains_body(
    candidates_ptr,
    thresholds_ptr,
    gains_ptr,
    rows,
    groups,
    n_candidates,
    STRIP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
):
    """A tile of groups and candidates of one pool; each pair's sum stays in a register."""
    across = tl.cdiv(n_candidates, BLOCK_CANDIDATES)
    pool = tl.program_id(1).to(tl.int64)
    g = tl.program_id(0) // across * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    y = tl.program_id(0) % across * BLOCK_CANDIDATES + tl.arange(0, BLOCK_CANDIDATES)[None, :]
    score_line = candidates_ptr + pool * rows * n_candidates + y
    threshold_line = thresholds_ptr + pool * rows * groups + g
    total = tl.zeros([BLOCK_GROUPS, BLOCK_CANDIDATES], tl.float32)
    for first in tl.range(0, rows, STRIP):
        strip = tl.zeros([BLOCK_GROUPS, BLOCK_CANDIDATES], tl.float32)
        for _ in tl.range(first, tl.minimum(first + STRIP, rows)):
            s = tl.load(score_line, mask=y < n_candidates, other=0.0)
            t = tl.load(threshold_line, mask=g < groups, other=0.0)
            strip += tl.maximum(s - t, 0.0)
            score_line += n_candidates
            threshold_line += groups
        total += strip
    tl.store(gains_ptr + (pool * groups + g) * n_candidates + y, total, mask=(g < groups) & (y < n_candidates))
