"""Which layers a recipe prunes, and which of them share statistics, found on a model without weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..decoders.batches import Batch, run_model, tensors_in, trial_batch
from ..decoders.blocks import Block, Tower, find_towers, possible_stacks
from ..decoders.calibration_mode import calibration_mode
from ..decoders.collect import InputCollector
from ..decoders.experts import ExpertLinear, Layout, find_layouts
from ..decoders.layer_roles import gated_consumers
from ..decoders.plan import NameFilter, Plan, Unit, misfit
from ..errors import AceError, ArgumentError
from ..inputs.model_source import reason
from ..linears import linear_weight
from ..methods.registry import Needs
from ..recipe import Recipe
from ..timing import Stopwatch

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class LayerSize:
    """A layer of a plan.

    Attributes:
        name: dotted name.
        outputs: out_features of its weight.
        inputs: in_features.
        bytes: size of the weight.
        group: number of the group of layers of its block that read the same input.
        is_expert: True if the weight is part of a stack of experts.
        is_pruned: False if only the layer's inputs are observed.
    """

    name: str
    outputs: int
    inputs: int
    bytes: int
    group: int
    is_expert: bool
    is_pruned: bool = True

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class UnitSize:
    """A unit of a plan.

    Attributes:
        name: name of the block.
        layers: the layers whose inputs are observed, in the order in which they are pruned.
        bytes: size of all parameters of the block, or of the layers outside the blocks.
    """

    name: str
    layers: tuple[LayerSize, ...]
    bytes: int

    @property
    def groups(self) -> list[tuple[LayerSize, ...]]:
        """The layers by group, in order of the groups."""
        found: dict[int, list[LayerSize]] = {}
        for layer in self.layers:
            found.setdefault(layer.group, []).append(layer)
        return [tuple(found[group]) for group in sorted(found)]


@dataclass(frozen=True)
class PlannedModel:
    """What a recipe does with a model.

    Attributes:
        plan: the layers to prune, and why the others stay dense.
        units: the sizes of the blocks with layers to prune, then of the layers outside the blocks.
        blocks: number of all blocks.
        block_bytes: size of the largest block.
        unchecked: what only a run on the weights and the text can tell.
        hidden: length and width of the largest hidden states that a tower's first block reads, for one input of a batch
            that was given; None without a batch.
    """

    plan: Plan
    units: tuple[UnitSize, ...]
    blocks: int
    block_bytes: int
    unchecked: tuple[str, ...] = field(default=())
    hidden: tuple[int, int] | None = None


def planned(model: Any, recipe: Recipe, batch: Batch | None = None) -> PlannedModel:
    """Plan a recipe on a model whose weights have no meaning.

    A few inputs run through one block of each kind to find the layout of experts and the layers that share an input.

    Args:
        model: the model.
        recipe: how to prune.
        batch: inputs of the model; None for a few token ids.

    Raises:
        ArgumentError: if no layer can be pruned, a name pattern matches no layer, or the model cannot run here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = _examined(model, recipe, batch, one_of_each_kind)
        except AceError:
            raise
        except Exception:  # A block may need what a block before it has computed, such as its keys and values.
            try:
                found = _examined(model, recipe, batch, lambda _blocks: nullcontext())
            except AceError:
                raise
            except Exception as error:
                raise ArgumentError(
                    f"{type(model).__name__} cannot run on this machine, so it cannot be planned ({reason(error)})"
                ) from error
    plan, groups = found.plan, found.groups
    units = plan.units
    numbers = {unit.name: _group_numbers(unit, groups) for unit in units}
    for unit in units:
        _account(plan, unit, recipe, numbers[unit.name])
    unchecked = ["whether weights have NaN or infinity"]
    if recipe.rotate:
        unchecked.append("which values can be rotated")
    if recipe.permute:
        unchecked.append("which layers can be reordered")
    if any(isinstance(layer, ExpertLinear) for layer in plan.layers.values()):
        unchecked.append("whether calibration tokens reach every expert; others stay dense")
    return PlannedModel(
        plan,
        tuple(_unit_size(plan, unit, numbers[unit.name]) for unit in units),
        len(plan.blocks),
        max(_bytes(block.module) for block in plan.blocks),
        tuple(unchecked),
        found.hidden,
    )


@dataclass(frozen=True)
class _Examined:
    """The plan, the groups of layers that read the same tensor, and the size of the hidden states."""

    plan: Plan
    groups: list[list[str]]
    hidden: tuple[int, int] | None


Substitute = Callable[[Sequence[Block]], AbstractContextManager[None]]


def _examined(model: Any, recipe: Recipe, batch: Batch | None, substitute: Substitute) -> _Examined:
    """What a forward of a few inputs shows, while blocks are substituted."""
    with calibration_mode(model):
        towers = [tower for tower in find_towers(model, batch) if tower.is_reached]
        trial = trial_batch(model, [] if batch is None else [batch])
        blocks = [block for tower in towers for block in tower.blocks]
        stacks = [stack for block in blocks for stack in possible_stacks(block.module, block.name)]
        with substitute(blocks):
            layouts = find_layouts(lambda: run_model(model, trial), stacks) if stacks else {}
            layouts = _in_all_blocks(layouts, blocks)
            known = [(stack, layouts[stack.name]) for stack in stacks if stack.name in layouts]
            experts = [name for stack, layout in known for name in stack.linears(transposed=False, rows=layout.rows)]
            names = NameFilter.of(model, recipe.include, recipe.exclude, experts)
            plan = Plan(model, recipe.metric, recipe.needs, recipe.sparsity, names, towers, stacks, layouts)
            return _observed(model, plan, trial, None if batch is None else towers)


def _in_all_blocks(layouts: Mapping[str, Layout], blocks: Sequence[Block]) -> dict[str, Layout]:
    """The layouts, also for the same stacks of all other blocks of the same kind."""
    of_kind: dict[object, dict[str, Layout]] = {}
    for block in blocks:
        start = f"{block.name}."
        inside = {name.removeprefix(start): layout for name, layout in layouts.items() if name.startswith(start)}
        of_kind.setdefault(kind_of(block.module), {}).update(inside)
    return {
        f"{block.name}.{name}": layout for block in blocks for name, layout in of_kind[kind_of(block.module)].items()
    }


def _observed(model: Any, plan: Plan, trial: Batch, towers: Sequence[Tower] | None) -> _Examined:
    """Run a few inputs, and see which layers read the same tensor, and what the first blocks of towers read."""
    observed = {name: layer for unit in plan.units for name, layer in unit.observed.items()}
    first = next(iter(trial.inputs.values()))
    collector = InputCollector(observed, Needs(), Stopwatch(first.device))
    sizes: list[tuple[int, int]] = []

    def see(_module: nn.Module, args: Any, kwargs: Any) -> None:
        states = next((t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.dim() >= 2), None)
        if states is not None:
            sizes.append((-(-states.numel() // (states.shape[-1] * len(first))), states.shape[-1]))

    with ExitStack() as hooks, collector.batch(trial.shape, None):
        for tower in towers or ():
            block = tower.blocks[0].module
            hooks.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
        run_model(model, trial)
    return _Examined(plan, collector.groups, max(sizes, key=lambda size: size[0] * size[1], default=None))


@contextmanager
def one_of_each_kind(blocks: Sequence[Block]) -> Iterator[None]:
    """A context in which only the first block of each kind computes; the others return what that one has returned.

    Blocks are of one kind if their class and their parameters' names and shapes are the same.
    """
    first: dict[object, Block] = {}
    outputs: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _args: object, output: Any) -> None:
        outputs[module] = output

    with ExitStack() as undo:
        for block in blocks:
            earlier = first.setdefault(kind_of(block.module), block)
            if earlier is block:
                undo.callback(block.module.register_forward_hook(keep).remove)
            else:
                undo.enter_context(_returning(block.module, outputs, earlier.module))
        yield


@contextmanager
def _returning(module: nn.Module, outputs: Mapping[nn.Module, Any], earlier: nn.Module) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: outputs[earlier]  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def kind_of(module: nn.Module) -> object:
    """A key that is equal for blocks of the same class with parameters of the same names and shapes."""
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _account(plan: Plan, unit: Unit, recipe: Recipe, numbers: Mapping[str, int]) -> None:
    """Record in the plan which layers of a unit are pruned, and which the pattern does not fit along their outputs."""
    members: dict[int, list[str]] = {}
    for name, number in numbers.items():
        members.setdefault(number, []).append(name)
    consumers = gated_consumers(unit.feed_forward, list(members.values()))
    for name, layer in unit.layers.items():
        weight = linear_weight(layer)
        assert weight is not None
        usual = recipe.metric.consumer_axis if name in consumers else "in"
        why_not = misfit(weight, recipe.sparsity, recipe.sparsity.axis or usual)
        if why_not is None:
            plan.pruned(name, weight.numel())
        else:
            plan.skip(name, weight, why_not)


def _unit_size(plan: Plan, unit: Unit, numbers: Mapping[str, int]) -> UnitSize:
    skipped = {entry.name for entry in plan.skipped}
    sizes = []
    for name, layer in unit.observed.items():
        weight = linear_weight(layer)
        assert weight is not None
        rows, columns = weight.shape
        is_expert = isinstance(layer, ExpertLinear)
        sizes.append(
            LayerSize(
                name,
                rows,
                columns,
                weight.nbytes,
                numbers[name],
                is_expert,
                name in unit.layers and name not in skipped,
            )
        )
    block = next((block.module for block in plan.blocks if block.name == unit.name), None)
    return UnitSize(unit.name, tuple(sizes), sum(s.bytes for s in sizes) if block is None else _bytes(block))


def _group_numbers(unit: Unit, groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """For each layer of a unit, the number of its group.

    Layers that the trial did not reach, in a block of a known kind or in an expert, are grouped like those that it
    reached: by the same names but for their numbers.
    """
    alike: dict[str, int] = {}
    for number, group in enumerate(groups):
        for name in group:
            alike.setdefault(_pattern(name), number)
    own = {name: number for number, group in enumerate(groups) for name in group}
    keys: dict[object, int] = {}
    found = {}
    for name in unit.observed:
        key: object = (
            ("reached", own[name]) if name in own else (name.rpartition(".")[0], alike.get(_pattern(name), name))
        )
        found[name] = keys.setdefault(key, len(keys))
    return found


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
