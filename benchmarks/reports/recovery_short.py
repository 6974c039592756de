"""Short recoveries at 8:16: hidden states in the loss, and a pattern that tightens; a table of docs/recovery.md.

``python -m benchmarks.reports.recovery --short`` runs them. Every trial takes the same number of optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json
from ace_triton.inputs.calibration import pieces, token_stream
from ace_triton.inputs.text import read_documents
from ace_triton.recipe import Recipe
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench

from .annealing import GROUP, LEVELS, Tightening
from .fit_recipes import FIT, recipe_of
from .held_out import divergence
from .machines import processor
from .pruned_weights import pruned_once
from .record import read_record

PATTERN = f"{LEVELS[-1]}:{GROUP}"
SAMPLES, LENGTH, SEED = 64, 128, 0
STEPS, WINDOWS, WINDOW_LENGTH = 60, 10, 512
MOST_HELD_OUT, HELD_OUT_SEQUENCES, HELD_OUT_LENGTH = 1000, 4, 256
FILE = "recovery_short.json"

START = Recipe("wanda", sparsity=f"{LEVELS[0]}:{GROUP}", permute=True)
"""How the model of the trial that tightens is pruned."""

DEFAULT = RecoverySettings(steps=STEPS, forward_dtype=torch.float32)

TIGHTENED = f"tightened from {LEVELS[0]}:{GROUP} in the first half"
"""The trial that starts from a milder pattern."""

TRIALS: dict[str, RecoverySettings] = {
    "the defaults": DEFAULT,
    "other pieces of the text": replace(DEFAULT, seed=1),
    "hidden states, weight 5": replace(DEFAULT, hidden_states=5.0),
    "norms trained too": replace(DEFAULT, norms=True),
    TIGHTENED: DEFAULT,
}

console = Console()


@dataclass(frozen=True)
class Texts:
    """A model, and the calibration, held-out and evaluation texts, as for ace-triton."""

    model: str
    calibration: str
    held_out: str
    evaluation: str


@dataclass(frozen=True)
class Outcome:
    """A recovered model.

    Attributes:
        trial: name in :data:`TRIALS`; "" for the model before recovery.
        steps: number of optimizer steps of the series.
        divergence: from the dense model's predictions, in nats per token, on held-out text.
        perplexity: on WikiText-2.
        cpu_seconds: CPU time of the recovery.
        processor: its name.
    """

    trial: str
    steps: int
    divergence: float
    perplexity: float
    cpu_seconds: float
    processor: str


def measure(
    texts: Texts, out: Path, wanted: Sequence[str], steps: int, most: int | None = None, kept: Path | None = None
) -> list[Outcome]:
    """Measure the trials that are missing in the record.

    Args:
        texts: what the trials run on.
        out: folder of the record.
        wanted: names of trials; all if empty.
        steps: number of optimizer steps of each trial.
        most: number of trials to run now; None for all.
        kept: folder that keeps pruned weights for the next run; None keeps none.

    Raises:
        typer.BadParameter: if a trial is unknown, or the record has another number of steps.
    """
    if unknown := set(wanted) - set(TRIALS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(TRIALS)}")
    outcomes = measured(out)
    if other := {outcome.steps for outcome in outcomes} - {steps}:
        raise typer.BadParameter(f"{out / FILE} was measured with {other.pop()} steps: use --steps, or remove it")
    known = {outcome.trial for outcome in outcomes}
    todo = [name for name in (*(wanted or TRIALS), "") if name not in known][:most]
    if not todo:
        return outcomes
    protocol = Protocol(
        texts.model,
        texts.calibration,
        texts.evaluation,
        wikitext=True,
        samples=SAMPLES,
        windows=WINDOWS,
        window_length=WINDOW_LENGTH,
        dtype=torch.float32,
    )
    bench = Workbench(protocol)
    stream = token_stream(read_documents(texts.held_out, most=MOST_HELD_OUT), bench.tokenizer)
    held_out = pieces(stream, HELD_OUT_SEQUENCES, HELD_OUT_LENGTH, SEED)
    for name in todo:
        with pruned_once(bench, Cell(START if name == TIGHTENED else recipe_of(FIT, PATTERN), LENGTH, SEED), kept):
            outcomes.append(outcome_of(bench, held_out, name, steps))
        console.print(outcomes[-1], highlight=False)
        write_json(out / FILE, {"outcomes": [asdict(each) for each in outcomes]})
    return outcomes


def outcome_of(bench: Workbench, held_out: torch.Tensor, name: str, steps: int) -> Outcome:
    """Run a trial on the pruned model."""
    cpu_seconds = 0.0
    if name:
        tightening = Tightening(bench.model) if name == TIGHTENED else None
        with nullcontext() if tightening is None else tightening.watched():
            progress = None if tightening is None else tightening.after_step
            cpu_seconds = bench.recover(replace(TRIALS[name], steps=steps), progress=progress).cpu_seconds
    return Outcome(name, steps, divergence(bench, held_out), bench.perplexity(), cpu_seconds, processor())


def measured(out: Path) -> list[Outcome]:
    """Earlier results."""
    record = read_record(out / FILE, outcomes=[])
    return [Outcome(**each) for each in record["outcomes"]]


def section(outcomes: Sequence[Outcome]) -> list[str]:
    """The table of docs/recovery.md; empty without results."""
    if not outcomes:
        return []
    rows = {outcome.trial: outcome for outcome in outcomes}
    machines = sorted({outcome.processor for outcome in outcomes})
    lines = [
        "",
        f"## Hidden states, and a pattern that tightens, at {PATTERN}",
        "",
        f"Measured by the same command with `--short`: SmolLM2-135M in float32 with Wanda's mask, permuted channels, "
        f"and weights fitted on {SAMPLES} x {LENGTH} tokens of C4. Every recovery takes {outcomes[0].steps} optimizer "
        f"steps of {DEFAULT.tokens_per_step} tokens of C4, in the same order except with other pieces, which "
        f"shows the noise. Divergence is on {HELD_OUT_SEQUENCES} sequences of held-out text, perplexity over {WINDOWS} "
        f"windows of {WINDOW_LENGTH} tokens of WikiText-2. The trial that tightens starts from {LEVELS[0]}:{GROUP} "
        f"without a fit, and drops one more weight of each group of {GROUP} at a time by Wanda's metric, until it is "
        f"at {PATTERN} after half of the steps. CPU seconds are those of the recovery. "
        f"{', '.join(machines)}, one thread.",
        "",
        "| settings | divergence | perplexity | CPU seconds |",
        "|---|---:|---:|---:|",
    ]
    for name in ("", *TRIALS):
        if (row := rows.get(name)) is not None:
            seconds = f"{row.cpu_seconds:.0f}" if name else ""
            lines.append(f"| {name or 'before recovery'} | {row.divergence:.3f} | {row.perplexity:.1f} | {seconds} |")
    return lines
