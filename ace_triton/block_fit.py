"""Block fit: trains the kept weights of a pruned block toward the outputs of the dense block.

A least-squares fit treats each layer alone. A block's layers together can do more: what one layer lost, a later one may
make up for. So after the layers of a block are pruned and fitted, gradient descent moves all kept weights, norms and
biases of the block to reduce

    mean_t |f(x_t) - f_dense(x_t)|^2 / |f_dense(x_t) - x_t|^2

x_t are the hidden states that the block reads from the pruned blocks before it, f is the pruned block and f_dense the
dense one. The division gives every token the same weight, since a few tokens have hidden states a thousand times larger
than all others. Weights of 0 stay exactly 0. One of every eight batches is held out: the state with the smallest error
there is kept, the one before the training included.

Only one block is trained at a time, so a model that is too large for recovery can be fitted. Training block by block
after pruning is known from EBFT (arXiv 2402.12419); the loss, the optimizer and what is trained differ here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .decoders.kept_tensors import KeptTensors
from .decoders.replay import Replay
from .errors import PruneError
from .solvers.kept_adamw import LARGEST_GRADIENT, LEAST_ZEROS, KeptAdamW, scheduled_rate
from .solvers.update import Update

BATCH_TOKENS = 256
"""Tokens of a batch, each of which is one optimizer step."""

HELD_OUT = 8
"""One of every HELD_OUT batches is held out."""

LEAST_CHANGE = 1e-6
"""A token's change by the dense block counts as at least this share of the batch's mean."""

WARMUP = 0.1
"""Share of the steps in which the learning rate rises to its peak."""


@dataclass(frozen=True)
class BlockFit:
    """What the fit of one block did.

    Attributes:
        name: the block's dotted name.
        steps: number of optimizer steps.
        before, after: the relative error of the block's outputs on the held-out batches.
    """

    name: str
    steps: int
    before: float
    after: float


def dense_outputs(replay: Replay, index: int, into: KeptTensors) -> KeptTensors:
    """The outputs of block ``index`` with its present weights, by batch, in ``into``."""
    for number in replay.numbers:
        into[number] = replay.output(index, number)
    return into


def fit_block(name: str, block: nn.Module, replay: Replay, index: int, target: KeptTensors, update: Update) -> BlockFit:
    """Train the kept weights of a pruned block in place, with its norms and biases.

    Args:
        name: the block's dotted name.
        block: the pruned block. Parameters that it shares with the rest of the model stay as they are.
        replay: runs the block on the calibration set.
        index: index of the block in ``replay``.
        target: the dense block's outputs on the same inputs, by batch.
        update: the number of epochs and the learning rate.

    Returns:
        what the fit did; no step if the block has no pruned weight.

    Raises:
        PruneError: if the outputs are not finite; nothing was changed.
    """
    moving = trained_parameters(block, replay.shared(index))
    train, held = _split(replay.numbers)
    errors = _Errors(replay, index, target)
    before = errors.mean(held)
    if not math.isfinite(before):
        raise PruneError(f"{name}: its outputs are not finite, so they cannot be fitted: run the model in float32")
    steps = update.block_epochs * len(train) if moving else 0
    with _without_inference_tensors(block), _Trained(block, list(moving)) as trained:
        best = before
        for step in range(steps):
            with torch.enable_grad():
                errors.of(train[step % len(train)]).backward()
            trained.optimizer.step(scheduled_rate(update.block_rate, step / steps, WARMUP), LARGEST_GRADIENT)
            if (step + 1) % len(train) == 0 and (error := errors.mean(held)) < best:
                best = error
                trained.keep()
    return BlockFit(name, steps, before, best)


def trained_parameters(block: nn.Module, shared: Set[int] = frozenset()) -> Mapping[str, nn.Parameter]:
    """The parameters of a block that are trained, by name: pruned matrices, norms and biases; {} if none is pruned.

    Args:
        block: the block.
        shared: identities of parameters that stay as they are.
    """
    own = {name: p for name, p in block.named_parameters() if p.is_floating_point() and id(p) not in shared}
    pruned = [n for n, p in own.items() if p.dim() >= 2 and LEAST_ZEROS <= float((p == 0).float().mean()) < 1]
    return {name: p for name, p in own.items() if p.dim() == 1 or name in pruned} if pruned else {}


class _Trained:
    """A context in which some parameters of a block are trained; at its end they have the values last kept.

    Attributes:
        optimizer: changes the parameters.
    """

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self._block, self._moving = block, {name: block.get_parameter(name) for name in names}
        self._flags = {p: p.requires_grad for p in block.parameters()}
        self._storage = {name: p.data for name, p in self._moving.items()}
        self.keep()
        self.optimizer = KeptAdamW(self._moving, None)

    def keep(self) -> None:
        """Keep the present values."""
        self._kept = {name: p.detach().clone() for name, p in self._moving.items()}

    def __enter__(self) -> _Trained:
        self._block.requires_grad_(False)
        for parameter in self._moving.values():
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *error: object) -> None:
        for name, parameter in self._moving.items():
            parameter.grad = None
            parameter.data = self._storage[name]
            with torch.no_grad():
                parameter.copy_(self._kept[name])
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _without_inference_tensors(block: nn.Module) -> Iterator[None]:
    """A context in which copies stand for the tensors of a block that were made in inference mode.

    Torch computes no gradients with such tensors. At the end they are back, with the values of their copies.
    """
    copies: dict[torch.Tensor, torch.Tensor] = {}
    places: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in block.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        own = [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]
        places += [(module, name, tensor) for name, tensor in own if tensor.is_inference()]
    for module, name, tensor in places:
        if tensor not in copies:
            copy = tensor.detach().clone()
            copies[tensor] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        setattr(module, name, copies[tensor])
    try:
        yield
    finally:
        for module, name, tensor in places:
            setattr(module, name, tensor)
        with torch.inference_mode():
            for tensor, copy in copies.items():
                tensor.copy_(copy)


class _Errors:
    """The relative error of a block's outputs, by batch."""

    def __init__(self, replay: Replay, index: int, target: KeptTensors) -> None:
        self._replay, self._index, self._target = replay, index, target

    def of(self, number: int) -> torch.Tensor:
        """The mean over the tokens of a batch, padding left out."""
        target = self._target[number].float()
        change = (target - self._replay.hidden[number].float()).square().sum(-1)
        error = (self._replay.output(self._index, number).float() - target).square().sum(-1)
        relative = error / change.clamp_min(LEAST_CHANGE * float(change.mean()))
        valid = self._replay.valid(number)
        return relative.mean() if valid is None else relative[valid.to(relative.device)].mean()

    def mean(self, numbers: Sequence[int]) -> float:
        """The mean over batches, without gradients."""
        return sum(float(self.of(number)) for number in numbers) / len(numbers)


def _split(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The batches to train on, and those to measure on, of two or more."""
    every = min(HELD_OUT, len(numbers))
    held = [number for place, number in enumerate(numbers) if place % every == every - 1]
    return [number for number in numbers if number not in held], held
