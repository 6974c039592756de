"""nm_linear: y = x W^T + b from a packed n:m weight, for the few tokens of decoding.

    y_ti = sum_j x_tj W_ij + b_i,   over the kept (i, j), summed in fp32

Bytes per weight of e bytes: e * n / m + 1/8, read once per four tokens. At 2:4,
:mod:`~ace_triton.kernels.nm_linear_dot` reads them once for up to 32 tokens and sums in another order, as does
:mod:`~ace_triton.kernels.nm_linear_few_bits` for weights of 8 or 4 bits. The number of tokens decides which kernel
runs; apart from that, an output does not depend on the other tokens of the call. If the input of a pruned weight is NaN
or infinite, the output may or may not be NaN.

Quantized weights take b / 8 * n / m + 1/8 bytes per weight of b bits, and their scales. The compiled CPU library rounds
each token to integers of 30 bits and a sign, up to 128 neighboring inputs at a time. An input changes by at most 2e-9
of the largest of these. If one of them is NaN or infinite, so is each output of the token.
"""

from __future__ import annotations

import torch

from . import cpu_packed, launch, launch_packed
from .bound_launch import BoundCall
from .linear_call import bound, check_linear, few_bits_constants, launched, of_shape, outputs_of_dense, rows_of
from .nm_linear_dot import nm_linear_dot
from .nm_linear_few_bits import nm_linear_few_bits
from .op import Op, Work, bytes_of, launch_metadata
from .packed_dense import PackedDense
from .packed_nm import PackedNM
from .quantize_nm import dequantize_nm
from .registers import kept_before, unzip
from .triton_import import tl, triton
from .unpack_nm import unpack_nm_reference


def nm_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs [..., out_features] in the dtype of ``tokens``.

    Args:
        tokens: [..., in_features], fp32, fp16 or bf16. Any number of rows works; 1 to 32 are fast.
        packed: the weight, fp32, fp16 or bf16, or quantized. Any pattern works; 2:4 is fast.
        bias: [out_features] or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_linear(tokens, packed, bias)
    return NM_LINEAR.on(tokens, packed.values, packed.meta, packed.absmax, bias)(tokens, packed, bias)


def bound_nm_linear(
    tokens: torch.Tensor, packed: PackedNM | PackedDense, bias: torch.Tensor | None
) -> tuple[torch.Tensor, BoundCall | None]:
    """As :func:`nm_linear` on a GPU, and the same call to be repeated with other tokens; None if it cannot be.

    Args:
        tokens: [n_tokens, in_features], contiguous, up to MOST_BOUND_TOKENS rows.
        packed: an n:m weight, or a quantized weight that is not pruned. Repetitions take tokens, the weight's tensors
            and, if it is there, the bias.
        bias: [out_features] or None.
    """
    check_linear(tokens, packed, bias)
    packed.check_tensors()
    return bound(lambda own: nm_linear_launched(own, packed, bias), tokens, packed.tensors.values(), bias)


def nm_linear_reference(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs, computed with plain torch from the dense weight in fp32."""
    if packed.absmax is not None:
        packed = dequantize_nm(packed, torch.float32)
    return outputs_of_dense(tokens, unpack_nm_reference(packed), bias)


def _by_reference(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return nm_linear_reference(tokens, packed, bias)


def _nm_linear_cpu(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    product = cpu_packed.nm_linear if packed.absmax is None else cpu_packed.few_bits_linear
    outputs = product(rows_of(tokens), packed, None if bias is None else bias.detach())
    return of_shape(outputs, tokens)


def _nm_linear_triton(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return of_shape(nm_linear_launched(rows_of(tokens.detach()), packed, bias), tokens)


def nm_linear_launched(tokens: torch.Tensor, packed: PackedNM | PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernels for tokens [n_tokens, in_features]."""
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    n_tokens, cols = tokens.shape
    rows = packed.shape[0]
    if not n_tokens * rows:
        return torch.empty(n_tokens, rows, dtype=tokens.dtype, device=tokens.device)
    two_of_four = (packed.n, packed.m) == (2, 4) and packed.absmax is None
    if two_of_four and tokens.dtype == packed.values.dtype and launch_packed.suits_nm_linear_dot(tokens, packed.values):
        assert isinstance(packed, PackedNM)
        return nm_linear_dot(tokens, packed, bias)
    if packed.absmax is not None and launch_packed.suits_nm_linear_few_bits(tokens):
        return nm_linear_few_bits(tokens, packed, bias)
    tile = launch_packed.nm_linear(packed.values, n_tokens, cols)
    constants: dict[str, object] = {"TOKENS": tile.tokens, "BLOCK_ROWS": tile.block_rows}
    more = ()
    if two_of_four:
        body, split = _two_of_four_body, min(2 * tile.vector, launch.vector(tokens))
        constants |= {"VECTOR": tile.vector, "SPLIT": split, "LANES": tile.threads}
    else:
        body = _any_pattern_body
        constants |= {"N": packed.n, "M": packed.m, "BLOCK_COLS": 4 * tile.threads}
    if packed.absmax is not None:
        body, more = _few_bits_body, (packed.absmax,)
        constants |= few_bits_constants(packed)
    return launched(
        *(body, tokens, (packed.values, packed.meta), bias, rows, *more),
        block_rows=tile.block_rows,
        block_tokens=tile.tokens,
        constants=constants,
        num_warps=tile.num_warps,
    )


def _work(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> Work:
    """Reads the tokens once and the packed weight once, however many tokens there are."""
    n_outputs = tokens.shape[:-1].numel() * packed.shape[0]
    products = 2 * tokens.shape[:-1].numel() * packed.shape[0] * packed.kept_of_a_row
    moved = bytes_of(tokens, bias) + packed.packed_bytes + n_outputs * tokens.element_size()
    return Work(moved, products if bias is None else products + n_outputs)


NM_LINEAR = Op("nm_linear", _work, _by_reference, _nm_linear_cpu, _nm_linear_triton)


@triton.jit(launch_metadata=launch_metadata)
def _two_of_four_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    bias_ptr,
    outputs_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
):
    """A thread loads VECTOR values of a row in one access, and the 2 * VECTOR inputs of their groups."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    value = tl.arange(0, VECTOR * LANES)[None, :]
    value_start = i.to(tl.int64) * (cols // 2)
    word_start = i.to(tl.int64) * tl.cdiv(cols, 32)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_ROWS, LANES], tl.float32),)
    for first in tl.range(0, cols // 2, VECTOR * LANES):
        inside = (i < rows) & (first + value < cols // 2)
        values = unzip(tl.load(values_ptr + value_start + first + value, mask=inside, other=0.0), VECTOR)
        start = (first + lane * VECTOR) * 2
        words = tl.load(meta_ptr + word_start + start // 32, mask=(i < rows) & (start < cols), other=0)
        bits = words >> (start % 32)
        kept = ()
        for k in tl.static_range(2 * VECTOR):
            kept = kept + (bits << (31 - k) >> 31,)
        for t in tl.static_range(TOKENS):
            token = tl.program_id(1) * TOKENS + t
            x = _inputs(
                tokens_ptr + token.to(tl.int64) * stride, first * 2, token < n_tokens, cols, VECTOR, SPLIT, LANES
            )
            total = sums[t]
            for g in tl.static_range(VECTOR // 2):
                a, b, c, d = kept[4 * g], kept[4 * g + 1], kept[4 * g + 2], kept[4 * g + 3]
                low = _chosen(a, x[4 * g], _chosen(b, x[4 * g + 1], x[4 * g + 2]))
                high = _chosen(d, x[4 * g + 3], _chosen(c, x[4 * g + 2], x[4 * g + 1]))
                total += values[2 * g].to(tl.float32) * low.to(tl.float32, bitcast=True)
                total += values[2 * g + 1].to(tl.float32) * high.to(tl.float32, bitcast=True)
            sums = sums[:t] + (total,) + sums[t + 1 :]
    store_sums(outputs_ptr, bias_ptr, sums, i, n_tokens, rows, TOKENS)


@triton.jit
def _chosen(keep, this, other):
    """The bits of ``this`` if ``keep`` is -1, the bits of ``other`` if it is 0."""
    return (this & keep) | (other & ~keep)


@triton.jit
def _inputs(line, first, inside, cols, VECTOR: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr):
    """Each lane's inputs from first + 2 * VECTOR * lane on, as 2 * VECTOR tiles [1, LANES] of fp32 bits (int32)."""
    place = tl.arange(0, LANES * SPLIT)[None, :]
    parts = ()
    for access in tl.static_range(2 * VECTOR // SPLIT):
        j = first + place // SPLIT * (2 * VECTOR) + access * SPLIT + place % SPLIT
        x = tl.load(line + j, mask=inside & (j < cols), other=0.0).to(tl.float32)
        parts = parts + unzip(x.to(tl.int32, bitcast=True), SPLIT)
    return parts


@triton.jit(launch_metadata=launch_metadata)
def _any_pattern_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    bias_ptr,
    outputs_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    N: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One weight at a time. A kept weight's index in its group's values is the number of kept ones before it."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    value_start = i.to(tl.int64) * (cols // M * N)
    word_start = i.to(tl.int64) * tl.cdiv(cols, 32)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32),)
    for first in tl.range(0, cols, BLOCK_COLS):
        j = first + tl.arange(0, BLOCK_COLS)[None, :]
        inside = (i < rows) & (j < cols)
        words = tl.load(meta_ptr + word_start + j // 32, mask=inside, other=0)
        place = j // M * N + kept_before(words, j, M)
        # Damaged metadata could count past the values of a row.
        kept = inside & (words >> j % 32 & 1 != 0) & (place < cols // M * N)
        weight = tl.load(values_ptr + value_start + place, mask=kept, other=0.0).to(tl.float32)
        sums = add_products(sums, tokens_ptr, weight, kept, j, n_tokens, cols, stride, TOKENS)
    store_sums(outputs_ptr, bias_ptr, sums, i, n_tokens, rows, TOKENS)


@triton.jit(launch_metadata=launch_metadata)
def _few_bits_body(
    tokens_ptr,
    values_ptr,
    meta_ptr,
    bias_ptr,
    outputs_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    absmax_ptr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """As :func:`_any_pattern_body`, for weights of 8 or 4 bits; without metadata, every input has a value (N = M)."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    value_start = i.to(tl.int64) * tl.cdiv(cols // M * N * BITS, 8)
    word_start = i.to(tl.int64) * tl.cdiv(cols, 32)
    group_start = i.to(tl.int64) * tl.cdiv(cols, GROUP)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32),)
    for first in tl.range(0, cols, BLOCK_COLS):
        j = first + tl.arange(0, BLOCK_COLS)[None, :]
        inside = (i < rows) & (j < cols)
        place, kept = j, inside
        if meta_ptr is not None:
            words = tl.load(meta_ptr + word_start + j // 32, mask=inside, other=0)
            place = j // M * N + kept_before(words, j, M)
            # Damaged metadata could count past the values of a row.
            kept = inside & (words >> j % 32 & 1 != 0) & (place < cols // M * N)
        step = tl.load(values_ptr + value_start + place * BITS // 8, mask=kept, other=0).to(tl.int32)
        if BITS == 4:
            step = (step >> place % 2 * 4 & 15 ^ 8) - 8
        largest = tl.load(absmax_ptr + group_start + j // GROUP, mask=inside, other=0.0).to(tl.float32)
        weight = step.to(tl.float32) * (1.0 / LARGEST) * largest
        sums = add_products(sums, tokens_ptr, weight, kept, j, n_tokens, cols, stride, TOKENS)
    store_sums(outputs_ptr, bias_ptr, sums, i, n_tokens, rows, TOKENS)


@triton.jit
def add_products(sums, tokens_ptr, weight, kept, j, n_tokens, cols, stride, TOKENS: tl.constexpr):
    """Each token's sums, with the products of its inputs j and the kept weights added; all tiles have one shape."""
    for t in tl.static_range(TOKENS):
        token = tl.program_id(1) * TOKENS + t
        line = tokens_ptr + token.to(tl.int64) * stride
        x = tl.load(line + j, mask=(token < n_tokens) & (j < cols), other=0.0).to(tl.float32)
        sums = sums[:t] + (sums[t] + tl.where(kept, weight * x, 0.0),) + sums[t + 1 :]
    return sums


@triton.jit
def store_sums(outputs_ptr, bias_ptr, sums, i, n_tokens, rows, TOKENS: tl.constexpr):
    """Add the columns of each token's sums [R, C] and the bias, and store the outputs of rows i [R, 1]."""
    for t in tl.static_range(TOKENS):
        token = tl.program_id(1) * TOKENS + t
        total = tl.sum(sums[t], 1, keep_dims=True)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
        place = token.to(tl.int64) * rows + i
        tl.store(outputs_ptr + place, total.to(outputs_ptr.dtype.element_ty), mask=(i < rows) & (token < n_tokens))
