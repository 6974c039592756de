"""Decides which layers of a model are pruned, in which units, and says why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from .blocks import Block, find_blocks, in_attention, linears_of, routers, stacks_of
from .experts import ExpertLinear
from .metrics import Needs
from .prune import linear_weight
from .sparsity import Axis, Sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Skipped:
    """A weight of the decoder blocks that was left dense.

    Attributes:
        name: its layer's dotted name, or its own where it stands alone.
        reason: why.
        parameters: how many.
        share: of the model's parameters.
    """

    name: str
    reason: str
    parameters: int
    share: float


@dataclass(frozen=True)
class NameFilter:
    """``include`` and ``exclude``: shell patterns on the dotted names of layers; None includes all blocks."""

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
    ) -> NameFilter:
        """Checked against the model's linear layers; ValueError for a pattern that matches none."""
        wanted, unwanted = _patterns(include), _patterns(exclude)
        known = [name for name, _ in linears_of(model)]
        known += [stack.expert_name(i) for stack in stacks_of(model) for i in range(len(stack.weight))]
        for argument, patterns in (("include", wanted), ("exclude", unwanted)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise ValueError(
                        f"{argument} pattern {pattern!r} matches no linear layer; their names are like "
                        f"{', '.join(repr(name) for name in known[:3])} (shell patterns: '*.q_proj')"
                    )
        return cls(None if include is None else wanted, unwanted)

    def wants(self, name: str, *, outside: bool = False) -> bool:
        """Whether a layer, inside or outside the blocks, is asked for."""
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        if self.include is None:
            return not outside
        return any(fnmatchcase(name, pattern) for pattern in self.include)


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


@dataclass(frozen=True)
class Unit:
    """Layers that are pruned by what one pass showed: those of a block, or those outside the blocks.

    Attributes:
        name: the block's.
        layers: to be pruned, by dotted name.
        feed_forward: for a metric that looks at a layer's consumer, where to look for one: the block's
            layers outside attention, pruned or not.
    """

    name: str
    layers: dict[str, nn.Module]
    feed_forward: dict[str, nn.Module]

    @property
    def observed(self) -> dict[str, nn.Module]:
        """The layers whose inputs are wanted."""
        return {**self.layers, **self.feed_forward}

    @property
    def names_inside(self) -> frozenset[str]:
        """Of the layers whose inputs are wanted, without the block's: blocks of a kind have the same."""
        return frozenset(map(self.name_inside, self.observed))

    def name_inside(self, name: str) -> str:
        """A layer's name without the block's."""
        return name.removeprefix(f"{self.name}.")


class Plan:
    """What is pruned, and what is not.

    Args:
        layouts: of the stacks of experts, as :func:`~ace_triton.experts.find_layouts` gives them.

    Attributes:
        blocks: the model's decoder blocks.
        units: one for each block, up to the last with a layer to prune.
        outside: layers outside the blocks that were asked for, or None.
        skipped: what stays dense though it was not ruled out by name.

    Raises:
        ValueError: no layer is left to prune.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str,
        needs: Needs,
        pattern: Sparsity,
        names: NameFilter,
        layouts: Mapping[str, bool],
    ) -> None:
        self.blocks = find_blocks(model)
        self._layouts = layouts
        self.units: list[Unit] = []
        self.outside: Unit | None = None
        self.skipped: list[Skipped] = []
        self._method, self._needs, self._pattern, self._names = method, needs, pattern, names
        self._parameters = sum(p.numel() for p in model.parameters())
        self._owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
        self._shared = {name for owners in self._owners.values() if len(owners) > 1 for name in owners}
        self._add_blocks()
        self._add_outside(model)
        if not self.layers:
            reasons = "; ".join(dict.fromkeys(s.reason for s in self.skipped)) or "include and exclude leave none"
            raise ValueError(f"no layer of {type(model).__name__} can be pruned so: {reasons}")

    @property
    def layers(self) -> dict[str, nn.Module]:
        """All layers to prune, by dotted name."""
        units = [*self.units, self.outside] if self.outside else self.units
        return {name: layer for unit in units for name, layer in unit.layers.items()}

    def shares(self, name: str) -> bool:
        """Whether a layer's weight serves other layers too."""
        return name in self._shared

    def skip(self, name: str, weight: torch.Tensor, reason: str) -> None:
        """Record that a weight stays dense."""
        self.skipped.append(Skipped(name, reason, weight.numel(), weight.numel() / self._parameters))

    def _add_blocks(self) -> None:
        for block in self.blocks:
            linears = {**dict(linears_of(block.module, block.name)), **self._experts(block)}
            dense = dict.fromkeys(routers(block), "routers stay dense")
            attention = {name for name in linears if self._needs.consumer and in_attention(block, name)}
            if self._method == "dass":
                dense |= dict.fromkeys(attention, "DaSS leaves attention dense")
            wanted = {name: layer for name, layer in linears.items() if self._names.wants(name)}
            layers = {name: layer for name, layer in wanted.items() if self._accepts(name, layer, dense.get(name))}
            rest = {n: layer for n, layer in linears.items() if n not in attention and n not in dense}
            self.units.append(Unit(block.name, layers, rest if self._needs.consumer else {}))
        while self.units and not self.units[-1].layers:
            self.units.pop()

    def _experts(self, block: Block) -> dict[str, ExpertLinear]:
        """The experts of a block's stacks; a stack that cannot be taken apart is recorded as skipped."""
        found: dict[str, ExpertLinear] = {}
        for stack in stacks_of(block.module, block.name):
            transposed = self._layouts.get(stack.name)
            if transposed is None:
                why_not = "a 3-D weight that no matrix product of the model's forward reads"
            elif self._needs.consumer and not stack.concatenated:
                why_not = "gate and up alternate in its experts, where DaSS cannot tell them apart"
            else:
                found |= stack.linears(transposed=transposed)
                continue
            if any(self._names.wants(stack.expert_name(i)) for i in range(len(stack.weight))):
                self.skip(stack.name, stack.weight, why_not)
        return found

    def _add_outside(self, model: PreTrainedModel) -> None:
        inside = {name for block in self.blocks for name, _ in linears_of(block.module, block.name)}
        rest = {n: m for n, m in linears_of(model) if n not in inside and self._names.wants(n, outside=True)}
        layers = {name: layer for name, layer in rest.items() if self._accepts(name, layer, None)}
        if layers:
            self.outside = Unit("outside the blocks", layers, {})

    def _accepts(self, name: str, layer: nn.Module, why_not: str | None) -> bool:
        weight = linear_weight(layer)
        assert weight is not None
        tied = [owner for owner in self._owners.get(id(layer.weight), ()) if owner != name]
        if tied:
            why_not = f"its weight is tied to {tied[0]}"
        elif why_not is None and (self._pattern.axis or not self._needs.consumer):
            why_not = misfit(weight, self._pattern, self._pattern.axis or "in")
        if why_not is not None:
            self.skip(name, weight, why_not)
        return why_not is None


def misfit(weight: torch.Tensor, pattern: Sparsity, axis: Axis) -> str | None:
    """Why a pattern cannot be laid over a weight [out_features, in_features] along an axis, or None."""
    size = weight.shape[1] if axis == "in" else weight.shape[0]
    if pattern.m is None or size % pattern.m == 0:
        return None
    return f"its {size} {'inputs' if axis == 'in' else 'outputs'} are no multiple of {pattern.m}"
