"""What the report on the CPU library compares: our operations beside passes over memory and published forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ace_triton import ActivationStats, Sparsity, prune_linear
from ace_triton.kernels import cpu
from ace_triton.kernels.expanded_linear import expanded_linear, has_expanded_product
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_nm, pack_scored
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.weight_sums import weight_sums
from ace_triton.methods.wanda_ria import ria, wanda
from ace_triton.solvers.quantize import GROUP
from benchmarks.claims.published import prune_groups, prune_rows_by_sort, prune_rows_by_topk, wanda_scores

SHAPE = (4096, 11008)
TOKENS = ((512, 16, 4096), (64, 128, 4096), (4, 2048, 4096), (2, 2048, 11008))
SMOLLM2_BLOCKS = 30
SMOLLM2_SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))

# The first layer of each distinct input: q, k and v read one tensor, then o, then gate and up, then down.
SMOLLM2_INPUTS = (0, 3, 4, 6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Two calls to time in turn.

    Attributes:
        what, against: names of the two sides.
        dtype: type of the weight or the tokens.
        call, baseline: the two sides.
        restore: runs untimed before each side.
        at_most: target for the time of ``call`` over that of ``baseline``.
        at_least: target for the inverse, if the baseline is the slow side.
        few_rounds: take SLOW_ROUNDS, for a baseline that takes seconds.
    """

    what: str
    against: str
    dtype: str
    call: Call
    baseline: Call
    restore: Call
    at_most: float | None = None
    at_least: float | None = None
    few_rounds: bool = False


def against_passes(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """One-pass operations against an in-place multiplication by 1, or a read."""
    torch.manual_seed(0)
    dense = torch.randn(SHAPE).mul_(0.02).to(dtype)
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=dtype)
    weight = layer.weight.detach()
    stats = ActivationStats.from_tokens(torch.randn(8, 32, SHAPE[1]))

    def restore() -> None:
        weight.copy_(dense)

    plain, relative = wanda(dense, stats), ria(dense, stats)
    narrow = dtype != torch.float32
    passes, reads = "`weight.mul_(1)`", "plain read"

    def multiply() -> object:
        return weight.mul_(1)

    def read() -> object:
        return all_finite(weight)

    def compare(what: str, against: str, call: Call, at_most: float | None = None) -> Comparison:
        return Comparison(what, against, label, call, multiply if against == passes else read, restore, at_most)

    yield compare("2:4 in place, Wanda's terms", passes, lambda: select_nm(weight, plain, 2, 4), 2.2 if narrow else 1.6)
    yield compare("2:4 in place, RIA's terms", passes, lambda: select_nm(weight, relative, 2, 4))
    yield compare("4:8 in place, Wanda's terms", passes, lambda: select_nm(weight, plain, 4, 8))
    yield compare("50 % of each row, Wanda's terms", passes, lambda: select_rows(weight, plain, SHAPE[1] // 2))
    yield compare("weight_sums", reads, lambda: weight_sums(weight))
    yield compare("torch.sum", reads, lambda: weight.sum())
    for method in ("wanda", "ria"):
        target = (3.2 if narrow else 2.5) if method == "wanda" else None
        yield compare(
            f"prune_linear, 2:4, {method}",
            passes,
            lambda method=method: prune_linear(layer, stats, method=method, sparsity="2:4"),
            target,
        )


def against_published(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Selections against the published ones, including the scores on both sides."""
    torch.manual_seed(0)
    dense = torch.randn(SHAPE).mul_(0.02).to(dtype)
    weight, mean_square = dense.clone(), torch.rand(SHAPE[1]) + 0.1
    terms, half = ScoreTerms(scale=mean_square.sqrt()), SHAPE[1] // 2

    def restore() -> None:
        weight.copy_(dense)

    def rows() -> object:
        return select_rows(weight, terms, SHAPE[1] - half)

    def compare(what: str, against: str, call: Call, baseline: Call, at_least: float) -> Comparison:
        return Comparison(what, against, label, call, baseline, restore, at_least=at_least, few_rounds=True)

    yield compare(
        "2:4 in place",
        "published loop over groups",
        lambda: select_nm(weight, terms, 2, 4),
        lambda: prune_groups(weight, wanda_scores(weight, mean_square), 2, 4),
        100,
    )
    for against, prune, at_least in (("top-k and scatter", prune_rows_by_topk, 15), ("sort", prune_rows_by_sort, 45)):
        yield compare(
            "50 % of each row",
            against if prune is prune_rows_by_topk else "published stable sort",
            rows,
            lambda prune=prune: prune(weight, wanda_scores(weight, mean_square), half),
            at_least,
        )


def over_tokens(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Statistics against a read of the same tokens."""
    for shape in TOKENS:
        tokens = torch.randn(shape).to(dtype)
        yield Comparison(
            f"moments of {' x '.join(map(str, shape))}",
            "plain read",
            label,
            lambda tokens=tokens: moments(tokens),
            lambda tokens=tokens: all_finite(tokens),
            lambda: None,
            1.3 if dtype == torch.float32 else 2.0,
        )


def over_small_layers(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Score and mask of SmolLM2-135M's 210 layers, one by one."""
    weights = [torch.randn(shape).to(dtype) for _ in range(SMOLLM2_BLOCKS) for shape in SMOLLM2_SHAPES]
    terms = {cols: ScoreTerms(scale=torch.rand(cols) + 0.1) for _, cols in SMOLLM2_SHAPES}
    yield Comparison(
        "2:4 of SmolLM2-135M's 210 layers",
        "`mul_(1)` of each",
        label,
        lambda: [select_nm(weight, terms[weight.shape[1]], 2, 4) for weight in weights],
        lambda: [weight.mul_(1) for weight in weights],
        lambda: None,
        4.0,
    )


def over_a_model(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Score and mask of all of SmolLM2-135M: terms, checks and selection.

    Layers that read one input share its statistics, which come from 128 sequences and have nothing derived yet.
    """
    blocks = [
        [nn.Linear(cols, rows, bias=False, dtype=dtype) for rows, cols in SMOLLM2_SHAPES] for _ in range(SMOLLM2_BLOCKS)
    ]
    weights = [layer.weight.detach() for block in blocks for layer in block]
    tokens = {cols: torch.randn(128, 16, cols) for _, cols in SMOLLM2_SHAPES}
    seen = {cols: ActivationStats.from_tokens(x) for cols, x in tokens.items()}
    outputs = {
        shape: ActivationStats.from_tokens(tokens[shape[1]], layer=nn.Linear(shape[1], shape[0])).outputs
        for shape in SMOLLM2_SHAPES
    }
    fresh: list[list[ActivationStats]] = []
    pattern = Sparsity("2:4")

    def forget() -> None:
        fresh[:] = [[seen[SMOLLM2_SHAPES[first][1]].to("cpu") for first in SMOLLM2_INPUTS] for _ in blocks]

    def prune_all(method: str) -> None:
        for block, inputs in zip(blocks, fresh, strict=True):
            for index, (layer, shape) in enumerate(zip(block, SMOLLM2_SHAPES, strict=True)):
                stats = inputs[sum(first <= index for first in SMOLLM2_INPUTS) - 1]
                prune_linear(layer, stats.with_outputs(outputs[shape]), method, pattern)

    for method in ("wanda", "ria", "ace"):
        yield Comparison(
            f"prune_linear of SmolLM2-135M's 210 layers, {method}",
            "`mul_(1)` of each",
            label,
            lambda method=method: prune_all(method),
            lambda: [weight.mul_(1) for weight in weights],
            forget,
            4.0,
        )


def packed_products(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """2:4 products of few rows against the same loop over the dense weight and against torch; packing against a pass.

    The weights are larger than any cache.
    """
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).mul_(0.02).to(dtype)
    terms = ScoreTerms(scale=torch.rand(SHAPE[1]) + 0.1)
    packed = pack_scored(weight, terms, 2, 4)
    for rows in (1, 4, 16):
        tokens = torch.randn(rows, SHAPE[1]).to(dtype)
        dense: Call = lambda tokens=tokens: cpu.dense_linear(tokens, weight)  # noqa: E731
        torchs: Call = lambda tokens=tokens: nn.functional.linear(tokens, weight)  # noqa: E731
        of_dense = (1.7 if dtype == torch.float32 else 1.25) if rows == 1 else 0.0
        for against, baseline, at_least in (
            ("the same loop, dense", dense, of_dense),
            ("`F.linear`", torchs, 2.0 if rows == 1 else 0.0),
        ):
            yield Comparison(
                f"nm_linear 2:4, {rows} row{'s' * (rows > 1)}",
                against,
                label,
                lambda tokens=tokens: nm_linear(tokens, packed),
                baseline,
                lambda: None,
                at_least=at_least,
            )
    pruned = select_nm(weight.clone(), terms, 2, 4)
    into = torch.empty_like(weight)
    for what, call in (
        ("pack_scored 2:4", lambda: pack_scored(weight, terms, 2, 4)),
        ("pack_nm 2:4", lambda: pack_nm(pruned, 2, 4)),
        ("unpack_nm 2:4", lambda: unpack_nm(packed, into)),
    ):
        yield Comparison(what, "`weight.mul_(1)`", label, call, lambda: weight.mul_(1), lambda: None)


def patterns_of_one_row(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Products of one row at 2:4 and 8:16 in 8 and 4 bits, and at 8:16 in the weight's dtype, against dense loops.

    A dense loop reads a weight of the same bits that is not pruned. The weights are larger than the second-level cache.
    """
    torch.manual_seed(0)
    weight, tokens = torch.randn(SHAPE).mul_(0.02).to(dtype), torch.randn(1, SHAPE[1]).to(dtype)
    packed = {pattern: pack_scored(weight, ScoreTerms(), *pattern) for pattern in ((2, 4), (8, 16))}
    for bits, at_least in ((8, 1.33), (4, 1.18)):
        dense = quantize_dense(weight, bits, GROUP)
        for (n, m), pruned in packed.items():
            rounded = quantize_nm(pruned, bits, GROUP)
            yield Comparison(
                f"nm_linear {n}:{m}, {bits} bits, 1 row",
                f"the dense loop in {bits} bits",
                label,
                lambda rounded=rounded: nm_linear(tokens, rounded),
                lambda dense=dense: quantized_linear(tokens, dense),
                lambda: None,
                at_least=at_least,
            )
    yield Comparison(
        "nm_linear 8:16, 1 row",
        "the same loop, dense",
        label,
        lambda: nm_linear(tokens, packed[8, 16]),
        lambda: cpu.dense_linear(tokens, weight),
        lambda: None,
        at_least=1.25,
    )


def expanded_products(label: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """bf16 products of more rows, from packed weights that are larger than any cache, against torch's dense product."""
    if dtype != torch.bfloat16 or not has_expanded_product():
        return
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).mul_(0.02).to(dtype)
    two_of_four, eight_of_16 = (pack_scored(weight, ScoreTerms(), n, m) for n, m in ((2, 4), (8, 16)))
    weights = {"2:4": two_of_four, "8:16": eight_of_16}
    weights |= {f"8:16, {bits} bits": quantize_nm(eight_of_16, bits, GROUP) for bits in (8, 4)}
    for name, packed in weights.items():
        for rows in (16, 64, 256):
            tokens = torch.randn(rows, SHAPE[1]).to(dtype)
            yield Comparison(
                f"expanded_linear {name}, {rows} rows",
                "`F.linear`",
                label,
                lambda tokens=tokens, packed=packed: expanded_linear(tokens, packed),
                lambda tokens=tokens: nn.functional.linear(tokens, weight),
                lambda: None,
                at_least=1.0,
            )


SECTIONS = (
    against_passes,
    against_published,
    packed_products,
    patterns_of_one_row,
    expanded_products,
    over_tokens,
    over_small_layers,
    over_a_model,
)
