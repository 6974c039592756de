"""Structures in linear layers: rows of the layers that compute them, and columns of the layer that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .parts import Part

Kind = Literal["channels", "groups", "experts", "expert_channels"]
NAMES: dict[Kind, str] = {
    "channels": "feed-forward channels",
    "groups": "key-value groups",
    "experts": "experts",
    "expert_channels": "channels inside experts",
}


@dataclass(frozen=True)
class Coupled:
    """The structures of one kind in one block.

    Attributes:
        kind: "channels", "groups", or "expert_channels" of an expert that is a module.
        consumer: name of the layer that reads the structures: equal runs of its columns, one run for each structure.
        producers: names of the layers whose rows belong to the structures, each with its number of copies. In each
            copy all structures have an equal run of rows. A fused gate and up has two copies.
        count: number of structures.
        expert: "routed" if they are in an expert that not every token is sent to, "shared" if in one beside the router;
            None outside mixtures.
    """

    kind: Kind
    consumer: str
    producers: tuple[tuple[str, int], ...]
    count: int
    expert: Literal["routed", "shared"] | None = None

    def by_structure(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Sums over structures, [count], of values with the shape of a part's tensor."""
        if part.layer == self.consumer:
            return self.by_column(values if part.dim == 1 else values.t())
        rows = values if part.dim == 0 else values.t()
        runs = rows.unflatten(0, (dict(self.producers)[part.layer], self.count, -1)).transpose(0, 1)
        return runs.flatten(1).sum(1)

    def by_column(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over structures, [count], of values of the consumer's weight [out_features, in_features]."""
        return values.unflatten(1, (self.count, -1)).sum((0, 2))

    def index(self, layer: str, size: int, structures: torch.Tensor) -> torch.Tensor:
        """The rows of a producer, or the columns of the consumer, that belong to some structures, in their order.

        Args:
            layer: the consumer, or a producer.
            size: number of rows, or of columns, of its weight.
            structures: int64 [n_structures].
        """
        copies = 1 if layer == self.consumer else dict(self.producers)[layer]
        width = size // (self.count * copies)
        starts = torch.arange(copies, device=structures.device)[:, None] * self.count + structures
        return (starts[..., None] * width + torch.arange(width, device=structures.device)).flatten()

    def parts(self, layers: Mapping[str, nn.Module]) -> Iterator[Part]:
        """The tensors with structures; ``layers`` are the model's linear layers by name."""
        for layer in (*(name for name, _ in self.producers), self.consumer):
            module = layers[layer]
            along_columns = layer == self.consumer
            weight = module.get_parameter("weight")
            yield Part(layer, "weight", weight, int(along_columns == isinstance(module, nn.Linear)))
            bias = module._parameters.get("bias")
            if bias is not None and not along_columns:
                yield Part(layer, "bias", bias, 0)

    def parameters(self, layers: Mapping[str, nn.Module]) -> int:
        """Number of parameters of one structure."""
        return sum(part.tensor.numel() for part in self.parts(layers)) // self.count

    def kept(
        self, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], chosen: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """A model's tensors by name, without the structures that are not chosen.

        Args:
            tensors: those of the model, or of the block, also without values on the meta device.
            layers: its linear layers.
            chosen: the kept structures, int64, ascending.
        """
        found = dict(tensors)
        for part in self.parts(layers):
            tensor = tensors[part.name].detach()
            index = self.index(part.layer, tensor.shape[part.dim], chosen)
            found[part.name] = tensor.index_select(part.dim, index.to(tensor.device))
        return found

    @torch.inference_mode()
    def reorder(self, layers: Mapping[str, nn.Module], order: torch.Tensor) -> None:
        """Put the structures in another order, in place."""
        for part in self.parts(layers):
            tensor = part.tensor
            index = self.index(part.layer, tensor.shape[part.dim], order).to(tensor.device)
            bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            bits.copy_(bits.index_select(part.dim, index))
