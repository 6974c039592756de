"""The terms of a metric's score, checked before a weight is pruned by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

from .errors import PruneError
from .kernels.finite import all_finite, find_not_finite
from .kernels.finite_check import FiniteCheck
from .kernels.score_terms import ScoreTerms, scores_reference
from .recipe import Recipe
from .statistics.activation import ActivationStats, StatsError
from .weight_checks import check_finite


@dataclass(frozen=True)
class UnreadCheck:
    """What a GPU found out about a weight and the terms of its score, and the host has not read yet.

    Attributes:
        flags: int32 [1] each, on the device. If one is not 0, the weight was not changed.
        accept: called if all is in range.
        refuse: raises the error that names what is out of range.
    """

    flags: tuple[torch.Tensor, ...]
    accept: Callable[[], None]
    refuse: Callable[[], None]


def read_checks(unread: Sequence[UnreadCheck]) -> None:
    """Read all checks, which waits for the GPU once; raise the error of the first weight that was refused."""
    flags = list({id(flag): flag for check in unread for flag in check.flags}.values())
    numbers = torch.cat(flags).tolist() if len(flags) > 1 else [flag.item() for flag in flags]
    found = {id(flag): number for flag, number in zip(flags, numbers, strict=True)}
    for check in unread:
        if any(found[id(flag)] for flag in check.flags):
            check.refuse()
        check.accept()


def joined(flags: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One flag that is not 0 if one of these is not 0; None if there is none."""
    return None if not flags else flags[0] if len(flags) == 1 else torch.cat(list(flags)).amax(0, keepdim=True)


def metric_terms(
    recipe: Recipe, weight: torch.Tensor, stats: ActivationStats | None, label: str, finite: FiniteCheck
) -> ScoreTerms | torch.Tensor:
    """What the metric's function returns, not checked; errors of the function name the layer."""
    try:
        return recipe.metric.terms(weight, stats, **recipe.complete_options)
    except Exception as error:
        _raise_for_metric(error, weight, label, finite)


def unread_terms(
    terms: ScoreTerms | torch.Tensor,
    recipe: Recipe,
    weight: torch.Tensor,
    stats: ActivationStats | None,
    label: str,
    finite: FiniteCheck,
    unread: list[UnreadCheck],
) -> tuple[ScoreTerms | torch.Tensor, list[torch.Tensor]]:
    """The metric's terms, checked without a wait, and flags: the selection must not write if one is not 0.

    There are no flags if all is known to be in range.
    """
    if not isinstance(terms, ScoreTerms):
        return _checked_terms(terms, recipe, weight, stats, label, finite), []
    known = _known_to(terms, stats, finite)
    pending = [(tensor, True) for tensor in terms.tensors.values()] + [(weight, False)]
    found = {(id(tensor), kind): known.pending(tensor, is_term=kind) for tensor, kind in pending}
    if any(state is False for state in found.values()):
        return _checked_terms(terms, recipe, weight, stats, label, finite), []
    flags = list({id(state): state for state in found.values() if isinstance(state, torch.Tensor)}.values())
    unknown = [(tensor, kind) for tensor, kind in pending if found[id(tensor), kind] is None]
    if unknown:
        flag = find_not_finite(
            *(tensor for tensor, is_term in unknown if not is_term),
            terms=[tensor for tensor, is_term in unknown if is_term],
            also=joined(flags),
        )
        flags = [flag]
    terms.vouch()
    if flags:
        factors = list(terms.tensors.values())
        accept, refuse = partial(known.accept, weight, terms=factors), partial(_refuse, recipe, weight, terms, label)
        unread.append(UnreadCheck(tuple(flags), accept, refuse))
    return terms, flags


def _refuse(recipe: Recipe, weight: torch.Tensor, terms: ScoreTerms, label: str) -> None:
    """Raise the error for a weight or terms that are out of range."""
    check_finite(weight, label, FiniteCheck())
    _refuse_terms(recipe, terms, label)


def terms_of(
    recipe: Recipe, weight: torch.Tensor, stats: ActivationStats | None, label: str, finite: FiniteCheck
) -> ScoreTerms | torch.Tensor:
    """The metric's result: terms of a score, or the scores themselves, fp32 [out_features, in_features].

    Raises:
        PruneError: the weight or the result holds NaN or infinity, or a score is negative.
    """
    terms = metric_terms(recipe, weight, stats, label, finite)
    return _checked_terms(terms, recipe, weight, stats, label, finite)


def _raise_for_metric(error: Exception, weight: torch.Tensor, label: str, finite: FiniteCheck) -> NoReturn:
    """Raise the error of a metric's function, with the layer's name."""
    check_finite(weight, label, finite)  # A weight that is not finite, or has no memory, explains any error.
    if isinstance(error, StatsError):
        raise StatsError(f"{label}: {error}") from error
    if isinstance(error, AttributeError) and error.obj is None and error.name is not None:
        raise StatsError(
            f"{label}: the metric reads a statistic that was not collected ({error}): name it in register_metric(..., "
            "needs=ace_triton.Needs(...)), as outputs=True or gram=True"
        ) from error
    raise error


def _checked_terms(
    terms: object,
    recipe: Recipe,
    weight: torch.Tensor,
    stats: ActivationStats | None,
    label: str,
    finite: FiniteCheck,
) -> ScoreTerms | torch.Tensor:
    """The metric's result, if the weight and all terms or scores are in range; waits for a GPU."""
    if not isinstance(terms, ScoreTerms):
        check_finite(weight, label, finite)
        return _checked_matrix(terms, weight, f"{label}: the metric {recipe.method!r}")
    try:
        in_range = all_finite(weight, terms=terms.tensors.values(), known=_known_to(terms, stats, finite))
    except Exception as error:
        _raise_for_metric(error, weight, label, finite)
    if not in_range:
        check_finite(weight, label, finite)
        _refuse_terms(recipe, terms, label)
    terms.vouch()
    return terms


def _refuse_terms(recipe: Recipe, terms: ScoreTerms, label: str) -> NoReturn:
    """Raise PruneError for the terms that are out of range."""
    bad = [name for name, tensor in terms.tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise PruneError(
            f"{label}: the statistics give NaN or infinity in the score's {' and '.join(bad)}; look for overflow "
            "in the calibration forward (run it in bfloat16 or float32)"
        )
    negative = [name for name, tensor in terms.tensors.items() if bool((tensor < 0).any())]
    raise PruneError(
        f"{label}: method {recipe.method!r} gives numbers below 0 in the score's {' and '.join(negative)}; "
        "a score is a product of factors that are 0 or more: change the metric"
    )


def _known_to(terms: ScoreTerms, stats: ActivationStats | None, finite: FiniteCheck) -> FiniteCheck:
    """What launches have found out about a weight and its terms. Terms that layers share stay in their statistics."""
    known = [check for check in (finite, terms.finite, None if stats is None else stats.finite) if check is not None]
    return FiniteCheck(*known)


def _checked_matrix(scores: object, weight: torch.Tensor, label: str) -> torch.Tensor:
    """A metric's own scores, fp32 and contiguous; PruneError unless each weight has a finite score of 0 or more."""
    if not isinstance(scores, torch.Tensor):
        raise PruneError(
            f"{label} returned a {type(scores).__name__}; return an ace_triton.ScoreTerms, or a tensor of scores "
            "[out_features, in_features]"
        )
    if scores.shape != weight.shape or scores.device != weight.device:
        raise PruneError(
            f"{label} returned scores of shape {tuple(scores.shape)} on {scores.device}; the weight is "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    matrix = scores.detach().float().contiguous()
    if not all_finite(terms=[matrix]):
        raise PruneError(f"{label} returned scores below 0, infinite or NaN; scores must be finite and 0 or more")
    return matrix


def score_matrix(recipe: Recipe, weight: torch.Tensor, stats: ActivationStats | None) -> torch.Tensor:
    """The scores of all weights, fp32 [out_features, in_features]."""
    scores = recipe.metric.terms(weight, stats, **recipe.complete_options)
    return scores if isinstance(scores, torch.Tensor) else scores_reference(weight, scores)
