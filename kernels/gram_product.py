"""gram_product: X^T X of tokens X, each product of 16-bit tokens exact and added in fp32.

The body is ours for bf16 tokens on processors with AVX512-BF16, two tokens an instruction: a read of the tokens, a read
and a write of the matrix for every 1,024 of them, and half of the products. Elsewhere torch multiplies: on NVIDIA GPUs
on tensor cores, out of 16 bits into fp32; on other CPUs the blocks on and above the diagonal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu
from .backend import choose_backend
from .errors import ArgumentError
from .written import mark_written

SYMMETRIC_BLOCK = 384
"""Columns of a block of torch's product on a CPU: 30 % off at 1,536 channels, where smaller ones save no more."""


def gram_product(rows: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """X^T X in fp32 [in_features, in_features].

    Args:
        rows: X, [n_tokens, in_features], any floating dtype; fp64 is rounded to fp32 first.
        into: a matrix that this function returned, on the device of ``rows``: it is added to, and returned.

    Raises:
        ValueError: ``rows`` is no matrix, or ``into`` does not fit it.
    """
    if rows.dim() != 2:
        raise ArgumentError(f"tokens must be [n_tokens, in_features], got shape {tuple(rows.shape)}")
    square = (rows.shape[1], rows.shape[1])
    if into is not None and (into.shape != square or into.dtype != torch.float32 or not into.is_contiguous()):
        raise ArgumentError(f"into must be contiguous, fp32 and {list(square)}, got {into.dtype} {list(into.shape)}")
    if choose_backend(rows, into) == "cpu" and rows.dtype == torch.bfloat16 and cpu.has_gram_product():
        mark_written(into)
        return cpu.gram_product(rows, into)
    product = _by_torch(rows)
    return product if into is None else into.add_(product)


def gram_product_reference(rows: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, in fp64."""
    exact = rows.float().double()
    return (exact.t() @ exact).float()


def _by_torch(rows: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda and torch.version.hip is None and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(rows.t(), rows, out_dtype=torch.float32)
    if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
        with bfloat16_products():
            return _symmetric_product(rows.float())
    single = rows.float()
    return single.t() @ single


def _symmetric_product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X by the blocks on and above the diagonal."""
    columns = rows.t()
    width = len(columns)
    product = rows.new_empty(width, width)
    for start in range(0, width, SYMMETRIC_BLOCK):
        block = slice(start, min(start + SYMMETRIC_BLOCK, width))
        product[block, start:] = columns[block] @ rows[:, start:]
        product[block.stop :, block] = product[block, block.stop :].t()
    return product


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """On a CPU, oneDNN may round fp32 factors to bf16; sums stay fp32. Exact where the factors are bf16 already.

    The setting is the process's: products of other threads are rounded too while a thread is inside. The first thread
    in notes the setting from before, the last one out restores it.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _inside.lock:
        if _inside.threads == 0:
            _inside.before = settings.fp32_precision
            settings.fp32_precision = "bf16"
        _inside.threads += 1
    try:
        yield
    finally:
        with _inside.lock:
            _inside.threads -= 1
            if _inside.threads == 0:
                settings.fp32_precision = _inside.before


class _Inside:
    """How many contexts of :func:`bfloat16_products` are open, and the setting from before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.before = "none"


_inside = _Inside()
