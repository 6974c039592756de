"""How many structures of each kind are removed from every block, so that the parameters meet the ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.blocks import Block
from ..errors import ArgumentError
from ..tied import memory_of
from .coupled import Structures
from .coupled_layers import NAMES, Kind
from .expert_channels import ExpertChannels
from .settings import ShrinkSettings
from .smaller import possible_biases, shapes_of
from .uneven import uneven_widths

BYTES_OF_AN_ENTRY = 128
"""Upper limit of the bytes that a safetensors file takes for a tensor beside its values and its name."""

ROW_BYTES = 16
"""The rows of matrices that ``grouped_mm`` of torch multiplies by have a multiple of this size."""


@dataclass(frozen=True)
class Share:
    """A way to meet the ratio, equal in all blocks.

    Attributes:
        channels, groups: number of structures removed from each block.
        parameters: number of parameters removed from all blocks.
        experts: number of experts removed from each mixture.
        expert_channels: number of channels removed from each expert.
    """

    channels: int
    groups: int
    parameters: int
    experts: int = 0
    expert_channels: int = 0

    def left(self, structures: Structures) -> dict[Kind, int]:
        """Number of structures left in each block, of the kinds of which some are removed."""
        removed: dict[Kind, int] = {
            "channels": self.channels,
            "groups": self.groups,
            "experts": self.experts,
            "expert_channels": self.expert_channels,
        }
        return {kind: structures.count(kind) - number for kind, number in removed.items() if number}


def block_parameters(blocks: Sequence[Block]) -> int:
    """Number of parameters of all blocks; a shared one counts once."""
    return sum(p.numel() for p in {p for block in blocks for p in block.module.parameters()})


def possible_shares(
    structures: Structures,
    settings: ShrinkSettings,
    needed: int,
    added: Mapping[Kind, int] | None = None,
) -> list[Share]:
    """All ways to remove enough, one for each number of groups; the least number of channels or experts each.

    Channels go; or experts, or the channels inside them, if they have more parameters.

    Args:
        structures: the structures.
        settings: with groups and multiple.
        needed: least number of parameters to remove.
        added: parameters that the update adds if structures of a kind are removed. As many more are removed.

    Raises:
        ArgumentError: if there is none.
    """
    cost = {
        kind: sum(structures.scaled(entry, 1) * entry.parameters(structures.layers) for entry in entries)
        for kind, entries in structures.coupled.items()
    }
    n_groups = structures.count("groups")
    if settings.groups is not None and settings.groups > max(n_groups - 1, 0):
        allowed = f"at most {n_groups - 1} can go" if n_groups else structures.refused.get("groups", "it has none")
        raise ArgumentError(f"groups {settings.groups}: each block has {n_groups} key-value groups, and {allowed}")
    kinds: tuple[Kind, ...] = ("channels", "experts", "expert_channels")
    main = max(kinds, key=lambda kind: cost.get(kind, 0) * structures.count(kind))
    found: list[Share] = []
    more = added or {}
    for groups in range(max(n_groups, 1)) if settings.groups is None else (settings.groups,):
        rest = needed - groups * cost.get("groups", 0) + (more.get("groups", 0) if groups else 0)
        rest += more.get(main, 0) if rest > 0 else 0
        gone = _fewest(structures, main, math.ceil(rest / cost[main]), settings) if rest > 0 and main in cost else 0
        if gone is not None and (rest <= 0 or gone):
            numbers = {kind: gone if kind == main else 0 for kind in kinds}
            parameters = gone * cost.get(main, 0) + groups * cost.get("groups", 0)
            whole, inside = numbers["experts"], numbers["expert_channels"]
            found.append(Share(numbers["channels"], groups, parameters, whole, inside))
        if rest <= 0:
            break
    if not found:
        raise ArgumentError(_nothing_left(structures, settings))
    return found


def check_rows(model: nn.Module, structures: Structures, share: Share) -> None:
    """Raise ArgumentError if transformers cannot run experts of the width that a share leaves.

    Its default for experts in one tensor, torch's ``grouped_mm``, needs rows of a multiple of 16 bytes.
    """
    grouped = getattr(model, "_can_set_experts_implementation", lambda: False)()
    for entry in structures.coupled.get("expert_channels", ()) if share.expert_channels and grouped else ():
        if isinstance(entry, ExpertChannels):
            width, tensor = entry.count - share.expert_channels, next(entry.parts()).tensor
            step = ROW_BYTES // tensor.element_size()
            if width % step:
                raise ArgumentError(
                    f"experts of {width} channels would be left, and torch's grouped_mm runs experts in "
                    f"{str(tensor.dtype).removeprefix('torch.')} if the number is a multiple of {step}: give "
                    f"--multiple {step}"
                )


def _fewest(structures: Structures, kind: Kind, wanted: int, settings: ShrinkSettings) -> int | None:
    """The least number of channels or experts that may go, at least ``wanted``; None if too few are left."""
    count = structures.count(kind)
    if kind == "experts":
        chosen = max(mixture.chosen for mixture in structures.mixtures.values())
        return wanted if count - wanted >= chosen else None
    kept = (count - wanted) // settings.multiple * settings.multiple
    return count - kept if kept >= settings.multiple else None


def _nothing_left(structures: Structures, settings: ShrinkSettings) -> str:
    refused = "; ".join(f"no {NAMES[kind]} ({reason})" for kind, reason in structures.refused.items())
    width, experts = structures.count("channels"), structures.count("experts")
    steps = f"{width} channels in multiples of {settings.multiple}" if width else ""
    if inside := structures.count("expert_channels"):
        more = f"{inside} channels of each expert in multiples of {settings.multiple}"
        steps = ", ".join(filter(None, (steps, more)))
    if experts:
        chosen = max(mixture.chosen for mixture in structures.mixtures.values())
        steps = ", ".join(filter(None, (steps, f"{experts - chosen} of {experts} experts, as tokens use {chosen}")))
    more = f"; of this model can go: {', '.join(filter(None, (steps, refused)))}" if steps or refused else ""
    asked = f"ratio {settings.ratio:g}" if settings.size is None else f"size {settings.size:,} bytes"
    asked = asked if settings.speedup is None else f"speedup {settings.speedup:g}"
    smaller = "smaller --ratio" if settings.size is None else "larger --size"
    return (
        f"{asked} leaves nothing of a feed-forward or an attention{more}: give a {smaller} or --multiple, or "
        "--method depth"
    )


def kept_structures(
    structures: Structures, importance: Mapping[str, torch.Tensor], share: Share, settings: ShrinkSettings
) -> dict[str, torch.Tensor]:
    """The kept structures by name of the consumer: the most important ones, in their order; ties keep the later one.

    Args:
        structures: the structures.
        importance: of all structures, by name of the consumer.
        share: how many are removed; the mean over blocks if widths are uneven.
        settings: with widths and multiple.
    """
    found = {}
    for kind, number in share.left(structures).items():
        entries = structures.coupled[kind]
        removed = [entry.count - structures.scaled(entry, number) for entry in entries]
        if kind == "channels" and settings.widths == "uneven":
            removed = uneven_widths([importance[e.consumer] for e in entries], share.channels, settings.multiple)
        for entry, gone in zip(entries, removed, strict=True):
            ascending = importance[entry.consumer].sort(dim=-1, stable=True).indices
            found[entry.consumer] = ascending[..., gone:].sort(dim=-1).values
    return found


def needed_parameters(model: nn.Module, blocks: Sequence[Block], settings: ShrinkSettings) -> int:
    """The least number of parameters to remove, from the ratio, the size of the checkpoint, or the number of blocks.

    A speed-up is that of fewer whole blocks here; :mod:`ace_triton.structures.speed` measures that of narrower ones.

    Raises:
        ArgumentError: if the model has the size already, or what lies outside the blocks is larger.
    """
    whole = block_parameters(blocks)
    if settings.speedup is not None:
        return math.ceil((1 - 1 / settings.speedup) * whole)
    if settings.size is None:
        return math.ceil(settings.ratio * whole)
    before, each = checkpoint_bytes(shapes_of(model)), next(model.parameters()).element_size()
    outside = before - each * whole
    if settings.size >= before:
        raise ArgumentError(f"size {settings.size:,} bytes: the model has {before:,} bytes, so nothing needs to go")
    if settings.size <= outside:
        raise ArgumentError(
            f"size {settings.size:,} bytes: what lies outside the blocks has {outside:,} bytes alone, and it stays"
        )
    return math.ceil((before - settings.size) / each)


def added_parameters(model: nn.Module, settings: ShrinkSettings) -> dict[Kind, int]:
    """Upper limit of the parameters that an update adds if structures of a kind are removed: its new biases.

    If the size of the checkpoint is given, the entries of the biases in the file count too. A speed-up counts none.
    """
    if settings.chosen_update != "bias" or settings.speedup is not None:
        return {}
    biases = possible_biases(model)
    if settings.size is None:
        return {kind: sum(tensor.numel() for tensor in new.values()) for kind, new in biases.items()}
    each = next(model.parameters()).element_size()
    return {kind: math.ceil(checkpoint_bytes(new) / each) for kind, new in biases.items()}


def checkpoint_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a checkpoint of tensors by name, which a file holds beside them; shared memory counts once."""
    once = {(memory_of(t), t.storage_offset()): (name, t) for name, t in tensors.items()}
    return sum(tensor.nbytes + len(name) + BYTES_OF_AN_ENTRY for name, tensor in once.values())


def n_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; a shared one counts once."""
    return sum(parameter.numel() for parameter in set(model.parameters()))
