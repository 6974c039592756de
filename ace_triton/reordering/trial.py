"""Checks that folds do not change a model's function.

The trial folds a random order, or random rotations, into a block, runs the block again on a few tokens, and reverts
the change. Then the model runs once with all changes. If outputs change, each fold is tried in the whole model. A
change is in a block's weights only while the block runs. If weights are in files, a copy of the block runs, so the
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
from ..linears import linear_weight
from ..out_of_memory import raise_if_out_of_memory
from .fold import Fold

LOOSE = 0.25
"""Largest relative change of later outputs that counts as rounding. A wrong order changes an output by about 1.4."""

Undo = Callable[[], None]


@dataclass(frozen=True)
class Trial:
    """How a fold is tried.

    Attributes:
        draw: makes a random change of a fold's channels.
        fold_in: folds a change into the layers, and returns what restores them bit for bit.
        rounding: largest relative change of the consumer's outputs, in units of their dtype's epsilon.
        in_attention: True if only folds into output projections are tried.
        reason: why a fold that changes the model's outputs fails.
    """

    draw: Callable[[Fold, torch.Generator], torch.Tensor]
    fold_in: Callable[[Fold, Mapping[str, nn.Module], torch.Tensor], Undo]
    rounding: float
    in_attention: bool
    reason: str


def _random_order(fold: Fold, generator: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randperm(fold.width, generator=generator, device="cpu") for _ in range(fold.pools)])


def _reordered(fold: Fold, layers: Mapping[str, nn.Module], order: torch.Tensor) -> Undo:
    fold.apply(layers, order)
    return partial(fold.apply, layers, order.argsort(1))


def _random_rotation(fold: Fold, generator: torch.Generator) -> torch.Tensor:
    shape = (fold.pools, fold.width, fold.width)
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"))[0]


def _rotated(fold: Fold, layers: Mapping[str, nn.Module], rotation: torch.Tensor) -> Undo:
    weights = [linear_weight(layers[name]) for name in (fold.consumer, *fold.producers)]
    parameters = [*weights, *(layers[name].bias for name in fold.producers)]
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters if isinstance(parameter, torch.Tensor)]

    @torch.inference_mode()
    def restore() -> None:
        for parameter, values in saved:
            parameter.copy_(values)

    fold.rotate(layers, rotation)
    return restore


ORDERS = Trial(
    _random_order,
    _reordered,
    rounding=2,
    in_attention=False,
    reason="an operation before it is not element-wise, or another layer reads the same values",
)
ROTATIONS = Trial(
    _random_rotation,
    _rotated,
    rounding=8,
    in_attention=True,
    reason="an operation between its value projection and it does more than add values up, or another layer reads the "
    "same values",
)
"""A rotation rounds each weight; an order only changes the order of sums."""


class FoldTrial:
    """Checks on a few inputs that folds do not change the model's function.

    Args:
        model: the model, in evaluation mode.
        layers: all linear layers that a fold may name.
        consumers: names of the layers whose inputs may be reordered.
        batch: a few inputs of the model.
        trial: how a fold is tried.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        consumers: Sequence[str],
        batch: Batch,
        trial: Trial = ORDERS,
    ) -> None:
        self._model, self._layers, self._consumers, self._batch = model, layers, consumers, batch
        self._trial = trial
        self._called: dict[str, nn.Module] = {}
        """By name, the blocks with folds that a forward of the model has called."""

    @cached_property
    def _dense(self) -> dict[str, torch.Tensor]:
        return self._collect_outputs({})

    def reaches(self, name: str) -> bool:
        """True if a token reached the consumer of that name."""
        return name in self._dense

    def unchanged_by(self, fold: Fold) -> bool:
        """True if the model computes the same with a random change folded in.

        The consumer's outputs must agree up to rounding; later outputs up to :data:`LOOSE`, because rounding grows.
        """
        with self._folded([fold]):
            return self._same(self._collect_outputs({}), self._dense, fold.consumer)

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
                    if fold.consumer in dense and self._same(again, dense, fold.consumer):
                        passed.append(fold)
            except CANNOT_RUN_AGAIN as error:
                raise_if_out_of_memory(error)
                failed[block.name] = error
        if failed:
            name, reason = next(iter(failed.items()))
            others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            warnings.warn(
                f"{name}{others}: the block fails when it is run again ({reason}), so each fold in it is tried "
                "in the whole model, which takes longer",
                stacklevel=5,
            )
        with self._folded(passed):
            return passed if self._same(self._collect_outputs({}), self._dense) else []

    @contextmanager
    def _folded(self, folds: Iterable[Fold]) -> Iterator[None]:
        """A context in which blocks run with random changes folded in; their weights are restored bit for bit."""
        generator = torch.Generator().manual_seed(0)
        changes: dict[str, list[tuple[Fold, torch.Tensor]]] = {}
        with ExitStack() as undo:
            for fold in folds:
                change = self._trial.draw(fold, generator)
                block = next((name for name in self._called if fold.consumer.startswith(f"{name}.")), None)
                if block is not None:
                    changes.setdefault(block, []).append((fold, change))
                else:  # The model calls the block's forward past its hooks.
                    undo.callback(self._trial.fold_in(fold, self._layers, change))
            for block, of_block in changes.items():
                undo.enter_context(self._folded_while_it_runs(self._called[block], of_block))
            yield

    @contextmanager
    def _folded_while_it_runs(self, block: nn.Module, changes: Sequence[tuple[Fold, torch.Tensor]]) -> Iterator[None]:
        undo: list[Undo] = []

        def fold_in(_module: nn.Module, _args: object) -> None:
            undo.extend(self._trial.fold_in(fold, self._layers, change) for fold, change in changes)

        def revert(_module: nn.Module, _args: object, _output: object) -> None:
            while undo:
                undo.pop()()

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

    def _same(
        self, got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], consumer: str | None = None
    ) -> bool:
        """True if outputs agree: closely for the consumer, since nothing before it changed; loosely for all others."""
        close: dict[str, float] = {}
        if consumer is not None:
            close[consumer] = max(1e-4, self._trial.rounding * torch.finfo(want[consumer].dtype).eps)
        return got.keys() == want.keys() and all(
            _close(got[name], tensor, close.get(name, LOOSE)) for name, tensor in want.items()
        )

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


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    if got.shape != want.shape:
        return False
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())
