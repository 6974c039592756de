"""The one form that every score of this family takes.

    score_ij = |W_ij|^power * (row_i + col_j) * scale_j * coupling_ij

computed in fp32, from left to right, an absent factor left out. A metric is whatever fills these
terms in; the selection kernels read them and never know which metric it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .errors import ArgumentError
from .triton_import import tl, triton


@dataclass(frozen=True)
class ScoreTerms:
    """Factors of a score, all fp32, contiguous, finite, 0 or more, and on the weight's device.

    Selections refuse other numbers on the CPU. On a GPU they do not look, since that would wait for it;
    :func:`~ace_triton.prune.prune_linear` looks on every device.

    Attributes:
        row: [out_features], added to ``col``; None counts as 0 beside ``col``.
        col: [in_features], added to ``row``; with both None the factor is 1.
        scale: [in_features], or None for 1.
        coupling: [out_features, in_features], or None for 1.
        power: 1 or 2, the exponent of the weight's magnitude.
        not_finite: int32 [n], one of them other than 0 if a row, col or scale that was made for these terms holds
            NaN or infinity, or the scale a number below 0; None if nobody looked. Says nothing of vectors that layers
            share, nor of ``coupling``.
        checked: True if all terms are known to be in range, so that selections need not look.
    """

    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    coupling: torch.Tensor | None = None
    power: int = 1
    not_finite: torch.Tensor | None = None
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
        """The terms that are there, by name."""
        named = {"row": self.row, "col": self.col, "scale": self.scale, "coupling": self.coupling}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def vouch(self) -> None:
        """Note that all terms are known to be finite and 0 or more."""
        object.__setattr__(self, "checked", True)

    def check_range(self) -> None:
        """Raise ValueError if a term holds NaN, infinity or a number below 0; on a GPU this waits for it."""
        for name, tensor in self.tensors.items():
            if not self.checked and not tensor.is_meta and not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ArgumentError(
                    f"score term {name!r} holds NaN, infinity or a number below 0: a score is a product of finite "
                    "factors, 0 or more"
                )

    def check_shape(self, weight: torch.Tensor) -> None:
        """Raise ValueError where a term does not fit ``weight`` [out_features, in_features]."""
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
    """The scores [out_features, in_features] in fp32, in the order of factors that every body uses."""
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
    """The same for a tile of fp32 weights in a Triton body; an absent factor is None."""
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
