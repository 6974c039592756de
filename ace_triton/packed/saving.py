"""Write packed checkpoints, by :func:`save_packed` or by a packed model's own ``save_pretrained``."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError
from ..inputs.output_folder import MANIFEST_FILE, files_in, give_mode, replacing, write_report
from .manifest import DTYPES, TENSORS_FILE, Manifest, PackedEntry
from .nm_linear import NMLinear

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
    """Write a model with packed layers (:func:`~ace_triton.packed.pack_model.pack_model`), atomically.

    ``model.save_pretrained(folder)`` of a packed model writes the same format into a folder that may be there.

    Args:
        model: a Hugging Face causal language model with its weights in memory.
        tokenizer: saved beside it; None saves none.
        out: the folder; it is made, with its parents.
        report: the pruning report, written as ``ace_triton.json``.
        overwrite: replace ``out``, as :func:`~ace_triton.inputs.checkpoint.check_out` allows it.

    Raises:
        CheckpointError: the model is no causal language model, has no packed layer or has a dtype that packed
            checkpoints lack; or ``out`` is there and may not be replaced, or cannot be written.
    """
    _check_model(model)
    with replacing(out, overwrite=overwrite) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return _write(model, folder, model.state_dict(), report)


class SavePretrained:
    """``save_pretrained`` of one model: writes the packed format as long as the model has a packed layer.

    Files of the same names in the folder are replaced, the manifest last. Arguments of transformers that mean nothing
    to packed checkpoints (``max_shard_size``, ``variant`` and so on) are ignored.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Give a transformers model this ``save_pretrained``; other modules are left alone."""
        if hasattr(type(model), "save_pretrained"):
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
        """Write the model into a folder that may be there.

        Raises:
            CheckpointError: as :func:`save_packed`, or the folder holds a dense model's weights.
        """
        model = self._model()
        assert model is not None
        if not any(isinstance(module, NMLinear) for module in model.modules()):
            type(model).save_pretrained(
                model,
                save_directory,
                is_main_process,
                state_dict,  # type: ignore[arg-type]
                push_to_hub=push_to_hub,
                **others,
            )
            return
        if push_to_hub:
            raise CheckpointError("push_to_hub=True: save the packed model without it, then call model.push_to_hub")
        if is_main_process:
            _check_model(model)
            _write_into(model, Path(save_directory), model.state_dict() if state_dict is None else state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model = self._model()
        return type(self)(memo.get(id(model), model))  # The model's copy, if the model is being copied.

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)


def _check_model(model: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"packed checkpoints hold causal language models of transformers, and this is a {type(model).__name__}: "
            "save its state_dict"
        )
    if not any(isinstance(layer, NMLinear) for layer in model.modules()):
        raise CheckpointError("the model has no packed layer: call ace_triton.pack_model(model) first")
    if model.dtype not in DTYPES.values():
        raise CheckpointError(f"packed checkpoints hold {', '.join(DTYPES)}, the model is {model.dtype}: convert it")
    given_back: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    if not model.is_remote_code() and not isinstance(model, given_back):
        raise CheckpointError(
            f"packed checkpoints hold causal language models, and a {type(model).__name__} would not be given back by "
            "AutoModelForCausalLM: save its state_dict"
        )


def _write(
    model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor], report: dict[str, Any] | None
) -> Manifest:
    """Everything but the tokenizer, the manifest last."""
    from transformers.dynamic_module_utils import custom_object_save

    dtype = next(name for name, known in DTYPES.items() if known == model.dtype)
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in modules if isinstance(layer, NMLinear)}
    tensors, tied = _distinct(state)
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    if report is not None:
        write_report(folder, report)
    manifest = Manifest(dtype, {name: _entry_of(layer) for name, layer in layers.items()}, tied, Manifest.marks(folder))
    manifest.write(folder)
    return manifest


def _write_into(model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a packed model into a folder that may hold other files."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = next((path.name for path in folder.glob("model*.safetensors*")), None)
    if dense is not None:
        raise CheckpointError(f"{folder} holds {dense} of a dense model: save the packed one in another folder")
    fresh = folder / ".ace-triton"
    shutil.rmtree(fresh, ignore_errors=True)  # A save that was killed left it.
    fresh.mkdir()
    try:
        _write(model, fresh, state, None)
        give_mode(fresh, fresh / "config.json")
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for name in sorted(files_in(fresh), key=lambda name: name == MANIFEST_FILE):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(fresh / name, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _entry_of(layer: NMLinear) -> PackedEntry:
    return PackedEntry(layer.n, layer.m, (layer.out_features, layer.in_features), layer.bias is not None)


def _distinct(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, and the names of those that are another one; views of others become copies."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device (offloaded, or never loaded); load the model whole")
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            tied[name] = seen[identity]
            continue
        seen[identity] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return tensors, tied
