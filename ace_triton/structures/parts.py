"""The tensors of a model that structures are parts of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """A tensor with structures.

    Attributes:
        layer: dotted name of its module.
        key: its name in the module.
        tensor: the parameter or buffer.
        dim: the dimension along which the structures lie.
        structure: the only structure that it belongs to; None if it belongs to all.
    """

    layer: str
    key: str
    tensor: torch.Tensor
    dim: int
    structure: int | None = None

    @property
    def name(self) -> str:
        """Dotted name of the tensor."""
        return f"{self.layer}.{self.key}"


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and the saved buffers of a module, without those of its children."""
    kept = {key: tensor for key, tensor in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return [(key, tensor) for key, tensor in {**module._parameters, **kept}.items() if tensor is not None]
