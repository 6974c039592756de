"""The same pruned model recovered with different settings; writes docs/recovery.{json,md}.

    python -m benchmarks.reports.recovery --calibration c4.jsonl.gz --held-out other-c4.jsonl.gz --evaluation
    wiki.test.raw.gz

SmolLM2-135M at 2:4 with Wanda's mask, permuted channels and fitted weights. Every recovery reads the same number of
tokens, each once. Results in docs/recovery.json are reused. With --short, short trials at 8:16 run instead
(:mod:`.recovery_short`), and their results are in docs/recovery_short.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import RecoverySettings, WrittenText, recover
from ace_triton.commands.report import write_json
from ace_triton.inputs.calibration import pieces, token_stream
from ace_triton.inputs.text import read_documents
from ace_triton.inputs.written_text import start_token
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell
from ace_triton.study.recipes_grid import BEST, PATTERN
from ace_triton.study.workbench import Protocol, Workbench

from . import recovery_short
from .held_out import divergence

SAMPLES, LENGTH, SEED = 64, 128, 0
WINDOWS = 60

MOST_HELD_OUT = 1000
"""At most this many documents of the held-out text are read."""

HELD_OUT_SEQUENCES, HELD_OUT_LENGTH = 256, 256
"""At most this many sequences of this length are used for the divergence."""

TOKENS = 102_400
"""Tokens that every recovery reads: 400 steps of 256."""

DEFAULT = RecoverySettings(steps=1)
"""The settings that a trial starts from; the number of steps is set later."""

WRITTEN = "text that the dense model writes"
"""The trial that does not use the calibration text."""

TRIALS: dict[str, RecoverySettings] = {
    "the defaults": DEFAULT,
    "other pieces of the text": replace(DEFAULT, seed=1),
    "learning rate 0.0012": replace(DEFAULT, learning_rate=1.2e-3),
    "learning rate 0.0025": replace(DEFAULT, learning_rate=2.5e-3),
    "steps of 512 tokens, learning rate 0.002": replace(DEFAULT, tokens_per_step=512, learning_rate=2e-3),
    "steps of 1,024 tokens, learning rate 0.0025": replace(DEFAULT, tokens_per_step=1024, learning_rate=2.5e-3),
    "norms trained too": replace(DEFAULT, norms=True),
    WRITTEN: DEFAULT,
}

console = Console()


@dataclass(frozen=True)
class Outcome:
    """A recovered model.

    Attributes:
        trial: name in :data:`TRIALS`; "" for the model before recovery.
        divergence: from the dense model's predictions, in nats per token, on held-out text.
        perplexity: over windows of 512 tokens.
        long_perplexity: over windows of 2,048 tokens.
        cpu_seconds: CPU time of the recovery, all threads together.
    """

    trial: str
    divergence: float
    perplexity: float
    long_perplexity: float
    cpu_seconds: float


def main(
    calibration: Annotated[str, typer.Option()],
    held_out: Annotated[str, typer.Option(help="Text like the calibration text, but not part of it.")],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    out: Annotated[Path, typer.Option(help="Folder of recovery.json and recovery.md.")] = Path("docs"),
    trial: Annotated[list[str] | None, typer.Option(help="Name of a trial to run; repeatable; default: all.")] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens that every recovery reads.")] = TOKENS,
    model: Annotated[str, typer.Option(help="Where SmolLM2-135M lies.")] = "smollm2",
    short: Annotated[bool, typer.Option("--short", help="Run the short trials at 8:16 instead.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a short trial.")] = recovery_short.STEPS,
    most: Annotated[int | None, typer.Option(min=0, help="Number of short trials to run now; default: all.")] = None,
    kept: Annotated[Path | None, typer.Option(help="Folder that keeps pruned weights for the next short run.")] = None,
) -> None:
    """Measure what is missing, and write the page."""
    if short:
        texts = recovery_short.Texts(model, calibration, held_out, evaluation)
        found = recovery_short.measure(texts, out, trial or (), steps, most, kept)
        (out / "recovery.md").write_text(page(measured(out, tokens), tokens, found))
        return
    wanted = trial or list(TRIALS)
    if unknown := set(wanted) - set(TRIALS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(TRIALS)}")
    outcomes = measured(out, tokens)
    todo = [name for name in ("", *wanted) if name not in {outcome.trial for outcome in outcomes}]
    if todo:
        protocol = Protocol(
            model,
            calibration,
            evaluation,
            wikitext=True,
            samples=SAMPLES,
            windows=WINDOWS,
            further_window_lengths=(2048,),
        )
        bench = Workbench(protocol)
        stream = token_stream(read_documents(held_out, most=MOST_HELD_OUT), bench.tokenizer)
        other = pieces(stream, HELD_OUT_SEQUENCES, HELD_OUT_LENGTH, SEED)
        with bench.pruned(Cell(Recipe("wanda", sparsity=PATTERN, **BEST), LENGTH, SEED)):
            start = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
            for name in todo:
                bench.model.load_state_dict(start)
                outcomes.append(outcome_of(bench, other, name, tokens))
                console.print(outcomes[-1], highlight=False)
                write_json(out / "recovery.json", record(outcomes, tokens))
    (out / "recovery.md").write_text(page(outcomes, tokens, recovery_short.measured(out)))


def outcome_of(bench: Workbench, held_out: torch.Tensor, name: str, tokens: int) -> Outcome:
    """Run a trial on the pruned model."""
    cpu_seconds = 0.0
    if name:
        settings = TRIALS[name]
        settings = replace(settings, steps=tokens // settings.tokens_per_step)
        if name == WRITTEN:
            text = WrittenText(start_token(bench.teacher, bench.tokenizer))
            report = recover(bench.model, bench.teacher, text, settings)
        else:
            report = bench.recover(settings)
        cpu_seconds = report.cpu_seconds
    long = bench.further_perplexities()[0].perplexity
    return Outcome(name, divergence(bench, held_out), bench.perplexity(), long, cpu_seconds)


def record(outcomes: list[Outcome], tokens: int) -> dict[str, Any]:
    """The record of all outcomes, as JSON types."""
    return {"tokens": tokens, "outcomes": [asdict(each) for each in outcomes]}


def measured(out: Path, tokens: int) -> list[Outcome]:
    """Earlier results with the same number of tokens."""
    path = out / "recovery.json"
    found = json.loads(path.read_text()) if path.exists() else {"tokens": tokens, "outcomes": []}
    if found["tokens"] != tokens:
        raise typer.BadParameter(
            f"{path} was measured on {found['tokens']} tokens: use --tokens {found['tokens']}, or remove it"
        )
    return [Outcome(**each) for each in found["outcomes"]]


def page(outcomes: list[Outcome], tokens: int, short: Sequence[recovery_short.Outcome] = ()) -> str:
    """docs/recovery.md."""
    rows = {outcome.trial: outcome for outcome in outcomes}
    lines = [
        "# Settings of a recovery",
        "",
        f"Measured on a CPU by `make recovery-trials`: SmolLM2-135M at {PATTERN} with Wanda's mask, permuted channels, "
        f"and weights fitted on {SAMPLES} x {LENGTH} tokens of C4. Every recovery reads {tokens:,} tokens of C4 once, "
        "in sequences of 256. Divergence from the dense model is in nats per token, on held-out text of C4. Perplexity "
        f"is on WikiText-2: {WINDOWS} windows of 512 tokens, and the same text in windows of 2,048. The row with other "
        "pieces of the text shows the noise. CPU seconds are per 1,024 tokens. Learning rates are in units of each "
        "weight's root mean square.",
        "",
        "Other pages start from the same recipe with other perplexities before recovery, which cannot be compared with "
        f"those here. This page has {WINDOWS} windows, the model in bfloat16, and one calibration sample. The README "
        "and [choose a pattern and a recipe](guides/patterns-and-recipes.md) have fewer windows and the mean over "
        "several calibration samples, in bfloat16. [Fits by model and pattern](fits.md) has fewer windows and the "
        "model in float32, with one sample.",
        "",
        "| settings | divergence | perplexity, 512 | 2,048 | CPU seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("", *TRIALS):
        if (row := rows.get(name)) is not None:
            cost = f"{row.cpu_seconds * 1024 / tokens:.1f}" if name else ""
            figures = f"{row.divergence:.3f} | {row.perplexity:.1f} | {row.long_perplexity:.1f}"
            lines.append(f"| {name or 'before recovery'} | {figures} | {cost} |")
    return "\n".join([*lines, *recovery_short.section(short)]) + "\n"


if __name__ == "__main__":
    typer.run(main)
