"""The tensors of a checkpoint with quantized weights, by the names that a dense checkpoint would have.

A weight is dequantized when it is read, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .model_source import ModelSource, open_safetensors, reason, safetensors_files
from .quantization_config import format_of
from .quantized_formats import Format

WAY_OUT = "name the floating-point model that it was made from, and quantize after pruning"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is sliced, as transformers does when it loads a state dict."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        """The tensor; for ``[...]`` only."""
        return self.read()


@dataclass
class QuantizedCheckpoint(Mapping[str, LazyTensor]):
    """The tensors of a quantized checkpoint as those of a dense one, with one scan of its headers.

    Args:
        name: name of the checkpoint, for messages.
        folder: its folder, with safetensors files.
        layout: the format of its quantized weights.
        transposed: names of the weights that the model stores as [in_features, out_features] (GPT-2's Conv1D). Formats
            store these like all others.
    """

    name: str
    folder: Path
    layout: Format
    transposed: Collection[str] = ()

    def __post_init__(self) -> None:
        paths = safetensors_files(self.folder)
        if not paths:
            raise CheckpointError(
                f"{self.name}: has no safetensors files, and quantized weights are only read from these"
            )
        stored: dict[str, Any] = {}
        for path in paths:
            file = open_safetensors(path)
            stored.update(dict.fromkeys(file.keys(), file))
        self._stored = stored
        layers = {own for name in stored for mark in self.layout.marks if (own := self._layer(name, mark)) is not None}
        self._parts = {own: [part for part in self.layout.parts if f"{own}{part}" in stored] for own in sorted(layers)}
        taken = {f"{own}{part}" for own, parts in self._parts.items() for part in parts}
        left = [name for name in stored if name not in taken]
        left = [name for name in left if not any(self._layer(name, end) is not None for end in self.layout.ignored)]
        self._tensors = {name: LazyTensor(self._reader(name)) for name in left}
        self._tensors |= {own + self.layout.weight_name: LazyTensor(self._dequantizer(own)) for own in self._parts}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor that is not quantized; float32 if all are."""
        for name in self._tensors:
            if name in self._stored and (tensor := self._stored[name].get_slice(name)).get_dtype() in _DTYPES:
                return _DTYPES[tensor.get_dtype()]
        return torch.float32

    def close(self) -> None:
        """Let the files go. Each is closed once no thread reads it."""
        self._stored.clear()  # Not closed here: after an error, transformers' threads may still read.

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _layer(self, name: str, end: str) -> str | None:
        return _layer(name, end, dotted=bool(self.layout.weight_name))

    def _reader(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: self._stored[name].get_tensor(name)

    def _dequantizer(self, layer: str) -> Callable[[], torch.Tensor]:
        name = layer + self.layout.weight_name

        def read() -> torch.Tensor:
            try:
                parts = {part: self._stored[layer + part].get_tensor(layer + part) for part in self._parts[layer]}
                weight = self.layout.weight(parts)
                return weight.t().contiguous() if name in self.transposed else weight
            except MemoryError:
                raise
            except Exception as error:  # Also what no check foresees: without the layer's name nobody finds the cause.
                raise CheckpointError(f"{self.name}: {name} cannot be dequantized: {reason(error)}") from error

        return read


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _layer(name: str, end: str, *, dotted: bool) -> str | None:
    """The part of a tensor's name before an end, with its dot if one belongs there; None if the name ends otherwise."""
    before = name.removesuffix(end)
    if before == name:
        return None
    ends_well = not before or before.endswith(".") if dotted else before and not before.endswith(".")
    return before if ends_well else None


def layout_of(name: str, stated: Mapping[str, Any] | None) -> Format | None:
    """The format from which a checkpoint's weights are dequantized here; None if transformers loads the checkpoint.

    Args:
        name: name of the checkpoint, for the message.
        stated: the ``quantization_config`` of its configuration.

    Raises:
        CheckpointError: if the method is known, but not this variant of it.
    """
    try:
        return None if stated is None else format_of(stated)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name}: its weights are quantized ({stated and stated.get('quant_method')}): {error}; {WAY_OUT}"
        ) from error


def folder_of(found: ModelSource) -> Path:
    """The folder of a checkpoint; one of the hub is downloaded first, or taken from the cache."""
    if found.path is not None:
        return found.path
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(found.name, allow_patterns=["*.safetensors", "*.json"], local_files_only=found.offline)
    )
