"""What a recovery's settings do: the same pruned model recovered with each; writes docs/recovery.{json,md}.

    python -m benchmarks.recovery --calibration c4.jsonl.gz --held-out other-c4.jsonl.gz --evaluation wiki.test.raw.gz

SmolLM2-135M at 2:4, Wanda's mask, channels permuted, weights fitted; every recovery reads the same tokens once. What
docs/recovery.json holds is not run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ace_triton import RecoverySettings, WrittenText, recover
from ace_triton.calibration import pieces, token_stream
from ace_triton.report import write_json
from ace_triton.study.cells import Cell, Variant
from ace_triton.study.recipes_grid import BEST, PATTERN
from ace_triton.study.samples import next_token_divergence
from ace_triton.study.workbench import Protocol, Workbench
from ace_triton.text import read_documents
from ace_triton.written_text import start_token

SAMPLES, LENGTH, SEED = 64, 128, 0
WINDOWS = 60

MOST_HELD_OUT = 1000
"""Documents of the held-out text."""

HELD_OUT_SEQUENCES, HELD_OUT_LENGTH = 256, 256
"""Of the text that the divergence is taken over, at most."""

TOKENS = 102_400
"""That every recovery reads: 400 steps of 256."""

DEFAULT = RecoverySettings(steps=1)
"""Each trial's settings but for their steps."""

WRITTEN = "text that the dense model writes"
"""The trial that does not read the calibration text."""

TRIALS: dict[str, RecoverySettings] = {
    "as it is by default": DEFAULT,
    "other pieces of the text": replace(DEFAULT, seed=1),
    "rate 0.0012": replace(DEFAULT, learning_rate=1.2e-3),
    "rate 0.0025": replace(DEFAULT, learning_rate=2.5e-3),
    "steps of 512 tokens, rate 0.002": replace(DEFAULT, tokens_per_step=512, learning_rate=2e-3),
    "steps of 1,024 tokens, rate 0.0025": replace(DEFAULT, tokens_per_step=1024, learning_rate=2.5e-3),
    "norms trained too": replace(DEFAULT, norms=True),
    WRITTEN: DEFAULT,
}

console = Console()


@dataclass(frozen=True)
class Outcome:
    """A recovered model.

    Attributes:
        trial: its name in :data:`TRIALS`; "" for the model before any recovery.
        divergence: from the dense model's predictions, in nats a token, on text held out.
        perplexity: over windows of 512 tokens.
        long_perplexity: of 2,048.
        cpu_seconds: that the recovery took, of all threads together.
    """

    trial: str
    divergence: float
    perplexity: float
    long_perplexity: float
    cpu_seconds: float


def main(
    calibration: Annotated[str, typer.Option()],
    held_out: Annotated[str, typer.Option(help="Text of the calibration's kind, none of which is in it.")],
    evaluation: Annotated[str, typer.Option(help="A raw WikiText file.")],
    out: Annotated[Path, typer.Option(help="Folder of recovery.json and recovery.md.")] = Path("docs"),
    trial: Annotated[list[str] | None, typer.Option(help="Only those; given once for each.")] = None,
    tokens: Annotated[int, typer.Option(help="That every recovery reads.")] = TOKENS,
) -> None:
    """Measure what is missing and write the page."""
    wanted = trial or list(TRIALS)
    if unknown := set(wanted) - set(TRIALS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(TRIALS)}")
    outcomes = measured(out, tokens)
    todo = [name for name in ("", *wanted) if name not in {outcome.trial for outcome in outcomes}]
    if todo:
        protocol = Protocol(
            "smollm2",
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
        with bench.pruned(Cell(Variant("wanda", recipe=BEST), PATTERN, LENGTH, SEED)):
            start = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
            for name in todo:
                bench.model.load_state_dict(start)
                outcomes.append(outcome_of(bench, other, name, tokens))
                console.print(outcomes[-1], highlight=False)
                write_json(out / "recovery.json", record(outcomes, tokens))
    (out / "recovery.md").write_text(page(outcomes, tokens))


def outcome_of(bench: Workbench, held_out: torch.Tensor, name: str, tokens: int) -> Outcome:
    """A trial on the model as it is pruned now."""
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


@torch.no_grad()
def divergence(bench: Workbench, ids: torch.Tensor) -> float:
    """Of the model as it is now from the dense one, mean over tokens."""
    total = 0.0
    for window in ids:
        dense, recovered = (
            decoder(window[None], use_cache=False).logits[0] for decoder in (bench.teacher, bench.model)
        )
        total += float(next_token_divergence(dense, recovered)[0].sum())
    return total / ids.numel()


def record(outcomes: list[Outcome], tokens: int) -> dict[str, Any]:
    """As JSON types."""
    return {"tokens": tokens, "outcomes": [asdict(each) for each in outcomes]}


def measured(out: Path, tokens: int) -> list[Outcome]:
    """What was measured before on as many tokens."""
    path = out / "recovery.json"
    found = json.loads(path.read_text()) if path.exists() else {"tokens": tokens, "outcomes": []}
    if found["tokens"] != tokens:
        raise typer.BadParameter(f"{path} was measured on {found['tokens']} tokens: give as many, or remove it")
    return [Outcome(**each) for each in found["outcomes"]]


def page(outcomes: list[Outcome], tokens: int) -> str:
    """The table as markdown."""
    rows = {outcome.trial: outcome for outcome in outcomes}
    lines = [
        "# Settings of a recovery",
        "",
        f"Measured on a CPU by `make recovery-trials`: SmolLM2-135M at {PATTERN}, Wanda's mask, channels permuted, "
        f"weights fitted on {SAMPLES} x {LENGTH} tokens of C4; {tokens:,} tokens of it read once, in sequences of 256; "
        "divergence from the dense model in nats a token, on other text of C4; perplexity on WikiText-2, "
        f"{WINDOWS} windows of 512 tokens and as many tokens in windows of 2,048. How much is chance, other pieces of "
        "the text tell. CPU seconds are for 1,024 tokens. Rates count in units of each weight's root mean square.",
        "",
        "| settings | divergence | perplexity, 512 | 2,048 | CPU seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("", *TRIALS):
        if (row := rows.get(name)) is not None:
            cost = f"{row.cpu_seconds * 1024 / tokens:.1f}" if name else ""
            figures = f"{row.divergence:.3f} | {row.perplexity:.1f} | {row.long_perplexity:.1f}"
            lines.append(f"| {name or 'before'} | {figures} | {cost} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
