"""Finds an order of a layer's input channels in which n:m loses less of the score.

A group of m channels retains, in every row, the scores of its best n. Which channels share a group is free as long as
whatever feeds the layer can be reordered with it (:mod:`.fold`). The search goes on from RIA's heuristic order
("Plug-and-Play", ICLR 2024: channels by their sums, dealt out to and fro), as theirs does by linear sum assignment:
one channel is taken out of every group, and those are dealt out again so that the groups retain the most, over and
over, with others taken out together from cycle to cycle. What each group would gain by each channel comes from one
kernel, :func:`~ace_triton.kernels.join_gains.join_gains`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..kernels.assignment import assignment
from ..kernels.join_gains import join_gains

CYCLES = 2
"""Times that every channel of every group is taken out, at most."""

MOST_STARTS, GROUPS_OF_ALL_STARTS = 16, 64
"""A search starts from so many orders at most, and from as many as have so many groups together."""

LARGEST_EXPONENT = 120
"""Binary exponent below which all scores together must stay, so that sums and differences of them fit fp32."""

LEAST_GAIN = 1e-4
"""A cycle that adds less than this share of the retained score is the last."""


@dataclass(frozen=True)
class Permutation:
    """An order of channels, pool by pool.

    Attributes:
        order: int64 [n_pools, channels]; place p takes channel ``order[pool, p]``.
        before, after: score retained over all rows and pools in the given order and in this one.
    """

    order: torch.Tensor
    before: float
    after: float


def search_permutation(scores: torch.Tensor, n: int, m: int, *, cycles: int = CYCLES, seed: int = 0) -> Permutation:
    """An order in which the best n of every m consecutive channels retain more.

    The retained score never falls from round to round, and the result retains at least what the given order does. A
    round costs rows * (channels / m)^2 steps of three instructions; there are m rounds in a cycle.

    Args:
        scores: fp32 [n_pools, rows, channels], not negative. Channels stay in their pool.
        n: how many of a group are kept.
        m: size of a group; divides the channels.
        cycles: at most so many.
        seed: of the draw of which channels are taken out together.

    Raises:
        ValueError: scores of another shape or not finite, or n:m that does not fit them.
    """
    if scores.dim() != 3 or not scores.shape[2] or scores.shape[2] % m or not 0 < n < m:
        raise ArgumentError(
            f"scores must be [n_pools, rows, channels] with channels a multiple of m above 0, and 0 < n < m; got "
            f"{tuple(scores.shape)} and {n}:{m}"
        )
    given = torch.arange(scores.shape[2], device=scores.device).reshape(-1, m).t().expand(len(scores), -1, -1)
    before = retained_score(scores, given, n)
    retained = float(before.sum())
    if not math.isfinite(retained):
        raise ArgumentError("scores hold NaN or infinity: look for overflow in the weights or the statistics")
    # All scores together are at most m / n of what is retained; a power of two changes no comparison between sums.
    unit = 2.0 ** max(0, math.frexp(retained * m / n)[1] - LARGEST_EXPONENT)
    if unit > 1:
        scores, before = scores / unit, before / unit
    best, score = given, before
    for start in _starts(scores, given, seed):
        found = _search(scores, start, n, cycles, seed)
        best, score = _better(best, score, found, retained_score(scores, found, n))
    return Permutation(best.transpose(1, 2).flatten(1), retained, unit * float(score.sum()))


def _starts(scores: torch.Tensor, given: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """The heuristic order; where groups are few, and a search quick and short-sighted, the given one and others too."""
    _, m, groups = given.shape
    yield snake_order(scores, m)
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(1, min(MOST_STARTS, GROUPS_OF_ALL_STARTS // groups)):
        drawn = torch.rand(len(scores), m * groups, generator=generator, dtype=torch.float32, device="cpu")
        yield given if attempt == 1 else drawn.argsort(1).to(given.device).unflatten(1, (m, groups))


def _better(
    best: torch.Tensor, score: torch.Tensor, found: torch.Tensor, reached: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool by pool, the slots that retain more."""
    wins = reached > score
    return torch.where(wins[:, None, None], found, best), torch.where(wins, reached, score)


def snake_order(scores: torch.Tensor, m: int) -> torch.Tensor:
    """RIA's heuristic: channels by their sum of scores, dealt out to and fro over the groups.

    Args:
        scores: [n_pools, rows, channels].
        m: size of a group.

    Returns:
        Slots int64 [n_pools, m, groups]: the channels of group g are ``slots[pool, :, g]``.
    """
    slots = scores.sum(1).argsort(dim=1, stable=True).unflatten(1, (m, -1)).clone()
    slots[:, 1::2] = slots[:, 1::2].flip(2)
    return slots


def retained_score(scores: torch.Tensor, slots: torch.Tensor, n: int) -> torch.Tensor:
    """Sum of the best n of every group over all rows, fp64 [n_pools], of scores [n_pools, rows, channels]."""
    best = _largest(_columns(scores, slots), n)
    return torch.stack([values.sum((1, 2), dtype=torch.float64) for values in best]).sum(0)


def _search(scores: torch.Tensor, slots: torch.Tensor, n: int, cycles: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = float(retained_score(scores, slots, n).sum())
    for cycle in range(cycles):
        if cycle:
            shuffle = torch.rand(slots.shape, generator=generator, dtype=torch.float32, device="cpu")
            slots = slots.gather(1, shuffle.argsort(1).to(slots.device))
        columns = _columns(scores, slots)
        gained = 0.0
        for taken in range(len(columns)):
            threshold = _largest([column for slot, column in enumerate(columns) if slot != taken], n)[-1]
            gains = join_gains(columns[taken], threshold)
            joins = assignment(gains)
            gained += float((gains.gather(2, joins[:, :, None]) - gains.diagonal(dim1=1, dim2=2)[:, :, None]).sum())
            columns[taken] = columns[taken].gather(2, joins[:, None, :].expand_as(columns[taken]))
            slots = slots.clone()
            slots[:, taken] = slots[:, taken].gather(1, joins)
        total += gained
        if gained <= LEAST_GAIN * total:
            break
    return slots


def _columns(scores: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Scores [n_pools, rows, groups] of the channels in each slot."""
    shape = (len(scores), scores.shape[1], slots.shape[2])
    return [scores.gather(2, slot[:, None, :].expand(shape)) for slot in slots.unbind(1)]


def _largest(values: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """The n largest of ``values`` at every place, in falling order; by insertion, since there are few."""
    best: list[torch.Tensor] = []
    for rest in values:
        for k, held in enumerate(best):
            best[k], rest = torch.maximum(held, rest), torch.minimum(held, rest)
        if len(best) < n:
            best.append(rest)
    return best
