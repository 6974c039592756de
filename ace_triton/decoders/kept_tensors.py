"""Where tensors that belong to batches (hidden states, cached outputs) are kept between runs: in memory or in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..errors import ArgumentError, CheckpointError
from ..process_memory import drop_pages, map_file, reserve_space

Offload = Literal["memory", "disk"]
"""Where hidden states are kept."""

KeptTensors = MutableMapping[Any, torch.Tensor]
"""Tensors by key."""


def keeper(folder: Path | None) -> Callable[[], KeptTensors]:
    """What makes new :data:`KeptTensors`: dicts, or :class:`TensorFiles` if a folder is given."""
    return dict if folder is None else partial(TensorFiles, folder)


def check_offload(offload: str) -> None:
    """ArgumentError if hidden states cannot be kept there."""
    if offload not in get_args(Offload):
        raise ArgumentError(f"offload must be one of {', '.join(get_args(Offload))}; got {offload!r}")


def offload_to(folder: str | Path | None) -> Path | None:
    """The folder as a path, after a check; CheckpointError if it does not exist or cannot be written."""
    if folder is None:
        return None
    if not os.access(folder, os.W_OK | os.X_OK) or not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is no folder that can be written: name one for temporary files")
    return Path(folder)


class TensorFiles(MutableMapping[Hashable, torch.Tensor]):
    """Tensors by key, each in a mapped file; only the pages of the last tensor that was read are in memory.

    The files have no names once they are mapped. So the system removes each file with its tensor, even if the process
    is killed. A tensor that is read is the map itself, so a change to it in place goes to the file; a tensor of another
    device than the CPU is copied there.

    Args:
        folder: an existing folder on the disk that holds the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[Hashable, torch.Tensor] = {}
        self._devices: dict[Hashable, torch.device] = {}
        self._last: torch.Tensor | None = None

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        mapped = self._maps[key]
        if self._last is not None and self._last is not mapped:
            drop_pages(self._last)
        self._last = mapped
        return mapped.to(self._devices[key])

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        mapped = self._maps.get(key)
        layout = _layout(tensor)
        if mapped is None or _layout(mapped) != layout:
            mapped = _new_map(self._folder, tensor.dtype, *layout[1:])
        with torch.no_grad():
            mapped.copy_(tensor)
        drop_pages(mapped)
        self._maps[key], self._devices[key] = mapped, tensor.device

    def __delitem__(self, key: Hashable) -> None:
        del self._maps[key], self._devices[key]
        self._last = None

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)


def _layout(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    """Dtype, shape and strides of a copy of a tensor; the strides are the tensor's own if it has no gaps."""
    return tensor.dtype, tensor.shape, torch.empty_like(tensor, device="meta").stride()


def _new_map(folder: Path, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor without values in a new file that has no name."""
    size = max(1, shape.numel() * dtype.itemsize)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            reserve_space(file.fileno(), size)
            storage: Any = map_file(file.name, size)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{folder}: cannot hold the hidden states ({why}): free space there, or keep them in memory"
        ) from error
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)  # type: ignore[call-overload]
