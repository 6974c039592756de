"""Write packed checkpoints, with :func:`save_packed` or with ``save_pretrained`` of a packed model."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError
from ..inputs.checkpoint import refusals
from ..inputs.model_card import write_card
from ..inputs.model_task import task_of_class
from ..inputs.output_folder import files_in, give_mode, replacing, write_report
from ..inputs.report_file import MANIFEST_FILE
from .manifest import (
    DTYPES,
    QUANTIZATION_METHOD,
    TENSORS_FILE,
    DenseEntry,
    LayerEntry,
    Manifest,
    PackedEntry,
    RowsEntry,
)
from .nm_linear import NMLinear
from .packed_linear import PackedLinear
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import QuantizedLinear, TiedLinear
from .registration import register_quantizer
from .tables import PACKED_MODULES, name_of_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_packed(
    model: PreTrainedModel,
    tokenizer: Any,
    out: str | Path,
    *,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a model with packed layers (:func:`~ace_triton.packed.pack_model.pack_model`) atomically.

    ``model.save_pretrained(folder)`` of a packed model writes the same format and accepts an existing folder.

    Args:
        model: a model of transformers that an AutoModel class loads, with its weights in memory.
        tokenizer: tokenizer to save with the model, or None.
        out: folder to write. It is created together with its parents.
        report: the pruning report, written as ``ace_triton.json``.
        overwrite: replace an existing ``out``, if :func:`~ace_triton.inputs.checkpoint.check_out` allows it.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: if no AutoModel class loads the model, it has no packed layer or it has an unsupported dtype;
            or if ``out`` exists and may not be replaced, or cannot be written.
    """
    _check_model(model)
    with replacing(out, overwrite=overwrite) as folder, refusals(out):
        return write_packed(model, tokenizer, folder, report)


def write_packed(model: PreTrainedModel, tokenizer: Any, folder: Path, report: dict[str, Any] | None) -> Manifest:
    """Write a model that :func:`why_not_saved` allows into an empty folder. Arguments: as for :func:`save_packed`."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return _write(model, folder, model.state_dict(), report or {})


def write_around(
    model: PreTrainedModel,
    folder: Path,
    tied: dict[str, str],
    report: dict[str, Any] | None,
    save_tensors: Callable[[Path], object],
) -> Manifest:
    """Write all files of a packed checkpoint except the tokenizer, the manifest last.

    Args:
        model: a model that :func:`why_not_saved` allows.
        folder: an empty folder.
        tied: as in :class:`~ace_triton.packed.manifest.Manifest`.
        report: the pruning report, or None.
        save_tensors: writes the file of the tensors.
    """
    from transformers.dynamic_module_utils import custom_object_save

    dtype = next(name for name, known in DTYPES.items() if known == model.dtype)
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: _entry_of(model, layer) for name, layer in modules if isinstance(layer, PACKED_MODULES)}
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(folder)
    _complete_config(folder / "config.json", dtype, Manifest(dtype, layers, tied, {}).layout)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_tensors(folder / TENSORS_FILE)
    if report is not None:
        write_report(folder, report)
    manifest = Manifest(dtype, layers, tied, Manifest.marks(folder))
    manifest.write(folder)
    return manifest


class SavePretrained:
    """``save_pretrained`` of one model. It writes the packed format if the model has a packed layer.

    Existing files with the same names are replaced, the manifest last; a model card that is there stays. All tensors
    are in one file: ``max_shard_size`` and other arguments of transformers that do not apply to packed checkpoints are
    ignored.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Replace ``save_pretrained`` of a transformers model. Other modules are not changed."""
        if hasattr(type(model), "save_pretrained"):
            register_quantizer()
            model.save_pretrained = cls(model)  # type: ignore[assignment]

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write the model into a folder, which may exist, and with ``push_to_hub`` also into a repository of the hub.

        The repository is named by ``repo_id``, else by the folder, and gets the files that were written. Its options
        are those of transformers (:data:`~ace_triton.packed.upload.HUB_OPTIONS`).

        Raises:
            CheckpointError: as in :func:`save_packed`, or if the folder contains the weights of a dense model, or the
                repository's name is invalid.
        """
        model = self._model()
        if model is None:
            raise CheckpointError("the model is no longer in memory: keep it in a variable while it is saved")
        if not any(isinstance(module, PACKED_MODULES) for module in model.modules()):
            type(model).save_pretrained(
                model,
                save_directory,
                is_main_process,
                state_dict,  # type: ignore[arg-type]
                push_to_hub=push_to_hub,
                **others,
            )
            return
        if is_main_process:
            from .upload import WrittenModel, repository_of

            _check_model(model)
            folder = Path(save_directory)
            repository = repository_of(folder, others) if push_to_hub else None
            files = _write_into(model, folder, model.state_dict() if state_dict is None else state_dict)
            if repository is not None:
                WrittenModel(folder, files).upload(repository, model.model_tags or (), others)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model = self._model()
        return type(self)(memo.get(id(model), model))  # If the model is being copied, this is the copy.

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)


def why_not_saved(model: Any) -> str | None:
    """Why a model cannot be saved as a packed checkpoint; None if it can."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return (
            f"only models of transformers can be saved as packed checkpoints, got a {type(model).__name__}: save its "
            "state_dict"
        )
    if not any(isinstance(layer, PACKED_MODULES) for layer in model.modules()):
        return "the model has no packed layer: call ace_triton.pack_model(model) first"
    if model.dtype not in DTYPES.values():
        return f"packed checkpoints support {', '.join(DTYPES)}, the model is {model.dtype}: convert it"
    if not model.is_remote_code() and task_of_class(type(model), model.config) is None:
        return (
            f"a {type(model).__name__} cannot be loaded by an AutoModel class, so it cannot be a packed checkpoint: "
            "save its state_dict"
        )
    return None


def _check_model(model: Any) -> None:
    refusal = why_not_saved(model)
    if refusal is not None:
        raise CheckpointError(refusal)


def _write(
    model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor], report: dict[str, Any] | None
) -> Manifest:
    tensors, tied = _distinct(state)
    return write_around(model, folder, tied, report, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _complete_config(path: Path, dtype: str, layout: int) -> None:
    """Add what transformers needs to load the folder to its configuration: the dtype and our quantization method."""
    method = {"quant_method": QUANTIZATION_METHOD, "layout": layout}
    config = {**json.loads(path.read_text()), "dtype": dtype, "quantization_config": method}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_into(model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Write a packed model into a folder that may exist and contain other files. Returns the names of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = next((path.name for path in folder.glob("model*.safetensors*")), None)
    if dense is not None:
        raise CheckpointError(f"{folder} contains {dense} of a dense model: save the packed model in another folder")
    fresh = folder / ".ace-triton"
    shutil.rmtree(fresh, ignore_errors=True)  # Left by a save that was killed.
    fresh.mkdir()
    try:
        _write(model, fresh, state, None)
        give_mode(fresh, fresh / "config.json")
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        written = sorted(files_in(fresh), key=lambda name: name == MANIFEST_FILE)
        for name in written:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(fresh / name, folder / name)
        write_card(folder, {})
        return written
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _entry_of(model: nn.Module, layer: PackedLinear | QuantizedEmbedding) -> LayerEntry:
    if isinstance(layer, QuantizedEmbedding):
        return DenseEntry(layer.bits, layer.group, layer.packed.shape, False, embedding=True)
    shape, bias = (layer.out_features, layer.in_features), layer.bias is not None
    if isinstance(layer, NMLinear):
        return PackedEntry(layer.n, layer.m, shape, bias, layer.bits, layer.group)
    if isinstance(layer, TiedLinear):
        return DenseEntry(layer.bits, layer.group, shape, bias, tied=name_of_embedding(model, layer))
    if isinstance(layer, QuantizedLinear):
        return DenseEntry(layer.bits, layer.group, shape, bias)
    return RowsEntry(layer.values.numel(), shape, bias)


def _distinct(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct tensor by name, and for each tied name the name of its tensor. Other views are copied."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device (offloaded or not loaded): load the whole model into memory, or pack "
                "the checkpoint in its files (pack_checkpoint)"
            )
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            tied[name] = seen[identity]
            continue
        seen[identity] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return tensors, tied
