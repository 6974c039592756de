"""The tensors of edge cases: zeros of the smallest and the oddest shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ace_triton.kernels.score_terms import ScoreTerms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

ALL_TERMS = ("row", "col", "scale", "coupling")
VECTORS = ("row", "col", "scale")
WEIGHTS = ((1, 4), (1, 32), (2, 4), (1, 36), (33, 48), (1, 4096))
"""Shapes of weights that 2:4 takes."""

MATRICES = ((1, 1), (1, 16), (17, 1), (5, 4096))
"""Shapes of tokens, outputs, logits and parameters."""

Call = Callable[[], object]


def some(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Zeros: bodies do not run in a sweep, and launchers refuse what is not n:m."""
    return torch.zeros(*shape, dtype=dtype)


def terms(rows: int, cols: int, names: tuple[str, ...]) -> ScoreTerms:
    """Terms of a weight [rows, cols]."""
    shapes = {"row": (rows,), "col": (cols,), "scale": (cols,), "coupling": (rows, cols)}
    return ScoreTerms(**{name: some(*shapes[name], dtype=FP32) for name in names})
