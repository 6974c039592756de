"""The demo: one real model, pruned by two recipes, recovered, packed and measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from ..evaluate import perplexity
from ..generation import generate
from ..inputs.beginnings import Beginning
from ..inputs.calibration import load_calibration, token_stream
from ..inputs.checkpoint import SMOLLM2, check_out, load, save
from ..inputs.text import read_documents
from ..packed.pack_model import sparsify
from ..presets import BALANCED, FAST, replaced
from ..progress import progress_bar, stage
from ..provenance import with_provenance
from ..prune_blocks import prune_model
from ..recipe import Recipe
from ..recovery.settings import RecoverySettings
from ..recovery.train import recover
from ..runs_on import multiplies_bfloat16
from .report import headed_table

MOST_SEQUENCES = 10_000
"""Largest number of sequences to recover on; the text has fewer."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the defaults take four minutes on two cores.

    Attributes:
        prompt: text that every model continues greedily by ``new_tokens`` tokens.
        minutes: time of the recovery after the last recipe.
    """

    source: str = SMOLLM2
    sparsity: str = "2:4"
    recipes: tuple[Recipe, ...] = (FAST, BALANCED)
    calibration: str = "pydoc:calibration"
    evaluation: str = "pydoc:evaluation"
    text: str | None = None
    samples: int = 32
    length: int = 64
    windows: int = 4
    window_length: int = 512
    minutes: float = 1.0
    recovery_length: int = 128
    prompt: str = "In Python, a list is"
    new_tokens: int = 24
    seed: int = 0
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "recipes": [recipe.to_dict() for recipe in self.recipes],
        }


@dataclass(frozen=True)
class DemoRow:
    """Results for one model of the demo; times are wall-clock seconds on this machine.

    Attributes:
        model: "dense", or the step that made the model.
        seconds: time of the step; None for the dense model.
        perplexity: perplexity on text that calibration and recovery did not read.
        own_text_perplexity: perplexity on the user's text, if there is one.
        written: the model's continuation of the prompt.
        tokens_per_second: speed of that continuation.
    """

    model: str
    seconds: float | None
    perplexity: float
    own_text_perplexity: float | None
    written: str
    tokens_per_second: float


class Demo:
    """The model, the texts and the results so far.

    Args:
        settings: settings of the demo.
        progress: shows the stages.
    """

    def __init__(self, settings: DemoSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.rows: list[DemoRow] = []
        own_text = None if settings.text is None else read_documents(settings.text)
        calibration = read_documents(settings.calibration)
        with stage(progress, "load the model"):
            dtype = "auto" if multiplies_bfloat16(settings.device) else torch.float32
            self.model, self.tokenizer = load(settings.source, dtype=dtype, device=settings.device)
            self.teacher = copy.deepcopy(self.model)
        self.beginning = Beginning.of(self.tokenizer)
        self.held_out = token_stream(read_documents(settings.evaluation), self.tokenizer)
        self.own_ids = None if own_text is None else token_stream(own_text, self.tokenizer)
        self.sequences = load_calibration(
            calibration, self.tokenizer, samples=settings.samples, length=settings.length, seed=settings.seed
        )
        length = settings.recovery_length
        self.training = load_calibration(
            calibration, self.tokenizer, samples=MOST_SEQUENCES, length=length, seed=settings.seed, apart=True
        )
        self.report: dict[str, Any] = {}

    def run(self, out: Path, *, overwrite: bool) -> None:
        """Run all steps, and save the recovered model to ``out``, dense with zeros."""
        self.measure("dense", None)
        for recipe in self.settings.recipes:
            self.step(recipe.words, "blocks", partial(self.prune, recipe))
        self.step(f"+ {self.settings.minutes:g} min of recovery", "seconds", self.recover)
        with stage(self.progress, "save the model"):
            save(self.model, self.tokenizer, out, with_provenance(self.report), overwrite=overwrite)
        self.step("+ packed", "models", self.pack)

    def step(self, name: str, unit: str, work: Callable[[Callable[..., None]], object]) -> None:
        """Change the model by ``work``, whose progress is counted in ``unit``; time that, and measure the model."""
        start = time.perf_counter()
        work(progress_bar(self.progress, name, unit))
        self.measure(name, time.perf_counter() - start)

    def prune(self, recipe: Recipe, bar: Callable[..., None]) -> None:
        """Prune the dense model by a recipe."""
        self.model.load_state_dict(self.teacher.state_dict())
        asked = replaced(recipe, {"sparsity": self.settings.sparsity})
        report = prune_model(self.model, self.sequences, asked, progress=bar)
        self.report = {**report.to_dict(), "source": self.settings.source, "demo": self.settings.to_dict()}

    def recover(self, bar: Callable[..., None]) -> None:
        """Train the weights that the last recipe kept."""
        dtype = torch.float32 if self.model.dtype == torch.float32 else torch.bfloat16
        settings = RecoverySettings(minutes=self.settings.minutes, seed=self.settings.seed, forward_dtype=dtype)
        result = recover(self.model, self.teacher, self.training.ids, settings, progress=bar)
        self.report["recovery"] = result.to_dict()

    def pack(self, bar: Callable[..., None]) -> None:
        """Replace the pruned layers by packed ones."""
        sparsify(self.model)
        bar(1, 1)

    def measure(self, name: str, seconds: float | None) -> None:
        """Measure the model and add its row."""
        value = self.perplexity(self.held_out, f"evaluate: {name}")
        own = None if self.own_ids is None else self.perplexity(self.own_ids, f"evaluate on your text: {name}")
        written = generate(self.model, self.tokenizer, self.settings.prompt, max_new_tokens=self.settings.new_tokens)
        self.rows.append(DemoRow(name, seconds, value, own, written.text, written.tokens_per_second))

    def perplexity(self, ids: torch.Tensor, label: str) -> float:
        """Perplexity of the current model."""
        bar = progress_bar(self.progress, label, "windows")
        length, windows = self.settings.window_length, self.settings.windows
        measured = perplexity(self.model, ids, length=length, windows=windows, beginning=self.beginning, progress=bar)
        return measured.perplexity


def run_demo(settings: DemoSettings, out: str | Path, *, overwrite: bool, progress: Progress) -> list[DemoRow]:
    """Prune a model by each recipe, recover and pack the last one, and measure every step. Saves it to ``out``."""
    check_out(out, overwrite=overwrite)
    demo = Demo(settings, progress)
    demo.run(Path(out), overwrite=overwrite)
    return demo.rows


def demo_table(rows: list[DemoRow], settings: DemoSettings) -> Table:
    """The demo's table."""
    own = ("on your text",) if settings.text is not None else ()
    headings = ("model", "time", "perplexity", *own, "tokens/s")
    table = headed_table(*headings, title=f"{settings.source} pruned to {settings.sparsity}", left=("model",))
    for row in rows:
        spent = "" if row.seconds is None else f"{row.seconds:.1f} s"
        on_own = () if row.own_text_perplexity is None else (f"{row.own_text_perplexity:.2f}",)
        table.add_row(row.model, spent, f"{row.perplexity:.2f}", *on_own, f"{row.tokens_per_second:.1f}")
    return table


def demo_json(rows: list[DemoRow], settings: DemoSettings) -> dict[str, Any]:
    """The demo's results as JSON types."""
    return {"settings": settings.to_dict(), "rows": [asdict(row) for row in rows]}
