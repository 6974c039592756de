"""Perplexity and time of ideas that the package does not have, or may not need; writes docs/trials.{json,md}.

    python -m benchmarks.reports.trials --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --model smollm2

Every result is written as soon as it is measured, and results in docs/trials.json are reused, so a stopped run
continues. Repeat with another --model and --name to add a model, with another --seed to add a calibration sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench

from . import trial_metric
from .machines import processor
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .record import read_record
from .trial_layers import LayerBench
from .trial_rows import ROWS, Row
from .trials_page import page

SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512

console = Console()


@dataclass(frozen=True)
class Result:
    """A pruned model.

    Attributes:
        model: name on the page.
        row: name of the row.
        seed: random seed of the calibration sample.
        perplexity: on the evaluation text.
        seconds: CPU seconds of pruning, all threads together, without loading and evaluation.
        processor: its name.
        date: UTC, ISO 8601.
    """

    model: str
    row: str
    seed: int
    perplexity: float
    seconds: float
    processor: str
    date: str


@dataclass(frozen=True)
class LayerResult:
    """Pruned layers of a dense model.

    Attributes:
        model, row, seed, processor, date: as in :class:`Result`.
        error: squared output error on held-out text over the squared outputs, geometric mean over the layers.
        seconds: CPU seconds.
        bytes: of all pruned layers of the model, packed, as a share of the dense ones in bf16.
    """

    model: str
    row: str
    seed: int
    error: float
    seconds: float
    bytes: float
    processor: str
    date: str


def main(
    calibration: CalibrationText = "",
    evaluation: EvaluationText = "",
    model: Annotated[str, typer.Option(help="Model to prune.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(min=1, help="Number of evaluation windows of 512 tokens.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the calibration sample.")] = 0,
    only: Only = None,
    list_rows: ListRows = False,
    most: Annotated[int | None, typer.Option(min=0, help="Number of models to prune now; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of trials.json and trials.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, first the layers and then whole models, and write the page.

    A row is named by how it is pruned and its pattern. "fit" is Wanda with reordered channels, whose kept weights are
    then fitted to the layers' outputs by least squares. "exchanges" swap kept and pruned weights if that makes the
    layer's error smaller. "centered" subtracts this share of the inputs' mean, in the fit or in the score. "rank" adds
    a product of two thin matrices to the layer.
    """
    record = read_record(out / "trials.json", models={}, results=[], layers=[])
    seconds = _measured(record["results"], name, seed)
    if list_rows:
        known = dict.fromkeys(_measured(record["layers"], name, seed), "measured on layers only")
        known |= {row: f"{time:.0f} CPU seconds" for row, time in seconds.items()}
        print_rows(console, name, ((row.name, known.get(row.name)) for row in ROWS))
        return
    wanted = chosen_rows(ROWS, lambda row: row.name, only)
    layer_seconds = _measured(record["layers"], name, seed)
    layers = [row for row in wanted if row.name not in layer_seconds]
    todo = [row for row in wanted if row.name not in seconds][:most]
    if layers or todo:
        _check_windows(record, name, windows)
        bench = bench_of(model, calibration, evaluation, windows)
        if name not in record["models"]:
            record["models"][name] = {"windows": windows, "dense": bench.perplexity()}
        if layers:
            of_layers = LayerBench(bench, seed, LENGTH)
            for row in layers:
                error, took = of_layers.measure(row)
                share = packed_share(bench.model, row.recipe)
                _add(
                    record, "layers", LayerResult(name, row.name, seed, error, took, share, processor(), _today()), out
                )
        for row in todo:
            _add(record, "results", measure(bench, name, row, seed), out)
    (out / "trials.md").write_text(page(record))


def bench_of(model: str, calibration: str, evaluation: str, windows: int) -> Workbench:
    """The model in float32, and its texts."""
    return Workbench(
        Protocol(
            model,
            calibration,
            evaluation,
            wikitext=True,
            samples=SAMPLES,
            windows=windows,
            window_length=WINDOW_LENGTH,
            dtype=torch.float32,
        )
    )


def measure(bench: Workbench, model: str, row: Row, seed: int) -> Result:
    """Prune the bench's model and measure it."""
    biases = trial_metric.Biases(bench.model, all_layers=row.bias == "every layer") if row.bias else None
    trial_metric.biases[:] = [] if biases is None else [biases]
    try:
        with bench.pruned(Cell(row.recipe, LENGTH, seed)) as pruning:
            value = bench.perplexity()
            _remove(biases)
    finally:
        _remove(biases)
    return Result(model, row.name, seed, value, pruning.cpu_seconds, processor(), _today())


def packed_share(model: torch.nn.Module, recipe: Recipe) -> float:
    """Bytes of the pruned layers over those of the dense ones in bf16.

    Values and low-rank factors are in bf16; a bit for each weight says if it is kept.
    """
    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    dense = sum(rows * width for rows, width in shapes)
    factors = recipe.complete_options.get("rank", 0) * sum(rows + width for rows, width in shapes)
    pattern = recipe.sparsity
    assert pattern.n is not None
    assert pattern.m is not None
    return pattern.n / pattern.m + 1 / 16 + factors / dense


def _measured(results: Sequence[Mapping[str, Any]], model: str, seed: int) -> dict[str, float]:
    """The rows that are measured, and their CPU seconds."""
    return {
        result["row"]: result["seconds"] for result in results if (result["model"], result["seed"]) == (model, seed)
    }


def _add(record: dict[str, Any], kind: str, result: Result | LayerResult, out: Path) -> None:
    """Add a result to the record, and write both files."""
    console.print(result, highlight=False)
    record[kind].append(asdict(result))
    write_json(out / "trials.json", record)
    (out / "trials.md").write_text(page(record))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _remove(biases: trial_metric.Biases | None) -> None:
    """Remove added biases, so that the model's dense weights can be loaded again."""
    if biases is not None:
        biases.remove()
    trial_metric.biases.clear()


def _check_windows(record: Mapping[str, Any], name: str, windows: int) -> None:
    """BadParameter if the model's earlier results were measured on other windows."""
    known = record["models"].get(name)
    if known is not None and known["windows"] != windows:
        raise typer.BadParameter(
            f"results of {name} have windows {known['windows']}, not windows {windows}: use that number, or another "
            "--out"
        )


if __name__ == "__main__":
    typer.run(main)
