"""Runs the blocks of a model on a device while the weights lie elsewhere: one block is there at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..process_memory import prefetch_pages
from .blocks import outermost_members


class DeviceBlocks:
    """Copies the weights of blocks to a device while they run or are pruned.

    Blocks are the members of the outermost ``nn.ModuleList`` objects. Weights outside the blocks that run on a CPU stay
    where they are, and leave memory after use. Those that run on another device are there all the time. Copies on a CPU
    are aligned, so sums do not depend on where a tensor lies in its file.

    Args:
        model: the model.
        devices: where each parameter is used. Parameters without an entry stay where they are.
        drop: removes the pages of such a parameter's tensor from memory.
    """

    def __init__(
        self, model: nn.Module, devices: Mapping[nn.Parameter, torch.device], drop: Callable[[torch.Tensor], None]
    ) -> None:
        self._model, self._devices, self._drop = model, devices, drop
        self._mapped: dict[nn.Parameter, torch.Tensor] = {}

    @contextmanager
    def placed(self) -> Iterator[None]:
        """A context in which the model runs on its devices."""
        blocks = outermost_members(self._model)
        inside = {parameter for block in blocks for parameter in block.parameters()}
        outside = [parameter for parameter in self._devices if parameter not in inside]
        on_cpu = {parameter for parameter in outside if self._devices[parameter].type == "cpu"}
        with ExitStack() as running:
            self._drop_after_use(on_cpu, running)
            self._move([parameter for parameter in outside if parameter not in on_cpu], running)
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                if not self._devices.keys().isdisjoint(block.parameters()):
                    self._copy_for_a_run(block, following, running)
            yield

    @contextmanager
    def in_use(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which the modules' weights are on the device; changes are lost without :meth:`write_back`."""
        with ExitStack() as moved:
            for module in modules:
                self._move(module.parameters(), moved)
            yield

    def write_back(self, modules: Sequence[nn.Module]) -> None:
        """Write the modules' weights from the device to their files."""
        for module in modules:
            for parameter in module.parameters():
                if parameter in self._mapped:
                    self._mapped[parameter].copy_(parameter.data)
                    self._drop(self._mapped[parameter])

    def kept(self, parameter: nn.Parameter) -> torch.Tensor:
        """The tensor that a parameter has while it is not on its device."""
        return self._mapped.get(parameter, parameter.data)

    def map_to(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """Map a parameter to another tensor; returns the old one."""
        if parameter in self._mapped:
            old, self._mapped[parameter] = self._mapped[parameter], tensor
        else:
            old, parameter.data = parameter.data, tensor
        return old

    def _copy_for_a_run(self, block: nn.Module, following: nn.Module | None, running: ExitStack) -> None:
        """Let a block be copied to the device for each of its forwards, and the next one be read ahead."""
        copies: list[ExitStack] = []

        def enter(module: nn.Module, _args: Any) -> None:
            copies.append(ExitStack())
            self._move(module.parameters(), copies[-1])
            for parameter in () if following is None else following.parameters():
                if parameter in self._devices and parameter not in self._mapped:
                    prefetch_pages(parameter.data)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            copies.pop().close()

        running.callback(block.register_forward_pre_hook(enter).remove)
        running.callback(block.register_forward_hook(leave, always_call=True).remove)

    def _drop_after_use(self, parameters: set[nn.Parameter], running: ExitStack) -> None:
        """Let modules drop the pages of those of their own parameters after each forward."""

        def drop(module: nn.Module, _args: Any, _output: Any) -> None:
            for parameter in module.parameters(recurse=False):
                if parameter in parameters and parameter not in self._mapped:
                    self._drop(parameter.data)

        for module in self._model.modules():
            if not parameters.isdisjoint(module.parameters(recurse=False)):
                running.callback(module.register_forward_hook(drop).remove)

    def _move(self, parameters: Iterable[nn.Parameter], until: ExitStack) -> None:
        """Move parameters that are not on their device yet, until the stack closes."""
        for parameter in parameters:
            if parameter in self._devices and parameter not in self._mapped:
                mapped = self._mapped[parameter] = parameter.data
                parameter.data = mapped.to(self._devices[parameter], copy=True)
                self._drop(mapped)
                until.callback(self._restore, parameter)

    def _restore(self, parameter: nn.Parameter) -> None:
        parameter.data = self._mapped.pop(parameter)
