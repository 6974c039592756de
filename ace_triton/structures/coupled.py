"""Finds structures that can be removed as a whole, and proves by a trial run that nothing else depends on their order.

A channel of a feed-forward is a row of gate and up and a column of down. A key-value group is the rows of k and v, the
rows of q of all query heads that share them, and the columns of o. Candidates are the channel folds that
:mod:`ace_triton.reordering` proves, and the experts of :mod:`ace_triton.structures.mixtures`. The trial reorders whole
structures in all blocks at once, runs the model, and restores the weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.batches import Batch, run_model, tensors_in
from ..decoders.blocks import Block, linears_of
from ..decoders.calibration_mode import calibration_mode
from ..decoders.layer_roles import attention_of, routers
from ..errors import ArgumentError
from ..linears import linear_weight
from ..reordering.fold import Fold
from ..reordering.reorder import Folds, find_folds
from ..tied import Owners
from .coupled_layers import Coupled, Kind
from .expert_channels import ExpertChannels, are_transposed, channels_inside
from .expert_modules import channels_of_modules, shared_channels
from .mixtures import Mixture, find_mixtures
from .weights import InMemory, Weights

Entry = Coupled | Mixture | ExpertChannels
"""The structures of one kind in one block."""


@dataclass(frozen=True)
class Structures:
    """The structures that a model has.

    Attributes:
        layers: linear layers of the blocks, by name.
        coupled: by kind, one entry for each block, in order; of experts, one for each block with a mixture; of channels
            inside experts, one for each expert that is a module, and shared experts last. A kind is absent if it cannot
            be removed.
        refused: why a kind cannot be removed.
    """

    layers: Mapping[str, nn.Module]
    coupled: Mapping[Kind, tuple[Entry, ...]]
    refused: Mapping[Kind, str]

    def with_entries(self, kind: Kind, entries: tuple[Entry, ...]) -> Structures:
        """These structures with other entries of a kind."""
        return Structures(self.layers, {**self.coupled, kind: entries}, self.refused)

    def without(self, kind: Kind, reason: str) -> Structures:
        """These structures without a kind."""
        rest = {name: entries for name, entries in self.coupled.items() if name != kind}
        return Structures(self.layers, rest, {**self.refused, kind: reason})

    def of_experts(self, which: str) -> Structures:
        """These structures with "whole" experts alone, or with the "channels" inside experts alone.

        Raises:
            ArgumentError: if the channels are wanted, and there are none that can go.
        """
        other: Kind = "expert_channels" if which == "whole" else "experts"
        if which == "channels" and "expert_channels" not in self.coupled:
            reason = self.refused.get("expert_channels", "no block has a mixture of experts that can be told apart")
            raise ArgumentError(f"experts 'channels': {reason}; remove whole experts (--experts whole)")
        coupled = {kind: entries for kind, entries in self.coupled.items() if kind != other}
        return Structures(self.layers, coupled, {k: reason for k, reason in self.refused.items() if k != other})

    @property
    def entries(self) -> dict[str, Entry]:
        """All entries by name of the consumer; those of attention first."""
        kinds: tuple[Kind, ...] = ("groups", "channels", "experts", "expert_channels")
        return {entry.consumer: entry for kind in kinds for entry in self.coupled.get(kind, ())}

    def within(self, block: Block) -> list[Entry]:
        """The entries of a block."""
        return [entry for name, entry in self.entries.items() if f"{name}.".startswith(f"{block.name}.")]

    @property
    def columns(self) -> dict[str, Coupled]:
        """The entries whose consumer is a linear layer that reads all tokens, by its name."""
        coupled = {name: entry for name, entry in self.entries.items() if isinstance(entry, Coupled)}
        return {name: entry for name, entry in coupled.items() if entry.expert != "routed"}

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by name."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, Mixture)}

    def count(self, kind: Kind) -> int:
        """Number of structures in a block; 0 if the kind cannot be removed."""
        return self.coupled[kind][0].count if kind in self.coupled else 0

    def scaled(self, entry: Entry, number: int) -> int:
        """A number of structures of an entry that is the same share as ``number`` of :meth:`count`.

        They differ for shared experts, which may be several times as wide as others.
        """
        return number * entry.count // self.count(entry.kind)


def find_structures(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, weights: Weights | None = None
) -> Structures:
    """Find the structures that all blocks have in equal number.

    Args:
        model: the model; unchanged at return, bit for bit.
        blocks: its blocks.
        batch: a few inputs, for the trial.
        weights: where the model's weights are; None for memory.
    """
    owners = Owners(model)

    def is_shared(name: str) -> bool:
        weight = owners.tensors.get(f"{name}.weight")
        return weight is None or bool(owners.others(weight, f"{name}.weight"))

    with calibration_mode(model):
        folds = find_folds(model, blocks, batch, 1, wanted=lambda _: True, shared=is_shared)
        coupled: dict[Kind, tuple[Entry, ...]] = {}
        refused: dict[Kind, str] = {}
        for kind in ("channels", "groups"):
            found: list[Coupled] = []
            for block in blocks:
                entry = _coupled(kind, block, folds.proven)
                if isinstance(entry, str):
                    unfolded = {name.name: name.reason for name in folds.unfolded}
                    own = [n for n in unfolded if n.startswith(f"{block.name}.") and _kind_of(block, n) == kind]
                    refused[kind] = f"{own[0]}: {unfolded[own[0]]}" if own else f"{block.name}: {entry}"
                    break
                found.append(entry)
            if kind in refused:
                continue
            if len(numbers := sorted({entry.count for entry in found})) > 1:
                refused[kind] = f"blocks have different numbers of them ({', '.join(map(str, numbers))})"
            elif numbers == [1]:
                refused[kind] = "each block has only one"
            else:
                coupled[kind] = tuple(found)
        mixtures = find_mixtures(model, blocks, batch, lambda name: bool(owners.others(owners.tensors[name], name)))
        if isinstance(mixtures, str):
            refused["experts"] = mixtures
        elif mixtures is not None:
            coupled["experts"] = mixtures
            inside = _inside(mixtures, blocks, folds, lambda: run_model(model, batch))
            if isinstance(inside, str):
                refused["expert_channels"] = inside
            else:
                coupled["expert_channels"] = inside
        result = Structures(folds.layers, coupled, refused)
        for kind in list(coupled):
            if not _unchanged(model, result, kind, batch, blocks, weights or InMemory()):
                result = result.without(kind, "the model computes something else if their order changes")
    return result


def _inside(
    mixtures: Sequence[Mixture], blocks: Sequence[Block], folds: Folds, run: Callable[[], object]
) -> tuple[Entry, ...] | str:
    """The channels inside the experts of mixtures, shared experts last; or why they cannot be told apart."""
    found: list[Entry] = []
    stacked = [mixture for mixture in mixtures if not mixture.lists]
    inside = channels_inside(stacked, are_transposed(run, stacked))
    if isinstance(inside, str):
        return inside
    found += inside
    for mixture in mixtures:
        if mixture.lists:
            entries = channels_of_modules(mixture, folds)
            if isinstance(entries, str):
                return f"{mixture.consumer}: {entries}"
            found += entries
    if len(numbers := sorted({entry.count for entry in found})) > 1:
        return f"experts have different numbers of them ({', '.join(map(str, numbers))})"
    for mixture in mixtures:
        block = next(block for block in blocks if f"{mixture.consumer}.".startswith(f"{block.name}."))
        found += shared_channels(block, mixture, folds, numbers[0])
    return tuple(found)


def _kind_of(block: Block, layer: str) -> Kind:
    return "channels" if attention_of(block, layer) is None else "groups"


def _coupled(kind: Kind, block: Block, proven: Mapping[str, Fold]) -> Coupled | str:
    """The structures of a block, or the reason why it has none."""
    folds = [
        fold for name, fold in proven.items() if name.startswith(f"{block.name}.") and _kind_of(block, name) == kind
    ]
    if len(folds) != 1:
        what = "feed-forward whose channels can be told apart" if kind == "channels" else "attention with whole groups"
        more = f"{len(folds)} of them, and one is expected" if folds else f"no {what}"
        experts = kind == "channels" and routers(block)
        return "its feed-forward is a mixture of experts" if experts else more
    (fold,) = folds
    linears = dict(linears_of(block.module, block.name))
    rows = {name: weight.shape[0] for name, layer in linears.items() if (weight := linear_weight(layer)) is not None}
    if kind == "channels":
        return Coupled(kind, fold.consumer, tuple((p, rows[p] // fold.width) for p in fold.producers), fold.width)
    home = attention_of(block, fold.consumer)
    members = [
        name
        for name in linears
        if name != fold.consumer and attention_of(block, name) == home and rows[name] % fold.pools == 0
    ]
    return Coupled(kind, fold.consumer, tuple((name, 1) for name in members), fold.pools)


LOOSE, CLOSE = 0.1, 1e-3
"""Largest relative change of outputs that counts as rounding: in 16-bit types, and in fp32."""


def same_outputs(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    """True if a model's floating-point outputs agree up to rounding."""

    def close(one: torch.Tensor, other: torch.Tensor) -> bool:
        tolerance = LOOSE if other.element_size() < 4 else CLOSE
        difference = (one.float() - other.float()).norm()
        return one.shape == other.shape and bool(difference <= tolerance * other.float().norm())

    return len(got) == len(want) > 0 and all(map(close, got, want))


def outputs_of(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The floating-point outputs of a model's forward."""
    return [tensor.clone() for tensor in tensors_in(run_model(model, batch)) if tensor.is_floating_point()]


def _unchanged(
    model: nn.Module, structures: Structures, kind: Kind, batch: Batch, blocks: Sequence[Block], weights: Weights
) -> bool:
    """True if the model computes the same with the structures of a kind in another order."""
    dense = outputs_of(model, batch)
    generator = torch.Generator().manual_seed(0)
    entries, orders = structures.coupled[kind], {}
    for count in {entry.count: None for entry in entries}:
        order = torch.randperm(count, generator=generator, device="cpu")
        orders[count] = order.roll(1) if bool((order == torch.arange(count, device="cpu")).all()) else order
    reordered = _reordered_as_it_runs if weights.in_files else _reordered
    with reordered(structures, entries, orders, blocks) as names:
        same = same_outputs(outputs_of(model, batch), dense)
    return same and names == {entry.consumer for entry in entries}


@contextmanager
def _reordered(
    structures: Structures, entries: Sequence[Entry], orders: Mapping[int, torch.Tensor], _blocks: Sequence[Block]
) -> Iterator[set[str]]:
    """A context in which structures have another order; at exit the weights are restored bit for bit.

    It gives the names of the consumers that were reordered. ``orders`` has an order for each number of structures.
    """
    for entry in entries:
        entry.reorder(structures.layers, orders[entry.count])
    try:
        yield {entry.consumer for entry in entries}
    finally:
        for entry in entries:
            entry.reorder(structures.layers, orders[entry.count].argsort())


@contextmanager
def _reordered_as_it_runs(
    structures: Structures, entries: Sequence[Entry], orders: Mapping[int, torch.Tensor], blocks: Sequence[Block]
) -> Iterator[set[str]]:
    """As :func:`_reordered`, but each block is reordered only while it runs, and so is in memory."""
    names: set[str] = set()
    wanted = {entry.consumer for entry in entries}
    with ExitStack() as hooks:
        for block in blocks:
            own = [entry for entry in structures.within(block) if entry.consumer in wanted]

            def reorder(_module: nn.Module, _args: object, own: list[Entry] = own) -> None:
                for entry in own:
                    entry.reorder(structures.layers, orders[entry.count])
                    names.add(entry.consumer)

            def restore(_module: nn.Module, _args: object, _output: object, own: list[Entry] = own) -> None:
                for entry in own:
                    entry.reorder(structures.layers, orders[entry.count].argsort())

            hooks.callback(block.module.register_forward_pre_hook(reorder).remove)
            hooks.callback(block.module.register_forward_hook(restore, prepend=True, always_call=True).remove)
        yield names
