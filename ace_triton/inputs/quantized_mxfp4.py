"""MXFP4: 4-bit floats in blocks of 32 that share a power of two, as gpt-oss stores its experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .quantized_formats import Parts

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The value of each code without its sign, which is the highest of its 4 bits (E2M1)."""

LARGEST_SCALE = 254
"""The largest stored exponent (E8M0): s stands for 2^(s - 127), and 255 for NaN."""


@dataclass(frozen=True)
class Mxfp4:
    """The experts of a layer, as transformers stores them for gpt-oss.

    ``gate_up_proj_blocks`` is uint8 [experts, out, blocks, 16]: two codes in a byte, the lower bits first.
    ``gate_up_proj_scales`` is uint8 [experts, out, blocks], the exponent of each block. The dense parameter
    ``gate_up_proj`` is [experts, in, out].
    """

    marks = ("_blocks",)
    parts = ("_blocks", "_scales")
    ignored = ()
    weight_name = ""

    def weight(self, parts: Parts) -> torch.Tensor:
        """The dense parameter [experts, in, out] in bf16, which holds all its values exactly."""
        blocks, scales = parts["_blocks"], parts.get("_scales")
        if scales is None:
            raise CheckpointError("it lacks its scales")
        if blocks.dtype != torch.uint8 or blocks.dim() != 4 or not blocks.numel():
            raise CheckpointError(f"its blocks are {blocks.dtype} {tuple(blocks.shape)}, not uint8 in 4 dimensions")
        if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"its scales are {scales.dtype} {tuple(scales.shape)} and not torch.uint8 {tuple(blocks.shape[:3])}"
            )
        if int(scales.max()) > LARGEST_SCALE:
            raise CheckpointError("its scales have NaN")
        experts, rows, groups, size = blocks.shape
        dense = torch.empty(experts, groups * size * 2, rows, dtype=torch.bfloat16, device=blocks.device)
        table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float32, device=blocks.device)
        for into, codes, exponents in zip(dense, blocks, scales, strict=True):
            values = table[torch.stack([codes & 15, codes >> 4], dim=-1).int()].flatten(-2)
            into.copy_((values * powers_of_two(exponents).unsqueeze(-1)).flatten(1).t())
        if not dense.isfinite().all():
            raise CheckpointError("its values exceed the range of bfloat16")
        return dense


def powers_of_two(stored: torch.Tensor) -> torch.Tensor:
    """2^(s - 127) for exponents s from 0 to 254, exactly: s is the exponent field of a fp32 number."""
    field = stored.int() << 23
    return torch.where(stored == 0, 1 << 22, field).int().view(torch.float32)
