"""The registry of metrics. A metric turns a weight and the statistics of its input into :class:`ScoreTerms`.

Your own metric is a function of this form::

    @register_metric("wanda_squared")
    def wanda_squared(weight, stats):
        return ScoreTerms(scale=stats.norm, power=2)

The built-in metrics are the other modules of this package. They share one notation: i is an output, j an input, t a
token, and n_j the norm of input j as in Wanda.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from ..errors import RecipeError
from ..kernels.score_terms import ScoreTerms
from ..option_types import OptionType, check_options, option_types
from ..sparsity import Axis
from ..statistics.activation import ActivationStats, Reduce
from ..statistics.channel_moments import ChannelMoments
from ..statistics.gram import Gram
from ..statistics.statistic import Statistic, input_statistics
from ..statistics.token_sample import TokenSample

_LAYER_ARGUMENTS = {"layer", "stats", "weight", "method", "sparsity", "update", "quantize", "name", "return_mask"}
_MODEL_ARGUMENTS = {
    "model",
    "calibration",
    "sequential",
    "permute",
    "rotate",
    "budgets",
    "batch_size",
    "include",
    "exclude",
}
TAKEN = _LAYER_ARGUMENTS | _MODEL_ARGUMENTS | {"progress", "offload_folder"}
"""Names of arguments of prune_linear and prune_model. No option can have one of these names."""


@dataclass(frozen=True)
class Needs:
    """What a metric needs besides the weight.

    Attributes:
        tokens: statistics of the layer's input.
        outputs: statistics weighted by the layer's outputs.
        reduce: the coupling matrix, reduced over tokens by "abs" or "rms"; None for no matrix.
        consumer: the input norms of the layer that reads this layer's outputs.
        gram: the Gram matrix of the input.
        sample: some of the input's tokens.
        parts: other statistics of the layer's input: classes that are registered with
            :func:`~ace_triton.statistics.statistic.register_statistic`.
        relative_importance: the metric calls :func:`~ace_triton.kernels.weight_sums.relative_importance`. On a GPU,
            ``prune_model`` then sums each weight in the pass that checks it, and reads it once less.

    Raises:
        StatsError: if one of ``parts`` is not registered, or needs a layer's outputs.
        RecipeError: if ``parts`` are wanted without tokens.
    """

    tokens: bool = True
    outputs: bool = False
    reduce: Reduce | None = None
    consumer: bool = False
    gram: bool = False
    sample: bool = False
    parts: Sequence[type[Statistic]] = ()
    relative_importance: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", input_statistics(self.parts))
        if self.parts and not self.tokens:
            raise RecipeError("Needs(parts=...) are statistics of tokens: leave tokens=False out")

    @property
    def all_parts(self) -> tuple[type[Statistic], ...]:
        """The classes of all statistics of the layer's input."""
        kinds: list[type[Statistic]] = [ChannelMoments]
        kinds += [Gram] if self.gram else []
        kinds += [TokenSample] if self.sample else []
        return tuple(dict.fromkeys([*kinds, *self.parts]))


MetricFunction = Callable[..., ScoreTerms | torch.Tensor]
"""``(weight, stats, **options) -> ScoreTerms``, or the scores themselves: [out_features, in_features], 0 or more."""

Function = TypeVar("Function", bound=MetricFunction)

Solver = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""``(weight, stats, pattern, axis, **options) -> (weight, mask)``: fp32 [out_features, in_features] in and out."""


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: what users write as ``method=``.
        terms: the metric's function.
        needs: what the function needs, for given options.
        solve: prunes and updates a weight by itself; ``terms`` then rank the dense weights. None for a metric that only
            scores.
        consumer_axis: the direction of groups and rows in a layer whose :attr:`ActivationStats.consumer_norm` is known.
            All other layers use "in". A pattern with an axis overrides both.
        skips_attention: True if attention layers stay dense.
    """

    name: str
    terms: MetricFunction
    needs: Callable[[Mapping[str, Any]], Needs]
    solve: Solver | None = None
    consumer_axis: Axis = "in"
    skips_attention: bool = False

    @property
    def is_built_in(self) -> bool:
        """True for a function of this package: it does not read the vectors of the terms that it returns."""
        return self.terms.__module__.startswith(f"{__package__}.")

    @cached_property
    def types(self) -> dict[str, OptionType]:
        """The options and their allowed values, from the function's signature."""
        return option_types(self.terms, skip=2)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        return {option.name: option.default for option in self.types.values()}

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The given options, with defaults for the rest; ArgumentError for an unknown option or an invalid value."""
        return {**self.options, **check_options(self.types, options, f"method {self.name!r}")}

    def axis(self, stats: ActivationStats | None) -> Axis:
        """The direction of groups and rows in a layer with these statistics, if the pattern does not set one."""
        return self.consumer_axis if stats is not None and stats.consumer_norm is not None else "in"


_REGISTRY: dict[str, Metric] = {}


def register_metric(
    name: str,
    needs: Needs | Callable[[Mapping[str, Any]], Needs] | None = None,
    solve: Solver | None = None,
    *,
    consumer_axis: Axis = "in",
    skips_attention: bool = False,
) -> Callable[[Function], Function]:
    """Decorator: register a function ``(weight, stats, **options) -> ScoreTerms`` as a method.

    The function may instead return the scores: a tensor [out_features, in_features] of numbers that are 0 or more.
    Every option needs a default. Option values are checked against their annotations
    (:func:`~ace_triton.option_types.option_types`).

    Args:
        name: what users write as ``method=``.
        needs: what the function needs, or a function of its options that returns this. By default, the statistics of
            the input.
        solve: for a method that updates weights while it prunes.
        consumer_axis: the direction of groups in a layer whose ``stats.consumer_norm`` is known.
        skips_attention: True to leave attention layers dense.

    Raises:
        RecipeError: the name is taken, or an option has the name of an argument of prune_linear or prune_model.
        ArgumentError: an option has no default, or the function takes ``*args`` or ``**kwargs``.
    """
    needed = needs if callable(needs) else (lambda _options, fixed=needs or Needs(): fixed)

    def register(function: Function) -> Function:
        if name in _REGISTRY and _REGISTRY[name].terms.__module__ != function.__module__:
            raise RecipeError(f"there is a metric {name!r} already: choose another name")
        new = Metric(name, function, needed, solve, consumer_axis, skips_attention)
        if shadowed := sorted(TAKEN & new.types.keys()):
            raise RecipeError(
                f"metric {name!r}: its option {shadowed[0]!r} has the name of an argument of prune_linear or "
                "prune_model; choose another name"
            )
        _REGISTRY[name] = new
        return function

    return register


def metric(name: str) -> Metric:
    """The metric with this name; RecipeError with all known names if there is none."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise RecipeError(
            f"unknown method {name!r}: use one of {', '.join(metric_names())}, or your own after it is registered "
            "(on the command line with --plugin FILE.py)"
        )
    return _REGISTRY[name]


def metric_names() -> list[str]:
    """All registered names, in order of registration."""
    return list(_REGISTRY)
