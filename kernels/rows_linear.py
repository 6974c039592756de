"""rows_linear: y = x W^T + b for a few rows of x, from a weight packed with row starts (:mod:`.packed_rows`).

Bytes per weight of e bytes, with a share d of non-zeros: e * d + 1/8 read, once for four rows.
"""

from __future__ import annotations

import torch

from . import cpu_packed, launch_packed
from .bound_launch import BoundCall
from .linear_call import bound, check_linear, launched, of_shape, outputs_of_dense, rows_of
from .nm_linear import add_products, store_sums
from .op import Op, Work, bytes_of, launch_metadata
from .pack_rows import load_kept, row_of, unpack_rows_reference
from .packed_rows import PackedRows
from .triton_import import tl, triton


def rows_linear(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs [..., out_features] in the dtype of ``tokens``.

    Args:
        tokens: [..., in_features], fp32, fp16 or bf16. Any number of rows works; 1 to 16 are fast.
        packed: the weight, fp32, fp16 or bf16.
        bias: [out_features] or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_linear(tokens, packed, bias)
    return ROWS_LINEAR.on(tokens, packed.values, packed.meta, packed.starts, bias)(tokens, packed, bias)


def bound_rows_linear(
    tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None
) -> tuple[torch.Tensor, BoundCall | None]:
    """As :func:`rows_linear` on a GPU, and the same call to be repeated with other tokens; None if it cannot be.

    Args:
        tokens: [n_tokens, in_features], contiguous, up to MOST_BOUND_TOKENS rows.
        packed: the weight. Repetitions take tokens, the weight's tensors and, if it is there, the bias.
        bias: [out_features] or None.
    """
    check_linear(tokens, packed, bias)
    packed.check_tensors()
    return bound(lambda own: _launched(own, packed, bias), tokens, packed.tensors.values(), bias)


def rows_linear_reference(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs, computed with plain torch from the dense weight in fp32."""
    return outputs_of_dense(tokens, unpack_rows_reference(packed), bias)


def _by_reference(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return rows_linear_reference(tokens, packed, bias)


def _rows_linear_cpu(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> torch.Tensor:
    return of_shape(cpu_packed.rows_linear(rows_of(tokens), packed, None if bias is None else bias.detach()), tokens)


def _rows_linear_triton(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return of_shape(_launched(rows_of(tokens.detach()), packed, bias), tokens)


def _launched(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel for tokens [n_tokens, in_features]."""
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    n_tokens, rows = len(tokens), packed.shape[0]
    if not n_tokens * rows:
        return torch.empty(n_tokens, rows, dtype=tokens.dtype, device=tokens.device)
    tile = launch_packed.rows_linear(packed.meta, n_tokens)
    return launched(
        *(_rows_linear_body, tokens, (packed.values, packed.meta, packed.starts), bias, rows, len(packed.values)),
        block_rows=tile.block_rows,
        block_tokens=tile.tokens,
        constants={"TOKENS": tile.tokens, "BLOCK_ROWS": tile.block_rows, "WORDS": tile.words},
        num_warps=tile.num_warps,
    )


def _work(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> Work:
    """Reads the tokens once and the packed weight once, however many tokens there are."""
    n_tokens = tokens.shape[:-1].numel()
    n_outputs = n_tokens * packed.shape[0]
    moved = bytes_of(tokens, packed.values, packed.meta, packed.starts, bias) + n_outputs * tokens.element_size()
    products = 2 * n_tokens * packed.values.numel()
    return Work(moved, products if bias is None else products + n_outputs)


ROWS_LINEAR = Op("rows_linear", _work, _by_reference, _rows_linear_cpu, _rows_linear_triton)


@triton.jit(launch_metadata=launch_metadata)
def _rows_linear_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    starts_ptr,
    bias_ptr,
    outputs_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    n_values,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A program computes whole outputs, WORDS words of metadata at a time."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    start, n_left = row_of(starts_ptr, i, n_values, rows)
    read = tl.zeros([BLOCK_ROWS, 1], tl.int32)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_ROWS, WORDS, 32], tl.float32),)
    for first in tl.range(0, tl.cdiv(cols, 32), WORDS):
        weight, kept, read = load_kept(values_ptr + start, meta_ptr, n_left, read, i, first, rows, cols, WORDS)
        j = (first + tl.arange(0, WORDS)[None, :, None]) * 32 + tl.arange(0, 32)[None, None, :]
        sums = add_products(sums, tokens_ptr, weight.to(tl.float32), kept, j, n_tokens, cols, stride, TOKENS)
    totals = ()
    for t in tl.static_range(TOKENS):
        totals = totals + (tl.sum(sums[t], 2),)
    store_sums(outputs_ptr, bias_ptr, totals, i, n_tokens, rows, TOKENS)
