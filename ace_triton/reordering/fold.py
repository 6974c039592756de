"""Finds layers whose input order can be folded into the weights of the layers before them, at no cost at run time.

Input channel j of a down projection is output channel j of gate and up. The inputs of an attention's output projection
are the outputs of the value projection, head by head; query heads that share a key-value head share its order. Such
pairs are found by shape and by which layers read the same tensor. A fold is valid only if all operations between the
layers are element-wise. If they only add values up, as attention does, the values of a key-value head can also be
multiplied by an orthogonal matrix. A trial checks both (:mod:`.trial`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.layer_roles import gated_consumers
from ..linears import linear_weight


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs can be reordered, and the layers whose outputs must be reordered with them.

    Attributes:
        consumer: name of the layer, with in_features = pools * shares * width.
        producers: names of the layers that compute these inputs, with out_features a multiple of pools * width.
        pools: number of sets of channels, each with its own order: key-value heads, or 1.
        shares: number of runs of ``width`` inputs that share the order of one pool: query heads per key-value head,
            or 1.
        width: number of channels in a pool.
    """

    consumer: str
    producers: tuple[str, ...]
    pools: int
    shares: int
    width: int

    def by_pool(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [out_features, in_features] of the consumer as [pools, out_features * shares, width]."""
        split = scores.unflatten(1, (self.pools, self.shares, self.width))
        return split.permute(1, 0, 2, 3).flatten(1, 2)

    def inputs(self, order: torch.Tensor) -> torch.Tensor:
        """Convert an order of each pool, int64 [pools, width], to the order of the consumer's inputs [in_features]."""
        start = torch.arange(self.pools * self.shares, device=order.device) * self.width
        return (order.repeat_interleave(self.shares, dim=0) + start[:, None]).flatten()

    def outputs(self, order: torch.Tensor, out_features: int) -> torch.Tensor:
        """Convert an order of each pool, int64 [pools, width], to that of a producer's outputs [out_features]."""
        copies = out_features // order.numel()
        start = torch.arange(copies * self.pools, device=order.device) * self.width
        return (order.repeat(copies, 1) + start[:, None]).flatten()

    @torch.inference_mode()
    def apply(self, layers: Mapping[str, nn.Module], order: torch.Tensor) -> None:
        """Reorder the consumer's inputs and the producers' outputs in place; values are moved, not changed."""
        weight = _weight(layers[self.consumer])
        weight.copy_(weight.gather(1, self.inputs(order).to(weight.device).expand(weight.shape)))
        for name in self.producers:
            weight = _weight(layers[name])
            outputs = self.outputs(order, weight.shape[0]).to(weight.device)
            weight.copy_(weight[outputs])
            bias = layers[name].bias
            if isinstance(bias, torch.Tensor):
                bias.copy_(bias[outputs])

    @torch.inference_mode()
    def rotate(self, layers: Mapping[str, nn.Module], rotation: torch.Tensor) -> None:
        """Multiply the producers' outputs by the transpose of each pool's matrix, and the consumer's inputs by it.

        Args:
            layers: linear layers by name.
            rotation: orthogonal, fp64 [pools, width, width].
        """
        for name in (self.consumer, *self.producers):
            weight, bias = linear_weight(layers[name]), layers[name].bias
            assert weight is not None
            rotation = rotation.to(weight.device)
            if name == self.consumer:
                split = weight.to(rotation.dtype).unflatten(1, (self.pools, self.shares, self.width))
                weight.copy_(torch.einsum("opsd,pde->opse", split, rotation).flatten(1))
                continue
            for values in (weight, bias) if isinstance(bias, torch.Tensor) else (weight,):
                split = values.to(rotation.dtype).unflatten(0, (self.pools, self.width))
                values.copy_(torch.einsum("pde,pd...->pe...", rotation, split).flatten(0, 1))


@dataclass(frozen=True)
class Unfolded:
    """A layer whose inputs could not be reordered or rotated.

    Attributes:
        name: dotted name of the layer.
        reason: why its inputs stay as they are.
    """

    name: str
    reason: str


def _weight(layer: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features]; viewed as bytes if torch cannot index the dtype (fp8)."""
    weight = linear_weight(layer)
    assert weight is not None
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight


def feed_forward_folds(layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> dict[str, list[Fold]]:
    """Possible folds into the layers of a block outside attention, by consumer.

    A fold reorders gate and up for down; or one layer for a later layer of the same module that has as many inputs as
    the first layer has outputs. A module with a single layer (BERT's intermediate and output) counts as that layer.

    Args:
        layers: linear layers by name.
        groups: names of layers that read the same tensor, group by group, in order of use.
    """
    sizes = {name: _weight(layer).shape for name, layer in layers.items()}
    feeding: dict[str, list[str]] = {}
    for producer, consumer in gated_consumers(dict(layers), [list(group) for group in groups]).items():
        feeding.setdefault(consumer, []).append(producer)
    order = [[name for name in group if name in layers] for group in groups]
    for place, members in enumerate(order):
        if len(members) != 1:
            continue
        (producer,) = members
        home = _home(producer, layers)
        later = [name for group in order[place + 1 :] for name in group if _home(name, layers) == home]
        matching = [name for name in later if sizes[name][1] == sizes[producer][0]]
        if len(matching) == 1 and producer not in {p for ps in feeding.values() for p in ps}:
            feeding.setdefault(matching[0], [producer])
    return {
        consumer: [Fold(consumer, tuple(producers), pools=1, shares=1, width=sizes[consumer][1])]
        for consumer, producers in feeding.items()
    }


def attention_folds(
    modules: Mapping[str, Mapping[str, nn.Module]], groups: Sequence[Sequence[str]], head_dims: Mapping[str, int | None]
) -> dict[str, list[Fold]]:
    """Possible folds into the output projections of a block's attention modules, by consumer.

    The output projection is the layer that the module runs last. Any other layer may be the value projection if its
    outputs form whole heads and their number divides that of the output projection's inputs. Later layers come first.

    Args:
        modules: the linear layers of each attention module, by name.
        groups: names of layers that read the same tensor, group by group, in order of use.
        head_dims: width of a head by name of the module with the layer; None if unknown.
    """
    found: dict[str, list[Fold]] = {}
    for layers in modules.values():
        members = [[name for name in group if name in layers] for group in groups]
        used = [group for group in members if group]
        if len(used) < 2 or len(used[-1]) != 1:
            continue
        (consumer,) = used[-1]
        inputs = _weight(layers[consumer]).shape[1]
        found[consumer] = []
        for name in reversed([name for group in used[:-1] for name in group]):
            outputs, width = _weight(layers[name]).shape[0], head_dims[parent(name)]
            if width is not None and outputs % width == 0 and inputs % outputs == 0:
                found[consumer].append(Fold(consumer, (name,), outputs // width, inputs // outputs, width))
    return found


def parent(name: str) -> str:
    """The dotted name of the module that contains a layer."""
    return name.rpartition(".")[0]


def _home(name: str, layers: Iterable[str]) -> str:
    """The module that contains a layer and others: its own, or the one around that if the layer is alone in its own."""
    own = parent(name)
    return own if any(other.startswith(f"{own}.") and other != name for other in layers) else parent(own)
