"""Reorders channels of a model's layers so that n:m loses less, if the reordering costs nothing at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, run_model
from ..decoders.blocks import Block, linears_of
from ..decoders.collect import InputCollector
from ..decoders.layer_roles import attention_of
from ..linears import linear_weight
from ..methods.registry import Needs
from ..timing import Stopwatch
from .fold import Fold, Unfolded, attention_folds, feed_forward_folds, parent
from .permutation import search_permutation
from .trial import ORDERS, FoldTrial, Trial

NOT_FOUND = "no layer of its module has exactly its inputs as outputs (its values may be fused with other outputs)"
NOT_REACHED = "no token of the trial reached it"
SHARED = "its weight, or the weight of a layer that computes its inputs, is shared with other layers"

HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Attributes of attention modules that contain the width of a head. A wrong width fails the trial."""


@dataclass(frozen=True)
class Reordered:
    """A layer whose inputs were reordered.

    Attributes:
        name: dotted name of the layer.
        before, after: fraction of its score that n:m retains in the old and in the new order.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class PermutationReport:
    """The layers that ``permute=True`` reordered, and those it could not reorder.

    Attributes:
        reordered: the reordered layers, in order of pruning.
        unfolded: output and down projections that keep their order, with reasons. Layers that read the residual stream
            (q, k, v, gate, up) are not listed, because all of them, in every block, would need the same order.
        seconds: time spent on finding folds and orders.
    """

    reordered: tuple[Reordered, ...]
    unfolded: tuple[Unfolded, ...]
    seconds: float


@dataclass(frozen=True)
class Folds:
    """The folds of a model.

    Attributes:
        layers: linear layers of the blocks, by name.
        proven: folds that do not change the model's function, by name of the consumer.
        unfolded: possible consumers without such a fold.
    """

    layers: Mapping[str, nn.Module]
    proven: Mapping[str, Fold]
    unfolded: tuple[Unfolded, ...]

    def to_dict(self) -> dict[str, Any]:
        """All but the layers, as JSON types."""
        return {
            "proven": {name: asdict(fold) for name, fold in self.proven.items()},
            "unfolded": {entry.name: entry.reason for entry in self.unfolded},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> Folds:
        """The inverse of :meth:`to_dict`."""
        proven = {
            name: Fold(**{**fold, "producers": tuple(fold["producers"])}) for name, fold in record["proven"].items()
        }
        return cls(layers, proven, tuple(Unfolded(*entry) for entry in record["unfolded"].items()))


def find_folds(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    m: int,
    *,
    wanted: Callable[[str], bool],
    shared: Callable[[str], bool],
    trial: Trial = ORDERS,
) -> Folds:
    """Find all layers in a model's blocks whose inputs can be reordered, or rotated, at no cost at run time.

    Args:
        model: the model, in evaluation mode; unchanged at return, bit for bit.
        blocks: blocks of the model.
        batch: a few inputs of the model, for the trial.
        m: size of a group; 1 if channels have no groups.
        wanted: True for the name of a layer whose inputs may be reordered.
        shared: True for the name of a layer whose weight other layers use too.
        trial: how a fold is tried.
    """
    layers = {name: layer for block in blocks for name, layer in linears_of(block.module, block.name)}
    found = _candidates(model, blocks, layers, batch, in_attention=trial.in_attention)
    candidates = {consumer: folds for consumer, folds in found if wanted(consumer)}
    tried = FoldTrial(model, layers, list(candidates), batch, trial)
    proven: dict[str, Fold] = {}
    unfolded: list[Unfolded] = []
    unshared = {
        consumer: [fold for fold in folds if not any(map(shared, (consumer, *fold.producers)))]
        for consumer, folds in candidates.items()
    }
    fitting = {consumer: [fold for fold in folds if fold.width % m == 0] for consumer, folds in unshared.items()}
    at_once = tried.unchanged_at_once([folds[0] for folds in fitting.values() if folds], blocks)
    for consumer, folds in candidates.items():
        unchanging = (fold for fold in fitting[consumer] if fold in at_once or tried.unchanged_by(fold))
        if not tried.reaches(consumer):
            reason = NOT_REACHED
        elif (fold := next(unchanging, None)) is not None:
            proven[consumer] = fold
            continue
        elif not folds:
            reason = NOT_FOUND
        elif not unshared[consumer]:
            reason = SHARED
        else:
            width = unshared[consumer][0].width
            reason = trial.reason if fitting[consumer] else f"its runs of {width} inputs are not a multiple of {m}"
        unfolded.append(Unfolded(consumer, reason))
    return Folds(layers, proven, tuple(unfolded))


def _candidates(
    model: nn.Module, blocks: Sequence[Block], layers: Mapping[str, nn.Module], batch: Batch, *, in_attention: bool
) -> Iterator[tuple[str, list[Fold]]]:
    """Consumers with their possible folds, the most likely fold first."""
    collector = InputCollector(layers, Needs(), Stopwatch(next(iter(batch.inputs.values())).device))
    with collector.batch(batch.shape, None), torch.no_grad():
        run_model(model, batch)
    for block in blocks:
        inside = {name: layer for name, layer in layers.items() if name.startswith(f"{block.name}.")}
        attention: dict[str, dict[str, nn.Module]] = {}
        feed_forward: dict[str, nn.Module] = {}
        for name, layer in inside.items():
            module = attention_of(block, name)
            (feed_forward if module is None else attention.setdefault(module, {}))[name] = layer
        groups = [[name for name in group if name in inside] for group in collector.groups]
        widths = _head_dims(model, [parent(name) for layers in attention.values() for name in layers])
        yield from attention_folds(attention, groups, widths).items()
        if not in_attention:
            yield from feed_forward_folds(feed_forward, groups).items()


def _head_dims(model: nn.Module, modules: Iterable[str]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name in modules:
        stated = (getattr(model.get_submodule(name), attribute, None) for attribute in HEAD_WIDTHS)
        found[name] = next((width for width in stated if isinstance(width, int)), None)
    return found


class Reorderer:
    """Reorders the inputs of layers so that n:m retains more of the score, and records the results.

    Attributes:
        reordered: the layers reordered so far.
    """

    def __init__(self, folds: Folds, m: int, clock: Stopwatch) -> None:
        self._folds, self._m, self._clock = folds, m, clock
        self.reordered: list[Reordered] = []

    def reorder(
        self,
        names: Sequence[str],
        n: int,
        scores: Callable[[str], torch.Tensor | None],
        collector: InputCollector | None,
    ) -> None:
        """Reorder each layer that has a fold, the layers that compute its inputs, and the statistics.

        Args:
            names: names of layers that are still dense.
            n: number of inputs kept of every m.
            scores: returns the scores of a layer, fp32 [out_features, in_features], or None to skip the layer.
            collector: contains the statistics to reorder; None if there are none.
        """
        for name in names:
            fold = self._folds.proven.get(name)
            layer_scores = None if fold is None else scores(name)
            if fold is None or layer_scores is None or not bool(layer_scores.isfinite().all()):
                continue
            found = search_permutation(fold.by_pool(layer_scores), n, self._m)
            if found.after > found.before:
                fold.apply(self._folds.layers, found.order)
                if collector is not None:
                    _reorder_statistics(collector, fold, self._folds.layers, found.order)
            total = float(layer_scores.sum(dtype=torch.float64)) or 1.0
            self.reordered.append(Reordered(name, found.before / total, found.after / total))

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of layers that an earlier run reordered."""
        self.reordered += [Reordered(**record) for record in records]

    def report(self) -> PermutationReport:
        """The layers reordered so far."""
        return PermutationReport(tuple(self.reordered), self._folds.unfolded, self._clock.seconds().permute)


def _reorder_statistics(
    collector: InputCollector, fold: Fold, layers: Mapping[str, nn.Module], order: torch.Tensor
) -> None:
    collector.reorder_inputs(fold.consumer, fold.inputs(order))
    for name in fold.producers:
        weight = linear_weight(layers[name])
        assert weight is not None
        collector.reorder_outputs(name, fold.outputs(order, weight.shape[0]))
