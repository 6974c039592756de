"""The common form of all scores.

    score_ij = |W_ij|^power * (row_i + col_j) * scale_j * coupling_ij

computed in fp32, from left to right; absent factors are 1. A metric computes these terms. The selection kernels read
the terms and do not depend on the metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .errors import ArgumentError
from .finite_check import FiniteCheck
from .triton_import import tl, triton


@dataclass(frozen=True)
class ScoreTerms:
    """Factors of a score: fp32, contiguous, finite, 0 or more, and on the weight's device.

    On the CPU, selections reject terms that are out of range. On a GPU they do not check, since a check would
    synchronize; :func:`~ace_triton.prune.prune_linear` checks on every device.

    Attributes:
        row: [out_features], added to ``col``. If only one of ``row`` and ``col`` is None, it counts as 0.
        col: [in_features], added to ``row``. If both are None, the factor is 1.
        scale: [in_features], or None for 1.
        coupling: [out_features, in_features], or None for 1.
        power: 1 or 2, the exponent of the weight's magnitude.
        finite: what the launches that computed these terms found out about them, and about the weight that they read;
            None if they checked nothing.
        checked: True if all terms are known to be in range, so that selections need not check them.

    Raises:
        ArgumentError: if ``power`` is invalid, or if a term is not a contiguous fp32 tensor.
    """

    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    coupling: torch.Tensor | None = None
    power: int = 1
    finite: FiniteCheck | None = field(default=None, repr=False, compare=False)
    checked: bool = field(default=False, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ArgumentError(f"power must be 1 or 2, got {self.power!r}")
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ArgumentError(
                    f"score term {name!r} must be a contiguous float32 tensor, got {tensor.dtype}: "
                    "use .float().contiguous()"
                )

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The terms that are not None, by name."""
        named = {"row": self.row, "col": self.col, "scale": self.scale, "coupling": self.coupling}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def vouch(self) -> None:
        """Mark all terms as checked: finite and 0 or more."""
        object.__setattr__(self, "checked", True)

    def check_range(self) -> None:
        """Raise ArgumentError if a term contains NaN, infinity or a negative number; synchronizes a GPU."""
        for name, tensor in self.tensors.items():
            if not self.checked and not tensor.is_meta and not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ArgumentError(
                    f"score term {name!r} contains NaN, infinity or a negative number: all factors of a score must be "
                    "finite and at least 0"
                )

    def check_shape(self, weight: torch.Tensor) -> None:
        """Raise ArgumentError if a term's shape or device does not fit ``weight`` [out_features, in_features]."""
        if weight.dim() != 2:
            raise ArgumentError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
        out_features, in_features = shape = weight.shape
        device = weight.device
        for name, tensor in self.tensors.items():
            expected = shape if name == "coupling" else (out_features if name == "row" else in_features,)
            if tensor.shape != expected:
                raise ArgumentError(
                    f"score term {name!r} has shape {tuple(tensor.shape)}, but a weight of shape "
                    f"{tuple(shape)} needs {tuple(expected)}"
                )
            if tensor.device != device:
                raise ArgumentError(
                    f"score term {name!r} is on {tensor.device}, the weight on {weight.device}: move one of them"
                )


def scores_reference(weight: torch.Tensor, terms: ScoreTerms) -> torch.Tensor:
    """The scores [out_features, in_features] in fp32, with the factors in the order that all kernels use."""
    terms.check_shape(weight)
    score = weight.detach().float().abs()
    if terms.power == 2:
        score = score * score
    if terms.row is not None and terms.col is not None:
        score = score * (terms.row[:, None] + terms.col[None, :])
    elif terms.row is not None:
        score = score * terms.row[:, None]
    elif terms.col is not None:
        score = score * terms.col[None, :]
    if terms.scale is not None:
        score = score * terms.scale[None, :]
    if terms.coupling is not None:
        score = score * terms.coupling
    return score


@triton.jit
def score(weight, row, col, scale, coupling, POWER: tl.constexpr):
    """The scores of a tile of fp32 weights in a Triton kernel; absent factors are None."""
    value = tl.abs(weight)
    if POWER == 2:
        value = value * value
    if row is not None:
        if col is not None:
            value = value * (row + col)
        else:
            value = value * row
    elif col is not None:
        value = value * col
    if scale is not None:
        value = value * scale
    if coupling is not None:
        value = value * coupling
    return value
