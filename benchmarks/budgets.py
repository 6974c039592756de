"""Whether layer-wise budgets pay: perplexities with the same share kept in every block and with shares by outliers;
writes docs/budgets.{json,md}.

    python -m benchmarks.budgets --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

SmolLM2-135M on windows of WikiText-2, pairs of the same calibration. What docs/budgets.json holds is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ace_triton.budgets import SPREAD
from ace_triton.report import write_json
from ace_triton.study.cells import Cell, Variant
from ace_triton.study.recipes_grid import BEST
from ace_triton.study.tally import shown_sparsity, shown_variant
from ace_triton.study.workbench import Protocol, Workbench

WANDA, ACE = Variant("wanda"), Variant("ace")
PRUNINGS = (
    (WANDA, "0.5"),
    (ACE, "0.5"),
    (WANDA, "2:4"),
    (ACE, "2:4"),
    (WANDA, "4:8"),
    (ACE, "4:8"),
    (WANDA.with_recipe(BEST), "2:4"),
)
SEEDS = (0, 1, 2)
SAMPLES, LENGTH = 64, 128

console = Console()


@dataclass(frozen=True)
class Pair:
    """A model pruned twice on one calibration.

    Attributes:
        variant: the method's label, with what is added to it.
        sparsity, seed: of the prunings.
        even: perplexity with the same share in every block.
        outliers: with shares by outliers.
        kept: share of the pruned layers' weights that shares by outliers leave.
    """

    variant: str
    sparsity: str
    seed: int
    even: float
    outliers: float
    kept: float


def main(
    calibration: Annotated[str, typer.Option()],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    out: Annotated[Path, typer.Option(help="Folder of budgets.json and budgets.md.")] = Path("docs"),
) -> None:
    """Measure what is missing and write the page."""
    protocol = Protocol("smollm2", calibration, evaluation, wikitext=True, samples=SAMPLES)
    pairs = measured(out)
    done = {(pair.variant, pair.sparsity, pair.seed) for pair in pairs}
    todo = [(v, p, seed) for seed in SEEDS for v, p in PRUNINGS if (v.label, p, seed) not in done]
    bench = Workbench(protocol) if todo else None
    for variant, sparsity, seed in todo:
        assert bench is not None
        with bench.pruned(Cell(variant, sparsity, LENGTH, seed)):
            even = bench.perplexity()
        spread = variant.with_recipe(replace(variant.recipe, budgets="outliers"))
        with bench.pruned(Cell(spread, sparsity, LENGTH, seed)) as pruning:
            pairs.append(Pair(variant.label, sparsity, seed, even, bench.perplexity(), pruning.kept))
        console.print(pairs[-1], highlight=False)
        write_json(out / "budgets.json", [asdict(pair) for pair in pairs])
    (out / "budgets.md").write_text(page(pairs, protocol))


def measured(out: Path) -> list[Pair]:
    """What was measured before."""
    path = out / "budgets.json"
    return [Pair(**record) for record in json.loads(path.read_text())] if path.exists() else []


def page(pairs: list[Pair], protocol: Protocol) -> str:
    """The table as markdown."""
    lines = [
        "# Layer-wise budgets",
        "",
        f"Measured on a CPU by `make budgets`: SmolLM2-135M, {SAMPLES} x {LENGTH} tokens of C4, {protocol.windows} "
        f"windows of {protocol.window_length} tokens of WikiText-2, seeds of the calibration in pairs. "
        '`budgets="outliers"` is OWL\'s rule (arXiv 2310.05175): what a block keeps is linear in its share of scores '
        f"above five times their layer's mean, {2 * SPREAD:g} from the least to the most. Of a fraction rows lose "
        "whole weights, which is why a little more is kept; of n:m the blocks that the rule raises the most keep one "
        "more of every m, and as many one less.",
        "",
        *table(pairs),
    ]
    return "\n".join(lines) + "\n"


def table(pairs: list[Pair]) -> list[str]:
    """Means over seeds, and of the pairs' ratios with its standard error."""
    lines = ["| method, sparsity | kept | even | by outliers | ratio, pair by pair |", "|---|---:|---:|---:|---:|"]
    for variant, sparsity in PRUNINGS:
        chosen = [pair for pair in pairs if (pair.variant, pair.sparsity) == (variant.label, sparsity)]
        if not chosen:
            continue
        kept = statistics.fmean(pair.kept for pair in chosen)
        even, other = (statistics.fmean(values) for values in zip(*((p.even, p.outliers) for p in chosen), strict=True))
        ratios = [pair.outliers / pair.even for pair in chosen]
        error = f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}" if len(ratios) > 1 else ""
        lines.append(
            f"| {shown_variant(variant)}, {shown_sparsity(sparsity)} | {kept:.2%} | {even:.1f} | {other:.1f} | "
            f"{statistics.fmean(ratios):.3f}{error} ({len(ratios)}) |"
        )
    return lines


if __name__ == "__main__":
    typer.run(main)
