"""The format of transformers: dense tensors, with zeros if the model was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..inputs import checkpoint
from ..inputs.model_task import TEXT_GENERATION
from ..packed.inspect import TensorSparsity, inspect_dense
from ..packed.tables import PACKED_MODULES
from .format import Format


class Dense(Format):
    """Folders of transformers, GGUF files and hub names: everything that no other format recognizes."""

    name = "dense"

    def check(self, model: Any) -> str | None:
        if any(isinstance(module, PACKED_MODULES) for module in model.modules()):
            return "the model has packed layers: save it as 'packed', or save the model that it was packed from"
        return checkpoint.why_not_saved(model)

    def write(self, model: Any, tokenizer: Any, folder: Path, report: dict[str, Any] | None) -> None:
        checkpoint.write(model, tokenizer, folder, report or {})

    def recognizes(self, source: str | Path) -> bool:
        return True

    def load(
        self,
        source: str | Path,
        *,
        dtype: torch.dtype | str,
        device: str | torch.device,
        trust_remote_code: bool,
        task: str | None = TEXT_GENERATION,
    ) -> tuple[Any, Any]:
        return checkpoint.load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, task=task)

    def inspect(self, folder: str | Path) -> list[TensorSparsity]:
        return inspect_dense(folder)
