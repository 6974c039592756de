"""Tensors that products make from a packed weight once, and keep as long as the weight exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.packed_nm import PackedNM
from ..kernels.written import version_of


@dataclass(frozen=True)
class _Converted:
    """A tensor converted from a packed weight, and the version counters of the weight's tensors at that time."""

    versions: tuple[int, int]
    tensor: torch.Tensor


class Conversions:
    """The tensors of one product, by weight."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def of(self, packed: PackedNM, make: Callable[[], torch.Tensor], keep: bool = True) -> torch.Tensor:
        """The result of ``make`` for a weight. It is made again if the weight was written to since then."""
        versions = version_of(packed.meta), version_of(packed.values)
        converted = self._kept.get(packed.meta)
        if converted is not None and converted.versions == versions:
            return converted.tensor
        tensor = make()
        if keep and not capturing(packed.values.device):
            self._kept[packed.meta] = _Converted(versions, tensor)
        return tensor


def capturing(device: torch.device) -> bool:
    """True during CUDA graph capture. A tensor made then is in the graph's memory, without content before a replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
