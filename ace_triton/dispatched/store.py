"""Prunes a model where accelerate has put it: on several devices, in memory beside them, or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoders.device_blocks import DeviceBlocks
from ..decoders.weight_store import InMemory, WeightStore
from ..errors import RecipeError
from ..process_memory import page_out
from .hooks import device_of_hook, hooks_of
from .places import WAY_OUT, InFolder, Place, place_of


@dataclass
class Offloaded:
    """One offloaded weight, under all its names.

    Attributes:
        device: where the weight is used.
        places: where it is kept; several places if it is tied and has a copy for each name.
        modules: the modules that have it, each with the name there and the parameter on the meta device.
    """

    device: torch.device
    places: list[Place] = field(default_factory=list)
    modules: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)


class OffloadedStore:
    """A :class:`~ace_triton.decoders.weight_store.WeightStore` of weights that accelerate offloads.

    Args:
        model: the model; :meth:`open` gives its offloaded parameters their values.
        offloaded: its offloaded weights.
        offload_folder: folder for files with the hidden states; None to keep them in memory.
    """

    keeps_changes_private = False

    def __init__(self, model: nn.Module, offloaded: Sequence[Offloaded], offload_folder: Path | None = None) -> None:
        self.offload_folder = offload_folder
        self._model, self._offloaded = model, offloaded
        self._running = ExitStack()
        self._taken: dict[nn.Parameter, Offloaded] = {}
        self._mapped: set[int] = set()
        self._blocks = DeviceBlocks(model, {}, self._drop)

    @contextmanager
    def open(self) -> Iterator[None]:
        """A context in which every parameter has its values, and accelerate's hooks load none."""
        with self._running:
            for entry in self._offloaded:
                self._take(entry)
            for module in self._model.modules():
                for hook in hooks_of(module):
                    if hook.offload:
                        self._take_buffers(module, hook)
                        hook.offload = False
                        self._running.callback(setattr, hook, "offload", True)
            devices = {parameter: entry.device for parameter, entry in self._taken.items()}
            self._blocks = DeviceBlocks(self._model, devices, self._drop)
            with self._blocks.placed():
                yield

    def release(self, module: nn.Module) -> None:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        for parameter in module.parameters():
            self._drop(parameter.data)

    @contextmanager
    def in_use(self, modules: Sequence[nn.Module]) -> Iterator[bool]:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        with self._blocks.in_use(modules):
            yield True

    def finished(self, unit: str) -> dict[str, Any] | None:
        """None: an interrupted run is not resumed."""
        return None

    def finish(self, unit: str, modules: Sequence[nn.Module], record: dict[str, Any]) -> None:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`; the record is not kept."""
        self._blocks.write_back(modules)
        for parameter in {parameter: None for module in modules for parameter in module.parameters()}:
            if parameter in self._taken:
                self._write(parameter, self._taken[parameter])

    def as_loaded(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Nothing to do, because no unit is finished before."""
        return nullcontext()

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``."""
        return compute()

    @cached_property
    def _scratch(self) -> Path:
        folder = next(p.loader.save_folder for e in self._offloaded for p in e.places if isinstance(p, InFolder))
        return Path(self._running.enter_context(tempfile.TemporaryDirectory(dir=folder)))

    def _take(self, entry: Offloaded) -> None:
        """Give the modules with a weight one parameter with its values, until the store closes."""
        _, _, first = entry.modules[0]
        parameter = nn.Parameter(self._read(entry.places[0], first), requires_grad=first.requires_grad)
        for module, key, meta in entry.modules:
            module._parameters[key] = parameter
            self._running.callback(module._parameters.__setitem__, key, meta)
        self._taken[parameter] = entry

    def _take_buffers(self, module: nn.Module, hook: Any) -> None:
        """Load the buffers that a hook offloads, until the store closes."""
        for name, buffer in list(module.named_buffers(recurse=hook.place_submodules)):
            if buffer.is_meta:
                path, _, key = name.rpartition(".")
                owner = module.get_submodule(path)
                owner._buffers[key] = hook.weights_map[name].to(device_of_hook(hook), buffer.dtype)
                self._running.callback(owner._buffers.__setitem__, key, buffer)

    def _read(self, place: Place, like: torch.Tensor) -> torch.Tensor:
        tensor = place.read(like, lambda: self._scratch)
        if place.in_file:
            self._mapped.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _write(self, parameter: nn.Parameter, entry: Offloaded) -> None:
        """Write a weight to its places if it has changed there, and map it again."""
        new = self._blocks.kept(parameter)
        for place in entry.places:
            if not torch.equal(self._read(place, new), new):
                place.write(new)
        if entry.places[0].in_file:
            self._blocks.map_to(parameter, self._read(entry.places[0], new))

    def _drop(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta and tensor.untyped_storage().data_ptr() in self._mapped:
            page_out(tensor)


@contextmanager
def opened(model: nn.Module, offload_folder: Path | None) -> Iterator[WeightStore]:
    """A context in which all weights of a model can be read and pruned, and the store that keeps them.

    Args:
        model: any module; accelerate may have offloaded parameters of it.
        offload_folder: folder for files with the hidden states; None to keep them in memory.

    Raises:
        RecipeError: if the values of a parameter are unknown, or a pruned weight could not be kept.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield InMemory(offload_folder)
        return
    store = OffloadedStore(model, offloaded_weights(model), offload_folder)
    with store.open():
        yield store


def offloaded_weights(model: nn.Module) -> list[Offloaded]:
    """The weights of a model that accelerate offloads, each once.

    Raises:
        RecipeError: as for :func:`opened`.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[object, Offloaded] = {}
    identities: dict[str, object] = {}
    known: set[tuple[nn.Module, str]] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for hook in hooks_of(module):
            for key, parameter in module.named_parameters(recurse=hook.place_submodules, remove_duplicate=False):
                path, _, own = key.rpartition(".")
                owner = module.get_submodule(path)
                if not hook.offload or not parameter.is_meta or (owner, own) in known:
                    continue
                known.add((owner, own))
                name = f"{prefix}.{key}" if prefix else key
                place = place_of(hook.weights_map, key, name)
                identity = identities.setdefault(tied.get(name, name), place.identity)
                entry = found.setdefault(identity, Offloaded(device_of_hook(hook)))
                entry.modules.append((owner, own, parameter))
                if all(place.identity != other.identity for other in entry.places):
                    entry.places.append(place)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        if parameter.is_meta and (model.get_submodule(path), own) not in known:
            raise RecipeError(f"{name} is on the meta device and was never loaded: {WAY_OUT}")
    return list(found.values())
