"""A model whose weights stay in the files of its checkpoint, and are in memory only while the part with them runs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoders.blocks import outermost_members
from ..decoders.loaded_weights import Writes
from ..errors import ArgumentError
from ..process_memory import drop_pages, give_back_free_memory
from .mapped_model import copy_in_pieces, replace_parameters, taken_sources
from .weight_files import WeightFiles


class LoadedOnUse:
    """A model that loads each part before its forward and releases it after. It runs on the CPU and cannot be changed.

    Parts are the members of outermost ``nn.ModuleList``s (among them the decoder blocks), and the model for all weights
    outside them. A loaded weight is a map of its file, of which the system reads what is used. If the
    dtype is converted, a part's weights are in memory as a whole, but those outside are converted once, into files.

    Args:
        model: with its parameters on the meta device and accelerate's hooks, as
            :func:`~ace_triton.inputs.checkpoint.load` gives it with an ``offload_folder``. The hooks are removed.
        folder: folder for weights whose dtype is converted.

    Attributes:
        model: the model. Outside :meth:`loaded` its weights are NaN.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self._sources = taken_sources(model)
        replace_parameters(model, {old: nn.Parameter(_unloaded(old), False) for old in model.parameters()})
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        # Kept, so that no other parameter gets their memory and seems to be shared.
        self._placeholders = {parameter: parameter.data for parameter in self._names}
        parts = outermost_members(model)
        inside = {parameter for part in parts for parameter in part.parameters()}
        self._outside = [parameter for parameter in self._names if parameter not in inside]
        self._folder = folder
        self._files: dict[str, WeightFiles] = {}
        self._users: Counter[nn.Parameter] = Counter()
        self._has_run = False
        self._writes: Writes | None = None
        for part in parts:
            self._load_on_use(part)
        model.forward = self._loading(model, model.forward)

    def _load_on_use(self, part: nn.Module) -> None:
        """Let a part load its weights when it runs."""
        part.forward = self._loading(part, part.forward)

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[None]:
        """A context in which a part keeps its weights between forwards.

        Args:
            part: any module; the model for the weights outside the other parts.
        """
        parameters = self._outside if part is self.model else list(part.parameters())
        held = []
        try:
            for parameter in parameters:
                held.append(parameter)
                self._users[parameter] += 1
                if self._users[parameter] == 1:
                    parameter.data = self._read(parameter, in_file=parameters is self._outside)
                    if self._writes is not None:
                        self._writes.add(parameter)
            yield
        finally:
            for parameter in held:
                self._users[parameter] -= 1
                if not self._users[parameter]:
                    if self._names[parameter] in self._files:
                        drop_pages(parameter.data)
                    parameter.data = self._placeholders[parameter]
            give_back_free_memory()  # The allocator would keep converted weights.

    def _read(self, parameter: nn.Parameter, *, in_file: bool) -> torch.Tensor:
        """A weight in the model's dtype.

        Args:
            parameter: the parameter that it belongs to.
            in_file: keep it in a file if its dtype is converted.
        """
        name = self._names[parameter]
        if name in self._files:
            return self._files[name].tensor(name)
        stored = self._sources[name]()
        if stored.dtype == parameter.dtype or not in_file:
            return stored.to(parameter.dtype)
        path = self._folder / f"outside-{len(self._files):05d}.safetensors"
        self._files[name] = files = WeightFiles.create_one(path, {name: parameter.data.to("meta")})
        copy_in_pieces(stored, files.tensor(name))
        return files.tensor(name)

    def _loading(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def loading(*args: Any, **kwargs: Any) -> Any:
            with self.loaded(part):
                if self._has_run or part is not self.model:
                    return forward(*args, **kwargs)
                with self._unchanged():
                    output = forward(*args, **kwargs)
                self._has_run = True
                return output

        return loading

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """A context in which an operation that writes to a weight is an error."""
        self._writes = writes = Writes(self._names)
        try:
            with writes:
                yield
        finally:
            self._writes = None
            for parameter in writes.before:
                raise ArgumentError(
                    f"{self._names[parameter]} is changed by the model's own forward, so its weights cannot stay in "
                    "files: load the model into memory, without --stream"
                )


def _unloaded(like: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype that takes no memory: NaN, or zero if the dtype has no NaN."""
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device="cpu").expand(like.shape)
