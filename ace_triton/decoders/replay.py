"""Runs the calibration set through a model, one decoder block at a time.

The other arguments of a block (attention mask, rotary tables, ...) differ between families, and between blocks of one
model. They are recorded in the model's own forward, with a stub in place of every block, and then replayed.
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
from .finished import FinishedOutputs, forward_replaced
from .watcher import Watcher


class Runner(Protocol):
    """Runs the calibration set through a model's blocks, in order."""

    def run(self, index: int, watcher: Watcher | None, *, advance: bool, finished: Sequence[nn.Module] = ()) -> None:
        """Run block ``index`` on every batch.

        Args:
            index: index of the block.
            watcher: watches layers of the block during the run; None for a run without a watcher.
            advance: True if the outputs of this run become the inputs of the next block.
            finished: modules of the block that do not change until it advances, so that their outputs may be cached.
        """


def make_runner(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], clock: Stopwatch) -> Runner:
    """Make a :class:`Replay`, or warn and make a :class:`WholeForward` if replay gives wrong results in a trial.

    The trial runs a few tokens through the model itself, and through each block twice. All hidden states must agree.
    They differ if blocks share more than hidden states, if the model changes hidden states between blocks, or if a
    block changes its arguments.

    Raises:
        ArgumentError: if the model's hidden states contain NaN or infinity.
    """
    with clock.measure("calibration"):
        trial = batches[0].beginning(TRIAL_SEQUENCES, TRIAL_LENGTH)
        trace = _trace(model, blocks, trial)
        try:
            sizes = _try_replay(model, blocks, trial, trace)
        except NotReplayable as reason:
            warnings.warn(
                f"{type(model).__name__}: {reason}. Its blocks cannot be run one at a time, so the whole model is run "
                "for each block, which takes longer",
                stacklevel=4,
            )
            return WholeForward(model, batches, clock)
        return Replay(model, blocks, batches, clock, sizes)


class WholeForward:
    """Runs the whole model for every block: correct for any model, but slow."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], clock: Stopwatch) -> None:
        self._model, self._batches, self._clock = model, batches, clock

    def run(
        self,
        index: int,
        watcher: Watcher | None,
        *,
        advance: bool = True,
        finished: Sequence[nn.Module] = (),
    ) -> None:
        """As in :class:`Runner`, but does nothing without a watcher."""
        if watcher is not None:
            self.run_all(watcher)

    def run_all(self, watcher: Watcher) -> None:
        """Run the whole model on every batch while ``watcher`` watches."""
        for batch in self._batches:
            with self._clock.measure("calibration"), watcher.batch(batch.shape, batch.valid, leave_early=True):
                _forward(self._model, batch)


class Replay:
    """Keeps the hidden states of the calibration set, in the model's dtype, and runs one block at a time on them.

    Attributes:
        hidden: by batch, the hidden states [n_sequences, length, width] that the next block reads.
    """

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
        self._reusable: dict[tuple[type, type], bool] = {}
        for batch in batches:
            calls = _record(model, blocks, batch, sizes)
            self.hidden.append(calls[0].hidden)
            calls = [call.with_hidden(None) for call in calls]
            self._calls.append(_deduplicated(calls, self._calls[-1]) if self._calls else calls)

    def run(self, index: int, watcher: Watcher | None, *, advance: bool, finished: Sequence[nn.Module] = ()) -> None:
        """As in :class:`Runner`."""
        for number, batch in enumerate(self._batches):
            with self._clock.measure("calibration"), ExitStack() as contexts:
                cached = self._outputs.cached_for(finished, number)
                reused = [module for module in cached if self._may_reuse(index, module, number)]
                contexts.enter_context(self._outputs.reusing(reused, number))
                if watcher is not None:
                    computed = [module for module in finished if module not in reused]
                    contexts.enter_context(self._outputs.caching(computed, number, watcher))
                    contexts.enter_context(watcher.batch(batch.shape, batch.valid, leave_early=not advance))
                output = self._call(index, number)
                if advance:
                    self.hidden[number] = output
        if advance:
            self._outputs.clear()

    def _call(self, index: int, number: int) -> torch.Tensor:
        return self._calls[number][index].run(self._blocks[index].module, self.hidden[number])

    def _may_reuse(self, index: int, module: nn.Module, number: int) -> bool:
        """True if blocks of this type return the same with a cached output of this type of module.

        Tried once per pair of types. The result differs if a block needs more of a module than its output, or changes
        that output in place.
        """
        kind = (type(self._blocks[index].module), type(module))
        if kind not in self._reusable:
            whole = self._call(index, number)
            try:
                with self._outputs.reusing([module], number):
                    self._reusable[kind] = _agree(self._call(index, number), whole)
            except CANNOT_RUN_AGAIN as error:
                raise_if_out_of_memory(error)
                self._reusable[kind] = False
                warnings.warn(
                    f"{kind[0].__name__}: the output of its {kind[1].__name__} is computed again for each group of "
                    f"layers, because the block fails with a cached output ({error})",
                    stacklevel=4,
                )
        return self._reusable[kind]


class _Stop(Exception):
    """Ends a forward of the model early, once the calls of all blocks are recorded."""


class NotReplayable(Exception):
    """Blocks cannot be run one at a time. The message is a clause with the reason."""


RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""Errors that a block may raise when it is called outside the model's forward.

These classes include errors of a full memory, which have nothing to do with the block. Call
:func:`~ace_triton.out_of_memory.raise_if_out_of_memory` first to raise those again."""

CANNOT_RUN_AGAIN = (NotReplayable, *RUN_ERRORS)
"""Errors that show that a block cannot be run again, unless memory is full."""


@dataclass(frozen=True)
class _Call:
    """How the model calls a block.

    Attributes:
        args, kwargs: the arguments.
        place: index in ``args``, or key in ``kwargs``, of the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3:
                return cls(args, kwargs, place)
        raise NotReplayable("no argument of a block is hidden states [n_sequences, length, width]")

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
        model(**batch.inputs, attention_mask=mask, use_cache=False)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block; NotReplayable if the output contains none."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor):
        raise NotReplayable(
            f"a block returns a {type(output).__name__}; expected hidden states or a tuple that starts with them"
        )
    return first


def _trace(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> list[tuple[int, Any]]:
    """The index and the output of each block in the model's own forward, in order of the calls."""
    trace: list[tuple[int, Any]] = []

    def record_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            copy = (output[0].clone(), *output[1:]) if isinstance(output, tuple) and output else output
            trace.append((index, copy.clone() if isinstance(copy, torch.Tensor) else copy))

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.module.register_forward_hook(record_output(index)).remove)
        _forward(model, batch)
    return trace


def _try_replay(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, trace: list[tuple[int, Any]]
) -> list[int | None]:
    """Check that replay gives the outputs in ``trace``; NotReplayable if not.

    Returns:
        for each block, the size of the tuple that it returns, or None if it returns a tensor.
    """
    if [index for index, _ in trace] != list(range(len(blocks))):
        raise NotReplayable("its forward does not call each block once, in order")
    expected = [hidden_of(output) for _, output in trace]
    for block, hidden in zip(blocks, expected, strict=True):
        if not torch.isfinite(hidden).all():
            raise ArgumentError(
                f"{block.name} gives NaN or infinity on the calibration text: run the model in bfloat16 or float32, "
                "or check its weights for NaN and infinity"
            )
    sizes = [len(output) if isinstance(output, tuple) else None for _, output in trace]
    try:
        calls = _record(model, blocks, batch, sizes)
        hidden = calls[0].hidden
        for block, call, want in zip(blocks, calls, expected, strict=True):
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
    """The call of every block in the model's forward of a batch, without computing any block.

    The stubs return their input, so only the hidden states of the first call are correct.
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


def _deduplicated(calls: list[_Call], earlier: list[_Call]) -> list[_Call]:
    """The calls, with each tensor that equals its counterpart in ``earlier`` replaced by that one to save memory.

    Without padding, masks and tables are equal in all batches.
    """
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
