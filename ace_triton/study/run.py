"""Runs the cells of a study that its journal does not hold yet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cells import Cell, Grid
from .journal import Journal
from .norms import model_norms
from .records import CellResult, DenseResult, Sample, StageSeconds
from .samples import Sampler
from .workbench import Workbench, processor_name

Progress = Callable[[int, int, str], None]


def run_study(bench: Workbench, journal: Journal, grid: Grid, progress: Progress | None = None) -> None:
    """Measure what is missing: the dense model, its input norms, then cell by cell.

    Every result is in the journal before the next cell begins, so a killed study loses one cell.

    Args:
        bench: the model and the texts.
        journal: opened with ``bench.setting``.
        grid: what is wanted; what the journal holds already is not run again.
        progress: called with cells done, cells in all and what comes next.

    Raises:
        TextError: a calibration length that the model or the text is too short for.
    """
    bench.check_lengths(grid.lengths)
    cells, found = grid.cells(), journal.results
    draw = next(((cell.length, cell.seed) for cell in found.samples if cell is not None and cell.length), grid.shown)
    shown = {cell for cell in cells if cell.length is None or (cell.length, cell.seed) == draw}
    todo = [cell for cell in cells if cell not in found.cells or (cell in shown and cell not in found.samples)]

    def tell(done: int, what: str) -> None:
        if progress is not None:
            progress(done, len(cells), what)

    tell(len(cells) - len(todo), "the dense model")
    if found.dense is None:
        journal.append(DenseResult(bench.perplexity()))
    if found.norms is None:
        journal.append(model_norms(bench.model, bench.calibration(*grid.shown)))
    sampler = None
    if None not in found.samples or any(cell in shown for cell in todo):
        setting = bench.setting
        sampler = Sampler(bench.model, bench.tokenizer, bench.ids, setting.window_length, setting.windows)
    if sampler is not None and None not in found.samples:
        journal.append(sampler.dense())
    for done, cell in enumerate(todo, len(cells) - len(todo)):
        tell(done, str(cell))
        _measure(bench, journal, cell, sampler if cell in shown else None)
    tell(len(cells), "")


def _measure(bench: Workbench, journal: Journal, cell: Cell, sampler: Sampler | None) -> None:
    with bench.pruned(cell) as pruning:
        if cell not in journal.results.cells:
            report = pruning.report
            journal.append(
                CellResult(
                    cell,
                    bench.perplexity(),
                    sum(layer.kept for layer in report.layers) / len(report.layers),
                    StageSeconds.of(report.seconds),
                    pruning.cpu_seconds,
                    processor_name(),
                    torch.get_num_threads(),
                )
            )
        if sampler is not None and cell not in journal.results.samples:
            texts, divergence = sampler.texts_and_divergence()
            journal.append(Sample(cell, sampler.prompts, texts, divergence))
