"""The metrics: a weight and its input's statistics in, :class:`ScoreTerms` out.

A metric of your own is a function of the same form::

    @register_metric("wanda_squared")
    def wanda_squared(weight, stats):
        return ScoreTerms(scale=stats.norm, power=2)

Notation: i an output, j an input, t a token; n_j is Wanda's input norm. ACE's paper (arXiv 2505.21987)
leaves some choices open; what is marked *reconstructed* below is ours and is an option, not a fact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import torch

from ..errors import RecipeError
from ..kernels.column_scale import ColumnScale, checked_column_scale
from ..kernels.score_terms import ScoreTerms
from ..kernels.variance_factor import VarianceNorm, variance_factor
from ..kernels.weight_sums import relative_importance, weight_sums
from ..option_types import OptionType, Range, check_options, option_types
from ..statistics.activation import ActivationStats, Reduce, StatsError
from .sparsegpt import sparsegpt, sparsegpt_weight

Base = Literal["wanda", "ria", "magnitude"]
CosineReduce = Literal["exact", "abs", "rms"]
Prefactor = Literal["none", "relative", "wanda", "ria"]
Sign = Literal[1, -1]
Epsilon = Annotated[float, Range(above=0, below=1)]

_OF_A_LAYER = {"layer", "stats", "weight", "method", "sparsity", "update", "name", "return_mask"}
_OF_A_MODEL = {"model", "calibration", "sequential", "permute", "budgets", "batch_size", "include", "exclude"}
TAKEN = _OF_A_LAYER | _OF_A_MODEL | {"progress"}
"""Names of arguments of prune_linear and prune_model, which options cannot have."""


@dataclass(frozen=True)
class Needs:
    """What a metric must be given beside the weight.

    Attributes:
        tokens: statistics of the layer's input.
        outputs: token weights of the layer's own outputs too.
        reduce: the coupling matrix as well, reduced so.
        consumer: the input norms of the layer that consumes this one's outputs.
        gram: the Gram matrix of the input.
        sample: some of its tokens.
        weight_sums: sums over all of the weight, which make the terms NaN where a weight is NaN or infinite: nobody
            need look for those beforehand.
    """

    tokens: bool = True
    outputs: bool = False
    reduce: Reduce | None = None
    consumer: bool = False
    gram: bool = False
    sample: bool = False
    weight_sums: bool = False


MetricFunction = Callable[..., ScoreTerms | torch.Tensor]
"""``(weight, stats, **options) -> ScoreTerms``, or the scores themselves: [out_features, in_features], 0 or more."""

Function = TypeVar("Function", bound=MetricFunction)

Solver = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""``(weight, stats, pattern, axis, **options) -> (weight, mask)``: fp32 [out_features, in_features] in and out."""


@dataclass(frozen=True)
class Metric:
    """A registered metric: its function, and what it needs as a function of its options.

    A method with a ``solve`` prunes and updates weights by itself; its terms rank the dense weights.
    """

    name: str
    terms: MetricFunction
    needs: Callable[[Mapping[str, Any]], Needs]
    solve: Solver | None = None

    @cached_property
    def types(self) -> dict[str, OptionType]:
        """The options and the values that they take, from the function's signature."""
        return option_types(self.terms, skip=2)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options with their defaults."""
        return {option.name: option.default for option in self.types.values()}

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` over the defaults; ValueError for an unknown option or a value that it does not take."""
        return {**self.options, **check_options(self.types, options, f"method {self.name!r}")}


_REGISTRY: dict[str, Metric] = {}


def register_metric(
    name: str,
    needs: Needs | Callable[[Mapping[str, Any]], Needs] | None = None,
    solve: Solver | None = None,
) -> Callable[[Function], Function]:
    """Decorator: make a function ``(weight, stats, **options) -> ScoreTerms`` a method by this name.

    The function may also return the scores themselves, a tensor [out_features, in_features] of numbers from 0 on.
    Every option has a default. Values of options are checked by their annotations
    (:func:`~ace_triton.option_types.option_types`).

    Args:
        name: what users write as ``method=``.
        needs: what it must be given; a function of its options where that depends on them. Left out:
            the input's statistics.
        solve: for a method that updates weights while it prunes.

    Raises:
        ValueError: the name is taken, or the function has options that cannot be passed on.
    """
    needed = needs if callable(needs) else (lambda _options, fixed=needs or Needs(): fixed)

    def register(function: Function) -> Function:
        if name in _REGISTRY and _REGISTRY[name].terms.__module__ != function.__module__:
            raise RecipeError(f"there is a metric {name!r} already: choose another name")
        new = Metric(name, function, needed, solve)
        if shadowed := sorted(TAKEN & new.types.keys()):
            raise RecipeError(
                f"metric {name!r}: its option {shadowed[0]!r} has the name of an argument of prune_linear or "
                "prune_model; choose another name"
            )
        _REGISTRY[name] = new
        return function

    return register


def metric(name: str) -> Metric:
    """The metric of that name; ValueError with the known names if it is unknown."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise RecipeError(f"unknown method {name!r}: use one of {', '.join(metric_names())}")
    return _REGISTRY[name]


def metric_names() -> list[str]:
    """All registered names, in order of registration."""
    return list(_REGISTRY)


@register_metric("magnitude", Needs(tokens=False))
def magnitude(weight: torch.Tensor, stats: ActivationStats | None) -> ScoreTerms:
    """|W_ij|."""
    return ScoreTerms()


@register_metric("wanda")
def wanda(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """|W_ij| n_j (Sun et al., arXiv 2306.11695, equation 1)."""
    return ScoreTerms(scale=stats.norm)


@register_metric("ria", Needs(weight_sums=True))
def ria(weight: torch.Tensor, stats: ActivationStats, a: float = 0.5) -> ScoreTerms:
    """(|W_ij| / C_j + |W_ij| / R_i) n_j^a (Zhang et al., "Plug-and-Play", ICLR 2024).

    R_i and C_j are the row and column sums of |W|, in fp32: quotients in fp16 would fall below its
    normal range.
    """
    return relative_importance(weight, ColumnScale(base=_norm_to(stats, a)))


@register_metric("stade")
def stade(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """|W_ij| std(x_j), the root of STADE's W_ij^2 var(x_j). No bias is moved (METHODS of STADE do so
    optionally, to little effect)."""
    return ScoreTerms(scale=stats.standard_deviation)


@register_metric("dass", Needs(consumer=True))
def dass(weight: torch.Tensor, stats: ActivationStats, alpha: float = 0.5) -> ScoreTerms:
    """DaSS (arXiv 2405.01943): |W_ij| m_i^alpha for gate and up projections, Wanda for the others.

    m_i is the norm of input channel i of the down projection that gate and up feed. The factor is one
    number a row, so groups must run along the outputs; grouped along the inputs it is magnitude.
    """
    if stats.consumer_norm is None:
        return wanda(weight, stats)
    return ScoreTerms(row=stats.consumer_norm**alpha)


def _cosp_needs(options: Mapping[str, Any]) -> Needs:
    base = options["base"] if "base" in options else options["prefactor"]
    reduce = None if options["reduce"] == "exact" else options["reduce"]
    return Needs(outputs=True, reduce=reduce, weight_sums=base in ("relative", "ria"))


@register_metric("cosp", _cosp_needs)
def cosp(
    weight: torch.Tensor,
    stats: ActivationStats,
    reduce: CosineReduce = "exact",
    prefactor: Prefactor | None = None,
) -> ScoreTerms:
    """ACE's cosine metric: how much removing a weight turns the layer's output.

    Args:
        weight: [out_features, in_features].
        stats: with outputs.
        reduce: "exact": |W_ij| sqrt(mean_t x_tj^2 / s_t), the root of the leading term of 1 - cos
            (its a_i^2 / s_t correction dropped); one vector, no GEMM. "abs" and "rms": the published
            first-order loss |W_ij| mean_t |a_ti x_tj| / s_t, or its root mean square over tokens
            (the reduction over tokens is *reconstructed*); scores of these two carry a factor of the layer.
        prefactor: what multiplies it: "wanda" gives the published |W_ij| n_j L_ij, "ria" uses RIA's
            score instead, "none" nothing; "relative" puts RIA's relative importance |W_ij| / C_j + |W_ij| / R_i
            in the place of |W_ij|. None: "none" for "exact", "wanda" for the published losses.
    """
    if reduce not in ("exact", "abs", "rms"):
        raise RecipeError(f"reduce must be 'exact', 'abs' or 'rms', got {reduce!r}")
    return _times_cosine(weight, stats, prefactor or ("none" if reduce == "exact" else "wanda"), reduce)


@register_metric("varp", lambda options: Needs(weight_sums=options["base"] == "ria"))
def varp(
    weight: torch.Tensor,
    stats: ActivationStats,
    base: Base = "ria",
    norm: VarianceNorm = "max_layer",
    sign: Sign = 1,
    power: float = 1.0,
    eps: Epsilon = 0.01,
) -> ScoreTerms:
    """ACE's variance metric: a base score times f_j = mean_s (1 - y_sj)^(-power).

    y_sj is the squared norm of channel j over sequence s, normalised below 1 (*reconstructed*: the
    paper's normaliser is not known). The paper's literal metric has base="magnitude"; its tables use it
    on Wanda and RIA. Why these defaults: alone the factor is close to magnitude pruning (two to three
    times Wanda's perplexity in our trial); divided by the layer's largest entry it lifts only outlier
    channels, which RIA's square root of n_j under-weights, and there it helped, by about 2 %.

    Args:
        weight: [out_features, in_features].
        stats: of the input.
        base: "ria", "wanda" or "magnitude".
        norm: "max_layer": y over the largest of the layer; "max_sequence": over the largest of each
            sequence; "channel": over the channel's own largest (pure dispersion); "frobenius": over the
            sum of each sequence (the one for which the paper's power series converges).
        sign: +1 multiplies by f_j, -1 divides.
        power: 1 as printed, 0.5 for the root that a consistent derivation carries.
        eps: y stays at or below 1 - eps.
    """
    if base not in ("ria", "wanda", "magnitude"):
        raise RecipeError(f"base must be 'ria', 'wanda' or 'magnitude', got {base!r}")
    factor = _variance_factor(stats, norm, power, eps)
    return _on_columns(weight, base == "ria", ColumnScale(base=_base_scale(stats, base), factor=factor, sign=sign))


@register_metric("ace", _cosp_needs)
def ace(
    weight: torch.Tensor,
    stats: ActivationStats,
    base: Prefactor = "relative",
    reduce: CosineReduce = "exact",
    norm: VarianceNorm = "frobenius",
    sign: Sign = -1,
    power: float = 1.0,
    eps: Epsilon = 0.01,
) -> ScoreTerms:
    """ACE (arXiv 2505.21987): base score times CosP, over VarP.

    Options as in :func:`cosp` (whose prefactor is here the base) and :func:`varp`. The default takes the exact
    second-order cosine term on RIA's relative importance, and the normaliser for which VarP's power series
    converges. It divides by VarP, where the paper multiplies: that holds back the few channels that carry much of a
    sequence's energy. docs/guides/patterns-and-recipes.md compares the two. The published form is :func:`ace_paper`.
    """
    return _times_cosine(weight, stats, base, reduce, _variance_factor(stats, norm, power, eps), sign)


@register_metric("ace-paper", _cosp_needs)
def ace_paper(
    weight: torch.Tensor,
    stats: ActivationStats,
    base: Prefactor = "wanda",
    reduce: CosineReduce = "abs",
    norm: VarianceNorm = "max_layer",
    sign: Sign = 1,
    power: float = 1.0,
    eps: Epsilon = 0.01,
) -> ScoreTerms:
    """ACE as published: Wanda's score times the first-order cosine loss times VarP.

    How the loss is reduced over tokens and how VarP's norms are normalised is *reconstructed*. Options as in
    :func:`ace`.
    """
    return ace(weight, stats, base, reduce, norm, sign, power, eps)


@register_metric("saap", Needs(weight_sums=True))
def saap(weight: torch.Tensor, stats: ActivationStats) -> ScoreTerms:
    """SAAP's adaptive fusion (arXiv 2412.15127) of two importances: a weight's own and its channel's.

    |W_ij| n_j is fused with sum_i |W_ij| n_j = C_j n_j. SAAP weighs importances by learned noise scales; with one
    for each structure these have a closed form, in which the fused order is that of the product. The paper's own
    importances are Taylor terms, which need gradients, of heads and channels that it removes whole: only its
    fusion is here, and *reconstructed*.
    """
    sums = weight_sums(weight)
    return ScoreTerms(col=sums.col, scale=_norm_to(stats, 2), not_finite=sums.not_finite)


register_metric("sparsegpt", Needs(gram=True), solve=sparsegpt_weight)(sparsegpt)


def _norm_to(stats: ActivationStats, power: float) -> torch.Tensor:
    """n_j^power, fp32 [in_features]."""
    return stats.derive(("norm", power), lambda: stats.norm**power)


def _base_scale(stats: ActivationStats, base: Base | Prefactor) -> torch.Tensor | None:
    """What a base score's columns are multiplied by, fp32 [in_features]; None for 1."""
    if base == "wanda":
        return stats.norm
    return _norm_to(stats, 0.5) if base == "ria" else None


def _on_columns(weight: torch.Tensor, relative: bool, scale: ColumnScale | None, power: int = 1) -> ScoreTerms:
    """Terms of |W|, or of its relative importance, to a ``power`` of the weight, with a scale of columns."""
    if relative:
        terms = relative_importance(weight, scale)
        return terms if power == 1 else replace(terms, power=power)
    if scale is None:
        return ScoreTerms(power=power)
    vector, not_finite = checked_column_scale(scale)
    return ScoreTerms(scale=vector, power=power, not_finite=not_finite)


def _times_cosine(
    weight: torch.Tensor,
    stats: ActivationStats,
    base: Prefactor,
    reduce: CosineReduce,
    factor: torch.Tensor | None = None,
    sign: int = 1,
) -> ScoreTerms:
    """The cosine term on a base (none: alone), with a column ``factor`` of its own, to the power ``sign``."""
    if reduce not in ("exact", "abs", "rms"):
        raise RecipeError(f"reduce must be 'exact', 'abs' or 'rms', got {reduce!r}")
    if base not in ("none", "relative", "wanda", "ria"):
        raise RecipeError(f"CosP's base or prefactor must be 'none', 'relative', 'wanda' or 'ria', got {base!r}")
    relative, power = base in ("relative", "ria"), 2 if base in ("wanda", "ria") else 1
    of_base = _base_scale(stats, base)
    if stats.outputs is None:
        raise StatsError(
            "CosP weighs tokens by the layer's outputs, which these statistics do not hold: pass raw tokens, "
            "or collect with ActivationStats.from_tokens(tokens, layer=layer)"
        )
    if reduce == "exact":
        square, divisor = stats.outputs.weighted_square_and_divisor()
        return _on_columns(weight, relative, ColumnScale(square, divisor, of_base, factor, sign), power)
    if stats.outputs.reduce != reduce:
        raise StatsError(
            f"reduce={reduce!r} needs the coupling matrix, but these statistics were collected with "
            f"reduce={stats.outputs.reduce!r}: collect with ActivationStats.from_tokens(..., reduce={reduce!r})"
        )
    scale = None if of_base is None and factor is None else ColumnScale(base=of_base, factor=factor, sign=sign)
    terms = _on_columns(weight, relative, scale, power)
    return replace(terms, coupling=stats.outputs.relative_coupling())


def _variance_factor(stats: ActivationStats, norm: VarianceNorm, power: float, eps: float) -> torch.Tensor:
    return stats.derive(
        ("variance_factor", norm, power, eps), lambda: variance_factor(stats.sequence_square, norm, power, eps)
    )
