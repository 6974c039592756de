"""Weight updates: what happens to the kept weights once a metric has chosen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

import torch

from ..errors import RecipeError
from ..kernels.finite import all_finite
from ..kernels.gram_product import bfloat16_products
from ..option_types import OptionType, Range, check_options, option_types
from ..statistics.activation import ActivationStats, StatsError
from ..statistics.gram import Gram
from .least_squares import Choose, coarse, coarse_product, energy, penalty_step, raised, search_mask, solve_kept, under

UPDATES = ("rescale", "lstsq")

FEW_ROWS, NO_DOUBT = 8, 0.9
"""Every eighth row tells whether a search helped where their error fell below 0.9 of what it was."""

LARGEST_SCALE = 2.0
"""A row is never scaled by more, nor by less than its inverse: one that lost so much is no matter of scale."""


@dataclass(frozen=True)
class Update:
    """How kept weights are moved.

    "rescale" multiplies every row by one number, so that its outputs have the energy, the sum of squares over the
    calibration tokens, that the dense row's have on the same inputs: a mask takes energy away, and what is missing
    adds up from block to block. It costs next to nothing. "lstsq" moves every kept weight, by masked least squares
    (:mod:`ace_triton.solvers.least_squares`), and rescales then: a regression's outputs have less energy than its
    targets.

    Attributes:
        kind: "rescale" or "lstsq". What follows is for "lstsq".
        damping: holds every weight near its dense value, as a share of the mean diagonal of the Gram matrix.
        prior: does the same channel by channel, as so many tokens' worth of the channel's own energy: it hardly
            shows in 10,000 tokens, and stands in for what a few hundred do not tell. Both defaults lie where the
            output error on held-out text was least, for 512 as for 8,192 tokens of SmolLM2-135M; it is flat there.
        iterations: conjugate-gradient steps at most, where the mask is kept; mask rounds end near the solution.
        mask_rounds: how often the mask is chosen again, by the metric, while the weights move; 0 keeps the mask
            that the metric chose for the dense weights.
        rescale: whether rows are scaled at the end, as "rescale" does.
    """

    kind: Literal["rescale", "lstsq"] = "lstsq"
    damping: Annotated[float, Range(least=0)] = 0.02
    prior: Annotated[float, Range(least=0)] = 512.0
    iterations: Annotated[int, Range(least=0)] = 8
    mask_rounds: Annotated[int, Range(least=0)] = 4
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.kind not in UPDATES:
            raise RecipeError(f"update must be one of {', '.join(UPDATES)}, or None; got {self.kind!r}")
        options = {name: getattr(self, name) for name in self.types()}
        check_options(self.types(), options, f"the update {self.kind!r}")
        if self.damping == self.prior == 0:
            raise RecipeError("damping and prior are both 0: dependent channels would have no unique solution; set one")
        if self.kind == "rescale" and replace(self, kind="lstsq") != Update():
            raise RecipeError("the update 'rescale' has no options: they are those of 'lstsq'")

    @classmethod
    @cache
    def types(cls) -> dict[str, OptionType]:
        """The options of "lstsq" and the values that they take."""
        return {name: option for name, option in option_types(cls).items() if name != "kind"}

    @classmethod
    def of(cls, update: str | Mapping[str, Any] | Update | None) -> Update | None:
        """The update itself, one by name or from a dict as :meth:`to_dict` gives it, or None for none.

        Raises:
            ValueError: an unknown update or option, or a value that an option does not take.
        """
        if update is None or isinstance(update, Update):
            return update
        if isinstance(update, str):
            return cls(update)  # type: ignore[arg-type]
        if isinstance(update, Mapping) and "kind" in update:
            options = {name: value for name, value in update.items() if name != "kind"}
            check_options(cls.types(), options, f"the update {update['kind']!r}")
            return cls(update["kind"], **options)
        raise RecipeError(
            f'update must be one of {", ".join(UPDATES)}, an ace_triton.Update, a dict with a "kind", or None; got '
            f"{update!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: the kind and the options that it has."""
        return {"kind": self.kind} if self.kind == "rescale" else asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Update:
        """What :meth:`to_dict` gave; of a "rescale" written with options, which it never had, the kind alone."""
        return cls("rescale") if record["kind"] == "rescale" else cls(**record)


def gram_of(stats: ActivationStats | None) -> Gram:
    """The Gram matrix that statistics carry, finite and with tokens in it; StatsError where they do not."""
    gram = None if stats is None else stats.gram
    if gram is None or gram.matrix is None:
        raise StatsError(
            "a weight update needs the input's Gram matrix, which these statistics do not hold: pass raw tokens, or "
            "collect with ActivationStats.from_tokens(tokens, gram=True)"
        )
    if not all_finite(gram.matrix):
        raise StatsError(
            "the Gram matrix holds NaN or infinity; look for overflow in the calibration forward (run it in bfloat16 "
            "or float32)"
        )
    return gram


def updated_weight(
    dense: torch.Tensor,
    stats: ActivationStats,
    update: Update,
    choose: Choose,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's weights and mask after an update.

    Args:
        dense: fp32 [out_features, in_features].
        stats: with a Gram matrix, or for "rescale" a sample of tokens.
        update: how.
        choose: the metric's choice.
        start: weights and mask to start from, of a method with a solver of its own; None for the dense weights
            under the metric's choice.

    Returns:
        fp32 weights, +0.0 where not kept, and the mask. Before rows are scaled, their output error, damping counted
        in, is not above that of the start.

    Raises:
        StatsError: no Gram matrix or sample of tokens, as the update needs, or NaN or infinity in it.
    """
    first, mask = start or (None, choose(dense, "mask"))
    fit = _Fit(under(mask, dense) if first is None else first, mask)
    if update.kind == "lstsq":
        fit = _fitted(dense, stats, update, choose, fit)
    return (rescaled(fit.weight, dense, stats, fit.gained) if update.rescale else fit.weight), fit.mask


def rescaled(
    weight: torch.Tensor, dense: torch.Tensor, stats: ActivationStats, gained: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight, each row times sqrt(sum_t (W_i x_t)^2 / sum_t (w_i x_t)^2); W is the dense weight, w this one.

    Args:
        weight, dense: fp32 [out_features, in_features].
        stats: with a Gram matrix, or a sample of tokens.
        gained: sum_t (w_i x_t)^2 - (W_i x_t)^2, fp32 [out_features], where it is known already.
    """
    given = output_energy(dense, stats)
    left = output_energy(weight, stats) if gained is None else given + gained
    scale = torch.where((given > 0) & (left > 0), given / left, 1.0).sqrt_()
    return weight * scale.clamp_(1 / LARGEST_SCALE, LARGEST_SCALE)[:, None]


def output_energy(weight: torch.Tensor, stats: ActivationStats) -> torch.Tensor:
    """sum_t (w_i x_t)^2 over the tokens, or over the sample where there is no Gram matrix; fp32 [out_features]."""
    if stats.gram is not None:
        return energy(weight, _coarse_gram(stats))
    tokens = None if stats.sample is None else stats.sample.tokens
    if tokens is None:
        raise StatsError(
            "the update 'rescale' needs some of the input's tokens, which these statistics do not hold: pass raw "
            "tokens, or collect with ActivationStats.from_tokens(tokens, sample=True)"
        )
    with bfloat16_products():
        return (tokens.float() @ weight.t()).square().sum(0)


@dataclass(frozen=True)
class _Fit:
    """Weights and their mask; ``gained`` as in :func:`rescaled`, where finding them told it."""

    weight: torch.Tensor
    mask: torch.Tensor
    gained: torch.Tensor | None = None


def _fitted(dense: torch.Tensor, stats: ActivationStats, update: Update, choose: Choose, first: _Fit) -> _Fit:
    damping = stats.derive(("damping", update.damping, update.prior), lambda: _damping(gram_of(stats), update))
    assert stats.gram is not None
    assert stats.gram.matrix is not None
    matrix = stats.gram.matrix
    if not bool((matrix.diagonal() + damping).min() > 0):
        return first
    if update.mask_rounds:
        step = stats.derive(
            ("penalty_step", update.damping, update.prior), lambda: penalty_step(raised(matrix, damping))
        )
        mask, moved = search_mask(dense, first.mask, step, update.mask_rounds, choose)
        change, coarse_gram = moved - dense, _coarse_gram(stats)
        product = coarse_product(change, coarse_gram)
        error = _row_products(product, change) + change.square() @ damping
        if _errs_less(error, first.weight - dense, coarse_gram, damping):
            return _Fit(moved, mask, _row_products(product, moved + dense))
    damped = stats.derive(("damped_gram", update.damping, update.prior), lambda: raised(matrix, damping))
    return _Fit(solve_kept(dense, first.mask, damped, update.iterations, first.weight), first.mask)


def _errs_less(error: torch.Tensor, change: torch.Tensor, gram: torch.Tensor, damping: torch.Tensor) -> bool:
    """Whether rows err less, in sum, than those changed by ``change``: by a few rows where these leave no doubt."""
    for rows, doubt in ((slice(None, None, FEW_ROWS), NO_DOUBT), (slice(None), 1.0)):
        other = energy(change[rows], gram) + change[rows].square() @ damping
        if bool(error[rows].sum() <= doubt * other.sum()):
            return True
    return False


def _row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """<left_i, right_i> of every row."""
    return (left * right).sum(1)


def _coarse_gram(stats: ActivationStats) -> torch.Tensor:
    """The Gram matrix itself, not damped, as :func:`coarse` has it."""

    def compute() -> torch.Tensor:
        matrix = gram_of(stats).matrix
        assert matrix is not None
        return coarse(matrix)

    return stats.derive("coarse_gram", compute)


def _damping(gram: Gram, update: Update) -> torch.Tensor:
    """What is added to the Gram matrix's diagonal: damping mean(diag G) + prior / n_tokens diag(G), [in_features]."""
    assert gram.matrix is not None
    diagonal = gram.matrix.diagonal()
    return update.damping * diagonal.mean() + update.prior / max(gram.count, 1) * diagonal
