"""cosp_select: prune to n:m by the published CosP loss without storing its coupling matrix.

    "abs":  K_ij = sum_t |a_ti x_tj| d_t          "rms":  K_ij = sqrt(sum_t (a_ti x_tj d_t)^2)
    score_ij = |W_ij|^power * (row_i + col_j) * scale_j * K_ij;  the n highest of every m are kept

This is the GEMM over tokens of :mod:`.coupling`; its epilogue scores a tile of W and writes the pruned tile back.
Bytes per weight of e bytes: e read, e written; coupling followed by select_nm moves 12 bytes more. All tokens must be
in one call, so the streamed statistics of ``ace_triton`` use coupling instead. A constant factor in all d_t does not
change the selection.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import launch
from .coupling import Reduce, checked_shape, coupling, coupling_reference, products_over_tokens
from .errors import ArgumentError
from .group_choice import best_of_group
from .op import Op, Work, bytes_of, launch_metadata
from .pattern import check_pattern
from .registers import masked, unzip, zipped
from .score_terms import ScoreTerms, score
from .select_nm import (
    check_selection,
    finished_output,
    flops_of_scores,
    select_nm,
    select_nm_reference,
    with_unit_stride,
)
from .triton_import import tl, triton


def cosp_select(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    n: int,
    m: int,
    *,
    reduce: Reduce = "abs",
) -> torch.Tensor:
    """Keep the n weights with the highest score of every m consecutive inputs; set the others to +0.0, in place.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16; pruned in place and returned.
        terms: the score's other factors; their coupling must be None.
        tokens: [n_tokens, in_features], fp32, fp16 or bf16.
        outputs: [n_tokens, out_features], the layer's outputs with bias, fp32, fp16 or bf16.
        token_weights: fp32 [n_tokens], d_t. Tokens with weight 0 are ignored, even if they contain NaN. Scale the
            weights to be near 1 (1 / s_t is below fp16's range).
        n: how many weights of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides in_features.
        reduce: "abs" or "rms".

    Raises:
        ArgumentError: if the pattern, a shape or a dtype is not supported; the message says what is.
    """
    check_selection(weight, terms, "weight")
    check_pattern(weight, n, m, "in")
    shape = checked_shape(tokens, outputs, token_weights, reduce)
    if shape != tuple(weight.shape):
        raise ArgumentError(f"tokens and outputs need a weight of shape {shape}, got {tuple(weight.shape)}")
    if terms.coupling is not None:
        raise ArgumentError("cosp_select computes the score term 'coupling' itself: leave it out, or call select_nm")
    select = COSP_SELECT.on(weight, tokens, outputs, token_weights, *terms.tensors.values(), writes=(weight,))
    return select(weight, terms, tokens, outputs, token_weights, n, m, reduce=reduce)


def cosp_select_reference(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    n: int,
    m: int,
    *,
    reduce: Reduce = "abs",
) -> torch.Tensor:
    """The same selection in plain torch, with the whole coupling matrix."""
    matrix = coupling_reference(tokens, outputs, token_weights, reduce)
    return select_nm_reference(weight, _with_matrix(terms, matrix, reduce), n, m)


def _with_matrix(terms: ScoreTerms, matrix: torch.Tensor, reduce: Reduce) -> ScoreTerms:
    return replace(terms, coupling=matrix.sqrt() if reduce == "rms" else matrix)


def _cosp_select_cpu(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    n: int,
    m: int,
    *,
    reduce: Reduce,
) -> torch.Tensor:
    matrix = coupling(tokens, outputs, token_weights, reduce)
    return select_nm(weight, _with_matrix(terms, matrix, reduce), n, m)


def _cosp_select_triton(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    n: int,
    m: int,
    *,
    reduce: Reduce,
) -> torch.Tensor:
    token_weights = token_weights.contiguous()
    tokens, outputs = (of.detach() if of.stride(1) == 1 else of.detach().contiguous() for of in (tokens, outputs))
    source = with_unit_stride(weight)
    rows, cols = source.shape
    if source.numel():
        tile = launch.coupling(source)
        _cosp_select_body[(triton.cdiv(rows, tile.block_rows) * triton.cdiv(cols, tile.block_cols),)](
            *(source, terms.row, terms.col, terms.scale, tokens, outputs, token_weights),
            *(len(tokens), rows, cols, source.stride(0), tokens.stride(0), outputs.stride(0)),
            N=n,
            M=m,
            POWER=terms.power,
            REDUCE=reduce,
            PRECISION=tile.precision,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            BLOCK_TOKENS=tile.block_tokens,
            num_warps=tile.num_warps,
        )
    return finished_output(weight, source, "weight")


def _work(
    weight: torch.Tensor,
    terms: ScoreTerms,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
    token_weights: torch.Tensor,
    n: int,
    m: int,
    *,
    reduce: Reduce,
) -> Work:
    moved = bytes_of(weight, weight, tokens, outputs, token_weights, *terms.tensors.values())
    products, factors = 2 * len(tokens) * weight.numel(), weight.numel()
    return Work(moved, products + factors + flops_of_scores(weight, terms))


COSP_SELECT = Op("cosp_select", _work, cosp_select_reference, _cosp_select_cpu, _cosp_select_triton)


@triton.jit(launch_metadata=launch_metadata)
def _cosp_select_body(
    weight_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    tokens_ptr,
    outputs_ptr,
    token_weights_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    token_stride,
    output_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    POWER: tl.constexpr,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One tile of the weight: products over all tokens, then the selection of whole groups in a thread's registers."""
    across = tl.cdiv(cols, BLOCK_COLS)
    i = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    products = products_over_tokens(
        *(tokens_ptr, outputs_ptr, token_weights_ptr, i, j, n_tokens, rows, cols, token_stride, output_stride),
        *(REDUCE, PRECISION, BLOCK_TOKENS),
    )
    if REDUCE == "rms":
        products = tl.sqrt_rn(products)
    factors = unzip(products, M)
    place = weight_ptr + i[:, None].to(tl.int64) * stride + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    weights = unzip(tl.load(place, mask=inside, other=0.0), M)
    col_terms = _column_members(col_ptr, j, cols, M)
    scale_terms = _column_members(scale_ptr, j, cols, M)
    row_term = None if row_ptr is None else tl.load(row_ptr + i, mask=i < rows, other=0.0)[:, None]
    keys = ()
    for k in tl.static_range(M):
        value = score(
            weights[k].to(tl.float32),
            row_term,
            None if col_ptr is None else col_terms[k],
            None if scale_ptr is None else scale_terms[k],
            factors[k],
            POWER,
        )
        keys = keys + (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
    kept = best_of_group(keys, N)
    pruned = ()
    for k in tl.static_range(M):
        pruned = pruned + (masked(weights[k], kept[k]),)
    tl.store(place, zipped(pruned), mask=inside)


@triton.jit
def _column_members(pointer, j, cols, M: tl.constexpr):
    """A column vector as M tiles [1, BLOCK_COLS / M], member k of every group in tile k; () if there is no vector."""
    if pointer is None:
        members = ()
    else:
        members = unzip(tl.load(pointer + j, mask=j < cols, other=0.0)[None, :], M)
    return members
