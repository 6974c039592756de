"""Decides which layers of a model are pruned, groups them into units, and gives the reason for each other layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..computed_weight import computed_weight
from ..errors import ArgumentError
from ..linears import linear_weight
from ..methods.registry import Metric, Needs
from ..sparsity import Axis, Sparsity
from ..tied import Owners
from .account import Account, Kind, Ledger
from .blocks import Block, Tower, linears_of, stacks_of
from .experts import ExpertLinear, Layout, Stack
from .layer_roles import adapters, in_attention, routers

ADAPTER = "an adapter of low rank; merge it into its layer to prune both"
ROUTER = "routers stay dense"
SHOWN_REASONS = 3
"""Number of reasons in the error if no layer can be pruned."""


@dataclass(frozen=True)
class Skipped:
    """A weight that stays dense although ``include`` and ``exclude`` allow pruning it.

    Attributes:
        name: dotted name of its linear layer, or of the weight itself if no linear layer contains it.
        reason: why the weight stays dense.
        parameters: number of elements.
        share: fraction of the model's parameters.
    """

    name: str
    reason: str
    parameters: int
    share: float


@dataclass(frozen=True)
class Excluded:
    """A weight of the blocks that ``include`` or ``exclude`` rules out.

    Attributes:
        name: as in :class:`Skipped`.
        parameters: number of elements.
    """

    name: str
    parameters: int


@dataclass(frozen=True)
class NameFilter:
    """Selects layers by shell patterns on their dotted names.

    Attributes:
        include: patterns of layers to prune; None for all layers in the blocks.
        exclude: patterns of layers to leave dense.
    """

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        experts: Sequence[str] = (),
    ) -> NameFilter:
        """Make a filter and check its patterns against the names of linear layers and experts.

        Args:
            model: the model with the named layers.
            include, exclude: shell patterns.
            experts: names of experts, in addition to those that :func:`~ace_triton.decoders.blocks.stacks_of` finds.

        Raises:
            ArgumentError: if a pattern matches no layer.
        """
        wanted, unwanted = _patterns(include), _patterns(exclude)
        known = [name for name, _ in linears_of(model)]
        known += [stack.expert_name(i) for stack in stacks_of(model) for i in range(len(stack.weight))]
        known += experts
        for argument, patterns in (("include", wanted), ("exclude", unwanted)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise ArgumentError(
                        f"{argument} pattern {pattern!r} matches no linear layer; their names are like "
                        f"{', '.join(repr(name) for name in known[:3])} (shell patterns: '*.q_proj')"
                    )
        return cls(None if include is None else wanted, unwanted)

    def wants(self, name: str, *, outside: bool = False) -> bool:
        """True if the patterns select a layer; ``outside`` is True for a layer outside the blocks."""
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        if self.include is None:
            return not outside
        return any(fnmatchcase(name, pattern) for pattern in self.include)


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


@dataclass(frozen=True)
class Unit:
    """Layers that are pruned with the statistics of one pass: those of a block, or those outside the blocks.

    Attributes:
        name: name of the block.
        layers: layers to prune, by dotted name.
        feed_forward: all layers of the block outside attention, pruned or not, in which to find a layer's consumer.
            Empty unless the metric needs consumers.
    """

    name: str
    layers: dict[str, nn.Module]
    feed_forward: dict[str, nn.Module]

    @property
    def observed(self) -> dict[str, nn.Module]:
        """The layers whose inputs are collected."""
        return {**self.layers, **self.feed_forward}

    @property
    def names_inside(self) -> frozenset[str]:
        """Names of the observed layers inside the block, which are equal in blocks of one type."""
        return frozenset(map(self.name_inside, self.observed))

    def name_inside(self, name: str) -> str:
        """A layer's name without the name of the block."""
        return name.removeprefix(f"{self.name}.")


class Plan:
    """The layers that are pruned, and the weights that are not, with reasons.

    Args:
        model: the whole model, in evaluation mode.
        metric: the metric.
        needs: the statistics that the metric needs.
        pattern: the sparsity pattern.
        names: selects layers by name.
        towers: the model's towers that run, in order.
        stacks: weights of the blocks that may contain experts.
        layouts: layouts of the stacks, by name, from :func:`~ace_triton.decoders.experts.find_layouts`.

    Attributes:
        towers: the model's towers, each with one unit per block, up to the tower's last block with a layer to prune.
        outside: the selected layers outside the blocks, or None.
        skipped: weights that stay dense although their names are selected.
        excluded: weights in the blocks whose names are not selected.

    Raises:
        ArgumentError: if no layer is left to prune.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        needs: Needs,
        pattern: Sparsity,
        names: NameFilter,
        towers: Sequence[Tower],
        stacks: Sequence[Stack],
        layouts: Mapping[str, Layout],
    ) -> None:
        self.towers: list[tuple[Tower, list[Unit]]] = []
        self.outside: Unit | None = None
        self.skipped: list[Skipped] = []
        self.excluded: list[Excluded] = []
        self._stacks, self._layouts = stacks, layouts
        self._metric, self._needs, self._pattern, self._names = metric, needs, pattern, names
        self._parameters = sum(p.numel() for p in model.parameters())
        self._owners = Owners(model)
        self._done: set[str] = set()
        self._ledger = Ledger(model, [block.module for tower in towers for block in tower.blocks])
        self._storage: dict[str, _Storage] = {}
        for tower in towers:
            units = [self._unit(block) for block in tower.blocks]
            while units and not units[-1].layers:
                units.pop()
            self.towers.append((tower, units))
        self._add_outside(model)
        if not self.layers:
            raise ArgumentError(f"no layer of {type(model).__name__} can be pruned with these settings: {self._why()}")

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all towers."""
        return [block for tower, _ in self.towers for block in tower.blocks]

    @property
    def units(self) -> list[Unit]:
        """The units of all towers, then the layers outside the blocks if any are pruned."""
        inside = [unit for _, units in self.towers for unit in units]
        return [*inside, self.outside] if self.outside else inside

    @property
    def layers(self) -> dict[str, nn.Module]:
        """All layers to prune, by dotted name."""
        return {name: layer for unit in self.units for name, layer in unit.layers.items()}

    def shares(self, name: str) -> bool:
        """True if other layers use the weight of this layer too."""
        weight = self._owners.tensors.get(f"{name}.weight")
        return weight is not None and bool(self._owners.others(weight, f"{name}.weight"))

    def skip(self, name: str, weight: torch.Tensor, reason: str) -> None:
        """Record that a weight stays dense."""
        self.skipped.append(Skipped(name, reason, weight.numel(), weight.numel() / self._parameters))
        self._enter("skipped", name, weight.numel())

    def pruned(self, name: str, count: int) -> None:
        """Record that a layer with ``count`` weights was pruned."""
        self._done.add(name)
        self._enter("pruned", name, count)

    def close(self) -> Account:
        """The account. A layer of the plan that was neither pruned nor skipped is recorded as skipped."""
        missing = self.layers.keys() - self._done - {skipped.name for skipped in self.skipped}
        for name, layer in self.layers.items():
            if name in missing:
                self.skip(name, _weight(layer), "not recognized: planned but not pruned, which is a bug in ace_triton")
        return self._ledger.account()

    def _why(self) -> str:
        """Why no layer is pruned: the first reasons, and the number of all."""
        reasons = list(dict.fromkeys(skipped.reason for skipped in self.skipped))
        more = f"; and {len(reasons) - SHOWN_REASONS} more reasons" if len(reasons) > SHOWN_REASONS else ""
        return "; ".join(reasons[:SHOWN_REASONS]) + more if reasons else "include and exclude leave none"

    def _exclude(self, name: str, count: int) -> None:
        self.excluded.append(Excluded(name, count))
        self._enter("excluded", name, count)

    def _enter(self, kind: Kind, name: str, count: int) -> None:
        for parameter in self._storage[name].parameters:
            self._ledger.enter(kind, parameter, count)

    def _unit(self, block: Block) -> Unit:
        """The unit of a block; all its other matrices are recorded with reasons."""
        linears = dict(linears_of(block.module, block.name))
        self._storage |= {name: _Storage.of(name, layer) for name, layer in linears.items()}
        linears |= self._experts(block)
        reasons = dict.fromkeys(adapters(block.module, block.name), ADAPTER) | dict.fromkeys(routers(block), ROUTER)
        attention: set[str] = set()
        if self._needs.consumer or self._metric.skips_attention:
            attention = {name for name in linears if in_attention(block, name)}
        if self._metric.skips_attention:
            reasons |= dict.fromkeys(attention, f"method {self._metric.name!r} leaves attention dense")
        layers: dict[str, nn.Module] = {}
        for name, layer in linears.items():
            if not self._names.wants(name):
                self._exclude(name, _weight(layer).numel())
            elif self._accepts(name, layer, reasons.get(name)):
                layers[name] = layer
        rest = {name: layer for name, layer in linears.items() if name not in attention and name not in reasons}
        self._add_other_matrices(block, reasons)
        return Unit(block.name, layers, rest if self._needs.consumer else {})

    def _experts(self, block: Block) -> dict[str, ExpertLinear]:
        """The experts in a block's stacks as linear layers, if their layout is known and the metric supports it."""
        found: dict[str, ExpertLinear] = {}
        for stack in self._stacks:
            layout = self._layouts.get(stack.name)
            if layout is None or not stack.name.startswith(f"{block.name}."):
                continue
            if self._needs.consumer and not stack.concatenated:
                continue
            experts = stack.linears(transposed=layout.transposed, rows=layout.rows)
            self._storage |= dict.fromkeys(experts, _Storage(stack.name, (stack.weight,)))
            found |= experts
        return found

    def _add_other_matrices(self, block: Block, reasons: Mapping[str, str]) -> None:
        """Record the matrices of a block that are not in one of its linear layers or experts."""
        stored = {parameter for entry in self._storage.values() for parameter in entry.parameters}
        for path, module in block.module.named_modules(prefix=block.name):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter in stored or not self._ledger.rest(parameter):
                    continue
                name = path if key == "weight" else f"{path}.{key}"
                self._storage[name] = _Storage(f"{path}.{key}", (parameter,))
                if self._names.wants(name):
                    self.skip(name, parameter, reasons.get(name) or self._why_not_a_layer(module, parameter))
                else:
                    self._exclude(name, parameter.numel())

    def _why_not_a_layer(self, module: nn.Module, parameter: nn.Parameter) -> str:
        if isinstance(module, _ConvNd):
            return "a convolution"
        if isinstance(module, nn.Embedding):
            return "an embedding"
        stack = next((stack for stack in self._stacks if stack.weight is parameter and parameter.dim() == 3), None)
        if stack is None:
            return f"a parameter of a {type(module).__name__}, not the weight of a linear layer"
        if stack.name in self._layouts:
            return f"gate and up alternate in its experts, so method {self._metric.name!r} cannot tell them apart"
        return "a 3-D weight that no matrix product of the model's forward reads"

    def _add_outside(self, model: nn.Module) -> None:
        rest = {n: m for n, m in linears_of(model) if n not in self._storage and self._names.wants(n, outside=True)}
        self._storage |= {name: _Storage.of(name, layer) for name, layer in rest.items()}
        self._ledger.open(parameter for name in rest for parameter in self._storage[name].parameters)
        layers = {name: layer for name, layer in rest.items() if self._accepts(name, layer, None)}
        if layers:
            self.outside = Unit("outside the blocks", layers, {})

    def _accepts(self, name: str, layer: nn.Module, why_not: str | None) -> bool:
        weight = _weight(layer)
        tied = (
            []
            if computed_weight(layer)
            else self._owners.others(layer.get_parameter("weight"), self._storage[name].tensor)
        )
        if tied:
            why_not = f"its weight is tied to {tied[0].removesuffix('.weight')}"
        why_not = computed_weight(layer) or why_not
        if why_not is None and (self._pattern.axis or not self._needs.consumer):
            why_not = misfit(weight, self._pattern, self._pattern.axis or "in")
        if why_not is not None:
            self.skip(name, weight, why_not)
        return why_not is None


@dataclass(frozen=True)
class _Storage:
    """Where a layer's weight is stored.

    Attributes:
        tensor: dotted name of the weight, or of the stack that contains it.
        parameters: the parameters that contain its elements: one; several if the weight is computed from them; none
            if the weight is a buffer.
    """

    tensor: str
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> _Storage:
        """The storage of a linear layer's weight."""
        own = layer._parameters.get("weight")
        if own is not None:
            return cls(f"{name}.weight", (own,))
        sources = [
            *layer.named_parameters(recurse=False),
            *getattr(layer, "parametrizations", nn.Module()).named_parameters(),
        ]
        return cls(f"{name}.weight", tuple(p for key, p in sources if key.startswith("weight")))


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = linear_weight(layer)
    assert weight is not None
    return weight


class Misfit(str):
    """A reason to skip a weight: the pattern does not fit its size."""


def misfit(weight: torch.Tensor, pattern: Sparsity, axis: Axis) -> Misfit | None:
    """Why a pattern does not fit a weight [out_features, in_features] along an axis; None if it fits."""
    size = weight.shape[1] if axis == "in" else weight.shape[0]
    if pattern.m is None or size % pattern.m == 0:
        return None
    return Misfit(f"its {size} {'inputs' if axis == 'in' else 'outputs'} are not a multiple of {pattern.m}")
