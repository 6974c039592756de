"""Puts the figures of docs/*.json, and the dispatch's limits, into the README, between its markers.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ace_triton.dispatch import (
    ALWAYS,
    ANY_PATTERN_LIMITS,
    BLOCK_BYTES,
    CPU_LIMITS,
    CUSPARSELT_LIMITS,
    CUTLASS_LIMITS,
    NATIVE_LIMITS,
    OTHER_LIMITS,
    PatternRows,
)
from ace_triton.study.curve import curve
from ace_triton.study.goals import goals
from ace_triton.study.journal import read_results
from ace_triton.study.tables import shown_spread
from ace_triton.study.tally import Tally, shown_variant

from .budgets import measured as budgets_measured
from .budgets import table as budgets
from .quality import cells_by_column, shown
from .report_bench import duration
from .results import load, outcomes
from .sparse import table as sparse

QUALITY_METHODS = (
    "magnitude",
    "Wanda",
    "RIA",
    "CosP, exact",
    "ACE (default)",
    "ACE times VarP",
    "ACE, published form (Wanda, abs)",
    "Wanda, permuted",
    "RIA, permuted",
    "CosP, exact, permuted",
    "ACE (default), permuted",
)
QUALITY_COLUMNS = (("2:4", "L=16"), ("2:4", "L=128"), ("0.5", "L=128"))
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
WHOLE_MODEL = "score and mask 2:4, "
RESULTS = Path("benchmarks/results.csv")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
ISA_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "others"}
"""A limit of so many rows and more is none."""
TRAFFIC_ROWS = ("select_nm 2:4, Wanda's terms", "RIA in all", "select_rows 50 %", "moments")
TRAFFIC_LAYERS = ("wanda", "ace")


def quality(content: dict[str, Any]) -> list[str]:
    """Perplexities, a few methods."""
    columns = cells_by_column(content["cells"])
    lines = [
        f"| perplexity, dense {content['cells']['dense']:.1f} | "
        + " | ".join(f"{sparsity}, {length}" for sparsity, length in QUALITY_COLUMNS)
        + " |",
        "|---" * (len(QUALITY_COLUMNS) + 1) + "|",
    ]
    for label in QUALITY_METHODS:
        values = (shown(columns.get(column, {}).get(label)) for column in QUALITY_COLUMNS)
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return lines


def cpu(content: dict[str, Any]) -> list[str]:
    """Ratios of CPU time, both dtypes side by side."""
    lines = [f"| one core of an {content['environment']['processor']} | against | fp32 | bf16 |", "|---|---|---|---|"]
    for what, against in CPU_ROWS:
        found = {r["dtype"]: r for r in content["ratios"] if (r["what"], r["against"]) == (what, against)}
        faster = " faster" if next(iter(found.values()))["target"].startswith(">=") else ""
        ratios = (found[dtype]["ratio"] for dtype in ("fp32", "bf16"))
        cells = (f"{ratio:.2f}x{faster}" if ratio < 10 else f"{ratio:.0f}x{faster}" for ratio in ratios)
        lines.append(f"| {what} | {against} | " + " | ".join(cells) + " |")
    return lines


def traffic(content: dict[str, Any]) -> list[str]:
    """Bytes over the fewest possible, and launches."""
    lines = ["| counted | launches | bytes over the fewest possible |", "|---|---:|---:|"]
    rows = [row for row in content["ours"] if row["what"].startswith(TRAFFIC_ROWS)]
    rows += [
        {"what": f"prune_linear 2:4, {row['method']}, all in all", "traffic": row["further"], "ratio": row["ratio"]}
        for row in content["layers"]
        if row["method"] in TRAFFIC_LAYERS
    ]
    rows += [{**row, "what": f"published {row['what']}"} for row in content["published"]]
    return lines + [f"| {row['what']} | {row['traffic']['launches']:,} | {row['ratio']:.2f} |" for row in rows]


def curve_of_quality(docs: Path) -> list[str]:
    """Perplexity and time of everything measured at 2:4, worst first, and what that says of the study's aims."""
    tally = Tally(read_results(docs / "curve"))
    length, dense = tally.results.setting.window_length, tally.results.dense
    lines = [
        f"| 2:4{'' if dense is None else f', dense {dense.perplexity:.1f}'} | perplexity | CPU time |",
        "|---|---:|---:|",
    ]
    for point in sorted(curve(tally, "2:4", length), key=lambda point: -point.perplexity.mean):
        perplexity = shown_spread(point.perplexity)
        lines.append(f"| {shown_variant(point.variant)} | {perplexity} | {point.cpu_seconds:.0f} s |")
    return [*lines, "", *(f"- {found.headline} ({found.verdict}). {found.text}" for found in goals(tally))]


def whole_model(results: Path) -> list[str]:
    """Score and mask of all layers of SmolLM2-135M on one core, beside the published loops."""
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
    """The products of packed layers by number of rows, with the limits that the dispatch has."""
    on_cpu = "; ".join(f"{name}: {_of_instruction_set(isa)}" for isa, name in ISA_NAMES.items())
    halves = " or ".join(str(limits.packed) for limits in (CUTLASS_LIMITS, CUSPARSELT_LIMITS))
    on_cuda = f"at 2:4 up to {halves} in fp16 and bf16, {OTHER_LIMITS.packed} in fp32; else {ANY_PATTERN_LIMITS.packed}"
    return [
        "| rows | CPU | CUDA |",
        "|---|---|---|",
        f"| few | our kernel (2:4; {on_cpu}) | our kernel ({on_cuda}) |",
        f"| more | unpacked for the call {BLOCK_BYTES // 2**20} MiB at a time, then dense | "
        "2:4 in fp16 and bf16: torch's semi-structured product; else unpacked, then dense |",
    ]


def _of_instruction_set(isa: str) -> str:
    """Its limits at 2:4. bf16 under AVX-512 is given for processors with bf16 instructions."""
    rows = dict(CPU_LIMITS[isa])
    if isa == "avx512":
        rows[torch.bfloat16] = NATIVE_LIMITS[isa]
    return ", ".join(f"{_up_to(rows[dtype])} in {name}" for dtype, name in DTYPE_NAMES.items())


def _up_to(rows: PatternRows) -> str:
    return "always" if rows.two_of_four >= ALWAYS else f"up to {rows.two_of_four}"


SECTIONS = {"quality": quality, "sparse": sparse, "cpu": cpu, "traffic": traffic}


def filled(readme: str, docs: Path) -> str:
    """The README with every section between its markers made anew."""
    tables = {name: section(json.loads((docs / f"{name}.json").read_text())) for name, section in SECTIONS.items()}
    tables |= {"curve": curve_of_quality(docs), "rows": row_limits(), "model": whole_model(RESULTS)}
    tables["budgets"] = budgets(budgets_measured(docs))
    for name, lines in tables.items():
        table = "\n".join(lines)
        pattern = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", readme, flags=re.S
        )
        if count != 1:
            raise ValueError(f"README.md has {count} sections {name!r} between markers, wanted 1")
    return readme


def main(check: Annotated[bool, typer.Option("--check", help="Fail where the README is out of date.")] = False) -> None:
    """Write README.md, or compare."""
    path = Path("README.md")
    old = path.read_text()
    new = filled(old, Path("docs"))
    if check and new != old:
        raise typer.BadParameter("README.md does not hold the figures of docs/: run python -m benchmarks.readme")
    path.write_text(new)


if __name__ == "__main__":
    typer.run(main)
