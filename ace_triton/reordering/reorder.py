"""Reorders channels of a model's layers so that n:m loses less, wherever that costs nothing when the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.batches import TRIAL_LENGTH, TRIAL_SEQUENCES
from ..decoders.blocks import Block, in_attention, linears_of
from ..decoders.collect import InputCollector
from ..linears import linear_weight
from ..methods.registry import Needs
from ..timing import Stopwatch
from .fold import Fold, FoldTrial, Unfolded, attention_folds, feed_forward_folds, parent
from .permutation import search_permutation

NOT_FOUND = "no layer of its module puts out just its inputs (its values are fused with other outputs?)"
NOT_REACHED = "no token of the trial reached it"
SHARED = "its weight, or that of what feeds it, serves other layers too"
CHANGES_THE_MODEL = "more than element-wise work lies between it and what feeds it, or something else reads that too"


@dataclass(frozen=True)
class Reordered:
    """A layer whose inputs were put in another order.

    Attributes:
        name: its dotted name.
        before, after: share of its score that n:m retains in the old order and in the new.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class PermutationReport:
    """What ``permute=True`` did.

    Attributes:
        reordered: the layers, in order.
        unfolded: output and down projections left as they were, and why. Layers that read the residual stream (q, k,
            v, gate, up) are not listed: one order would have to suit them all, in every block.
        seconds: spent on finding places and orders.
    """

    reordered: tuple[Reordered, ...]
    unfolded: tuple[Unfolded, ...]
    seconds: float


@dataclass(frozen=True)
class Folds:
    """Where orders fold into a model.

    Attributes:
        layers: the linear layers of its blocks, by name.
        proven: folds that leave the model's function unchanged, by consumer.
        unfolded: consumers without one.
    """

    layers: Mapping[str, nn.Module]
    proven: Mapping[str, Fold]
    unfolded: tuple[Unfolded, ...]


def find_folds(
    model: nn.Module,
    blocks: Sequence[Block],
    ids: torch.Tensor,
    m: int,
    *,
    wanted: Callable[[str], bool],
    shared: Callable[[str], bool],
) -> Folds:
    """Every place in a model's blocks where an order of a layer's inputs costs nothing.

    Args:
        model: in evaluation mode; unchanged afterwards, bit for bit.
        blocks: its decoder blocks.
        ids: int64 [n_sequences, length]; a few tokens of it are run through the model.
        m: size of a group.
        wanted: whether the inputs of a layer of that name are to be ordered.
        shared: whether a layer's weight serves other layers too.
    """
    ids = ids[:TRIAL_SEQUENCES, :TRIAL_LENGTH]
    layers = {name: layer for block in blocks for name, layer in linears_of(block.module, block.name)}
    candidates = {consumer: folds for consumer, folds in _candidates(model, blocks, layers, ids) if wanted(consumer)}
    trial = FoldTrial(model, layers, list(candidates), ids)
    proven: dict[str, Fold] = {}
    unfolded: list[Unfolded] = []
    sole = {
        consumer: [fold for fold in folds if not any(map(shared, (consumer, *fold.producers)))]
        for consumer, folds in candidates.items()
    }
    fitting = {consumer: [fold for fold in folds if fold.width % m == 0] for consumer, folds in sole.items()}
    at_once = trial.unchanged_at_once([folds[0] for folds in fitting.values() if folds], blocks)
    for consumer, folds in candidates.items():
        unchanging = (fold for fold in fitting[consumer] if fold in at_once or trial.unchanged_by(fold))
        if not trial.reaches(consumer):
            reason = NOT_REACHED
        elif (fold := next(unchanging, None)) is not None:
            proven[consumer] = fold
            continue
        elif not folds:
            reason = NOT_FOUND
        elif not sole[consumer]:
            reason = SHARED
        else:
            runs = sole[consumer][0].width
            reason = CHANGES_THE_MODEL if fitting[consumer] else f"its runs of {runs} inputs are no multiple of {m}"
        unfolded.append(Unfolded(consumer, reason))
    return Folds(layers, proven, tuple(unfolded))


def _candidates(
    model: nn.Module, blocks: Sequence[Block], layers: Mapping[str, nn.Module], ids: torch.Tensor
) -> Iterator[tuple[str, list[Fold]]]:
    """Consumers and where an order of their inputs might fold in, most likely first."""
    collector = InputCollector(layers, Needs(), Stopwatch(ids.device))
    with collector.batch((ids.shape[0], ids.shape[1]), None), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for block in blocks:
        inside = {name: layer for name, layer in layers.items() if name.startswith(f"{block.name}.")}
        attention = {name: layer for name, layer in inside.items() if in_attention(block, name)}
        feed_forward = {name: layer for name, layer in inside.items() if name not in attention}
        groups = [group for group in collector.groups if group[0] in inside]
        yield from attention_folds(attention, groups, _head_dims(model, map(parent, attention))).items()
        yield from feed_forward_folds(feed_forward, groups).items()


def _head_dims(model: nn.Module, modules: Iterable[str]) -> dict[str, int | None]:
    stated = {name: getattr(model.get_submodule(name), "head_dim", None) for name in modules}
    return {name: width if isinstance(width, int) else None for name, width in stated.items()}


class Reorderer:
    """Puts the inputs of layers in the order in which n:m retains the most, and keeps the record."""

    def __init__(self, folds: Folds, m: int, clock: Stopwatch) -> None:
        self._folds, self._m, self._clock = folds, m, clock
        self._reordered: list[Reordered] = []

    def reorder(
        self,
        names: Sequence[str],
        n: int,
        scores: Callable[[str], torch.Tensor | None],
        collector: InputCollector | None,
    ) -> None:
        """Reorder those of some layers that a fold serves, with the weights that feed them and the statistics.

        Args:
            names: of layers that are all still dense.
            n: kept of every m inputs.
            scores: a layer's fp32 [out_features, in_features]; None where it is left alone.
            collector: of the statistics that follow, or None.
        """
        for name in names:
            fold = self._folds.proven.get(name)
            of_layer = None if fold is None else scores(name)
            if fold is None or of_layer is None or not bool(of_layer.isfinite().all()):
                continue
            found = search_permutation(fold.by_pool(of_layer), n, self._m)
            if found.after > found.before:
                fold.apply(self._folds.layers, found.order)
                if collector is not None:
                    _reorder_statistics(collector, fold, self._folds.layers, found.order)
            total = float(of_layer.sum(dtype=torch.float64)) or 1.0
            self._reordered.append(Reordered(name, found.before / total, found.after / total))

    def report(self) -> PermutationReport:
        """What was done so far."""
        return PermutationReport(tuple(self._reordered), self._folds.unfolded, self._clock.seconds().permute)


def _reorder_statistics(
    collector: InputCollector, fold: Fold, layers: Mapping[str, nn.Module], order: torch.Tensor
) -> None:
    collector.reorder_inputs(fold.consumer, fold.inputs(order))
    for name in fold.producers:
        weight = linear_weight(layers[name])
        assert weight is not None
        collector.reorder_outputs(name, fold.outputs(order, weight.shape[0]))
