"""Weight updates: what happens to the kept weights once a metric has chosen them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .gram import Gram
from .kernels.finite import all_finite
from .least_squares import Choose, output_error, penalty_step, search_mask, solve_kept
from .stats import ActivationStats, StatsError

UPDATES = ("lstsq",)


@dataclass(frozen=True)
class Update:
    """How kept weights are moved, by masked least squares (:mod:`ace_triton.least_squares`).

    Attributes:
        kind: "lstsq".
        damping: holds every weight near its dense value, as a share of the mean diagonal of the Gram matrix.
        prior: does the same channel by channel, as so many tokens' worth of the channel's own energy: it hardly
            shows in 10,000 tokens, and stands in for what a few hundred do not tell. Both defaults lie where the
            output error on held-out text was least, for 512 as for 8,192 tokens of SmolLM2-135M; it is flat there.
        iterations: conjugate-gradient steps at the end, at most.
        mask_rounds: how often the mask is chosen again, by the metric, while the weights move; 0 keeps the mask
            that the metric chose for the dense weights.
    """

    kind: Literal["lstsq"] = "lstsq"
    damping: float = 0.02
    prior: float = 512.0
    iterations: int = 8
    mask_rounds: int = 0

    def __post_init__(self) -> None:
        if self.kind not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, or None; got {self.kind!r}")
        for name, value in (("damping", self.damping), ("prior", self.prior)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number, 0 or more, got {value!r}")
        if self.damping == self.prior == 0:
            raise ValueError("damping and prior are both 0: dependent channels would have no unique solution; set one")
        for name, count in (("iterations", self.iterations), ("mask_rounds", self.mask_rounds)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be an int, 0 or more, got {count!r}")

    @classmethod
    def of(cls, update: str | Update | None) -> Update | None:
        """The update itself, one by name, or None for none."""
        return cls(update) if isinstance(update, str) else update  # type: ignore[arg-type]


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
        stats: with a Gram matrix.
        update: how.
        choose: the metric's choice: weights in, mask out.
        start: weights and mask to start from, of a method with a solver of its own; None for the dense weights
            under the metric's choice.

    Returns:
        fp32 weights, +0.0 where not kept, and the mask. Their output error, damping counted in, is never above
        that of the start.

    Raises:
        StatsError: no Gram matrix, or NaN or infinity in it.
    """
    gram_of(stats)
    first, mask = start or (None, choose(dense))
    first = dense.where(mask, 0.0) if first is None else first
    gram = stats.derive(("damped_gram", update.damping, update.prior), lambda: _damped(gram_of(stats), update))
    if not bool(gram.diagonal().min() > 0):
        return first, mask
    if not update.mask_rounds:
        return solve_kept(dense, mask, gram, update.iterations, first), mask

    def steps(penalty: float) -> torch.Tensor:
        key = ("penalty_step", update.damping, update.prior, penalty)
        return stats.derive(key, lambda: penalty_step(gram, penalty))

    searched, moved = search_mask(dense, mask, update.mask_rounds, choose, steps)
    solved = solve_kept(dense, searched, gram, update.iterations, moved)
    if bool(output_error(solved, dense, gram).sum() <= output_error(first, dense, gram).sum()):
        return solved, searched
    return solve_kept(dense, mask, gram, update.iterations, first), mask


def _damped(gram: Gram, update: Update) -> torch.Tensor:
    """G + damping mean(diag G) I + prior / n_tokens diag(G)."""
    assert gram.matrix is not None
    diagonal = gram.matrix.diagonal()
    added = update.damping * diagonal.mean() + update.prior / max(gram.count, 1) * diagonal
    return gram.matrix + added.diag()
