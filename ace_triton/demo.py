"""The demo: one real model, pruned by several methods and measured, on any machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from .beginnings import Beginning
from .calibration import load_calibration, token_stream
from .checkpoint import SMOLLM2, check_out, load, save
from .evaluate import perplexity
from .progress import progress_bar
from .prune_model import prune_model
from .text import read_documents

METHODS = ("magnitude", "wanda", "ria", "ace")


@dataclass(frozen=True)
class DemoRow:
    """One method's line of the demo's table; times in seconds of wall clock on this machine.

    Attributes:
        method: "dense", or the metric's name.
        sparsity: share of the pruned layers' weights that are zero.
        perplexity: on the half of Python's reference topics that calibration did not see.
        own_text_perplexity: on the user's text, where one was given.
        calibration_seconds: forwards and statistics.
        select_seconds: score and mask.
    """

    method: str
    sparsity: float
    perplexity: float
    own_text_perplexity: float | None
    calibration_seconds: float
    select_seconds: float


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs on; small enough for three minutes on two cores."""

    source: str = SMOLLM2
    sparsity: str = "2:4"
    methods: tuple[str, ...] = METHODS
    calibration: str = "pydoc:calibration"
    evaluation: str = "pydoc:evaluation"
    text: str | None = None
    samples: int = 32
    length: int = 64
    windows: int = 4
    window_length: int = 512
    seed: int = 0
    device: str = "cpu"


def run_demo(settings: DemoSettings, out: str | Path, *, overwrite: bool, progress: Progress) -> list[DemoRow]:
    """Prune the model with every method in turn, measure each, and save the last one's model to ``out``."""
    check_out(out, overwrite=overwrite)
    loading = progress.add_task("load the model", total=2)
    own_text = None if settings.text is None else read_documents(settings.text)
    model, tokenizer = load(settings.source, device=settings.device)
    progress.update(loading, completed=1)
    beginning = Beginning.of(tokenizer)
    held_out = token_stream(read_documents(settings.evaluation), tokenizer)
    own_ids = None if own_text is None else token_stream(own_text, tokenizer)
    calibration = load_calibration(
        settings.calibration,
        tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        model=model,
    )
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progress.update(loading, completed=2)

    def measure(label: str, ids: torch.Tensor | None) -> float | None:
        if ids is None:
            return None
        bar = progress_bar(progress, label)
        length, windows = settings.window_length, settings.windows
        return perplexity(model, ids, length=length, windows=windows, beginning=beginning, progress=bar).perplexity

    def row(method: str, share: float, calibration_seconds: float, select_seconds: float) -> DemoRow:
        value = measure(f"{method}: evaluate", held_out)
        assert value is not None
        own = measure(f"{method}: evaluate on your text", own_ids)
        return DemoRow(method, share, value, own, calibration_seconds, select_seconds)

    rows = [row("dense", 0.0, 0.0, 0.0)]
    report: Any = None
    for method in settings.methods:
        model.load_state_dict(dense)
        bar = progress_bar(progress, f"{method}: prune")
        report = prune_model(model, calibration, method, settings.sparsity, progress=bar)
        share = 1 - sum(layer.kept for layer in report.layers) / len(report.layers)
        seconds = report.seconds
        rows.append(row(method, share, seconds.calibration + seconds.statistics, seconds.select))
    writing = progress.add_task("save the model", total=1)
    save(model, tokenizer, out, report.to_dict(), overwrite=overwrite)
    progress.update(writing, completed=1)
    return rows


def demo_table(rows: list[DemoRow], settings: DemoSettings) -> Table:
    """The demo's table."""
    table = Table(title=f"{settings.source} pruned to {settings.sparsity}")
    table.add_column("method")
    for heading in ("sparsity", "perplexity"):
        table.add_column(heading, justify="right")
    if settings.text is not None:
        table.add_column("on your text", justify="right")
    table.add_column("calibration", justify="right")
    table.add_column("score and mask", justify="right")
    for row in rows:
        cells = [row.method, f"{row.sparsity:.0%}", f"{row.perplexity:.2f}"]
        if settings.text is not None:
            cells.append("-" if row.own_text_perplexity is None else f"{row.own_text_perplexity:.2f}")
        if row.method == "dense":
            cells += ["-", "-"]
        else:
            cells += [f"{row.calibration_seconds:.2f} s", f"{row.select_seconds:.3f} s"]
        table.add_row(*cells)
    return table


def demo_json(rows: list[DemoRow], settings: DemoSettings) -> dict[str, Any]:
    """The demo's results for JSON."""
    return {"settings": asdict(settings), "rows": [asdict(row) for row in rows]}
