"""pack_cutlass: 2:4 weights in the layout that CUTLASS, and so torch's semi-structured tensors, multiply from.

Of every group of four, two values and two 2-bit places, which four groups (eight in int8) share a word of; the words
are interleaved as the tensor cores read them. All of it is defined by torch.sparse._semi_structured_conversions, and
equal to its results bit by bit.
"""

from __future__ import annotations

import torch

from .packed_nm import PackedNM, refuse_first, unpack_bits

META = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int32}
"""Metadata's dtype for each dtype of the weight."""

BITS = {1: torch.int8, 2: torch.int16}
"""An integer of as many bytes."""


def pack_cutlass(weight: torch.Tensor | PackedNM) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [out, in / 2] and metadata [out, in / 16] (int16; [out, in / 32], int32, for int8) of a 2:4 weight.

    Args:
        weight: [out, in], fp16, bf16 or int8, out a multiple of 32 (16 for int8), in of 32 (64); or packed 2:4, from
            which the values and metadata are made without the dense weight between.

    Raises:
        ValueError: a shape, dtype or pattern that CUTLASS does not take.
        PatternError: a group has more than two non-zeros; torch's converter would drop one in silence.
    """
    check_cutlass(weight)
    if isinstance(weight, PackedNM):
        return pack_cutlass_reference(*four_of(weight))
    groups = weight.detach().reshape(weight.shape[0], -1, 4)
    refuse_first((groups != 0).sum(-1).flatten(), 2, 4, weight.shape[1])
    return pack_cutlass_reference(*groups.unbind(-1))


def pack_cutlass_reference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, from the members [out, in / 4] of every group."""
    meta_dtype = META[a.dtype]
    in_a, in_b, in_d = a != 0, b != 0, d != 0
    first = torch.where(in_a, 0, torch.where(in_b, 1, 2))
    both = in_a & in_b
    second = torch.where(both, 1, torch.where((in_a | in_b) & ~in_d, 2, 3))
    # As integers: torch.where changes the bits of a bf16 NaN.
    bits = [member.view(BITS[a.element_size()]) for member in (a, b, c, d)]
    low = torch.where(in_a, bits[0], torch.where(in_b, bits[1], bits[2]))
    high = torch.where(both, bits[1], torch.where(second == 2, bits[2], bits[3]))
    values = torch.stack((low, high), -1).flatten(1).view(a.dtype)
    nibbles = (first | (second << 2)).reshape(a.shape[0], -1, 2 * meta_dtype.itemsize)
    words = (nibbles << (4 * torch.arange(2 * meta_dtype.itemsize, device=a.device))).sum(-1)
    meta = words.to(meta_dtype)
    rows, cols = meta.shape
    placed = torch.empty_like(meta).flatten()
    placed[word_places(rows, cols, meta_dtype, meta.device).flatten()] = meta.flatten()
    return values, placed.reshape(rows, cols)


def word_places(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where each word [rows, cols] of metadata lies: rows dealt out in blocks, 2 x 2 swapped, columns in pairs."""
    block, ways = (32, 4) if dtype == torch.int16 else (16, 2)
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(cols, device=device)[None, :]
    i = i // block * block + i % 8 * ways + i % block // 8
    swap = (j & 1) - (i & 1)
    i, j = i + swap, j - swap
    return j // 2 * (2 * rows) + 2 * i + j % 2


def four_of(packed: PackedNM) -> tuple[torch.Tensor, ...]:
    """The members [out, in / 4] of every group of a packed 2:4 weight."""
    a, b, c, d = unpack_bits(packed.meta)[:, : packed.shape[1]].reshape(packed.shape[0], -1, 4).unbind(-1)
    bits = packed.values.view(BITS[packed.values.element_size()])
    low, high = bits[:, 0::2], bits[:, 1::2]
    members = (
        torch.where(a, low, 0),
        torch.where(b, torch.where(a, high, low), 0),
        torch.where(c, torch.where(d, low, high), 0),
        torch.where(d, high, 0),
    )
    return tuple(member.view(packed.values.dtype) for member in members)


def check_cutlass(weight: torch.Tensor | PackedNM) -> None:
    """Raise ValueError for what CUTLASS does not take."""
    if isinstance(weight, PackedNM):
        if (weight.n, weight.m) != (2, 4):
            raise ValueError(f"CUTLASS takes 2:4 alone, the weight is packed {weight.n}:{weight.m}")
        shape, dtype = weight.shape, weight.values.dtype
    else:
        shape, dtype = tuple(weight.shape), weight.dtype
    if len(shape) != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {shape}")
    if dtype not in META:
        raise ValueError(f"CUTLASS takes float16, bfloat16 and int8 here, got {dtype}: convert the weight")
    rows, cols = (16, 64) if dtype == torch.int8 else (32, 32)
    if shape[0] % rows or shape[1] % cols:
        raise ValueError(f"in {dtype} CUTLASS needs outputs a multiple of {rows}, inputs of {cols}, got shape {shape}")
