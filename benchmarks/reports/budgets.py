"""Perplexity with the same share kept in every block, and with shares by outliers; writes docs/budgets.{json,md}.

    python -m benchmarks.reports.budgets --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

SmolLM2-135M on windows of WikiText-2, in pairs with the same calibration. Results in docs/budgets.json are reused.
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
from ace_triton.commands.report import write_json
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.recipes_grid import BEST
from ace_triton.study.tally import shown_sparsity, shown_variant
from ace_triton.study.workbench import Protocol, Workbench

WANDA, ACE = Cell(Recipe("wanda")), Cell(Recipe("ace"))
PRUNINGS = (
    *(metric.at(sparsity) for sparsity in ("0.5", "2:4", "4:8") for metric in (WANDA, ACE)),
    WANDA.with_recipe(**BEST),
)
SEEDS = (0, 1, 2)
SAMPLES, LENGTH = 64, 128

console = Console()


@dataclass(frozen=True)
class Pair:
    """A model pruned twice with the same calibration.

    Attributes:
        variant: label of the recipe.
        sparsity, seed: of both prunings.
        even: perplexity with the same share in every block.
        outliers: perplexity with shares by outliers.
        kept: share of the pruned layers' weights that is kept with shares by outliers.
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
    """Measure what is missing, and write the page."""
    protocol = Protocol("smollm2", calibration, evaluation, wikitext=True, samples=SAMPLES)
    pairs = measured(out)
    done = {(pair.variant, pair.sparsity, pair.seed) for pair in pairs}
    cells = [replace(pruning, length=LENGTH, seed=seed) for seed in SEEDS for pruning in PRUNINGS]
    todo = [cell for cell in cells if (cell.label, cell.sparsity, cell.seed) not in done]
    bench = Workbench(protocol) if todo else None
    for cell in todo:
        assert bench is not None
        assert cell.seed is not None
        with bench.pruned(cell):
            even = bench.perplexity()
        with bench.pruned(cell.with_recipe(budgets="outliers")) as pruning:
            pairs.append(Pair(cell.label, cell.sparsity, cell.seed, even, bench.perplexity(), pruning.kept))
        console.print(pairs[-1], highlight=False)
        write_json(out / "budgets.json", [asdict(pair) for pair in pairs])
    (out / "budgets.md").write_text(page(pairs, protocol))


def measured(out: Path) -> list[Pair]:
    """Earlier results."""
    path = out / "budgets.json"
    return [Pair(**record) for record in json.loads(path.read_text())] if path.exists() else []


def page(pairs: list[Pair], protocol: Protocol) -> str:
    """docs/budgets.md."""
    lines = [
        "# Layer-wise budgets",
        "",
        f"Measured on a CPU by `make budgets`: SmolLM2-135M, {SAMPLES} x {LENGTH} tokens of C4, {protocol.windows} "
        f"windows of {protocol.window_length} tokens of WikiText-2, in pairs of the same calibration seed. "
        '`budgets="outliers"` is OWL\'s rule (arXiv 2310.05175): the share that a block keeps is linear in its share '
        f"of scores above five times their layer's mean, with a range of {2 * SPREAD:g} from the lowest to the "
        "highest. With a fraction, rows lose whole weights, so a little more is kept. With n:m, the highest-ranked "
        "blocks keep n + 1 of every m, and equally many low-ranked blocks keep n - 1.",
        "",
        *table(pairs),
    ]
    return "\n".join(lines) + "\n"


def table(pairs: list[Pair]) -> list[str]:
    """Means over seeds, and the mean ratio of the pairs with its standard error."""
    lines = ["| method, sparsity | kept | even | by outliers | ratio, over pairs |", "|---|---:|---:|---:|---:|"]
    for cell in PRUNINGS:
        chosen = [pair for pair in pairs if (pair.variant, pair.sparsity) == (cell.label, cell.sparsity)]
        if not chosen:
            continue
        kept = statistics.fmean(pair.kept for pair in chosen)
        even, other = (statistics.fmean(values) for values in zip(*((p.even, p.outliers) for p in chosen), strict=True))
        ratios = [pair.outliers / pair.even for pair in chosen]
        error = f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}" if len(ratios) > 1 else ""
        lines.append(
            f"| {shown_variant(cell)}, {shown_sparsity(cell.sparsity)} | {kept:.2%} | {even:.1f} | {other:.1f} | "
            f"{statistics.fmean(ratios):.3f}{error} ({len(ratios)}) |"
        )
    return lines


if __name__ == "__main__":
    typer.run(main)
