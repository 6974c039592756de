"""Puts the figures of docs/*.json into the README, between its markers: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ace_triton.study.curve import curve
from ace_triton.study.goals import goals
from ace_triton.study.journal import read_results
from ace_triton.study.tables import shown_spread
from ace_triton.study.tally import Tally, shown_variant

from .quality import cells_by_column, shown

QUALITY_METHODS = (
    "magnitude",
    "Wanda",
    "RIA",
    "CosP, exact",
    "ACE (default)",
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
TRAFFIC_ROWS = ("select_nm 2:4, Wanda's terms", "RIA in all", "select_rows 50 %", "moments")


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


SECTIONS = {"quality": quality, "cpu": cpu, "traffic": traffic}


def filled(readme: str, docs: Path) -> str:
    """The README with every section between its markers made anew."""
    tables = {name: section(json.loads((docs / f"{name}.json").read_text())) for name, section in SECTIONS.items()}
    for name, lines in {**tables, "curve": curve_of_quality(docs)}.items():
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
