"""Runs the calibration set through a model, one decoder block at a time.

A block's own arguments (attention mask, rotary tables, ...) differ by family, and by block within one
model. They are recorded in the model's own forward, with a stub in place of every block, and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .blocks import Block
from .collect import InputCollector
from .timing import Stopwatch

PROBE_SEQUENCES, PROBE_LENGTH = 2, 8


@dataclass(frozen=True)
class Batch:
    """Token ids [n_sequences, length] and bool of the same shape, False for padding, or None."""

    ids: torch.Tensor
    valid: torch.Tensor | None


class Runner(Protocol):
    """What feeds the blocks."""

    def run(self, index: int, collector: InputCollector | None, *, advance: bool) -> None:
        """Run block ``index`` on every batch.

        Args:
            index: blocks are run in order.
            collector: watches its layers; None for none.
            advance: the outputs become the inputs of the next block.
        """


class _Stop(Exception):
    """Ends a forward of the model where nothing more is wanted of it."""


@dataclass(frozen=True)
class _Call:
    """How the model calls a block: ``args`` and ``kwargs``, the hidden states standing at ``place``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        for place, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3:
                return cls(args, kwargs, place)
        raise _NotReplayable("is given no hidden states [n_sequences, length, width]")

    @property
    def hidden(self) -> torch.Tensor:
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    def without_hidden(self) -> _Call:
        return self.replace(None)

    def replace(self, hidden: torch.Tensor | None) -> _Call:
        if isinstance(self.place, int):
            return _Call((*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs, self.place)
        return _Call(self.args, {**self.kwargs, self.place: hidden}, self.place)

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        call = self.replace(hidden)
        return _hidden_of(module(*call.args, **call.kwargs))


class _NotReplayable(Exception):
    """Why a model's blocks cannot be run one at a time."""


def make_runner(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], clock: Stopwatch) -> Runner:
    """A :class:`Replay`, or a :class:`WholeForward` where a trial shows that replay would not do.

    The trial: a few calibration tokens go through the model itself, and block by block; the hidden states
    must agree. They do not where blocks share more than hidden states (Gemma 3n), where the model changes
    the hidden states between blocks, or where blocks change their inputs. Such models get a warning.
    """
    try:
        with clock.measure("calibration"):
            return Replay(model, blocks, batches, clock)
    except _NotReplayable as reason:
        warnings.warn(
            f"{type(model).__name__}: {reason}, so its blocks cannot be run one at a time; running the model from "
            "its first layer for every block instead, which gives the same masks more slowly",
            stacklevel=3,
        )
        return WholeForward(model, blocks, batches, clock)


class WholeForward:
    """Runs the model from its start to the wanted block: right for every model, and slow."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], clock: Stopwatch) -> None:
        self._model, self._batches, self._clock = model, batches, clock

    def run(self, index: int, collector: InputCollector | None, *, advance: bool) -> None:
        if collector is None:
            return
        for batch in self._batches:
            with self._clock.measure("calibration"), collector.batch(tuple(batch.ids.shape), batch.valid):
                call_model(self._model, batch)


class Replay:
    """Keeps the hidden states of the calibration set, in the model's dtype, and moves them block by block.

    Raises:
        _NotReplayable: as said in :func:`make_runner`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], clock: Stopwatch) -> None:
        self._blocks, self._batches, self._clock = blocks, batches, clock
        ids = batches[0].ids[:PROBE_SEQUENCES, :PROBE_LENGTH]
        returns_tuple = _try_replay(model, blocks, Batch(ids, None))
        self._hidden: list[torch.Tensor] = []
        self._calls: list[list[_Call]] = []
        for batch in batches:
            calls = _record(model, blocks, batch, returns_tuple)
            self._hidden.append(calls[0].hidden)
            self._calls.append(_share_equal([call.without_hidden() for call in calls], self._calls[-1:]))

    def run(self, index: int, collector: InputCollector | None, *, advance: bool) -> None:
        module = self._blocks[index].module
        for number, batch in enumerate(self._batches):
            watched = nullcontext() if collector is None else collector.batch(tuple(batch.ids.shape), batch.valid)
            with self._clock.measure("calibration"), watched:
                output = self._calls[number][index].run(module, self._hidden[number])
            if advance:
                self._hidden[number] = output
