"""What a format of a saved model must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..packed.inspect import TensorSparsity


class Format(ABC):
    """One format. :meth:`check` and :meth:`write` export a model; the other methods are for formats that are read too.

    Attributes:
        name: names the format in :func:`~ace_triton.formats.registry.save_model` and in errors.
    """

    name: str

    @abstractmethod
    def check(self, model: Any) -> str | None:
        """Why a model cannot be written in this format, as a whole message; None if it can."""

    @abstractmethod
    def write(self, model: Any, tokenizer: Any, folder: Path, report: dict[str, Any] | None) -> None:
        """Write a model that :meth:`check` allows.

        Args:
            model: a causal language model of transformers with its weights in memory.
            tokenizer: its tokenizer, or None.
            folder: an empty folder, which becomes the user's folder if no exception is raised.
            report: the pruning report, or None. A format that does not write it need not: it is written afterwards.
        """

    def recognizes(self, source: str | Path) -> bool:
        """True if a folder is in this format. ``source`` may also be a hub name or a file, as users write it."""
        return False

    def load(
        self, source: str | Path, *, dtype: torch.dtype | str, device: str | torch.device, trust_remote_code: bool
    ) -> tuple[Any, Any]:
        """Load a model, in eval mode, and its tokenizer. Arguments: as for :func:`ace_triton.inputs.checkpoint.load`.

        Raises:
            CheckpointError: if the folder is damaged, or models in this format cannot be loaded.
        """
        raise CheckpointError(
            f"{source}: is in the format {self.name!r}, which ace-triton writes and does not load; name the model that "
            "it was made from"
        )

    def inspect(self, folder: str | Path) -> list[TensorSparsity]:
        """The sparsity of every matrix, for ``ace-triton info``.

        Raises:
            CheckpointError: if the folder is damaged, or folders in this format cannot be inspected.
        """
        raise CheckpointError(
            f"{folder}: is in the format {self.name!r}, which ace-triton info does not read; name the model that it "
            "was made from"
        )
