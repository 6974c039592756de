"""Collects activation statistics by hooks on linear layers, once per distinct input tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PruneError, StatsError
from ..kernels.written import version_of
from ..linears import as_kernel_dtype
from ..methods.registry import Needs
from ..statistics.activation import ActivationStats
from ..statistics.batch import reads_tokens_once
from ..statistics.channel_moments import ChannelMoments
from ..statistics.deferred import read_together
from ..statistics.outputs import OutputStats, update_outputs
from ..statistics.statistic import Saved, Statistic, statistics
from ..timing import Stopwatch
from .batches import MaskedInput
from .experts import observe_experts


@dataclass(eq=False)
class _Group:
    """Layers that share an input, and the statistics of that input."""

    names: list[str]
    stats: ActivationStats


@dataclass(eq=False)
class _Reading:
    """A tensor that a group of layers read in the current batch, with pending outputs of these layers.

    Attributes:
        tensor: the tensor that was read.
        version: version counter of the tensor when it was read. A higher one means that it was changed in place.
        group: the layers that share this input.
        is_first: True if this is the first tensor of the group. Only then may other layers join the group.
        names: names of the layers that read this tensor.
        before: the group's statistics without this tensor, if another tensor created the group in this batch.
        outputs: pending outputs by layer, each with its version counter.
        without_moments: True while the group's moments lack this tensor. They are added with the outputs.
    """

    tensor: torch.Tensor
    version: int
    group: _Group
    is_first: bool
    names: set[str]
    before: ActivationStats | None = None
    outputs: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    without_moments: bool = False

    def matches(self, tensor: torch.Tensor) -> bool:
        """True if ``tensor`` is the tensor that was read, and unchanged since."""
        own = self.tensor
        return self.version == version_of(tensor) and (
            own is tensor
            or (
                own.data_ptr() == tensor.data_ptr()
                and own.shape == tensor.shape
                and own.stride() == tensor.stride()
                and own.dtype == tensor.dtype
            )
        )


class _AllCollected(Exception):
    """Ends a run early: the input of every layer, and its output if needed, is collected for this batch."""


class InputCollector:
    """Collects statistics of the inputs of linear layers and, if the metric needs them, of their outputs.

    Layers that read the same tensors in the first batch that reaches them form a group. A group shares one
    :class:`ActivationStats`, updated once per tensor.

    Args:
        layers: linear layers by name.
        needs: the statistics that the metric needs.
        clock: measures the time spent here as "statistics".
        each_once: True if it is known that no batch calls a layer more than once.
        lane: number of the part of the calibration set (:mod:`ace_triton.decoders.lanes`).
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        needs: Needs,
        clock: Stopwatch,
        *,
        each_once: bool = False,
        lane: int = 0,
    ) -> None:
        self._layers = layers
        self._lane = lane
        self._names = {module: name for name, module in layers.items()}
        self._needs = needs
        self._clock = clock
        self._group_of: dict[str, _Group] = {}
        self._outputs: dict[str, OutputStats] = {}
        self._readings: list[_Reading] = []
        self._shape = (0, 0)
        self._valid: torch.Tensor | None = None
        self._others: Sequence[MaskedInput] = ()
        self._calls: list[str] = []
        self.each_once = each_once
        self._leave_early = False

    @property
    def has_read(self) -> bool:
        """True if a layer has read its input in the current batch."""
        return bool(self._calls)

    @property
    def groups(self) -> list[list[str]]:
        """Names of the layers of each group, in the order in which groups first read an input."""
        return [group.names for group in dict.fromkeys(self._group_of.values())]

    def read_numbers(self, *others: InputCollector) -> None:
        """Read all counts and units from the device, also those of other collectors, with a single wait."""
        groups = {id(group): group for own in (self, *others) for group in own._group_of.values()}
        moments = [group.stats.part(ChannelMoments) for group in groups.values()]
        read_together([*moments, *(outputs for own in (self, *others) for outputs in own._outputs.values())])

    def statistics(self, name: str) -> ActivationStats | None:
        """A new snapshot of a layer's statistics; None if no token reached it."""
        group = self._group_of.get(name)
        return None if group is None else group.stats.with_outputs(self._outputs.get(name))

    def reorder_inputs(self, name: str, order: torch.Tensor) -> None:
        """Reorder the input channels of a layer, and of all layers in its group, in the statistics."""
        group = self._group_of[name]
        group.stats.reorder(order)
        for member in group.names:
            if member in self._outputs:
                self._outputs[member].reorder(inputs=order)

    def reorder_outputs(self, name: str, order: torch.Tensor) -> None:
        """Reorder a layer's output channels in the statistics."""
        if name in self._outputs:
            self._outputs[name].reorder(outputs=order)

    def merge(self, other: InputCollector) -> None:
        """Add what another collector has collected of other batches of the same layers.

        Raises:
            PruneError: if layers shared an input in one of the two and did not in the other.
        """
        self.read_numbers(other)
        for group in dict.fromkeys(other._group_of.values()):
            own = {id(self._group_of[name]): self._group_of[name] for name in group.names if name in self._group_of}
            if not own:
                self._group_of |= dict.fromkeys(group.names, group)
                continue
            mine = next(iter(own.values()))
            if len(own) > 1 or set(mine.names) != set(group.names):
                raise PruneError(
                    f"{', '.join(sorted(group.names))} read the same tensor in one part of the calibration text and "
                    "not in another, so they cannot share statistics; prune one after the other with include="
                )
            mine.stats.merge(group.stats)
        for name, outputs in other._outputs.items():
            self._outputs[name] = self._outputs[name] + outputs if name in self._outputs else outputs
        self.each_once = self.each_once and other.each_once

    def state(self) -> dict[str, Any]:
        """What was collected, with tensors on the CPU, for another process."""
        groups = [
            (group.names, group.stats.in_features, [_saved(part, group.stats) for part in group.stats.parts.values()])
            for group in dict.fromkeys(self._group_of.values())
        ]
        outputs = {name: _saved(part, self._group_of[name].stats)[1] for name, part in self._outputs.items()}
        return {"groups": groups, "outputs": outputs, "each_once": self.each_once}

    def with_state(self, state: Mapping[str, Any] | None) -> InputCollector:
        """This collector with what another process has collected of the same layers; None for nothing."""
        if state is None:
            return self
        device = next((p.device for layer in self._layers.values() for p in layer.parameters()), torch.device("cpu"))
        kinds = statistics()
        for names, width, parts in state["groups"]:
            loaded = [
                kinds[kind].load(saved).to(device) if saved.tensors else kinds[kind](width) for kind, saved in parts
            ]
            self._group_of |= dict.fromkeys(names, _Group(list(names), ActivationStats(width, parts=loaded)))
        self._outputs |= {name: OutputStats.load(saved).to(device) for name, saved in state["outputs"].items()}
        self.each_once = state["each_once"]
        return self

    @contextmanager
    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[MaskedInput] = (),
        leave_early: bool = False,
    ) -> Iterator[None]:
        """Collect the statistics of one batch, which runs inside this context.

        Args:
            shape: n_sequences and length of the batch.
            valid: bool of that shape, False for padding; None if there is no padding. It applies to inputs with one row
                per token of the batch, in any shape, and to inputs [n_sequences, length, ...]. Other inputs (the tokens
                routed to one expert) count as one sequence without padding.
            others: tensors with padding masks of their own, such as an encoder's outputs that a decoder reads.
            leave_early: end the run as soon as the last layer is collected, by an exception that this context
                suppresses. If :attr:`each_once` is still False, the first batch runs to its end to find out.

        Raises:
            PruneError: if layers that shared an input in an earlier batch do not share it in this one, if an input is
                overwritten before its statistics are complete, or if outputs contain NaN or infinity.
        """
        self._shape, self._valid, self._others, self._calls = shape, valid, others, []
        self._leave_early = leave_early and self.each_once
        handles = [self._register_hook(module) for module in self._layers.values()]
        try:
            with (
                suppress(_AllCollected),
                observe_experts(
                    self._layers, lambda layer, tokens, output: self._collect(layer, (tokens,), {}, output)
                ),
            ):
                yield
            self.each_once = len(set(self._calls)) == len(self._calls)
            with self._clock.measure("statistics"):
                self._process_outputs()
            self._split_groups()
        finally:
            for handle in handles:
                handle.remove()
            self._readings, self._others = [], ()

    def _register_hook(self, module: nn.Module) -> RemovableHandle:
        if self._needs.outputs:
            return module.register_forward_hook(self._collect, with_kwargs=True)
        return module.register_forward_pre_hook(self._collect, with_kwargs=True)

    def _collect(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor | None = None
    ) -> None:
        name = self._names[module]
        tensor: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        if tensor.numel() == 0:
            return
        with self._clock.measure("statistics"):
            reading = self._add_input(name, tensor)
            if self._needs.outputs and output is not None:
                reading.outputs[name] = (output, version_of(output))
        self._calls.append(name)
        if self._leave_early and len(self._calls) == len(self._layers):
            raise _AllCollected

    def _add_input(self, name: str, tensor: torch.Tensor) -> _Reading:
        """Add an input to the statistics of the layer's group, unless another layer of the group has added it."""
        group = self._group_of.get(name)
        for reading in self._readings:
            may_join = reading.is_first if group is None else reading.group is group and name not in reading.names
            if may_join and reading.matches(tensor):
                if group is None:
                    reading.group.names.append(name)
                    self._group_of[name] = reading.group
                reading.names.add(name)
                return reading
        self._process_outputs()
        is_first = group is None
        is_new_group = any(reading.is_first and reading.group is group for reading in self._readings)
        before = copy.deepcopy(group.stats) if group is not None and is_new_group else None
        if group is None:
            width = tensor.shape[-1]
            parts = [kind(width) for kind in self._needs.all_parts]
            for part in parts:
                part.draw_for_lane(self._lane)
            stats = ActivationStats(width, parts=parts)
            group = self._group_of[name] = _Group([name], stats)
        tokens, valid = self._sequences(tensor)
        reading = _Reading(tensor, version_of(tensor), group, is_first, {name}, before)
        reading.without_moments = self._needs.outputs and reads_tokens_once(tokens)
        if reading.without_moments:
            group.stats.update_without_moments(tokens, valid)
        else:
            group.stats.update(tokens, valid=valid)
        self._readings.append(reading)
        return reading

    def _process_outputs(self) -> None:
        """Add the pending outputs to the statistics."""
        for reading in self._readings:
            if not reading.outputs:
                continue
            tokens, valid = self._sequences(reading.tensor)
            names = list(reading.outputs)
            if reading.version != version_of(reading.tensor):
                raise PruneError(
                    f"{names[0]}: its input is overwritten in place right after it is read, so metrics that need "
                    "outputs cannot be used; use a metric that needs only inputs (wanda, ria, varp)"
                )
            outputs = []
            for name, (output, version) in reading.outputs.items():
                intact = output if version_of(output) == version else self._layers[name].forward(reading.tensor)
                outputs.append(as_kernel_dtype(intact))
                self._outputs.setdefault(name, OutputStats(self._needs.reduce))
            stats = [self._outputs[name] for name in names]
            try:
                if reading.without_moments:
                    reading.group.stats.add_with_outputs(stats, tokens, outputs, valid)
                else:
                    update_outputs(stats, tokens, outputs, valid)
            except StatsError as error:
                raise PruneError(f"{', '.join(names)}: {error}") from error
            reading.outputs.clear()
            reading.without_moments = False

    def _sequences(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An input as [n_sequences, length, in_features], and its padding mask.

        An input that is an output of another tower, or has the shape of one, has the mask of that output. An input with
        neither one row per token of the batch nor the shape [n_sequences, length, ...] becomes one sequence without
        padding.
        """
        for other, mask in self._others:
            is_it = tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape
            if is_it or (tensor.dim() == 3 and tensor.shape[:2] == other.shape[:2] != self._shape):
                return as_kernel_dtype(tensor), mask
        tensor = as_kernel_dtype(tensor)
        n_sequences, length = self._shape
        rows = tensor.numel() // tensor.shape[-1]
        whole = rows == n_sequences * length
        if not whole and (tensor.dim() < 3 or tensor.shape[:2] != self._shape):
            return tensor.reshape(1, rows, tensor.shape[-1]), None
        valid = None if self._valid is None else self._valid.to(tensor.device)
        if valid is not None and not whole:
            valid = valid.repeat_interleave(rows // (n_sequences * length), dim=1)
        return tensor.reshape(n_sequences, -1, tensor.shape[-1]), valid

    def _split_groups(self) -> None:
        """Split each new group whose layers did not read all its tensors together; PruneError for an older group."""
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
                    f"{', '.join(sorted(names))} and {', '.join(sorted(others))} read the same tensor in an "
                    "earlier batch but not in this one, so they cannot share statistics; prune one after the "
                    "other with include="
                )
            group.names = [name for name in group.names if name in names]
            self._group_of |= dict.fromkeys(others, _Group(others, before))


def _saved(part: Statistic, stats: ActivationStats) -> tuple[str, Saved]:
    """A part's registered name and contents, on the CPU."""
    tensors = {name: tensor.cpu() for name, tensor in part.tensors().items()}
    return part.name, Saved(stats.in_features, stats.count, tensors, part.facts())
