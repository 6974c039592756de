"""Finds an order of a layer's input channels in which n:m loses less of the score.

In every row, a group of m channels retains its n largest scores. Channels may be assigned to groups freely if the
layers before can be reordered too (:mod:`.fold`). The search starts from RIA's heuristic order ("Plug-and-Play", ICLR
2024: channels sorted by their sum of scores, assigned to groups in alternating direction) and, like RIA, improves it
by linear sum assignment. Each round removes one channel from every group and assigns the removed channels to groups so
that the groups retain the most. A cycle removes every channel once; the next cycle combines channels differently. The
kernel :func:`~ace_triton.kernels.join_gains.join_gains` computes the gain of each group by each channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..kernels.assignment import assignment
from ..kernels.join_gains import join_gains

CYCLES = 2
"""Maximum number of cycles; each removes every channel of every group once."""

MOST_STARTS, GROUPS_OF_ALL_STARTS = 16, 64
"""Maximum number of starting orders, and of groups in all starting orders together."""

LARGEST_EXPONENT = 120
"""Binary exponent below which the sum of all scores must stay, so that sums and differences of scores fit fp32."""

LEAST_GAIN = 1e-4
"""The search stops after a cycle that adds at most this fraction of the retained score."""


@dataclass(frozen=True)
class Permutation:
    """An order of the channels in each pool.

    Attributes:
        order: int64 [n_pools, channels]; position p gets channel ``order[pool, p]``.
        before, after: score retained over all rows and pools in the original order and in this one.
    """

    order: torch.Tensor
    before: float
    after: float


def search_permutation(scores: torch.Tensor, n: int, m: int, *, cycles: int = CYCLES, seed: int = 0) -> Permutation:
    """Search for an order of channels in which n:m retains a larger sum of scores.

    The retained score never decreases between rounds, and the result retains at least as much as the original order. A
    round takes rows * (channels / m)^2 steps of three instructions. A cycle has m rounds.

    Args:
        scores: fp32 [n_pools, rows, channels], not negative. Channels stay in their pool.
        n: number of channels kept per group.
        m: size of a group; must divide the number of channels.
        cycles: maximum number of cycles.
        seed: random seed for the starting orders and for the channels that are removed together.

    Raises:
        ArgumentError: if the scores have another shape or are not finite, or if n:m does not fit them.
    """
    if scores.dim() != 3 or not scores.shape[2] or scores.shape[2] % m or not 0 < n < m:
        raise ArgumentError(
            f"scores must be [n_pools, rows, channels] with channels a positive multiple of m, and 0 < n < m; got "
            f"{tuple(scores.shape)} and {n}:{m}"
        )
    given = torch.arange(scores.shape[2], device=scores.device).reshape(-1, m).t().expand(len(scores), -1, -1)
    before = retained_score(scores, given, n)
    retained = float(before.sum())
    if not math.isfinite(retained):
        raise ArgumentError("scores contain NaN or infinity: check the weights and the statistics for overflow")
    # All scores sum to at most m / n times the retained score. Scaling by a power of two changes no comparison.
    unit = 2.0 ** max(0, math.frexp(retained * m / n)[1] - LARGEST_EXPONENT)
    if unit > 1:
        scores, before = scores / unit, before / unit
    best, score = given, before
    for start in _starts(scores, given, seed):
        found = _search(scores, start, n, cycles, seed)
        best, score = _better(best, score, found, retained_score(scores, found, n))
    return Permutation(best.transpose(1, 2).flatten(1), retained, unit * float(score.sum()))


def _starts(scores: torch.Tensor, given: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """The heuristic order; with few groups, where local optima are likely, also the given and random orders."""
    _, m, groups = given.shape
    yield snake_order(scores, m)
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(1, min(MOST_STARTS, GROUPS_OF_ALL_STARTS // groups)):
        random = torch.rand(len(scores), m * groups, generator=generator, dtype=torch.float32, device="cpu")
        yield given if attempt == 1 else random.argsort(1).to(given.device).unflatten(1, (m, groups))


def _better(
    best: torch.Tensor, score: torch.Tensor, found: torch.Tensor, found_score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pool, the slots that retain more, and their retained score."""
    wins = found_score > score
    return torch.where(wins[:, None, None], found, best), torch.where(wins, found_score, score)


def snake_order(scores: torch.Tensor, m: int) -> torch.Tensor:
    """RIA's heuristic: channels sorted by their sum of scores, assigned to the groups in alternating direction.

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
    """Sum of the n largest scores of every group over all rows, fp64 [n_pools]; scores [n_pools, rows, channels]."""
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
        for removed, threshold in _thresholds(columns, n, [], 0, len(columns)):
            gains = join_gains(columns[removed], threshold)
            joins = assignment(gains)
            gained += float((gains.gather(2, joins[:, :, None]) - gains.diagonal(dim1=1, dim2=2)[:, :, None]).sum())
            columns[removed] = columns[removed].gather(2, joins[:, None, :].expand_as(columns[removed]))
            slots = slots.clone()
            slots[:, removed] = slots[:, removed].gather(1, joins)
        total += gained
        if gained <= LEAST_GAIN * total:
            break
    return slots


def _columns(scores: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """Scores [n_pools, rows, groups] of the channels in each slot."""
    shape = (len(scores), scores.shape[1], slots.shape[2])
    return [scores.gather(2, slot[:, None, :].expand(shape)) for slot in slots.unbind(1)]


def _thresholds(
    columns: list[torch.Tensor], n: int, outside: list[torch.Tensor], begin: int, end: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slot, and the n-th largest score of all other slots at every position.

    A column may be replaced after its slot was given. Halves are taken one after the other, so each level of halving
    compares each column once.

    Args:
        columns: the scores of every slot.
        n: which of the other scores to give.
        outside: the n largest scores outside ``begin`` to ``end``, in descending order.
        begin, end: the slots to give.
    """
    if end - begin == 1:
        yield begin, outside[-1]
        return
    middle = (begin + end) // 2
    yield from _thresholds(columns, n, _largest(columns[middle:end], n, outside), begin, middle)
    yield from _thresholds(columns, n, _largest(columns[begin:middle], n, outside), middle, end)


def _largest(values: list[torch.Tensor], n: int, known: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """The n largest of ``values`` and of the descending ``known`` at every position, in descending order; by insertion,
    since there are few."""
    best = list(known)
    for rest in values:
        for k, held in enumerate(best):
            best[k], rest = torch.maximum(held, rest), torch.minimum(held, rest)
        if len(best) < n:
            best.append(rest)
    return best
