"""Whether rotated values help pruning, by model, recipe and calibration seed; writes docs/rotations.{json,md}.

    python -m benchmarks.reports.rotations --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz --model smollm2

Each cell is what ``ace-triton prune --stream`` and ``evaluate --stream`` do, with and without ``--rotate``, so that a
block of the model is in memory at a time. Every result is written as soon as it is
measured, and results in docs/rotations.json are reused, so a stopped run continues. Repeat with another --model and
--name to add a model, with another --seed to add a calibration sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import perplexity_of_checkpoint, prune_checkpoint
from ace_triton.commands.report import write_json
from ace_triton.inputs.beginnings import Beginning, text_ids
from ace_triton.inputs.calibration import load_calibration
from ace_triton.inputs.text import read_documents, wikitext_rows
from ace_triton.planning.skeleton import skeleton
from ace_triton.recipe import Recipe
from ace_triton.reordering.rotation import RATE, STEPS
from ace_triton.study.tally import listed

from .machines import processor
from .named_rows import CalibrationText, EvaluationText, ListRows, Only, chosen_rows, print_rows
from .record import read_record

SAMPLES, LENGTH, WINDOW_LENGTH = 64, 128, 512
LEAST_GAIN = 0.02
"""A rotation pays from this relative fall of perplexity on."""

PRESET = Recipe("wanda", permute=True, update="lstsq")
RECIPES = (PRESET, Recipe("wanda", update="lstsq"), Recipe("wanda"), Recipe("wanda", sparsity="8:16", update="lstsq"))

console = Console()


@dataclass(frozen=True)
class Outcome:
    """A pruned model.

    Attributes:
        model: name on the page.
        recipe: the recipe's words, without the rotation, and the pattern.
        seed: random seed of the calibration sample.
        rotated: whether values were rotated first.
        perplexity: on the evaluation text.
        windows: number of evaluation windows.
        seconds: CPU seconds of pruning, all threads together.
        processor: its name.
    """

    model: str
    recipe: str
    seed: int
    rotated: bool
    perplexity: float
    windows: int
    seconds: float
    processor: str


def main(
    calibration: CalibrationText = "",
    evaluation: EvaluationText = "",
    model: Annotated[str, typer.Option(help="Model to prune.")] = "smollm2",
    name: Annotated[str, typer.Option(help="The model's name on the page.")] = "SmolLM2-135M",
    windows: Annotated[int, typer.Option(min=1, help="Number of evaluation windows of 512 tokens.")] = 10,
    seed: Annotated[int, typer.Option(help="Random seed of the calibration sample.")] = 0,
    only: Only = None,
    list_rows: ListRows = False,
    most: Annotated[int | None, typer.Option(min=0, help="Number of cells to measure now; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of rotations.json and rotations.md.")] = Path("docs"),
) -> None:
    """Measure what is missing, and write the page."""
    record = read_record(out / "rotations.json", dense={}, outcomes=[])
    done = {(r["model"], r["recipe"], r["seed"], r["rotated"], r["windows"]) for r in record["outcomes"]}
    if list_rows:
        names = [label(recipe) for recipe in RECIPES]
        found = {
            text for text in names if all((name, text, seed, rotated, windows) in done for rotated in (False, True))
        }
        print_rows(console, name, ((text, "measured" if text in found else None) for text in names))
        return
    wanted = [(recipe, rotated) for recipe in chosen_rows(RECIPES, label, only) for rotated in (False, True)]
    todo = [cell for cell in wanted if (name, label(cell[0]), seed, cell[1], windows) not in done][:most]
    if todo:
        bench = Bench(model, calibration, evaluation, windows)
        if name not in record["dense"]:
            record["dense"][name] = bench.perplexity(model)
        for recipe, rotated in todo:
            value, seconds = bench.pruned(replace(recipe, rotate=rotated), seed)
            found = Outcome(name, label(recipe), seed, rotated, value, windows, seconds, processor())
            console.print(found, highlight=False)
            record["outcomes"].append(asdict(found))
            write_json(out / "rotations.json", record)
            (out / "rotations.md").write_text(page(record))
    (out / "rotations.md").write_text(page(record))


class Bench:
    """A model in its files, and the texts."""

    def __init__(self, model: str, calibration: str, evaluation: str, windows: int) -> None:
        self._model, self._windows, self._calibration = model, windows, calibration
        self._tokenizer = skeleton(model).tokenizer
        rows = wikitext_rows("".join(read_documents(evaluation)))
        self._beginning = Beginning.of(self._tokenizer, "auto")
        self._ids = text_ids("\n\n".join(rows), self._tokenizer, self._beginning)

    def perplexity(self, model: str | Path) -> float:
        """Perplexity of a checkpoint on the first windows of the evaluation text."""
        return perplexity_of_checkpoint(
            model,
            self._ids,
            length=WINDOW_LENGTH,
            windows=self._windows,
            beginning=self._beginning,
            dtype=torch.float32,
        ).perplexity

    def pruned(self, recipe: Recipe, seed: int) -> tuple[float, float]:
        """Perplexity of the pruned model, and the CPU seconds of pruning."""
        sequences = load_calibration(self._calibration, self._tokenizer, samples=SAMPLES, length=LENGTH, seed=seed)
        with TemporaryDirectory() as folder:
            start = time.process_time()
            prune_checkpoint(self._model, Path(folder) / "pruned", sequences, recipe, dtype=torch.float32)
            seconds = time.process_time() - start
            return self.perplexity(Path(folder) / "pruned"), seconds


def label(recipe: Recipe) -> str:
    """A recipe's words and its pattern."""
    return f"{recipe.words}, {recipe.sparsity}"


@dataclass(frozen=True)
class Pair:
    """The same pruning without and with the rotation."""

    model: str
    recipe: str
    seed: int
    given: Mapping[str, Any]
    rotated: Mapping[str, Any]

    @property
    def change(self) -> float:
        """Relative change of perplexity."""
        return float(self.rotated["perplexity"] / self.given["perplexity"] - 1)


def pairs(record: Mapping[str, Any]) -> list[Pair]:
    """What was measured both without and with the rotation, on as many windows."""
    found: dict[tuple[str, str, int, int], dict[bool, Mapping[str, Any]]] = {}
    for outcome in record["outcomes"]:
        key = (outcome["model"], outcome["recipe"], outcome["seed"], outcome["windows"])
        found.setdefault(key, {})[outcome["rotated"]] = outcome
    return [Pair(*key[:3], both[False], both[True]) for key, both in found.items() if len(both) == 2]


def page(record: Mapping[str, Any]) -> str:
    """docs/rotations.md."""
    machines = sorted({outcome["processor"] for outcome in record["outcomes"]})
    lines = [
        "# Rotated values",
        "",
        f"Measured on a CPU ({listed(machines)}) by `make rotations`, in float32: {SAMPLES} x {LENGTH} tokens of C4, "
        f"windows of {WINDOW_LENGTH} tokens of WikiText-2. With `--rotate` the values of each key-value head are "
        "multiplied by an orthogonal matrix, and the output projection by its inverse, before a block is pruned. The "
        f"dense model computes the same. {STEPS} steps of Adam at a learning rate of {RATE} lower the importance of "
        "the weights that the pattern prunes. CPU seconds are those of pruning, all threads together. "
        "Compare them within a row only, because other work on the machine slows both.",
    ]
    compared = pairs(record)
    for name, dense in record["dense"].items():
        lines += ["", f"## {name}", "", f"Dense perplexity: {dense:.2f}.", ""]
        lines += [
            "| recipe | seed | windows | given | rotated | change | CPU seconds |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {pair.recipe} | {pair.seed} | {pair.given['windows']} | {pair.given['perplexity']:.2f} | "
            f"{pair.rotated['perplexity']:.2f} | {pair.change:+.1%} | {pair.given['seconds']:,.0f}, rotated "
            f"{pair.rotated['seconds']:,.0f} |"
            for pair in compared
            if pair.model == name
        ]
    return "\n".join([*lines, "", "## Does it pay?", "", verdict(compared)]) + "\n"


def verdict(compared: Sequence[Pair]) -> str:
    """On which models the rotation pays, by the mean change of perplexity of the preset "balanced" with it."""
    means, shown = {}, []
    for name in dict.fromkeys(pair.model for pair in compared):
        of_model = [pair for pair in compared if pair.model == name and pair.recipe == label(PRESET)]
        if of_model:
            means[name] = statistics.fmean(pair.change for pair in of_model)
            shown.append(f"{means[name]:+.1%} on {name} (calibration seeds: {listed([str(p.seed) for p in of_model])})")
    if not means:
        return 'The recipe of the preset "balanced" is not measured yet.'
    paying = [name for name, mean in means.items() if mean <= -LEAST_GAIN]
    where = (
        "on every measured model"
        if len(paying) == len(means)
        else f"on {listed(paying)} only"
        if paying
        else "on no model"
    )
    alone = " One model is measured, so nothing is known to hold on others." if len(means) == 1 else ""
    return (
        f'With the recipe of the preset "balanced" perplexity changes by {listed(shown)}. A fall of {LEAST_GAIN:.0%} '
        f"or more pays: {where}.{alone} The presets do not rotate, because they must prune every model, and one "
        "without a separate value projection cannot be rotated: add `--rotate` to a preset."
    )


if __name__ == "__main__":
    typer.run(main)
