"""Finds the towers of a model, their blocks and the linear layers in them, by structure instead of by family name."""

from __future__ import annotations

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
        found = error.__cause__ if isinstance(error, ArgumentError) and error.__cause__ is not None else error
        raise ArgumentError(
            f"{type(model).__name__} cannot run on the calibration inputs ({', '.join(batch.arguments)}): {found}. "
            "Give everything that its forward needs, in batches: dicts or tuples of tensors"
        ) from error
    if not calls:
        return as_defined
    running_towers = _split(calls, members)
    reached = running_towers if batch is None else _with_masks(model, running_towers, trial, list(batch.masks))
    running = {block for tower in running_towers for block in tower.blocks}
    idle = {tower.name: [block for block in tower.blocks if block not in running] for tower in as_defined}
    return [*reached, *(Tower(name, blocks, is_reached=False) for name, blocks in idle.items() if blocks)]


def _outermost_lists(model: nn.Module, is_list: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if is_list(module) and not inside and any(_is_block(member) for member in module.children()):
            found[name] = module
    return found


def _is_block(module: nn.Module) -> bool:
    """True if a module contains linear layers; False for a linear layer, as in a list of those of an MLP."""
    return linear_weight(module) is None and any(True for _ in linears_of(module))


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
