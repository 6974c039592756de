"""Exchanges of a kept and a pruned weight of a group, valued by the layer's output error.

The idea is that of SparseSwaps (arXiv 2512.10922).

E is what the layer lost, W - w, fp32 [out_features, in_features], and G the Gram matrix of its input, so the error of a
row is e G e^T. A pass visits the groups of n:m in order. In each row it makes the best exchange of the group if that
lowers the row's error, so no exchange raises it. Weights lie transposed, [in_features, out_features], so that a group
is a block of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ace_triton.solvers.least_squares import solve_kept
from ace_triton.solvers.raised_damping import add_to_diagonal
from ace_triton.solvers.update import Update, gram_of
from ace_triton.sparsity import Sparsity
from ace_triton.statistics.activation import ActivationStats

BLOCK = 64
"""Columns whose exchanges reach the other columns in one product."""

LEAST = 1e-6
"""Smallest gain of an exchange, as a share of the energy of its group's weights."""

ITERATIONS = 4
"""Conjugate-gradient iterations after a pass over fitted weights."""


@dataclass(frozen=True)
class Settings:
    """How weights are exchanged.

    Attributes:
        pattern: n:m.
        sweeps: number of passes.
    """

    pattern: Sparsity
    sweeps: int

    @property
    def group(self) -> int:
        """m."""
        if self.pattern.m is None:
            raise ValueError(f"exchanges need the groups of n:m; {self.pattern} has none")
        return self.pattern.m


def exchange_masks(dense: torch.Tensor, mask: torch.Tensor, stats: ActivationStats, settings: Settings) -> torch.Tensor:
    """The mask after exchanges between weights that keep their dense values.

    Exchanging the kept weight p with the pruned weight q changes the row's error by
    2 w_p g_p + w_p^2 G_pp - 2 w_q g_q + w_q^2 G_qq - 2 w_p w_q G_pq, where g = G e.

    Args:
        dense: fp32 [out_features, in_features].
        mask: bool, n of every m kept.
        stats: with a Gram matrix.
        settings: the pattern and the number of passes.
    """
    gram = gram_of(stats).matrix
    assert gram is not None
    weight, keep = dense.t().contiguous(), mask.t().contiguous()
    slope = gram @ weight.masked_fill(keep, 0.0)
    for _ in range(settings.sweeps):
        _pass(weight, keep, slope, gram, settings.group, fitted=False)
    return keep.t().contiguous()


def exchange_fitted(
    dense: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, stats: ActivationStats, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and mask after exchanges between fitted weights; conjugate gradients follow each pass.

    A weight that is kept anew gets the value with the smallest error, if the other weights stay.

    Args:
        dense: W, fp32 [out_features, in_features].
        weight: w, the fitted weights, of the same shape.
        mask: bool, n of every m kept.
        stats: with a Gram matrix.
        settings: the pattern and the number of passes.
    """
    found = gram_of(stats)
    assert found.matrix is not None
    diagonal = found.matrix.diagonal()
    damping = Update.damping * diagonal.mean() + Update.prior / max(found.count, 1) * diagonal
    gram = stats.derive("trial damped gram", lambda: add_to_diagonal(found.matrix, damping))
    for _ in range(settings.sweeps):
        values, keep = weight.t().contiguous(), mask.t().contiguous()
        slope = gram @ (dense.t() - values)
        _pass(values, keep, slope, gram, settings.group, fitted=True)
        mask = keep.t().contiguous()
        weight = solve_kept(dense, mask, gram, ITERATIONS, values.t().contiguous())
    return weight, mask


def _pass(
    weight: torch.Tensor, keep: torch.Tensor, slope: torch.Tensor, gram: torch.Tensor, group: int, *, fitted: bool
) -> None:
    """One pass, in place; all tensors are transposed.

    Args:
        weight: the dense weights, or the fitted ones, which change too.
        keep: the mask.
        slope: G e.
        gram: G.
        group: m.
        fitted: whether a weight that is kept anew gets a new value.
    """
    width, step = len(weight), max(BLOCK // group, 1) * group
    for start in range(0, width, step):
        block = slice(start, min(start + step, width))
        changes = torch.zeros_like(weight[block])
        for first in range(block.start, block.stop, group):
            of_group = slice(first, first + group)
            own = gram[of_group, of_group]
            exchange = _fitted_exchange if fitted else _fixed_exchange
            change = exchange(weight[of_group], keep[of_group], slope[of_group], own)
            slope[block] += gram[block, of_group] @ change
            changes[first - block.start : first - block.start + group] = change
        slope[: block.start] += gram[: block.start, block] @ changes
        slope[block.stop :] += gram[block.stop :, block] @ changes


def _fixed_exchange(weight: torch.Tensor, keep: torch.Tensor, slope: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The change of the error e by the best exchange of a group in each row; the mask changes in place."""
    square, linear = weight.square() * gram.diagonal()[:, None], 2 * weight * slope
    pruned = (square + linear).masked_fill(~keep, torch.inf)
    kept = (square - linear).masked_fill(keep, torch.inf)
    change = weight[:, None] * weight * (-2 * gram[:, :, None]) + pruned[:, None] + kept
    best, index = change.flatten(0, 1).min(0)
    first, second = _pair(index, len(gram))
    useful = (best < -LEAST * square.sum(0))[None]
    lost = torch.zeros_like(weight)
    lost.scatter_(0, first, weight.gather(0, first) * useful)
    lost.scatter_(0, second, -weight.gather(0, second) * useful)
    _flip(keep, first, second, useful)
    return lost


def _fitted_exchange(weight: torch.Tensor, keep: torch.Tensor, slope: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """As :func:`_fixed_exchange`; the weights change in place too."""
    diagonal = gram.diagonal()
    energy = weight.square() * diagonal[:, None]
    pruned = (energy + 2 * weight * slope).masked_fill(~keep, torch.inf)
    after = slope + weight[:, None] * gram[:, :, None]
    gain = (after.square() / diagonal[:, None]).masked_fill(keep, -torch.inf)
    best, index = (pruned[:, None] - gain).flatten(0, 1).min(0)
    first, second = _pair(index, len(gram))
    useful = (best < -LEAST * energy.sum(0))[None]
    values = after.flatten(0, 1).gather(0, index[None]) / diagonal[second[0]]
    lost = torch.zeros_like(weight)
    lost.scatter_(0, first, weight.gather(0, first) * useful)
    lost.scatter_(0, second, -values * useful)
    _flip(keep, first, second, useful)
    weight.sub_(lost).masked_fill_(~keep, 0.0)
    return lost


def _pair(index: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight that is pruned and the one that is kept instead, int64 [1, out_features] each."""
    return (index // group)[None], (index % group)[None]


def _flip(keep: torch.Tensor, first: torch.Tensor, second: torch.Tensor, useful: torch.Tensor) -> None:
    flipped = torch.zeros_like(keep).scatter_(0, first, useful).scatter_(0, second, useful)
    keep.logical_xor_(flipped)
