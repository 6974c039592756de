"""Runs the calibration set through a model, one decoder block at a time.

A block's own arguments (attention mask, rotary tables, ...) differ by family, and by block within one
model. They are recorded in the model's own forward, with a stub in place of every block, and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ArgumentError
from ..out_of_memory import raise_if_out_of_memory
from ..timing import Stopwatch
from .batches import TRIAL_LENGTH, TRIAL_SEQUENCES, Batch
from .blocks import Block
from .collect import InputCollector
from .finished import FinishedOutputs, forward_replaced


class Runner(Protocol):
    """What runs the calibration set through a model's blocks, in order."""

    def run(
        self, index: int, collector: InputCollector | None, *, advance: bool, finished: Sequence[nn.Module] = ()
    ) -> None:
        """Run block ``index`` on every batch.

        Args:
            index: of the block.
            collector: watches layers of it meanwhile.
            advance: whether these outputs are what the next block reads.
            finished: modules of the block that will not change any more before it advances: their outputs may be
                those of an earlier run.
        """


def make_runner(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], clock: Stopwatch) -> Runner:
    """A :class:`Replay`; or a :class:`WholeForward` and a warning where a trial shows that replay would err.

    In the trial a few tokens go through the model itself and block by block, twice: all must agree. They
    do not where blocks share more than hidden states, where the model changes these between blocks, or
    where a block changes its arguments.

    Raises:
        ValueError: the model's hidden states hold NaN or infinity.
    """
    with clock.measure("calibration"):
        trial = Batch(batches[0].ids[:TRIAL_SEQUENCES, :TRIAL_LENGTH], None)
        trace = _trace(model, blocks, trial)
        try:
            sizes = _try_replay(model, blocks, trial, trace)
        except NotReplayable as reason:
            warnings.warn(
                f"{type(model).__name__}: {reason}. Its blocks cannot be run one at a time: the whole model is run "
                "for each block instead, which takes longer",
                stacklevel=4,
            )
            return WholeForward(model, batches, clock)
        return Replay(model, blocks, batches, clock, sizes)


class WholeForward:
    """Runs the model itself for every block: right for any model, and slow."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], clock: Stopwatch) -> None:
        self._model, self._batches, self._clock = model, batches, clock

    def run(
        self,
        index: int,
        collector: InputCollector | None,
        *,
        advance: bool = True,
        finished: Sequence[nn.Module] = (),
    ) -> None:
        """As in :class:`Runner`; without a collector there is nothing to do."""
        if collector is not None:
            self.run_all(collector)

    def run_all(self, collector: InputCollector) -> None:
        """Run everything on every batch, under the eyes of ``collector``."""
        for batch in self._batches:
            with self._clock.measure("calibration"), collector.batch(batch.shape, batch.valid, leave_early=True):
                _forward(self._model, batch)


class Replay:
    """Keeps the calibration set's hidden states, in the model's dtype, and takes them from block to block."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        clock: Stopwatch,
        sizes: Sequence[int | None],
    ) -> None:
        self._blocks, self._batches, self._clock = blocks, batches, clock
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[_Call]] = []
        self._outputs = FinishedOutputs()
        self._reuses: dict[tuple[type, type], bool] = {}
        for batch in batches:
            calls = _record(model, blocks, batch, sizes)
            self.hidden.append(calls[0].hidden)
            calls = [call.with_hidden(None) for call in calls]
            self._calls.append(_sharing(calls, self._calls[-1]) if self._calls else calls)

    def run(
        self, index: int, collector: InputCollector | None, *, advance: bool, finished: Sequence[nn.Module] = ()
    ) -> None:
        """As in :class:`Runner`."""
        for number, batch in enumerate(self._batches):
            with self._clock.measure("calibration"), ExitStack() as inside:
                known = [m for m in self._outputs.of(finished, number) if self._may_reuse(index, m, number)]
                inside.enter_context(self._outputs.reused(known, number))
                if collector is not None:
                    fresh = [module for module in finished if module not in known]
                    inside.enter_context(self._outputs.kept(fresh, number, collector))
                    inside.enter_context(collector.batch(batch.shape, batch.valid, leave_early=not advance))
                output = self._call(index, number)
                if advance:
                    self.hidden[number] = output
        if advance:
            self._outputs.forget()

    def _call(self, index: int, number: int) -> torch.Tensor:
        return self._calls[number][index].run(self._blocks[index].module, self.hidden[number])

    def _may_reuse(self, index: int, module: nn.Module, number: int) -> bool:
        """Whether blocks of this kind give the same with an output of this module that was kept; tried once for each
        kind: a block may need more of a module than its output, or change that in place."""
        kind = (type(self._blocks[index].module), type(module))
        if kind not in self._reuses:
            whole = self._call(index, number)
            try:
                with self._outputs.reused([module], number):
                    self._reuses[kind] = _agree(self._call(index, number), whole)
            except CANNOT_RUN_AGAIN as error:
                raise_if_out_of_memory(error)
                self._reuses[kind] = False
                warnings.warn(
                    f"{kind[0].__name__}: the output of its {kind[1].__name__} is computed again for each group of "
                    f"layers, since the block fails with a cached one ({error})",
                    stacklevel=4,
                )
        return self._reuses[kind]


class _Stop(Exception):
    """Ends a forward of the model where nothing more is wanted of it."""


class NotReplayable(Exception):
    """Why blocks cannot be run one at a time, as half a sentence."""


RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a block may raise when it is called outside the model's forward. A full memory is among them, and says nothing
about the block: :func:`~ace_triton.out_of_memory.raise_if_out_of_memory` tells it apart."""

CANNOT_RUN_AGAIN = (NotReplayable, *RUN_ERRORS)
"""What says that a block cannot be run so, if memory is not full."""


@dataclass(frozen=True)
class _Call:
    """How the model calls a block: its arguments, with the hidden states at ``place``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3:
                return cls(args, kwargs, place)
        raise NotReplayable("a block is given no hidden states [n_sequences, length, width]")

    @property
    def hidden(self) -> Any:
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    def with_hidden(self, hidden: torch.Tensor | None) -> _Call:
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return _Call(args, self.kwargs, self.place)
        return _Call(self.args, {**self.kwargs, self.place: hidden}, self.place)

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        call = self.with_hidden(hidden)
        return hidden_of(module(*call.args, **call.kwargs))


def _forward(model: nn.Module, batch: Batch) -> None:
    mask = None if batch.valid is None else batch.valid.long()
    with suppress(_Stop):
        model(input_ids=batch.ids, attention_mask=mask, use_cache=False)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns; NotReplayable where they are not to be found."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor):
        raise NotReplayable(f"a block returns a {type(output).__name__}, neither hidden states nor a tuple of them")
    return first


def _trace(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> list[tuple[int, Any]]:
    """What each block returned in the model's own forward, in order of its calls."""
    trace: list[tuple[int, Any]] = []

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            copy = (output[0].clone(), *output[1:]) if isinstance(output, tuple) and output else output
            trace.append((index, copy.clone() if isinstance(copy, torch.Tensor) else copy))

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.module.register_forward_hook(note(index)).remove)
        _forward(model, batch)
    return trace


def _try_replay(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, trace: list[tuple[int, Any]]
) -> list[int | None]:
    """For each block None where it returns a tensor, or the size of the tuple it returns."""
    if [index for index, _ in trace] != list(range(len(blocks))):
        raise NotReplayable("its forward does not call each block once, in order")
    wanted = [hidden_of(output) for _, output in trace]
    for block, hidden in zip(blocks, wanted, strict=True):
        if not torch.isfinite(hidden).all():
            raise ArgumentError(
                f"{block.name} gives NaN or infinity on the calibration text: run the model in bfloat16 or float32, "
                "or repair its weights"
            )
    sizes = [len(output) if isinstance(output, tuple) else None for _, output in trace]
    try:
        calls = _record(model, blocks, batch, sizes)
        hidden = calls[0].hidden
        for block, call, want in zip(blocks, calls, wanted, strict=True):
            once, again = call.run(block.module, hidden), call.run(block.module, hidden)
            if not (_agree(once, want) and _agree(again, want)):
                raise NotReplayable(f"{block.name} needs more than its hidden states and constant arguments")
            hidden = once
    except RUN_ERRORS as error:
        raise_if_out_of_memory(error)
        raise NotReplayable(f"a block fails outside the model's forward ({error})") from error
    return sizes


def _agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return False
    tolerance = 1e-5 if want.dtype == torch.float32 else 1e-3
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def _record(model: nn.Module, blocks: Sequence[Block], batch: Batch, sizes: Sequence[int | None]) -> list[_Call]:
    """The call of every block in the model's forward of a batch; no block is computed.

    Stubs hand their hidden states on, so only the first call's are true.
    """
    calls: list[_Call] = []

    def stub(size: int | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = _Call.of(args, kwargs)
            calls.append(call)
            if len(calls) == len(blocks):
                raise _Stop
            return call.hidden if size is None else (call.hidden, *[None] * (size - 1))

        return forward

    with ExitStack() as stubs:
        for block, size in zip(blocks, sizes, strict=True):
            stubs.enter_context(forward_replaced(block.module, stub(size)))
        _forward(model, batch)
    return calls


def _sharing(calls: list[_Call], earlier: list[_Call]) -> list[_Call]:
    """The calls, with the tensors of ``earlier`` in place of equal ones: without padding, masks and tables are
    the same for every batch."""
    known: dict[int, Any] = {}

    def shared(value: Any, old: Any) -> Any:
        if type(value) is tuple and type(old) is tuple and len(value) == len(old):
            return tuple(shared(v, o) for v, o in zip(value, old, strict=True))
        if not isinstance(value, torch.Tensor) or not isinstance(old, torch.Tensor):
            return value
        if id(value) not in known:
            equal = value.shape == old.shape and value.dtype == old.dtype and torch.equal(value, old)
            known[id(value)] = old if equal else value
        return known[id(value)]

    def kwargs(call: _Call, old: _Call) -> dict[str, Any]:
        return {name: shared(value, old.kwargs.get(name)) for name, value in call.kwargs.items()}

    pairs = zip(calls, earlier, strict=True)
    return [_Call(shared(call.args, old.args), kwargs(call, old), call.place) for call, old in pairs]
