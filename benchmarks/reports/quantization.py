"""Perplexity of pruned models with 16, 8 and 4 bits per kept weight; writes docs/quantization.{json,md}.

    python -m benchmarks.reports.quantization --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz

Each metric alone, at 2:4 and 8:16. "absmax" quantizes the pruned model, as ``ace-triton pack --bits`` does; "gptq"
quantizes while the model is pruned, as ``ace-triton prune --bits`` does. Results in docs/quantization.json are reused.
The option ``--list`` prints the names of all cells, with the measured perplexities; ``--only`` measures some:

    --only "8:16 ace 4 gptq" --only "2:4 * 16"

Cells of fits and recoveries are in :mod:`benchmarks.reports.quantized_fits`. With ``--kept`` they share prunings, also
with :mod:`benchmarks.reports.fits`:

    --kept build/kept --steps 100 --only "8:16 fit *" --only "8:16 recovered *"
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.recipe import Recipe
from ace_triton.solvers.quantize import GROUP, Quantization, Rule
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench, processor_name

from .dense_bits import section
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .quantized_fits import Row, quantize
from .quantized_fits import cells as cells_of_fits
from .quantized_fits import measured as fits_measured
from .quantized_fits import section as section_of_fits

METHODS = ("wanda", "ace", "ria", "magnitude")
PATTERNS = ("8:16", "2:4")
SAMPLES, LENGTH, SEED = 64, 128, 0
WINDOW_LENGTH = 512

LABELS = {"wanda": "Wanda", "ace": "ACE", "ria": "RIA", "magnitude": "magnitude"}
COLUMNS: tuple[tuple[int, Rule | None], ...] = ((16, None), (8, "absmax"), (8, "gptq"), (4, "absmax"), (4, "gptq"))

console = Console()


@dataclass(frozen=True)
class Outcome:
    """Perplexity of a model.

    Attributes:
        model: its name.
        method, pattern: how the model is pruned; "" for the dense model. The method may be "fit" or "recovered".
        bits: 16 for weights that were not quantized.
        rule: the rule of rounding; None without quantization, or if a recovery rounds the unrounded fit.
        perplexity: on the evaluation text.
        steps: number of optimizer steps of the recovery; 0 without one.
    """

    model: str
    method: str
    pattern: str
    bits: int
    rule: Rule | None
    perplexity: float
    steps: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """All but the result."""
        return self.model, self.method, self.pattern, self.bits, self.rule, self.steps


def main(
    calibration: CalibrationText = "",
    evaluation: EvaluationText = "",
    model: Annotated[str, typer.Option(help="Model to prune.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(help="Number of evaluation windows of 512 tokens.")] = 20,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps of a recovery; 0 leaves recoveries out.")] = 100,
    only: Only = None,
    list_rows: ListRows = False,
    kept: Annotated[
        Path | None, typer.Option(help="Folder that keeps pruned weights, from which fits and recoveries start.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of quantization.json and quantization.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page.

    A row is named by its pattern, how it is pruned, its bits and its rule. "fit" is Wanda with reordered channels,
    whose kept weights are then fitted to the layers' outputs by least squares; "recovered" trains a fit further toward
    the dense model's predictions. 16 bits are not quantized. "absmax" rounds the finished weights, by the largest
    magnitude of each group; "gptq" rounds while the model is pruned, and the weights that are not yet rounded make up
    for the error. A recovery without a rule trains with rounded weights.
    """
    protocol = Protocol(
        model,
        calibration,
        evaluation,
        wikitext=True,
        samples=SAMPLES,
        windows=windows,
        window_length=WINDOW_LENGTH,
        dtype=torch.float32,
    )
    outcomes = measured(out)
    done = {outcome.key for outcome in outcomes}
    if list_rows:
        found = {outcome.key: f"perplexity {outcome.perplexity:.2f}" for outcome in outcomes}
        print_rows(console, name, ((label(cell), found.get((name, *cell))) for cell in cells(steps)))
        return
    todo = [cell for cell in chosen_rows(cells(steps), label, only) if (name, *cell) not in done]
    dense = (name, "", "", 16, None, 0)
    bench = Workbench(protocol) if todo or dense not in done else None

    def note(row: Row, perplexity: float) -> None:
        outcomes.append(Outcome(name, *row[:4], perplexity, row[4]))
        console.print(outcomes[-1], highlight=False)
        write_json(out / "quantization.json", record(outcomes, out))
        (out / "quantization.md").write_text(page(record(outcomes, out)))

    if bench is not None and dense not in done:
        note(("", "", 16, None, 0), bench.perplexity())
    for method, pattern in pairs():
        missing = [column for column in COLUMNS if (method, pattern, *column, 0) in todo]
        cell = Cell(Recipe(method, sparsity=pattern), LENGTH, SEED)
        assert bench is not None or not missing
        if bench is not None and any(rule != "gptq" for _, rule in missing):
            with bench.pruned(cell):
                pruned = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
                for bits, rule in missing:
                    if rule != "gptq":
                        bench.model.load_state_dict(pruned)
                        if rule is not None:
                            quantize(bench.model, Quantization(bits, GROUP, rule))
                        note((method, pattern, bits, rule, 0), bench.perplexity())
        for bits, rule in missing:
            if bench is not None and rule == "gptq":
                by = Quantization(bits, GROUP, rule)
                with bench.pruned(replace(cell, recipe=replace(cell.recipe, quantize=by))):
                    note((method, pattern, bits, rule, 0), bench.perplexity())
    fits = [cell for cell in todo if cell in cells_of_fits(PATTERNS, steps)]
    if bench is not None and fits:
        for row, perplexity in fits_measured(bench, fits, GROUP, LENGTH, SEED, kept):
            note(row, perplexity)
    (out / "quantization.md").write_text(page(record(outcomes, out)))


def pairs() -> list[tuple[str, str]]:
    """All methods and patterns."""
    return [(method, pattern) for pattern, method in itertools.product(PATTERNS, METHODS)]


def cells(steps: int = 100) -> list[Row]:
    """All cells: method, pattern, bits, rule, and steps of a recovery."""
    return [(*pair, *column, 0) for pair in pairs() for column in COLUMNS] + cells_of_fits(PATTERNS, steps)


def label(cell: Row) -> str:
    """The name of a cell, such as "8:16 ace 4 gptq"; "8:16 ace 16" without quantization."""
    method, pattern, bits, rule, _ = cell
    return f"{pattern} {method} {bits}" + (f" {rule}" if rule else "")


def record(outcomes: list[Outcome], out: Path) -> dict[str, Any]:
    """All outcomes as JSON types, with those of weights that are not pruned, from the earlier record."""
    path = out / "quantization.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    dense = {"dense": earlier["dense"]} if "dense" in earlier else {}
    return {"processor": processor_name(), "outcomes": [asdict(outcome) for outcome in outcomes], **dense}


def measured(out: Path) -> list[Outcome]:
    """Earlier results."""
    path = out / "quantization.json"
    found = json.loads(path.read_text())["outcomes"] if path.exists() else []
    return [Outcome(**entry) for entry in found]


def page(found: dict[str, Any]) -> str:
    """docs/quantization.md, from the content of docs/quantization.json."""
    outcomes = [Outcome(**entry) for entry in found["outcomes"]]
    lines = [
        "# Pruned and quantized",
        "",
        f"Measured on a CPU ({found['processor']}) by `make quantization`: {SAMPLES} x {LENGTH} tokens of C4, windows "
        f"of {WINDOW_LENGTH} tokens of WikiText-2, float32, groups of {GROUP} inputs, each metric alone. "
        '"absmax" quantizes the pruned model, as `ace-triton pack --bits` does. "gptq" quantizes each block while the '
        "model is pruned, and changes later columns to make up for the errors, as `ace-triton prune --bits` does. The "
        "number in parentheses is the change from 16 bits, which are here the weights without quantization. "
        "Cells without a number are not measured yet.",
        "",
    ]
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        of_model = {outcome.key: outcome.perplexity for outcome in outcomes if outcome.model == model}
        dense = of_model.get((model, "", "", 16, None, 0))
        lines += [f"## {model}", ""]
        lines += [f"The dense model has a perplexity of {dense:.2f}.", ""] if dense is not None else []
        lines += [*rows, ""] if (rows := table(model, of_model)) else []
        fits = [outcome for outcome in outcomes if outcome.model == model]
        lines += section_of_fits({(o.method, o.pattern, o.bits, o.rule, o.steps): o.perplexity for o in fits})
    lines += section(found)
    return "\n".join(lines).rstrip() + "\n"


def table(model: str, found: dict[tuple[object, ...], float]) -> list[str]:
    """One row per measured method and pattern; empty if none is measured."""
    headings = [f"{bits} bits" + (f", {rule}" if rule else "") for bits, rule in COLUMNS]
    lines = [f"| method, pattern | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    for method, pattern in pairs():
        base = found.get((model, method, pattern, 16, None, 0))
        cells = []
        for bits, rule in COLUMNS:
            value = found.get((model, method, pattern, bits, rule, 0))
            change = "" if rule is None or value is None or base is None else f" ({value / base - 1:+.1%})"
            cells.append("" if value is None else f"{value:.2f}{change}")
        if any(cells):
            lines.append(f"| {LABELS[method]}, {pattern} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


if __name__ == "__main__":
    typer.run(main)
