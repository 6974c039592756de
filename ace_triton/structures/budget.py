"""How many structures of each kind are removed from every block, so that the parameters meet the ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.blocks import Block
from ..errors import ArgumentError
from .coupled import NAMES, Kind, Structures
from .settings import ShrinkSettings


@dataclass(frozen=True)
class Share:
    """A way to meet the ratio, equal in all blocks.

    Attributes:
        channels, groups: number of structures removed from each block.
        parameters: number of parameters removed from all blocks.
    """

    channels: int
    groups: int
    parameters: int

    def left(self, structures: Structures) -> dict[Kind, int]:
        """Number of structures left in each block, of the kinds of which some are removed."""
        removed: dict[Kind, int] = {"channels": self.channels, "groups": self.groups}
        return {kind: structures.count(kind) - number for kind, number in removed.items() if number}


def block_parameters(blocks: Sequence[Block]) -> int:
    """Number of parameters of all blocks; a shared one counts once."""
    return sum(p.numel() for p in {p for block in blocks for p in block.module.parameters()})


def possible_shares(structures: Structures, blocks: Sequence[Block], settings: ShrinkSettings) -> list[Share]:
    """All ways to remove at least the ratio, one for each number of groups; the least number of channels each.

    Raises:
        ArgumentError: if there is none.
    """
    needed = math.ceil(settings.ratio * block_parameters(blocks))
    cost = {
        kind: sum(entry.parameters(structures.layers) for entry in entries)
        for kind, entries in structures.coupled.items()
    }
    width, n_groups = structures.count("channels"), structures.count("groups")
    if settings.groups is not None and settings.groups > max(n_groups - 1, 0):
        allowed = f"at most {n_groups - 1} can go" if n_groups else structures.refused.get("groups", "it has none")
        raise ArgumentError(f"groups {settings.groups}: each block has {n_groups} key-value groups, and {allowed}")
    found: list[Share] = []
    for groups in range(max(n_groups, 1)) if settings.groups is None else (settings.groups,):
        rest = needed - groups * cost.get("groups", 0)
        channels = 0
        if rest > 0:
            if not width:
                continue
            kept = (width - math.ceil(rest / cost["channels"])) // settings.multiple * settings.multiple
            if kept < settings.multiple:
                continue
            channels = width - kept
        found.append(Share(channels, groups, channels * cost.get("channels", 0) + groups * cost.get("groups", 0)))
        if rest <= 0:
            break
    if not found:
        raise ArgumentError(_nothing_left(structures, settings))
    return found


def _nothing_left(structures: Structures, settings: ShrinkSettings) -> str:
    refused = "; ".join(f"no {NAMES[kind]} ({reason})" for kind, reason in structures.refused.items())
    width = structures.count("channels")
    steps = f"{width} channels in multiples of {settings.multiple}" if width else ""
    more = f"; of this model can go: {', '.join(filter(None, (steps, refused)))}" if steps or refused else ""
    return (
        f"ratio {settings.ratio:g} leaves nothing of a feed-forward or an attention{more}: give a smaller --ratio or "
        "--multiple, or --method depth"
    )


def kept_structures(
    structures: Structures, importance: Mapping[str, torch.Tensor], share: Share
) -> dict[str, torch.Tensor]:
    """The kept structures by name of the consumer: the most important ones, in their order; ties keep the later one."""
    found = {}
    for kind, number in share.left(structures).items():
        for entry in structures.coupled[kind]:
            ascending = importance[entry.consumer].sort(stable=True).indices
            found[entry.consumer] = ascending[entry.count - number :].sort().values
    return found


def n_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; a shared one counts once."""
    return sum(parameter.numel() for parameter in set(model.parameters()))
