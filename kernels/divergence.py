"""divergence: the KL divergence of next-token distributions from a teacher's, with its gradient.

    KL(p || q) = sum_v p_v (log p_v - log q_v),   d KL / d logits = q - p

q is the softmax of a token's logits, p that of the teacher's logits. Each row is read twice, the second time mostly
from cache: first for the normalizers, then for loss and gradient. The gradient may be written over the logits, and
probabilities are never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu, launch
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

LOWEST = torch.finfo(torch.float32).min


class Divergence(NamedTuple):
    """The divergence of each token and its gradient.

    Attributes:
        loss: KL(p || q) in nats, fp32 [n_tokens]. Entries with p_v = 0 add nothing.
        gradient: q - p, in the shape and dtype of the logits.
    """

    loss: torch.Tensor
    gradient: torch.Tensor


def divergence(logits: torch.Tensor, wanted: torch.Tensor, into: torch.Tensor | None = None) -> Divergence:
    """The Kullback-Leibler divergence of each token's distribution from the teacher's, and its gradient.

    Args:
        logits: [n_tokens, vocabulary]; fp32, fp16 or bf16.
        wanted: the teacher's logits, in the same shape. If the dtypes differ, both are converted to fp32.
        into: receives the gradient, in the shape and dtype of ``logits``, with contiguous rows. It may be ``logits``
            itself or any other tensor that is no longer needed. None for a new tensor.

    Raises:
        ArgumentError: if the shapes differ, the vocabulary is empty, or ``into`` does not fit.
    """
    if logits.dim() != 2 or logits.shape != wanted.shape or not logits.shape[1]:
        raise ArgumentError(
            "logits and wanted logits must both be [n_tokens, vocabulary] and have the same shape; got "
            f"{tuple(logits.shape)} and {tuple(wanted.shape)}"
        )
    if into is not None and (into.shape != logits.shape or into.dtype != logits.dtype or into.stride(1) != 1):
        raise ArgumentError(
            f"into must have the logits' shape and dtype, {logits.dtype} {tuple(logits.shape)}, and contiguous rows; "
            f"got {into.dtype} {tuple(into.shape)} with strides {into.stride()}"
        )
    diverge = DIVERGENCE.on(logits, wanted, into, writes=(into,))
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    return Divergence(diverge(logits.detach(), wanted.detach(), gradient), gradient)


def divergence_reference(logits: torch.Tensor, wanted: torch.Tensor) -> Divergence:
    """Loss (rounded to fp32) and gradient (fp64), computed with plain torch in fp64."""
    log_q, log_p = (of.detach().double().log_softmax(-1) for of in (logits, wanted))
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return Divergence(terms.sum(-1).float(), log_q.exp() - p)


def _by_reference(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    loss, exact = divergence_reference(logits, wanted)
    gradient.copy_(exact)
    return loss


def _divergence_triton(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    logits, wanted = (of if of.stride(1) == 1 else of.contiguous() for of in (logits, wanted))
    n_tokens, cols = logits.shape
    loss = torch.empty(n_tokens, dtype=torch.float32, device=logits.device)
    if n_tokens:
        _diverge[(n_tokens,)](
            *(logits, wanted, gradient, loss, cols, logits.stride(0), wanted.stride(0), gradient.stride(0)),
            LOWEST=LOWEST,
            BLOCK=launch.divergence(logits),
            num_warps=launch.WIDE_WARPS,
        )
    return loss


def _work(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor) -> Work:
    """14 operations per logit: 6 for the two normalizers, 4 for q and p, 4 for loss and gradient."""
    return Work(bytes_of(logits, wanted, gradient) + 4 * len(logits), 14 * logits.numel())


DIVERGENCE = Op("divergence", _work, _by_reference, cpu.divergence, _divergence_triton)


@triton.jit(launch_metadata=launch_metadata)
def _diverge(
    logits_ptr,
    wanted_ptr,
    gradient_ptr,
    loss_ptr,
    cols,
    stride,
    wanted_stride,
    gradient_stride,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token. Each lane keeps the largest logit and the sum of exponentials of its own columns; one reduction
    combines the lanes."""
    t = tl.program_id(0).to(tl.int64)
    logits_row, wanted_row = logits_ptr + t * stride, wanted_ptr + t * wanted_stride
    gradient_row = gradient_ptr + t * gradient_stride
    most, sums = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    most_wanted, sums_wanted = most, sums
    for first in tl.range(0, cols, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(logits_row + v, mask=v < cols, other=-float("inf")).to(tl.float32)
        y = tl.load(wanted_row + v, mask=v < cols, other=-float("inf")).to(tl.float32)
        most, sums = _add_power(most, sums, x)
        most_wanted, sums_wanted = _add_power(most_wanted, sums_wanted, y)
    largest, log_total = _combine(most, sums)
    largest_wanted, log_total_wanted = _combine(most_wanted, sums_wanted)
    losses = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, cols, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(logits_row + v, mask=v < cols, other=-float("inf")).to(tl.float32) - largest - log_total
        y = tl.load(wanted_row + v, mask=v < cols, other=-float("inf")).to(tl.float32) - largest_wanted
        y -= log_total_wanted
        q, p = tl.exp(x), tl.exp(y)
        losses += tl.where(p == 0, 0.0, p * (y - x))
        tl.store(gradient_row + v, (q - p).to(gradient_ptr.dtype.element_ty), mask=v < cols)
    tl.store(loss_ptr + t, tl.sum(losses, 0))


@triton.jit
def _add_power(most, sums, x):
    """Update a running maximum and sum of exponentials with a logit.

    One exp is enough: of the two exponents relative to the new maximum, one is 0.
    """
    above = x - most
    power = tl.exp(-tl.abs(above))
    return tl.maximum(most, x), tl.where(above > 0, sums * power + 1, sums + power)


@triton.jit
def _combine(most, sums):
    """A row's largest logit, and the log of its sum of exponentials relative to that logit.

    They stay separate: in one number, a large logit would round the log away.
    """
    largest = tl.max(most, 0)
    return largest, tl.log(tl.sum(sums * tl.exp(most - largest), 0))
