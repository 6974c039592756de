"""Finds the decoder blocks of a model, and the linear layers in them, by structure and not by family name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .experts import Stack
from .prune import linear_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        name: its dotted name in the model.
        module: the block.
    """

    name: str
    module: nn.Module

    def path_to(self, layer_name: str) -> list[str]:
        """The parts of a layer's dotted name from the block on."""
        return layer_name.removeprefix(f"{self.name}.").split(".")


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks, in order.

    They are the members of the longest ``nn.ModuleList`` that holds linear layers and lies in no other such
    list (lists of experts lie inside blocks); of two as long, the one with more parameters. In a model
    with several towers only the text decoder is looked at.

    Raises:
        ValueError: an encoder-decoder, or a model without such a list.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only causal decoders can be pruned")
    lists = _outermost_lists(model, inside=model.get_decoder()) or _outermost_lists(model, inside=model)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers; is it a decoder, and in "
            "floating point? (layers of some quantised checkpoints are no nn.Linear)"
        )
    name = max(lists, key=lambda n: (len(lists[n]), sum(p.numel() for p in lists[n].parameters())))
    return [Block(f"{name}.{i}", module) for i, module in enumerate(lists[name])]


def _outermost_lists(model: nn.Module, inside: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    start = next((name for name, module in model.named_modules() if module is inside), None)
    if start is None:
        return found
    for name, module in inside.named_modules(prefix=start):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            has_linears = any(True for _ in linears_of(module))
            if has_linears:
                found[name] = module
    return found


def linears_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The linear layers (``nn.Linear``, Conv1D) in a module whose dotted name is ``name``, in order."""
    for path, child in module.named_modules(prefix=name):
        if linear_weight(child) is not None:
            yield path, child


def stacks_of(module: nn.Module, name: str = "") -> list[Stack]:
    """The weights of three dimensions in a module whose dotted name is ``name``, convolutions apart: experts mostly."""
    return [
        Stack(f"{path}.{key}", parameter, getattr(child, "is_concatenated", True))
        for path, child in module.named_modules(prefix=name)
        if not isinstance(child, (nn.Conv1d, nn.ConvTranspose1d))
        for key, parameter in child.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def routers(block: Block) -> set[str]:
    """Names of the linear layers that choose or weigh experts.

    Such a layer has "router" in its name, or stands alone beside experts in one module and has one output
    for each of them, or a single one (the gate of a shared expert).
    """
    found = {path for path, _ in linears_of(block.module, block.name) if "router" in path.removeprefix(block.name)}
    for path, module in block.module.named_modules(prefix=block.name):
        experts = _experts_in(module)
        if path == block.name or not experts:
            continue
        for child, submodule in module.named_children():
            inside = list(linears_of(submodule, f"{path}.{child}"))
            if child not in experts and len(inside) == 1:
                name, layer = inside[0]
                weight = linear_weight(layer)
                if weight is not None and weight.shape[0] in {*experts.values(), 1}:
                    found.add(name)
    return found


def _experts_in(module: nn.Module) -> dict[str, int]:
    """Children that hold experts, with the number of them."""
    experts = {}
    for name, child in module.named_children():
        stacked = [p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        if stacked:
            experts[name] = stacked[0]
        elif isinstance(child, nn.ModuleList) and len(child) > 1 and any(True for _ in linears_of(child)):
            experts[name] = len(child)
    return experts


def in_attention(block: Block, layer_name: str) -> bool:
    """Whether a layer lies in a module of the block that mixes tokens: one whose forward takes a mask.

    An expert of a stack is named below the module that holds the stack, and has none of its own.
    """
    module = block.module
    for part in block.path_to(layer_name)[:-1]:
        child = dict(module.named_children()).get(part)
        if child is None:
            break
        module = child
        if any("mask" in parameter for parameter in inspect.signature(module.forward).parameters):
            return True
    return False


def finished_modules(block: Block, names: Iterable[str], rest: Iterable[str]) -> list[nn.Module]:
    """Modules directly below a block, no layers themselves, that hold some of its layers and none of ``rest``."""
    held = {child for child, *below in map(block.path_to, names) if below}
    pending = {block.path_to(name)[0] for name in rest}
    return [child for name, child in block.module.named_children() if name in held - pending]


def gated_consumers(layers: dict[str, nn.Module], groups: list[list[str]]) -> dict[str, str]:
    """For gate and up projections, the name of the down projection that their product feeds.

    Two layers of one module that share an input, and have as many outputs each as a third layer of it has
    inputs, are gate and up; so is one layer with twice as many (both fused, one half after the other).

    Args:
        layers: the linear layers of one block by name, those of attention left out.
        groups: names of layers that read the same tensor.
    """
    outs, ins = {}, {}
    for name, layer in layers.items():
        weight = linear_weight(layer)
        assert weight is not None
        outs[name], ins[name] = weight.shape
    found = {}
    for group in groups:
        for parent in {_parent(name) for name in group}:
            members = [name for name in group if name in layers and _parent(name) == parent]
            widths = {outs[name] for name in members}
            if len(members) not in (1, 2) or len(widths) != 1:
                continue
            width = widths.pop() * len(members) / 2
            consumers = [n for n in layers if _parent(n) == parent and n not in members and ins[n] == width]
            if len(consumers) == 1:
                found.update(dict.fromkeys(members, consumers[0]))
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
