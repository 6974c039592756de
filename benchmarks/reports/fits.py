"""Perplexity and time of metrics, fits and recovery by pattern and model; writes docs/fits.{json,md}
and docs/images/fits.svg.

    python -m benchmarks.reports.fits --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --model smollm2

Every result is written as soon as it is measured, and results in docs/fits.json are reused, so a stopped run continues.
Repeat with another --model and --name to add a model, with another --seed to add a calibration sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton.commands.options import parse_dtype
from ace_triton.commands.report import write_json
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench

from .fit_recipes import LABELS, LENGTH, SAMPLES, WINDOW_LENGTH, Result, cells, label, recipe_of
from .fits_page import page
from .fits_picture import picture
from .machines import processor
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .pruned_weights import pruned_once
from .record import read_record

KEY = ("model", "pattern", "recipe", "seed", "steps")
"""The entries of a result that tell it apart from others."""

console = Console()


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
    """Measure what is missing, and write the page.

    A row is named by its pattern and its recipe. "wanda", "ace", "ria" and "sparsegpt" are methods alone. "fit" is
    Wanda with reordered channels, whose kept weights are then fitted to the layers' outputs by least squares. "block
    fit" also trains the kept weights of each block for two epochs. "recovered" is a fit whose kept weights are then
    trained toward the dense model's predictions.
    """
    record = read(out)
    done = {tuple(result[part] for part in KEY) for result in record["results"]}
    if list_rows:
        seconds = {tuple(r[part] for part in KEY): f"{r['seconds']:.0f} CPU seconds" for r in record["results"]}
        known = ((label(cell), seconds.get((name, *cell[:2], seed, cell[2]))) for cell in cells(seed, steps))
        print_rows(console, name, known)
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
            write_page(record, out)
    write_page(record, out)


def write_page(record: Mapping[str, Any], out: Path) -> None:
    """The page and its picture, in the folder of the record."""
    (out / "fits.md").write_text(page(record))
    (out / "images").mkdir(exist_ok=True)
    (out / "images" / "fits.svg").write_text(picture(record))


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


if __name__ == "__main__":
    typer.run(main)
