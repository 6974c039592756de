"""Runs the cells of a study that are not in its journal yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__
from ..recovery.train import RecoverySettings
from .cells import Cell
from .journal import Journal
from .norms import model_norms
from .records import CellResult, DenseResult, RecoveryCost, Run, Sample, StageSeconds
from .samples import Sampler
from .workbench import Pruning, Workbench, processor_name

Progress = Callable[[int, int, str], None]

RECOVERY_FOLDER = ".recovery"
"""Inside the study's folder: states of unfinished recoveries."""


class Cells(Protocol):
    """What a study runs: a :class:`~.cells.Grid`, or a :class:`~.recipes_grid.RecipesGrid`."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in a calibration sequence."""

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown."""

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they are run."""


def run_study(
    bench: Workbench, journal: Journal, grid: Cells, progress: Progress | None = None, command: str = ""
) -> None:
    """Measure what is missing: the dense model, its input norms, then each cell.

    Every result is in the journal before the next cell starts, so an interrupted study loses at most one cell, or a
    few minutes of a recovery.

    Args:
        bench: the model and the texts.
        journal: opened with ``bench.setting``.
        grid: what to run; a cell in the journal runs again only if it lacks one of the window lengths.
        progress: called with the number of finished cells, of all cells, and the name of the next one.
        command: recorded beside the date if anything is measured.

    Raises:
        TextError: if the model or the text is too short for a calibration length.
    """
    bench.check_lengths(grid.lengths)
    cells, found = grid.cells(), journal.results
    draw = next(((cell.length, cell.seed) for cell in found.samples if cell is not None and cell.length), grid.shown)
    shown = {cell for cell in cells if cell.length is None or (cell.length, cell.seed) == draw}
    windows = bench.setting.further_window_lengths
    todo = [
        cell
        for cell in cells
        if not _measured(found.cells.get(cell), windows) or (cell in shown and cell not in found.samples)
    ]

    def report(done: int, what: str) -> None:
        if progress is not None:
            progress(done, len(cells), what)

    report(len(cells) - len(todo), "the dense model")
    if todo or not _measured(found.dense, windows) or found.norms is None:
        journal.append(Run(datetime.now(UTC).date().isoformat(), __version__, command))
    if not _measured(found.dense, windows):
        journal.append(DenseResult(bench.perplexity(), bench.further_perplexities()))
    if found.norms is None:
        journal.append(model_norms(bench.model, bench.calibration(*grid.shown)))
    sampler = None
    if None not in found.samples or any(cell in shown for cell in todo):
        setting = bench.setting
        sampler = Sampler(
            bench.model, bench.tokenizer, bench.ids, setting.window_length, setting.windows, bench.beginning
        )
    if sampler is not None and None not in found.samples:
        journal.append(sampler.dense())
    for done, cell in enumerate(todo, len(cells) - len(todo)):
        report(done, str(cell))
        _measure(bench, journal, cell, sampler if cell in shown else None, partial(report, done))
    report(len(cells), "")


def _measured(found: DenseResult | CellResult | None, windows: tuple[int, ...]) -> bool:
    """Whether perplexity was measured over windows of all lengths."""
    return found is not None and set(windows) <= {evaluation.length for evaluation in found.further}


def _measure(
    bench: Workbench, journal: Journal, cell: Cell, sampler: Sampler | None, report: Callable[[str], None]
) -> None:
    state = recovery_state(journal.folder, cell)
    with bench.pruned(cell) as pruning:
        recovery = _recover(bench, cell, state, report)
        if not _measured(journal.results.cells.get(cell), bench.setting.further_window_lengths):
            journal.append(_result(bench, cell, pruning, recovery))
        if sampler is not None and cell not in journal.results.samples:
            texts, divergence = sampler.texts_and_divergence()
            journal.append(Sample(cell, sampler.prompts, texts, divergence))
    state.unlink(missing_ok=True)
    with suppress(OSError):
        state.parent.rmdir()


def _recover(bench: Workbench, cell: Cell, state: Path, report: Callable[[str], None]) -> RecoveryCost | None:
    minutes = cell.minutes
    if minutes is None:
        return None

    def move(spent: float, budget: float, loss: float) -> None:
        report(f"{cell}: {spent:,.0f} of {budget:,.0f} s, loss {loss:.3f}")

    return RecoveryCost.of(bench.recover(RecoverySettings(minutes=minutes, seed=cell.seed or 0), state, move))


def _result(bench: Workbench, cell: Cell, pruning: Pruning, recovery: RecoveryCost | None) -> CellResult:
    return CellResult(
        cell,
        bench.perplexity(),
        pruning.kept,
        StageSeconds.of(pruning.seconds),
        pruning.cpu_seconds,
        processor_name(),
        torch.get_num_threads(),
        bench.further_perplexities(),
        recovery,
    )


def recovery_state(folder: Path, cell: Cell) -> Path:
    """The file that a cell's recovery resumes from."""
    name = hashlib.sha256(json.dumps(cell.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    return folder / RECOVERY_FOLDER / f"{name}.pt"
