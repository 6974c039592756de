"""How a model calls its blocks, recorded in its own forward, and a trial of replaying the calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..out_of_memory import raise_if_out_of_memory
from .batches import Batch, run_model
from .blocks import Block
from .finished import forward_replaced, in_tuple, returning
from .links import Carried, Link
from .parts_of_logits import head_by_parts, head_of_part


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
class Call:
    """How the model calls a block.

    Attributes:
        args, kwargs: the arguments.
        place: index in ``args``, or key in ``kwargs``, of the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
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

    def with_hidden(self, hidden: torch.Tensor | None) -> Call:
        return self.with_arguments({self.place: hidden})

    def with_arguments(self, replaced: Mapping[int | str, torch.Tensor | None]) -> Call:
        """The call with some arguments replaced, by their place."""
        args = tuple(replaced.get(place, value) for place, value in enumerate(self.args))
        named = {place: value for place, value in replaced.items() if isinstance(place, str)}
        return Call(args, {**self.kwargs, **named}, self.place)

    def run(self, module: nn.Module, hidden: torch.Tensor) -> Any:
        call = self.with_hidden(hidden)
        return module(*call.args, **call.kwargs)


def forward(model: nn.Module, batch: Batch) -> Any:
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


def traced(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> tuple[list[tuple[int, Any]], Any]:
    """The index and the output of each block in the model's own forward, in order of the calls; and its own output."""
    trace: list[tuple[int, Any]] = []

    def record_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            trace.append((index, _copied(output)))

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.module.register_forward_hook(record_output(index)).remove)
        output = forward(model, batch)
    return trace, output


def _copied(output: Any) -> Any:
    """An output of a block with a copy of its hidden states, which a later block may change in place."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return (_copied(output[0]), *output[1:]) if isinstance(output, tuple) and output else output


def try_replay(
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
        calls = recorded(model, blocks, batch, sizes, links)
        hidden, carried = calls[0].hidden, Carried(links)
        for index, (block, call, want) in enumerate(zip(blocks, calls, expected, strict=True)):
            linked = call.with_arguments(carried.arguments(index))
            once, again = linked.run(block.module, hidden), linked.run(block.module, hidden)
            if not (agree(hidden_of(once), want) and agree(hidden_of(again), want)):
                raise NotReplayable(f"{block.name} needs more than its hidden states and constant arguments")
            hidden = hidden_of(once)
            carried.add(index, once)
        if logits is not None and not agree(logits_after(model, blocks, batch, sizes, hidden), logits):
            raise NotReplayable("its logits need more than the hidden states of its last block")
    except RUN_ERRORS as error:
        raise_if_out_of_memory(error)
        raise NotReplayable(f"a block fails outside the model's forward ({error})") from error
    return sizes


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return False
    tolerance = 1e-5 if want.dtype == torch.float32 else 1e-3
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def recorded(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    sizes: Sequence[int | None],
    links: Sequence[Link] = (),
) -> list[Call]:
    """The call of every block in the model's forward of a batch, without computing any block.

    The stubs return their input, so only the hidden states of the first call are correct, and linked arguments are
    None.
    """
    calls: list[Call] = []
    written = {(link.writer, link.output) for link in links}
    absent = [{link.place: None for link in links if link.reader == index} for index in range(len(blocks))]

    def stub(index: int, size: int | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(args, kwargs)
            calls.append(call.with_arguments(absent[index]))
            if len(calls) == len(blocks):
                raise _Stop
            rest = (call.hidden if (index, place) in written else None for place in range(1, size or 1))
            return call.hidden if size is None else (call.hidden, *rest)

        return forward

    with ExitStack() as stubs:
        for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            stubs.enter_context(forward_replaced(block.module, stub(index, size)))
        forward(model, batch)
    return calls


def output_after(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, sizes: Sequence[int | None], hidden: torch.Tensor
) -> Any:
    """The output of the model's forward of a batch with these hidden states after the last block.

    Args:
        model, blocks, batch, sizes: as for :func:`try_replay`.
        hidden: the hidden states.
    """
    with ExitStack() as changed:
        for block, size in zip(blocks, sizes, strict=True):
            changed.enter_context(forward_replaced(block.module, returning(in_tuple(hidden, size))))
        return forward(model, batch)


def logits_after(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    sizes: Sequence[int | None],
    hidden: torch.Tensor,
    part: slice | None = None,
) -> torch.Tensor:
    """The logits in the model's forward of a batch with these hidden states after the last block.

    Args:
        model, blocks, batch, sizes, hidden: as for :func:`output_after`.
        part: tokens whose logits are computed; None for all.
    """
    with head_by_parts(model) if part is None else head_of_part(model, part):
        logits: torch.Tensor = output_after(model, blocks, batch, sizes, hidden).logits
    return logits


def has_parts(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Batch,
    sizes: Sequence[int | None],
    hidden: torch.Tensor,
    logits: torch.Tensor,
) -> bool:
    """True if :func:`logits_after` gives the logits of a part of the tokens, in a trial of two parts.

    Args:
        model, blocks, batch, sizes, hidden: as for :func:`logits_after`.
        logits: the logits of all tokens.
    """
    half = logits.shape[1] // 2
    try:
        return all(
            agree(logits_after(model, blocks, batch, sizes, hidden, part), logits[:, part])
            for part in (slice(0, half), slice(half, logits.shape[1]))
        )
    except RUN_ERRORS as error:
        raise_if_out_of_memory(error)
        return False


def deduplicated(calls: list[Call], earlier: list[Call]) -> list[Call]:
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

    def kwargs(call: Call, old: Call) -> dict[str, Any]:
        return {name: shared(value, old.kwargs.get(name)) for name, value in call.kwargs.items()}

    pairs = zip(calls, earlier, strict=True)
    return [Call(shared(call.args, old.args), kwargs(call, old), call.place) for call, old in pairs]
