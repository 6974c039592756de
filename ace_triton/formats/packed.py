"""The packed checkpoint: n:m layers packed, in one safetensors file with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..inputs.companions import Companions
from ..inputs.model_source import ModelSource, reason
from ..inputs.model_task import TEXT_GENERATION, find_task
from ..packed.checkpoint import load
from ..packed.inspect import TensorSparsity, inspect_packed
from ..packed.manifest import is_packed
from ..packed.saving import why_not_saved, write_packed
from .format import Format


class Packed(Format):
    """Folders with a manifest (:mod:`ace_triton.packed.manifest`)."""

    name = "packed"

    def check(self, model: Any) -> str | None:
        return why_not_saved(model)

    def write(self, model: Any, tokenizer: Any, folder: Path, report: dict[str, Any] | None) -> None:
        write_packed(model, tokenizer, folder, report)

    def recognizes(self, source: str | Path) -> bool:
        return is_packed(source)

    def load(
        self, source: str | Path, *, dtype: torch.dtype | str, device: str | torch.device, trust_remote_code: bool
    ) -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        wanted = None if isinstance(dtype, str) else dtype
        model = load(source, device=device, dtype=wanted, trust_remote_code=trust_remote_code)
        task = find_task(str(source), model.config, None, trusted=trust_remote_code)
        if task.name != TEXT_GENERATION:
            return model, Companions(ModelSource(str(source), Path(source), True), trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            raise CheckpointError(f"{source}: its tokenizer cannot be loaded ({reason(error)})") from error
        return model, tokenizer

    def inspect(self, folder: str | Path) -> list[TensorSparsity]:
        return inspect_packed(folder)
