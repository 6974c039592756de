"""Tensors that products make from a packed weight once, and keep as long as the weight exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..kernels.written import version_of
from .products import Packed


@dataclass(frozen=True)
class _Converted:
    """A tensor converted from a packed weight, and the weight's tensors with their version counters at that time.

    Each storage has a weak reference: ``tensor.data = other`` changes it, not the counter. As long as the reference
    exists, no other storage has the same place.
    """

    sources: tuple[TensorWeakRef, ...]
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    tensor: torch.Tensor

    @classmethod
    def made(cls, sources: tuple[torch.Tensor, ...], versions: tuple[int, ...], tensor: torch.Tensor) -> _Converted:
        """The result of a conversion, with weak references to the weight's tensors."""
        storages = tuple(StorageWeakRef(source.untyped_storage()) for source in sources)
        return cls(tuple(map(TensorWeakRef, sources)), storages, versions, tensor)

    def is_of(self, sources: tuple[torch.Tensor, ...], versions: tuple[int, ...]) -> bool:
        """True if these tensors are the ones that were converted, and were not changed since."""
        return self.versions == versions and all(
            known() is tensor and storage.cdata == tensor.untyped_storage()._cdata
            for known, storage, tensor in zip(self.sources, self.storages, sources, strict=True)
        )


class Conversions:
    """The tensors of one product, by weight."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def of(self, packed: Packed, make: Callable[[], torch.Tensor], keep: bool = True) -> torch.Tensor:
        """The result of ``make`` for a weight. It is made again if the weight was changed since then.

        Changes of inference tensors are not counted. In inference mode, which allows them, nothing is kept of such.
        """
        sources = tuple(packed.tensors.values())
        if torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in sources):
            self.forget(packed)
            return make()
        versions = tuple(version_of(tensor) for tensor in sources)
        converted = self._kept.get(packed.values)
        if converted is not None and converted.is_of(sources, versions):
            return converted.tensor
        tensor = make()
        if keep and not capturing(packed.values.device):
            self._kept[packed.values] = _Converted.made(sources, versions, tensor)
        return tensor

    def forget(self, packed: Packed) -> None:
        """Free what was kept of a weight."""
        self._kept.pop(packed.values, None)


def capturing(device: torch.device) -> bool:
    """True during CUDA graph capture. A tensor made then is in the graph's memory, without content before a replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
