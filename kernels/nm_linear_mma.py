"""nm_linear for 2:4 weights of 16 bits on NVIDIA's sparse matrix units, for 1 to 64 tokens.

The instruction ``mma.sp`` multiplies a 2:4 weight as it is packed: the kept values, and the two places of each group in
four bits. A warp multiplies 16 outputs by 8 tokens. The values are read as layout 1 stores them. The bits are repacked
once into the order in which the 32 lanes of a warp hold them (:func:`fragments_of`).

The inputs of a product may be summed in any order. A span of 64 inputs takes two instructions. Lane 4 g + t reads the
values of the groups 4 t to 4 t + 3 of its rows g and g + 8 in one access each. Instruction s takes group 4 t + 2 s as
group t of its tile, and group 4 t + 2 s + 1 as group t + 4.

Bytes per weight: 2 / 2 + 1/8, read once per 64 tokens; the repacked bits take another 1/8 of memory.

The kernel is inline PTX, which Triton's interpreter cannot run; the reference runs there. It was never run on a GPU, so
it is used only if a caller asks for it (:mod:`ace_triton.packed.sparse_units`).
"""

from __future__ import annotations

import torch

from . import bound_launch, launch_packed
from .backend import interpreting
from .bound_launch import BoundCall, new, recorded
from .errors import ArgumentError
from .launch import is_aligned
from .nm_linear import check_linear, nm_linear_launched, nm_linear_reference, of_shape, rows_of
from .op import Op, Work, bytes_of, launch_metadata
from .packed_nm import PackedNM, unpack_bits
from .registers import zipped
from .triton_import import tl, triton

ROWS, SPAN, LANES = 16, 64, 32
"""Outputs of an instruction, inputs of two instructions, and lanes of a warp."""

FIRST_TWO = 0x44444444
"""Eight groups that keep the first two of their inputs: the places 0 and 1, in two bits each."""

DTYPES = (torch.float16, torch.bfloat16)


def fragments_of(packed: PackedNM) -> torch.Tensor:
    """Repack the metadata of a 2:4 weight into the operands of ``mma.sp``: int32 [ceil(out / 16), in / 64, 32].

    Word [r, c, l] is the operand of lane l for the outputs 16 r to 16 r + 15 and the inputs 64 c to 64 c + 63. Its
    lower 16 bits describe output l // 4 of these, its upper 16 bits output l // 4 + 8: four groups, each with two
    places, the lower one first. Lanes with l % 4 < 2 serve the first instruction, the others the second.

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
    # [row tile, upper half, g, span, t, instruction, half of the tile's groups]
    codes = torch.cat((codes, padding)).view(-1, 2, 8, cols // SPAN, 4, 2, 2)
    # [row tile, span, g, instruction, half of the tile's groups, upper half, t]; the last two make the bits of a word.
    codes = codes.permute(0, 3, 2, 5, 6, 1, 4).reshape(-1, cols // SPAN, LANES, 8)
    return (codes << _shifts(codes.device)).sum(-1).to(torch.int32)


def meta_of(fragments: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`fragments_of`: the metadata of layout 1, int32 [out, ceil(in / 32)]."""
    rows, cols = shape
    codes = fragments[..., None] >> _shifts(fragments.device).int() & 15
    codes = codes.view(-1, cols // SPAN, 8, 2, 2, 2, 4).permute(0, 5, 2, 1, 6, 3, 4).reshape(-1, cols // 4)[:rows]
    bits = (1 << (codes & 3) | 1 << (codes >> 2)).long().view(rows, cols // 32, 8)
    return (bits << _shifts(bits.device)).sum(-1).to(torch.int32)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int64, device=device)


def refusal(packed: PackedNM) -> str | None:
    """Why :func:`nm_linear_mma` cannot multiply by a weight; None if it can."""
    if (packed.n, packed.m) != (2, 4):
        return f"mma.sp supports only 2:4, the weight is {packed.n}:{packed.m}"
    if packed.absmax is not None:
        return f"mma.sp is used for weights of 16 bits only, the weight has {packed.bits} bits"
    if packed.values.dtype not in DTYPES:
        return f"mma.sp is used for float16 and bfloat16 only, the weight is {packed.values.dtype}"
    if packed.shape[1] % SPAN:
        return f"nm_linear_mma needs a multiple of {SPAN} inputs, the weight is {packed.shape}"
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
    return NM_LINEAR_MMA.on(tokens, packed.values, fragments, bias)(tokens, packed, fragments, bias)


def bound_nm_linear_mma(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, BoundCall | None]:
    """As :func:`nm_linear_mma` on a GPU, and the same call to be repeated with other tokens; None if it cannot be.

    Repetitions take tokens, values, metadata, fragments and, if it is there, the bias.

    Args:
        tokens: [n_tokens, in_features], contiguous, up to MOST_BOUND_TOKENS rows.
        packed: as for :func:`nm_linear_mma`.
        fragments: as for :func:`nm_linear_mma`.
        bias: [out_features] or None.
    """
    check_linear(tokens, packed, bias)
    _check(tokens, packed, fragments)
    tokens = tokens.detach()
    with torch.cuda.device_of(tokens):
        sources = (tokens, packed.values, packed.meta, fragments, *(() if bias is None else (bias,)))
        return recorded(lambda: _launched(tokens, packed, fragments, bias), *sources)


def nm_linear_mma_reference(
    tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The outputs, computed with plain torch from the values and the fragments; the metadata are not read."""
    meta = meta_of(fragments, packed.shape)
    return nm_linear_reference(tokens, packed.with_tensors({"values": packed.values, "meta": meta}), bias)


def _check(tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor) -> None:
    packed.check_tensors()
    why_not = refusal(packed)
    if why_not is not None:
        raise ArgumentError(f"nm_linear_mma: {why_not}")
    if tokens.dtype != packed.dtype:
        raise ArgumentError(f"tokens must have the weight's dtype {packed.dtype}, got {tokens.dtype}: convert them")
    shape = (-(-packed.shape[0] // ROWS), packed.shape[1] // SPAN, LANES)
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
    outputs = new(n_tokens, rows, dtype=tokens.dtype, device=tokens.device)
    tile = launch_packed.nm_linear_mma(packed.values, n_tokens)
    constants = {
        "BF16": tokens.dtype == torch.bfloat16,
        "ROW_TILES": tile.row_tiles,
        "TOKEN_TILES": tile.token_tiles,
        "SPANS": tile.spans,
        "EVEN": cols % (SPAN * tile.spans * tile.num_warps) == 0,
        "WARPS": tile.num_warps,
    }
    for some_tokens, some_outputs in launch_packed.within_grid(tokens, outputs, 8 * tile.token_tiles):
        grid = (triton.cdiv(rows, ROWS * tile.row_tiles), triton.cdiv(len(some_tokens), 8 * tile.token_tiles))
        sizes = len(some_tokens), rows, cols, tokens.stride(0)
        arguments = (some_tokens, packed.values, fragments, bias, some_outputs, *sizes)
        bound_launch.launch(_mma_body, grid, arguments, constants, num_warps=tile.num_warps)
    return outputs


def _work(tokens: torch.Tensor, packed: PackedNM, fragments: torch.Tensor, bias: torch.Tensor | None) -> Work:
    """Reads the tokens, the values and the fragments once."""
    n_tokens = tokens.shape[:-1].numel()
    n_outputs = n_tokens * packed.shape[0]
    products = 2 * n_outputs * packed.kept_of_a_row
    moved = bytes_of(tokens, packed.values, fragments, bias) + n_outputs * tokens.element_size()
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
    """16 * ROW_TILES outputs of 8 * TOKEN_TILES tokens. The warps share the inputs, SPANS spans of 64 at a time.

    Each operand of the instruction is a tensor of 32 * WARPS elements: element k lies in thread k.
    """
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    g = thread % 32 // 4
    t = thread % 4
    values = values_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tokens = tokens_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    spans = cols // 64
    sums = ()
    for _ in tl.static_range(4 * ROW_TILES * TOKEN_TILES):
        sums = sums + (tl.zeros([THREADS], tl.float32),)
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
                    kept = kept + _four_words(line, span < spans, THREADS, EVEN)
                tile = tl.minimum(tile, tl.cdiv(rows, 16) - 1).to(tl.int64)
                word = fragments_ptr + (tile * spans + span) * 32 + thread % 32
                places = places + (_word(word, span < spans, 0x44444444, EVEN),)
        for k in tl.static_range(SPANS):
            span = first + thread // 32 * SPANS + k
            for n in tl.static_range(TOKEN_TILES):
                token = tl.minimum((tl.program_id(1) * TOKEN_TILES + n) * 8 + g, n_tokens - 1).to(tl.int64)
                # Words of two inputs: lane 4 g + t holds half t % 2 of the groups t // 2 + 2 b of the tile.
                line = tokens + token * (stride // 2) + span * 32 + t // 2 * 8 + t % 2
                for s in tl.static_range(2):
                    x = ()
                    for b in tl.static_range(4):
                        x = x + (_word(line + (4 * s + b % 2 * 16 + b // 2 * 2), span < spans, 0, EVEN),)
                    for r in tl.static_range(ROW_TILES):
                        sums = _with_products(
                            sums,
                            4 * (r * TOKEN_TILES + n),
                            kept,
                            8 * (k * ROW_TILES + r) + 2 * s,
                            x,
                            places[k * ROW_TILES + r],
                            s,
                            BF16,
                        )
    lane = tl.arange(0, 32)[:, None]
    c = tl.arange(0, 4 * TOKEN_TILES)[None, :]
    token = (tl.program_id(1) * TOKEN_TILES + c // 4) * 8 + lane % 4 * 2 + c % 2
    for r in tl.static_range(ROW_TILES):
        i = (tl.program_id(0) * ROW_TILES + r) * 16 + c // 2 % 2 * 8 + lane // 4
        parts = ()
        for k in tl.static_range(4 * TOKEN_TILES):
            parts = parts + (tl.reshape(sums[4 * r * TOKEN_TILES + k], [THREADS, 1]),)
        total = tl.sum(tl.reshape(zipped(parts), [WARPS, 32, 4 * TOKEN_TILES]), 0)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
        place = token.to(tl.int64) * rows + i
        tl.store(outputs_ptr + place, total.to(outputs_ptr.dtype.element_ty), mask=(i < rows) & (token < n_tokens))


@triton.jit
def _word(pointer, inside, other: tl.constexpr, EVEN: tl.constexpr):
    """A word per thread; ``other`` if it is not inside. EVEN: all are inside."""
    if EVEN:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=inside, other=other)
    return word


@triton.jit
def _four_words(pointer, inside, THREADS: tl.constexpr, EVEN: tl.constexpr):
    """Four neighboring words per thread, loaded in one access; 0 if they are not inside."""
    words = _word(pointer[:, None] + tl.arange(0, 4)[None, :], inside[:, None], 0, EVEN)
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _with_products(
    sums,
    C: tl.constexpr,
    kept,
    V: tl.constexpr,
    x,
    places,
    SELECTOR: tl.constexpr,
    BF16: tl.constexpr,
):
    """The sums, with an instruction's products added to sums C to C + 3.

    ``kept`` V and V + 1 are the words of output g of the tile, V + 4 and V + 5 those of output g + 8.
    """
    KIND: tl.constexpr = "bf16" if BF16 else "f16"
    added = tl.inline_asm_elementwise(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + KIND + "." + KIND + ".f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, {$4, $5, $6, $7}, $16, "
        + ("0x1;" if SELECTOR else "0x0;"),
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r",
        sums[C : C + 4] + (kept[V], kept[V + 4], kept[V + 1], kept[V + 5]) + x + (places,),
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    return sums[:C] + (added[0], added[1], added[2], added[3]) + sums[C + 4 :]
