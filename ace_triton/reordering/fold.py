"""Finds layers whose input order can be folded into the weights of the layers before them, at no cost at run time.

Input channel j of a down projection is output channel j of gate and up. The inputs of an attention's output projection
are the outputs of the value projection, head by head; query heads that share a key-value head share its order. Such
pairs are found by shape and by which layers read the same tensor. A fold is valid only if all operations between the
layers are element-wise, which a trial checks: it folds in a random order, runs the block again on a few tokens, and
reverts the order. Then the model runs once with all orders. If outputs change, each fold is tried in the whole model.
An order is in a block's weights only while the block runs. If weights are in files, a copy of the block runs, so the
files do not change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, run_model, tensors_in
from ..decoders.blocks import Block
from ..decoders.calls import CANNOT_RUN_AGAIN, NotReplayable, hidden_of
from ..decoders.layer_roles import gated_consumers
from ..linears import linear_weight
from ..out_of_memory import raise_if_out_of_memory

LOOSE = 0.25
"""Largest relative change of later outputs that counts as rounding. A wrong order changes an output by about 1.4."""


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs can be reordered, and the layers whose outputs must be reordered with them.

    Attributes:
        consumer: name of the layer, with in_features = pools * shares * width.
        producers: names of the layers that compute these inputs, with out_features a multiple of pools * width.
        pools: number of sets of channels, each with its own order: key-value heads, or 1.
        shares: number of runs of ``width`` inputs that share the order of one pool: query heads per key-value head,
            or 1.
        width: number of channels in a pool.
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
        """Convert an order of each pool, int64 [pools, width], to the order of the consumer's inputs [in_features]."""
        start = torch.arange(self.pools * self.shares, device=order.device) * self.width
        return (order.repeat_interleave(self.shares, dim=0) + start[:, None]).flatten()

    def outputs(self, order: torch.Tensor, out_features: int) -> torch.Tensor:
        """Convert an order of each pool, int64 [pools, width], to that of a producer's outputs [out_features]."""
        copies = out_features // order.numel()
        start = torch.arange(copies * self.pools, device=order.device) * self.width
        return (order.repeat(copies, 1) + start[:, None]).flatten()

    @torch.inference_mode()
    def apply(self, layers: Mapping[str, nn.Module], order: torch.Tensor) -> None:
        """Reorder the consumer's inputs and the producers' outputs in place; values are moved, not changed."""
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
        name: dotted name of the layer.
        reason: why its inputs keep their order.
    """

    name: str
    reason: str


def _weight(layer: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features]; viewed as bytes if torch cannot index the dtype (fp8)."""
    weight = linear_weight(layer)
    assert weight is not None
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight


def feed_forward_folds(layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> dict[str, list[Fold]]:
    """Possible folds into the layers of a block outside attention, by consumer.

    A fold reorders gate and up for down; or one layer for a later layer of the same module that has as many inputs as
    the first layer has outputs. A module with a single layer (BERT's intermediate and output) counts as that layer.

    Args:
        layers: linear layers by name.
        groups: names of layers that read the same tensor, group by group, in order of use.
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
        home = _home(producer, layers)
        later = [name for group in order[place + 1 :] for name in group if _home(name, layers) == home]
        matching = [name for name in later if sizes[name][1] == sizes[producer][0]]
        if len(matching) == 1 and producer not in {p for ps in feeding.values() for p in ps}:
            feeding.setdefault(matching[0], [producer])
    return {
        consumer: [Fold(consumer, tuple(producers), pools=1, shares=1, width=sizes[consumer][1])]
        for consumer, producers in feeding.items()
    }


def attention_folds(
    modules: Mapping[str, Mapping[str, nn.Module]], groups: Sequence[Sequence[str]], head_dims: Mapping[str, int | None]
) -> dict[str, list[Fold]]:
    """Possible folds into the output projections of a block's attention modules, by consumer.

    The output projection is the layer that the module runs last. Any other layer may be the value projection if its
    outputs form whole heads and their number divides that of the output projection's inputs. Later layers come first.

    Args:
        modules: the linear layers of each attention module, by name.
        groups: names of layers that read the same tensor, group by group, in order of use.
        head_dims: width of a head by name of the module with the layer; None if unknown.
    """
    found: dict[str, list[Fold]] = {}
    for layers in modules.values():
        members = [[name for name in group if name in layers] for group in groups]
        used = [group for group in members if group]
        if len(used) < 2 or len(used[-1]) != 1:
            continue
        (consumer,) = used[-1]
        inputs = _weight(layers[consumer]).shape[1]
        found[consumer] = []
        for name in reversed([name for group in used[:-1] for name in group]):
            outputs, width = _weight(layers[name]).shape[0], head_dims[parent(name)]
            if width is not None and outputs % width == 0 and inputs % outputs == 0:
                found[consumer].append(Fold(consumer, (name,), outputs // width, inputs // outputs, width))
    return found


def parent(name: str) -> str:
    """The dotted name of the module that contains a layer."""
    return name.rpartition(".")[0]


def _home(name: str, layers: Iterable[str]) -> str:
    """The module that contains a layer and others: its own, or the one around that if the layer is alone in its own."""
    own = parent(name)
    return own if any(other.startswith(f"{own}.") and other != name for other in layers) else parent(own)


class FoldTrial:
    """Checks on a few inputs that folds do not change the model's function.

    Args:
        model: the model, in evaluation mode.
        layers: all linear layers that a fold may name.
        consumers: names of the layers whose inputs may be reordered.
        batch: a few inputs of the model.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], consumers: Sequence[str], batch: Batch
    ) -> None:
        self._model, self._layers, self._consumers, self._batch = model, layers, consumers, batch
        self._called: dict[str, nn.Module] = {}
        """By name, the blocks with folds that a forward of the model has called."""

    @cached_property
    def _dense(self) -> dict[str, torch.Tensor]:
        return self._collect_outputs({})

    def reaches(self, name: str) -> bool:
        """True if a token reached the consumer of that name."""
        return name in self._dense

    def unchanged_by(self, fold: Fold) -> bool:
        """True if the model computes the same with a random order folded in.

        The consumer's outputs must agree up to rounding; later outputs up to :data:`LOOSE`, because rounding grows.
        """
        with self._folded([fold]):
            return _same(self._collect_outputs({}), self._dense, fold.consumer)

    def unchanged_at_once(self, folds: Sequence[Fold], blocks: Sequence[Block]) -> list[Fold]:
        """The folds that pass a combined trial and need no trial of their own; at most one fold per consumer is given.

        The trial takes two forwards. After the first, each block runs again with each of its folds. The second runs the
        model with all folds that passed. If it changes outputs by more than rounding, no fold passes.
        """
        passed: list[Fold] = []
        outputs: dict[str, torch.Tensor] = {}
        failed: dict[str, Exception] = {}
        calls: list[tuple[Block, Callable[[], Any], dict[str, torch.Tensor]]] = []

        def record(block: Block) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self._called[block.name] = module
                try:
                    hidden = hidden_of(output).clone()
                except NotReplayable as error:
                    failed[block.name] = error
                else:
                    calls.append((block, partial(module, *args, **kwargs), outputs | {block.name: hidden}))

            return hook

        of_block = {b: [fold for fold in folds if fold.consumer.startswith(f"{b.name}.")] for b in blocks}
        with ExitStack() as hooks:
            for block in blocks:
                if of_block[block]:
                    hooks.callback(block.module.register_forward_hook(record(block), with_kwargs=True).remove)
            self._dense = self._collect_outputs(outputs)
        for block, run, dense in calls:
            try:
                for fold in of_block[block]:
                    with self._folded([fold]), self._collected(again := dict(dense)), torch.no_grad():
                        again[block.name] = hidden_of(run())
                    if fold.consumer in dense and _same(again, dense, fold.consumer):
                        passed.append(fold)
            except CANNOT_RUN_AGAIN as error:
                raise_if_out_of_memory(error)
                failed[block.name] = error
        if failed:
            name, reason = next(iter(failed.items()))
            others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            warnings.warn(
                f"{name}{others}: the block fails when it is run again ({reason}), so each reordering in it is tried "
                "in the whole model, which takes longer",
                stacklevel=5,
            )
        with self._folded(passed):
            return passed if _same(self._collect_outputs({}), self._dense) else []

    @contextmanager
    def _folded(self, folds: Iterable[Fold]) -> Iterator[None]:
        """A context in which blocks run with random orders folded in; their weights are restored bit for bit."""
        generator = torch.Generator().manual_seed(0)
        orders: dict[str, list[tuple[Fold, torch.Tensor]]] = {}
        with ExitStack() as undo:
            for fold in folds:
                pools = [torch.randperm(fold.width, generator=generator, device="cpu") for _ in range(fold.pools)]
                order = torch.stack(pools)
                block = next((name for name in self._called if fold.consumer.startswith(f"{name}.")), None)
                if block is not None:
                    orders.setdefault(block, []).append((fold, order))
                else:  # The model calls the block's forward past its hooks.
                    undo.callback(fold.apply, self._layers, order.argsort(1))
                    fold.apply(self._layers, order)
            for block, of_block in orders.items():
                undo.enter_context(self._folded_while_it_runs(self._called[block], of_block))
            yield

    @contextmanager
    def _folded_while_it_runs(self, block: nn.Module, orders: Sequence[tuple[Fold, torch.Tensor]]) -> Iterator[None]:
        def fold_in(_module: nn.Module, _args: object) -> None:
            for fold, order in orders:
                fold.apply(self._layers, order)

        def revert(_module: nn.Module, _args: object, _output: object) -> None:
            for fold, order in reversed(orders):
                fold.apply(self._layers, order.argsort(1))

        with ExitStack() as hooks:
            # Inside the hooks that copy a block's weights for its forward.
            hooks.callback(block.register_forward_pre_hook(fold_in).remove)
            hooks.callback(block.register_forward_hook(revert, prepend=True, always_call=True).remove)
            yield

    @contextmanager
    def _collected(self, outputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """A context in which the outputs of each consumer that runs are added to ``outputs``."""
        with ExitStack() as hooks:
            for name in self._consumers:
                hooks.enter_context(_output_collected(self._layers[name], outputs, name))
            yield

    def _collect_outputs(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model; add the outputs of each consumer and of the model to ``outputs``, and return it."""
        with self._collected(outputs), torch.no_grad():
            results = [t for t in tensors_in(run_model(self._model, self._batch)) if t.is_floating_point()]
        outputs.update((f"output {index} of the model", tensor) for index, tensor in enumerate(results))
        return outputs


@contextmanager
def _output_collected(layer: nn.Module, outputs: dict[str, torch.Tensor], name: str) -> Iterator[None]:
    def collect(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        if output.numel():
            outputs[name] = output.clone()

    handle = layer.register_forward_hook(collect)
    try:
        yield
    finally:
        handle.remove()


def _same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], consumer: str | None = None) -> bool:
    """True if outputs agree: closely for the consumer, since nothing before it changed; loosely for all others."""
    close = {} if consumer is None else {consumer: max(1e-4, 2 * torch.finfo(want[consumer].dtype).eps)}
    return got.keys() == want.keys() and all(
        _close(got[name], tensor, close.get(name, LOOSE)) for name, tensor in want.items()
    )


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    if got.shape != want.shape:
        return False
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())
