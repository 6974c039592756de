"""Writes the tables of the README and the guides from the records in docs/ and the dispatch's limits.

python -m benchmarks.reports.readme [--check]

A table goes between ``<!-- name: made by ... -->`` and ``<!-- /name -->``. Every table is on at least one page.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ace_triton.packed.dispatch import (
    ALWAYS,
    ANY_PATTERN_LIMITS,
    CPU_LIMITS,
    CUSPARSELT_LIMITS,
    CUTLASS_LIMITS,
    EXPANDED_LIMITS,
    FEW_BITS_LIMITS,
    NATIVE_LIMITS,
    OTHER_LIMITS,
    PatternRows,
)
from ace_triton.packed.unpacked import BLOCK_BYTES
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.curve import Point, curve
from ace_triton.study.journal import read_results
from ace_triton.study.tables import shown_spread
from ace_triton.study.tally import Tally, shown_variant

from ..harness.results import load, outcomes
from .budgets import measured as budgets_measured
from .budgets import table as budgets
from .fit_advice import changes, choices, setting
from .fits import read as fits_measured
from .large_models_page import killed
from .report_bench import duration
from .sparse import table as sparse
from .tradeoff import read as tradeoff_measured
from .tradeoff_page import advice
from .tradeoff_points import SPEED_WORDS, points_of, shown_speeds

PAGES = ("README.md", "docs/index.md", "docs/results.md", *sorted(map(str, Path("docs/guides").glob("*.md"))))
"""Pages with markers, from the root of the repository."""

CPU_ROWS = (
    ("2:4 in place, Wanda's terms", "`weight.mul_(1)`"),
    ("prune_linear, 2:4, wanda", "`weight.mul_(1)`"),
    ("2:4 in place", "published loop over groups"),
    ("50 % of each row", "top-k and scatter"),
    ("50 % of each row", "published stable sort"),
    ("moments of 64 x 128 x 4096", "plain read"),
    ("prune_linear of SmolLM2-135M's 210 layers, ria", "`mul_(1)` of each"),
    ("prune_linear of SmolLM2-135M's 210 layers, ace", "`mul_(1)` of each"),
    ("nm_linear 2:4, 1 row", "`F.linear`"),
    ("nm_linear 2:4, 1 row", "the same loop, dense"),
)
CPU_DTYPES = ("fp32", "bf16")
WHOLE_MODEL = "score and mask 2:4, "
RESULTS = Path("benchmarks/results.csv")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
EXPANDED = "AVX-512 with AVX512-BF16 and VBMI2"
ISA_NAMES = {"avx512": "AVX-512 of other kinds", "avx2": "AVX2", "neon": "NEON (estimated)", "portable": "others"}
ANY_ROWS = 2**20
"""From this value on, a limit of rows means no limit."""
TRAFFIC_ROWS = ("select_nm 2:4, Wanda's terms", "RIA in all", "select_rows 50 %", "moments")
TRAFFIC_LAYERS = ("wanda", "ace")
LENGTH_METHODS = ("wanda", "ria", "cosp", "ace")
BASE_LENGTH = 128
HEADLINE = (
    "Measured on SmolLM2-135M at 2:4, in bf16 on one core of an {processor}: packed layers take",
    "{bytes} of their dense bytes, and the model generates {faster} times as many tokens a second. Perplexity goes",
    "from {dense} to {pruned} in {seconds} seconds of pruning. Five minutes of recovery on two cores bring it down",
    "to {recovered}.",
)
COMPARED_FORMS = (
    ("dense fp32", "in transformers"),
    ("llama.cpp Q8_0", "8 bits"),
    ("dense, ace_triton, 8 bits", "`pack --all-bits 8`"),
    ("llama.cpp Q4_K_M", "4 bits"),
    ("llama.cpp Q4_0", "4 bits"),
    ("llama.cpp Q2_K", "mostly 4 bits in this model: 2 bits need widths that 256 divides"),
    ("8:16 8 bits, 8-bit inputs", "pruned; products round inputs to 8 bits, `generate --input-bits 8`"),
    ("16:32 8 bits", "pruned"),
    ("16:32 4 bits", "pruned"),
    ("8:16 4 bits, recovered", "pruned, trained with `recover --bits 4`"),
)
"""A form as docs/tradeoff.md names it, and what it is; the README's table has them in this order."""
PICKS = (
    ("the quickest", "2:4", "Wanda", "`--method wanda`"),
    ("the best without recovery", "2:4", "Wanda, permuted, lstsq", "`--method wanda --permute --update lstsq`"),
    (
        "a model to use",
        "2:4",
        "Wanda, permuted, lstsq, 5 min of recovery",
        "the same, then `recover --minutes 5`",
    ),
    (
        "the best that was measured",
        "2:4",
        "Wanda, permuted, lstsq, 8 mask rounds, 20 min of recovery",
        "the same with `-u mask_rounds=8`, then `recover --minutes 20`",
    ),
    ("a published baseline", "2:4", "SparseGPT", "`--method sparsegpt`"),
    ("less loss at the same size, without tensor cores", "4:8", "Wanda", "`--sparsity 4:8 --method wanda`"),
    ("the least loss at the same size; to compare with papers", "0.5", "Wanda", "`--sparsity 0.5 --method wanda`"),
)
"""What a user wants, a sparsity, a recipe as the study shows it, and the options that make it."""


def cpu(content: dict[str, Any]) -> list[str]:
    """Ratios of CPU time in both dtypes, on every machine."""
    machines = content["machines"]
    dtypes = " / ".join(CPU_DTYPES)
    headings = (f"{machine['environment']['processor']}: {dtypes}" for machine in machines)
    lines = [f"| ours, on one core | compared with | {' | '.join(headings)} |", f"|---|---|{'---|' * len(machines)}"]
    for what, against in CPU_ROWS:
        cells = (_cpu_cell(machine["ratios"], what, against) for machine in machines)
        lines.append(f"| {what} | {against} | {' | '.join(cells)} |")
    return lines


def _cpu_cell(ratios: list[dict[str, Any]], what: str, against: str) -> str:
    found = {r["dtype"]: r for r in ratios if (r["what"], r["against"]) == (what, against)}
    if not found:
        return ""
    meaning = "as fast" if next(iter(found.values()))["target"].startswith(">=") else "the time"
    times = (found[dtype]["ratio"] for dtype in CPU_DTYPES)
    return " / ".join(f"{ratio:.{2 if ratio < 10 else 0}f}x" for ratio in times) + f" {meaning}"


def traffic(content: dict[str, Any]) -> list[str]:
    """Launches, and bytes moved over the fewest possible."""
    lines = ["| counted | launches | bytes over the fewest possible |", "|---|---:|---:|"]
    rows = [row for row in content["ours"] if row["what"].startswith(TRAFFIC_ROWS)]
    rows += [
        {"what": f"prune_linear 2:4, {row['method']}, in total", "traffic": row["further"], "ratio": row["ratio"]}
        for row in content["layers"]
        if row["method"] in TRAFFIC_LAYERS
    ]
    rows += [{**row, "what": f"published {row['what']}"} for row in content["published"]]
    return lines + [f"| {row['what']} | {row['traffic']['launches']:,} | {row['ratio']:.2f} |" for row in rows]


def picks(docs: Path) -> list[str]:
    """What to take, with its time and its perplexity."""
    tally = Tally(read_results(docs / "curve"))
    length, dense = tally.results.setting.window_length, tally.results.dense
    assert dense is not None
    lines = [
        f"| you want | pattern | options | CPU time | perplexity, dense {dense.perplexity:.1f} | times dense |",
        "|---|---|---|---:|---:|---:|",
    ]
    for wanted, sparsity, name, options in PICKS:
        (point,) = (p for p in curve(tally, sparsity, length) if shown_variant(p.variant) == name)
        mean = point.perplexity.mean
        cost = f"{point.cpu_seconds:.0f} s | {mean:.1f} | {mean / dense.perplexity:.1f}"
        lines.append(f"| {wanted} | {sparsity} | {options} | {cost} |")
    return lines


def headline(docs: Path) -> list[str]:
    """The first sentences of the README."""
    decoded = json.loads((docs / "sparse.json").read_text())
    packed = decoded["forms"]["bf16"]["packed"]
    tally = Tally(read_results(docs / "curve"))
    dense = tally.results.dense
    assert dense is not None
    points = {shown_variant(p.variant): p for p in curve(tally, "2:4", tally.results.setting.window_length)}
    one_shot = points["Wanda, permuted, lstsq"]
    recovered = points["Wanda, permuted, lstsq, 5 min of recovery"]
    shown = {
        "processor": decoded["setting"]["processor"],
        "bytes": f"{packed['layer_bytes']:.2f}",
        "faster": f"{packed['faster']:.2f}",
        "dense": f"{dense.perplexity:.1f}",
        "pruned": f"{one_shot.perplexity.mean:.1f}",
        "seconds": f"{one_shot.cpu_seconds:.0f}",
        "recovered": f"{recovered.perplexity.mean:.1f}",
    }
    return [line.format(**shown) for line in HEADLINE]


def compared(docs: Path) -> list[str]:
    """Some forms of the first model in the trade-off report, and whether the report says to prune, by model."""
    content = tradeoff_measured(docs)
    points_by_model = {
        name: points_of(found, shown_speeds(content, found)) for name, found in content["models"].items()
    }
    ((name, first), *_) = points_by_model.items()
    points = {str(point.form): point for point in first}
    lines = [f"| {name} | perplexity | bytes a weight | {SPEED_WORDS} |", "|---|---:|---:|---:|"]
    for form, words in COMPARED_FORMS:
        point = points[form]
        speed = "" if point.faster is None else f"{point.faster:.1f}"
        lines.append(f"| {form} ({words}) | {point.perplexity:.1f} | {point.size:.2f} | {speed} |")
    measured = f"Speeds: one thread, {content['shown']}; each is measured beside the dense model in the same rounds."
    advised = " ".join(advice(model, found) for model, found in points_by_model.items())
    return [*lines, "", measured, *textwrap.wrap(advised, 120)]


def recipes(docs: Path) -> list[str]:
    """Perplexity and time of every recipe measured at 2:4, best first."""
    tally = Tally(read_results(docs / "curve"))
    dense, lengths = tally.results.dense, tally.results.setting.window_lengths
    assert dense is not None
    of_dense = [dense.perplexity, *(found.perplexity for found in dense.further)]
    by_length = [{p.variant: p for p in curve(tally, "2:4", length)} for length in lengths]
    first: dict[Cell, Point] = by_length[0]
    heads = (f"windows of {n:,}, dense {value:.1f}" for n, value in zip(lengths, of_dense, strict=True))
    lines = [f"| 2:4 | CPU time | {' | '.join(heads)} | times dense |", "|---|---:|" + "---:|" * (len(lengths) + 1)]
    for variant, point in sorted(first.items(), key=lambda entry: entry[1].perplexity.mean):
        spreads = (shown_spread(found[variant].perplexity) if variant in found else "" for found in by_length)
        times = point.perplexity.mean / dense.perplexity
        lines.append(f"| {shown_variant(variant)} | {point.cpu_seconds:.0f} s | {' | '.join(spreads)} | {times:.1f} |")
    return lines


def lengths(docs: Path) -> list[str]:
    """How perplexity at 2:4 changes with the length of calibration sequences, from that at BASE_LENGTH."""
    tally = Tally(read_results(docs / "study"))
    others = [length for length in tally.lengths if length != BASE_LENGTH]
    lines = [
        f"| 2:4, against sequences of {BASE_LENGTH} tokens | {' | '.join(f'{n:,} tokens' for n in others)} |",
        "|---" + "|---:" * len(others) + "|",
    ]
    for method in LENGTH_METHODS:
        variant = Cell(Recipe(method))
        base = tally.perplexity(variant, "2:4", BASE_LENGTH)
        assert base is not None
        found = [tally.perplexity(variant, "2:4", length) for length in others]
        changes = ("" if s is None else f"{s.mean / base.mean - 1:+.1%} ({len(s.values)})" for s in found)
        lines.append(f"| {shown_variant(variant)} | {' | '.join(changes)} |")
    seconds = [tally.cpu_seconds(Cell(Recipe("wanda")), "2:4", length) or 0.0 for length in others]
    return [*lines, f"| CPU seconds, Wanda | {' | '.join(f'{value:,.0f}' for value in seconds)} |"]


def whole_model(results: Path) -> list[str]:
    """Score and mask of all layers of SmolLM2-135M on one core, compared with the published loops."""
    lines = [
        "| 2:4 of all layers of SmolLM2-135M, bf16 | ours | published loop | times as long |",
        "|---|---:|---:|---:|",
    ]
    for outcome in outcomes(load(results)):
        _, met, method = outcome.ours.op.partition(WHOLE_MODEL)
        setting = outcome.ours.setting
        if met and (setting.evidence, setting.threads) == ("CPU time, measured", 1):
            for other in outcome.others:
                ratio = outcome.speedups.get(other.provider)
                shown = "tests failed" if ratio is None else f"{ratio:.0f}x"
                lines.append(f"| `{method}` | {duration(outcome.ours.p50)} | {duration(other.p50)} | {shown} |")
    return lines


def row_limits() -> list[str]:
    """The products of packed layers by number of rows, with the dispatch's limits: first on CUDA, then on CPUs."""
    halves = " or ".join(str(limits.packed) for limits in (CUTLASS_LIMITS, CUSPARSELT_LIMITS))
    on_cuda = f"at 2:4 up to {halves} in fp16 and bf16, {OTHER_LIMITS.packed} in fp32; "
    on_cuda += (
        f"weights of 8 or 4 bits in fp16 and bf16 up to {FEW_BITS_LIMITS.packed}; else {ANY_PATTERN_LIMITS.packed}"
    )
    return [
        "| rows | CPU | CUDA |",
        "|---|---|---|",
        f"| few | our kernel (limits in the next table) | our kernel ({on_cuda}) |",
        f"| more | unpacked for the call {BLOCK_BYTES // 2**20} MiB at a time, then dense | "
        "2:4 in fp16 and bf16 on capability 8.x: torch's semi-structured product; else unpacked, then dense |",
        "",
        f"| CPU: rows of our kernel at 2:4 | {' | '.join(DTYPE_NAMES.values())} | "
        "bf16 or fp16, if the processor multiplies in that type |",
        f"|---|{'---|' * (len(DTYPE_NAMES) + 1)}",
        *_cpu_limits(),
    ]


def _cpu_limits() -> list[str]:
    """A line for each kind of processor, with its limits at 2:4."""
    of_bf16 = {limits.two_of_four for limits in EXPANDED_LIMITS.values()}
    assert len(of_bf16) == 1  # With AMX and without it.
    expanded = CPU_LIMITS["avx512_vnni"] | {torch.bfloat16: EXPANDED_LIMITS["tiles"]}
    native = NATIVE_LIMITS["avx512_vnni"]
    lines = [_limits_line(EXPANDED, expanded, f"{_up_to(native)} in fp16")]
    for isa, name in ISA_NAMES.items():
        lines.append(_limits_line(name, CPU_LIMITS[isa], _up_to(NATIVE_LIMITS[isa])))
    return lines


def _limits_line(name: str, rows: Mapping[torch.dtype, PatternRows], native: str) -> str:
    return f"| {name} | {' | '.join(_up_to(rows[dtype]) for dtype in DTYPE_NAMES)} | {native} |"


def _up_to(rows: PatternRows) -> str:
    return "any" if rows.two_of_four >= ALWAYS else f"up to {rows.two_of_four}"


SECTIONS = {"sparse": sparse, "cpu": cpu, "traffic": traffic}


def tables_of(docs: Path) -> dict[str, list[str]]:
    """Every table by the name of its markers."""
    made = {name: section(json.loads((docs / f"{name}.json").read_text())) for name, section in SECTIONS.items()}
    made |= {"headline": headline(docs), "picks": picks(docs), "recipes": recipes(docs), "lengths": lengths(docs)}
    made |= {"compared": compared(docs)}
    made |= {"budgets": budgets(budgets_measured(docs))}
    fits = fits_measured(docs)
    made |= {"choices": choices(fits), "changes": changes(fits), "measured": setting(fits)}
    made |= {"kills": killed(json.loads((docs / "kill-test.json").read_text()))}
    return made | {"rows": row_limits(), "model": whole_model(RESULTS)}


def filled(page: str, tables: Mapping[str, list[str]]) -> str:
    """A page with new text between its markers.

    Raises:
        ValueError: if a marker names an unknown table or is not closed.
    """
    for name in re.findall(r"<!-- (\w+): made by ", page):
        if name not in tables:
            raise ValueError(f"there is no table {name!r}: the markers are {', '.join(tables)}")
        pattern = rf"(<!-- {name}: made by [^\n]* -->\n).*?(<!-- /{name} -->)"
        table = "\n".join(tables[name])
        page, count = re.subn(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"the table {name!r} has {count} pairs of markers on one page, wanted 1")
    return page


def main(check: Annotated[bool, typer.Option("--check", help="Fail if a page is out of date.")] = False) -> None:
    """Write the tables, or compare them with the pages."""
    tables = tables_of(Path("docs"))
    pages = {Path(page): Path(page).read_text() for page in PAGES}
    unused = [name for name in tables if not any(f"<!-- {name}: made by " in page for page in pages.values())]
    if unused:
        raise typer.BadParameter(f"no page shows {', '.join(unused)}")
    for path, old in pages.items():
        new = filled(old, tables)
        if check and new != old:
            raise typer.BadParameter(f"{path} is out of date: run python -m benchmarks.reports.readme")
        if not check:
            path.write_text(new)


if __name__ == "__main__":
    typer.run(main)
