"""Finds the decoder blocks of a model, and the linear layers in them, by structure and not by family name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import ArgumentError
from ..linears import linear_weight
from ..out_of_memory import raise_if_out_of_memory
from .batches import trial_ids
from .calibration_mode import calibration_mode
from .experts import Stack

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
    """The decoder blocks, in the order in which they run.

    They are the members of the outermost ``nn.ModuleList`` that holds linear layers (lists of experts lie inside
    blocks). A list of bare linear layers holds heads or projections, no blocks. If several lists remain, a forward of a
    few tokens tells: blocks are the members that run, of all lists, in the order of their first calls. If that forward
    fails, they are the members of the list with the most parameters. In a model with several towers only the text
    decoder is looked at.

    Raises:
        ValueError: an encoder-decoder, or a model without such a list.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArgumentError(f"{type(model).__name__} is an encoder-decoder; only causal decoders can be pruned")
    lists = _outermost_lists(model, inside=model.get_decoder()) or _outermost_lists(model, inside=model)
    if not lists:
        raise ArgumentError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers; is it a decoder, and in "
            "floating point? (layers of some quantised checkpoints are no nn.Linear)"
        )
    members = {name: [Block(f"{name}.{i}", module) for i, module in enumerate(lists[name])] for name in lists}
    if len(members) == 1:
        return next(iter(members.values()))
    running = _in_order_of_calls(model, [block for blocks in members.values() for block in blocks])
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return running or members[largest]


def _outermost_lists(model: nn.Module, inside: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    start = next((name for name, module in model.named_modules() if module is inside), None)
    if start is None:
        return found
    for name, module in inside.named_modules(prefix=start):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            has_linears = any(True for _ in linears_of(module))
            if has_linears and not all(linear_weight(member) is not None for member in module):
                found[name] = module
    return found


def _in_order_of_calls(model: PreTrainedModel, blocks: Iterable[Block]) -> list[Block]:
    """Those of some blocks that run in a forward of a few tokens, by their first call; none if the forward fails."""
    by_module = {block.module: block for block in blocks}
    called: dict[nn.Module, Block] = {}

    def note(module: nn.Module, _args: object) -> None:
        called.setdefault(module, by_module[module])

    try:
        with calibration_mode(model), ExitStack() as hooks:
            for module in by_module:
                hooks.callback(module.register_forward_pre_hook(note).remove)
            model(input_ids=trial_ids(model), use_cache=False)
    except Exception as error:
        raise_if_out_of_memory(error)
        return []
    return list(called.values())


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


def possible_stacks(module: nn.Module, name: str = "") -> list[Stack]:
    """The weights in a module that may hold experts: :func:`stacks_of`; three-dimensional parameters with a single
    matrix (one shared expert); and two-dimensional parameters of modules that are no layers (DBRX has its experts one
    below the other). A trial tells which do."""
    found = stacks_of(module, name)
    known = {stack.name for stack in found}
    for path, child in module.named_modules(prefix=name):
        if linear_weight(child) is None and not isinstance(child, (nn.Embedding, parametrize.ParametrizationList)):
            for key, p in child.named_parameters(recurse=False):
                if p.dim() in (2, 3) and min(p.shape[-2:]) > 1 and f"{path}.{key}" not in known:
                    found.append(Stack(f"{path}.{key}", p))
    return found


def routers(block: Block) -> set[str]:
    """Names of the layers that choose or weigh experts: linear layers, and modules with a matrix called weight.

    Such a layer has "router" in its name or in its class's, or stands alone beside experts in one module and has one
    output for each of them, or a single one (the gate of a shared expert).
    """
    found = {
        path
        for path in _matrices_in(block.module, block.name)
        if "router" in path.removeprefix(block.name)
        or "router" in type(block.module.get_submodule(".".join(block.path_to(path)))).__name__.lower()
    }
    for path, module in block.module.named_modules(prefix=block.name):
        experts = _experts_in(module)
        if path == block.name or not experts:
            continue
        for child, submodule in module.named_children():
            inside = list(_matrices_in(submodule, f"{path}.{child}").items())
            if child not in experts and len(inside) == 1:
                name, weight = inside[0]
                if weight.shape[0] in {*experts.values(), 1}:
                    found.add(name)
    return found


def _matrices_in(module: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights [out_features, in_features] of linear layers, and of others that call a matrix their weight."""
    found = {}
    for path, child in module.named_modules(prefix=name):
        weight = linear_weight(child)
        if weight is None and not isinstance(child, nn.Embedding):
            weight = child._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            found[path] = weight
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


def adapters(module: nn.Module, name: str = "") -> set[str]:
    """Names of the linear layers of low rank that are added to another layer's output, as LoRA's A and B are.

    Such a pair leads from the inputs of a layer to its outputs through fewer channels than either, and lies in
    containers beside that layer in a module that holds no other layer (peft), or below the layer itself. Layers with
    a ``lora_`` in their path are adapters too.
    """
    linears = dict(linears_of(module, name))
    found = {path for path in linears if any(part.lower().startswith("lora_") for part in path.split("."))}
    for path, parent in module.named_modules(prefix=name):
        beside = [child for child in parent.children() if linear_weight(child) is not None]
        base = parent if path in linears else beside[0] if len(beside) == 1 else None
        if base is not None:
            others = {n: c for n, c in parent.named_children() if base is parent or isinstance(c, _CONTAINERS)}
            inside = {p: m for n, c in others.items() for p, m in linears_of(c, f"{path}.{n}") if m is not base}
            found |= _low_rank_pairs(base, inside)
    return found


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)


def _low_rank_pairs(base: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    outputs, inputs = _shape(base)
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    narrowing = {name: rank for name, (rank, into) in shapes.items() if into == inputs and rank < min(inputs, outputs)}
    widening = {name: rank for name, (out, rank) in shapes.items() if out == outputs}
    ranks = set(narrowing.values()) & set(widening.values())
    return {name for pairs in (narrowing, widening) for name, rank in pairs.items() if rank in ranks}


def _shape(layer: nn.Module) -> tuple[int, int]:
    weight = linear_weight(layer)
    assert weight is not None
    return weight.shape[0], weight.shape[1]


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
