"""Taylor terms of a model whose weights are in files: a backward through one block at a time.

A forward keeps the hidden states between blocks. The loss gives the gradient of the last ones. From the last block to
the first, each block runs again on its kept inputs, and its backward gives the gradients of its weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Block, Tower
from ..decoders.calibration_mode import calibration_mode
from ..decoders.calls import agree, hidden_of
from ..decoders.kept_tensors import KeptTensors
from ..decoders.replay import Replay, make_runner
from ..errors import ArgumentError
from ..timing import Stopwatch
from .coupled import Entry, Structures
from .gradients import Progress, Sums, Taylor, adding, check_gradients, check_reached, frozen, losses_in, of_batch
from .weights import Weights


def terms_by_block(
    model: nn.Module,
    tower: Tower,
    structures: Structures,
    batches: Sequence[Batch],
    weights: Weights,
    after: Callable[[Sequence[Entry], Mapping[str, Taylor]], None],
    *,
    sums: Sums = (),
    progress: Progress | None = None,
) -> None:
    """The terms of :func:`~ace_triton.structures.gradients.taylor_terms`, one block at a time.

    Args:
        model: a causal language model; unchanged at return.
        tower: its blocks.
        structures: the structures.
        batches: token ids.
        weights: where the model's weights are.
        after: called with the entries of each block and their terms by name of the consumer, the last block first,
            while the block is in memory; then nothing is kept.
        sums: which sums to keep; each takes the memory of an fp32 copy of a block.
        progress: called with the number of steps done, and of all steps: each block runs forward, then backward.

    Raises:
        ArgumentError: as ``taylor_terms``, or if blocks cannot run one at a time, or pass more than hidden states.
    """
    check_gradients(model, batches)
    tell, n_blocks = progress or (lambda *_: None), len(tower.blocks)
    with calibration_mode(model), frozen(model):
        pass_ = _Pass(model, tower, structures, batches, weights)
        for index in range(n_blocks):
            pass_.forward(index)
            tell(index + 1, 2 * n_blocks)
        with weights.loaded(model):
            pass_.backward_of_loss()
        for index in reversed(range(n_blocks)):
            pass_.backward(index, sums, after)
            tell(2 * n_blocks - index, 2 * n_blocks)


class _Pass:
    """A forward and a backward of the calibration set.

    Args:
        model, tower, structures, batches, weights: as for :func:`terms_by_block`.
    """

    def __init__(
        self, model: nn.Module, tower: Tower, structures: Structures, batches: Sequence[Batch], weights: Weights
    ) -> None:
        self._model, self._blocks, self._structures = model, tower.blocks, structures
        self._batches, self._weights = batches, weights
        clock = Stopwatch(next(model.parameters()).device)
        with weights.loaded(model):
            runner = make_runner(model, tower.blocks, batches, clock, tower.masks, keep=weights.keep, to_logits=True)
        if not isinstance(runner, Replay):
            raise ArgumentError(f"{type(model).__name__}: its blocks cannot be run one at a time{_REFUSED}")
        self._runner: Replay = runner
        self._inputs: KeptTensors = weights.keep()
        """By index of the block and number of the batch."""
        self._gradients: KeptTensors = weights.keep()
        """Of what the blocks that have not run backward yet return, by number of the batch."""
        self._traced: dict[int, torch.Tensor] = {}
        """What blocks read of the first batch, as leaves of the graph of their outputs."""

    def forward(self, index: int) -> None:
        """Run a block on all batches and keep its inputs."""
        runner, block = self._runner, self._blocks[index]
        shared = runner.shared(index)
        entries = self._structures.within(block)
        if any(id(part.tensor) in shared for entry in entries for part in entry.parts(self._structures.layers)):
            raise ArgumentError(f"{block.name} shares weights with other layers{_REFUSED}")
        with self._weights.loaded(block.module):
            for number in runner.numbers:
                hidden = self._inputs[index, number] = runner.hidden[number]
                output = runner.call(index, number) if number else self._traced_output(index, block, hidden)
                runner.advance(index, number, output)

    def _traced_output(self, index: int, block: Block, hidden: torch.Tensor) -> Any:
        """The output of a block; ArgumentError if a gradient would flow from it to an earlier block another way."""
        leaf = self._traced[index] = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            output = self._runner.call(index, 0, leaf.clone())
        others = {id(tensor) for place, tensor in self._traced.items() if place != index}
        if others & _leaves(hidden_of(output)):
            raise ArgumentError(f"{block.name} reads more of earlier blocks than their hidden states{_REFUSED}")
        return output

    def backward_of_loss(self) -> None:
        """The gradients of what the last block returned."""
        self._traced.clear()
        for number, batch in enumerate(self._batches):
            last = self._runner.hidden[number].detach().requires_grad_(True)
            with torch.enable_grad():
                output = self._runner.output_of_model(number, last.clone())
                losses_in(output, self._model, batch).mean().backward()  # type: ignore[no-untyped-call]
            self._gradients[number] = _gradient(last)

    def backward(self, index: int, sums: Sums, after: Callable[[Sequence[Entry], Mapping[str, Taylor]], None]) -> None:
        """Run a block again and backward on all batches; then its inputs and its terms are freed."""
        block, structures = self._blocks[index], self._structures
        entries = structures.within(block)
        found = {entry.consumer: Taylor() for entry in entries}
        with self._weights.loaded(block.module):
            with adding(entries, structures, found, sums), torch.enable_grad():
                for number in self._runner.numbers:
                    with of_batch(found):
                        self._backward_of_batch(index, number)
            check_reached(entries, found)
            after(entries, found)

    def _backward_of_batch(self, index: int, number: int) -> None:
        before = self._inputs[index, number].detach().requires_grad_(True)
        output = hidden_of(self._runner.call(index, number, before.clone()))
        if not number and not agree(output.detach(), self._runner.hidden[number]):
            raise ArgumentError(f"{self._blocks[index].name} returns something else if it runs again{_REFUSED}")
        output.backward(self._gradients[number])  # type: ignore[no-untyped-call]
        self._gradients[number] = _gradient(before)
        self._runner.hidden[number] = self._inputs.pop((index, number))


_REFUSED = (
    ", so gradients cannot be taken one block at a time: use a method without gradients (--method flap), or a machine "
    "with more memory and --no-stream"
)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _leaves(output: torch.Tensor) -> set[int]:
    """Identities of the tensors that a backward of ``output`` would give gradients to."""
    found: set[int] = set()
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        left += [following for following, _ in node.next_functions]
    return found
