"""Weight updates: change the kept weights after a metric has chosen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Annotated, Any, Literal

import torch

from ..errors import RecipeError
from ..kernels.finite import all_finite
from ..kernels.gram_product import bfloat16_products
from ..option_types import OptionType, Range, check_options, option_types
from ..statistics.activation import ActivationStats, StatsError
from ..statistics.gram import Gram
from .least_squares import (
    PENALTY,
    Choose,
    PenaltySolves,
    Step,
    energy,
    masked,
    penalty_factor,
    penalty_step,
    rounded,
    rounded_product,
    search_mask,
    solve_kept,
    solves_by_factor,
)
from .raised_damping import add_to_diagonal

UPDATES = ("rescale", "lstsq")

ROW_STRIDE, CLEAR_GAIN = 8, 0.9
"""Compare every eighth row first. If the error of these rows fell below 0.9 times the old error, accept the result;
otherwise compare all rows."""

LARGEST_SCALE = 2.0
"""The largest scale of a row; its inverse is the smallest. A row that lost more cannot be repaired by a scale."""


@dataclass(frozen=True)
class Update:
    """How the kept weights are updated.

    "rescale" multiplies each row by one number. The energy of a row is the sum of its squared outputs over the
    calibration tokens. Masks reduce it, and the loss adds up from block to block. The number restores the energy of
    the dense row on the same inputs. This costs little time.

    "lstsq" updates every kept weight by masked least squares (:mod:`ace_triton.solvers.least_squares`), then rescales
    the rows, because the outputs of a regression have less energy than its targets.

    Attributes:
        kind: "rescale" or "lstsq". All other options are for "lstsq".
        damping: added to the Gram matrix's diagonal, as a share of its mean. It keeps each weight near its dense value.
            If a factorization of the damped matrix fails, more is added.
        prior: also added to the diagonal, as a number of tokens with the channel's mean energy. It keeps weights near
            their dense values if there are few calibration tokens, and has little effect if there are many.
        iterations: the largest number of conjugate-gradient iterations. They run only if mask_rounds is 0 or does not
            lower the error.
        mask_rounds: number of times that the metric chooses the mask again while the weights change. 0 keeps the mask
            for the dense weights.
        rescale: True to rescale rows at the end.
        block_epochs: number of passes over the calibration text that train a block's kept weights after its layers are
            fitted, so that the block's outputs come near those of the dense block (:mod:`ace_triton.block_fit`). Only
            for whole models.
        block_rate: the peak learning rate of these passes, in units of each weight's root mean square.
    """

    kind: Literal["rescale", "lstsq"] = "lstsq"
    damping: Annotated[float, Range(least=0)] = 0.02
    prior: Annotated[float, Range(least=0)] = 512.0
    iterations: Annotated[int, Range(least=0)] = 8
    mask_rounds: Annotated[int, Range(least=0)] = 4
    rescale: bool = True
    block_epochs: Annotated[int, Range(least=0)] = 0
    block_rate: Annotated[float, Range(above=0)] = 5e-3

    def __post_init__(self) -> None:
        if self.kind not in UPDATES:
            raise RecipeError(f"update must be one of {', '.join(UPDATES)}, or None; got {self.kind!r}")
        options = {name: getattr(self, name) for name in self.types()}
        check_options(self.types(), options, f"the update {self.kind!r}")
        if self.damping == self.prior == 0:
            raise RecipeError(
                "damping and prior are both 0, so dependent channels have no unique solution: set one of them above 0"
            )
        if self.kind == "rescale" and replace(self, kind="lstsq") != Update():
            raise RecipeError("the update 'rescale' has no options; use 'lstsq' to set them")

    @classmethod
    @cache
    def types(cls) -> dict[str, OptionType]:
        """The options of "lstsq" and their allowed values."""
        return {name: option for name, option in option_types(cls).items() if name != "kind"}

    @property
    def of_layers(self) -> Update:
        """The part of the update that is done layer by layer."""
        return replace(self, block_epochs=0, block_rate=Update.block_rate)

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {name: getattr(self, name) for name in self.types() if getattr(self, name) != getattr(Update, name)}

    @classmethod
    def of(cls, update: str | Mapping[str, Any] | Update | None) -> Update | None:
        """An update from its name, from a dict like that of :meth:`to_dict`, or from an Update; None for no update.

        Raises:
            RecipeError: the update is unknown.
            ArgumentError: an option is unknown, or its value is invalid.
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
        """The kind and its options, as JSON types."""
        return {"kind": self.kind} if self.kind == "rescale" else asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Update:
        """An update from :meth:`to_dict`. Options of a "rescale" are ignored."""
        return cls("rescale") if record["kind"] == "rescale" else cls(**record)


def gram_of(stats: ActivationStats | None) -> Gram:
    """The Gram matrix of the statistics; StatsError if it is missing, empty, or not finite."""
    gram = None if stats is None else stats.gram
    if gram is None or gram.matrix is None:
        raise StatsError(
            "a weight update needs the input's Gram matrix, but these statistics have none: pass raw tokens, or "
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
        stats: with a Gram matrix; a sample of tokens is enough for "rescale".
        update: the update.
        choose: the metric's selection.
        start: weights and mask from a method that has its own solver. None for the dense weights, masked by the
            metric's selection.

    Returns:
        fp32 weights, +0.0 where pruned, and the mask. Before rows are rescaled, the output error (with damping) is not
        larger than at the start.

    Raises:
        StatsError: the Gram matrix or the sample that the update needs is missing, or holds NaN or infinity.
    """
    first, mask = start or (None, choose(dense, "mask"))
    fit = _Fit(masked(dense, mask) if first is None else first, mask)
    if update.kind == "lstsq":
        fit = _fitted(dense, stats, update, choose, fit)
    return (rescaled(fit.weight, dense, stats, fit.energy_change) if update.rescale else fit.weight), fit.mask


def rescaled(
    weight: torch.Tensor, dense: torch.Tensor, stats: ActivationStats, energy_change: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight w with row i times sqrt(sum_t (W_i x_t)^2 / sum_t (w_i x_t)^2), where W is the dense weight.

    Args:
        weight: fp32 [out_features, in_features].
        dense: as it was before pruning, of the same shape and dtype.
        stats: with a Gram matrix, or a sample of tokens.
        energy_change: sum_t (w_i x_t)^2 - (W_i x_t)^2, fp32 [out_features]; None to compute it.
    """
    before = output_energy(dense, stats)
    after = output_energy(weight, stats) if energy_change is None else before + energy_change
    scale = torch.where((before > 0) & (after > 0), before / after, 1.0).sqrt_()
    return weight * scale.clamp_(1 / LARGEST_SCALE, LARGEST_SCALE)[:, None]


def output_energy(weight: torch.Tensor, stats: ActivationStats) -> torch.Tensor:
    """sum_t (w_i x_t)^2 over all tokens, or over the sample if there is no Gram matrix; fp32 [out_features]."""
    if stats.gram is not None:
        return energy(weight, _rounded_gram(stats))
    tokens = None if stats.sample is None else stats.sample.tokens
    if tokens is None:
        raise StatsError(
            "the update 'rescale' needs a sample of the input's tokens, but these statistics have none: pass raw "
            "tokens, or collect with ActivationStats.from_tokens(tokens, sample=True)"
        )
    with bfloat16_products():
        return (tokens.float() @ weight.t()).square().sum(0)


@dataclass(frozen=True)
class _Fit:
    """Weights and their mask; ``energy_change`` as in :func:`rescaled`, or None."""

    weight: torch.Tensor
    mask: torch.Tensor
    energy_change: torch.Tensor | None = None


def _fitted(dense: torch.Tensor, stats: ActivationStats, update: Update, choose: Choose, first: _Fit) -> _Fit:
    damping = stats.derive(("damping", update.damping, update.prior), lambda: _damping(gram_of(stats), update))
    assert stats.gram is not None
    assert stats.gram.matrix is not None
    matrix = stats.gram.matrix
    if not bool((matrix.diagonal() + damping).min() > 0):
        return first
    if update.mask_rounds:
        step = _penalty_step(stats, matrix, damping, update, len(dense))
        mask, moved = search_mask(dense, first.mask, step, update.mask_rounds, choose)
        change, gram = moved - dense, _rounded_gram(stats)
        product = rounded_product(change, gram)
        error = _row_products(product, change) + change.square() @ damping
        if _is_less(error, first.weight - dense, gram, damping):
            return _Fit(moved, mask, _row_products(product, moved + dense))
    damped = stats.derive(("damped_gram", update.damping, update.prior), lambda: add_to_diagonal(matrix, damping))
    return _Fit(solve_kept(dense, first.mask, damped, update.iterations, first.weight), first.mask)


def _penalty_step(
    stats: ActivationStats, matrix: torch.Tensor, damping: torch.Tensor, update: Update, rows: int
) -> Step:
    """Multiplies weights by the penalty step of the damped Gram matrix, whose factor or inverse is cached."""
    chosen = (update.damping, update.prior)
    if solves_by_factor(matrix, rows):
        lower = stats.derive(("penalty_factor", *chosen), lambda: penalty_factor(add_to_diagonal(matrix, damping)))
        return PenaltySolves(lower, (matrix.diagonal() + damping) * PENALTY)
    inverse = stats.derive(("penalty_step", *chosen), lambda: penalty_step(add_to_diagonal(matrix, damping)))
    return partial(rounded_product, matrix=inverse)


def _is_less(error: torch.Tensor, change: torch.Tensor, gram: torch.Tensor, damping: torch.Tensor) -> bool:
    """True if the sum of ``error`` over the rows is not above the error of changing the dense weights by ``change``."""
    for rows, share in ((slice(None, None, ROW_STRIDE), CLEAR_GAIN), (slice(None), 1.0)):
        other = energy(change[rows], gram) + change[rows].square() @ damping
        if bool(error[rows].sum() <= share * other.sum()):
            return True
    return False


def _row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The dot product of each row of ``left`` with the same row of ``right``."""
    return (left * right).sum(1)


def _rounded_gram(stats: ActivationStats) -> torch.Tensor:
    """The Gram matrix without damping, through :func:`rounded`; cached."""

    def compute() -> torch.Tensor:
        matrix = gram_of(stats).matrix
        assert matrix is not None
        return rounded(matrix)

    return stats.derive("rounded_gram", compute)


def _damping(gram: Gram, update: Update) -> torch.Tensor:
    """The damping on the Gram matrix's diagonal: damping mean(diag G) + prior / n_tokens diag(G), [in_features]."""
    assert gram.matrix is not None
    diagonal = gram.matrix.diagonal()
    return update.damping * diagonal.mean() + update.prior / max(gram.count, 1) * diagonal
