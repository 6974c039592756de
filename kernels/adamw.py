"""adamw: one AdamW step without weight decay on fp32 values; it also writes a rounded copy in the same pass.

g is the gradient times ``factor``, t the number of this step, b_1 and b_2 the decays of the moments (Kingma and Ba,
arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, with weight decay 0):

    m = b_1 m + (1 - b_1) g,   v = b_2 v + (1 - b_2) g^2,
    x = x - rate / (1 - b_1^t) m / (sqrt(v) / sqrt(1 - b_2^t) + eps)

With ``zeros_stay``, the gradient of a value that is 0 counts as 0, so a pruned weight whose moments are 0 stays
exactly 0. The kernel reads values, moments and gradient once, and writes values and moments once.
"""

from __future__ import annotations

import torch

from . import cpu, launch
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .records import GradientMoments, Step
from .triton_import import tl, triton

__all__ = ["GradientMoments", "Step", "adamw", "adamw_reference"]


def adamw(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    *,
    factor: torch.Tensor | None = None,
    rounded: torch.Tensor | None = None,
    zeros_stay: bool = True,
) -> None:
    """Take one optimizer step, in place.

    Args:
        values: fp32, any shape, contiguous. Moments, gradient and rounded copy must have this shape and be contiguous.
        moments: fp32; updated in place.
        gradient: fp32, fp16 or bf16.
        step: number and hyperparameters of the step.
        factor: multiplies the gradient; fp32 with one element, on the device of ``values``. None for 1.
        rounded: if given, receives the new values in its own dtype: fp32, fp16 or bf16.
        zeros_stay: treat the gradient of a value that is 0 as 0.

    Raises:
        ArgumentError: if a shape, dtype or layout does not fit.
    """
    _check(values, moments, gradient, factor, rounded)
    written = (values, moments.first, moments.second, rounded)
    take_step = ADAMW.on(*written, gradient, factor, writes=written)
    take_step(values, moments, gradient, step, factor, rounded, zeros_stay)


def adamw_reference(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    *,
    factor: torch.Tensor | None = None,
    zeros_stay: bool = True,
) -> tuple[torch.Tensor, GradientMoments]:
    """The values and moments after the step, computed with plain torch in fp64. The arguments are not changed."""
    old, first, second, slope = (of.detach().double() for of in (values, moments.first, moments.second, gradient))
    if factor is not None:
        slope = slope * factor.double()
    if zeros_stay:
        slope = torch.where(old == 0, 0.0, slope)
    rate, gain_first, gain_second, unbias, eps = step.scalars
    first = first + gain_first * (slope - first)
    second = second + gain_second * (slope.square() - second)
    return old - rate * first / (second.sqrt() * unbias + eps), GradientMoments(first, second)


def _check(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    factor: torch.Tensor | None,
    rounded: torch.Tensor | None,
) -> None:
    exact = {"values": values, "first moments": moments.first, "second moments": moments.second}
    others = {"gradient": gradient} | ({} if rounded is None else {"rounded copy": rounded})
    for what, tensor in {**exact, **others}.items():
        if tensor.shape != values.shape or not tensor.is_contiguous():
            raise ArgumentError(
                f"the {what} must be contiguous and of the values' shape {tuple(values.shape)}; "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        if what in exact and tensor.dtype != torch.float32:
            raise ArgumentError(f"the {what} must be fp32, got {tensor.dtype}")
    if factor is not None and (factor.numel() != 1 or factor.dtype != torch.float32):
        raise ArgumentError(f"the factor must be fp32 with one element, got {factor.dtype} {tuple(factor.shape)}")


def _by_reference(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    factor: torch.Tensor | None,
    rounded: torch.Tensor | None,
    zeros_stay: bool,
) -> None:
    exact, exact_moments = adamw_reference(values, moments, gradient, step, factor=factor, zeros_stay=zeros_stay)
    values.copy_(exact)
    moments.first.copy_(exact_moments.first)
    moments.second.copy_(exact_moments.second)
    if rounded is not None:
        rounded.copy_(values)


def _adamw_triton(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    factor: torch.Tensor | None,
    rounded: torch.Tensor | None,
    zeros_stay: bool,
) -> None:
    block = launch.adamw(values)
    if values.numel():
        _step[(triton.cdiv(values.numel(), block),)](
            *(values, moments.first, moments.second, gradient, factor, rounded, values.numel(), *step.scalars),
            ZEROS_STAY=zeros_stay,
            BLOCK=block,
            num_warps=launch.WARPS,
        )


def _work(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    factor: torch.Tensor | None,
    rounded: torch.Tensor | None,
    zeros_stay: bool,
) -> Work:
    read = bytes_of(values, moments.first, moments.second, gradient, factor)
    written = bytes_of(values, moments.first, moments.second, rounded)
    return Work(read + written, (13 + (factor is not None)) * values.numel())


ADAMW = Op("adamw", _work, _by_reference, cpu.adamw, _adamw_triton)


@triton.jit(launch_metadata=launch_metadata)
def _step(
    values_ptr,
    first_ptr,
    second_ptr,
    gradient_ptr,
    factor_ptr,
    rounded_ptr,
    size,
    rate,
    gain_first,
    gain_second,
    unbias,
    eps,
    ZEROS_STAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    x = tl.load(values_ptr + offset, mask=inside, other=0.0)
    m = tl.load(first_ptr + offset, mask=inside, other=0.0)
    v = tl.load(second_ptr + offset, mask=inside, other=0.0)
    g = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        g *= tl.load(factor_ptr)
    if ZEROS_STAY:
        g = tl.where(x == 0, 0.0, g)
    m += gain_first * (g - m)
    v += gain_second * (g * g - v)
    x -= rate * m / (tl.sqrt(v) * unbias + eps)
    tl.store(values_ptr + offset, x, mask=inside)
    tl.store(first_ptr + offset, m, mask=inside)
    tl.store(second_ptr + offset, v, mask=inside)
    if rounded_ptr is not None:
        tl.store(rounded_ptr + offset, x.to(rounded_ptr.dtype.element_ty), mask=inside)
