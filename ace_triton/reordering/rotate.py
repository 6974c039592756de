"""Rotates the values of attention heads so that a pattern prunes less of the importance (:mod:`.rotation`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..decoders.collect import InputCollector
from ..decoders.plan import misfit
from ..linears import as_kernel_dtype, linear_weight
from ..processes import Processes
from ..sparsity import Sparsity
from ..timing import Stopwatch
from .fold import Fold, Unfolded
from .reorder import Folds
from .rotation import OutputSide, ValueSide, learned_rotation, near_one


@dataclass(frozen=True)
class Rotated:
    """An output projection whose inputs were rotated, with the values that it reads.

    Attributes:
        name: dotted name of the layer.
        before, after: fraction of the importance w_ij^2 G_jj that the pattern retains without and with the rotation;
            the mean over the pruned ones of the output and the value projection.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class RotationReport:
    """The layers that ``rotate=True`` rotated, and those it could not rotate.

    Attributes:
        rotated: the rotated output projections, in order of pruning.
        unrotated: output projections whose inputs stay as they are, with reasons.
        seconds: time spent on finding pairs and rotations, without the forwards.
    """

    rotated: tuple[Rotated, ...]
    unrotated: tuple[Unfolded, ...]
    seconds: float


class Rotator:
    """Learns a rotation for each pair of a value and an output projection, and folds it into their weights.

    Args:
        folds: the pairs.
        clock: measures the time.

    Attributes:
        rotated: the layers rotated so far.
    """

    def __init__(self, folds: Folds, clock: Stopwatch) -> None:
        self._folds, self._clock = folds, clock
        self.rotated: list[Rotated] = []

    def observed(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """The layers whose inputs the rotations of some layers need, by name; empty if none of them is rotated."""
        folds = [self._folds.proven[name] for name in names if name in self._folds.proven]
        return {name: self._folds.layers[name] for fold in folds for name in (*fold.producers, fold.consumer)}

    def rotate(
        self, pruned: Mapping[str, nn.Module], sparsity: Sparsity, collector: InputCollector, processes: Processes
    ) -> None:
        """Rotate each of the layers that has a fold.

        Args:
            pruned: the layers that will be pruned, by name; they are still dense.
            sparsity: their pattern.
            collector: has the Gram matrices of the inputs of :meth:`observed`.
            processes: the processes of the run; the first one learns the rotations.
        """
        for name in pruned:
            fold = self._folds.proven.get(name)
            sides = [] if fold is None else self._sides(fold, pruned, sparsity, collector)
            if fold is None or not sides:
                continue
            found = processes.broadcast(learned_rotation(sides, fold.pools, fold.width) if processes.is_first else None)
            assert found is not None
            fold.rotate(self._folds.layers, found.matrix)
            self.rotated.append(Rotated(name, found.before, found.after))

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of layers that an earlier run rotated."""
        self.rotated += [Rotated(**record) for record in records]

    def report(self) -> RotationReport:
        """The layers rotated so far."""
        return RotationReport(tuple(self.rotated), self._folds.unfolded, self._clock.seconds().rotate)

    def _sides(
        self, fold: Fold, pruned: Mapping[str, nn.Module], sparsity: Sparsity, collector: InputCollector
    ) -> list[OutputSide | ValueSide]:
        """What the rotation is learned from; empty if no token reached the layers, or a Gram matrix is not finite."""
        (producer,), consumer = fold.producers, fold.consumer
        gram, gram_of_values = (_gram(collector, name) for name in (consumer, producer))
        if gram is None or gram_of_values is None or not bool(gram.isfinite().all() & gram_of_values.isfinite().all()):
            return []
        sides: list[OutputSide | ValueSide] = []
        outputs, values = (_weight(self._folds.layers[name]) for name in (consumer, producer))
        axis, heads = sparsity.axis or "in", (fold.pools, fold.shares, fold.width)
        if misfit(outputs, sparsity, axis) is None:
            pools, shares = (torch.arange(count, device=gram.device) for count in heads[:2])
            places = pools[:, None], shares
            of_heads = gram.unflatten(1, heads).unflatten(0, heads)[*places, :, *places]
            sides.append(OutputSide(near_one(outputs).unflatten(1, heads), near_one(of_heads), sparsity))
        if producer in pruned and misfit(values, sparsity, axis) is None:
            weight = near_one(values).unflatten(0, (fold.pools, fold.width))
            sides.append(ValueSide(weight, near_one(gram_of_values.diagonal()), sparsity))
        return sides


def _gram(collector: InputCollector, name: str) -> torch.Tensor | None:
    stats = collector.statistics(name)
    return None if stats is None or stats.gram is None else stats.gram.matrix


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = linear_weight(layer)
    assert weight is not None
    return as_kernel_dtype(weight.detach()).float()
