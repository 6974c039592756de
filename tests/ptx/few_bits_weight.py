"""2:4 weights of 8 or 4 bits whose products with small integers are exact in fp32."""

from __future__ import annotations

import torch

from ace_triton.kernels import few_bits
from ace_triton.kernels.packed_nm import PackedNM

PAIRS = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100])
"""Every choice of two inputs of a group."""


def few_bits_weight(shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, seed: int = 0) -> PackedNM:
    """Random integers, all of which occur if there are enough, and powers of two as the weight of a step."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    largest = few_bits.LARGEST[bits]
    steps = torch.randint(-largest, largest + 1, (rows, cols // 2), generator=generator).float()
    kept = PAIRS[torch.randint(len(PAIRS), (rows, cols // 32, 8), generator=generator)]
    meta = (kept << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    powers = 2.0 ** torch.randint(-2, 3, (rows, -(-cols // group)), generator=generator)
    packed = PackedNM(few_bits.stored(steps, bits), meta, 2, 4, shape, (largest * powers).to(dtype), group)
    packed.check()
    return packed
