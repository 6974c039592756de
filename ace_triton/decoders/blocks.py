"""Finds the towers of a model, their blocks and the linear layers in them, by structure instead of by family name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import ArgumentError
from ..linears import linear_weight
from ..out_of_memory import raise_if_out_of_memory
from .batches import TEXT_ALONE, TEXT_MASK, Batch, Masks, run_model, tensors_in, trial_batch
from .calibration_mode import calibration_mode
from .experts import Stack
from .without_blocks import why_no_blocks


@dataclass(frozen=True)
class Block:
    """One block of a transformer.

    Attributes:
        name: dotted name in the model.
        module: the module of the block.
    """

    name: str
    module: nn.Module

    def path_to(self, layer_name: str) -> list[str]:
        """The parts of a layer's dotted name after the block's name."""
        return layer_name.removeprefix(f"{self.name}.").split(".")


@dataclass(frozen=True)
class Tower:
    """Blocks that run one after the other, each on the hidden states of the one before.

    Attributes:
        name: dotted name of the module that contains the blocks.
        blocks: the blocks, in the order in which they run.
        masks: the padding masks of what the blocks read.
        is_reached: False if no block runs on the model's inputs, such as a vision tower without images.
    """

    name: str
    blocks: Sequence[Block]
    masks: Masks = TEXT_ALONE
    is_reached: bool = True


def find_blocks(model: nn.Module, batch: Batch | None = None) -> list[Block]:
    """The blocks of all towers of a model that run, in the order in which they run.

    Args, errors: as for :func:`find_towers`.
    """
    return [block for tower in find_towers(model, batch) if tower.is_reached for block in tower.blocks]


def find_towers(model: nn.Module, batch: Batch | None = None) -> list[Tower]:
    """Find the towers of a model, in the order in which they run; blocks that do not run come last.

    Blocks are the members of an outermost ``nn.ModuleList`` that contains linear layers (lists of experts are nested in
    blocks). A list of bare linear layers is ignored: it contains heads or projections. A model without such lists may
    have its blocks in an ``nn.Sequential`` whose members are of one type. If several lists remain, the order of the
    first calls of their members in a forward of a few inputs decides: lists whose members alternate are one tower, all
    others are towers of their own.

    Args:
        model: the model.
        batch: inputs of the model. If it is None, the first token ids of the vocabulary run; if the model cannot run
            on token ids alone, every list is a tower, in order of definition.

    Raises:
        ArgumentError: if the model has no such list, or cannot run on the batch.
    """
    lists = _outermost_lists(model, _is_list) or _outermost_lists(model, _is_sequence_of_one_type)
    if not lists:
        raise ArgumentError(why_no_blocks(model))
    members = {name: [Block(f"{name}.{i}", m) for i, m in modules.named_children()] for name, modules in lists.items()}
    as_defined = [Tower(name, blocks) for name, blocks in members.items()]
    if len(members) == 1 and (batch is None or batch.of_text):
        return as_defined
    try:
        trial = trial_batch(model, [] if batch is None else [batch])
        calls = _first_calls(model, as_defined, trial)
    except Exception as error:
        raise_if_out_of_memory(error)
        if batch is None:
            return as_defined
        raise ArgumentError(
            f"{type(model).__name__} cannot run on the calibration inputs ({', '.join(batch.arguments)}): {error}. "
            "Give everything that its forward needs, as a list of dicts of tensors"
        ) from error
    if not calls:
        return as_defined
    found = _split(calls, members)
    reached = found if batch is None else _with_masks(model, found, trial, list(batch.masks))
    running = {block for tower in found for block in tower.blocks}
    idle = {tower.name: [block for block in tower.blocks if block not in running] for tower in as_defined}
    return [*reached, *(Tower(name, blocks, is_reached=False) for name, blocks in idle.items() if blocks)]


def _outermost_lists(model: nn.Module, is_list: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_list(module) and not any(name.startswith(f"{outer}.") for outer in found):
            has_linears = any(True for _ in linears_of(module))
            if has_linears and not all(linear_weight(member) is not None for member in module.children()):
                found[name] = module
    return found


def _is_list(module: nn.Module) -> bool:
    """True for a list of blocks. A list of lists is none: its members are not called."""
    members = list(module.children())
    return isinstance(module, nn.ModuleList) and not (members and all(isinstance(m, nn.ModuleList) for m in members))


def _is_sequence_of_one_type(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 1 and len(set(map(type, module))) == 1


def _first_calls(model: nn.Module, towers: Sequence[Tower], batch: Batch) -> dict[Block, list[torch.Tensor]]:
    """The tensors that each block reads in its first call in a forward, by block in the order of first calls."""
    by_module = {block.module: block for tower in towers for block in tower.blocks}
    called: dict[Block, list[torch.Tensor]] = {}

    def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.setdefault(by_module[module], list(tensors_in((args, kwargs))))

    with calibration_mode(model), ExitStack() as hooks:
        for module in by_module:
            hooks.callback(module.register_forward_pre_hook(record_call, with_kwargs=True).remove)
        run_model(model, batch)
    return called


def _split(calls: Iterable[Block], members: Mapping[str, Sequence[Block]]) -> list[Tower]:
    """Split blocks, in the order of their calls, into towers: lists whose members alternate are one tower."""
    list_of = {block: name for name, blocks in members.items() for block in blocks}
    found: list[tuple[list[str], list[Block]]] = []
    for block in calls:
        name = list_of[block]
        place = next((i for i, (names, _) in enumerate(found) if name in names), len(found))
        joined = [*found[place:], ([name], [block])]
        names = list(dict.fromkeys(name for names, _ in joined for name in names))
        found[place:] = [(names, [block for _, blocks in joined for block in blocks])]
    return [Tower(_common_name(names), blocks) for names, blocks in found]


def _common_name(names: Sequence[str]) -> str:
    """The dotted name of the innermost module that contains all the named modules."""
    paths = [name.split(".") for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) or ", ".join(names)


def _with_masks(model: nn.Module, towers: Sequence[Tower], batch: Batch, names: Sequence[str]) -> list[Tower]:
    """The towers with their masks.

    A mask belongs to the first tower whose first block it has an effect on, and to later towers whose hidden states it
    changes, since these are made of the same tokens. A single tower owns the first mask, and all towers own the mask of
    token ids if the model reads nothing else, even if the model ignores it.

    Args:
        model: the model.
        towers: the towers that run.
        batch: a batch whose masks hide nothing.
        names: names of the masks.
    """
    if batch.of_text:
        return list(towers)
    if len(towers) == 1:
        return [replace(towers[0], masks=Masks(names[0] if names else TEXT_MASK))]
    owned: dict[int, str] = {}
    dense = _first_calls(model, towers, batch)
    for name in names:
        like = batch.arguments.get(name, next(iter(batch.inputs.values())))
        mask = torch.ones(like.shape[:2], dtype=torch.int64, device=like.device)
        mask[:, -1] = 0
        masked = _first_calls(model, towers, batch.with_input(name, mask))
        entries = [(dense[tower.blocks[0]], masked[tower.blocks[0]]) for tower in towers]
        reading = [i for i, (before, after) in enumerate(entries) if not _equal(before, after)]
        made_of = [i for i in reading[1:] if not _equal(*(_hidden_states(tensors) for tensors in entries[i]))]
        for index in [*reading[:1], *made_of]:
            owned.setdefault(index, name)
        if not reading:
            warnings.warn(
                f"{name} has no effect on what the first block of any tower reads, so padding that it marks counts as "
                "tokens",
                stacklevel=4,
            )
    before = [tuple(dict.fromkeys(owned[i] for i in range(t - 1, -1, -1) if i in owned)) for t in range(len(towers))]
    return [
        replace(tower, masks=Masks(owned.get(index), before[index], is_first=index == 0))
        for index, tower in enumerate(towers)
    ]


def _hidden_states(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first tensor of a block's arguments that may be its hidden states."""
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() >= 2][:1]


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def outermost_members(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ``nn.ModuleList`` objects, each once, in order; with linear layers or without."""
    outer: list[str] = []
    found: dict[nn.Module, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
            found.update(dict.fromkeys(module.children()))
    return list(found)


def linears_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The linear layers (``nn.Linear``, Conv1D) in a module with dotted name ``name``, in order of definition."""
    for path, child in module.named_modules(prefix=name):
        if linear_weight(child) is not None:
            yield path, child


def stacks_of(module: nn.Module, name: str = "") -> list[Stack]:
    """The three-dimensional weights, usually experts, in a module with dotted name ``name``; without convolutions."""
    return [
        Stack(f"{path}.{key}", parameter, getattr(child, "is_concatenated", True))
        for path, child in module.named_modules(prefix=name)
        if not isinstance(child, (nn.Conv1d, nn.ConvTranspose1d))
        for key, parameter in child.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def possible_stacks(module: nn.Module, name: str = "") -> list[Stack]:
    """The weights in a module that may contain experts.

    These are the stacks of :func:`stacks_of`, three-dimensional parameters with a single matrix (one shared expert),
    and two-dimensional parameters of modules that are not linear layers (DBRX stores experts one below the other).
    :func:`~ace_triton.decoders.experts.find_layouts` finds out which of them do.
    """
    found = stacks_of(module, name)
    known = {stack.name for stack in found}
    for path, child in module.named_modules(prefix=name):
        if linear_weight(child) is None and not isinstance(child, (nn.Embedding, parametrize.ParametrizationList)):
            for key, p in child.named_parameters(recurse=False):
                if p.dim() in (2, 3) and min(p.shape[-2:]) > 1 and f"{path}.{key}" not in known:
                    found.append(Stack(f"{path}.{key}", p))
    return found


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
