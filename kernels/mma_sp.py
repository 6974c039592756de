"""The instruction ``mma.sp`` in Triton: its operands, and what kernels around it share.

A warp multiplies 16 outputs, 2:4 of 32 inputs, by 8 tokens. With g = lane // 4 and t = lane % 4, a lane holds words of
two elements of 16 bits (PTX manual 8.7, 9.7.14.6):

    values: word k has the two kept ones of output g + 8 (k % 2), group t + 4 (k // 2), the lower place first
    tokens: word k has inputs 8 k + 2 t and 8 k + 2 t + 1 of token g
    sums: element k is output g + 8 (k // 2), token 2 t + k % 2

An operand is a tensor of 32 * WARPS elements: element k lies in thread k. Triton does not promise this layout; the
tests in tests/ptx show it.
"""

from __future__ import annotations

from .registers import unzip, zipped
from .triton_import import tl, triton

ROWS, TOKENS, LANES = 16, 8, 32
"""Outputs and tokens of an instruction, and lanes of a warp."""

FIRST_TWO = 0x44444444
"""Eight groups that keep the first two of their inputs: the places 0 and 1, in two bits each."""


@triton.jit
def loaded_word(pointer, inside, other: tl.constexpr, EVEN: tl.constexpr):
    """A word per thread; ``other`` if it is not inside. EVEN: all are inside."""
    if EVEN:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=inside, other=other)
    return word


@triton.jit
def loaded_words(pointer, inside, other: tl.constexpr, COUNT: tl.constexpr, THREADS: tl.constexpr, EVEN: tl.constexpr):
    """COUNT neighboring words per thread, loaded in one access; otherwise as :func:`loaded_word`."""
    places = pointer[:, None] + tl.arange(0, COUNT)[None, :]
    if EVEN:
        words = tl.load(places)
    else:
        words = tl.load(places, mask=inside[:, None], other=other)
    columns = unzip(words, COUNT)
    parts = ()
    for k in tl.static_range(COUNT):
        parts = parts + (tl.reshape(columns[k], [THREADS]),)
    return parts


@triton.jit
def zero_sums(TILES: tl.constexpr, THREADS: tl.constexpr):
    """Sums of TILES tiles of 16 outputs and 8 tokens."""
    sums = ()
    for _ in tl.static_range(4 * TILES):
        sums = sums + (tl.zeros([THREADS], tl.float32),)
    return sums


@triton.jit
def with_products(
    sums,
    C: tl.constexpr,
    values,
    V: tl.constexpr,
    HALF: tl.constexpr,
    tokens,
    places,
    SELECTOR: tl.constexpr,
    BF16: tl.constexpr,
):
    """The sums, with an instruction's products added to sums C to C + 3.

    ``values`` V and V + 1 are the words of output g of the tile, HALF words later those of output g + 8. ``tokens`` are
    four words. The lanes 4 g and 4 g + 1 (SELECTOR 0) or 4 g + 2 and 4 g + 3 (SELECTOR 1) hold the ``places``.
    """
    KIND: tl.constexpr = "bf16" if BF16 else "f16"
    added = tl.inline_asm_elementwise(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + KIND + "." + KIND + ".f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, {$4, $5, $6, $7}, $16, "
        + ("0x1;" if SELECTOR else "0x0;"),
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r",
        sums[C : C + 4] + (values[V], values[V + HALF], values[V + 1], values[V + HALF + 1]) + tokens + (places,),
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    return sums[:C] + (added[0], added[1], added[2], added[3]) + sums[C + 4 :]


@triton.jit
def store_tiles(
    outputs_ptr,
    bias_ptr,
    sums,
    n_tokens,
    rows,
    ROW_TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Add the sums of all warps and the bias, and store the outputs of a program's tiles."""
    THREADS: tl.constexpr = 32 * WARPS
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
