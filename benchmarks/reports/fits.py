"""Perplexity and time of metrics, fits and recovery by pattern and model; writes docs/fits.{json,md}.

    python -m benchmarks.reports.fits --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --model smollm2

Every result is written as soon as it is measured, and results in docs/fits.json are reused, so a stopped run continues.
Repeat with another --model and --name to add a model, with another --seed to add a calibration sample.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.options import parse_dtype
from ace_triton.commands.report import write_json
from ace_triton.recipe import Recipe
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.solvers.update import Update
from ace_triton.study.cells import Cell
from ace_triton.study.tally import shown_sparsity
from ace_triton.study.workbench import Protocol, Workbench

from .cpu_ratios import processor
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .pruned_weights import pruned_once
from .record import read_record

PATTERNS = ("2:4", "8:16", "0.5", "4:8", "16:32")
"""In order of measurement; tables show them in the order of SHOWN."""

SHOWN = ("2:4", "4:8", "8:16", "16:32", "0.5")

METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("wanda", {}),
    "ace": ("ace", {}),
    "ria": ("ria", {}),
    "ace a=0.5": ("ace", {"a": 0.5}),
    "ace a=0.75": ("ace", {"a": 0.75}),
}
"""Method and options of each metric alone."""

FIT, BLOCK_FIT, RECOVERED = "fit", "block fit", "recovered"
RECIPES = (*METRICS, FIT, BLOCK_FIT, RECOVERED)
LABELS = {
    "wanda": "Wanda",
    "ace": "ACE",
    "ria": "RIA",
    "ace a=0.5": "ACE, a=0.5",
    "ace a=0.75": "ACE, a=0.75",
    FIT: "Wanda, permuted, lstsq",
    BLOCK_FIT: "Wanda, permuted, lstsq, block_epochs=2",
    RECOVERED: "Wanda, permuted, lstsq, recovered",
}

SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512
KEY = ("model", "pattern", "recipe", "seed", "steps")
"""The entries of a result that tell it apart from others."""

console = Console()


@dataclass(frozen=True)
class Result:
    """A pruned model.

    Attributes:
        model: name on the page.
        pattern: n:m, or the pruned fraction.
        recipe: one of :data:`RECIPES`.
        seed: random seed of the calibration sample.
        steps: number of optimizer steps of the recovery; 0 without one.
        perplexity: on the evaluation text.
        seconds: CPU seconds of pruning and recovery, all threads together, without loading and evaluation.
        threads: number of torch's threads.
        processor: its name.
        date: UTC, ISO 8601.
    """

    model: str
    pattern: str
    recipe: str
    seed: int
    steps: int
    perplexity: float
    seconds: float
    threads: int
    processor: str
    date: str


def main(
    calibration: CalibrationText = "",
    evaluation: EvaluationText = "",
    model: Annotated[str, typer.Option(help="Model to prune.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    dtype: Annotated[str, typer.Option(help="Type to load the weights in, as for ace-triton prune.")] = "float32",
    windows: Annotated[int, typer.Option(min=1, help="Number of evaluation windows of 512 tokens.")] = 20,
    seed: Annotated[int, typer.Option(help="Random seed of the calibration sample.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps of a recovery; 0 leaves recoveries out.")] = 100,
    only: Only = None,
    list_rows: ListRows = False,
    most: Annotated[int | None, typer.Option(min=0, help="Number of cells to measure now; default: all.")] = None,
    kept: Annotated[
        Path | None, typer.Option(help="Folder that keeps pruned weights, from which recoveries of a next run start.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of fits.json and fits.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    record = read(out)
    done = {tuple(result[part] for part in KEY) for result in record["results"]}
    if list_rows:
        seconds = {tuple(r[part] for part in KEY): f"{r['seconds']:.0f} CPU seconds" for r in record["results"]}
        known = ((label(cell), seconds.get((name, *cell[:2], seed, cell[2]))) for cell in cells(seed, steps))
        print_rows(console, known)
        return
    wanted = chosen_rows(cells(seed, steps), label, only)
    todo = [cell for cell in wanted if (name, *cell[:2], seed, cell[2]) not in done][:most]
    if todo:
        chosen = Protocol(
            model,
            calibration,
            evaluation,
            wikitext=True,
            samples=SAMPLES,
            windows=windows,
            window_length=WINDOW_LENGTH,
            dtype=parse_dtype(dtype),
        )
        bench = Workbench(chosen)
        setting = json.loads(json.dumps(asdict(bench.setting)))
        _check_setting(record, name, setting)
        if name not in record["models"]:
            record["models"][name] = {"setting": setting, "dense": bench.perplexity()}
            write_json(out / "fits.json", record)
        for number, (pattern, recipe, trained) in enumerate(todo, 1):
            console.print(f"{number} of {len(todo)}: {name}, {pattern}, {LABELS[recipe]}, seed {seed}", highlight=False)
            result = measure(bench, name, pattern, recipe, seed, trained, kept)
            console.print(f"perplexity {result.perplexity:.2f}, {result.seconds:.0f} CPU seconds", highlight=False)
            record["results"].append(asdict(result))
            write_json(out / "fits.json", record)
            (out / "fits.md").write_text(page(record))
    (out / "fits.md").write_text(page(record))


def cells(seed: int, steps: int) -> list[tuple[str, str, int]]:
    """Pattern, recipe, and steps of recovery of all cells of a seed: what takes seconds first, recoveries last."""
    ordered = [(pattern, recipe) for pattern in PATTERNS for recipe in (*METRICS, FIT)]
    ordered += [(pattern, BLOCK_FIT) for pattern in PATTERNS]
    without = [(pattern, recipe, 0) for pattern, recipe in ordered]
    return without + [(pattern, RECOVERED, steps) for pattern in PATTERNS if steps]


def label(cell: tuple[str, str, int]) -> str:
    """The name of a cell, such as "2:4 block fit"."""
    pattern, recipe, _ = cell
    return f"{pattern} {recipe}"


def recipe_of(name: str, pattern: str) -> Recipe:
    """The recipe of a cell; a fraction has no groups, so its channels are not permuted."""
    if name in METRICS:
        method, options = METRICS[name]
        return Recipe(method, options, pattern)
    update = Update(block_epochs=2) if name == BLOCK_FIT else Update()
    return Recipe("wanda", sparsity=pattern, permute=":" in pattern, update=update)


def measure(
    bench: Workbench, model: str, pattern: str, recipe: str, seed: int, steps: int, kept: Path | None = None
) -> Result:
    """Prune the bench's model, or take its weights from the folder ``kept``; recover it, and measure it."""
    with pruned_once(bench, Cell(recipe_of(recipe, pattern), LENGTH, seed), kept) as seconds:
        if steps:
            seconds += bench.recover(settings_of(bench, seed, steps)).cpu_seconds
        value = bench.perplexity()
    date = datetime.now(UTC).date().isoformat()
    return Result(model, pattern, recipe, seed, steps, value, seconds, torch.get_num_threads(), processor(), date)


def settings_of(bench: Workbench, seed: int, steps: int) -> RecoverySettings:
    """The settings of a recovery: the defaults, with forwards in float32 if the model is in float32."""
    exact = bench.protocol.dtype == torch.float32
    forward = torch.float32 if exact else RecoverySettings.forward_dtype
    return RecoverySettings(steps=steps, seed=seed, forward_dtype=forward)


def _check_setting(record: Mapping[str, Any], name: str, setting: Mapping[str, Any]) -> None:
    """BadParameter if the model's earlier results were measured in another setting."""
    if (known := record["models"].get(name)) is None:
        return
    changed = [key for key in known["setting"] if known["setting"][key] != setting.get(key)]
    if changed:
        before = ", ".join(f"{key} {known['setting'][key]}" for key in changed)
        now = ", ".join(f"{key} {setting.get(key)}" for key in changed)
        raise typer.BadParameter(f"results of {name} have {before}, not {now}: use that setting, or another --out")


def read(out: Path) -> dict[str, Any]:
    """Earlier results."""
    return read_record(out / "fits.json", models={}, results=[])


def page(record: Mapping[str, Any]) -> str:
    """docs/fits.md."""
    lines = [
        "# Fits by model and pattern",
        "",
        f"Measured by `make fits` on a CPU: {SAMPLES} x {LENGTH} calibration tokens of C4, windows of {WINDOW_LENGTH} "
        "tokens of WikiText-2. Each cell has the perplexity, the perplexity over the dense model's, and the CPU "
        "seconds of pruning and recovery, all threads together, without loading and evaluation. With several "
        "calibration seeds, it has their mean ± standard deviation (number of seeds). A fraction has no groups, so "
        "its channels are not permuted. Empty cells are not measured.",
    ]
    for name, model in record["models"].items():
        results = [Result(**entry) for entry in record["results"] if entry["model"] == name]
        setting = model["setting"]
        bos = "" if setting["bos"] is None else f", beginnings of sequences: {setting['bos']}"
        seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
        lines += [
            "",
            f"## {name}",
            "",
            f"Dense perplexity: {model['dense']:.2f}. {setting['windows']} windows, {setting['dtype']}{bos}. "
            f"Calibration seeds: {seeds or 'none yet'}. {_machines(results)}",
            "",
            *table(results, model["dense"]),
        ]
    return "\n".join(lines) + "\n"


def _machines(results: Sequence[Result]) -> str:
    counts = sorted({(result.processor, result.threads) for result in results})
    return "; ".join(f"{name}, {threads} thread{'s' if threads > 1 else ''}" for name, threads in counts)


def table(results: Sequence[Result], dense: float) -> list[str]:
    """One row per recipe, one column per pattern."""
    lines = [
        f"| recipe | {' | '.join(shown_sparsity(pattern) for pattern in SHOWN)} |",
        "|---|" + "---:|" * len(SHOWN),
    ]
    for recipe in RECIPES:
        of_recipe = [result for result in results if result.recipe == recipe]
        for steps in sorted({result.steps for result in of_recipe}):
            chosen = [result for result in of_recipe if result.steps == steps]
            label = LABELS[recipe] + (f" for {steps} steps" if steps else "")
            shown = (_cell([result for result in chosen if result.pattern == pattern], dense) for pattern in SHOWN)
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return lines


def _cell(results: Sequence[Result], dense: float) -> str:
    if not results:
        return ""
    values = [result.perplexity for result in results]
    mean, seconds = statistics.fmean(values), statistics.fmean(result.seconds for result in results)
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{mean:.1f}{spread}, {mean / dense:.2f}x, {seconds:,.0f} s"


if __name__ == "__main__":
    typer.run(main)
