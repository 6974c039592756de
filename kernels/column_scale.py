"""column_scale: computes the column vector of a score from a layer's statistics, in one launch.

    scale_j = (base_j sqrt(square_j / divisor) factor_j^sign)^exponent      (absent factors are 1)

For ACE (arXiv 2505.21987), square_j / divisor is CosP's exact second-order term mean_t x_tj^2 / s_t, and factor_j is
VarP's mean_s 1 / (1 - y_sj). If a metric also needs sums of the weight,
:func:`~ace_triton.kernels.weight_sums.relative_importance` computes this vector in its own second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu, launch
from .finite import new_flag, not_finite_reference, note_not_finite
from .op import Op, Work, bytes_of, launch_metadata
from .records import ColumnScale
from .triton_import import tl, triton

__all__ = [
    "CheckedScale",
    "ColumnScale",
    "checked_column_scale",
    "column_scale",
    "column_scale_reference",
    "scale_at",
]


class CheckedScale(NamedTuple):
    """A column vector and a flag that tells if it is a valid score term.

    Attributes:
        scale: fp32 [in_features].
        not_finite: int32 [1] flag, non-zero if ``scale`` contains NaN, infinity or a negative number.
    """

    scale: torch.Tensor
    not_finite: torch.Tensor


def column_scale(of: ColumnScale) -> torch.Tensor:
    """The column vector, fp32 [in_features]."""
    return checked_column_scale(of).scale


def checked_column_scale(of: ColumnScale) -> CheckedScale:
    """The column vector, with a flag that tells if it is a valid score term."""
    return COLUMN_SCALE.on(*of.vectors().values())(of)


def column_scale_reference(of: ColumnScale) -> torch.Tensor:
    """The column vector, computed with plain torch in fp64."""
    like = next(iter(of.vectors().values()))
    scale = torch.ones((), dtype=torch.float64, device=like.device) if of.base is None else of.base.double()
    if of.square is not None:
        scale = scale * (of.square / of.divisor).sqrt()
    if of.factor is not None:
        scale = scale * of.factor.double() ** of.sign
    return (scale**of.exponent).float()


def _by_reference(of: ColumnScale) -> CheckedScale:
    scale = column_scale_reference(of)
    return CheckedScale(scale, not_finite_reference(scale))


def _column_scale_cpu(of: ColumnScale) -> CheckedScale:
    return CheckedScale(*cpu.column_scale(of))


def _column_scale_triton(of: ColumnScale) -> CheckedScale:
    like, cols = next(iter(of.vectors().values())), of.in_features
    block = launch.column_scale(like)
    blocks = triton.cdiv(cols, block)
    scale = torch.empty(cols, dtype=torch.float32, device=like.device)
    found = new_flag(like.device)
    if cols:
        _scale_columns[(blocks,)](*of.rounded_parts(), scale, found, cols, **rules(of), BLOCK=block, num_warps=1)
    return CheckedScale(scale, found)


def rules(of: ColumnScale | None) -> dict[str, int]:
    """What a kernel that calls :func:`scale_at` is compiled for."""
    return {"SIGN": 1, "QUARTERS": 4} if of is None else {"SIGN": of.sign, "QUARTERS": of.quarters}


def column_scale_work(of: ColumnScale) -> Work:
    """Reads the vectors and writes one; a root and a division for the square, and one operation per further factor.

    An exponent of 0.75 takes two roots and a product, one of 0.5 a root.
    """
    operations = len(of.vectors()) - 1 + (0 if of.square is None else 2) + {4: 0, 3: 3, 2: 1}[of.quarters]
    return Work(bytes_of(*of.vectors().values()) + 4 * of.in_features, operations * of.in_features)


COLUMN_SCALE = Op("column_scale", column_scale_work, _by_reference, _column_scale_cpu, _column_scale_triton)


@triton.jit(launch_metadata=launch_metadata)
def _scale_columns(
    square_ptr,
    inverse_divisor,
    base_ptr,
    factor_ptr,
    scale_ptr,
    found_ptr,
    cols,
    SIGN: tl.constexpr,
    QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = scale_at(square_ptr, inverse_divisor, base_ptr, factor_ptr, j, j < cols, SIGN, QUARTERS)
    tl.store(scale_ptr + j, scale, mask=j < cols)
    note_not_finite(scale, found_ptr, 1, False)


@triton.jit
def scale_at(square_ptr, inverse_divisor, base_ptr, factor_ptr, j, inside, SIGN: tl.constexpr, QUARTERS: tl.constexpr):
    """The scale of columns ``j`` in a Triton kernel; 1 outside the row."""
    scale = tl.where(inside, 1.0, 1.0)
    if base_ptr is not None:
        scale = tl.load(base_ptr + j, mask=inside, other=1.0)
    if square_ptr is not None:
        square = tl.load(square_ptr + j, mask=inside, other=1.0) * inverse_divisor
        scale *= tl.sqrt_rn(square.to(tl.float32))
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + j, mask=inside, other=1.0)
        if SIGN > 0:
            scale *= factor
        else:
            scale = scale / factor
    if QUARTERS < 4:
        root = tl.sqrt_rn(scale)
        scale = root if QUARTERS == 2 else root * tl.sqrt_rn(root)
    return scale
