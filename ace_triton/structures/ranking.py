"""Ranks the structures of a model, in memory or block by block from files, and reuses what earlier runs have found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Tower
from .block_gradients import terms_by_block
from .compensation import Moments
from .coupled import Entry, Structures
from .gradients import Taylor
from .importance import (
    Activations,
    Importance,
    activations_of,
    importance_of,
    merged,
    score,
    score_of_terms,
    sums_of,
)
from .settings import ShrinkSettings
from .weights import Weights

Ranked = tuple[Importance, dict[str, Moments]]
"""The importance of all structures; and the moments of the inputs of their consumers, if an update needs them."""

Stage = Callable[..., AbstractContextManager[Callable[..., None]]]
"""Takes the name of a stage and of the part of :class:`Earlier` that it finds; gives a function that shows progress."""


@dataclass
class Earlier:
    """What runs on one model and calibration set have found, so that later runs with other settings reuse it.

    Attributes:
        structures: the structures; None before the first run.
        activations: those of the dense model, by the part of experts that may go.
        importance: by the settings that it depends on.
        influence: of blocks, with the sizes of their tuples; None if no run needed it.
        seconds: time that each part took, by a name of it.
    """

    structures: Structures | None = None
    activations: dict[str, Activations] = field(default_factory=dict)
    importance: dict[object, Importance] = field(default_factory=dict)
    influence: tuple[torch.Tensor, list[int | None]] | None = None
    seconds: dict[object, float] = field(default_factory=dict)


def ranked(
    model: nn.Module,
    tower: Tower,
    structures: Structures,
    batches: Sequence[Batch],
    settings: ShrinkSettings,
    weights: Weights,
    earlier: Earlier,
    stage: Stage,
) -> Ranked:
    """The importance of all structures; and, for update "bias", the moments of the inputs of their consumers.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        structures: the structures.
        batches: the calibration set.
        settings: the method and its settings.
        weights: where the model's weights are.
        earlier: what earlier runs in memory have found; this one adds to it.
        stage: measures a stage.
    """
    columns = structures.columns.keys() if settings.chosen_update == "bias" else ()
    if weights.in_files:
        return _from_files(model, tower, structures, batches, settings, weights, stage, columns)
    activations = Activations()
    if settings.needs_statistics:
        with stage("statistics", ("statistics", settings.experts)) as step:
            if settings.experts not in earlier.activations:
                found = activations_of(model, tower, structures, batches, weights, step)
                earlier.activations[settings.experts] = found
            activations = earlier.activations[settings.experts]
    ranking = settings.ranking
    with stage("importance", ranking) as step:
        if ranking not in earlier.importance:
            earlier.importance[ranking] = importance_of(model, structures, batches, settings, activations, step)
    moments = {name: Moments.of(merged(activations.inputs[name])) for name in columns}
    return earlier.importance[ranking], moments


def _from_files(
    model: nn.Module,
    tower: Tower,
    structures: Structures,
    batches: Sequence[Batch],
    settings: ShrinkSettings,
    weights: Weights,
    stage: Stage,
    columns: Collection[str],
) -> Ranked:
    """As :func:`ranked`: what was collected of a block is dropped once the block is ranked."""
    importance: Importance = {}
    moments: dict[str, Moments] = {}

    def rank(entries: Sequence[Entry], activations: Activations) -> None:
        for entry in () if settings.needs_gradients else entries:
            importance[entry.consumer] = score(entry, structures, settings, activations)
        inputs = activations.inputs
        moments.update({name: Moments.of(merged(inputs[name])) for name in inputs if name in columns})

    def rank_by_terms(entries: Sequence[Entry], terms: Mapping[str, Taylor]) -> None:
        for entry in entries:
            importance[entry.consumer] = score_of_terms(entry, structures, settings, terms[entry.consumer])

    if settings.needs_gradients:
        if settings.needs_statistics:
            with stage("statistics") as step:
                activations_of(model, tower, structures, batches, weights, step, rank)
        with stage("importance") as step:
            terms_by_block(
                model, tower, structures, batches, weights, rank_by_terms, sums=sums_of(settings), progress=step
            )
        return importance, moments
    with stage("importance") as step:
        if settings.needs_statistics:
            activations_of(model, tower, structures, batches, weights, step, rank)
            return importance, moments
        for index, block in enumerate(tower.blocks):
            with weights.loaded(block.module):
                rank(structures.within(block), Activations())
            step(index + 1, len(tower.blocks))
    return importance, moments
