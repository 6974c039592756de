"""Runs the calibration set through a tower of a model, one block at a time.

The other arguments of a block (attention mask, rotary tables, ...) differ between families, and between blocks of one
model. They are recorded in the model's own forward, with a stub in place of every block, and then replayed. Towers that
run before are not replaced, so the recorded outputs of an encoder are those of its present weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ArgumentError
from ..out_of_memory import raise_if_out_of_memory
from ..timing import Stopwatch
from .batches import TEXT_ALONE, Batch, MaskedInput, Masks, run_model, trial_batch
from .blocks import Block
from .finished import FinishedOutputs, forward_replaced, in_tuple, returning
from .kept_tensors import KeptTensors
from .links import Carried, Link, links_found
from .watcher import Watcher


class Runner(Protocol):
    """Runs the calibration set through the blocks of a tower, in order."""

    def run(self, index: int, watcher: Watcher | None, *, advance: bool, finished: Sequence[nn.Module] = ()) -> None:
        """Run block ``index`` on every batch.

        Args:
            index: index of the block.
            watcher: watches layers of the block during the run; None for a run without a watcher.
            advance: True if the outputs of this run become the inputs of the next block.
            finished: modules of the block that do not change until it advances, so that their outputs may be cached.
        """


def make_runner(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    clock: Stopwatch,
    masks: Masks = TEXT_ALONE,
    trial: Batch | None = None,
    *,
    keep: Callable[[], KeptTensors] = dict,
    to_logits: bool = False,
) -> Runner:
    """Make a :class:`Replay`, or warn and make a :class:`WholeForward` if replay gives wrong results in a trial.

    The trial runs a few tokens through the model itself, and through each block twice. All hidden states must agree.
    They differ if blocks share more than hidden states, if the model changes hidden states between blocks, or if a
    block changes its arguments.

    Args:
        model: the model, in evaluation mode.
        blocks: the blocks of one tower.
        batches: the batches that this process runs; none if other processes run them all.
        clock: measures the time.
        masks: the padding masks of the tower.
        trial: a few tokens for the trial; None for the beginning of the calibration set.
        keep: makes what keeps the hidden states (:func:`~ace_triton.decoders.kept_tensors.keeper`).
        to_logits: True if :meth:`Replay.logits` will be called; then the logits of the trial must agree too.

    Raises:
        ArgumentError: if the model's hidden states contain NaN or infinity.
    """
    with clock.measure("calibration"):
        trial = trial or trial_batch(model, batches)
        with links_found([block.module for block in blocks]) as links:
            trace, output = _trace(model, blocks, trial)
        try:
            sizes = _try_replay(model, blocks, trial, trace, links, output.logits if to_logits else None)
        except NotReplayable as reason:
            warnings.warn(
                f"{type(model).__name__}: {reason}. Its blocks cannot be run one at a time, so the whole model is run "
                "each time, which takes longer",
                stacklevel=5,
            )
            whole = WholeForward(model, batches, clock, blocks, masks)
            if batches:
                masks.warn_if_unused(batches, whole.hidden_like(0, batches[0]), stacklevel=5)
            return whole
        replay = Replay(model, blocks, batches, clock, sizes, links, masks, keep)
        if batches:
            masks.warn_if_unused(batches, replay.hidden[0], stacklevel=5)
        return replay


class WholeForward:
    """Runs the whole model for every block: correct for any model, but slow.

    Args:
        model: the model, in evaluation mode.
        batches: the calibration set.
        clock: measures the time.
        blocks: the blocks of the tower whose layers are watched; without them, inputs have the shape of the batch.
        masks: the padding masks of that tower.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        clock: Stopwatch,
        blocks: Sequence[Block] = (),
        masks: Masks = TEXT_ALONE,
    ) -> None:
        self._model, self._batches, self._clock = model, batches, clock
        self._blocks, self._masks = blocks, masks
        self._hidden: dict[int, torch.Tensor | None] = {}

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
        for number, batch in enumerate(self._batches):
            with self._clock.measure("calibration"):
                shape, valid = self._masks.of_hidden(batch, self.hidden_like(number, batch))
                with (
                    self._others(batch, shape) as others,
                    watcher.batch(shape, valid, others=others, leave_early=True),
                ):
                    _forward(self._model, batch)

    def hidden_like(self, number: int, batch: Batch) -> torch.Tensor | None:
        """A tensor without data, of the shape of the hidden states that the first block reads; None if unknown."""
        if number not in self._hidden:
            self._hidden[number] = None
            if self._blocks and not batch.of_text:
                with suppress(NotReplayable):
                    self._hidden[number] = _record(self._model, self._blocks[:1], batch, [None])[0].hidden.to("meta")
        return self._hidden[number]

    @contextmanager
    def _others(self, batch: Batch, shape: tuple[int, int]) -> Iterator[list[MaskedInput]]:
        """A context in which the list contains what the block that runs reads of other towers."""
        found: list[MaskedInput] = []

        def find(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(NotReplayable):
                found[:] = self._masks.of_others(batch, _Call.of(args, kwargs).others, shape)

        with ExitStack() as hooks:
            for block in () if self._masks.is_first else self._blocks:
                hooks.callback(block.module.register_forward_pre_hook(find, with_kwargs=True).remove)
            yield found


class Replay:
    """Keeps the hidden states of the calibration set, in the model's dtype, and runs one block at a time on them.

    Attributes:
        hidden: by number of the batch, the hidden states [n_sequences, length, width] that the next block reads.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        clock: Stopwatch,
        sizes: Sequence[int | None],
        links: Sequence[Link] = (),
        masks: Masks = TEXT_ALONE,
        keep: Callable[[], KeptTensors] = dict,
    ) -> None:
        self._model, self._blocks, self._batches, self._sizes = model, blocks, batches, sizes
        self._clock, self._masks = clock, masks
        self._carried = [Carried(links) for _ in batches]
        self.hidden = keep()
        self._calls: list[list[_Call]] = []
        self._outputs = FinishedOutputs(keep)
        self._reusable: dict[tuple[type, type], bool] = {}
        for number, batch in enumerate(batches):
            calls = _record(model, blocks, batch, sizes, links)
            self.hidden[number] = calls[0].hidden
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
                    contexts.enter_context(self._watched(watcher, index, number, batch, leave_early=not advance))
                output = self._call(index, number)
                if advance:
                    self.hidden[number] = hidden_of(output)
                    self._carried[number].add(index, output, like=self._carried[number - 1] if number else None)
        if advance:
            self._outputs.clear()

    def logits(self, number: int) -> torch.Tensor:
        """The model's logits for a batch, after every block has advanced; only what follows the blocks is computed."""
        with self._clock.measure("calibration"):
            return _logits(self._model, self._blocks, self._batches[number], self._sizes, self.hidden[number])

    def _watched(
        self, watcher: Watcher, index: int, number: int, batch: Batch, *, leave_early: bool
    ) -> AbstractContextManager[None]:
        shape, valid = self._masks.of_hidden(batch, self.hidden[number])
        others = self._masks.of_others(batch, self._calls[number][index].others, shape)
        return watcher.batch(shape, valid, others=others, leave_early=leave_early)

    def _call(self, index: int, number: int) -> Any:
        """The output of a block on the present hidden states of a batch."""
        call = self._calls[number][index].with_arguments(self._carried[number].arguments(index))
        return call.run(self._blocks[index].module, self.hidden[number])

    def _may_reuse(self, index: int, module: nn.Module, number: int) -> bool:
        """True if blocks of this type return the same with a cached output of this type of module.

        Tried once per pair of types. The result differs if a block needs more of a module than its output, or changes
        that output in place.
        """
        kind = (type(self._blocks[index].module), type(module))
        if kind not in self._reusable:
            whole, carried = self._call(index, number), self._carried[number]
            try:
                with self._outputs.reusing([module], number):
                    again = self._call(index, number)
                pairs = [(hidden_of(again), hidden_of(whole))]
                linked = carried.outputs_of(index, whole)
                pairs += [(value, linked[key]) for key, value in carried.outputs_of(index, again).items()]
                self._reusable[kind] = all(isinstance(got, torch.Tensor) and _agree(got, want) for got, want in pairs)
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
        floating = [(place, v) for place, v in places if isinstance(v, torch.Tensor) and v.is_floating_point()]
        for least in (3, 2):
            for place, value in floating:
                if value.dim() >= least:
                    return cls(args, kwargs, place)
        raise NotReplayable("no argument of a block is hidden states [n_sequences, length, width] or [length, width]")

    @property
    def hidden(self) -> Any:
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    @property
    def others(self) -> list[Any]:
        """All arguments except the hidden states."""
        return [value for place, value in [*enumerate(self.args), *self.kwargs.items()] if place != self.place]

    def with_hidden(self, hidden: torch.Tensor | None) -> _Call:
        return self.with_arguments({self.place: hidden})

    def with_arguments(self, replaced: Mapping[int | str, torch.Tensor | None]) -> _Call:
        """The call with some arguments replaced, by their place."""
        args = tuple(replaced.get(place, value) for place, value in enumerate(self.args))
        named = {place: value for place, value in replaced.items() if isinstance(place, str)}
        return _Call(args, {**self.kwargs, **named}, self.place)

    def run(self, module: nn.Module, hidden: torch.Tensor) -> Any:
        call = self.with_hidden(hidden)
        return module(*call.args, **call.kwargs)


def _forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output; None if its forward was ended early."""
    try:
        return run_model(model, batch)
    except _Stop:
        return None


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block; NotReplayable if the output contains none."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor):
        raise NotReplayable(
            f"a block returns a {type(output).__name__}; expected hidden states or a tuple that starts with them"
        )
    return first


def _trace(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> tuple[list[tuple[int, Any]], Any]:
    """The index and the output of each block in the model's own forward, in order of the calls; and its own output."""
    trace: list[tuple[int, Any]] = []

    def record_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            copy = (output[0].clone(), *output[1:]) if isinstance(output, tuple) and output else output
            trace.append((index, copy.clone() if isinstance(copy, torch.Tensor) else copy))

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.module.register_forward_hook(record_output(index)).remove)
        output = _forward(model, batch)
    return trace, output


def _try_replay(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    trace: list[tuple[int, Any]],
    links: Sequence[Link],
    logits: torch.Tensor | None = None,
) -> list[int | None]:
    """Check that replay gives the outputs in ``trace``, and the logits if they are given; NotReplayable if not.

    Returns:
        for each block, the size of the tuple that it returns, or None if it returns a tensor.
    """
    if [index for index, _ in trace] != list(range(len(blocks))):
        raise NotReplayable("its forward does not call each block once, in order")
    expected = [hidden_of(output) for _, output in trace]
    for block, hidden in zip(blocks, expected, strict=True):
        if not torch.isfinite(hidden).all():
            raise ArgumentError(
                f"{block.name} gives NaN or infinity on the text: run the model in bfloat16 or float32, "
                "or check its weights for NaN and infinity"
            )
    sizes = [len(output) if isinstance(output, tuple) else None for _, output in trace]
    try:
        calls = _record(model, blocks, batch, sizes, links)
        hidden, carried = calls[0].hidden, Carried(links)
        for index, (block, call, want) in enumerate(zip(blocks, calls, expected, strict=True)):
            linked = call.with_arguments(carried.arguments(index))
            once, again = linked.run(block.module, hidden), linked.run(block.module, hidden)
            if not (_agree(hidden_of(once), want) and _agree(hidden_of(again), want)):
                raise NotReplayable(f"{block.name} needs more than its hidden states and constant arguments")
            hidden = hidden_of(once)
            carried.add(index, once)
        if logits is not None and not _agree(_logits(model, blocks, batch, sizes, hidden), logits):
            raise NotReplayable("its logits need more than the hidden states of its last block")
    except RUN_ERRORS as error:
        raise_if_out_of_memory(error)
        raise NotReplayable(f"a block fails outside the model's forward ({error})") from error
    return sizes


def _agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return False
    tolerance = 1e-5 if want.dtype == torch.float32 else 1e-3
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def _record(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    sizes: Sequence[int | None],
    links: Sequence[Link] = (),
) -> list[_Call]:
    """The call of every block in the model's forward of a batch, without computing any block.

    The stubs return their input, so only the hidden states of the first call are correct, and linked arguments are
    None.
    """
    calls: list[_Call] = []
    written = {(link.writer, link.output) for link in links}
    absent = [{link.place: None for link in links if link.reader == index} for index in range(len(blocks))]

    def stub(index: int, size: int | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = _Call.of(args, kwargs)
            calls.append(call.with_arguments(absent[index]))
            if len(calls) == len(blocks):
                raise _Stop
            rest = (call.hidden if (index, place) in written else None for place in range(1, size or 1))
            return call.hidden if size is None else (call.hidden, *rest)

        return forward

    with ExitStack() as stubs:
        for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            stubs.enter_context(forward_replaced(block.module, stub(index, size)))
        _forward(model, batch)
    return calls


def _logits(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, sizes: Sequence[int | None], hidden: torch.Tensor
) -> torch.Tensor:
    """The logits in the model's forward of a batch with these hidden states after the last block."""
    with ExitStack() as stubs:
        for block, size in zip(blocks, sizes, strict=True):
            stubs.enter_context(forward_replaced(block.module, returning(in_tuple(hidden, size))))
        logits: torch.Tensor = _forward(model, batch).logits
    return logits


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
