"""The one form that every score of this family takes.

    score_ij = |W_ij|^power * (row_i + col_j) * scale_j * coupling_ij

computed in fp32, from left to right, an absent factor left out. A metric is whatever fills these
terms in; the selection kernels read them and never know which metric it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .triton_import import tl, triton


@dataclass(frozen=True)
class ScoreTerms:
    """Factors of a score, all fp32, contiguous, non-negative and on the weight's device.

    Attributes:
        row: [out_features], added to ``col``; None counts as 0 beside ``col``.
        col: [in_features], added to ``row``; with both None the factor is 1.
        scale: [in_features], or None for 1.
        coupling: [out_features, in_features], or None for 1.
        power: 1 or 2, the exponent of the weight's magnitude.
        not_finite: int32 [n], one of them other than 0 where a row, col or scale that was made for these terms holds
            NaN or infinity; None where nobody looked. Says nothing of vectors that layers share, nor of ``coupling``.
    """

    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    coupling: torch.Tensor | None = None
    power: int = 1
    not_finite: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"score term {name!r} must be a contiguous float32 tensor, got {tensor.dtype}: "
                    "use .float().contiguous()"
                )

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The terms that are there, by name."""
        named = {"row": self.row, "col": self.col, "scale": self.scale, "coupling": self.coupling}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def check_shape(self, weight: torch.Tensor) -> None:
        """Raise ValueError where a term does not fit ``weight`` [out_features, in_features]."""
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
        out_features, in_features = weight.shape
        expected = {
            "row": (out_features,),
            "col": (in_features,),
            "scale": (in_features,),
            "coupling": (out_features, in_features),
        }
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"score term {name!r} has shape {tuple(tensor.shape)}, but a weight of shape "
                    f"{tuple(weight.shape)} needs {expected[name]}"
                )
            if tensor.device != weight.device:
                raise ValueError(
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
