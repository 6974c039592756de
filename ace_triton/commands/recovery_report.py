"""What ``ace-triton recover`` shows while it trains, and what it says and records of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from ..recovery.settings import MEAN_STEPS, RecoveryReport, RecoverySettings
from ..recovery.state import spent_before
from ..solvers.quantize import Quantization
from .console import print_note
from .report import facts_table

GUIDE = "docs/guides/recover.md"


def recovery_bar(progress: Progress, settings: RecoverySettings, state: Path) -> Callable[[float, float, float], None]:
    """Add a bar for a training, and print after how many steps it resumes.

    Args:
        progress: shows the bar.
        settings: of the training.
        state: file that the training resumes from, if it exists.

    Returns:
        The callback ``progress`` of :func:`~ace_triton.recover`, which moves the bar.
    """
    unit = "steps" if settings.minutes is None else "seconds"
    completed = 0.0
    if (before := spent_before(state)) is not None:
        completed = before[0] if settings.minutes is None else before[1]
        spent = "" if settings.minutes is None else f"; {completed:.0f} of {settings.budget:.0f} seconds are spent"
        print_note(f"resuming after {_steps(before[0])}{spent}")
    bar = progress.add_task("set up and recover", total=None, completed=round(completed), unit=unit)

    def move(spent: float, budget: float, loss: float) -> None:
        progress.update(
            bar, completed=round(spent), total=round(budget), description=f"set up and recover, loss {loss:.3f}"
        )

    return move


def recovery_table(result: RecoveryReport, trained: str, *, of_text: bool = True, hidden_states: bool = False) -> Table:
    """A recovery's results; losses are means over its first and its last steps.

    Args:
        result: the report.
        trained: name of the values that were trained.
        of_text: True for a causal language model, whose losses are in nats a token.
        hidden_states: True if the losses include the distance of hidden states, which has another unit.
    """
    table = facts_table("recovery")
    unit = " with hidden states" if hidden_states else " nats a token" if of_text else ""
    table.add_row("steps", f"{result.steps:,}")
    if result.tokens:
        table.add_row("tokens", f"{result.tokens:,}")
    table.add_row(f"passes over the {'text' if of_text else 'inputs'}", f"{result.passes:.2f}")
    table.add_row("time of the optimizer steps", f"{result.seconds:.0f} s")
    table.add_row("CPU time of them", f"{result.cpu_seconds:.0f} s")
    count = "step" if result.steps_of_mean == 1 else f"{result.steps_of_mean} steps"
    for which, loss in zip(("first", "last"), result.mean_losses, strict=True):
        table.add_row(f"mean loss, {which} {count}", f"{loss:.3f}{unit}")
    table.add_row(f"{trained} trained", f"{result.trained:,}")
    if result.zeros:
        table.add_row("weights still 0", f"{result.zeros:,}")
    return table


def gain_note(result: RecoveryReport) -> str | None:
    """What to say if a recovery was too short for its loss to tell a gain, or its loss did not fall; None otherwise.

    Every step reads other text, so the losses of single steps differ by chance. Below twice MEAN_STEPS the first and
    the last mean are of fewer than MEAN_STEPS steps each, and their difference tells little.
    """
    before, after = result.mean_losses
    if result.steps < 2 * MEAN_STEPS:
        problem = (
            f"{_steps(result.steps)} of {result.seconds / result.steps:.1f} s: too few to gain much, or to tell a gain "
            f"from the loss ({2 * MEAN_STEPS} or more tell it)"
        )
    elif after >= before:
        problem = f"The mean loss did not fall in {_steps(result.steps)}, from {before:.3f} to {after:.3f}"
    else:
        return None
    return f"{problem}. Give more --minutes or --steps, and compare OUT with DIR by ace-triton evaluate ({GUIDE})."


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def after_training(pruning: dict[str, Any], quantize: Quantization | None) -> dict[str, Any]:
    """A pruning report after a recovery: its recipe says how the weights are quantized only if they still are so."""
    recipe = pruning.get("recipe")
    if not isinstance(recipe, dict):
        return pruning
    before = recipe.get("quantize")
    now = None if quantize is None else (quantize.bits, quantize.group)
    if isinstance(before, dict) and (before.get("bits"), before.get("group")) == now:
        return pruning
    return {**pruning, "recipe": {name: part for name, part in recipe.items() if name != "quantize"}}
