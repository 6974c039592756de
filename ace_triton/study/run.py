"""Runs the cells of a study that are not in its journal yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import __version__
from ..errors import StudyError
from ..processes import Processes, apart
from ..recovery.settings import RecoverySettings
from .cells import Cell
from .dealing import Dealer, Worker
from .journal import Journal
from .norms import model_norms
from .records import CellResult, DenseResult, Record, RecoveryCost, Run, Sample, StageSeconds
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
    bench: Workbench, journal: Journal | None, grid: Cells, progress: Progress | None = None, command: str = ""
) -> None:
    """Measure what is missing: the dense model, its input norms, then each cell.

    Every result is in the journal before its process starts the next cell, so an interrupted study loses at most one
    cell of each process, or a few minutes of a recovery.

    If several processes are in one group of torch.distributed, all must call this. Each takes the next cell that no
    process has taken, and prunes, recovers and evaluates it on its own.

    Args:
        bench: the model and the texts.
        journal: opened with ``bench.setting`` by the first process; None in the others.
        grid: what to run; a cell in the journal runs again only if it lacks one of the window lengths.
        progress: called with the number of finished cells, of all cells, and the name of the next one.
        command: recorded beside the date if anything is measured.

    Raises:
        StudyError: if the processes have different models, texts or settings.
        TextError: if the model or the text is too short for a calibration length.
    """
    bench.check_lengths(grid.lengths)
    processes = Processes.now()
    if not processes.agree(bench.setting):
        raise StudyError(
            "the processes have different models, texts or settings: give all hosts the same files and the same command"
        )
    of_first: Any = None if journal is None else (journal.folder, journal.results)
    folder, found = processes.broadcast(of_first)
    cells = grid.cells()
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

    def keep(record: Record) -> None:
        if journal is not None:
            journal.append(record)

    lacks_sample = None not in found.samples
    report(len(cells) - len(todo), "the dense model")
    if todo or not _measured(found.dense, windows) or found.norms is None:
        keep(Run(datetime.now(UTC).date().isoformat(), __version__, command))
    if not _measured(found.dense, windows):
        keep(DenseResult(bench.perplexity(), bench.further_perplexities()))
    if found.norms is None:
        keep(processes.first_does(lambda: model_norms(bench.model, bench.calibration(*grid.shown))))
    sampler = None
    if lacks_sample or any(cell in shown for cell in todo):
        setting = bench.setting
        sampler = Sampler(
            bench.model, bench.tokenizer, bench.ids, setting.window_length, setting.windows, bench.beginning
        )
    if sampler is not None and lacks_sample and journal is not None:
        keep(sampler.dense())
    with apart(), Dealer(processes, len(todo), keep) if processes.is_first else Worker(processes) as deal:
        while (number := deal.take()) is not None:
            cell, done = todo[number], len(cells) - len(todo) + deal.finished
            report(done, str(cell))
            state = recovery_state(folder, cell)
            measured = _measured(found.cells.get(cell), windows)
            with bench.pruned(cell) as pruning:
                recovery = _recover(bench, cell, state, partial(report, done))
                if not measured:
                    deal.append(_result(bench, cell, pruning, recovery))
                if sampler is not None and cell in shown and cell not in found.samples:
                    texts, divergence = sampler.texts_and_divergence()
                    deal.append(Sample(cell, sampler.prompts, texts, divergence))
            state.unlink(missing_ok=True)
    if processes.is_first:
        with suppress(OSError):
            (folder / RECOVERY_FOLDER).rmdir()
    report(len(cells), "")


def _measured(found: DenseResult | CellResult | None, windows: tuple[int, ...]) -> bool:
    """Whether perplexity was measured over windows of all lengths."""
    return found is not None and set(windows) <= {evaluation.length for evaluation in found.further}


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
