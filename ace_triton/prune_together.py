"""Prune many layers on a GPU at once: a launch for all of them, and no wait."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from .checked_terms import UnreadCheck, metric_terms, unread_terms
from .errors import PruneError
from .kernels.backend import backend_of_device
from .kernels.finite_check import FiniteCheck
from .kernels.pattern import check_pattern
from .kernels.score_terms import ScoreTerms
from .kernels.select_nm import check_selection
from .kernels.select_nm_group import select_nm_group
from .kernels.vector_group import VectorGroup
from .linears import KERNEL_DTYPES
from .prune import PruneResult, number_kept, prune_checked, statistics_for
from .recipe import Recipe
from .sparsity import Axis, Sparsity
from .statistics.activation import ActivationStats


@dataclass(frozen=True)
class LayerToPrune:
    """A layer, its checked weight and the statistics of its input.

    Attributes:
        name: the layer's name in errors and in the result.
        layer: the module.
        weight: what :func:`~ace_triton.weight_checks.check_weight` returned; no other layer uses it.
        stats: statistics of its input; None for a method that needs none.
    """

    name: str
    layer: nn.Module
    weight: torch.Tensor
    stats: ActivationStats | None


def suits(weight: torch.Tensor, recipe: Recipe) -> bool:
    """True if :func:`prune_together` takes a weight: n:m, scored by vectors on a GPU, without an update."""
    metric, pattern = recipe.metric, recipe.sparsity
    scores_only = metric.solve is None and recipe.update is None and recipe.quantize is None
    return (
        scores_only
        and pattern.n is not None
        and recipe.needs.reduce is None
        and weight.dtype in KERNEL_DTYPES
        and not weight.is_inference()
        and backend_of_device(weight.device) == "triton"
    )


def prune_together(
    layers: Sequence[LayerToPrune], recipe: Recipe, finite: FiniteCheck, unread: list[UnreadCheck]
) -> list[PruneResult]:
    """Prune layers that :func:`suits` allows, all on one device, by their statistics.

    The weights are those that pruning the layers one by one gives, bit for bit. If one weight or its score is out of
    range, no weight changes. A metric of a plugin may return a matrix of scores or a coupling; such a layer is pruned
    by itself.

    Args:
        layers: the layers.
        recipe: how to prune.
        finite: what is known of the weights.
        unread: takes the checks of the weights and their terms; the caller must then call
            :func:`~ace_triton.checked_terms.read_checks`.

    Raises:
        PruneError: if a layer cannot be pruned; no weight that is pruned by vectors was changed.
        StatsError: if statistics do not fit the layer or the method; likewise.
    """
    metric, pattern = recipe.metric, recipe.sparsity
    results: dict[str, PruneResult] = {}
    scored: list[tuple[LayerToPrune, ActivationStats | None, ScoreTerms]] = []
    with VectorGroup() if metric.is_built_in else nullcontext():
        for entry in layers:
            stats = statistics_for(entry.layer, entry.weight, entry.stats, recipe.needs, entry.name)
            terms = metric_terms(recipe, entry.weight, stats, entry.name, finite)
            if isinstance(terms, ScoreTerms) and terms.coupling is None:
                scored.append((entry, stats, terms))
            else:
                results[entry.name] = prune_checked(
                    entry.layer, entry.weight, stats, recipe, entry.name, finite, unread=unread, terms=terms
                )
    flags: list[torch.Tensor] = []
    by_axis: dict[Axis, tuple[list[torch.Tensor], list[ScoreTerms]]] = {}
    for entry, stats, terms in scored:
        name, weight, axis = entry.name, entry.weight, pattern.axis or metric.axis(stats)
        flags += unread_terms(terms, recipe, weight, stats, name, finite, unread)[1]
        _check(weight, terms, pattern, axis, name)
        same = by_axis.setdefault(axis, ([], []))
        same[0].append(weight)
        same[1].append(terms)
        kept = number_kept(weight, pattern, axis)
        results[name] = PruneResult(name, metric.name, str(pattern), axis, kept, weight.numel(), None)
    assert pattern.n is not None
    assert pattern.m is not None
    for axis, (weights, every) in by_axis.items():
        select_nm_group(weights, every, pattern.n, pattern.m, axis=axis, unless=flags)
    return [results[entry.name] for entry in layers]


def _check(weight: torch.Tensor, terms: ScoreTerms, pattern: Sparsity, axis: Axis, name: str) -> None:
    """PruneError if the terms or the pattern do not fit the weight."""
    assert pattern.n is not None
    assert pattern.m is not None
    try:
        check_selection(weight, terms, "weight")
        check_pattern(weight, pattern.n, pattern.m, axis)
    except ValueError as error:
        raise PruneError(f"{name}: {error}") from error
