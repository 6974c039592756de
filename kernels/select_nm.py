"""select_nm: score and keep the best n of every m, in one read and one write of the weight.

    rank_k = #{l in the group : s_l < s_k, or s_l = s_k and l < k};  kept where rank_k >= m - n

Among equal scores the lower index is pruned first. Bytes per weight of e bytes: e read, e written in
place (or 1 for a mask, 1/8 for a bit mask), and the score's vectors once.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu
from .backend import choose_backend
from .score_terms import ScoreTerms, scores_reference

GROUP_SIZES = (2, 4, 8, 16, 32)

Axis = Literal["in", "out"]
Output = Literal["weight", "mask", "bits"]


def select_nm(
    weight: torch.Tensor,
    terms: ScoreTerms,
    n: int,
    m: int,
    *,
    axis: Axis = "in",
    output: Output = "weight",
) -> torch.Tensor:
    """Keep the n weights with the highest score in every group of m.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        terms: the score's factors.
        n: how many of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides the axis that is grouped.
        axis: groups of consecutive inputs of one row ("in", what sparse tensor cores need), or of
            consecutive outputs of one column ("out").
        output: "weight" writes +0.0 over the pruned weights in place and returns ``weight``; "mask"
            returns bool [out_features, in_features], True where kept; "bits" returns uint8
            [out_features, ceil(in_features / 8)], bit j % 8 of byte j // 8 set where kept. Only
            "weight" changes ``weight``.

    Raises:
        ValueError: a pattern, shape or dtype that cannot be served, with what would be.
    """
    check_selection(weight, terms, output)
    check_pattern(weight, n, m, axis)
    backend = choose_backend(weight, *terms.tensors().values())
    if backend == "cpu":
        return cpu.select_nm(weight, terms, n, m, axis, output)
    return select_nm_reference(weight, terms, n, m, axis=axis, output=output)


def select_nm_reference(
    weight: torch.Tensor,
    terms: ScoreTerms,
    n: int,
    m: int,
    *,
    axis: Axis = "in",
    output: Output = "weight",
) -> torch.Tensor:
    """The same in plain torch, by a stable sort of every group."""
    scores = scores_reference(weight, terms)
    grouped = scores if axis == "in" else scores.t()
    groups = grouped.reshape(grouped.shape[0], grouped.shape[1] // m, m)
    pruned_first = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(-1, pruned_first[..., : m - n], False)
    keep = keep.reshape(grouped.shape)
    return deliver(weight, keep if axis == "in" else keep.t(), output)


def deliver(weight: torch.Tensor, keep: torch.Tensor, output: Output) -> torch.Tensor:
    """Turn a bool mask into what the caller asked for."""
    if output == "mask":
        return keep.contiguous()
    if output == "bits":
        return pack_bits(keep)
    with torch.no_grad():
        weight.masked_fill_(~keep, 0.0)
    return weight


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """Bool [rows, cols] -> uint8 [rows, ceil(cols / 8)], lowest bit first; spare bits are 0."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    place = (2 ** torch.arange(8, device=keep.device)).to(torch.uint8)
    return (padded.reshape(keep.shape[0], padded.shape[1] // 8, 8) * place).sum(-1, dtype=torch.uint8)


def check_selection(weight: torch.Tensor, terms: ScoreTerms, output: Output) -> None:
    """Raise ValueError for what no selection serves."""
    terms.check_shape(weight)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if output not in ("weight", "mask", "bits"):
        raise ValueError(f"output must be 'weight', 'mask' or 'bits', got {output!r}")


def check_pattern(weight: torch.Tensor, n: int, m: int, axis: Axis) -> None:
    """Raise ValueError where n:m cannot be laid over ``weight`` along ``axis``."""
    if axis not in ("in", "out"):
        raise ValueError(f"axis must be 'in' or 'out', got {axis!r}")
    if m not in GROUP_SIZES:
        raise ValueError(f"m must be one of {GROUP_SIZES}, got {m!r}")
    if not 0 < n < m:
        raise ValueError(f"n of n:m must lie between 1 and {m - 1}, got {n!r}")
    size = weight.shape[1] if axis == "in" else weight.shape[0]
    if size % m:
        raise ValueError(
            f"{n}:{m} groups along {axis!r} need a multiple of {m}, but the weight has {size} "
            f"{'inputs' if axis == 'in' else 'outputs'} (shape {tuple(weight.shape)})"
        )
