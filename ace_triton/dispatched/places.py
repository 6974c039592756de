"""Where accelerate keeps an offloaded weight: a dictionary in memory, or a file of its offload folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError, RecipeError

WAY_OUT = (
    "prune the checkpoint in its files (prune_checkpoint, or ace-triton prune --stream), or load the model whole, "
    "without device_map"
)


class Place(Protocol):
    """Where one offloaded weight is kept."""

    @property
    def identity(self) -> object:
        """Equal for two places that keep the same weight, so that the weight is tied."""

    @property
    def in_file(self) -> bool:
        """True if the tensor of :meth:`read` is a private map of a file."""

    def read(self, like: torch.Tensor, scratch: Callable[[], Path]) -> torch.Tensor:
        """The weight on the CPU, with the dtype of ``like``. A change to it is no change of the place.

        Args:
            like: the weight on the meta device.
            scratch: gives a folder of the same disk for temporary files.
        """

    def write(self, tensor: torch.Tensor) -> None:
        """Keep another weight of the same shape."""


def place_of(weights_map: Any, key: str, name: str) -> Place:
    """The place of a weight.

    Args:
        weights_map: the map of accelerate's hook.
        key: the weight's key in it.
        name: dotted name of the weight in the model.

    Raises:
        RecipeError: if a pruned weight could not be kept there.
    """
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

    while isinstance(weights_map, PrefixedDataset):
        weights_map, key = weights_map.dataset, f"{weights_map.prefix}{key}"
    if isinstance(weights_map, OffloadedWeightsLoader):
        if key not in weights_map.state_dict:
            if weights_map.save_folder is None:
                raise RecipeError(
                    f"{name} was offloaded to the disk without a folder, so its pruned weight cannot be kept: give "
                    f"offload_folder=... with device_map; or {WAY_OUT}"
                )
            return InFolder(weights_map, key)
        weights_map = weights_map.state_dict
    if not isinstance(weights_map, MutableMapping):
        raise RecipeError(
            f"{name} is on the meta device, and the {type(weights_map).__name__} that keeps its values cannot be "
            f"written: {WAY_OUT}"
        )
    return InDictionary(weights_map, key)


@dataclass(frozen=True)
class InDictionary:
    """A weight in memory, as accelerate's CPU offload keeps it."""

    weights: MutableMapping[str, torch.Tensor]
    key: str
    in_file = False

    @property
    def identity(self) -> object:
        """As in :class:`Place`."""
        tensor = self.weights[self.key]
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()

    def read(self, like: torch.Tensor, scratch: Callable[[], Path]) -> torch.Tensor:
        """As in :class:`Place`, but without a copy: a change to the tensor is a change of the place."""
        return self.weights[self.key].to("cpu", like.dtype)

    def write(self, tensor: torch.Tensor) -> None:
        """As in :class:`Place`."""
        if self.weights[self.key] is not tensor:
            self.weights[self.key] = tensor


@dataclass(frozen=True)
class InFolder:
    """A weight on disk: in a file of the offload folder, or still in the checkpoint that the model was loaded from.

    The checkpoint is never written. A pruned weight goes to a file of the offload folder, in accelerate's format.
    """

    loader: Any
    key: str
    in_file = True

    @property
    def _folder(self) -> Path:
        return Path(self.loader.save_folder)

    @property
    def identity(self) -> object:
        """As in :class:`Place`."""
        entry = self.loader.index[self.key]
        file = entry.get("safetensors_file")
        return (str(self._folder), self.key) if file is None else (str(file), entry.get("weight_name", self.key))

    def read(self, like: torch.Tensor, scratch: Callable[[], Path]) -> torch.Tensor:
        """As in :class:`Place`. If the dtype differs, the map is of a temporary file with the converted weight."""
        from safetensors import safe_open

        entry = self.loader.index[self.key]
        file = entry.get("safetensors_file")
        if file is None:
            tensor = _mapped(self._folder / f"{self.key}.dat", entry)
        else:
            with safe_open(str(file), framework="pt") as opened:
                tensor = opened.get_tensor(entry.get("weight_name", self.key))
        if tensor.dtype == like.dtype:
            return tensor
        with self._disk():
            file, entry = _written(tensor.to(like.dtype), self.key, scratch())
            converted = _mapped(file, entry)
            file.unlink()  # The map stays, and the system frees the file with it.
        return converted

    def write(self, tensor: torch.Tensor) -> None:
        """As in :class:`Place`. The file is replaced atomically: maps of the old one stay valid."""
        from accelerate.utils import save_offload_index

        with self._disk():
            with tempfile.TemporaryDirectory(dir=self._folder) as private:
                file, entry = _written(tensor, self.key, Path(private))
                os.replace(file, self._folder / file.name)
            self.loader.index[self.key] = entry
            if (self._folder / "index.json").is_file():
                save_offload_index({self.key: entry}, str(self._folder))

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A context in which an error of the disk becomes a CheckpointError."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: {self.key} cannot be written ({error.strerror or error}): make room in the offload "
                "folder, load the model again and repeat; blocks that were pruned before stay so"
            ) from error


def _written(tensor: torch.Tensor, key: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write a weight in accelerate's format; returns its file and its entry of the index."""
    from accelerate.utils import offload_weight

    index: dict[str, Any] = {}
    offload_weight(tensor.detach(), key, str(folder), index)
    return folder / f"{key}.dat", index[key]


def _mapped(file: Path, entry: dict[str, Any]) -> torch.Tensor:
    """A private map of a file in accelerate's format: what is written to the tensor does not reach the file."""
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    size = max(1, torch.Size(shape).numel())
    flat = torch.from_file(str(file), shared=False, size=size, dtype=dtype, device="cpu")
    return flat[: torch.Size(shape).numel()].view(shape)
