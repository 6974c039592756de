"""A choice as JSON types, for the journal of a run that may be interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..decoders.blocks import Block, linears_of
from .choice import Choice
from .compensation import Moments
from .coupled import Entry, Structures
from .coupled_layers import Coupled, Kind
from .expert_channels import ExpertChannels, channels_inside
from .mixtures import Mixture, mixtures_in


def record_of(choice: Choice) -> dict[str, Any]:
    """A choice as JSON types, without its moments."""
    return {
        "coupled": {kind: [_entry(entry) for entry in of] for kind, of in choice.structures.coupled.items()},
        "refused": dict(choice.structures.refused),
        "kept": {name: chosen.tolist() for name, chosen in choice.kept.items()},
        "changes": choice.changes,
        "widths": {kind: list(counts) for kind, counts in choice.widths.items()},
        "removed": choice.removed,
        "blocks": None if choice.blocks is None else list(choice.blocks),
        "sizes": list(choice.sizes),
        "with_bias": sorted(choice.with_bias),
        "tried": {str(groups): loss for groups, loss in choice.tried.items()},
        "notes": list(choice.notes),
    }


def _entry(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Mixture):
        return {"consumer": entry.consumer, "chosen": entry.chosen}
    if isinstance(entry, ExpertChannels):
        return {"consumer": entry.consumer, "transposed": entry.layouts[-1].dim == 1}
    producers = [list(pair) for pair in entry.producers]
    return {"consumer": entry.consumer, "producers": producers, "count": entry.count, "expert": entry.expert}


def choice_of(record: Mapping[str, Any], blocks: Sequence[Block], moments: Mapping[str, Moments]) -> Choice:
    """The choice of a record.

    Args:
        record: from :func:`record_of`, of the same model.
        blocks: the blocks of the dense model.
        moments: those of the choice.
    """
    layers = {name: layer for block in blocks for name, layer in linears_of(block.module, block.name)}
    mixtures = mixtures_in(blocks)
    mixtures = () if isinstance(mixtures, str) else mixtures
    experts = [entry for entry in record["coupled"].get("expert_channels", ()) if "transposed" in entry]
    sides = {entry["consumer"]: entry["transposed"] for entry in experts}
    homes = [mixture.consumer for mixture in mixtures]
    stacked = [mixture for mixture in mixtures if not mixture.lists]
    inside = channels_inside(stacked, {h: sides[n] for h in homes for n in sides if n.startswith(f"{h}.")})
    whole = {mixture.consumer: mixture for mixture in mixtures}
    channels = {} if isinstance(inside, str) else {entry.consumer: entry for entry in inside}
    coupled: dict[Kind, tuple[Entry, ...]] = {}
    for kind, entries in record["coupled"].items():
        coupled[kind] = tuple(
            replace(whole[entry["consumer"]], chosen=entry["chosen"])
            if kind == "experts"
            else channels[entry["consumer"]]
            if "transposed" in entry
            else Coupled(
                kind, entry["consumer"], tuple((n, c) for n, c in entry["producers"]), entry["count"], entry["expert"]
            )
            for entry in entries
        )
    structures = Structures(layers, coupled, record["refused"])
    kept = {name: torch.tensor(of, dtype=torch.int64, device="cpu") for name, of in record["kept"].items()}
    return Choice(
        structures,
        kept,
        record["changes"],
        {kind: (before, after) for kind, (before, after) in record["widths"].items()},
        record["removed"],
        None if record["blocks"] is None else tuple(record["blocks"]),
        tuple(record["sizes"]),
        frozenset(record["with_bias"]),
        moments,
        {int(groups): loss for groups, loss in record["tried"].items()},
        tuple(record["notes"]),
    )
