"""Finds the channels inside the experts of mixtures as structures: the feed-forward width that all experts share.

The last matrix of an expert reads the channels (down), the others compute them: gate and up, which may be one matrix
with two values of a channel. A forward tells how the matrices are stored. Each expert keeps its own most important
channels, all experts the same number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..decoders.blocks import stacks_of
from ..decoders.experts import ExpertLinear, Stack, find_layouts
from ..decoders.finished import forward_replaced
from .mixtures import Mixture
from .parts import Part, own_tensors


@dataclass(frozen=True)
class Layout:
    """Where the channels lie in a tensor of all experts.

    Attributes:
        path: dotted name of its module.
        key: its name in the module.
        dim: its dimension with the channels.
        copies: number of values of a channel along this dimension: 2 for a fused gate and up.
        interleaved: True if the copies of a channel lie side by side.
    """

    path: str
    key: str
    dim: int
    copies: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class ExpertChannels:
    """The channels inside the experts of one block.

    Attributes:
        consumer: dotted name of the tensor that reads the channels.
        count: number of channels of an expert.
        experts: number of experts.
        modules: the modules with tensors of experts, by dotted name.
        layouts: of all tensors with channels; the last one is the consumer's.
    """

    consumer: str
    count: int
    experts: int
    modules: Mapping[str, nn.Module]
    layouts: tuple[Layout, ...]
    kind: Literal["expert_channels"] = "expert_channels"

    def parts(self, _layers: object = None) -> Iterator[Part]:
        """The tensors with channels."""
        for layout in self.layouts:
            yield Part(layout.path, layout.key, getattr(self.modules[layout.path], layout.key), layout.dim)

    def by_structure(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Sums over channels, [experts, count], of values with the shape of a part's tensor."""
        layout = self._layout(part)
        split = (self.count, layout.copies) if layout.interleaved else (layout.copies, self.count)
        runs = values.movedim(part.dim, 1).unflatten(1, split)
        runs = runs if layout.interleaved else runs.transpose(1, 2)
        return runs.flatten(2).sum(2)

    def parameters(self, _layers: object = None) -> int:
        """Number of parameters of one channel of every expert."""
        return sum(part.tensor.numel() for part in self.parts()) // self.count

    def kept(
        self, tensors: Mapping[str, torch.Tensor], _layers: object, chosen: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """A model's tensors by name, without the channels that are not chosen.

        Args:
            tensors: those of the model, or of the block, also without values on the meta device.
            chosen: the kept channels of each expert, int64 [experts, kept], ascending; or of all, [kept].
        """
        found = dict(tensors)
        for part in self.parts():
            found[part.name] = self._gathered(part, tensors[part.name].detach(), chosen)
        return found

    @torch.inference_mode()
    def reorder(self, _layers: object, order: torch.Tensor) -> None:
        """Put the channels of all experts in another order, in place."""
        for part in self.parts():
            bits = part.tensor.view(torch.uint8) if part.tensor.element_size() == 1 else part.tensor
            bits.copy_(self._gathered(part, bits, order))

    @contextmanager
    def masked(self, kept: torch.Tensor) -> Iterator[None]:
        """A context in which the consumer's weights for channels that are not kept are 0, while it runs."""
        layout = self.layouts[-1]
        module = self.modules[layout.path]
        own = module.forward
        mask = torch.zeros(self.experts, self.count, dtype=torch.bool, device="cpu").scatter_(1, kept.cpu(), True)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            weight = getattr(module, layout.key)
            before = weight.data
            weight.data = before * mask.to(before.device).unsqueeze(3 - layout.dim)
            try:
                return own(*args, **kwargs)
            finally:
                weight.data = before

        with forward_replaced(module, forward):
            yield

    def linears(self) -> list[ExpertLinear]:
        """The layers of all experts that read the channels; their weights are in memory."""
        layout = self.layouts[-1]
        stack = Stack(self.consumer, getattr(self.modules[layout.path], layout.key))
        return list(stack.linears(transposed=layout.dim == 1).values())

    def linear_names(self) -> list[str]:
        """The names of :meth:`linears`."""
        stack = Stack(self.consumer, self.modules[self.layouts[-1].path].get_parameter(self.layouts[-1].key))
        return [stack.expert_name(expert) for expert in range(self.experts)]

    def columns(self) -> torch.Tensor:
        """The consumer's weights, fp32 [experts, out_features, count]."""
        layout = self.layouts[-1]
        weight: torch.Tensor = getattr(self.modules[layout.path], layout.key)
        return weight.detach().float().movedim(layout.dim, 2)

    def _layout(self, part: Part) -> Layout:
        return next(of for of in self.layouts if (of.path, of.key) == (part.layer, part.key))

    def _gathered(self, part: Part, tensor: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        layout, chosen = self._layout(part), chosen.expand(self.experts, -1)
        copies = torch.arange(layout.copies, device=chosen.device)
        if layout.interleaved:
            places = (chosen[..., None] * layout.copies + copies).flatten(1)
        else:
            places = (copies[:, None] * self.count + chosen[:, None]).flatten(1)
        if tensor.dim() == 3:
            shape = list(tensor.shape)
            shape[part.dim] = places.shape[1]
            places = places.unsqueeze(3 - part.dim).expand(shape)
        return tensor.gather(part.dim, places.to(tensor.device))


def are_transposed(run: Callable[[], object], mixtures: Sequence[Mixture]) -> dict[str, bool]:
    """By name of the mixture, True if the matrices of its experts are [in_features, out_features].

    Args:
        run: runs a forward of the model, with experts that run one by one.
        mixtures: the mixtures. One whose experts no token reaches, or whose matrices differ, has no entry.
    """
    stacks = {
        mixture.consumer: [stack for path, module in mixture.stacks.items() for stack in stacks_of(module, path)]
        for mixture in mixtures
    }
    found = find_layouts(run, [stack for of in stacks.values() for stack in of])
    sides = {name: {found[s.name].transposed if s.name in found else None for s in of} for name, of in stacks.items()}
    return {name: bool(of.pop()) for name, of in sides.items() if len(of) == 1 and None not in of}


def channels_inside(mixtures: Sequence[Mixture], transposed: Mapping[str, bool]) -> tuple[ExpertChannels, ...] | str:
    """The channels inside the experts of mixtures, or why they cannot be told apart.

    Args:
        mixtures: the mixtures.
        transposed: from :func:`are_transposed`.
    """
    found: list[ExpertChannels] = []
    for mixture in mixtures:
        entry = _inside(mixture, transposed.get(mixture.consumer))
        if isinstance(entry, str):
            return f"{mixture.consumer}: {entry}"
        found.append(entry)
    if len(numbers := sorted({entry.count for entry in found})) > 1:
        return f"blocks have different numbers of them ({', '.join(map(str, numbers))})"
    return tuple(found)


def _inside(mixture: Mixture, transposed: bool | None) -> ExpertChannels | str:
    tensors = [(path, key, t) for path, module in mixture.stacks.items() for key, t in own_tensors(module)]
    matrices = {(path, key): t.shape[1:] for path, key, t in tensors if t.dim() == 3}
    if len(matrices) < 2 or transposed is None:
        return "no token reached all of its matrices, or they are stored in different ways"
    reads, writes = (1, 2) if transposed else (2, 1)
    consumer = [*matrices][-1]
    count, hidden = matrices[consumer][reads - 1], matrices[consumer][writes - 1]
    layouts = []
    for path, key, tensor in tensors:
        owner = next((of for of in matrices if of[0] == path and key.startswith(of[1])), None)
        if owner is None or tensor.shape[0] != mixture.count:
            return f"{path}.{key} belongs to none of its matrices"
        width = matrices[owner][writes - 1]
        if owner == consumer:
            continue
        if width % count or matrices[owner][reads - 1] != hidden or (tensor.dim() == 2 and tensor.shape[1] != width):
            return f"{path}.{key} does not compute the channels that {'.'.join(consumer)} reads"
        interleaved = not getattr(mixture.stacks[path], "is_concatenated", True)
        layouts.append(Layout(path, key, writes if tensor.dim() == 3 else 1, width // count, interleaved))
    layouts.append(Layout(*consumer, reads))
    return ExpertChannels(".".join(consumer), count, mixture.count, mixture.stacks, tuple(layouts))
