"""Collects activation statistics from hooks on linear layers, once for every distinct input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PruneError, StatsError
from ..linears import as_kernel_dtype
from ..methods.registry import Needs
from ..statistics.activation import ActivationStats
from ..statistics.gram import Gram
from ..statistics.outputs import OutputStats, update_outputs
from ..statistics.token_sample import TokenSample
from ..timing import Stopwatch
from .experts import watch_experts


@dataclass(eq=False)
class _Group:
    """Layers that share an input, and its statistics."""

    names: list[str]
    stats: ActivationStats


@dataclass(eq=False)
class _Reading:
    """A tensor that a group read in this batch; outputs wait here until they can be processed together.

    Attributes:
        version: the tensor's version counter when it was read: a higher one means changed in place.
        founding: whether the group was founded by this reading, and takes new members.
        names: who read it.
        before: the group's statistics without this tensor, if the group was founded in this batch by another one.
        outputs: by layer, with their version.
    """

    tensor: torch.Tensor
    version: int
    group: _Group
    founding: bool
    names: set[str]
    before: ActivationStats | None = None
    outputs: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the one that was read, unchanged."""
        mine = self.tensor
        return self.version == tensor._version and (
            mine is tensor
            or (
                mine.data_ptr() == tensor.data_ptr()
                and mine.shape == tensor.shape
                and mine.stride() == tensor.stride()
                and mine.dtype == tensor.dtype
            )
        )


class _AllRead(Exception):
    """Every layer has read its input in this batch, and written its output where that is wanted."""


class InputCollector:
    """Statistics of what some linear layers read and, where the metric needs it, write.

    Layers that read the very same tensors in the first batch that reaches them form a group with one
    :class:`ActivationStats`, updated once a batch.

    Args:
        layers: by name.
        needs: what is wanted of them.
        clock: whose "statistics" count.
        each_once: it is known that no batch calls a layer twice.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], needs: Needs, clock: Stopwatch, *, each_once: bool = False
    ) -> None:
        self._layers = layers
        self._names = {module: name for name, module in layers.items()}
        self._needs = needs
        self._clock = clock
        self._group_of: dict[str, _Group] = {}
        self._outputs: dict[str, OutputStats] = {}
        self._readings: list[_Reading] = []
        self._shape = (0, 0)
        self._valid: torch.Tensor | None = None
        self._read: list[str] = []
        self.each_once = each_once
        self._leave_early = False

    @property
    def reading(self) -> bool:
        """Whether a layer has read its input in this batch."""
        return bool(self._read)

    @property
    def groups(self) -> list[list[str]]:
        """Names of the layers that share an input, in order of first use."""
        return [group.names for group in dict.fromkeys(self._group_of.values())]

    def statistics(self, name: str) -> ActivationStats | None:
        """A layer's statistics; None where no token reached it."""
        group = self._group_of.get(name)
        return None if group is None else group.stats.with_outputs(self._outputs.get(name))

    def reorder_inputs(self, name: str, order: torch.Tensor) -> None:
        """Put a layer's input channels in another order, for all layers that share them."""
        group = self._group_of[name]
        group.stats.reorder(order)
        for member in group.names:
            if member in self._outputs:
                self._outputs[member].reorder(inputs=order)

    def reorder_outputs(self, name: str, order: torch.Tensor) -> None:
        """Put a layer's output channels in another order."""
        if name in self._outputs:
            self._outputs[name].reorder(outputs=order)

    @contextmanager
    def batch(self, shape: tuple[int, int], valid: torch.Tensor | None, *, leave_early: bool = False) -> Iterator[None]:
        """Watch the layers while one batch runs.

        Args:
            shape: n_sequences and length of the batch.
            valid: bool of that shape, False for padding; None where there is none. It is applied to inputs
                with a row for every token of the batch, whatever their shape; others (the tokens routed to
                one expert) count as one sequence without padding.
            leave_early: nothing is wanted but the statistics: what runs inside is left, by an exception that goes no
                further than this, as soon as the last layer has read its input, or written its output where that is
                wanted. Where it is not known that each is called once, the first batch runs whole and shows it.

        Raises:
            PruneError: layers that shared an input before do not in this batch, an input was overwritten
                before its statistics were complete, or outputs hold NaN or infinity.
        """
        self._shape, self._valid, self._read = shape, valid, []
        self._leave_early = leave_early and self.each_once
        handles = [self._watch(module) for module in self._layers.values()]
        try:
            with (
                suppress(_AllRead),
                watch_experts(self._layers, lambda layer, tokens, output: self._see(layer, (tokens,), {}, output)),
            ):
                yield
            self.each_once = len(set(self._read)) == len(self._read)
            with self._clock.measure("statistics"):
                self._settle()
            self._check_groups()
        finally:
            for handle in handles:
                handle.remove()
            self._readings = []

    def _watch(self, module: nn.Module) -> RemovableHandle:
        if self._needs.outputs:
            return module.register_forward_hook(self._see, with_kwargs=True)
        return module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor | None = None
    ) -> None:
        name = self._names[module]
        tensor: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        if tensor.numel() == 0:
            return
        with self._clock.measure("statistics"):
            reading = self._reading_of(name, tensor)
            if self._needs.outputs and output is not None:
                reading.outputs[name] = (output, output._version)
        self._read.append(name)
        if self._leave_early and len(self._read) == len(self._layers):
            raise _AllRead

    def _reading_of(self, name: str, tensor: torch.Tensor) -> _Reading:
        group = self._group_of.get(name)
        for reading in self._readings:
            joins = reading.founding if group is None else reading.group is group and name not in reading.names
            if joins and reading.is_of(tensor):
                if group is None:
                    reading.group.names.append(name)
                    self._group_of[name] = reading.group
                reading.names.add(name)
                return reading
        self._settle()
        founding = group is None
        new = any(reading.founding and reading.group is group for reading in self._readings)
        before = copy.deepcopy(group.stats) if group is not None and new else None
        if group is None:
            width = tensor.shape[-1]
            gram = Gram(width) if self._needs.gram else None
            sample = TokenSample(width) if self._needs.sample else None
            group = self._group_of[name] = _Group([name], ActivationStats(width, gram=gram, sample=sample))
        tokens, valid = self._sequences(tensor)
        group.stats.update(tokens, valid=valid)
        reading = _Reading(tensor, tensor._version, group, founding, {name}, before)
        self._readings.append(reading)
        return reading

    def _settle(self) -> None:
        """Process the outputs that wait."""
        for reading in self._readings:
            if not reading.outputs:
                continue
            tokens, valid = self._sequences(reading.tensor)
            names = list(reading.outputs)
            if reading.version != reading.tensor._version:
                raise PruneError(
                    f"{names[0]}: its input is overwritten in place right after it is read, so output-aware "
                    "metrics cannot follow it; use a metric without outputs (wanda, ria, varp)"
                )
            outputs = []
            for name, (output, version) in reading.outputs.items():
                intact = output if output._version == version else self._layers[name].forward(reading.tensor)
                outputs.append(as_kernel_dtype(intact))
                self._outputs.setdefault(name, OutputStats(self._needs.reduce))
            try:
                update_outputs([self._outputs[name] for name in names], tokens, outputs, valid)
            except StatsError as error:
                raise PruneError(f"{', '.join(names)}: {error}") from error
            reading.outputs.clear()

    def _sequences(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An input as [n_sequences, length, in_features] with its padding, as far as it still shows them."""
        tensor = as_kernel_dtype(tensor)
        n_sequences, length = self._shape
        rows = tensor.numel() // tensor.shape[-1]
        whole = rows == n_sequences * length
        if not whole and tensor.shape[:2] != self._shape:
            return tensor.reshape(1, rows, tensor.shape[-1]), None
        valid = None if self._valid is None else self._valid.to(tensor.device)
        if valid is not None and not whole:
            valid = valid.repeat_interleave(rows // (n_sequences * length), dim=1)
        return tensor.reshape(n_sequences, -1, tensor.shape[-1]), valid

    def _check_groups(self) -> None:
        """Divide each group that did not read its tensors together in the batch that founded it."""
        for group in dict.fromkeys(reading.group for reading in self._readings):
            readings = [reading for reading in self._readings if reading.group is group]
            partial = [reading for reading in readings if len(reading.names) < len(group.names)]
            if not partial:
                continue
            names, before = partial[0].names, partial[0].before
            others = [name for name in group.names if name not in names]
            alike = all(reading.names == names for reading in partial)
            if before is None or not alike or readings[-len(partial) :] != partial:
                raise PruneError(
                    f"{', '.join(sorted(names))} and {', '.join(sorted(others))} read one tensor in an "
                    "earlier batch and not in this one, so their statistics cannot be shared; prune one after the "
                    "other with include="
                )
            group.names = [name for name in group.names if name in names]
            self._group_of |= dict.fromkeys(others, _Group(others, before))
