"""Finds where an order of a layer's inputs can be folded into the weights that feed it, at no cost when the model runs.

The inputs of a down projection are, one by one, the outputs of gate and up; the inputs of an attention's output
projection are those of the value projection, head by head, and query heads that share a key-value head share its
order. Such places are found by shape and by who reads what. Whether nothing but element-wise work lies
between is not guessed: a random order is folded in, the block is run again on a few tokens, and the order is taken
back; then the model is run with all orders at once. Where either shows a change, each fold is tried in the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..decoders.blocks import Block, gated_consumers
from ..decoders.replay import CANNOT_RUN_AGAIN, hidden_of
from ..linears import linear_weight
from ..out_of_memory import raise_if_out_of_memory

LOOSE = 0.25
"""Relative change that rounding may grow to further down the model; a wrong order changes a layer's output by 1.4."""


@dataclass(frozen=True)
class Fold:
    """Where an order of a layer's inputs goes.

    Attributes:
        consumer: the layer, with in_features = pools * shares * width.
        producers: layers whose outputs make up these inputs, with out_features a multiple of pools * width.
        pools: sets of channels that are ordered each on its own: key-value heads, or 1.
        shares: how many of the consumer's runs of ``width`` inputs share the order of a pool: query heads of a
            key-value head, or 1.
        width: channels of a pool.
    """

    consumer: str
    producers: tuple[str, ...]
    pools: int
    shares: int
    width: int

    def by_pool(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [out_features, in_features] of the consumer as [pools, out_features * shares, width]."""
        split = scores.unflatten(1, (self.pools, self.shares, self.width))
        return split.permute(1, 0, 2, 3).flatten(1, 2)

    def inputs(self, order: torch.Tensor) -> torch.Tensor:
        """The order int64 [in_features] of the consumer's inputs for one of each pool [pools, width]."""
        start = torch.arange(self.pools * self.shares, device=order.device) * self.width
        return (order.repeat_interleave(self.shares, dim=0) + start[:, None]).flatten()

    def outputs(self, order: torch.Tensor, out_features: int) -> torch.Tensor:
        """The order int64 [out_features] of a producer's outputs for one of each pool [pools, width]."""
        copies = out_features // order.numel()
        start = torch.arange(copies * self.pools, device=order.device) * self.width
        return (order.repeat(copies, 1) + start[:, None]).flatten()

    @torch.inference_mode()
    def apply(self, layers: Mapping[str, nn.Module], order: torch.Tensor) -> None:
        """Reorder the consumer's inputs and the producers' outputs in place; bits are moved, not changed."""
        weight = _weight(layers[self.consumer])
        weight.copy_(weight.gather(1, self.inputs(order).to(weight.device).expand(weight.shape)))
        for name in self.producers:
            weight = _weight(layers[name])
            outputs = self.outputs(order, weight.shape[0]).to(weight.device)
            weight.copy_(weight[outputs])
            bias = layers[name].bias
            if isinstance(bias, torch.Tensor):
                bias.copy_(bias[outputs])


@dataclass(frozen=True)
class Unfolded:
    """A layer whose inputs could not be reordered.

    Attributes:
        name: its dotted name.
        reason: why.
    """

    name: str
    reason: str


def _weight(layer: nn.Module) -> torch.Tensor:
    """[out_features, in_features], as bytes where torch cannot index the dtype (fp8)."""
    weight = linear_weight(layer)
    assert weight is not None
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight


def feed_forward_folds(layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> dict[str, list[Fold]]:
    """Possible folds into the layers of a block that lie outside attention, by consumer.

    Gate and up into down; or a layer into the one beside it that has as many inputs as it has outputs.

    Args:
        layers: linear layers by name.
        groups: names of layers that read the same tensor, in order of use.
    """
    sizes = {name: _weight(layer).shape for name, layer in layers.items()}
    feeding: dict[str, list[str]] = {}
    for producer, consumer in gated_consumers(dict(layers), [list(group) for group in groups]).items():
        feeding.setdefault(consumer, []).append(producer)
    order = [[name for name in group if name in layers] for group in groups]
    for place, members in enumerate(order):
        if len(members) != 1:
            continue
        (producer,) = members
        later = [name for group in order[place + 1 :] for name in group if parent(name) == parent(producer)]
        matching = [name for name in later if sizes[name][1] == sizes[producer][0]]
        if len(matching) == 1 and producer not in {p for ps in feeding.values() for p in ps}:
            feeding.setdefault(matching[0], [producer])
    return {
        consumer: [Fold(consumer, tuple(producers), pools=1, shares=1, width=sizes[consumer][1])]
        for consumer, producers in feeding.items()
    }


def attention_folds(
    layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], head_dims: Mapping[str, int | None]
) -> dict[str, list[Fold]]:
    """Possible folds into the output projections of a block's attention modules, by consumer.

    The output projection is what such a module runs last; every other layer whose outputs are whole heads, as many as
    divide those of the output projection's inputs, may be its values. Of equals the later comes first.

    Args:
        layers: linear layers of attention by name.
        groups: names of layers that read the same tensor, in order of use.
        head_dims: width of a head by name of the attention module; None where it is not known.
    """
    found: dict[str, list[Fold]] = {}
    for module, width in head_dims.items():
        members = [[name for name in group if name in layers and parent(name) == module] for group in groups]
        used = [group for group in members if group]
        if len(used) < 2 or len(used[-1]) != 1:
            continue
        (consumer,) = used[-1]
        inputs = _weight(layers[consumer]).shape[1]
        found[consumer] = []
        for name in reversed([name for group in used[:-1] for name in group]):
            outputs = _weight(layers[name]).shape[0]
            if width is not None and outputs % width == 0 and inputs % outputs == 0:
                found[consumer].append(Fold(consumer, (name,), outputs // width, inputs // outputs, width))
    return found


def parent(name: str) -> str:
    """The dotted name of the module that a layer lies in."""
    return name.rpartition(".")[0]


class FoldTrial:
    """Tries folds out on a few tokens.

    Args:
        model: in evaluation mode.
        layers: all linear layers that a fold may name.
        consumers: names of those whose inputs are to be reordered.
        ids: int64 [n_sequences, length].
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], consumers: Sequence[str], ids: torch.Tensor
    ) -> None:
        self._model, self._layers, self._consumers, self._ids = model, layers, consumers, ids

    @cached_property
    def _dense(self) -> dict[str, torch.Tensor]:
        return self._outputs()

    def reaches(self, name: str) -> bool:
        """Whether a token reached the layer."""
        return name in self._dense

    def unchanged_by(self, fold: Fold) -> bool:
        """Whether the model computes the same with a random order folded in: what the consumer puts out to rounding,
        what others put out to rounding as it grows on its way."""
        with self._folded([fold]):
            return _same(self._outputs(), self._dense, fold.consumer)

    def unchanged_at_once(self, folds: Sequence[Fold], blocks: Sequence[Block]) -> list[Fold]:
        """Those of some folds, one a consumer, that need no trial of their own.

        In two forwards: each block is run again with each of its folds, on what it is given in the model's own
        forward; then the model with all that passed, which must show rounding and no more, or none of them is sure.
        """
        local: list[Fold] = []
        seen: dict[str, torch.Tensor] = {}
        failed: dict[str, Exception] = {}

        def check(block: Block, of_block: Sequence[Fold]) -> Callable[..., None]:
            running = False

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                nonlocal running
                if running:
                    return
                running, before = True, dict(seen)
                try:
                    dense = before | {block.name: hidden_of(output).clone()}
                    for fold in of_block:
                        with self._folded([fold]):
                            again = hidden_of(module(*args, **kwargs))
                        if fold.consumer in dense and _same(seen | {block.name: again}, dense, fold.consumer):
                            local.append(fold)
                except CANNOT_RUN_AGAIN as error:
                    raise_if_out_of_memory(error)
                    failed[block.name] = error
                seen.update(before)
                running = False

            return hook

        with ExitStack() as hooks:
            for block in blocks:
                of_block = [fold for fold in folds if fold.consumer.startswith(f"{block.name}.")]
                if of_block:
                    handle = block.module.register_forward_hook(check(block, of_block), with_kwargs=True)
                    hooks.callback(handle.remove)
            self._dense = self._outputs(seen)
        if failed:
            name, error = next(iter(failed.items()))
            others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            warnings.warn(
                f"{name}{others}: the block fails when it is run again ({error}), so each order of its channels is "
                "tried in the whole model, which takes longer",
                stacklevel=5,
            )
        with self._folded(local):
            return local if _same(self._outputs(), self._dense) else []

    @contextmanager
    def _folded(self, folds: Iterable[Fold]) -> Iterator[None]:
        """A random order is folded in inside, and taken back after, to the bit."""
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as undo:
            for fold in folds:
                drawn = [torch.randperm(fold.width, generator=generator, device="cpu") for _ in range(fold.pools)]
                order = torch.stack(drawn)
                undo.callback(fold.apply, self._layers, order.argsort(1))
                fold.apply(self._layers, order)
            yield

    def _outputs(self, seen: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        seen = {} if seen is None else seen
        with ExitStack() as hooks:
            for name in self._consumers:
                hooks.enter_context(_output_noted(self._layers[name], seen, name))
            with torch.no_grad():
                seen["logits"] = self._model(input_ids=self._ids, use_cache=False).logits
        return seen


@contextmanager
def _output_noted(layer: nn.Module, seen: dict[str, torch.Tensor], name: str) -> Iterator[None]:
    def note(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        if output.numel():
            seen[name] = output.clone()

    handle = layer.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], consumer: str | None = None) -> bool:
    """Whether outputs agree: the consumer's closely, as nothing before it changed; the others' loosely."""
    near = {} if consumer is None else {consumer: max(1e-4, 2 * torch.finfo(want[consumer].dtype).eps)}
    return got.keys() == want.keys() and all(
        _close(got[name], tensor, near.get(name, LOOSE)) for name, tensor in want.items()
    )


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    if got.shape != want.shape:
        return False
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())
