"""Statistics of the calibration set that do not depend on how many processes collect them.

The batches are cut into lanes. The statistics of a lane are collected on their own, and those of all lanes are added
along a fixed binary tree. Each process takes whole lanes, so every sum is computed with the same operands in the same
order, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..processes import Processes
from .batches import MaskedInput
from .collect import InputCollector

LANES = 4
"""Number of lanes of a calibration set with enough batches."""

MakeCollector = Callable[[int, bool], InputCollector]
"""Makes the collector of a lane, from its number and from whether no batch is known to call a layer twice."""

Node = tuple[int, int]
"""The lanes of a subtree: the first, and the one after the last."""


class Lanes:
    """How the batches of a calibration set are spread over lanes and processes.

    Args:
        n_batches: number of batches in all processes.
        processes: this process and the others.
        most: largest number of lanes.
    """

    def __init__(self, n_batches: int, processes: Processes, most: int = LANES) -> None:
        self.processes = processes
        self.count = max(1, min(most, n_batches))
        self._bounds = [lane * n_batches // self.count for lane in range(self.count + 1)]
        self.own = [
            lane
            for lane in range(self.count)
            if self._owner(lane, (0, self.count), (0, processes.size)) == processes.rank
        ]

    @property
    def batches(self) -> range:
        """Indices of the batches that this process runs."""
        if not self.own:
            return range(0)
        return range(self._bounds[self.own[0]], self._bounds[self.own[-1] + 1])

    def lane_of(self, batch: int) -> int:
        """The lane of a batch."""
        return next(lane for lane in range(self.count) if batch < self._bounds[lane + 1])

    def collect(
        self, make: Callable[[int, bool], InputCollector], run: Callable[[LaneCollector], None]
    ) -> InputCollector:
        """Collect the statistics of all batches, in all processes.

        Args:
            make: makes the collector of a lane.
            run: runs this process's batches, in order, with a watcher.
        """
        watcher = LaneCollector(self, make)
        run(watcher)
        root = self._reduced(watcher.merged, (0, self.count), (0, self.processes.size), make)
        if self.processes.size == 1:
            return root or make(0, False)
        state = self.processes.broadcast(None if root is None else root.state())
        if self.processes.is_first:
            return root or make(0, False)
        return make(0, False).with_state(state)

    def _owner(self, lane: int, node: Node, group: Node) -> int:
        if group[1] - group[0] == 1 or node[1] - node[0] == 1:
            return group[0]
        left, right = halves(node)
        first, second = halves(group)
        return self._owner(lane, left, first) if lane < left[1] else self._owner(lane, right, second)

    def _reduced(
        self, done: dict[Node, InputCollector], node: Node, group: Node, make: MakeCollector
    ) -> InputCollector | None:
        """The statistics of a subtree, in the first process of its group; None in the others."""
        rank = self.processes.rank
        if not group[0] <= rank < group[1]:
            return None
        if node in done or group[1] - group[0] == 1 or node[1] - node[0] == 1:
            return done.get(node)
        left, right = halves(node)
        first, second = halves(group)
        of_left, of_right = self._reduced(done, left, first, make), self._reduced(done, right, second, make)
        if rank == second[0]:
            self.processes.send(None if of_right is None else of_right.state(), to=first[0])
        if rank != first[0]:
            return None
        state = self.processes.receive(second[0])
        assert of_left is not None
        if state is not None:
            of_left.merge(make(0, False).with_state(state))
        return of_left


class LaneCollector:
    """A watcher that collects each lane with a collector of its own, and merges neighbors as soon as both are complete.

    Attributes:
        merged: the statistics of each subtree that is complete and has no complete parent.
    """

    def __init__(self, lanes: Lanes, make: MakeCollector) -> None:
        self._lanes, self._make = lanes, make
        self._batches = iter(lanes.batches)
        self._left = len(lanes.batches)
        self._current: InputCollector | None = None
        self._lane = -1
        self._parents = dict(_parents((0, lanes.count)))
        self.merged: dict[Node, InputCollector] = {}

    @property
    def has_read(self) -> bool:
        """As in :class:`~ace_triton.decoders.watcher.Watcher`."""
        return self._current is not None and self._current.has_read

    @contextmanager
    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[MaskedInput] = (),
        leave_early: bool = False,
    ) -> Iterator[None]:
        """As in :class:`~ace_triton.decoders.watcher.Watcher`."""
        lane = self._lanes.lane_of(next(self._batches))
        if self._current is None or lane != self._lane:
            each_once = self._current is not None and self._current.each_once
            self._complete()
            self._lane, self._current = lane, self._make(lane, each_once)
        with self._current.batch(shape, valid, others=others, leave_early=leave_early):
            yield
        self._left -= 1
        if not self._left:
            self._complete()

    def _complete(self) -> None:
        if self._current is None:
            return
        node = (self._lane, self._lane + 1)
        self.merged[node] = self._current
        self._lane = -1
        while (family := self._parents.get(node)) is not None and all(child in self.merged for child in family[1:]):
            node, left, right = family
            whole = self.merged.pop(left)
            whole.merge(self.merged.pop(right))
            self.merged[node] = whole


def halves(node: Node) -> tuple[Node, Node]:
    """A range in two; the first half is never the longer one."""
    middle = (node[0] + node[1]) // 2
    return (node[0], middle), (middle, node[1])


def _parents(node: Node) -> Iterator[tuple[Node, tuple[Node, Node, Node]]]:
    """For each subtree below ``node``: its parent, and the parent's two children."""
    if node[1] - node[0] > 1:
        left, right = halves(node)
        yield from ((child, (node, left, right)) for child in (left, right))
        yield from _parents(left)
        yield from _parents(right)
