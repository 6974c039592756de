"""What a runner needs of an object that watches layers while batches run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from .batches import MaskedInput


class Watcher(Protocol):
    """Watches some layers while a runner runs batches, such as :class:`~ace_triton.decoders.collect.InputCollector`."""

    @property
    def has_read(self) -> bool:
        """True if a watched layer has read its input in the current batch."""

    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[MaskedInput] = (),
        leave_early: bool = False,
    ) -> AbstractContextManager[None]:
        """A context in which one batch runs.

        Args:
            shape: n_sequences and length of the batch.
            valid: bool of that shape, False for padding; None if there is no padding.
            others: tensors with padding masks of their own: outputs of other towers that the layers may read. The
                runner may add to it during the run.
            leave_early: True if only the watcher needs this run. It may then end the run early by raising an exception
                that it suppresses itself.
        """
