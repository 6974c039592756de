"""ACE (arXiv 2505.21987): its cosine metric CosP, its variance metric VarP, and both together.

The paper leaves some choices open. A choice marked *reconstructed* is ours, and an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch

from ..errors import RecipeError
from ..kernels.column_scale import ColumnScale
from ..kernels.finite_check import FiniteCheck
from ..kernels.score_terms import ScoreTerms
from ..kernels.variance_factor import VarianceNorm
from ..kernels.vector_group import grouped_column_scale, grouped_variance_factor
from ..kernels.weight_sums import relative_importance
from ..option_types import OneOf, Range
from ..statistics.activation import ActivationStats, StatsError
from .registry import Needs, register_metric
from .wanda_ria import norm_to_power

Base = Literal["wanda", "ria", "magnitude"]
CosineReduce = Literal["exact", "abs", "rms"]
Prefactor = Literal["none", "relative", "wanda", "ria"]
Sign = Literal[1, -1]
Epsilon = Annotated[float, Range(above=0, below=1)]


def _cosp_needs(options: Mapping[str, Any]) -> Needs:
    reduce = None if options["reduce"] == "exact" else options["reduce"]
    relative = (options["base"] if "base" in options else options["prefactor"]) in ("relative", "ria")
    return Needs(outputs=True, reduce=reduce, relative_importance=relative)


def _varp_needs(options: Mapping[str, Any]) -> Needs:
    return Needs(relative_importance=options["base"] == "ria")


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
        reduce: "exact": |W_ij| sqrt(mean_t x_tj^2 / s_t), the square root of the leading term of 1 - cos, without its
            correction a_i^2 / s_t; one vector, no matrix product. "abs" and "rms": the published first-order loss
            |W_ij| mean_t |a_ti x_tj| / s_t, or its root mean square over tokens. The reduction over tokens is
            *reconstructed*. Scores of "abs" and "rms" carry a constant factor that differs per layer.
        prefactor: the factor on the cosine term. "wanda": the published |W_ij| n_j L_ij. "ria": RIA's score instead
            of Wanda's. "relative": RIA's relative importance |W_ij| / C_j + |W_ij| / R_i replaces |W_ij|. "none": no
            factor. None: "none" for "exact", "wanda" for the published losses.
    """
    if reduce not in ("exact", "abs", "rms"):
        raise RecipeError(f"reduce must be 'exact', 'abs' or 'rms', got {reduce!r}")
    return _times_cosine(weight, stats, prefactor or ("none" if reduce == "exact" else "wanda"), reduce)


@register_metric("varp", _varp_needs)
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

    y_sj is the squared norm of channel j over sequence s, normalized below 1. The normalization is *reconstructed*: the
    paper does not give it. The paper's literal metric has base="magnitude"; its tables use it on Wanda and RIA.

    Reason for the defaults: on magnitude, the factor changes little. Divided by the layer's largest entry, it raises
    only outlier channels, to which RIA's square root of n_j gives too little weight.

    Args:
        weight: [out_features, in_features].
        stats: statistics of the input.
        base: "ria", "wanda" or "magnitude".
        norm: what divides the squared norms. "max_layer": the layer's largest. "max_sequence": the largest of each
            sequence. "channel": the channel's own largest (pure dispersion). "frobenius": the sum over each sequence,
            for which the paper's power series converges.
        sign: +1 multiplies by f_j, -1 divides by f_j.
        power: 1 as printed; 0.5 for the square root of a consistent derivation.
        eps: y is at most 1 - eps.
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
    a: Annotated[float, OneOf(1, 0.75, 0.5)] = 1.0,
) -> ScoreTerms:
    """ACE (arXiv 2505.21987), changed: base score times CosP, divided by VarP.

    By default the score is RIA's relative importance times the exact second-order cosine term, with the normalization
    for which VarP's power series converges. It divides by VarP, where the paper multiplies. Dividing lowers the few
    channels that carry much of a sequence's energy. docs/guides/patterns-and-recipes.md compares the two. The
    published form is :func:`ace_paper`.

    Args:
        weight: [out_features, in_features].
        stats: with outputs.
        base: the prefactor of :func:`cosp`.
        reduce: as in :func:`cosp`.
        norm, sign, power, eps: as in :func:`varp`.
        a: power of what multiplies a column (the cosine term, VarP and the base's norm), as RIA's ``a`` on its norm:
            1, 0.75 or 0.5; "abs" and "rms" allow 1 only.
    """
    if a not in (1, 0.75, 0.5) or (a != 1 and reduce != "exact"):
        raise RecipeError(f"ACE's a must be 1, 0.75 or 0.5, and 1 for reduce='abs' and 'rms'; got {a!r} for {reduce!r}")
    return _times_cosine(weight, stats, base, reduce, _variance_factor(stats, norm, power, eps), sign, a)


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

    Two choices are *reconstructed*: how the loss is reduced over tokens, and how VarP's norms are normalized. Options
    are those of :func:`ace`.
    """
    return ace(weight, stats, base, reduce, norm, sign, power, eps)


def _base_scale(stats: ActivationStats, base: Base | Prefactor) -> torch.Tensor | None:
    """The column factor of a base score, fp32 [in_features]; None for 1."""
    if base == "wanda":
        return stats.norm
    return norm_to_power(stats, 0.5) if base == "ria" else None


def _on_columns(weight: torch.Tensor, relative: bool, scale: ColumnScale | None, power: int = 1) -> ScoreTerms:
    """Terms of |W_ij|^power scale_j; with ``relative``, also times 1 / C_j + 1 / R_i."""
    if relative:
        terms = relative_importance(weight, scale)
        return terms if power == 1 else replace(terms, power=power)
    if scale is None:
        return ScoreTerms(power=power)
    vector, flags = grouped_column_scale(scale)
    return ScoreTerms(scale=vector, power=power, finite=FiniteCheck().record(terms=[vector], flags=flags))


def _times_cosine(
    weight: torch.Tensor,
    stats: ActivationStats,
    base: Prefactor,
    reduce: CosineReduce,
    factor: torch.Tensor | None = None,
    sign: int = 1,
    exponent: float = 1.0,
) -> ScoreTerms:
    """A base score times the cosine term; with ``factor`` [in_features], also times factor^sign on the columns.

    ``exponent`` is the power of all that multiplies a column; 1 unless ``reduce`` is "exact".
    """
    if reduce not in ("exact", "abs", "rms"):
        raise RecipeError(f"reduce must be 'exact', 'abs' or 'rms', got {reduce!r}")
    if base not in ("none", "relative", "wanda", "ria"):
        raise RecipeError(f"CosP's base or prefactor must be 'none', 'relative', 'wanda' or 'ria', got {base!r}")
    relative, power = base in ("relative", "ria"), 2 if base in ("wanda", "ria") else 1
    base_scale = _base_scale(stats, base)
    if stats.outputs is None:
        raise StatsError(
            "CosP weights tokens by the layer's outputs, but these statistics do not include them: pass raw tokens, "
            "or collect with ActivationStats.from_tokens(tokens, layer=layer)"
        )
    if reduce == "exact":
        square, divisor = stats.outputs.weighted_square_and_divisor()
        return _on_columns(weight, relative, ColumnScale(square, divisor, base_scale, factor, sign, exponent), power)
    if stats.outputs.reduce != reduce:
        raise StatsError(
            f"reduce={reduce!r} needs the coupling matrix, but these statistics were collected with "
            f"reduce={stats.outputs.reduce!r}: collect with ActivationStats.from_tokens(..., reduce={reduce!r})"
        )
    scale = None if base_scale is None and factor is None else ColumnScale(base=base_scale, factor=factor, sign=sign)
    terms = _on_columns(weight, relative, scale, power)
    return replace(terms, coupling=stats.outputs.relative_coupling())


def _variance_factor(stats: ActivationStats, norm: VarianceNorm, power: float, eps: float) -> torch.Tensor:
    return stats.derive(
        ("variance_factor", norm, power, eps), lambda: grouped_variance_factor(stats.sequence_square, norm, power, eps)
    )
