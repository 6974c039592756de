"""The smallest and the largest calls that pack, unpack and multiply weights, by launcher."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import nm_linear_mma
from ace_triton.kernels.pack_nm import PackedNM, pack_cutlass, pack_nm, pack_scored
from ace_triton.kernels.pack_rows import unpack_rows
from ace_triton.kernels.packed_dense import PackedDense
from ace_triton.kernels.packed_rows import PackedRows
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.unpack_nm import unpack_nm

from .edge_tensors import ALL_TERMS, BF16, FP16, FP32, WEIGHTS, Call, some, terms


def packed(rows: int, cols: int, n: int = 2, m: int = 4, dtype: torch.dtype = BF16) -> PackedNM:
    """A packed weight."""
    meta = some(rows, -(-cols // 32), dtype=torch.int32)
    return PackedNM(some(rows, cols * n // m, dtype=dtype), meta, n, m, (rows, cols))


def few_bits(rows: int, cols: int, n: int, m: int, bits: int, group: int = 32) -> PackedNM:
    """A packed weight of 8 or 4 bits."""
    shape = PackedNM.empty((rows, cols), n, m, dtype=BF16, device="meta", bits=bits, group=group)
    return shape.with_tensors({name: some(*t.shape, dtype=t.dtype) for name, t in shape.tensors.items()})


def pack_calls() -> Iterator[tuple[str, Call]]:
    """Packed by what is not 0 and by score, and unpacked."""
    for r, c in (*WEIGHTS, (0, 4)):
        yield f"2:4 of {r} x {c}", partial(pack_nm, some(r, c), 2, 4)
        yield f"2:4 of {r} x {c} by score", lambda r=r, c=c: pack_scored(some(r, c), terms(r, c, ALL_TERMS), 2, 4)
        yield f"2:4 of {r} x {c}, unpacked", lambda r=r, c=c: unpack_nm(packed(r, c))
    for dtype in (FP16, FP32, torch.int8):
        yield f"2:4 of 1 x 4, {dtype}", partial(pack_nm, some(1, 4, dtype=dtype), 2, 4)
        yield f"2:4 of 1 x 4, {dtype}, unpacked", lambda dtype=dtype: unpack_nm(packed(1, 4, dtype=dtype))
    for n, m in ((1, 2), (3, 8), (5, 16)):
        yield f"{n}:{m} of 1 x {m}", partial(pack_nm, some(1, m), n, m)
        yield f"{n}:{m} of 1 x {m}, unpacked", lambda n=n, m=m: unpack_nm(packed(1, m, n, m))
    yield "16:32 of 1 x 32, unpacked", lambda: unpack_nm(packed(1, 32, 16, 32))
    for dtype in (BF16, FP16):
        yield f"for CUTLASS, {dtype}", partial(pack_cutlass, some(32, 64, dtype=dtype))
        yield f"for CUTLASS, {dtype}, packed", lambda dtype=dtype: pack_cutlass(packed(32, 64, dtype=dtype))
    yield "for CUTLASS by score", partial(pack_cutlass, some(32, 64), terms(32, 64, ALL_TERMS))
    yield "for CUTLASS, int8", partial(pack_cutlass, some(16, 64, dtype=torch.int8))


def nm_linear_calls() -> Iterator[tuple[str, Call]]:
    """Few tokens and many, all patterns, with and without a bias."""
    for r, c in ((1, 4), (2, 4), (1, 36), (33, 48), (1, 4096)):
        for t in (1, 2, 3, 16, 17, 33):
            yield (
                f"{t} tokens by 2:4 of {r} x {c}",
                lambda r=r, c=c, t=t: nm_linear(some(t, c), packed(r, c), some(r)),
            )
    for r, c in ((1, 4), (33, 48)):
        for t in (1, 2, 3, 9, 17):
            yield (
                f"{t} tokens by 2:4 of {r} x {c}, fp32",
                lambda r=r, c=c, t=t: nm_linear(some(t, c, dtype=FP32), packed(r, c, dtype=FP32)),
            )
    yield "1 token in bf16 by 2:4 of 1 x 4 in fp32", lambda: nm_linear(some(1, 4), packed(1, 4, dtype=FP32))
    for n, m in ((1, 2), (3, 8), (5, 16), (16, 32)):
        yield f"1 token by {n}:{m} of 1 x {m}", lambda n=n, m=m: nm_linear(some(1, m), packed(1, m, n, m))
        yield f"4 tokens by {n}:{m} of 1 x {2 * m}", lambda n=n, m=m: nm_linear(some(4, 2 * m), packed(1, 2 * m, n, m))
    many = 4 * 65535 + 1
    yield "many tokens by 3:8 of 1 x 8", lambda: nm_linear(some(many, 8), packed(1, 8, 3, 8), some(1))
    yield "many tokens by 2:4 of 1 x 4", lambda: nm_linear(some(many, 4), packed(1, 4), some(1))
    yield (
        "many tokens by 2:4 of 1 x 16, fp32",
        lambda: nm_linear(some(4 * many, 16, dtype=FP32), packed(1, 16, dtype=FP32)),
    )
    yield "no token by 2:4 of 1 x 4", lambda: nm_linear(some(0, 4), packed(1, 4))
    for bits, n, m in ((8, 2, 4), (4, 1, 4), (8, 8, 16), (4, 5, 32)):
        for t in (1, 3, 9) if (bits, m) in ((8, 4), (4, 32)) else (1, 3):
            yield (
                f"{t} tokens by {n}:{m} of 1 x {m}, {bits} bits",
                lambda n=n, m=m, t=t, bits=bits: nm_linear(some(t, m), few_bits(1, m, n, m, bits), some(1)),
            )


def quantized_linear_calls() -> Iterator[tuple[str, Call]]:
    """Both numbers of bits, with few tokens and with tiles of tokens on matrix units."""

    def call(t: int, c: int, bits: int) -> object:
        shape = PackedDense.empty((1, c), bits, 32, dtype=BF16, device="meta")
        whole = shape.with_tensors(
            {name: some(*tensor.shape, dtype=tensor.dtype) for name, tensor in shape.tensors.items()}
        )
        return quantized_linear(some(t, c), whole, some(1))

    for bits, t, c in ((8, 1, 1), (8, 3, 33), (8, 9, 64), (4, 1, 1), (4, 9, 35)):
        yield f"{t} tokens by 1 x {c}, {bits} bits", lambda bits=bits, t=t, c=c: call(t, c, bits)


def by_rows(rows: int, cols: int, dtype: torch.dtype = BF16) -> PackedRows:
    """A packed weight with row starts: one value for every other input."""
    meta, starts = some(rows, -(-cols // 32), dtype=torch.int32), torch.arange(rows + 1) * (cols // 2)
    return PackedRows(some(rows * (cols // 2), dtype=dtype), meta, starts, (rows, cols))


def nm_linear_mma_calls() -> Iterator[tuple[str, Call]]:
    """Tiles of 8, 16 and 64 tokens, and partial tiles of outputs."""

    def call(t: int, r: int, c: int, dtype: torch.dtype) -> object:
        fragments = some(-(-r // 16), c // 64, 32, dtype=torch.int32)
        return nm_linear_mma(some(t, c, dtype=dtype), packed(r, c, dtype=dtype), fragments, some(r))

    for t, r, c, dtype in ((1, 1, 64, BF16), (9, 33, 1088, FP16), (64, 1, 64, BF16)):
        yield f"{t} tokens by {r} x {c}, {dtype}", partial(call, t, r, c, dtype)
    yield "many tokens by 1 x 64", partial(call, 64 * 65535 + 16, 1, 64, BF16)

    def by_few_bits(t: int, r: int, c: int, bits: int) -> object:
        fragments = some(-(-r // 16), c // 128, 64, dtype=torch.int32)
        return nm_linear_mma(some(t, c), few_bits(r, c, 2, 4, bits, group=128), fragments, some(r))

    for t, r, c, bits in ((1, 1, 128, 8), (9, 33, 2176, 4), (64, 1, 128, 8)):
        yield f"{t} tokens by {r} x {c}, {bits} bits", partial(by_few_bits, t, r, c, bits)


def rows_linear_calls() -> Iterator[tuple[str, Call]]:
    """Few tokens and many by weights with row starts, and such weights unpacked."""
    for r, c in ((1, 2), (2, 33), (33, 48), (1, 4096)):
        for t in (1, 2, 3, 17):
            yield (
                f"{t} tokens by rows of {r} x {c}",
                lambda r=r, c=c, t=t: rows_linear(some(t, c), by_rows(r, c), some(r)),
            )
        yield f"rows of {r} x {c}, unpacked", lambda r=r, c=c: unpack_rows(by_rows(r, c))
    for dtype in (FP32, FP16):
        yield (
            f"1 token by rows of 1 x 2, {dtype}",
            lambda dtype=dtype: rows_linear(some(1, 2, dtype=dtype), by_rows(1, 2, dtype)),
        )
        yield f"rows of 1 x 2, {dtype}, unpacked", lambda dtype=dtype: unpack_rows(by_rows(1, 2, dtype))
    yield "many tokens by rows of 1 x 2", lambda: rows_linear(some(4 * 65535 + 1, 2), by_rows(1, 2))
