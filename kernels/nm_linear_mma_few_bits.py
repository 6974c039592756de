"""The body of nm_linear_mma for 2:4 weights of 8 or 4 bits.

    y_ti = sum_g absmax_ig / Q sum_(j in g) x_tj q_ij + b_i

The integers q are exact in fp16 and bf16. They are expanded in registers, multiplied by ``mma.sp`` with fp32 sums, and
scaled once per span of 128 inputs. How the lanes share a span is said in :mod:`~ace_triton.kernels.nm_linear_mma`.

Bytes per weight of b bits: b / 16 + 1/8 and absmax, read once per 64 tokens.
"""

from __future__ import annotations

from .mma_sp import loaded_words, store_tiles, with_products, zero_sums
from .op import launch_metadata
from .triton_import import tl, triton


@triton.jit(launch_metadata=launch_metadata)
def few_bits_mma_body(
    tokens_ptr,
    values_ptr,
    fragments_ptr,
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
    BF16: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """16 * ROW_TILES outputs of 8 * TOKEN_TILES tokens. The warps share the inputs, SPANS spans of 128 at a time.

    Spans past the last one read the last one again, so no load needs a mask; their products are left out.
    """
    THREADS: tl.constexpr = 32 * WARPS
    WORDS: tl.constexpr = BITS // 2
    thread = tl.arange(0, THREADS)
    g = thread % 32 // 4
    t = thread % 4
    values = values_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tokens = tokens_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    spans = cols // 128
    sums = zero_sums(ROW_TILES * TOKEN_TILES, THREADS)
    for first in tl.range(0, spans, SPANS * WARPS):
        steps = ()
        places = ()
        scales = ()
        for k in tl.static_range(SPANS):
            span = _clamped(first + thread // 32 * SPANS + k, spans, EVEN)
            for r in tl.static_range(ROW_TILES):
                tile = tl.program_id(0) * ROW_TILES + r
                # Rows past the last one are clamped; their outputs are not stored.
                for half in tl.static_range(2):
                    i = tl.minimum(tile * 16 + half * 8 + g, rows - 1).to(tl.int64)
                    line = values + i * (spans * 4 * WORDS) + (span * 4 + t) * WORDS
                    steps = steps + loaded_words(line, None, 0, WORDS, THREADS, True)
                    scales = scales + (tl.load(absmax_ptr + i * tl.cdiv(cols, GROUP) + span * 128 // GROUP),)
                tile = tl.minimum(tile, tl.cdiv(rows, 16) - 1).to(tl.int64)
                word = fragments_ptr + (tile * spans + span) * 64 + thread % 32 * 2
                places = places + loaded_words(word, None, 0, 2, THREADS, True)
        for k in tl.static_range(SPANS):
            span = _clamped(first + thread // 32 * SPANS + k, spans, EVEN)
            kept = ()  # For each tile and half of its rows, the pairs of the groups 8 t to 8 t + 7.
            for w in tl.static_range(2 * ROW_TILES * WORDS):
                for p in tl.static_range(8 // WORDS):
                    kept = kept + (_pair(steps[2 * k * ROW_TILES * WORDS + w], p, BITS, BF16),)
            for n in tl.static_range(TOKEN_TILES):
                token = tl.minimum((tl.program_id(1) * TOKEN_TILES + n) * 8 + g, n_tokens - 1).to(tl.int64)
                # Words of two inputs: lane 4 g + t holds half t % 2 of the groups t // 2 + 2 b of the tile.
                line = tokens + token * (stride // 2) + span * 64 + t // 2 * 16 + t % 2
                products = zero_sums(ROW_TILES, THREADS)
                for s in tl.static_range(4):
                    x = ()
                    for b in tl.static_range(4):
                        x = x + (tl.load(line + (4 * s + b % 2 * 32 + b // 2 * 2)),)
                    for r in tl.static_range(ROW_TILES):
                        word = places[2 * (k * ROW_TILES + r) + s // 2]
                        products = with_products(products, 4 * r, kept, 16 * r + 2 * s, 8, x, word, s % 2, BF16)
                inside = first + thread // 32 * SPANS + k < spans
                for r in tl.static_range(ROW_TILES):
                    for c in tl.static_range(4):
                        scaled = products[4 * r + c] * _scale(scales[2 * (k * ROW_TILES + r) + c // 2], LARGEST)
                        sums = _with(sums, 4 * (r * TOKEN_TILES + n) + c, scaled, inside, EVEN)
    store_tiles(outputs_ptr, bias_ptr, sums, n_tokens, rows, ROW_TILES, TOKEN_TILES, WARPS)


@triton.jit
def _clamped(span, spans, EVEN: tl.constexpr):
    """The span, or the last one if it is past that; EVEN: no span is."""
    if not EVEN:
        span = tl.minimum(span, spans - 1)
    return span


@triton.jit
def _scale(largest, LARGEST: tl.constexpr):
    """The weight of one step."""
    return largest.to(tl.float32) * (1.0 / LARGEST)


@triton.jit
def _with(sums, C: tl.constexpr, summand, inside, EVEN: tl.constexpr):
    """The sums, with the summand added to sum C if it is inside; EVEN: all are."""
    total = sums[C] + summand
    if not EVEN:
        total = tl.where(inside, total, sums[C])
    return sums[:C] + (total,) + sums[C + 1 :]


@triton.jit
def _pair(word, P: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """The integers 2 P and 2 P + 1 of a word, exact, as a word of two bf16 or fp16 numbers.

    A byte of the integer is placed in the mantissa of a number, and what is too much is subtracted. With eight bits,
    bf16 has room for seven: the eighth, the sign, doubles 128 to 256, and both parts are subtracted from each other.
    """
    if BITS == 8 and BF16:
        pair = _with_ptx(
            word,
            0x4140 + 0x0202 * P,
            """{ .reg .b32 bits, sign, low, minus_1;
            mov.b32 bits, 0x43434343; prmt.b32 bits, $1, bits, $2;
            and.b32 sign, bits, 0xff80ff80; and.b32 low, bits, 0xff7fff7f;
            mov.b32 minus_1, 0xbf80bf80; fma.rn.bf16x2 $0, sign, minus_1, low; }""",
        )
    elif BITS == 8:
        pair = _with_ptx(
            word,
            0x4140 + 0x0202 * P,
            """{ .reg .b32 bits, high, one, offset;
            xor.b32 bits, $1, 0x80808080; mov.b32 high, 0x64646464; prmt.b32 bits, bits, high, $2;
            mov.b32 one, 0x3c003c00; mov.b32 offset, 0xe480e480; fma.rn.f16x2 $0, bits, one, offset; }""",
        )
    elif BF16:
        pair = _with_ptx(
            word,
            0x0400 + 0x0101 * P,
            """{ .reg .b32 bits, one, offset;
            shr.u32 bits, $1, 4; prmt.b32 bits, $1, bits, $2;
            lop3.b32 bits, bits, 0x000f000f, 0x43084308, 0x6a;
            mov.b32 one, 0x3f803f80; mov.b32 offset, 0xc308c308; fma.rn.bf16x2 $0, bits, one, offset; }""",
        )
    else:
        pair = _with_ptx(
            word,
            0x0101 * P,
            """{ .reg .b32 bits, factors, offsets;
            prmt.b32 bits, $1, 0, $2; lop3.b32 bits, bits, 0x00f0000f, 0x64806408, 0x6a;
            mov.b32 factors, 0x2c003c00; mov.b32 offsets, 0xd480e408; fma.rn.f16x2 $0, bits, factors, offsets; }""",
        )
    return pair


@triton.jit
def _with_ptx(word, SELECTOR: tl.constexpr, PTX: tl.constexpr):
    """What the PTX makes of a word; the selector says which bytes ``prmt`` takes."""
    return tl.inline_asm_elementwise(PTX, "=r,r,r", (word, SELECTOR), dtype=tl.int32, is_pure=True, pack=1)
