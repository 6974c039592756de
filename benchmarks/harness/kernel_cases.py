"""The cases of the machine-code report: public launchers, at the shapes of a real layer, in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.column_scale import ColumnScale, column_scale
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import nm_linear_mma
from ace_triton.kernels.pack_nm import PackedNM, pack_cutlass, pack_nm, pack_scored
from ace_triton.kernels.pack_rows import unpack_rows
from ace_triton.kernels.packed_rows import PackedRows
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_layer_sums, no_moments, token_statistics
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weighted_squares import weighted_squares

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Terms of the metrics, as the selection kernels get them.
TERMS = {
    "magnitude": (),
    "scale": ("scale",),
    "RIA": ("row", "col", "scale"),
    "RIA, coupling": ("row", "col", "scale", "coupling"),
}

SHAPE = (4096, 11008)
TOKENS = (8, 2048, 4096)
LOGITS = (1024, 49152)


@dataclass(frozen=True)
class Case:
    """One call of a public launcher.

    Attributes:
        name: operation and variant.
        dtype: type of the weight or the tokens.
        call: makes the call, with uninitialized tensors.
        elements: number of weights or token elements.
        loaded: bytes per element that the widest loads read.
        moved: bytes per element that must cross DRAM; 0 if the call is bound by arithmetic or latency.
        launch: index of the launch that the report shows.
        nvidia: True if the kernel runs on NVIDIA GPUs only.
    """

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    elements: int
    loaded: float
    moved: float
    launch: int = 0
    nvidia: bool = False


def terms(rows: int, cols: int, names: tuple[str, ...]) -> ScoreTerms:
    """Empty terms for a weight [rows, cols]."""
    shapes = {"row": (rows,), "col": (cols,), "scale": (cols,), "coupling": (rows, cols)}
    return ScoreTerms(**{name: torch.empty(shapes[name]) for name in names})


def select_nm_case(
    dtype: torch.dtype, metric: str, n: int = 2, m: int = 4, axis: str = "in", output: str = "weight"
) -> Case:
    """select_nm over a whole layer."""
    rows, cols = SHAPE
    size = dtype.itemsize
    loaded = size + 4 * (metric == "RIA, coupling")
    written = {"weight": size, "mask": 1, "bits": 1 / 8}[output]
    name = f"select_nm {n}:{m} {metric}" + f", axis {axis}" * (axis != "in") + f", {output}" * (output != "weight")
    return Case(
        name,
        dtype,
        lambda: select_nm(
            torch.empty(SHAPE, dtype=dtype), terms(rows, cols, TERMS[metric]), n, m, axis=axis, output=output
        ),
        rows * cols,
        loaded,
        loaded + written,
    )


def select_rows_case(dtype: torch.dtype, cols: int, metric: str = "scale") -> Case:
    """select_rows, half of every row."""
    size = dtype.itemsize
    return Case(
        f"select_rows of {cols}, {metric}",
        dtype,
        lambda: select_rows(torch.empty(4096, cols, dtype=dtype), terms(4096, cols, TERMS[metric]), cols // 2),
        4096 * cols,
        size,
        2 * size,
    )


def moments_case(dtype: torch.dtype, masked: bool = False) -> Case:
    """Moments of a batch of long sequences."""
    valid = torch.ones(TOKENS[:2], dtype=torch.bool) if masked else None
    size = dtype.itemsize
    name = "moments, padding left out" if masked else "moments"
    elements = TOKENS[0] * TOKENS[1] * TOKENS[2]
    return Case(name, dtype, lambda: moments(torch.empty(TOKENS, dtype=dtype), valid), elements, size, size)


def token_statistics_cases(dtype: torch.dtype, layers: int) -> Iterator[Case]:
    """All statistics of a batch of long sequences that square layers read: the norms, the sums and their merge."""
    sequences, length, width = TOKENS
    size, cpu = dtype.itemsize, torch.device("cpu")

    def call() -> object:
        outputs = [torch.empty(sequences * length, width, dtype=dtype) for _ in range(layers)]
        sums = no_layer_sums(layers, width, cpu)
        return token_statistics(torch.empty(TOKENS, dtype=dtype), None, no_moments(width, cpu), outputs, sums)

    elements = sequences * length * width
    name = f"token_statistics, {layers} layer{'s' * (layers > 1)}"
    yield Case(f"{name}, norms", dtype, call, elements * layers, size, size)
    yield Case(f"{name}, sums", dtype, call, elements, size, size, launch=1)
    yield Case(f"{name}, merge", dtype, call, elements, size, 0, launch=2)


def weight_sums_case(dtype: torch.dtype) -> Case:
    """RIA's sums of a layer."""
    size = dtype.itemsize
    call = lambda: weight_sums(torch.empty(SHAPE, dtype=dtype))  # noqa: E731
    return Case("weight_sums", dtype, call, SHAPE[0] * SHAPE[1], size, size)


def finite_pair_case(dtype: torch.dtype) -> Case:
    """A check of a weight and its coupling matrix in one launch, for ACE's published form.

    A program runs one of two branches; both are counted.
    """
    call = lambda: all_finite(torch.empty(SHAPE, dtype=dtype), torch.empty(SHAPE))  # noqa: E731
    moved = (dtype.itemsize + 4) / 2
    return Case("all_finite, weight and coupling", dtype, call, 2 * SHAPE[0] * SHAPE[1], moved, moved)


def vector_cases() -> Iterator[Case]:
    """The vectors of ACE's terms: a launch for a layer's sums, one for its scale, and both launches of VarP."""
    rows, cols = SHAPE
    of = ColumnScale(torch.empty(cols, dtype=torch.float64), 2.0, factor=torch.empty(cols), sign=-1)
    call = lambda: relative_importance(torch.empty(SHAPE, dtype=torch.bfloat16), of)  # noqa: E731
    yield Case("weight_sums, merge and scale", torch.float32, call, rows + cols, 4, 0, launch=1)
    yield Case("column_scale", torch.float32, lambda: column_scale(of), cols, 8, 0)
    average = lambda: variance_factor(torch.empty(128, cols), "frobenius", 1.0, 0.01)  # noqa: E731
    for launch, part in enumerate(("levels", "means")):
        yield Case(f"variance_factor, {part}", torch.float32, average, 128 * cols, 4, 0, launch)


def divergence_case(dtype: torch.dtype) -> Case:
    """Loss of recovery: two models' logits; the gradient overwrites the first.

    The second loop over a row is assumed to be as long as the first.
    """
    size = dtype.itemsize

    def call() -> object:
        logits = torch.empty(LOGITS, dtype=dtype)
        return divergence(logits, torch.empty(LOGITS, dtype=dtype), into=logits)

    return Case("divergence", dtype, call, LOGITS[0] * LOGITS[1], 4 * size, 3 * size)


def adamw_case(dtype: torch.dtype) -> Case:
    """A step of recovery's optimizer, with gradients and rounded values in this dtype."""
    size = dtype.itemsize

    def call() -> None:
        values, first, second = torch.empty(3, *SHAPE)
        gradient, rounded = torch.empty(2, *SHAPE, dtype=dtype)
        adamw(values, GradientMoments(first, second), gradient, Step(1e-3, 1), factor=torch.empty(1), rounded=rounded)

    return Case("adamw", dtype, call, SHAPE[0] * SHAPE[1], 24 + 2 * size, 24 + 2 * size)


def round_groups_case(dtype: torch.dtype, group: int = 128) -> Case:
    """Weights of a recovery in 8 bits, rounded for forwards in this dtype."""

    def call() -> object:
        return round_groups(torch.empty(SHAPE), 8, group, dtype, torch.empty(SHAPE, dtype=dtype))

    moved = 4 + dtype.itemsize
    return Case(f"round_groups of {group}", dtype, call, SHAPE[0] * SHAPE[1], 4, moved)


def coupling_case(dtype: torch.dtype, reduce: str) -> Case:
    """The coupling of a square layer with a batch of tokens."""
    n_tokens, width = TOKENS[0] * TOKENS[1], TOKENS[2]

    def call() -> object:
        tokens, outputs = torch.empty(2, n_tokens, width, dtype=dtype)
        return coupling(tokens, outputs, torch.empty(n_tokens), reduce)

    return Case(f"coupling {reduce}", dtype, call, n_tokens * width, dtype.itemsize, 0)


def cosp_select_case(dtype: torch.dtype, reduce: str, metric: str = "scale") -> Case:
    """The published CosP of a square layer at 2:4 in one pass over a batch of tokens."""
    n_tokens, width = TOKENS[0] * TOKENS[1], TOKENS[2]

    def call() -> object:
        tokens, outputs = torch.empty(2, n_tokens, width, dtype=dtype)
        weight, factors = torch.empty(width, width, dtype=dtype), terms(width, width, TERMS[metric])
        return cosp_select(weight, factors, tokens, outputs, torch.empty(n_tokens), 2, 4, reduce=reduce)

    return Case(f"cosp_select 2:4 {metric}, {reduce}", dtype, call, n_tokens * width, dtype.itemsize, 0)


def join_gains_case() -> Case:
    """Gains in a round of the permutation search: every pair of groups of a layer's channels, in every row."""
    rows, groups = SHAPE[0], SHAPE[1] // 4
    call = lambda: join_gains(*torch.empty(2, 1, rows, groups))  # noqa: E731
    pairs_a_load = 16
    return Case("join_gains", torch.float32, call, rows * groups * groups, 4 / pairs_a_load, 0)


def pack_case(dtype: torch.dtype, scored: bool, n: int = 2, m: int = 4) -> Case:
    """A layer packed: in the selection, or after it."""
    rows, cols = SHAPE
    size = dtype.itemsize

    def call() -> object:
        weight = torch.zeros(SHAPE, dtype=dtype)
        return pack_scored(weight, terms(rows, cols, TERMS["scale"]), n, m) if scored else pack_nm(weight, n, m)

    name = f"{'pack_scored' if scored else 'pack_nm'} {n}:{m}"
    return Case(name, dtype, call, rows * cols, size, size + size * n / m + 1 / 8)


def pack_cutlass_case(dtype: torch.dtype, scored: bool) -> Case:
    """A layer packed in CUTLASS's layout: in the selection, or after it."""
    rows, cols = SHAPE
    size = dtype.itemsize
    call = lambda: pack_cutlass(  # noqa: E731
        torch.zeros(SHAPE, dtype=dtype), terms(rows, cols, TERMS["scale"]) if scored else None
    )
    name = f"pack_cutlass{', scored' * scored}"
    return Case(name, dtype, call, rows * cols, size, size + size / 2 + 1 / 8)


def empty_packed(dtype: torch.dtype, n: int, m: int) -> PackedNM:
    """A packed layer with uninitialized values."""
    rows, cols = SHAPE
    values, meta = torch.empty(rows, cols * n // m, dtype=dtype), torch.empty(rows, cols // 32, dtype=torch.int32)
    return PackedNM(values, meta, n, m, SHAPE)


def unpack_case(dtype: torch.dtype, n: int = 2, m: int = 4) -> Case:
    """A layer unpacked."""
    size, values = dtype.itemsize, dtype.itemsize * n / m
    call = lambda: unpack_nm(empty_packed(dtype, n, m))  # noqa: E731
    return Case(f"unpack_nm {n}:{m}", dtype, call, SHAPE[0] * SHAPE[1], values, values + 1 / 8 + size)


def nm_linear_case(dtype: torch.dtype, n_tokens: int, n: int = 2, m: int = 4) -> Case:
    """A layer times a few tokens.

    The widest loads read the 2:4 values and, without matrix units, the tokens. Tokens that share a read of the weight
    are read once for four outputs, in every program from the cache.
    """
    rows, cols = SHAPE
    size = dtype.itemsize

    def call() -> object:
        return nm_linear(torch.empty(n_tokens, cols, dtype=dtype), empty_packed(dtype, n, m))

    weight_bytes = size * n / m
    on_matrix_units = n_tokens >= (9 if dtype == torch.float32 else 3)
    shared = 0 if on_matrix_units else n_tokens
    name = f"nm_linear {n}:{m}, {n_tokens} row{'s' * (n_tokens > 1)}"
    loaded = weight_bytes * ((n, m) == (2, 4)) + shared * size / 4
    return Case(name, dtype, call, rows * cols, loaded, weight_bytes + 1 / 8)


def nm_linear_mma_case(dtype: torch.dtype, n_tokens: int) -> Case:
    """A 2:4 layer on NVIDIA's sparse matrix units; the widest loads read its values."""
    rows, cols = SHAPE

    def call() -> object:
        fragments = torch.empty(rows // 16, cols // 64, 32, dtype=torch.int32)
        return nm_linear_mma(torch.empty(n_tokens, cols, dtype=dtype), empty_packed(dtype, 2, 4), fragments)

    name = f"nm_linear_mma, {n_tokens} row{'s' * (n_tokens > 1)}"
    return Case(name, dtype, call, rows * cols, 1, 1 + 1 / 8, nvidia=True)


def few_bits_mma_case(dtype: torch.dtype, bits: int, n_tokens: int) -> Case:
    """A 2:4 layer of few bits on NVIDIA's sparse matrix units.

    The widest loads read its values of 8 bits, or its values of 4 bits and its metadata.
    """
    rows, cols = SHAPE

    def call() -> object:
        packed = PackedNM.empty(SHAPE, 2, 4, dtype=dtype, device="cpu", bits=bits, group=128)
        fragments = torch.empty(rows // 16, cols // 128, 64, dtype=torch.int32)
        return nm_linear_mma(torch.empty(n_tokens, cols, dtype=dtype), packed, fragments)

    name = f"nm_linear_mma, {bits} bits, {n_tokens} row{'s' * (n_tokens > 1)}"
    values, meta, scales = bits / 16, 1 / 8, dtype.itemsize / 128
    loaded = values if bits == 8 else values + meta
    return Case(name, dtype, call, rows * cols, loaded, values + meta + scales, nvidia=True)


def few_bits_case(dtype: torch.dtype, bits: int, n_tokens: int) -> Case:
    """A layer of few bits, 8:16, times a few tokens. The widest loads read the tokens, once for 4 or for 32 outputs."""
    rows, cols = SHAPE

    def call() -> object:
        packed = PackedNM.empty(SHAPE, 8, 16, dtype=dtype, device="cpu", bits=bits, group=128)
        return nm_linear(torch.empty(n_tokens, cols, dtype=dtype), packed)

    name = f"nm_linear 8:16, {bits} bits, {n_tokens} row{'s' * (n_tokens > 1)}"
    moved = bits / 16 + 1 / 8 + dtype.itemsize / 128
    return Case(name, dtype, call, rows * cols, n_tokens * dtype.itemsize / (4 if n_tokens <= 8 else 32), moved)


def unpack_rows_case(dtype: torch.dtype) -> Case:
    """A layer whose zeros follow no pattern, half of it kept, unpacked."""
    size = dtype.itemsize
    call = lambda: unpack_rows(empty_rows(dtype))  # noqa: E731
    return Case("unpack_rows", dtype, call, SHAPE[0] * SHAPE[1], size / 2, size * 1.5 + 1 / 8)


def empty_rows(dtype: torch.dtype) -> PackedRows:
    """A layer whose zeros follow no pattern, half of it kept, with uninitialized values."""
    rows, cols = SHAPE
    values, meta = torch.empty(rows * cols // 2, dtype=dtype), torch.empty(rows, cols // 32, dtype=torch.int32)
    return PackedRows(values, meta, torch.empty(rows + 1, dtype=torch.int64), SHAPE)


def rows_linear_case(dtype: torch.dtype, n_tokens: int) -> Case:
    """A layer whose zeros follow no pattern, half of it kept, times a few tokens."""
    rows, cols = SHAPE
    weight_bytes = dtype.itemsize / 2

    def call() -> object:
        return rows_linear(torch.empty(n_tokens, cols, dtype=dtype), empty_rows(dtype))

    name = f"rows_linear, {n_tokens} row{'s' * (n_tokens > 1)}"
    return Case(name, dtype, call, rows * cols, n_tokens * dtype.itemsize / 4, weight_bytes + 1 / 8)


def every_case() -> Iterator[Case]:
    """All cases of the report."""
    n_tokens = TOKENS[0] * TOKENS[1]
    for dtype in DTYPES:
        for metric in TERMS:
            yield select_nm_case(dtype, metric)
        for output in ("mask", "bits"):
            yield select_nm_case(dtype, "scale", output=output)
        for n, m in ((1, 2), (4, 8), (8, 16), (16, 32)):
            yield select_nm_case(dtype, "scale", n, m)
        for n, m in ((2, 4), (16, 32)):
            yield select_nm_case(dtype, "scale", n, m, axis="out")
        for scored in (True, False):
            yield pack_case(dtype, scored)
        if dtype.itemsize == 2:
            for scored in (True, False):
                yield pack_cutlass_case(dtype, scored)
        for n, m in ((2, 4), (3, 8)):
            yield unpack_case(dtype, n, m)
        for few in (1, 2, 4, 16, 32) if dtype.itemsize == 2 else (1, 2, 4, 16):
            yield nm_linear_case(dtype, few)
        yield nm_linear_case(dtype, 1, 3, 8)
        if dtype.itemsize == 2:
            for few in (1, 8, 16, 64):
                yield nm_linear_mma_case(dtype, few)
            for bits in (8, 4):
                for few in (1, 8, 16, 64):
                    yield few_bits_mma_case(dtype, bits, few)
                for few in (1, 4, 16):
                    yield few_bits_case(dtype, bits, few)
        for few in (1, 4):
            yield rows_linear_case(dtype, few)
        yield unpack_rows_case(dtype)
        for cols in (576, 1536, 4096, 11008, 16384):
            yield select_rows_case(dtype, cols)
        yield moments_case(dtype)
        yield moments_case(dtype, masked=True)
        for layers in (1, 3):
            yield from token_statistics_cases(dtype, layers)
        yield weight_sums_case(dtype)
        yield _over_tokens("token_norms", dtype, token_norms)
        for layers in (1, 3):
            yield _over_tokens(
                f"weighted_squares, {layers} layers",
                dtype,
                lambda x, layers=layers: weighted_squares(x, torch.empty(layers, n_tokens)),
            )
        yield _over_tokens("all_finite", dtype, all_finite)
        yield finite_pair_case(dtype)
        yield divergence_case(dtype)
        yield adamw_case(dtype)
        yield round_groups_case(dtype)
        for reduce in ("abs", "rms"):
            yield coupling_case(dtype, reduce)
            yield cosp_select_case(dtype, reduce)
    yield from vector_cases()
    yield join_gains_case()


def _over_tokens(name: str, dtype: torch.dtype, operation: Callable[[torch.Tensor], object]) -> Case:
    shape = (TOKENS[0] * TOKENS[1], TOKENS[2])
    call = lambda: operation(torch.empty(shape, dtype=dtype))  # noqa: E731
    return Case(name, dtype, call, shape[0] * shape[1], dtype.itemsize, dtype.itemsize)
