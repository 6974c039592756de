"""coupling: the coupling matrix of CosP's published loss, accumulated over batches in fp32.

    "abs":  K_ij += sum_t |a_ti x_tj| d_t          "rms":  K_ij += sum_t (a_ti x_tj d_t)^2

with d_t = 1 / s_t (0 for an excluded token). This is a GEMM over the tokens. Its operands, |a| d and |x| or their
squares, are computed as tiles are loaded; no tensor of size [n_tokens, ...] is written.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu, launch
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

Reduce = Literal["abs", "rms"]


def coupling(
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
    reduce: Reduce = "abs",
    *,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a batch to the coupling matrix.

    Args:
        tokens: [n_tokens, in_features], fp32, fp16 or bf16.
        outputs: [n_tokens, out_features], the layer's outputs with bias, fp32, fp16 or bf16.
        weights: fp32 [n_tokens], d_t. Tokens with weight 0 are ignored, even if they contain NaN. Scale the weights to
            be near 1 (1 / s_t is below fp16's range).
        reduce: "abs" or "rms".
        into: fp32 [out_features, in_features], contiguous; the batch is added in place and the matrix returned. None
            starts from a new matrix of 0.

    Raises:
        ArgumentError: if a shape or dtype does not fit, or if ``reduce`` is invalid.
    """
    shape = checked_shape(tokens, outputs, weights, reduce)
    if into is None:
        into = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
    elif tuple(into.shape) != shape or into.dtype != torch.float32 or not into.is_contiguous():
        raise ArgumentError(f"into must be contiguous float32 {shape}, got {into.dtype} {tuple(into.shape)}")
    add_batch = COUPLING.on(tokens, outputs, weights, into, writes=(into,))
    return add_batch(tokens, outputs, weights, reduce, into)


def coupling_reference(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce = "abs"
) -> torch.Tensor:
    """The matrix of one batch, computed with plain torch in fp64."""
    used = weights != 0
    x, a, d = tokens[used].detach().double().abs(), outputs[used].detach().double().abs(), weights[used].double()
    a = a * d[:, None]
    if reduce == "rms":
        x, a = x.square(), a.square()
    return (a.t() @ x).float()


def checked_shape(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce
) -> tuple[int, int]:
    """The shape [out_features, in_features] of the matrix; ArgumentError if the arguments do not fit each other."""
    if reduce not in ("abs", "rms"):
        raise ArgumentError(f"reduce must be 'abs' or 'rms', got {reduce!r}")
    n_tokens = tokens.shape[0]
    if tokens.dim() != 2 or outputs.dim() != 2 or outputs.shape[0] != n_tokens or weights.shape != (n_tokens,):
        raise ArgumentError(
            "coupling needs tokens [n_tokens, in_features], outputs [n_tokens, out_features] and weights [n_tokens], "
            f"got {tuple(tokens.shape)}, {tuple(outputs.shape)}, {tuple(weights.shape)}"
        )
    return outputs.shape[1], tokens.shape[1]


def _by_reference(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce, into: torch.Tensor
) -> torch.Tensor:
    return into.add_(coupling_reference(tokens, outputs, weights, reduce))


def _coupling_triton(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce, into: torch.Tensor
) -> torch.Tensor:
    weights = weights.contiguous()
    tokens, outputs = (m.detach() if m.stride(1) == 1 else m.detach().contiguous() for m in (tokens, outputs))
    rows, cols = into.shape
    if into.numel() and len(tokens):
        tile = launch.coupling(into)
        _add_products[(triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),)](
            *(tokens, outputs, weights, into),
            *(len(tokens), rows, cols, tokens.stride(0), outputs.stride(0)),
            REDUCE=reduce,
            PRECISION=tile.precision,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            BLOCK_TOKENS=tile.block_tokens,
            num_warps=tile.num_warps,
        )
    return into


def _work(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: Reduce, into: torch.Tensor
) -> Work:
    return Work(bytes_of(tokens, outputs, weights, into, into), 2 * len(tokens) * into.numel())


COUPLING = Op("coupling", _work, _by_reference, cpu.coupling, _coupling_triton)


@triton.jit(launch_metadata=launch_metadata)
def _add_products(
    tokens_ptr,
    outputs_ptr,
    weights_ptr,
    into_ptr,
    n_tokens,
    rows,
    cols,
    token_stride,
    output_stride,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One tile of the matrix, summed over all tokens."""
    across = tl.cdiv(cols, BLOCK_COLS)
    i = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    products = products_over_tokens(
        *(tokens_ptr, outputs_ptr, weights_ptr, i, j, n_tokens, rows, cols, token_stride, output_stride),
        *(REDUCE, PRECISION, BLOCK_TOKENS),
    )
    place = into_ptr + i[:, None].to(tl.int64) * cols + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + products, mask=inside)


@triton.jit
def products_over_tokens(
    tokens_ptr,
    outputs_ptr,
    weights_ptr,
    i,
    j,
    n_tokens,
    rows,
    cols,
    token_stride,
    output_stride,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Rows i and columns j of one batch's matrix, in fp32."""
    products = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for first in tl.range(0, n_tokens, BLOCK_TOKENS):
        t = first + tl.arange(0, BLOCK_TOKENS)
        d = tl.load(weights_ptr + t, mask=t < n_tokens, other=0.0)[:, None]
        line = t[:, None].to(tl.int64)
        a_used, x_used = (d != 0) & (i[None, :] < rows), (d != 0) & (j[None, :] < cols)
        a = tl.load(outputs_ptr + line * output_stride + i[None, :], mask=a_used, other=0.0).to(tl.float32)
        x = tl.load(tokens_ptr + line * token_stride + j[None, :], mask=x_used, other=0.0).to(tl.float32)
        a = tl.abs(a) * d
        x = tl.abs(x)
        if REDUCE == "rms":
            a = a * a
            x = x * x
        products = tl.dot(tl.trans(a), x, products, input_precision=PRECISION)
    return products
