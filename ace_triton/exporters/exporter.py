"""What an exporter of one engine must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

Run = Callable[[torch.Tensor], torch.Tensor]
"""Computes the logits [n_tokens, vocabulary] of one sequence of token ids, int64 [n_tokens], in the exported file."""


class Exporter(ABC):
    """One engine. An exporter has no state: one object serves all models.

    Attributes:
        name: names the exporter in :func:`~ace_triton.exporters.registry.export_model` and in errors.
        extra: the extra of ace-triton that installs ``packages``.
        packages: modules that the exporter imports.
        weight_types: types of the weights that it writes; the first is the default.
    """

    name: str
    extra: str
    packages: tuple[str, ...]
    weight_types: tuple[str, ...]

    def check_installed(self) -> None:
        """Raise CheckpointError if a package is missing."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise CheckpointError(
                f"export to {self.name} needs {', '.join(missing)}: pip install 'ace-triton[{self.extra}]'"
            )

    def refusal(self, model: Any) -> str | None:
        """Why a model cannot be exported, as a whole message; None if it can."""
        return None

    @abstractmethod
    def write(self, model: Any, tokenizer: Any, folder: Path, weight_type: str) -> None:
        """Write a model that :meth:`refusal` allows.

        Args:
            model: a causal language model of transformers, dense, in float32 on the CPU. It may be changed.
            tokenizer: its tokenizer.
            folder: an empty folder, which becomes the user's folder if no exception is raised.
            weight_type: one of ``weight_types``.
        """

    @abstractmethod
    def read_weights(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Read the weights of all matrix products back from the files, without anything that :meth:`write` kept.

        Yields:
            The name of the layer in the model, and its weight [out_features, in_features] as the product uses it.
        """

    @abstractmethod
    def opened(self, folder: Path, model: Any) -> Run:
        """Load the files and return what computes logits with them. ``model`` gives only its configuration."""

    @abstractmethod
    def tolerance(self, weight_type: str) -> float | None:
        """The largest difference of logits from the float32 model that is allowed; None if it is only reported."""

    def keeps_weights(self, weight_type: str) -> torch.dtype | None:
        """The dtype to which weights are rounded; None if they are quantized, so that only zeros can be compared."""
        return {"float32": torch.float32, "float16": torch.float16}.get(weight_type)

    def advice(self, out: Path, weight_type: str) -> list[str]:
        """Lines for the user: how to use the files in the folder ``out``."""
        return []
