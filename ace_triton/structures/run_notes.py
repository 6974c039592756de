"""What a user should know of a run of structured pruning, as notes of its report."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from .coupled import Structures
from .coupled_layers import NAMES, Kind
from .settings import ShrinkSettings


def notes_on(
    model: nn.Module,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    with_bias: Collection[str],
    settings: ShrinkSettings,
    *,
    uneven: bool,
) -> list[str]:
    """The notes on what is kept.

    Args:
        model: the dense model.
        structures: its structures.
        kept: indices of the kept structures by name of the consumer.
        with_bias: names of the consumers that have, or get, a bias.
        settings: with the update and what is removed of experts.
        uneven: True if the feed-forwards get different widths.
    """
    notes, columns = [], [name for name in kept if name in structures.columns]
    if settings.chosen_update == "bias" and len(with_bias) < len(columns):
        kinds = sorted(by_kind(structures, [name for name in columns if name not in with_bias]))
        which = " and ".join(NAMES[kind] for kind in kinds)
        notes.append(f"no bias was written for {which}: {type(model).__name__} has no place for it")
    if uneven:
        sizes = [len(kept[entry.consumer]) for entry in structures.coupled["channels"]]
        notes.append(
            f"feed-forward widths run from {min(sizes)} to {max(sizes)}: ace_triton.load_model and the commands of "
            "ace-triton load this model, plain transformers does not; the compiled decoding step does not take it, "
            "so it generates more slowly on a CPU"
        )
    if settings.chosen_update != "none" and len(columns) < len(kept):
        what = "experts" if settings.experts == "whole" else "channels of experts"
        notes.append(f"no update makes up for removed {what}; it is for channels and key-value groups")
    return notes


def by_kind(structures: Structures, names: Collection[str]) -> dict[Kind, list[str]]:
    """Names of layers that read channels and groups, by kind; other names are left out."""
    found: dict[Kind, list[str]] = {}
    for name in names:
        if name in structures.columns:
            found.setdefault(structures.columns[name].kind, []).append(name)
    return found
