"""The quantizer with which transformers loads packed checkpoints. It imports transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from ..inputs.model_source import reason
from ..inputs.model_task import task_of_class
from ..kernels.packed_nm import LAYOUT_VERSION
from ..structures.uneven import resize
from .checkpoint import check_tensors, finish, put_layers
from .keep_dense import keep_dense
from .manifest import DTYPES, MANIFEST_FILE, NEEDED_FILES, QUANTIZATION_METHOD, TENSORS_FILE, Manifest


class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint. The manifest has everything else."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = QUANTIZATION_METHOD
        self.layout = fields.get("layout", LAYOUT_VERSION)


class PackedQuantizer(HfQuantizer):
    """Replaces the packed layers in a model that transformers builds, and checks the checkpoint as ``load`` does.

    The loaded model is the same as from :func:`ace_triton.load`: it has no quantization config of its own, it can be
    cast, and its ``save_pretrained`` writes the packed format.
    """

    _manifest: Manifest

    def validate_environment(self, *args: Any, device_map: Any = None, **others: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "quantization_config: ace_triton does not pack while transformers loads; call "
                "ace_triton.pack_model(model) on a pruned model"
            )
        if isinstance(device_map, dict):
            _check_devices(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES.values():
            raise CheckpointError(f"dtype {dtype}: packed checkpoints can be loaded as {', '.join(DTYPES)}")
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file of the tensors. transformers calls this before it looks for files."""
        config.transformers_weights = TENSORS_FILE
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: the tensors have the names and shapes of the model."""
        return []

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: Sequence[str] = (), **others: Any
    ) -> None:
        path = Path(checkpoint_files[0])
        self._manifest = _checked_manifest(path.parent, model)
        resize(model)
        put_layers(model, self._manifest, dtype)
        check_tensors(path, model, self._manifest)

    def postprocess_model(self, model: Any, **others: Any) -> Any:
        _check_devices(getattr(model, "hf_device_map", {}))
        finish(model, self._manifest)
        keep_dense(model)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _checked_manifest(folder: Path, model: Any) -> Manifest:
    """The manifest of a folder, after checking the files."""
    given, named = type(model).__name__, (model.config.architectures or [""])[0]
    if given != named:
        raise CheckpointError(f"{folder}: is a packed {named}, not a {given}: load it with {_loader_of(model, named)}")
    # In the hub's cache a file is there once it was asked for; the hub has checked it on the way.
    in_cache = folder.parent.name == "snapshots"
    if in_cache and not (folder / MANIFEST_FILE).is_file():
        _download_manifest(folder, model.config.name_or_path)
    manifest = Manifest.read(folder)
    manifest.check_files(folder, NEEDED_FILES if in_cache else None)
    return manifest


def _loader_of(model: Any, named: str) -> str:
    """The class that loads a model of the named class: an AutoModel class if one does."""
    import transformers

    task = task_of_class(getattr(transformers, named, object), model.config)
    return named if task is None else task.auto_class


def _download_manifest(snapshot: Path, name: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, MANIFEST_FILE, revision=snapshot.name, cache_dir=snapshot.parents[2])
    except Exception as error:
        raise CheckpointError(
            f"{name}: its {MANIFEST_FILE} cannot be downloaded ({reason(error)}); download the whole model with "
            f"huggingface_hub.snapshot_download({name!r}) and load that folder"
        ) from error


def _check_devices(places: dict[str, Any]) -> None:
    """Raise CheckpointError if a device map offloads: accelerate would leave packed weights where they cannot run."""
    devices = {str(place) for place in places.values()}
    offloaded = devices & {"disk", "meta"} or (devices & {"cpu"} if len(devices) > 1 else set())
    if offloaded:
        raise CheckpointError(
            f"device_map leaves layers on {', '.join(sorted(offloaded))}: packed layers cannot be offloaded; name one "
            "device, or several GPUs that hold the whole model"
        )
