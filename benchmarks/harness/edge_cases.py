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
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_layer_sums, no_moments, token_statistics
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weight_sums_group import group_relative_importance
from ace_triton.kernels.weighted_squares import weighted_squares

from .block_cases import vectors_of_layers
from .edge_tensors import ALL_TERMS, FP16, FP32, MATRICES, VECTORS, WEIGHTS, Call, some, terms
from .packed_edge_cases import (
    nm_linear_calls,
    nm_linear_mma_calls,
    pack_calls,
    quantized_linear_calls,
    rows_linear_calls,
)


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
        for group in (32, 2**20):
            yield f"{t} x {c} in groups of {group}", partial(round_groups, values, 8, group, FP32, some(t, c))


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
