"""Prune one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .checked_terms import UnreadCheck, joined, metric_terms, read_checks, terms_of, unread_terms
from .errors import PruneError, RecipeError
from .kernels.backend import backend_of_device
from .kernels.finite import all_finite
from .kernels.finite_check import FiniteCheck
from .kernels.score_terms import ScoreTerms, scores_reference
from .kernels.select_nm import select_nm
from .kernels.select_rows import select_rows
from .linears import as_kernel_dtype
from .methods.registry import Needs
from .presets import NOT_GIVEN, NotGiven, recipe_of
from .recipe import Recipe
from .solvers.least_squares import masked
from .solvers.quantize import Quantization, quantized_weight
from .solvers.update import Update, updated_weight
from .sparsity import Axis, Sparsity
from .statistics.activation import ActivationStats, StatsError
from .threads import few_threads
from .timing import Stopwatch
from .weight_checks import check_finite, check_untied, check_weight


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune_linear` kept.

    Attributes:
        name: the layer's name, or its class if no name was given.
        method: the metric's name.
        pattern: "2:4", or the pruned fraction.
        axis: what groups or rows ran along.
        kept: number of weights kept.
        total: number of weights.
        mask: bool [out_features, in_features], True where a weight is kept; None without ``return_mask``.
    """

    name: str
    method: str
    pattern: str
    axis: Axis
    kept: int
    total: int
    mask: torch.Tensor | None = None

    @property
    def sparsity(self) -> float:
        """Share of weights pruned."""
        return 1 - self.kept / self.total if self.total else 0.0


def prune_linear(
    layer: nn.Module,
    stats: ActivationStats | torch.Tensor | None = None,
    method: str | Recipe = "ace",
    sparsity: str | float | Sparsity | NotGiven = NOT_GIVEN,
    *,
    update: str | Mapping[str, Any] | Update | NotGiven | None = NOT_GIVEN,
    quantize: int | Mapping[str, Any] | Quantization | NotGiven | None = NOT_GIVEN,
    name: str | None = None,
    return_mask: bool = False,
    model: nn.Module | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a linear layer in place.

    A weight that is tied to another parameter is pruned there too. Pass ``model`` to refuse such a layer; without it,
    tied weights are the caller's concern.

    Args:
        layer: an ``nn.Linear`` (weight [out_features, in_features], any floating dtype, any strides, any
            device), or a Conv1D of transformers (weight [in_features, out_features]).
        stats: statistics of the layer's input, or the raw tokens: [n_tokens, in_features] or
            [n_sequences, length, in_features]. None for magnitude, which needs neither.
        method: a metric's name (:func:`~ace_triton.methods.registry.metric_names`), a preset's name ("fast"), or a
            :class:`~ace_triton.recipe.Recipe`. A recipe takes no sparsity, update or options beside it. Its
            ``sequential`` has no meaning for one layer.
        sparsity: "n:m" (n of every m kept), the pruned fraction of every row, or a :class:`Sparsity`. Default: "2:4".
        update: "rescale" scales each row so that its outputs have the dense row's energy; "lstsq" moves the kept
            weights to where they best reproduce the dense layer's outputs; an
            :class:`~ace_triton.solvers.update.Update` sets its options. Needs raw tokens, or statistics with a sample
            of them or with a Gram matrix. Default: no update.
        quantize: 8 or 4 bits for the kept weights, or a :class:`~ace_triton.solvers.quantize.Quantization`, after the
            update. The weight keeps its dtype; ``pack_model`` stores it in that many bits. By default the rule is
            "gptq", which needs raw tokens, or statistics with a Gram matrix. Default: no quantization.
        name: the layer's name in errors and in the result.
        return_mask: also return which weights were kept; costs one byte a weight and a second pass.
        model: the model that holds the layer. If given, a weight that shares memory with another parameter of the model
            is refused. This takes one pass over the parameters; ``prune_model`` makes it once for all layers.
        options: the metric's own.

    Raises:
        PruneError: if the layer cannot be pruned (shape, dtype, computed or tied weight, NaN or infinity); nothing was
            changed.
        RecipeError: if the method, an option or the update is invalid, or the recipe needs a whole model.
        PatternError: if the sparsity is invalid.
        StatsError: if the statistics do not fit the layer or the method.
    """
    label = name or type(layer).__name__
    recipe = recipe_of(method, options, sparsity=sparsity, update=update, quantize=quantize)
    _check_one_layer(recipe)
    weight, finite = check_weight(layer, label), FiniteCheck()
    if isinstance(stats, torch.Tensor):
        # Raw tokens go through the layer first, so a weight that is not finite would be blamed on the layer's outputs.
        check_finite(weight, label, finite)
    if model is not None:
        check_untied(layer, model, label)
    unread: list[UnreadCheck] = []
    result = prune_checked(layer, weight, stats, recipe, label, finite, return_mask=return_mask, unread=unread)
    read_checks(unread)
    return result


def _check_one_layer(recipe: Recipe) -> None:
    """RecipeError if a recipe has parts that only a whole model can follow."""
    parts = {name: getattr(recipe, name) for name in ("rotate", "permute", "budgets", "include", "exclude")}
    if recipe.update is not None:
        parts["update's block_epochs"] = recipe.update.block_epochs > 0
    if wanted := [name for name, part in parts.items() if part not in (None, False, ())]:
        raise RecipeError(
            f"the recipe's {' and '.join(wanted)} need a whole model: use prune_model, or drop them with "
            "dataclasses.replace(recipe, ...)"
        )


def prune_checked(
    layer: nn.Module,
    weight: torch.Tensor,
    stats: ActivationStats | torch.Tensor | None,
    recipe: Recipe,
    label: str,
    finite: FiniteCheck,
    *,
    return_mask: bool = False,
    clock: Stopwatch | None = None,
    unread: list[UnreadCheck] | None = None,
    terms: ScoreTerms | torch.Tensor | None = None,
) -> PruneResult:
    """:func:`prune_linear` without its checks of the weight.

    Args:
        weight: what :func:`check_weight` returned; no other layer uses it.
        finite: what is known of the weight. If it was not checked for NaN and infinity yet, it is checked with the
            score's terms.
        clock: measures the update of the weights, as "update", and their rounding, as "quantize".
        unread: takes the check of the weight and its terms if a GPU can prune without waiting for it; the caller must
            then call :func:`read_checks`. None to wait here.
        terms: with ``unread``, what the metric has returned for this layer. None to call the metric.
    """
    gathered = statistics_for(layer, weight, stats, recipe.needs, label)
    kernel_weight = as_kernel_dtype(weight)
    chosen, pattern = recipe.metric, recipe.sparsity
    axis = pattern.axis or chosen.axis(gathered)
    if chosen.solve is not None or recipe.update is not None or recipe.quantize is not None:
        with few_threads(weight.numel() * weight.shape[1]):
            chosen_mask = _solve(weight, gathered, recipe, axis, label, finite, clock)
        mask = chosen_mask if return_mask else None
        return PruneResult(label, chosen.name, str(pattern), axis, int(chosen_mask.sum()), weight.numel(), mask)
    known = _known_of(weight, kernel_weight, finite)
    can_wait = kernel_weight is weight and pattern.n is not None and not return_mask
    if unread is not None and can_wait and backend_of_device(weight.device) == "triton":
        if terms is None:
            terms = metric_terms(recipe, weight, gathered, label, finite)
        terms, flags = unread_terms(terms, recipe, weight, gathered, label, finite, unread)
        unless = joined(flags)
    else:
        terms, unless = terms_of(recipe, kernel_weight, gathered, label, known), None
    try:
        mask = _select(weight, kernel_weight, terms, pattern, axis, return_mask, unless)
    except ValueError as error:
        raise PruneError(f"{label}: {error}") from error
    return PruneResult(label, chosen.name, str(pattern), axis, number_kept(weight, pattern, axis), weight.numel(), mask)


def statistics_for(
    layer: nn.Module, weight: torch.Tensor, given: ActivationStats | torch.Tensor | None, needs: Needs, label: str
) -> ActivationStats | None:
    """The statistics that a method needs, checked; None if it needs none. StatsError if they do not fit the layer."""
    if not needs.tokens:
        return None
    if given is None:
        raise StatsError(f"{label}: this method needs the layer's inputs: pass an ActivationStats or the raw tokens")
    if not isinstance(given, (torch.Tensor, ActivationStats)):
        raise StatsError(f"{label}: pass an ActivationStats or the raw tokens, got a {type(given).__name__}")
    if isinstance(given, torch.Tensor):
        _check_tokens(given, weight, needs, label)
        try:
            given = ActivationStats.from_tokens(
                given, layer=layer if needs.outputs else None, reduce=needs.reduce, parts=needs.all_parts
            )
        except StatsError as error:
            raise StatsError(f"{label}: {error}") from error
    if given.in_features != weight.shape[1]:
        raise StatsError(f"{label}: statistics of {given.in_features} channels, but the layer has {weight.shape[1]}")
    if given.mean is not None and given.mean.device != weight.device:
        raise StatsError(f"{label}: statistics on {given.mean.device}, weight on {weight.device}: use stats.to(device)")
    try:
        given.require_tokens()
    except StatsError as error:
        raise StatsError(f"{label}: {error}") from error
    return given


def _check_tokens(tokens: torch.Tensor, weight: torch.Tensor, needs: Needs, label: str) -> None:
    """StatsError if the tokens are not a plain tensor, do not fit the layer, or lie on another device."""
    if tokens.is_nested or tokens.layout != torch.strided:
        raise StatsError(f"{label}: tokens must be a plain dense tensor: pad nested ones and say which are valid")
    if needs.outputs and tokens.dtype != weight.dtype:
        raise StatsError(
            f"{label}: this method runs the layer, in {weight.dtype}, on the tokens, which are {tokens.dtype}: convert "
            "one of them"
        )
    if tokens.dim() not in (2, 3) or tokens.shape[-1] != weight.shape[1]:
        raise StatsError(
            f"{label}: tokens must be [n_tokens, {weight.shape[1]}] or [n_sequences, length, {weight.shape[1]}], "
            f"got {tuple(tokens.shape)}"
        )
    if tokens.device != weight.device:
        raise StatsError(f"{label}: tokens on {tokens.device}, weight on {weight.device}: use tokens.to(device)")


def _known_of(weight: torch.Tensor, copied: torch.Tensor, finite: FiniteCheck) -> FiniteCheck:
    """What is known of a copy of the weight in another dtype."""
    return FiniteCheck().record(copied) if finite.passed(weight) else FiniteCheck()


def _solve(
    weight: torch.Tensor,
    stats: ActivationStats | None,
    recipe: Recipe,
    axis: Axis,
    label: str,
    finite: FiniteCheck,
    clock: Stopwatch | None,
) -> torch.Tensor:
    """Prune in place, then update and quantize the kept weights; returns the mask."""
    chosen, pattern, update = recipe.metric, recipe.sparsity, recipe.update
    dense = weight.float().contiguous()
    known = _known_of(weight, dense, finite)
    scored = update is not None or chosen.solve is None
    if not scored:
        check_finite(dense, label, known)
    terms = terms_of(recipe, dense, stats, label, known) if scored else ScoreTerms()
    try:
        solved = None if chosen.solve is None else chosen.solve(dense, stats, pattern, axis, **recipe.complete_options)
        if update is not None:
            assert stats is not None
            with nullcontext() if clock is None else clock.measure("update"):
                solved = updated_weight(
                    dense, stats, update, lambda w, out: choose(w, terms, pattern, axis, out), solved
                )
        elif solved is None:
            mask = choose(dense, terms, pattern, axis, "mask")
            solved = masked(dense, mask), mask
        if recipe.quantize is not None:
            with nullcontext() if clock is None else clock.measure("quantize"):
                solved = quantized_weight(*solved, stats, recipe.quantize, weight.dtype), solved[1]
    except StatsError as error:
        raise StatsError(f"{label}: {error}") from error
    except ValueError as error:
        raise PruneError(f"{label}: {error}") from error
    values, mask = solved
    stored = values.to(weight.dtype)
    if not all_finite(as_kernel_dtype(stored)):
        raise PruneError(
            f"{label}: the update leaves the range of {weight.dtype}; raise its damping, or load the model in bfloat16"
        )
    with _writing_to(weight):
        weight.copy_(stored)
    return mask


def _select(
    weight: torch.Tensor,
    kernel_weight: torch.Tensor,
    terms: ScoreTerms | torch.Tensor,
    pattern: Sparsity,
    axis: Axis,
    want_mask: bool,
    unless: torch.Tensor | None = None,
) -> torch.Tensor | None:
    if kernel_weight is weight and not want_mask:
        with _writing_to(weight):
            choose(weight, terms, pattern, axis, "weight", unless)
        return None
    mask = choose(kernel_weight, terms, pattern, axis, "mask")
    with _writing_to(weight):
        zero = weight.view(torch.uint8) if weight.element_size() == 1 else weight
        zero.masked_fill_(~mask, 0)
    return mask if want_mask else None


def _writing_to(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Inference mode if the weight was made in it: torch lets only inference mode change such a weight."""
    return torch.inference_mode() if weight.is_inference() else nullcontext()


def choose(
    weight: torch.Tensor,
    terms: ScoreTerms | torch.Tensor,
    pattern: Sparsity,
    axis: Axis,
    output: Literal["mask", "weight"],
    unless: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select the weights to keep: returns the mask, or sets the other weights to 0 in place and returns the weight.

    Args:
        terms: the terms of a score, or the scores themselves.
        unless: as for :func:`~ace_triton.kernels.select_nm.select_nm`, for n:m.
    """
    if isinstance(terms, torch.Tensor):
        mask = choose(terms, ScoreTerms(), pattern, axis, "mask")
        return mask if output == "mask" else weight.masked_fill_(~mask, 0)
    if pattern.n is not None and pattern.m is not None:
        return select_nm(weight, terms, pattern.n, pattern.m, axis=axis, output=output, unless=unless)
    if pattern.scope == "layer":
        return select_rows(weight, terms, pattern.kept_of(weight.numel()), scope="layer", output=output)
    if axis == "in":
        return select_rows(weight, terms, pattern.kept_of(weight.shape[1]), output=output)
    columns = scores_reference(weight, terms).t().contiguous()
    mask = select_rows(columns, ScoreTerms(), pattern.kept_of(weight.shape[0]), output="mask").t()
    return mask if output == "mask" else weight.masked_fill_(~mask, 0)


def number_kept(weight: torch.Tensor, pattern: Sparsity, axis: Axis) -> int:
    """How many weights a pattern keeps."""
    if pattern.n is not None and pattern.m is not None:
        return weight.numel() // pattern.m * pattern.n
    if pattern.scope == "layer":
        return pattern.kept_of(weight.numel())
    rows, cols = weight.shape if axis == "in" else weight.shape[::-1]
    return rows * pattern.kept_of(cols)
