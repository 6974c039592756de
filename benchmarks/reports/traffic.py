"""Counts bytes and launches of every operation by running it, over the fewest possible.

    TRITON_INTERPRET=1 ACE_TRITON_BACKEND=triton python -m benchmarks.reports.traffic [--out docs/traffic]

See :mod:`benchmarks.harness.traffic_counter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ace_triton import ActivationStats
from ace_triton.commands.report import write_json
from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.column_scale import ColumnScale, column_scale
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.output_norms import output_norms
from ace_triton.kernels.pack_nm import pack_cutlass, pack_nm, pack_scored
from ace_triton.kernels.pack_rows import pack_rows, unpack_rows
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_layer_sums, no_moments, token_statistics
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import weight_sums
from ace_triton.kernels.weight_sums_group import group_relative_importance
from ace_triton.kernels.weighted_squares import weighted_squares
from ace_triton.methods.wanda_ria import ria, wanda
from benchmarks.claims.published import prune_groups, prune_rows_by_sort, ria_scores, wanda_scores
from benchmarks.harness.traffic_counter import Counter, Traffic
from benchmarks.reports.block_traffic import BlockRow, block_lines, rows_of_blocks
from benchmarks.reports.layer_traffic import LAYER, LAYER_SHARE, LayerRow, layer_lines, planned_for, rows_of_layers

SHAPE = (512, 2048)
N_TOKENS = 2048
FEW_TOKENS = 256
FEW_OUTPUTS = 16

BATCH, BATCH_SHARE = (128, 128, 4096), (32, 128, 512)


@dataclass(frozen=True)
class Row:
    """One operation: bytes per element of the matrix it reads, compared with the fewest."""

    what: str
    elements: int
    least: int
    traffic: Traffic

    @property
    def ratio(self) -> float:
        """Distinct bytes over the fewest possible."""
        return (self.traffic.read + self.traffic.written) / self.least


def count(what: str, elements: int, least: int, call: Callable[[], object]) -> Row:
    """Run ``call`` and count its traffic."""
    with Counter().counting() as traffic:
        call()
    return Row(what, elements, least, traffic)


def rows_of_sums(dtype: torch.dtype) -> list[Row]:
    """Operations that sum over a whole layer or batch."""
    weight, tokens = torch.randn(LAYER_SHARE).to(dtype), torch.randn(BATCH_SHARE).to(dtype)
    pair = [weight, weight.clone()]
    (rows, cols), (sequences, _, channels) = LAYER_SHARE, BATCH_SHARE
    e, n, x = weight.element_size(), weight.numel(), tokens.numel()
    stats = ActivationStats.from_tokens(torch.randn(2, 4, cols))
    ria(weight[:4], stats)
    of_layer = f" ({LAYER[0]} x {LAYER[1]})"
    with planned_for("weight_sums", LAYER), planned_for("moments", BATCH):
        return [
            count("weight_sums" + of_layer, n, e * n + 4 * (rows + cols), lambda: weight_sums(weight)),
            count(
                "weight_sums of 2 layers" + of_layer,
                2 * n,
                2 * (e * n + 4 * (rows + cols)),
                lambda: group_relative_importance(pair),
            ),
            count(
                "RIA in all: sums, terms, 2:4" + of_layer,
                n,
                3 * e * n,
                lambda: select_nm(weight, ria(weight, stats), 2, 4),
            ),
            count(
                f"moments ({' x '.join(map(str, BATCH))})",
                x,
                e * x + 4 * sequences * channels + 16 * channels,
                lambda: moments(tokens),
            ),
            *rows_of_token_statistics(tokens),
        ]


def rows_of_token_statistics(tokens: torch.Tensor) -> list[Row]:
    """All statistics of a batch, for no layer and for three square ones, and the launch for their output norms."""
    sequences, length, channels = tokens.shape
    e, x, cpu = tokens.element_size(), tokens.numel(), torch.device("cpu")
    outputs = [torch.randn(sequences * length, channels).to(tokens.dtype) for _ in range(3)]
    before, batch = no_moments(channels, cpu), f" ({' x '.join(map(str, BATCH))})"

    def row(layers: int) -> Row:
        sums = no_layer_sums(layers, channels, cpu)
        running = 2 * (sum(t.nbytes for t in before) + sums.nbytes)
        return count(
            f"token_statistics, {layers} layers" + batch,
            x * (1 + layers),
            e * x * (1 + layers) + running + (4 * channels + 8) * sequences,
            lambda: token_statistics(tokens, None, before, outputs[:layers], sums),
        )

    least = 3 * (e * x + 4 * sequences * length)
    norms = count("output_norms, 3 layers" + batch, 3 * x, least, lambda: output_norms(outputs, None))
    return [row(0), row(3), norms]


def rows_of_packed(weight: torch.Tensor, terms: ScoreTerms, tokens: torch.Tensor) -> list[Row]:
    """Weights of few bits, and weights whose zeros follow no pattern: FEW_OUTPUTS rows,
    because the interpreter is slow for these."""
    weight = weight[:FEW_OUTPUTS].clone()
    rows, cols = weight.shape
    e, n = weight.element_size(), weight.numel()
    half = pack_scored(weight, terms, 8, 16)
    found = []
    for bits in (8, 4):
        packed = quantize_nm(half, bits, 128)
        made = packed.packed_bytes - packed.meta.nbytes
        found.append(
            count(
                f"quantize_nm 8:16, {bits} bits ({rows} x {cols})",
                n,
                half.values.nbytes + made,
                lambda bits=bits: quantize_nm(half, bits, 128),
            )
        )
        for few in (1, 16):
            found.append(
                count(
                    f"nm_linear 8:16, {bits} bits, {few} row{'s' * (few > 1)} ({rows} x {cols})",
                    n,
                    packed.packed_bytes + few * e * (rows + cols),
                    lambda packed=packed, few=few: nm_linear(tokens[:few], packed),
                )
            )
    zeros = select_rows(weight.clone(), terms, cols // 2)
    by_rows = pack_rows(zeros)
    stored = by_rows.packed_bytes
    return [
        *found,
        count(f"pack_rows 50 % ({rows} x {cols})", n, e * n + stored, lambda: pack_rows(zeros)),
        count(f"unpack_rows 50 % ({rows} x {cols})", n, e * n + stored, lambda: unpack_rows(by_rows)),
        *(
            count(
                f"rows_linear 50 %, {few} row{'s' * (few > 1)} ({rows} x {cols})",
                n,
                stored + few * e * (rows + cols),
                lambda few=few: rows_linear(tokens[:few], by_rows),
            )
            for few in (1, 4)
        ),
    ]


def rows_of_groups(weight: torch.Tensor, terms: ScoreTerms) -> list[Row]:
    """Launches for two layers, of few rows because the interpreter is slow."""
    assert terms.row is not None
    pair = [part.clone() for part in weight[: 2 * FEW_OUTPUTS].chunk(2)]
    every = [replace(terms, row=row) for row in terms.row[: 2 * FEW_OUTPUTS].chunk(2)]
    vectors = 4 * 2 * (FEW_OUTPUTS + weight.shape[1])  # both layers have the same two vectors of columns
    n, moved = sum(part.numel() for part in pair), sum(part.nbytes for part in pair)
    shape = f" of 2 layers ({FEW_OUTPUTS} x {weight.shape[1]})"
    return [
        count("select_nm 2:4, RIA's terms" + shape, n, 2 * moved + vectors, lambda: select_nm_group(pair, every, 2, 4)),
        count("all_finite" + shape, n, moved, lambda: find_each_not_finite(pair)),
    ]


def our_rows(dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Every operation of this package."""
    rows, cols = SHAPE
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).to(dtype)
    tokens = torch.randn(N_TOKENS // 32, 32, cols).to(dtype)
    flat = tokens.view(N_TOKENS, cols)
    outputs = torch.randn(N_TOKENS, rows).to(dtype)
    norms = torch.rand(3, N_TOKENS)
    stats = ActivationStats.from_tokens(tokens)
    plain, relative = wanda(weight, stats), ria(weight, stats)
    packed = pack_scored(weight, plain, 2, 4)
    pruned = unpack_nm(packed)
    e, n = weight.element_size(), weight.numel()
    vectors = sum(t.numel() * 4 for t in relative.tensors.values())
    x = flat.numel()
    all_finite(norms)  # the first call ever makes a flag
    scale = ColumnScale(torch.rand(cols, dtype=torch.float64), 2.0, factor=torch.rand(cols))
    square = torch.rand(128, cols), "frobenius", 1.0, 0.01
    logits, wanted = torch.randn(2, 64, 4 * cols).to(dtype)
    diverge = lambda: divergence(logits, wanted, into=logits)  # noqa: E731
    values, rounded = weight.float(), weight.clone()
    kept, step, factor = GradientMoments.like(values), Step(1e-3, 1), torch.ones(1)
    train = lambda: adamw(values, kept, weight, step, factor=factor, rounded=rounded)  # noqa: E731
    return [
        count("select_nm 2:4, Wanda's terms", n, 2 * e * n + 4 * cols, lambda: select_nm(weight, plain, 2, 4)),
        count("select_nm 2:4, RIA's terms", n, 2 * e * n + vectors, lambda: select_nm(weight, relative, 2, 4)),
        *rows_of_groups(weight, relative),
        count("select_nm 4:8", n, 2 * e * n + 4 * cols, lambda: select_nm(weight, plain, 4, 8)),
        count("select_nm 2:4, mask", n, (e + 1) * n, lambda: select_nm(weight, ScoreTerms(), 2, 4, output="mask")),
        count(
            "select_nm 2:4, bit mask", n, e * n + n // 8, lambda: select_nm(weight, ScoreTerms(), 2, 4, output="bits")
        ),
        count("pack_scored 2:4", n, e * n + 4 * cols + packed.packed_bytes, lambda: pack_scored(weight, plain, 2, 4)),
        count("pack_nm 2:4", n, e * n + packed.packed_bytes, lambda: pack_nm(pruned, 2, 4)),
        count("pack_cutlass, scored", n, e * n + 4 * cols + packed.packed_bytes, lambda: pack_cutlass(weight, plain)),
        count("pack_cutlass", n, e * n + packed.packed_bytes, lambda: pack_cutlass(pruned)),
        count("unpack_nm 2:4", n, e * n + packed.packed_bytes, lambda: unpack_nm(packed)),
        count(
            "nm_linear 2:4, 1 row",
            n,
            packed.packed_bytes + e * (rows + cols),
            lambda: nm_linear(flat[:1], packed),
        ),
        count(
            "nm_linear 2:4, 16 rows",
            n,
            packed.packed_bytes + 16 * e * (rows + cols),
            lambda: nm_linear(flat[:16], packed),
        ),
        *rows_of_packed(weight, plain, flat),
        count("select_rows 50 %", n, 2 * e * n + 4 * cols, lambda: select_rows(weight, plain, cols // 2)),
        *rows_of_sums(dtype),
        count("all_finite", n, e * n, lambda: all_finite(weight)),
        count("weighted_squares, 3 layers", x, e * x + 12 * (N_TOKENS + cols), lambda: weighted_squares(flat, norms)),
        count("column_scale, ACE's", cols, 16 * cols, lambda: column_scale(scale)),
        count("variance_factor, 128 sequences", 128 * cols, 4 * 129 * cols, lambda: variance_factor(*square)),
        count("token_norms", outputs.numel(), e * outputs.numel() + 4 * N_TOKENS, lambda: token_norms(outputs)),
        count("divergence, over its logits", logits.numel(), 3 * e * logits.numel() + 4 * len(logits), diverge),
        count("adamw, with a rounded copy", n, (24 + 2 * e) * n, train),
        count("round_groups, 8 bits", n, (4 + e) * n, lambda: round_groups(values, 8, 128, dtype, rounded)),
        count(
            "coupling",
            n,
            e * (x + outputs.numel()) + 8 * n,
            lambda: coupling(flat, outputs, norms[0], "abs", into=torch.empty(SHAPE).fill_(0)),
        ),
        *rows_of_published_cosp(weight, plain, flat[:FEW_TOKENS], outputs[:FEW_TOKENS]),
    ]


def rows_of_published_cosp(
    weight: torch.Tensor, terms: ScoreTerms, tokens: torch.Tensor, outputs: torch.Tensor
) -> list[Row]:
    """The published CosP in two steps, which store its matrix in between, and in one step."""
    e, n, token_weights = weight.element_size(), weight.numel(), torch.rand(len(tokens))
    least = e * (tokens.numel() + outputs.numel() + 2 * n) + 4 * (len(tokens) + weight.shape[1])

    def two_steps() -> object:
        matrix = coupling(tokens, outputs, token_weights, "abs")
        return select_nm(weight, replace(terms, coupling=matrix), 2, 4)

    def one_step() -> object:
        return cosp_select(weight, terms, tokens, outputs, token_weights, 2, 4)

    of_tokens = f", {len(tokens)} tokens"
    return [
        count("published CosP: coupling, select_nm 2:4" + of_tokens, n, least, two_steps),
        count("published CosP: cosp_select 2:4" + of_tokens, n, least, one_step),
    ]


def published_rows(dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """The published forms of the same, from scores to zeros in place."""
    weight = torch.randn(SHAPE).to(dtype)
    square = torch.rand(SHAPE[1])
    n = weight.numel()
    least = 2 * weight.element_size() * n

    def rows_by_sort() -> None:
        prune_rows_by_sort(weight, wanda_scores(weight, square), SHAPE[1] // 2)

    return [
        count("Wanda, 2:4", n, least, lambda: prune_groups(weight, wanda_scores(weight, square), 2, 4)),
        count("RIA, 2:4", n, least, lambda: prune_groups(weight, ria_scores(weight, square), 2, 4)),
        count("Wanda, 50 % of a row", n, least, rows_by_sort),
    ]


def page(ours: list[Row], layers: list[LayerRow], blocks: list[BlockRow], published: list[Row]) -> str:
    """docs/traffic.md."""
    lines = [
        "# Memory traffic",
        "",
        "Counted, not timed, by `make traffic`, which runs each operation: a weight of "
        f"{SHAPE[0]} x {SHAPE[1]} and {N_TOKENS} tokens, in bf16. Sums run over a share of the layer or batch in "
        "brackets, with the block sizes chosen for the whole, since the number of partial sums depends on it. *Bytes "
        "per element* counts a byte once per launch, as if the cache served repeats within a launch and nothing "
        "between two. *Issued* counts every load and store. *Fewest* is what any implementation must read and write "
        "once. Launches are kernels, or torch operations that touch data; in the published forms, most operations are "
        "one or more kernels. nm_linear_mma is missing: its inline PTX does not run in the interpreter, which "
        "counts the bytes. quantize_nm and pack_rows are made of torch operations, which read and write between them: "
        "they run once, when a weight is packed.",
        "",
    ]
    for title, rows in (
        ("ace_triton", ours),
        ("Published forms, as written in benchmarks/claims/published.py", published),
    ):
        lines += [
            f"## {title}",
            "",
            "| operation | launches | bytes per element | issued | fewest | over the fewest |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            moved = (row.traffic.read + row.traffic.written) / row.elements
            lines.append(
                f"| {row.what} | {row.traffic.launches:,} | {moved:.2f} | {row.traffic.issued / row.elements:.2f} | "
                f"{row.least / row.elements:.2f} | {row.ratio:.2f} |"
            )
        lines.append("")
        if rows is ours:
            lines += [*layer_lines(layers), *block_lines(blocks)]
    return "\n".join(lines)


def main(out: Annotated[Path, typer.Option()] = Path("docs/traffic")) -> None:
    """Count, write OUT.json and OUT.md, and print the page."""
    if not interpreting():
        raise typer.BadParameter("run `make traffic`: counting needs Triton's interpreter (TRITON_INTERPRET=1)")
    ours, layers, blocks, published = our_rows(), rows_of_layers(), rows_of_blocks(), published_rows()
    text = page(ours, layers, blocks, published)
    write_json(
        out.with_suffix(".json"),
        {
            "shape": SHAPE,
            "n_tokens": N_TOKENS,
            "blocks": [asdict(row) for row in blocks],
            "layers": [{**asdict(row), "ratio": row.ratio} for row in layers],
            **{
                name: [{**asdict(row), "ratio": row.ratio} for row in rows]
                for name, rows in (("ours", ours), ("published", published))
            },
        },
    )
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
