"""A model whose weights stay in files, and whose parts run on copies that may be changed for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoders.kept_tensors import KeptTensors, keeper
from ..process_memory import page_out
from .loaded_on_use import LoadedOnUse


class LoadedCopies(LoadedOnUse):
    """As :class:`~ace_triton.streaming.loaded_on_use.LoadedOnUse`, but a part runs on copies of its weights.

    A change to them is lost when the part is released. Copies are aligned, so sums do not depend on where a tensor lies
    in its file. A part whose forward is replaced does not load its weights, unless the other
    forward wraps its own. It is a
    :class:`~ace_triton.structures.weights.Weights`.

    Args:
        model, folder: as for ``LoadedOnUse``.
        offload_folder: folder for files with the hidden states; None to keep them in memory.
    """

    in_files = True

    def __init__(self, model: Any, folder: Path, offload_folder: Path | None = None) -> None:
        self.keep: Callable[[], KeptTensors] = keeper(offload_folder)
        super().__init__(model, folder)

    def _load_on_use(self, part: nn.Module) -> None:
        """Load by hooks: those that are registered later change the weights that are there."""
        own = vars(part).get("forward")
        running: list[ExitStack] = []

        def enter(module: nn.Module, _args: Any) -> None:
            running.append(ExitStack())
            present = vars(module).get("forward")
            if present is own or hasattr(present, "__wrapped__"):
                running[-1].enter_context(self.loaded(module))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            running.pop().close()

        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)

    def _read(self, parameter: nn.Parameter, *, in_file: bool) -> torch.Tensor:
        if in_file:
            return super()._read(parameter, in_file=in_file)
        stored = self._sources[self._names[parameter]]()
        copied = stored.to(parameter.dtype, copy=True)
        page_out(stored)
        return copied
