"""The importance of each structure, by the method: from weights, from activations, or from gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..decoders.batches import Batch, run_model
from ..decoders.calibration_mode import calibration_mode
from ..decoders.collect import InputCollector
from ..errors import ArgumentError
from ..linears import linear_weight
from ..methods.registry import Needs
from ..statistics.activation import ActivationStats
from ..timing import Stopwatch
from .coupled import Coupled, Entry, Structures
from .fusion import fused, stabilized
from .gradients import llm_pruner_terms, taylor_terms
from .routed import contributions
from .settings import ShrinkSettings

Progress = Callable[[int, int], None]

InputStats = Mapping[str, Sequence[ActivationStats]]
"""Statistics of the inputs of each consumer, by name, one for each batch."""

Importance = dict[str, torch.Tensor]
"""Importance of the structures by name of the consumer, fp32 [n_structures], on the CPU."""


def importance_of(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    settings: ShrinkSettings,
    stats: InputStats | None = None,
    progress: Progress | None = None,
) -> Importance:
    """The importance of all structures.

    Args:
        model: the dense model; unchanged at return.
        structures: the structures.
        batches: the calibration set; empty for a method that needs none.
        settings: the method and its settings.
        stats: from :func:`input_statistics`; None to collect them if the method needs them.
        progress: called with the number of batches done, and of all batches.

    Raises:
        ArgumentError: if an importance has NaN or infinity, or gradients are needed and cannot be had.
    """
    entries = structures.entries.values()
    if settings.method == "magnitude":
        found = {entry.consumer: _magnitude(entry, structures) for entry in entries}
    elif settings.method == "llm-pruner":
        terms = taylor_terms(model, structures, batches, sums=settings.terms != "vector", progress=progress)
        found = {e.consumer: llm_pruner_terms(settings.terms, e, structures, terms[e.consumer]) for e in entries}
    elif settings.needs_gradients:
        terms = taylor_terms(model, structures, batches, sums=False, progress=progress)
        found = {name: _fused(taylor.vector(), taylor.element(), settings) for name, taylor in terms.items()}
    else:
        stats = stats or input_statistics(model, structures, batches, progress)
        scores = {"flap": _flap, "wanda-sp": _wanda_sp}
        columns = structures.columns.values()
        if settings.method == "saap":
            found = {e.consumer: _saap_of_activations(e, structures, stats[e.consumer], settings) for e in columns}
        else:
            score = scores[settings.method]
            found = {e.consumer: score(e, weight_of(structures, e), merged(stats[e.consumer])) for e in columns}
        if structures.mixtures:
            parts = contributions(model, structures.mixtures, batches, progress)
            found |= {n: stabilized(part) if settings.stability else part.mean(0) for n, part in parts.items()}
    for name, importance in found.items():
        if not bool(importance.isfinite().all()):
            raise ArgumentError(
                f"{name}: the importance has NaN or infinity; load the model in float32 or bfloat16 (--dtype float32), "
                "or check its weights"
            )
    return {name: importance.float().cpu() for name, importance in found.items()}


def input_statistics(
    model: nn.Module, structures: Structures, batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, list[ActivationStats]]:
    """Statistics of the inputs of each consumer in a forward of the dense model, one for each batch."""
    consumers = {name: structures.layers[name] for name in structures.columns}
    if not consumers:
        return {}
    found: dict[str, list[ActivationStats]] = {name: [] for name in consumers}
    clock = Stopwatch(next(model.parameters()).device)
    with calibration_mode(model):
        for number, batch in enumerate(batches):
            collector = InputCollector(consumers, Needs(), clock)
            with collector.batch(batch.shape, next(iter(batch.masks.values()), None)):
                run_model(model, batch)
            for name in consumers:
                if (stats := collector.statistics(name)) is not None:
                    found[name].append(stats)
            if progress is not None:
                progress(number + 1, len(batches))
    if missing := [name for name, stats in found.items() if not stats]:
        raise ArgumentError(f"no token of the calibration text reached {missing[0]}: give more text")
    return found


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


def _fused(vector: torch.Tensor, element: torch.Tensor, settings: ShrinkSettings) -> torch.Tensor:
    importance = fused(settings.fusion, vector, element)
    return stabilized(importance) if settings.stability else importance.mean(0)
