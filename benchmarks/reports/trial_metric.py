"""The metric of the trials: Wanda's mask, with ideas of which the package has none.

A trial is a metric with a solver of its own, so that whole models are pruned by the package: block by block, each on
the outputs of the pruned blocks before it, with channels permuted if the recipe says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.methods.registry import Needs, register_metric
from ace_triton.option_types import Range
from ace_triton.prune import choose
from ace_triton.solvers.update import Update, gram_of, rescaled, updated_weight
from ace_triton.sparsity import Axis, Sparsity
from ace_triton.statistics.activation import ActivationStats
from ace_triton.statistics.channel_moments import ChannelMoments
from ace_triton.statistics.gram import Gram

from .exchanges import Settings, exchange_fitted, exchange_masks
from .low_rank import residual_product

NAME = "trial"

Solved = tuple[torch.Tensor, torch.Tensor]
"""Weights, fp32 [out_features, in_features], and their mask."""

_centered: WeakKeyDictionary[ActivationStats, dict[float, ActivationStats]] = WeakKeyDictionary()
"""Statistics with a centered Gram matrix, by share."""


class Biases:
    """Takes the mean error of each pruned layer into its bias.

    Args:
        model: its weights are float32, and pruned in place.
        all_layers: also give a bias to layers that have none.
    """

    def __init__(self, model: nn.Module, *, all_layers: bool) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._without = [layer for layer in layers if layer.bias is None]
        self._layers = layers if all_layers else [layer for layer in layers if layer.bias is not None]

    def correct(self, dense: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor) -> None:
        """Add the mean of what the layer lost, if it has a bias.

        Args:
            dense: the layer's own tensor, fp32 [out_features, in_features].
            weight: what it becomes, of the same shape.
            mean: of the layer's inputs, fp32 [in_features].
        """
        for layer in self._layers:
            if layer.weight.data_ptr() == dense.data_ptr():
                lost = (dense - weight) @ mean
                bias = lost if layer.bias is None else layer.bias.detach() + lost
                layer.bias = nn.Parameter(bias, requires_grad=False)

    def remove(self) -> None:
        """Remove the biases of layers that had none."""
        for layer in self._without:
            layer.bias = None


biases: list[Biases] = []
"""Those of the model that is being pruned, if its mean errors are taken into biases."""


def trial_weight(dense: torch.Tensor, stats: ActivationStats, pattern: Sparsity, axis: Axis, **options: Any) -> Solved:
    """Prune a layer as the options of :func:`trial` say.

    Args:
        dense: fp32 [out_features, in_features].
        stats: with a Gram matrix.
        pattern: n:m.
        axis: "in".
        options: of :func:`trial`, all of them.

    Returns:
        The weight and the mask. With ``rank`` the weight has values where the mask is False too.
    """
    target, product = dense, None
    for _ in range(options["rounds"] if options["rank"] else 1):
        weight, mask = _sparse(target, stats, pattern, axis, options)
        if options["rank"]:
            product = residual_product(dense - weight, stats, options["rank"])
            target = dense - product
    if product is not None:
        weight = weight + product
    if options["fit"]:
        weight = rescaled(weight, dense, centered(stats, options["fit_center"]) if biases else stats)
    for correction in biases:
        assert stats.mean is not None
        correction.correct(dense, weight, stats.mean.float())
    return weight, mask


@register_metric(NAME, Needs(gram=True), solve=trial_weight)
def trial(
    weight: torch.Tensor,
    stats: ActivationStats,
    fit: bool = False,
    sweeps: Annotated[int, Range(least=0)] = 0,
    score_center: Annotated[float, Range(least=0, most=1)] = 0.0,
    fit_center: Annotated[float, Range(least=0, most=1)] = 0.0,
    rank: Annotated[int, Range(least=0)] = 0,
    rounds: Annotated[int, Range(least=1)] = 1,
) -> ScoreTerms:
    """|W_ij| times the root of sum_t x_tj^2 - c T mean(x_j)^2.

    Args:
        weight: dense, [out_features, in_features].
        stats: of its inputs.
        fit: fit the kept weights by masked least squares.
        sweeps: number of passes that exchange kept and pruned weights; after the fit, if there is one.
        score_center: c, 1 for the standard deviation, which is STADE's score.
        fit_center: c for the Gram matrix of the fit.
        rank: of the low-rank product that is added to the weight.
        rounds: number of times that the weights and the low-rank product are computed in turn.
    """
    return ScoreTerms(scale=centered(stats, score_center).norm if score_center == 0 else _norm(stats, score_center))


def centered(stats: ActivationStats, share: float) -> ActivationStats:
    """The statistics with the Gram matrix G - c T mean mean^T, where c is the share."""
    if not share:
        return stats
    known = _centered.setdefault(stats, {})
    if share not in known:
        gram = gram_of(stats)
        assert gram.matrix is not None
        assert stats.mean is not None
        mean = stats.mean.float()
        matrix = gram.matrix.addr(mean, mean, alpha=-share * gram.count)
        moments = copy.copy(stats.part(ChannelMoments))
        known[share] = ActivationStats(stats.in_features, parts=[moments, Gram(stats.in_features, gram.count, matrix)])
    return known[share]


def _norm(stats: ActivationStats, share: float) -> torch.Tensor:
    assert stats.mean is not None
    assert stats.deviation is not None
    squares = stats.deviation + (1 - share) * stats.count * stats.mean.square()
    return stats.derive(("trial norm", share), lambda: squares.sqrt().float())


def _sparse(
    dense: torch.Tensor, stats: ActivationStats, pattern: Sparsity, axis: Axis, options: Mapping[str, Any]
) -> Solved:
    """The sparse part of the weight, before its rows are rescaled."""
    terms = trial(dense, stats, score_center=options["score_center"])
    settings = Settings(pattern, options["sweeps"])
    if not options["fit"]:
        mask = choose(dense, terms, pattern, axis, "mask")
        if options["sweeps"]:
            mask = exchange_masks(dense, mask, stats, settings)
        return dense.where(mask, 0.0), mask
    used = centered(stats, options["fit_center"])
    update = Update(rescale=False)
    weight, mask = updated_weight(dense, used, update, lambda w, out: choose(w, terms, pattern, axis, out))
    if options["sweeps"]:
        weight, mask = exchange_fitted(dense, weight, mask, used, settings)
    return weight, mask
