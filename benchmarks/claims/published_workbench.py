"""A study's workbench that also prunes by the methods' published forms."""

from __future__ import annotations

import torch

from ace_triton.decoders.batches import sequences_of_a_forward
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Workbench
from ace_triton.timing import Seconds

from . import published_model


class PublishedWorkbench(Workbench):
    """Runs a cell that is ``published`` in plain torch, as the published code does it."""

    def prune(self, cell: Cell, ids: torch.Tensor | None) -> tuple[float, Seconds]:
        """As in the base class.

        Raises:
            ValueError: for a published form at a fraction, without calibration or with options.
        """
        if not cell.published:
            return super().prune(cell, ids)
        pattern = cell.recipe.sparsity
        if ids is None or pattern.n is None or pattern.m is None or cell.recipe.options:
            raise ValueError(f"{cell}: a published form needs an n:m pattern and calibration, and takes no options")
        ids = ids.to(self.model.device)
        batch_size = sequences_of_a_forward(ids.shape[1], on_gpu=ids.is_cuda)
        seconds = published_model.prune_model(self.model, ids, cell.recipe.method, pattern.n, pattern.m, batch_size)
        return pattern.n / pattern.m, seconds
