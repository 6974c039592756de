"""A model of mma.sp.m16n8k32 with 16-bit elements, lane by lane, from NVIDIA's PTX manual (version 8.7, 9.7.14.6).

Every lane holds words of 32 bits. With g = lane // 4 and t = lane % 4:

    A, 16 x 32 with 2 of 4 kept: word k of a lane holds the two kept elements of row g + 8 (k % 2),
        group t + 4 (k // 2), the lower place in the lower half
    B, 32 x 8: word k holds rows 8 k + 2 t and 8 k + 2 t + 1 of column g
    C and D, 16 x 8: element k is row g + 8 (k // 2), column 2 t + k % 2
    metadata: in each quad of lanes, lane 2 * selector describes groups 0 to 3 and the lane after it groups 4 to 7: of
        row g in its lower 16 bits, of row g + 8 in its upper ones; two places of two bits a group, the lower one first
"""

from __future__ import annotations

import numpy as np
import torch

LANES = 32


def mma_sp(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, places: np.ndarray, selector: int, dtype: torch.dtype
) -> np.ndarray:
    """D = A B + C.

    Args:
        a: the operand of every lane, uint32 [4, 32].
        b: the operand of every lane, uint32 [4, 32].
        c: the operand of every lane, fp32 [4, 32].
        places: the metadata of every lane, uint32 [32].
        selector: 0 or 1.
        dtype: fp16 or bf16, of A and B.

    Returns:
        The result of every lane, fp32 [4, 32], summed in fp64 and rounded once.
    """
    left, right, sums = np.zeros((16, 32)), np.zeros((32, 8)), np.zeros((16, 8))
    kept, tokens = _two_halves(a, dtype), _two_halves(b, dtype)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for k in range(4):
            row, group = g + 8 * (k % 2), t + 4 * (k // 2)
            describes = 4 * g + 2 * selector + group // 4
            pair = int(places[describes]) >> 16 * (row // 8) + 4 * (group % 4) & 15
            low, high = pair & 3, pair >> 2
            assert low < high, f"the metadata of row {row}, group {group} are not ordered: {low}, {high}"
            left[row, 4 * group + low], left[row, 4 * group + high] = kept[k, lane]
            right[8 * k + 2 * t : 8 * k + 2 * t + 2, g] = tokens[k, lane]
            sums[g + 8 * (k // 2), 2 * t + k % 2] = c[k, lane]
    product = left @ right + sums
    result = np.empty((4, LANES), np.float32)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for k in range(4):
            result[k, lane] = product[g + 8 * (k // 2), 2 * t + k % 2]
    return result


def _two_halves(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The two numbers in every word, the one of the lower half first: fp64 [4, 32, 2]."""
    bits = torch.from_numpy(np.ascontiguousarray(words, np.uint32).view(np.int16).reshape(*words.shape, 2))
    return bits.view(dtype).double().numpy()
