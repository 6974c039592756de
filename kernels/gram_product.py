"""gram_product: the Gram matrix X^T X of tokens X. Products of 16-bit tokens are exact and are summed in fp32.

For bf16 tokens on processors with AVX512-BF16, the compiled library multiplies two tokens per instruction. It reads the
tokens once, reads and writes the matrix once per 1,024 tokens, and computes half of the products (the matrix is
symmetric). In all other cases torch multiplies: on NVIDIA GPUs with tensor cores from 16 bits to fp32, on other CPUs
only the blocks on and above the diagonal.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu
from .errors import ArgumentError
from .op import Op, Work, bytes_of

SYMMETRIC_BLOCK = 384
"""Columns per block of torch's product on a CPU; smaller blocks save no further time."""

FEWEST_TOKENS = 64
"""Below this number of fp32 tokens on a CPU, one product of the whole matrix is faster than blocks."""


def gram_product(rows: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """X^T X in fp32 [in_features, in_features].

    Args:
        rows: X, [n_tokens, in_features], any floating dtype; fp64 is rounded to fp32 first.
        into: a Gram matrix on the device of ``rows``, contiguous fp32 [in_features, in_features]; the product is added
            to it in place. None for a new matrix.

    Raises:
        ArgumentError: if ``rows`` is not a matrix, or if ``into`` does not fit it.
    """
    if rows.dim() != 2:
        raise ArgumentError(f"tokens must be [n_tokens, in_features], got shape {tuple(rows.shape)}")
    square = (rows.shape[1], rows.shape[1])
    if into is not None and (into.shape != square or into.dtype != torch.float32 or not into.is_contiguous()):
        raise ArgumentError(f"into must be contiguous, fp32 and {list(square)}, got {into.dtype} {list(into.shape)}")
    return GRAM_PRODUCT.on(rows, into, writes=(into,))(rows, into)


def gram_product_reference(rows: torch.Tensor) -> torch.Tensor:
    """X^T X of the tokens rounded to fp32, computed with plain torch in fp64."""
    exact = rows.float().double()
    return (exact.t() @ exact).float()


def _gram_product_cpu(rows: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    if rows.dtype == torch.bfloat16 and cpu.has_gram_product():
        return cpu.gram_product(rows, into)
    return _by_torch(rows, into)


def _by_torch(rows: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    product = _product(rows)
    return product if into is None else into.add_(product)


def _work(rows: torch.Tensor, into: torch.Tensor | None) -> Work:
    """The products of the distinct half of the matrix."""
    n_tokens, width = rows.shape
    return Work(bytes_of(rows, into) + 4 * width * width, n_tokens * width * (width + 1))


GRAM_PRODUCT = Op("gram_product", _work, _by_torch, _gram_product_cpu)


def _product(rows: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda and torch.version.hip is None and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(rows.t(), rows, out_dtype=torch.float32)
    if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
        with bfloat16_products():
            return _symmetric_product(rows.float())
    single = rows.float()
    whole = single.device.type != "cpu" or len(single) < FEWEST_TOKENS
    return single.t() @ single if whole else _symmetric_product(single)


def _symmetric_product(rows: torch.Tensor) -> torch.Tensor:
    """X^T X of fp32 tokens: computes the blocks on and above the diagonal and mirrors the others."""
    columns = rows.t()
    width = len(columns)
    product = rows.new_empty(width, width)
    for start in range(0, width, SYMMETRIC_BLOCK):
        block = slice(start, min(start + SYMMETRIC_BLOCK, width))
        product[block, start:] = columns[block] @ rows[:, start:]
        product[block.stop :, block] = product[block, block.stop :].t()
    return product


@functools.cache
def has_bfloat16_products() -> bool:
    """True if this CPU has instructions for the bf16 products of torch: AVX512-BF16 or AMX.

    With AVX-512 alone torch multiplies bf16 too, but converts each factor, which takes longer than fp32.
    """
    capabilities = torch.cpu.get_capabilities()
    with_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return with_avx512 and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let oneDNN round fp32 factors to bf16 on a CPU; sums stay fp32. Exact if the factors are bf16 numbers.

    Without instructions for such products (:func:`has_bfloat16_products`) nothing is rounded. The setting is global to
    the process: while the context is open, products in other threads are rounded too. The first thread to enter saves
    the previous setting, the last one to leave restores it.
    """
    if not has_bfloat16_products():
        yield
        return
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
    """The number of open contexts of :func:`bfloat16_products`, and the setting before the first one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.before = "none"


_inside = _Inside()
