"""Pruned weights in a folder, so that several recoveries start from one pruning."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Workbench


@contextmanager
def pruned_once(bench: Workbench, cell: Cell, folder: Path | None) -> Iterator[float]:
    """Prune the bench's model inside the context, or load its weights if the same pruning was kept in the folder.

    Args:
        bench: the model and its texts.
        cell: what to run.
        folder: where pruned weights are kept, one file for each pruning; None keeps none.

    Yields:
        CPU seconds that the pruning took.
    """
    path = None if folder is None else folder / f"{name_of(bench, cell)}.pt"
    if path is not None and path.is_file():
        kept = torch.load(path, weights_only=True)
        teacher = bench.teacher
        try:
            bench.model.load_state_dict(kept.pop("weights"))
            yield kept["seconds"]
        finally:
            bench.model.load_state_dict(teacher.state_dict())
        return
    with bench.pruned(cell) as pruning:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save({"weights": bench.model.state_dict(), "seconds": pruning.cpu_seconds}, partial)
            os.replace(partial, path)
        yield pruning.cpu_seconds


def name_of(bench: Workbench, cell: Cell) -> str:
    """A name that differs if the model, the calibration or the pruning differs."""
    setting = bench.setting
    parts = (setting.weights_sha256, setting.dtype, setting.calibration_sha256, setting.samples, setting.bos, cell)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
