"""pack_nm: n:m weights in the layout of packed_nm, from a pruned weight or in the selection itself; and back.

Bytes per weight of e bytes: e read, e * n / m + 1/8 written, in one pass.
"""

from __future__ import annotations

import torch

from .pack_cutlass import pack_cutlass
from .packed_nm import LAYOUT_VERSION, PackedNM, PatternError, check_packable, refuse_first, unpack_bits
from .score_terms import ScoreTerms
from .select_nm import pack_bits, select_nm_reference

__all__ = [
    "LAYOUT_VERSION",
    "PackedNM",
    "PatternError",
    "pack_cutlass",
    "pack_nm",
    "pack_nm_reference",
    "pack_scored",
    "pack_scored_reference",
    "unpack_nm",
    "unpack_nm_reference",
]


def pack_nm(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    """Pack a weight that is n:m already.

    Args:
        weight: [out_features, in_features], fp32, fp16, bf16 or int8, at most n of every m inputs not 0.
        n: how many of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides in_features.

    Raises:
        ValueError: a pattern, shape or dtype that cannot be served, with what would be.
        PatternError: a group has more than n non-zeros; nothing is packed.
    """
    check_packable(weight, n, m)
    return pack_nm_reference(weight, n, m)


def pack_nm_reference(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    """The same in plain torch."""
    weight = weight.detach()
    rows, cols = weight.shape
    not_zero = (weight != 0).reshape(rows, cols // m, m)
    refuse_first(not_zero.sum(-1).flatten(), n, m, cols)
    negative = torch.signbit(weight).reshape(not_zero.shape)
    rank = torch.where(not_zero, 2, negative.to(torch.int8))
    pruned = rank.argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones_like(not_zero).scatter_(-1, pruned, False).reshape(rows, cols)
    return packed_by(weight, keep, n, m)


def pack_scored(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    """Prune by score and pack in one pass: ``weight`` is only read, and the pruned matrix never written.

    Arguments and ValueErrors as for :func:`~ace_triton.kernels.select_nm.select_nm`. Equal to
    ``pack_nm(select_nm(weight, terms, n, m), n, m)`` where no score is NaN; where one is, equal when unpacked.
    """
    check_packable(weight, n, m)
    return pack_scored_reference(weight, terms, n, m)


def pack_scored_reference(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    """The same in plain torch."""
    return packed_by(weight.detach(), select_nm_reference(weight, terms, n, m, output="mask"), n, m)


def unpack_nm(packed: PackedNM) -> torch.Tensor:
    """The weight [out, in] that was packed, bit for bit: +0.0 where nothing was kept."""
    return unpack_nm_reference(packed)


def unpack_nm_reference(packed: PackedNM) -> torch.Tensor:
    """The same in plain torch."""
    dense = packed.values.new_zeros(packed.shape)
    return dense.masked_scatter_(unpack_bits(packed.meta)[:, : packed.shape[1]], packed.values)


def packed_by(weight: torch.Tensor, keep: torch.Tensor, n: int, m: int) -> PackedNM:
    """Pack what a mask [out, in] keeps, exactly n of every m."""
    rows, cols = weight.shape
    octets = pack_bits(keep)
    meta = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 4)).view(torch.int32)
    return PackedNM(weight[keep].reshape(rows, cols // m * n), meta, n, m, (rows, cols))
