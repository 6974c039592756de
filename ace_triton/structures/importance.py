"""The importance of each structure, by the method: from weights, from activations, or from gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Tower
from ..decoders.collect import InputCollector
from ..errors import ArgumentError
from ..linears import linear_weight
from ..methods.registry import Needs
from ..statistics.activation import ActivationStats
from ..timing import Stopwatch
from .coupled import Entry, Structures
from .coupled_layers import Coupled
from .expert_channels import ExpertChannels
from .forwards import BlockWatcher, watch_blocks
from .fusion import fused, stabilized
from .gradients import SUMS, Sums, Taylor, llm_pruner_terms, taylor_terms
from .mixtures import Mixture
from .routed import Contributions
from .settings import ShrinkSettings
from .weights import Weights

Progress = Callable[[int, int], None]

Importance = dict[str, torch.Tensor]
"""Importance of the structures by name of the consumer, fp32 [n_structures], on the CPU."""


@dataclass
class Activations:
    """What was collected of the dense model's forwards, by name of the consumer.

    Attributes:
        inputs: statistics of the inputs of layers, one for each batch.
        routed: contributions of the experts of mixtures, fp32 [n_batches, n_experts].
    """

    inputs: dict[str, Sequence[ActivationStats]] = field(default_factory=dict)
    routed: dict[str, torch.Tensor] = field(default_factory=dict)


def importance_of(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    settings: ShrinkSettings,
    activations: Activations,
    progress: Progress | None = None,
) -> Importance:
    """The importance of all structures of a model in memory.

    Args:
        model: the dense model; unchanged at return.
        structures: the structures.
        batches: the calibration set; empty for a method that needs none.
        settings: the method and its settings.
        activations: from :func:`activations_of`; empty for a method that needs none.
        progress: called with the number of batches done, and of all batches.

    Raises:
        ArgumentError: if an importance has NaN or infinity, or gradients are needed and cannot be had.
    """
    entries = structures.entries.values()
    if not settings.needs_gradients:
        return {entry.consumer: score(entry, structures, settings, activations) for entry in entries}
    terms = taylor_terms(model, structures, batches, sums=sums_of(settings), progress=progress)
    return {entry.consumer: score_of_terms(entry, structures, settings, terms[entry.consumer]) for entry in entries}


def sums_of(settings: ShrinkSettings) -> Sums:
    """The sums over batches that an importance from gradients needs."""
    return SUMS[settings.terms] if settings.method == "llm-pruner" else ()


def score_of_terms(entry: Entry, structures: Structures, settings: ShrinkSettings, taylor: Taylor) -> torch.Tensor:
    """The importance of the structures of one kind in one block, by a method with gradients.

    Raises:
        ArgumentError: if it has NaN or infinity.
    """
    if not taylor.elements:  # An expert that no token was sent to.
        value = _magnitude(entry, structures)
    elif settings.method == "llm-pruner":
        value = llm_pruner_terms(settings.terms, entry, structures, taylor)
    else:
        value = _fused(taylor.vector(), taylor.element(), settings)
    return _finite(entry, value)


def score(entry: Entry, structures: Structures, settings: ShrinkSettings, activations: Activations) -> torch.Tensor:
    """The importance of the structures of one kind in one block, by a method without gradients.

    Raises:
        ArgumentError: if it has NaN or infinity.
    """
    name = entry.consumer
    if settings.method == "magnitude":
        return _finite(entry, _magnitude(entry, structures))
    if isinstance(entry, ExpertChannels):
        return _finite(entry, _inside_experts(entry, settings, activations))
    if isinstance(entry, Mixture):
        routed = activations.routed[name]
        return _finite(entry, stabilized(routed) if settings.stability else routed.mean(0))
    stats = activations.inputs.get(name, ())
    if entry.expert == "routed":
        return _finite(entry, _of_expert(weight_of(structures, entry), stats, settings))
    if settings.method == "saap":
        return _finite(entry, _saap_of_activations(entry, structures, stats, settings))
    by_method = {"flap": _flap, "wanda-sp": _wanda_sp}[settings.method]
    return _finite(entry, by_method(entry, weight_of(structures, entry), merged(stats)))


def _finite(entry: Entry, importance: torch.Tensor) -> torch.Tensor:
    if not bool(importance.isfinite().all()):
        raise ArgumentError(
            f"{entry.consumer}: the importance has NaN or infinity; load the model in float32 or bfloat16 (--dtype "
            "float32), or check its weights"
        )
    return importance.float().cpu()


def activations_of(
    model: nn.Module,
    tower: Tower,
    structures: Structures,
    batches: Sequence[Batch],
    weights: Weights,
    progress: Progress | None = None,
    after: Callable[[Sequence[Entry], Activations], None] | None = None,
) -> Activations:
    """What the methods without gradients need of a forward of the dense model.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        structures: the structures.
        batches: the calibration set.
        weights: where the model's weights are.
        progress: called with the number of steps done, and of all steps.
        after: called with the entries of each block and what was collected of them, while the block is in memory; then
            nothing is kept.

    Raises:
        ArgumentError: if no token reaches a layer, or a mixture did not run.
    """
    found = Activations()
    watchers = {
        index: _Block(structures, entries)
        for index, block in enumerate(tower.blocks)
        if (entries := structures.within(block))
    }

    def collected(index: int) -> None:
        if index not in watchers:
            return
        of_block = watchers.pop(index) if after is not None else watchers[index]
        own = of_block.activations()
        if after is None:
            found.inputs.update(own.inputs)
            found.routed.update(own.routed)
        else:
            after(of_block.entries, own)

    watch_blocks(model, tower, batches, dict(watchers), weights, progress, collected)
    return found


class _Block(BlockWatcher):
    """Collects the statistics and contributions of one block."""

    def __init__(self, structures: Structures, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._layers = {e.consumer: structures.layers[e.consumer] for e in entries if isinstance(e, Coupled)}
        self._inputs: dict[str, list[ActivationStats]] = {name: [] for name in self._layers}
        self._inside = [entry for entry in entries if isinstance(entry, ExpertChannels)]
        self._inputs |= {name: [] for entry in self._inside for name in entry.linear_names()}
        self._mixtures = {e.consumer: Contributions(e) for e in entries if isinstance(e, Mixture)}

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        for mixture in self._mixtures.values():
            mixture.watched(shape, valid, hooks)
        layers = dict(self._layers)
        for entry in self._inside:
            layers.update(zip(entry.linear_names(), entry.linears(), strict=True))
        if layers:
            collector = InputCollector(layers, Needs(), Stopwatch(_device(layers)))
            hooks.callback(self._keep, collector)
            hooks.enter_context(collector.batch(shape, valid))

    def _keep(self, collector: InputCollector) -> None:
        for name, found in self._inputs.items():
            if (stats := collector.statistics(name)) is not None:
                found.append(stats)

    def activations(self) -> Activations:
        """What was collected."""
        routed = {e.consumer for e in self.entries if isinstance(e, Coupled) and e.expert == "routed"}
        if missing := [name for name in self._layers if not self._inputs[name] and name not in routed]:
            raise ArgumentError(f"no token of the calibration text reached {missing[0]}: give more text")
        return Activations(dict(self._inputs), {name: found.of_batches() for name, found in self._mixtures.items()})


def _device(layers: Mapping[str, nn.Module]) -> torch.device:
    return next(parameter.device for layer in layers.values() for parameter in layer.parameters())


def weight_of(structures: Structures, entry: Coupled) -> torch.Tensor:
    """A consumer's weight, fp32 [out_features, in_features]."""
    weight = linear_weight(structures.layers[entry.consumer])
    assert weight is not None
    return weight.float()


def _magnitude(entry: Entry, structures: Structures) -> torch.Tensor:
    """The norm of all weights of a structure."""
    total: torch.Tensor | float = 0.0
    for part in entry.parts(structures.layers):
        total = total + entry.by_structure(part, part.tensor.detach().float().square())
    assert isinstance(total, torch.Tensor)
    return total.sqrt()


def merged(stats: Sequence[ActivationStats]) -> ActivationStats:
    """The statistics of all batches together."""
    whole = stats[0].with_outputs(None)
    for more in stats[1:]:
        whole.merge(more)
    return whole


def _flap(entry: Coupled, weight: torch.Tensor, stats: ActivationStats) -> torch.Tensor:
    """FLAP (arXiv 2312.11983): the variance of a channel times the squared norm of its column, summed."""
    return entry.by_column(weight.square() * stats.variance)


def _wanda_sp(entry: Coupled, weight: torch.Tensor, stats: ActivationStats) -> torch.Tensor:
    """Wanda-sp (in FLAP's paper): |W_ij| times the norm of channel j, summed over a structure."""
    return entry.by_column(weight.abs() * stats.norm)


def _saap_of_activations(
    entry: Coupled, structures: Structures, stats: Sequence[ActivationStats], settings: ShrinkSettings
) -> torch.Tensor:
    """SAAP's importance without gradients: the norm of a structure's contribution, and the sum of |W_ij| n_j."""
    weight = weight_of(structures, entry)
    norms = torch.stack([s.norm / max(s.count, 1) ** 0.5 for s in stats])
    elements = [entry.by_column(weight.abs() * norm) for norm in norms]
    vectors = [entry.by_column((weight * norm).square()).sqrt() for norm in norms]
    return _fused(torch.stack(vectors), torch.stack(elements), settings)


def _inside_experts(entry: ExpertChannels, settings: ShrinkSettings, activations: Activations) -> torch.Tensor:
    """The importance of the channels of each expert over the tokens that are sent to it, [experts, count]."""
    experts = zip(entry.columns(), entry.linear_names(), strict=True)
    return torch.stack([_of_expert(weight, activations.inputs.get(name, ()), settings) for weight, name in experts])


def _of_expert(weight: torch.Tensor, stats: Sequence[ActivationStats], settings: ShrinkSettings) -> torch.Tensor:
    """The importance of the channels of one expert, [count].

    An expert without tokens ranks its channels by the norm of their columns. Batches count together, because few tokens
    of a batch reach an expert.

    Args:
        weight: the weight of the layer that reads the channels, fp32 [out_features, count].
        stats: statistics of its inputs, one for each batch with tokens.
        settings: the method and its settings.
    """
    if not stats:
        return weight.norm(dim=0)
    whole = merged(stats)
    if settings.method == "flap":
        return (weight.square() * whole.variance).sum(0)
    if settings.method == "wanda-sp":
        return (weight.abs() * whole.norm).sum(0)
    norm = whole.norm / max(whole.count, 1) ** 0.5
    return _fused((weight * norm).norm(dim=0)[None], (weight.abs() * norm).sum(0)[None], settings)


def _fused(vector: torch.Tensor, element: torch.Tensor, settings: ShrinkSettings) -> torch.Tensor:
    importance = fused(settings.fusion, vector, element)
    return stabilized(importance) if settings.stability else importance.mean(0)
