"""Calls of every public launcher at edge shapes, for the compile sweep: 1 row, 1 column, 1 token, 1 sequence, k = 1,
sizes of all ones, odd sizes, and more programs than one axis of a grid takes.

The JIT makes other kernels of such sizes than of a layer's: an integer of 1 becomes a constant of Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.column_scale import ColumnScale, column_scale
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite, find_not_finite
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import nm_linear_mma
from ace_triton.kernels.pack_nm import PackedNM, pack_cutlass, pack_nm, pack_scored
from ace_triton.kernels.pack_rows import unpack_rows
from ace_triton.kernels.packed_dense import PackedDense
from ace_triton.kernels.packed_rows import PackedRows
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_layer_sums, no_moments, token_statistics
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weight_sums_group import group_relative_importance
from ace_triton.kernels.weighted_squares import weighted_squares

from .block_cases import vectors_of_layers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL_TERMS = ("row", "col", "scale", "coupling")
VECTORS = ("row", "col", "scale")

WEIGHTS = ((1, 4), (1, 32), (2, 4), (1, 36), (33, 48), (1, 4096))
"""Shapes of weights that 2:4 takes."""

MATRICES = ((1, 1), (1, 16), (17, 1), (5, 4096))
"""Shapes of tokens, outputs, logits and parameters."""

Call = Callable[[], object]


@dataclass(frozen=True)
class EdgeCase:
    """One call of a launcher, named by its arguments."""

    launcher: str
    arguments: str
    call: Call

    def __str__(self) -> str:
        return f"{self.launcher}({self.arguments})"


def edge_cases() -> Iterator[EdgeCase]:
    """All of them, those of a launcher together."""
    for launcher, calls in LAUNCHERS.items():
        for arguments, call in calls():
            yield EdgeCase(launcher, arguments, call)


def some(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Zeros: bodies do not run in a sweep, and launchers refuse what is not n:m."""
    return torch.zeros(*shape, dtype=dtype)


def terms(rows: int, cols: int, names: tuple[str, ...]) -> ScoreTerms:
    """Terms of a weight [rows, cols]."""
    shapes = {"row": (rows,), "col": (cols,), "scale": (cols,), "coupling": (rows, cols)}
    return ScoreTerms(**{name: some(*shapes[name], dtype=FP32) for name in names})


def packed(rows: int, cols: int, n: int = 2, m: int = 4, dtype: torch.dtype = BF16) -> PackedNM:
    """A packed weight."""
    meta = some(rows, -(-cols // 32), dtype=torch.int32)
    return PackedNM(some(rows, cols * n // m, dtype=dtype), meta, n, m, (rows, cols))


def few_bits(rows: int, cols: int, n: int, m: int, bits: int) -> PackedNM:
    """A packed weight of 8 or 4 bits with groups of 32."""
    shape = PackedNM.empty((rows, cols), n, m, dtype=BF16, device="meta", bits=bits, group=32)
    return shape.with_tensors({name: some(*t.shape, dtype=t.dtype) for name, t in shape.tensors.items()})


def select_nm_calls() -> Iterator[tuple[str, Call]]:
    """Along both axes, with all outputs."""
    for r, c in WEIGHTS:
        yield f"2:4 of {r} x {c}", lambda r=r, c=c: select_nm(some(r, c), terms(r, c, ALL_TERMS), 2, 4)
        yield (
            f"2:4 of {r} x {c}, bits",
            lambda r=r, c=c: select_nm(some(r, c), terms(r, c, ("scale",)), 2, 4, output="bits"),
        )
    for dtype in (FP16, FP32):
        yield (
            f"2:4 of 1 x 4, {dtype}, mask",
            partial(select_nm, some(1, 4, dtype=dtype), ScoreTerms(), 2, 4, output="mask"),
        )
    for r, names, output in ((32, ALL_TERMS, "weight"), (4, ALL_TERMS, "weight"), (4, ("row",), "bits")):
        yield (
            f"2:4 of {r} x 1 along outputs, {output}",
            partial(select_nm, some(r, 1), terms(r, 1, names), 2, 4, axis="out", output=output),
        )
    for n, m in ((1, 2), (3, 8), (5, 16)):
        yield f"{n}:{m} of 1 x {m}", partial(select_nm, some(1, m), terms(1, m, ALL_TERMS), n, m)
    yield "16:32 of 1 x 32", partial(select_nm, some(1, 32), ScoreTerms(), 16, 32)
    for r, c in ((1, 4), (33, 48)):
        flag = some(1, dtype=torch.int32)
        yield f"2:4 of {r} x {c} unless", partial(select_nm, some(r, c), terms(r, c, VECTORS), 2, 4, unless=flag)
    yield (
        "2:4 of 4 x 1 along outputs unless",
        partial(select_nm, some(4, 1), ScoreTerms(), 2, 4, axis="out", unless=some(1, dtype=torch.int32)),
    )
    yield "2:4 of 0 x 4", partial(select_nm, some(0, 4), terms(0, 4, ALL_TERMS), 2, 4)


def select_nm_group_calls() -> Iterator[tuple[str, Call]]:
    """Layers of one kind and of several, few and many, along both axes."""
    groups = {"1 x 4": [(1, 4)], "all shapes": WEIGHTS, "64 of 16 x 16": [(16, 16)] * 64, "0 x 4": [(0, 4)]}
    for name, shapes in groups.items():
        for names in (VECTORS, ()):
            yield (
                f"2:4 of {name} by {len(names)} vectors",
                lambda shapes=shapes, names=names: select_nm_group(
                    [some(r, c) for r, c in shapes], [terms(r, c, names) for r, c in shapes], 2, 4
                ),
            )
    flag = some(1, dtype=torch.int32)
    for n, m, axis in ((2, 4, "out"), (5, 16, "in"), (1, 2, "in")):
        weights = [some(m, m), some(m, 3 * m)]
        every = [terms(*w.shape, ("scale",)) for w in weights]
        yield f"{n}:{m} along {axis}, unless", partial(select_nm_group, weights, every, n, m, axis=axis, unless=[flag])


def select_rows_calls() -> Iterator[tuple[str, Call]]:
    """Rows in registers, rows that are too long for them, and whole layers."""
    for r, c in ((1, 1), (1, 4), (1, 33), (33, 48), (1, 4096)):
        yield (
            f"half of the layer {r} x {c}",
            lambda r=r, c=c: select_rows(some(r, c), terms(r, c, ALL_TERMS), max(1, c // 2), scope="layer"),
        )
        yield f"half of {r} x {c}", lambda r=r, c=c: select_rows(some(r, c), terms(r, c, ALL_TERMS), max(1, c // 2))
    yield "1 of 1 x 36", partial(select_rows, some(1, 36), terms(1, 36, ("scale",)), 1)
    yield "1 of 1 x 33, fp32, bits", partial(select_rows, some(1, 33, dtype=FP32), ScoreTerms(), 1, output="bits")
    yield "1 of 1 x 33, fp16, mask", partial(select_rows, some(1, 33, dtype=FP16), ScoreTerms(), 1, output="mask")
    yield "1 of 1 x 40000", partial(select_rows, some(1, 40000), ScoreTerms(), 1)
    yield "0 of 1 x 4", partial(select_rows, some(1, 4), ScoreTerms(), 0)
    yield "0 of 0 x 4", partial(select_rows, some(0, 4), ScoreTerms(), 0, scope="layer")


def weight_sums_calls() -> Iterator[tuple[str, Call]]:
    """RIA's sums, and all of ACE's terms."""
    for r, c in ((1, 1), (7, 1), (1, 36), (33, 48), (1, 4096), (0, 4), (4, 0)):
        yield f"{r} x {c}", partial(weight_sums, some(r, c))
    yield "1 x 1, fp32", partial(weight_sums, some(1, 1, dtype=FP32))
    for c in (1, 33):
        scale = ColumnScale(some(c, dtype=torch.float64), 2.0, factor=some(c, dtype=FP32), sign=-1)
        yield f"relative importance of 1 x {c}, with a scale", partial(relative_importance, some(1, c), scale)
    yield "relative importance of 7 x 1", partial(relative_importance, some(7, 1))


def group_calls() -> Iterator[tuple[str, Call]]:
    """Sums and checks of weights, and vectors of layers: few layers and many."""
    groups = {"1 x 1": [(1, 1)], "some": [*MATRICES, (0, 4), (16, 16)], "64 of 16 x 16": [(16, 16)] * 64}
    for name, shapes in groups.items():
        weights = [some(r, c) for r, c in shapes]
        yield f"sums of {name}", partial(group_relative_importance, weights)
        yield f"checks of {name}", partial(find_each_not_finite, weights)
        for norm in ("frobenius", "channel"):
            yield f"vectors of {name}, {norm}", partial(vectors_of_layers, shapes, norm)


def column_scale_calls() -> Iterator[tuple[str, Call]]:
    """With and without each vector."""
    for c in (1, 33):
        square, vector = some(c, dtype=torch.float64), some(c, dtype=FP32)
        yield f"{c}, all", partial(column_scale, ColumnScale(square, 3.0, base=vector, factor=vector))
        yield f"{c}, a square over 1", partial(column_scale, ColumnScale(square, 1))
        yield f"{c}, divided by a factor", partial(column_scale, ColumnScale(factor=vector, sign=-1))
        yield f"{c}, to the 3/4", partial(column_scale, ColumnScale(square, 3.0, exponent=0.75))
    yield "0", partial(column_scale, ColumnScale(base=some(0, dtype=FP32)))


def variance_factor_calls() -> Iterator[tuple[str, Call]]:
    """Every norm, with a power of 1 and another."""
    for s, c in (*MATRICES, (0, 4), (4, 0)):
        for norm, power in (("frobenius", 1.0), ("channel", 0.5), ("max_layer", 2), ("max_sequence", 0.5)):
            yield f"{s} x {c}, {norm}", partial(variance_factor, some(s, c, dtype=FP32), norm, power, 0.01)


def moments_calls() -> Iterator[tuple[str, Call]]:
    """With and without padding."""
    shapes = ((1, 1, 1), (1, 1, 16), (1, 7, 4096), (7, 1, 1), (1, 1000, 1), (2, 1, 4096), (300, 1, 16), (1, 5000, 64))
    for s, l, c in (*shapes, (600, 64, 4096), (1, 40000, 16), (0, 4, 4), (4, 0, 4)):
        yield f"{s} x {l} x {c}", lambda s=s, l=l, c=c: moments(some(s, l, c))
        yield (
            f"{s} x {l} x {c}, padded",
            lambda s=s, l=l, c=c: moments(some(s, l, c), torch.ones(s, l, dtype=torch.bool)),
        )
    yield "one sequence of 3 x 5, fp32", partial(moments, some(3, 5, dtype=FP32))


def token_calls() -> Iterator[tuple[str, Call]]:
    """What is summed over tokens."""
    for t, c in (*MATRICES, (0, 4), (4, 0)):
        yield f"norms of {t} x {c}", partial(token_norms, some(t, c))
        for layers in (1, 3, 8):
            weights = some(layers, t, dtype=FP32)
            yield f"squares of {t} x {c} for {layers} layers", partial(weighted_squares, some(t, c), weights)
    yield "norms of 1 x 1, fp32", partial(token_norms, some(1, 1, dtype=FP32))


def token_statistics_calls() -> Iterator[tuple[str, Call]]:
    """With and without padding and token weights, for no layer, one, three of different widths, and eight."""
    cpu = torch.device("cpu")
    for s, l, c, widths, padded in (
        (1, 1, 1, (1,), True),
        (1, 1, 1, (), False),
        (1, 7, 4096, (4096, 1, 16), False),
        (7, 1, 1, (4,) * 8, True),
        (300, 1, 16, (33,), False),
        (1, 5000, 64, (64, 64), True),
        (600, 64, 33, (), True),
    ):
        yield (
            f"{s} x {l} x {c} for outputs of {widths}" + ", padded" * padded,
            lambda s=s, l=l, c=c, widths=widths, padded=padded: token_statistics(
                some(s, l, c),
                torch.ones(s, l, dtype=torch.bool) if padded else None,
                no_moments(c, cpu),
                [some(s * l, width) for width in widths],
                no_layer_sums(len(widths), c, cpu),
                token_weights=padded,
            ),
        )


def all_finite_calls() -> Iterator[tuple[str, Call]]:
    """One tensor and two."""
    for t, c in (*MATRICES, (0, 4)):
        yield f"{t} x {c}", partial(all_finite, some(t, c))
        yield f"{t} x {c} and {c}", partial(all_finite, some(t, c), some(c, dtype=FP32))
        flag = some(1, dtype=torch.int32)
        yield f"{t} x {c}, not read", partial(find_not_finite, some(t, c), also=flag)


def training_calls() -> Iterator[tuple[str, Call]]:
    """A step of recovery."""
    for t, c in (*MATRICES, (0, 4)):
        yield f"divergence of {t} x {c}", partial(divergence, some(t, c), some(t, c))
        yield f"divergence of {t} x {c}, mixed dtypes", partial(divergence, some(t, c), some(t, c, dtype=FP32))
        values, first, second = (some(t, c, dtype=FP32) for _ in range(3))
        step = partial(adamw, values, GradientMoments(first, second), step=Step(1, 1))
        extras = {"factor": torch.ones(1), "rounded": some(t, c)}
        yield f"adamw of {t} x {c}", partial(step, some(t, c), **extras)
        yield f"adamw of {t} x {c} in fp32", partial(step, some(t, c, dtype=FP32), zeros_stay=False)


def coupling_calls() -> Iterator[tuple[str, Call]]:
    """Both reductions, and CosP in one pass."""
    for t, c in (*MATRICES, (0, 4)):
        for reduce in ("abs", "rms"):
            yield f"{t} x {c}, {reduce}", partial(coupling, some(t, c), some(t, c), some(t, dtype=FP32), reduce)
    yield "1 x 1, fp32", partial(coupling, some(1, 1, dtype=FP32), some(1, 1, dtype=FP32), some(1, dtype=FP32))
    for r, c, t in ((1, 4, 1), (32, 64, 1), (1, 4, 5), (1, 4, 0)):
        yield (
            f"cosp_select of {r} x {c} by {t} tokens",
            lambda r=r, c=c, t=t: cosp_select(
                some(r, c), terms(r, c, VECTORS), some(t, c), some(t, r), some(t, dtype=FP32), 2, 4
            ),
        )


def join_gains_calls() -> Iterator[tuple[str, Call]]:
    """Pools, rows, groups and candidates of 1, and more pools than an axis of a grid takes programs."""
    for p, r, g, y in ((1, 1, 1, 1), (1, 1, 1, 5), (3, 7, 1, 1), (1, 129, 5, 1), (1, 0, 2, 2), (65536, 1, 1, 1)):
        yield f"{p}, {r}, {g}, {y}", partial(join_gains, some(p, r, y, dtype=FP32), some(p, r, g, dtype=FP32))


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


LAUNCHERS: dict[str, Callable[[], Iterator[tuple[str, Call]]]] = {
    "select_nm": select_nm_calls,
    "select_rows": select_rows_calls,
    "weight_sums": weight_sums_calls,
    "groups": group_calls,
    "select_nm_group": select_nm_group_calls,
    "column_scale": column_scale_calls,
    "variance_factor": variance_factor_calls,
    "moments": moments_calls,
    "tokens": token_calls,
    "token_statistics": token_statistics_calls,
    "all_finite": all_finite_calls,
    "training": training_calls,
    "coupling": coupling_calls,
    "join_gains": join_gains_calls,
    "pack_nm": pack_calls,
    "nm_linear": nm_linear_calls,
    "nm_linear_mma": nm_linear_mma_calls,
    "quantized_linear": quantized_linear_calls,
    "rows_linear": rows_linear_calls,
}
