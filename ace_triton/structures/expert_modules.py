"""Finds the channels inside experts that are modules: members of a list of experts, and shared experts.

A proven fold tells which layers of an expert compute its channels, and which one reads them. An expert that no token of
the trial reached has the layers of another expert with the same shapes, and so its channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..decoders.blocks import Block
from ..decoders.layer_roles import in_attention
from ..linears import linear_weight
from ..reordering.fold import Fold
from ..reordering.reorder import NOT_REACHED, Folds
from .coupled_layers import Coupled
from .mixtures import Mixture


def channels_of_modules(mixture: Mixture, folds: Folds) -> list[Coupled] | str:
    """The channels of each expert of a mixture whose experts are modules, or why they cannot be told apart."""
    if mixture.stacks or len(mixture.lists) != 1:
        return "its experts are in several modules"
    ((path, members),) = mixture.lists.items()
    reasons = {unfolded.name: unfolded.reason for unfolded in folds.unfolded}
    found = {index: _folds_in(f"{path}.{index}", folds.proven) for index in range(len(members))}
    known = next((index for index, of in found.items() if of), None)
    if known is None:
        own = [name for name in reasons if name.startswith(f"{path}.")]
        return f"{own[0]}: {reasons[own[0]]}" if own else "no feed-forward whose channels can be told apart"
    shapes, entries = _shapes(f"{path}.{known}", folds.layers), []
    for index, own_folds in found.items():
        home = f"{path}.{index}"
        if _shapes(home, folds.layers) != shapes:
            return f"{home} has other layers than {path}.{known}"
        reached = [name for name, reason in reasons.items() if name.startswith(f"{home}.") and reason != NOT_REACHED]
        if len(own_folds) != 1 and (own_folds or f"{home}.{_inner(found[known][0].consumer, path)}" in reached):
            return f"{home} has {len(own_folds)} feed-forwards whose channels can be told apart, and one is expected"
        fold = found[known][0]
        producers = tuple(
            (f"{home}.{_inner(name, path)}", _copies(name, fold, folds.layers)) for name in fold.producers
        )
        consumer = f"{home}.{_inner(fold.consumer, path)}"
        entries.append(Coupled("expert_channels", consumer, producers, fold.width, "routed"))
    return entries


def shared_channels(block: Block, mixture: Mixture, folds: Folds, count: int) -> list[Coupled]:
    """The channels of the shared experts of a block, whose width is a multiple of that of the others.

    Args:
        block: the block.
        mixture: its mixture.
        folds: the folds of the model.
        count: number of channels of an expert of the mixture.
    """
    return [
        Coupled(
            "expert_channels",
            name,
            tuple((producer, _copies(producer, fold, folds.layers)) for producer in fold.producers),
            fold.width,
            "shared",
        )
        for name, fold in folds.proven.items()
        if name.startswith(f"{block.name}.")
        and not in_attention(block, name)
        and not any(name.startswith(f"{path}.") for path in mixture.lists)
        and fold.width % count == 0
    ]


def _folds_in(home: str, proven: Mapping[str, Fold]) -> list[Fold]:
    return [fold for name, fold in proven.items() if name.startswith(f"{home}.")]


def _shapes(home: str, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of the layers of a module, by name in it."""
    weights = {name: linear_weight(layer) for name, layer in layers.items() if name.startswith(f"{home}.")}
    return {name.removeprefix(home): tuple(weight.shape) for name, weight in weights.items() if weight is not None}


def _inner(name: str, path: str) -> str:
    """The name of a layer in its member of a list."""
    return name.removeprefix(f"{path}.").partition(".")[2]


def _copies(name: str, fold: Fold, layers: Mapping[str, nn.Module]) -> int:
    """Number of rows of a producer for a channel."""
    weight = linear_weight(layers[name])
    assert weight is not None
    return weight.shape[0] // fold.width
