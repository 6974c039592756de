"""Whether layer-wise budgets pay: perplexities at 50 % with the same share kept in every block and with shares by
outliers; writes docs/budgets.{json,md}.

    python -m benchmarks.budgets --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

SmolLM2-135M on windows of WikiText-2, pairs of the same calibration. What docs/budgets.json holds is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ace_triton import checkpoint, prune_model
from ace_triton.budgets import SPREAD
from ace_triton.calibration import load_calibration
from ace_triton.evaluate import perplexity
from ace_triton.report import write_json
from ace_triton.text import read_documents, wikitext_rows

METHODS, SPARSITIES, SEEDS = ("wanda", "ace"), ("0.5",), (0, 1, 2)
SAMPLES, LENGTH = 64, 128
WINDOWS, WINDOW_LENGTH = 20, 512

console = Console()


@dataclass(frozen=True)
class Pair:
    """A model pruned twice on one calibration.

    Attributes:
        method, sparsity, seed: of the prunings.
        even: perplexity with the same share in every block.
        outliers: with shares by outliers.
        kept_even, kept_outliers: share of the pruned layers' weights that is left.
    """

    method: str
    sparsity: str
    seed: int
    even: float
    outliers: float
    kept_even: float
    kept_outliers: float


def main(
    calibration: Annotated[str, typer.Option()],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    out: Annotated[Path, typer.Option(help="Folder of budgets.json and budgets.md.")] = Path("docs"),
) -> None:
    """Measure what is missing and write the page."""
    pairs = measured(out)
    model, tokenizer = checkpoint.load(checkpoint.SMOLLM2)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = "\n\n".join(wikitext_rows("".join(read_documents(evaluation))))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    done = {(pair.method, pair.sparsity, pair.seed) for pair in pairs}
    todo = [(m, p, s) for s in SEEDS for m in METHODS for p in SPARSITIES if (m, p, s) not in done]
    for method, sparsity, seed in todo:
        tokens = load_calibration(calibration, tokenizer, samples=SAMPLES, length=LENGTH, seed=seed).ids
        found = {}
        for budgets in (None, "outliers"):
            report = prune_model(model, tokens, method, sparsity, budgets=budgets)
            sizes = [model.get_submodule(layer.name).weight.numel() for layer in report.layers]
            kept = sum(size * layer.kept for size, layer in zip(sizes, report.layers, strict=True)) / sum(sizes)
            found[budgets] = (perplexity(model, ids, length=WINDOW_LENGTH, windows=WINDOWS).perplexity, kept)
            model.load_state_dict(dense)
        (even, kept_even), (outliers, kept_outliers) = found[None], found["outliers"]
        pairs.append(Pair(method, sparsity, seed, even, outliers, kept_even, kept_outliers))
        console.print(pairs[-1], highlight=False)
        write_json(out / "budgets.json", [asdict(pair) for pair in pairs])
    (out / "budgets.md").write_text(page(pairs))


def measured(out: Path) -> list[Pair]:
    """What was measured before."""
    path = out / "budgets.json"
    return [Pair(**record) for record in json.loads(path.read_text())] if path.exists() else []


def page(pairs: list[Pair]) -> str:
    """The table as markdown."""
    lines = [
        "# Layer-wise budgets",
        "",
        f"Measured on a CPU by `make budgets`: SmolLM2-135M, {SAMPLES} x {LENGTH} tokens of C4, {WINDOWS} windows of "
        f'{WINDOW_LENGTH} tokens of WikiText-2, seeds of the calibration in pairs. `budgets="outliers"` is OWL\'s rule '
        f"(arXiv 2310.05175): what a block keeps is linear in its share of scores above five times their layer's mean, "
        f"{2 * SPREAD:g} from the least to the most. Rows lose whole weights, which is why a little more is kept.",
        "",
        "| method, pruned | kept | even | by outliers | ratio, pair by pair |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, sparsity in sorted({(pair.method, pair.sparsity) for pair in pairs}, reverse=True):
        chosen = [pair for pair in pairs if (pair.method, pair.sparsity) == (method, sparsity)]
        kept = statistics.fmean(pair.kept_outliers for pair in chosen)
        even, other = (statistics.fmean(values) for values in zip(*((p.even, p.outliers) for p in chosen), strict=True))
        ratios = [pair.outliers / pair.even for pair in chosen]
        error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        lines.append(
            f"| {method}, {float(sparsity):.0%} | {kept:.2%} | {even:.1f} | {other:.1f} | "
            f"{statistics.fmean(ratios):.3f} ± {error:.3f} ({len(ratios)}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
