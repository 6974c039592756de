"""A sentence encoder pruned by every method: how far its embeddings stay, and packed speed.

    python -m benchmarks.reports.encoders --model FOLDER --calibration TEXT --evaluation TEXT

Writes docs/encoders.{json,md}. Each result is written as soon as it is there, and the same command resumes a run.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import RecoveryReport, RecoverySettings, prune_model, recover_model
from ace_triton.agreement import embedding_agreement, embeddings
from ace_triton.commands.compare_run import pooling_of
from ace_triton.commands.report import write_json
from ace_triton.formats.registry import load_model
from ace_triton.inputs.masked_text import pad_of, padded, pieces_of
from ace_triton.inputs.sentences import sentences_of, shuffled_by_length
from ace_triton.inputs.text import read_documents

from .encoder_speed import NOT_PRUNED, SPEED_SENTENCES, product_times, products_table, sentence_times, speed_table
from .machines import processor

METHODS = ("wanda", "cosp", "ace", "varp", "ria", "stade", "ace-paper", "magnitude", "sparsegpt")
PATTERNS = ("8:16", "2:4")
SENTENCES, GRID_SENTENCES = 3000, 1000
SAMPLES, GRID_SAMPLES = 512, 128
LENGTH, GRID_LENGTH = 128, 64
"""The recipes are measured on more sentences, and calibrated on more text, than the grid of methods."""

STEPS, STEP_SENTENCES, RATE = 640, 16, 2e-3
"""Of a recovery: optimizer steps, sentences of a step, and the peak learning rate in units of each weight's size."""

CALIBRATION_SENTENCES, BLOCK_EPOCHS, FIT_SENTENCES = 1500, 4, 12
"""For recipes that are calibrated on single sentences: how many, and for block fits the epochs and sentences of a step.
"""
RECIPES: dict[str, dict[str, Any]] = {
    "wanda, permuted, lstsq": {"method": "wanda", "permute": True, "update": "lstsq"},
    "wanda, permuted, lstsq and block fit, on sentences": {
        "method": "wanda",
        "permute": True,
        "update": {"kind": "lstsq", "block_epochs": BLOCK_EPOCHS},
        "calibration": "sentences",
    },
    "wanda, permuted, lstsq, on sentences, recovered": {
        "method": "wanda",
        "permute": True,
        "update": "lstsq",
        "calibration": "sentences",
        "steps": STEPS,
    },
}
"""A recovered recipe is measured before the recovery too."""

STEPS_OF_A_MEAN = 20
AIM = {"cosine": 0.97, "recall": 0.85}
console = Console()


class Bench:
    """The dense model, its texts and its embeddings, and the results so far. Results of another setting are dropped.

    Args:
        model: a folder of a sentence encoder.
        calibration, evaluation: texts.
        whole, grid: numbers of sentences, calibration sequences and their tokens, for recipes and for the grid.
        out: where the results are, without the suffix.
    """

    def __init__(
        self, model: str, calibration: str, evaluation: str, whole: dict[str, int], grid: dict[str, int], out: Path
    ) -> None:
        self.dense, companions = load_model(model, task="embedding", dtype=torch.float32)
        self.tokenizer, self.pooling = companions.tokenizer, pooling_of(Path(model))
        self.documents = read_documents(calibration)
        self.sentences = sentences_of(read_documents(evaluation), whole["sentences"])
        self.path = out.with_suffix(".json")
        self._known: dict[int, torch.Tensor] = {}
        setting = {
            "model": Path(model).name,
            "calibration": Path(calibration).name,
            "evaluation": Path(evaluation).name,
            "grid": grid,
            "whole": {**whole, "sentences": len(self.sentences)},
            "recovery": {"steps": STEPS, "sentences": STEP_SENTENCES, "rate": RATE},
            "processor": processor(),
            "torch": torch.__version__,
        }
        self.whole, self.grid = setting["whole"], setting["grid"]
        if self.read().get("setting") != setting:
            write_json(self.path, {"setting": setting})

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def write(self, key: str, value: Any) -> None:
        """Replace one entry of the results; another process may have written others meanwhile."""
        write_json(self.path, {**self.read(), key: value})

    def batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first sentences, the shortest first."""
        pieces = pieces_of(sorted(self.sentences[:count], key=len), self.tokenizer, count, LENGTH, None)
        return [padded(pieces[i : i + 16], pad_of(self.tokenizer)) for i in range(0, len(pieces), 16)]

    def single_sentences(self) -> list[dict[str, torch.Tensor]]:
        """The first sentences, one to a batch, for their speed."""
        pieces = pieces_of(self.sentences[:SPEED_SENTENCES], self.tokenizer, SPEED_SENTENCES, LENGTH, None)
        return [padded([piece], pad_of(self.tokenizer)) for piece in pieces]

    def calibration(self, samples: int, length: int) -> list[dict[str, torch.Tensor]]:
        """Beginnings of documents, as ``ace-triton prune`` cuts them."""
        pieces = pieces_of(self.documents, self.tokenizer, samples, length, 0)
        size = max(1, 2048 // length)
        return [padded(pieces[i : i + size], pad_of(self.tokenizer)) for i in range(0, len(pieces), size)]

    def agreement(self, model: Any, count: int) -> dict[str, Any]:
        batches = self.batches(count)
        if count not in self._known:
            self._known[count] = embeddings(self.dense, batches, pooling=self.pooling)
        pruned = embeddings(model, batches, pooling=self.pooling)
        return embedding_agreement(self._known[count], pruned, pooling=self.pooling).to_dict()

    def calibration_sentences(self, size: int) -> list[dict[str, torch.Tensor]]:
        """Single sentences of the calibration text in random order, ``size`` to a batch."""
        pieces = pieces_of(sentences_of(self.documents), self.tokenizer, CALIBRATION_SENTENCES, GRID_LENGTH, 1)
        return [padded(pieces[i : i + size], pad_of(self.tokenizer)) for i in range(0, len(pieces), size)]

    def measure(
        self, sizes: dict[str, int], pattern: str, steps: int = 0, calibration: str = "documents", **recipe: Any
    ) -> dict[str, Any]:
        """Prune a copy of the model, train it if asked, and compare it."""
        model = copy.deepcopy(self.dense)
        started = time.process_time()
        fits = isinstance(recipe.get("update"), dict)
        batches = (
            self.calibration(sizes["samples"], sizes["length"])
            if calibration == "documents"
            else self.calibration_sentences(FIT_SENTENCES if fits else 64)
        )
        prune_model(model, batches, sparsity=pattern, **recipe)
        seconds = time.process_time() - started
        found = {**self.agreement(model, sizes["sentences"]), "cpu_seconds": seconds}
        if not steps:
            return found
        report = self.recover(model, steps)
        recovered = {
            **self.agreement(model, sizes["sentences"]),
            "cpu_seconds": seconds + report.cpu_seconds,
            "recovery_cpu_seconds": report.cpu_seconds,
            "tokens": report.tokens,
            "losses": [
                statistics.mean(report.losses[:STEPS_OF_A_MEAN]),
                statistics.mean(report.losses[-STEPS_OF_A_MEAN:]),
            ],
        }
        return {**recovered, "before": found}

    def recover(self, model: Any, steps: int) -> RecoveryReport:
        """Train the kept weights toward the dense model, on sentences of the calibration text."""
        sentences = shuffled_by_length(sentences_of(self.documents), STEP_SENTENCES, 0)
        pieces = pieces_of(sentences, self.tokenizer, len(sentences), GRID_LENGTH, None)
        batches = [
            padded(pieces[i : i + STEP_SENTENCES], pad_of(self.tokenizer))
            for i in range(0, len(pieces) - STEP_SENTENCES + 1, STEP_SENTENCES)
        ]
        settings = RecoverySettings(steps=steps, learning_rate=RATE, norms=True, forward_dtype=torch.float32)
        return recover_model(model, copy.deepcopy(self.dense), batches, settings, pooling=self.pooling, progress=_show)


def _show(spent: float, budget: float, loss: float) -> None:
    if round(spent) % STEPS_OF_A_MEAN == 0:
        console.print(f"step {spent:.0f} of {budget:.0f}, loss {loss:.4f}", highlight=False)


def main(
    model: Annotated[str, typer.Option(help="Folder of a sentence encoder.")],
    calibration: Annotated[str, typer.Option(help="Calibration text.")],
    evaluation: Annotated[str, typer.Option(help="Text whose sentences are embedded.")],
    only: Annotated[
        list[str] | None, typer.Option(help="recipes, one recipe's name, masks, fits, speed or products; default: all.")
    ] = None,
    patterns: Annotated[list[str] | None, typer.Option("--pattern", help="Patterns; default: all.")] = None,
    sentences: Annotated[int, typer.Option(help="Sentences for the recipes.")] = SENTENCES,
    grid_sentences: Annotated[int, typer.Option(help="Sentences for the methods.")] = GRID_SENTENCES,
    samples: Annotated[int, typer.Option(help="Calibration sequences for the recipes.")] = SAMPLES,
    grid_samples: Annotated[int, typer.Option(help="Calibration sequences for the methods.")] = GRID_SAMPLES,
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/encoders"),
) -> None:
    """Measure what is not yet measured; write OUT.json and OUT.md."""
    torch.set_num_threads(1)
    whole = {"sentences": sentences, "samples": samples, "length": LENGTH}
    grid = {"sentences": grid_sentences, "samples": grid_samples, "length": GRID_LENGTH}
    bench = Bench(model, calibration, evaluation, whole, grid, out)

    def entry(key: str, measure: Callable[[], Any]) -> None:
        if key not in bench.read():
            bench.write(key, measure())
            console.print(key, bench.read()[key], highlight=False)

    wanted = only or ["speed", "products", "masks", "fits", "recipes"]
    chosen = patterns or PATTERNS
    for pattern in chosen:
        if "speed" in wanted:
            entry(f"sentence {pattern}", lambda: sentence_times(bench.dense, bench.single_sentences(), pattern))  # noqa: B023
        if "products" in wanted:
            entry(f"products {pattern}", lambda: product_times(bench.dense, pattern))  # noqa: B023
    if "speed" in wanted and not patterns:
        entry(f"sentence {NOT_PRUNED}", lambda: sentence_times(bench.dense, bench.single_sentences(), NOT_PRUNED))
    cells = [(update, pattern) for update in (None, "lstsq") for pattern in chosen]
    for update, pattern in cells:
        for method in METHODS if ("fits" if update else "masks") in wanted else ():
            if method != "sparsegpt" or update is None:  # SparseGPT moves the kept weights itself.
                recipe = {"method": method, "update": update}
                entry(f"grid {pattern} {method} {update}", lambda: bench.measure(bench.grid, pattern, **recipe))  # noqa: B023
    for pattern in chosen:
        for name, recipe in RECIPES.items():
            if {"recipes", name}.isdisjoint(wanted):
                continue
            entry(f"recipe {pattern} {name}", lambda: bench.measure(bench.whole, pattern, **recipe))  # noqa: B023
    lines = page(bench.read())
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    console.print(f"written to {out.with_suffix('.md')}")


def page(content: dict[str, Any]) -> list[str]:
    """docs/encoders.md."""
    setting = content["setting"]
    grid = setting["grid"]
    return [
        "# A sentence encoder, pruned",
        "",
        f"Measured by `make encoders` on one thread of an {setting['processor']}, torch {setting['torch']}: "
        f"{setting['model']}, calibrated on {setting['calibration']}; embeddings of sentences of "
        f"{setting['evaluation']}. The cosine is that of an input's pruned embedding and its dense one, mean over all "
        "sentences; the recall is the share of a sentence's 10 nearest dense neighbors that are among its 10 nearest "
        "pruned ones. `ace-triton evaluate PRUNED --dense DENSE --task embedding` measures both on your own text.",
        "",
        *_recipe_lines(content),
        "## Methods",
        "",
        f"{grid['sentences']:,} sentences; calibrated on {grid['samples']:,} sequences of at most {grid['length']} "
        'tokens; channels keep their order. Fit: kept weights by least squares (`update="lstsq"`). SparseGPT moves '
        "the kept weights itself, so it stands in the column without a fit.",
        "",
        *grid_table(content),
        "",
        *cosp_lines(content),
        "",
        "## Speed of a single sentence",
        "",
        *speed_table(content, PATTERNS),
        "",
        *products_table(content, PATTERNS),
    ]


def _recipe_lines(content: dict[str, Any]) -> list[str]:
    """The section of the recipes; empty if none was measured."""
    whole, trained = content["setting"]["whole"], content["setting"]["recovery"]
    if not any(key.startswith("recipe ") for key in content):
        return []
    return [
        "## Recipes",
        "",
        f"{whole['sentences']:,} sentences; calibrated on {whole['samples']:,} sequences of at most {whole['length']} "
        f'tokens, or "on sentences": {CALIBRATION_SENTENCES:,} single sentences of the calibration text. Block fit: '
        f"{BLOCK_EPOCHS} epochs of training of each block toward the outputs of the dense block (`block_epochs`). "
        f'"Recovered" trains the kept weights, norms and biases for {trained["steps"]} optimizer steps of '
        f"{trained['sentences']} sentences of the calibration text (`ace_triton.recover_model`, learning rate "
        f"{trained['rate']:g}); the zeros stay.",
        "",
        *recipe_table(content),
        "",
        *_verdict(content),
    ]


def recipe_table(content: dict[str, Any]) -> list[str]:
    """The recipes' results as a Markdown table; a recovered recipe has a row before the recovery and one after."""
    lines = [
        "| pattern | recipe | cosine | smallest cosine | recall at 10 | CPU seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pattern in PATTERNS:
        for name in RECIPES:
            if found := content.get(f"recipe {pattern} {name}"):
                if "before" in found:
                    lines.append(_recipe_row(pattern, name.removesuffix(", recovered"), found["before"]))
                lines.append(_recipe_row(pattern, name, found))
    return lines


def _recipe_row(pattern: str, name: str, found: dict[str, Any]) -> str:
    cells = (f"{found['cosine']:.3f}", f"{found['least_cosine']:.3f}", f"{found['recall']:.3f}")
    return f"| {pattern} | {name} | {' | '.join(cells)} | {found['cpu_seconds']:.0f} |"


def _verdict(content: dict[str, Any]) -> list[str]:
    """What the best recipe at 8:16 reaches of the aims."""
    found = [content[key] for key in content if key.startswith("recipe 8:16 ")]
    if not found:
        return []
    best = max(found, key=lambda result: result["cosine"])
    reached = [
        f"{name} {best[key]:.3f} (aim: {AIM[key]})" for name, key in (("cosine", "cosine"), ("recall", "recall"))
    ]
    return [f"The best recipe at 8:16 reaches {' and '.join(reached)}.", ""]


def grid_table(content: dict[str, Any]) -> list[str]:
    """The methods' results as a Markdown table: cosine and recall, by pattern, without and with the fit."""
    columns = [(pattern, update) for pattern in PATTERNS for update in (None, "lstsq")]
    titles = [f"{pattern}{', fit' if update else ''}" for pattern, update in columns]
    lines = [f"| method | {' | '.join(titles)} |", "|---" + "|---:" * len(columns) + "|"]
    for method in METHODS:
        cells = []
        for pattern, update in columns:
            found = content.get(f"grid {pattern} {method} {update}")
            cells.append(f"{found['cosine']:.3f} / {found['recall']:.3f}" if found else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, "", "Each cell: cosine / recall at 10; - was not measured."]


def cosp_lines(content: dict[str, Any]) -> list[str]:
    """What came out for CosP, whose score is a weight's effect on the cosine of a layer's outputs."""
    lines = []
    for pattern in PATTERNS:
        for update in (None, "lstsq"):
            found = {method: content.get(f"grid {pattern} {method} {update}") for method in METHODS}
            known = {method: result["cosine"] for method, result in found.items() if result}
            if "cosp" in known and len(known) > 1:
                rank = sorted(known, key=lambda method: -known[method]).index("cosp") + 1
                best = max(known, key=lambda method: known[method])
                lines.append(
                    f"- {pattern} {'with' if update else 'without'} the fit: CosP is number {rank} of {len(known)} by "
                    f"cosine ({known['cosp']:.3f}; best: {best}, {known[best]:.3f})."
                )
    return ["CosP scores a weight by its effect on the cosine of a layer's outputs, the measure used here:", "", *lines]


if __name__ == "__main__":
    typer.run(main)
