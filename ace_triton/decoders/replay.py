"""Runs the calibration set through a tower of a model, one block at a time.

The other arguments of a block (attention mask, rotary tables, ...) differ between families, and between blocks of one
model. They are recorded in the model's own forward, with a stub in place of every block, and then replayed. Towers that
run before are not replaced, so the recorded outputs of an encoder are those of its present weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import nn

from ..out_of_memory import raise_if_out_of_memory
from ..timing import Stopwatch
from .batches import TEXT_ALONE, Batch, MaskedInput, Masks, trial_batch
from .blocks import Block
from .calls import (
    CANNOT_RUN_AGAIN,
    Call,
    NotReplayable,
    agree,
    deduplicated,
    forward,
    has_parts,
    hidden_of,
    logits_after,
    output_after,
    recorded,
    traced,
    try_replay,
)
from .finished import FinishedOutputs
from .kept_tensors import KeptTensors
from .links import Carried, Link, links_found
from .parts_of_logits import parts_of
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
        to_logits: True if what follows the blocks will run too; then the logits of the trial must agree.

    Raises:
        ArgumentError: if the model's hidden states contain NaN or infinity.
    """
    with clock.measure("calibration"):
        trial = trial or trial_batch(model, batches)
        with links_found([block.module for block in blocks]) as links:
            trace, output = traced(model, blocks, trial)
        try:
            if to_logits and getattr(output, "logits", None) is None:
                raise NotReplayable("it gives no logits")
            sizes = try_replay(model, blocks, trial, trace, links, output.logits if to_logits else None)
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
        if to_logits:
            last = hidden_of(trace[-1][1])
            replay.has_parts = has_parts(model, blocks, trial, sizes, last, output.logits)
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
                    forward(self._model, batch)

    def hidden_like(self, number: int, batch: Batch) -> torch.Tensor | None:
        """A tensor without data, of the shape of the hidden states that the first block reads; None if unknown."""
        if number not in self._hidden:
            self._hidden[number] = None
            if self._blocks and not batch.of_text:
                with suppress(NotReplayable):
                    self._hidden[number] = recorded(self._model, self._blocks[:1], batch, [None])[0].hidden.to("meta")
        return self._hidden[number]

    @contextmanager
    def _others(self, batch: Batch, shape: tuple[int, int]) -> Iterator[list[MaskedInput]]:
        """A context in which the list contains what the block that runs reads of other towers."""
        found: list[MaskedInput] = []

        def find(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(NotReplayable):
                found[:] = self._masks.of_others(batch, Call.of(args, kwargs).others, shape)

        with ExitStack() as hooks:
            for block in () if self._masks.is_first else self._blocks:
                hooks.callback(block.module.register_forward_pre_hook(find, with_kwargs=True).remove)
            yield found


class Replay:
    """Keeps the hidden states of the calibration set, in the model's dtype, and runs one block at a time on them.

    Attributes:
        hidden: by number of the batch, the hidden states [n_sequences, length, width] that the next block reads.
        has_parts: True if the logits of some tokens can be computed without those of the others.
    """

    has_parts = False

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
        self._calls: list[list[Call]] = []
        self._outputs = FinishedOutputs(keep)
        self._reusable: dict[tuple[type, type], bool] = {}
        for number, batch in enumerate(batches):
            calls = recorded(model, blocks, batch, sizes, links)
            self.hidden[number] = calls[0].hidden
            calls = [call.with_hidden(None) for call in calls]
            self._calls.append(deduplicated(calls, self._calls[-1]) if self._calls else calls)

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
                output = self.call(index, number)
                if advance:
                    self.advance(index, number, output)
        if advance:
            self._outputs.clear()

    def advance(self, index: int, number: int, output: Any) -> None:
        """Let the next block read what block ``index`` returned for a batch."""
        self.hidden[number] = hidden_of(output).detach()
        self._carried[number].add(index, output, like=self._carried[number - 1] if number else None)

    @property
    def numbers(self) -> range:
        """The numbers of the batches."""
        return range(len(self._batches))

    def output(self, index: int, number: int) -> torch.Tensor:
        """The hidden states that a block returns for a batch; the next block's inputs stay as they are."""
        return hidden_of(self.call(index, number))

    def output_of_model(self, number: int, hidden: torch.Tensor) -> Any:
        """The model's output for a batch with these hidden states after its last block."""
        return output_after(self._model, self._blocks, self._batches[number], self._sizes, hidden)

    def shared(self, index: int) -> set[int]:
        """Identities of the parameters that a block shares with the rest of the model."""
        own = {id(parameter) for parameter in self._blocks[index].module.parameters()}
        within = self._blocks[index].name + "."
        named = self._model.named_parameters(remove_duplicate=False)
        return own & {id(parameter) for name, parameter in named if not name.startswith(within)}

    def valid(self, number: int) -> torch.Tensor | None:
        """The padding mask of a batch's hidden states; None if there is no padding."""
        return self._masks.of_hidden(self._batches[number], self.hidden[number])[1]

    def logits(self, number: int) -> Iterator[torch.Tensor]:
        """The model's logits for a batch, after every block has advanced; only what follows the blocks is computed.

        Yields:
            the logits [n_sequences, n_tokens, vocabulary] of each part (:mod:`~ace_triton.decoders.parts_of_logits`).
        """
        batch, hidden = self._batches[number], self.hidden[number]
        parts = parts_of(batch.shape[1])
        whole = None if self.has_parts else logits_after(self._model, self._blocks, batch, self._sizes, hidden)
        for part in parts:
            with self._clock.measure("calibration"):
                if whole is None:
                    yield logits_after(self._model, self._blocks, batch, self._sizes, hidden, part)
                else:
                    yield whole[:, part]

    def _watched(
        self, watcher: Watcher, index: int, number: int, batch: Batch, *, leave_early: bool
    ) -> AbstractContextManager[None]:
        shape, valid = self._masks.of_hidden(batch, self.hidden[number])
        others = self._masks.of_others(batch, self._calls[number][index].others, shape)
        return watcher.batch(shape, valid, others=others, leave_early=leave_early)

    def call(self, index: int, number: int, hidden: torch.Tensor | None = None) -> Any:
        """The output of a block on hidden states of a batch; None for the present ones."""
        call = self._calls[number][index].with_arguments(self._carried[number].arguments(index))
        return call.run(self._blocks[index].module, self.hidden[number] if hidden is None else hidden)

    def _may_reuse(self, index: int, module: nn.Module, number: int) -> bool:
        """True if blocks of this type return the same with a cached output of this type of module.

        Tried once per pair of types. The result differs if a block needs more of a module than its output, or changes
        that output in place.
        """
        kind = (type(self._blocks[index].module), type(module))
        if kind not in self._reusable:
            whole, carried = self.call(index, number), self._carried[number]
            try:
                with self._outputs.reusing([module], number):
                    again = self.call(index, number)
                pairs = [(hidden_of(again), hidden_of(whole))]
                linked = carried.outputs_of(index, whole)
                pairs += [(value, linked[key]) for key, value in carried.outputs_of(index, again).items()]
                self._reusable[kind] = all(isinstance(got, torch.Tensor) and agree(got, want) for got, want in pairs)
            except CANNOT_RUN_AGAIN as error:
                raise_if_out_of_memory(error)
                self._reusable[kind] = False
                warnings.warn(
                    f"{kind[0].__name__}: the output of its {kind[1].__name__} is computed again for each group of "
                    f"layers, because the block fails with a cached output ({error})",
                    stacklevel=4,
                )
        return self._reusable[kind]
