"""What the layers of a block are for, by structure: routers, adapters, attention, gate and up projections."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..linears import linear_weight
from .blocks import Block, linears_of


def routers(block: Block) -> set[str]:
    """Names of the layers that select or weight experts: linear layers, and modules with a matrix called ``weight``.

    A router has "router" in its name or in the name of its class. Or a module contains experts, and the router is the
    only layer in another child of that module, with one output per expert or one output (the gate of a shared expert).
    """
    found = {
        path
        for path in _matrices_in(block.module, block.name)
        if "router" in path.removeprefix(block.name)
        or "router" in type(block.module.get_submodule(".".join(block.path_to(path)))).__name__.lower()
    }
    for path, module in block.module.named_modules(prefix=block.name):
        experts = experts_in(module)
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
    """The weights [out_features, in_features] of linear layers, and other matrices called ``weight``."""
    found = {}
    for path, child in module.named_modules(prefix=name):
        weight = linear_weight(child)
        if weight is None and not isinstance(child, nn.Embedding):
            weight = child._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            found[path] = weight
    return found


def experts_in(module: nn.Module) -> dict[str, int]:
    """Number of experts by name of the child module that contains them."""
    experts = {}
    for name, child in module.named_children():
        stacked = [p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        if stacked:
            experts[name] = stacked[0]
        elif isinstance(child, nn.ModuleList) and len(child) > 1 and any(True for _ in linears_of(child)):
            experts[name] = len(child)
    return experts


def adapters(module: nn.Module, name: str = "") -> set[str]:
    """Names of the low-rank linear layers whose output is added to that of another layer, such as LoRA's A and B.

    Such a pair maps the inputs of a base layer to its outputs through fewer channels than either has. The pair is in
    containers beside the base layer, in a module without other layers (peft), or below the base layer itself. Layers
    with ``lora_`` in their path are adapters too.
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
    """True if a layer is inside a module of the block whose forward takes a mask, which means that it mixes tokens."""
    return attention_of(block, layer_name) is not None


def attention_of(block: Block, layer_name: str) -> str | None:
    """The dotted name of the outermost module of the block with a layer in it whose forward takes a mask, if any.

    The name of an expert in a stack has no module of its own; the search stops at the module that contains the stack.
    """
    module, name = block.module, block.name
    for part in block.path_to(layer_name)[:-1]:
        child = dict(module.named_children()).get(part)
        if child is None:
            break
        module, name = child, f"{name}.{part}"
        if any("mask" in parameter for parameter in inspect.signature(module.forward).parameters):
            return name
    return None


def finished_modules(block: Block, names: Iterable[str], rest: Iterable[str]) -> list[nn.Module]:
    """Direct children of a block that contain some layers in ``names`` and none in ``rest``; never layers."""
    with_layers = {child for child, *below in map(block.path_to, names) if below}
    pending = {block.path_to(name)[0] for name in rest}
    return [child for name, child in block.module.named_children() if name in with_layers - pending]


def gated_consumers(layers: dict[str, nn.Module], groups: list[list[str]]) -> dict[str, str]:
    """Map gate and up projections to the down projection that reads their product, by name.

    Two layers of one module are gate and up if they share an input, and each has as many outputs as a third layer of
    the module has inputs. One layer with twice as many outputs is a fused gate and up, one half after the other.

    Args:
        layers: linear layers of one block outside attention, by name.
        groups: names of layers that read the same tensor, group by group.
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
