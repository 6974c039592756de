"""nm_linear for 2:4 weights of 16, 8 or 4 bits on NVIDIA's sparse matrix units, for 1 to 64 tokens.

The instruction ``mma.sp`` multiplies a 2:4 weight as it is packed: the kept values, and the two places of each group in
four bits. A warp multiplies 16 outputs by 8 tokens. The values are read as layout 1 or 2 stores them. The bits are
repacked once into the order in which the 32 lanes of a warp hold them (:func:`fragments_of`).

The inputs of a product may be summed in any order. A span of inputs takes S instructions: 64 inputs take two if values
have 16 bits, 128 inputs take four if values have 8 or 4 bits. Lane 4 g + t reads the values of the 2 S groups from
2 S t on, of its rows g and g + 8, in one access each. Instruction s takes group 2 S t + 2 s as group t of its tile, and
group 2 S t + 2 s + 1 as group t + 4.

Bytes per weight of 16 bits: 2 / 2 + 1/8, read once per 64 tokens; for 8 and 4 bits see
:mod:`~ace_triton.kernels.nm_linear_mma_few_bits`. The repacked bits take another 1/8 of memory.

The kernel is inline PTX, which Triton's interpreter cannot run; the reference runs there. It was never run on a GPU, so
it is used only if a caller asks for it (:mod:`ace_triton.packed.sparse_units`).
"""

from __future__ import annotations

import torch

from . import launch_packed
from .backend import interpreting
from .bound_launch import BoundCall
from .errors import ArgumentError
from .launch import is_aligned
from .linear_call import bound, check_linear, few_bits_constants, launched, of_shape, rows_of
from .mma_sp import FIRST_TWO, LANES, ROWS, loaded_word, loaded_words, store_tiles, with_products, zero_sums
from .nm_linear import nm_linear_launched, nm_linear_reference
from .nm_linear_mma_few_bits import few_bits_mma_body
from .op import Op, Work, bytes_of, launch_metadata
from .packed_nm import PackedNM, unpack_bits
from .triton_import import tl, triton

SPAN, FEW_BITS_SPAN = 64, 128
"""Inputs of a span, for values of 16 bits and for values of 8 or 4 bits."""

DTYPES = (torch.float16, torch.bfloat16)


def span_of(packed: PackedNM) -> int:
    """Inputs of a span of the weight."""
    return SPAN if packed.absmax is None else FEW_BITS_SPAN


def fragments_of(packed: PackedNM) -> torch.Tensor:
    """Repack the metadata of a 2:4 weight into the operands of ``mma.sp``: int32 [ceil(out / 16), spans, 32 * words].

    Row [r, c] is for the outputs 16 r to 16 r + 15 and span c of the inputs. Each of the 32 lanes has a word for two
    instructions: one for values of 16 bits, two neighboring ones for values of 8 or 4 bits. The lower 16 bits of lane l
    describe output l // 4 of these, its upper 16 bits output l // 4 + 8: four groups, each with two places, the lower
    one first. Lanes with l % 4 < 2 serve the first instruction, the others the second.

    Raises:
        ArgumentError: if :func:`refusal` says why the weight cannot be multiplied.
    """
    why_not = refusal(packed)
    if why_not is not None:
        raise ArgumentError(f"fragments_of: {why_not}")
    rows, cols = packed.shape
    kept = unpack_bits(packed.meta)[:, :cols].view(rows, cols // 4, 4)
    a, b, c, d = (kept[..., place] for place in range(4))
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(d, 3, torch.where(c, 2, 1))
    codes = first | second << 2
    padding = codes.new_full((-rows % ROWS, cols // 4), FIRST_TWO & 15)
    spans, words = cols // span_of(packed), span_of(packed) // SPAN
    # [row tile, upper half, g, span, t, word, instruction of the word, half of the tile's groups]
    codes = torch.cat((codes, padding)).view(-1, 2, 8, spans, 4, words, 2, 2)
    # [row tile, span, g, instruction, half of the tile's groups, word, upper half, t]: the last two are bits of a word.
    codes = codes.permute(0, 3, 2, 6, 7, 5, 1, 4).reshape(-1, spans, LANES * words, 8)
    return (codes << _shifts(codes.device)).sum(-1).to(torch.int32)


def meta_of(fragments: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`fragments_of`: the metadata of the layout, int32 [out, ceil(in / 32)]."""
    rows, cols = shape
    words = fragments.shape[2] // LANES
    codes = fragments[..., None] >> _shifts(fragments.device).int() & 15
    codes = codes.view(-1, fragments.shape[1], 8, 2, 2, words, 2, 4).permute(0, 6, 2, 1, 7, 5, 3, 4)
    codes = codes.reshape(-1, cols // 4)[:rows]
    bits = (1 << (codes & 3) | 1 << (codes >> 2)).long().view(rows, cols // 32, 8)
    return (bits << _shifts(bits.device)).sum(-1).to(torch.int32)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int64, device=device)


def refusal(packed: PackedNM) -> str | None:
    """Why :func:`nm_linear_mma` cannot multiply by a weight; None if it can."""
    if (packed.n, packed.m) != (2, 4):
        return f"mma.sp supports only 2:4, the weight is {packed.n}:{packed.m}"
    if packed.dtype not in DTYPES:
        return f"mma.sp is used for float16 and bfloat16 only, the weight is {packed.dtype}"
    cols = packed.shape[1]
    if cols % span_of(packed):
        bits = "" if packed.absmax is None else f" for {packed.bits} bits"
        return f"nm_linear_mma needs a multiple of {span_of(packed)} inputs{bits}, the weight is {packed.shape}"
    if packed.absmax is not None and packed.group % FEW_BITS_SPAN and packed.group < cols:
        return (
            f"nm_linear_mma needs a scale per multiple of {FEW_BITS_SPAN} inputs, the weight has one per {packed.group}"
        )
    return None


def nm_linear_mma(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Outputs [..., out_features] in the dtype of ``tokens``; :func:`~ace_triton.kernels.nm_linear.nm_linear` on GPUs
    without sparse matrix units, where the fragments are not read.

    Args:
        tokens: [..., in_features], in the weight's dtype. Any number of rows works; 1 to 64 are fast.
        packed: a 2:4 weight for which :func:`refusal` returns None.
        fragments: the result of :func:`fragments_of` for this weight.
        bias: [out_features] or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_linear(tokens, packed, bias)
    _check(tokens, packed, fragments)
    return NM_LINEAR_MMA.on(tokens, packed.values, fragments, packed.absmax, bias)(tokens, packed, fragments, bias)


def bound_nm_linear_mma(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, BoundCall | None]:
    """As :func:`nm_linear_mma` on a GPU, and the same call to be repeated with other tokens; None if it cannot be.

    Repetitions take tokens, values, metadata, absmax of a quantized weight, fragments and, if it is there, the bias.

    Args:
        tokens: [n_tokens, in_features], contiguous, up to MOST_BOUND_TOKENS rows.
        packed: as for :func:`nm_linear_mma`.
        fragments: as for :func:`nm_linear_mma`.
        bias: [out_features] or None.
    """
    check_linear(tokens, packed, bias)
    _check(tokens, packed, fragments)
    operands = *packed.tensors.values(), fragments
    return bound(lambda own: _launched(own, packed, fragments, bias), tokens, operands, bias)


def nm_linear_mma_reference(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The outputs, computed with plain torch from the values and the fragments; the metadata are not read."""
    meta = meta_of(fragments, packed.shape)
    return nm_linear_reference(tokens, packed.with_tensors(packed.tensors | {"meta": meta}), bias)


def _check(tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor) -> None:
    packed.check_tensors()
    why_not = refusal(packed)
    if why_not is not None:
        raise ArgumentError(f"nm_linear_mma: {why_not}")
    if tokens.dtype != packed.dtype:
        raise ArgumentError(f"tokens must have the weight's dtype {packed.dtype}, got {tokens.dtype}: convert them")
    spans, words = packed.shape[1] // span_of(packed), span_of(packed) // SPAN
    shape = (-(-packed.shape[0] // ROWS), spans, LANES * words)
    if fragments.dtype != torch.int32 or tuple(fragments.shape) != shape or not fragments.is_contiguous():
        raise ArgumentError(
            f"fragments of a weight {packed.shape} must be contiguous torch.int32 {shape}, got {fragments.dtype} "
            f"{tuple(fragments.shape)}: make them with fragments_of"
        )


def _nm_linear_mma_triton(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return of_shape(_launched(rows_of(tokens.detach()), packed, fragments, bias), tokens)


def _launched(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    n_tokens, cols = tokens.shape
    rows = packed.shape[0]
    units = launch_packed.has_sparse_units(tokens.device) and not interpreting()
    if not units or not n_tokens * rows or not is_aligned(packed.values):
        return nm_linear_launched(tokens, packed, bias)
    if tokens.stride(1) != 1 or tokens.stride(0) % 2 or not is_aligned(tokens):
        tokens = tokens.clone(memory_format=torch.contiguous_format)
    tile = launch_packed.nm_linear_mma(rows, cols // span_of(packed), n_tokens, packed.bits)
    body, more = _mma_body, ()
    constants: dict[str, object] = {
        "BF16": tokens.dtype == torch.bfloat16,
        "ROW_TILES": tile.row_tiles,
        "TOKEN_TILES": tile.token_tiles,
        "SPANS": tile.spans,
        "EVEN": cols % (span_of(packed) * tile.spans * tile.num_warps) == 0,
        "WARPS": tile.num_warps,
    }
    if packed.absmax is not None:
        body, more = few_bits_mma_body, (packed.absmax,)
        constants |= few_bits_constants(packed)
    return launched(
        *(body, tokens, (packed.values, fragments), bias, rows, *more),
        block_rows=ROWS * tile.row_tiles,
        block_tokens=8 * tile.token_tiles,
        constants=constants,
        num_warps=tile.num_warps,
    )


def _work(tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None) -> Work:
    """Reads the tokens, the values, absmax and the fragments once."""
    n_tokens = tokens.shape[:-1].numel()
    n_outputs = n_tokens * packed.shape[0]
    products = 2 * n_outputs * packed.kept_of_a_row
    moved = bytes_of(tokens, packed.values, packed.absmax, fragments, bias) + n_outputs * tokens.element_size()
    return Work(moved, products if bias is None else products + n_outputs)


NM_LINEAR_MMA = Op("nm_linear_mma", _work, nm_linear_mma_reference, triton=_nm_linear_mma_triton)


@triton.jit(launch_metadata=launch_metadata)
def _mma_body(
    tokens_ptr,
    values_ptr,
    fragments_ptr,
    bias_ptr,
    outputs_ptr,
    n_tokens,
    rows,
    cols,
    stride,
    BF16: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """16 * ROW_TILES outputs of 8 * TOKEN_TILES tokens. The warps share the inputs, SPANS spans of 64 at a time."""
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    g = thread % 32 // 4
    t = thread % 4
    values = values_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tokens = tokens_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    spans = cols // 64
    sums = zero_sums(ROW_TILES * TOKEN_TILES, THREADS)
    for first in tl.range(0, spans, SPANS * WARPS):
        kept = ()
        places = ()
        for k in tl.static_range(SPANS):
            span = first + thread // 32 * SPANS + k
            for r in tl.static_range(ROW_TILES):
                tile = tl.program_id(0) * ROW_TILES + r
                # Rows past the last one are clamped; their outputs are not stored.
                for half in tl.static_range(2):
                    i = tl.minimum(tile * 16 + half * 8 + g, rows - 1).to(tl.int64)
                    line = values + i * (cols // 4) + span * 16 + t * 4
                    kept = kept + loaded_words(line, span < spans, 0, 4, THREADS, EVEN)
                tile = tl.minimum(tile, tl.cdiv(rows, 16) - 1).to(tl.int64)
                word = fragments_ptr + (tile * spans + span) * 32 + thread % 32
                places = places + (loaded_word(word, span < spans, 0x44444444, EVEN),)
        for k in tl.static_range(SPANS):
            span = first + thread // 32 * SPANS + k
            for n in tl.static_range(TOKEN_TILES):
                token = tl.minimum((tl.program_id(1) * TOKEN_TILES + n) * 8 + g, n_tokens - 1).to(tl.int64)
                # Words of two inputs: lane 4 g + t holds half t % 2 of the groups t // 2 + 2 b of the tile.
                line = tokens + token * (stride // 2) + span * 32 + t // 2 * 8 + t % 2
                for s in tl.static_range(2):
                    x = ()
                    for b in tl.static_range(4):
                        x = x + (loaded_word(line + (4 * s + b % 2 * 16 + b // 2 * 2), span < spans, 0, EVEN),)
                    for r in tl.static_range(ROW_TILES):
                        word = places[k * ROW_TILES + r]
                        sums = with_products(
                            *(sums, 4 * (r * TOKEN_TILES + n), kept, 8 * (k * ROW_TILES + r) + 2 * s, 4),
                            *(x, word, s, BF16),
                        )
    store_tiles(outputs_ptr, bias_ptr, sums, n_tokens, rows, ROW_TILES, TOKEN_TILES, WARPS)
