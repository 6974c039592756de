"""A model whose weights stay in the files of the checkpoint that is being written.

Every parameter is a mapped region of a file: the system loads what is read and writes what is changed. A module's pages
leave the memory of the process once the module has run. To all other code the model looks like one in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..process_memory import drop_pages, page_out
from .weight_files import WeightFiles

PIECE = 2**24
"""Elements that are copied at once."""

_BLOCK = re.compile(r"^(.*?\.\d+)\.")

Source = Callable[[], torch.Tensor]


class MappedModel:
    """A model whose parameters are mapped regions of files. It runs on the CPU.

    Args:
        model: with its parameters on the meta device and accelerate's hooks, as
            :func:`~ace_triton.inputs.checkpoint.load` gives it with an ``offload_folder``. The hooks are removed.
        folder: folder for the checkpoint's weight files.
        own_form: folder for weights that the model stores in another form than the checkpoint (such as the experts of
            a mixture, in one tensor).
        existing: the files exist, and keep their contents.
        is_copy: True for a process that does not write the files. Its parameters are private maps of the source until
            :meth:`FileStore.adopt <ace_triton.streaming.file_store.FileStore.adopt>` takes the written ones.

    Attributes:
        model: the model. Before it runs, :meth:`fill` its weights.
        files: the checkpoint's weight files.
        drop: removes the pages of a parameter from memory, and loses no change.
    """

    def __init__(
        self, model: Any, folder: Path, own_form: Path, *, existing: bool = False, is_copy: bool = False
    ) -> None:
        self.model = model
        self._sources = taken_sources(model)
        saved, self._direct = saved_form(model)
        self._converted = {name: p for name, p in model.named_parameters() if name not in self._direct}
        self.files = WeightFiles.create(folder, saved, existing=existing)
        own_form.mkdir(exist_ok=True)
        self._own_form = WeightFiles.create_one_each(own_form, self._converted, existing=existing)
        # A private page that was changed must not be dropped: its change is nowhere else.
        self.drop = page_out if is_copy else drop_pages
        self._map(is_copy)

    def fill(self, *, except_for: Iterable[str] = ()) -> None:
        """Copy the weights from their source, except for parameters of these names."""
        done = set(except_for)
        for name, parameter in self.model.named_parameters():
            if name not in done:
                copy_in_pieces(self._sources[name](), parameter.data)
        for name, buffer in self.model.named_buffers():
            if name in self._direct:
                copy_in_pieces(buffer, self.files.tensor(self._direct[name]))

    def write(self, name: str, values: torch.Tensor) -> bool:
        """Write a tensor of the model; False if the files have none of this name, such as one that is tied."""
        if name not in self._direct and name not in self._converted:
            return False
        copy_in_pieces(values, self.in_files(name))
        return True

    def read_buffers(self) -> None:
        """Give the model's buffers that the checkpoint has the values of the files."""
        for name, buffer in self.model.named_buffers():
            if name in self._direct:
                buffer.copy_(self.files.tensor(self._direct[name]))

    def names_of(self, modules: Sequence[nn.Module]) -> list[str]:
        """Names of all parameters of these modules."""
        wanted = {parameter for module in modules for parameter in module.parameters()}
        return [name for name, parameter in self.model.named_parameters() if parameter in wanted]

    @contextmanager
    def as_in_source(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which modules have the weights of the source; they may run, but not change."""
        swapped: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            for name in self.names_of(modules):
                parameter = self.model.get_parameter(name)
                swapped.append((parameter, parameter.data))
                parameter.data = self._sources[name]().to(parameter)
            yield
        finally:
            for parameter, mapped in swapped:
                parameter.data = mapped

    def sync(self, names: Iterable[str]) -> None:
        """Wait until these parameters are on disk."""
        direct = [self._direct[name] for name in names if name in self._direct]
        self.files.sync(direct)
        self._own_form.sync(name for name in names if name not in self._direct)

    def write_converted(self) -> None:
        """Write the weights that the model stores in another form than the checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        by_block: dict[str, dict[str, torch.Tensor]] = {}
        for name in self._converted:
            found = _BLOCK.match(name)
            by_block.setdefault(found.group(1) if found else "", {})[name] = self.model.get_parameter(name).data
        for state in by_block.values():
            for key, value in revert_weight_conversion(self.model, dict(state)).items():
                if key in self.files:
                    copy_in_pieces(value, self.files.tensor(key))
            for tensor in state.values():
                drop_pages(tensor)

    def release(self, module: nn.Module) -> None:
        """Remove a module's weights from memory; the next access loads them again from their files."""
        for parameter in module.parameters():
            self.drop(parameter.data)

    def _map(self, is_copy: bool) -> None:
        """Replace the parameters by mapped ones; parameters that are tied stay tied."""
        places = list(self.model.named_parameters(remove_duplicate=False))
        known = {*self._direct, *self._converted}
        mapped: dict[nn.Parameter, nn.Parameter] = {}
        for name, old in places:
            if name in known and old not in mapped:
                tensor = self._sources[name]().to(old.dtype) if is_copy else self.in_files(name)
                mapped[old] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        replace_parameters(self.model, mapped)

    def in_files(self, name: str) -> torch.Tensor:
        """A parameter in the files that are written."""
        key = self._direct.get(name)
        return self._own_form.tensor(name) if key is None else self.files.tensor(key)


def replace_parameters(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace each parameter by its new one; parameters that are tied stay tied."""
    for path, old in list(model.named_parameters(remove_duplicate=False)):
        module, _, key = path.rpartition(".")
        model.get_submodule(module)._parameters[key] = new[old]


def taken_sources(model: nn.Module) -> dict[str, Source]:
    """For each parameter on the meta device, a function that reads its values; accelerate's hooks are removed.

    A value may have the dtype of its file instead of the model's, so that it is a map of the file if it can be.
    """
    from accelerate.hooks import remove_hook_from_submodules

    found = _sources(model)
    remove_hook_from_submodules(model)
    vars(model).pop("hf_device_map", None)
    for module in model.modules():
        # accelerate leaves the class's own forward as an attribute of the module.
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    return found


def _sources(model: nn.Module) -> dict[str, Source]:
    found: dict[str, Source] = {}
    weights: Any
    for path, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None:
            continue
        for entry in getattr(getattr(weights, "dataset", None), "index", {}).values():
            entry.pop("dtype", None)  # accelerate would convert the whole tensor.
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                found[f"{path}.{key}" if path else key] = partial(weights.__getitem__, key)
    return found


def saved_form(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Which tensors ``save_pretrained`` writes for a model.

    Returns:
        the tensors of the checkpoint by name, on the meta device; and for each tensor of the model that is saved as it
        is, its name in the checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for ignored in model._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    state = remove_tied_weights_from_state_dict(state, model)
    state = {name: tensor if tensor.is_meta else tensor.to("meta") for name, tensor in state.items()}
    saved = revert_weight_conversion(model, dict(state))
    keys = {id(tensor): key for key, tensor in saved.items()}
    return saved, {name: keys[id(tensor)] for name, tensor in state.items() if id(tensor) in keys}


def copy_in_pieces(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy to a mapped tensor in pieces, converting the dtype, so that neither is in memory as a whole."""
    pieces = zip(source.reshape(-1).split(PIECE), target.view(-1).split(PIECE), strict=True)
    with torch.no_grad():
        for values, place in pieces:
            place.copy_(values)
            if values.device.type == "cpu":  # A buffer may be on a GPU.
                page_out(values)
            drop_pages(place)
