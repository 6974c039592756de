"""A model whose weights are zeros that take no memory, so that its layers can be examined without reading weights."""

from __future__ import annotations

import math
import mmap
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..inputs.checked_model import check_config, check_depth, check_widths, loading_message
from ..inputs.checkpoint import stated_quantization
from ..inputs.companions import Companions
from ..inputs.gguf_metadata import fast_gguf_metadata
from ..inputs.model_source import ModelSource, open_safetensors, tensor_names, weight_files
from ..inputs.model_task import CAUSAL, TEXT_GENERATION, find_task
from ..streaming.mapped_model import replace_parameters, saved_form
from ..structures.uneven import resize

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGE_BYTES = 2**20
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        source: where the model is.
        model: the model in eval mode on the CPU. Its parameters have their real shapes and dtypes, and are zeros; its
            buffers have their real values.
        tokenizer: its tokenizer; for another task than text generation its companions.
        stored_bytes: size of its weight files; None if they are not on this machine.
        stored_dtype: dtype of the largest weight in the files; None if it is unknown.
        converted_bytes: size of the weights that the model stores in another form than the checkpoint, such as experts
            in one tensor.
        resaved_bytes: size of the weights that are written to a work folder if the weights stay in files: those, or all
            weights of files that ``torch.save`` wrote.
        quantization: how the stored weights are quantized; None if they are not.
    """

    source: ModelSource
    model: Any
    tokenizer: Any
    stored_bytes: int | None
    stored_dtype: torch.dtype | None
    converted_bytes: int
    resaved_bytes: int
    quantization: dict[str, Any] | None = None

    @property
    def converts(self) -> bool:
        """True if loading converts the weights to another dtype."""
        return self.stored_dtype is not None and self.stored_dtype != self.model.dtype


def skeleton(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    task: str | None = TEXT_GENERATION,
) -> Skeleton:
    """Build a model from its configuration.

    Args:
        source, dtype, trust_remote_code, task: as for :func:`~ace_triton.inputs.checkpoint.load`.

    Raises:
        CheckpointError: if the model is not found, is not for the task, or cannot be built.
    """
    found = ModelSource.find(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": found.offline}
    try:
        with fast_gguf_metadata() if found.is_gguf else nullcontext():
            return _build(found, dtype, options, task)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(loading_message(source, error, task=task)) from error


def _build(found: ModelSource, dtype: torch.dtype | str, options: dict[str, Any], task: str | None) -> Skeleton:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoTokenizer

    where, own = str(found.path or found.name), dict(options)
    stored = _Stored.of(found)
    if found.is_gguf:
        assert found.path is not None
        where, own["gguf_file"] = str(found.path.parent), found.path.name
    config, trusted = AutoConfig.from_pretrained(where, **own), options["trust_remote_code"]
    chosen = CAUSAL if task == TEXT_GENERATION else find_task(found.name, config, task, trusted=trusted)
    if chosen.name == TEXT_GENERATION:
        check_config(found.name, config, stored.names, trusted)
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **own)
    else:
        check_depth(found.name, config, stored.names)
        tokenizer = Companions(found, trusted)
    check_widths(config, None if found.is_gguf else found.path)
    if dtype == "auto":
        stated = torch.bfloat16 if found.is_gguf else getattr(config, "dtype", None)
        dtype = stated if isinstance(stated, torch.dtype) else stored.dtype or torch.float32
    quantization = stated_quantization(config)
    vars(config).pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        model: Any = chosen.loader.from_config(config, dtype=dtype, trust_remote_code=trusted)
        resize(model)
    model.tie_weights()
    # Of a quantized model a few weights are not quantized, and are not converted.
    converted = _converted_bytes(model) if quantization is None else sum(p.nbytes for p in model.parameters())
    replace_parameters(model, {own: nn.Parameter(_zeros(own), requires_grad=False) for own in model.parameters()})
    whole = sum(parameter.nbytes for parameter in model.parameters())
    resaved = 0 if found.is_gguf else whole if stored.of_torch else converted
    return Skeleton(found, model.eval(), tokenizer, stored.size, stored.dtype, converted, resaved, quantization)


@dataclass(frozen=True)
class _Stored:
    """What a model's weight files hold; None for what is unknown."""

    size: int | None = None
    dtype: torch.dtype | None = None
    names: set[str] | None = None
    of_torch: bool = False

    @classmethod
    def of(cls, found: ModelSource) -> _Stored:
        paths = weight_files(found)
        if found.path is None or not paths:
            return cls()
        size = sum(path.stat().st_size for path in paths)
        if found.is_gguf:
            return cls(size)
        if paths[0].suffix == ".bin":
            return cls(size, _dtype_of_torch(paths[0]), None, of_torch=True)
        with open_safetensors(paths[0]) as file:
            inside = file.keys()
            slices = [file.get_slice(name) for name in inside]
            largest = max(slices, key=lambda stored: math.prod(stored.get_shape()), default=None)
            dtype = None if largest is None else _DTYPES.get(largest.get_dtype())
        return cls(size, dtype, tensor_names(found.path))


def _dtype_of_torch(path: Path) -> torch.dtype | None:
    """The dtype of the largest tensor in a file that ``torch.save`` wrote; None if it cannot be mapped or read."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        return max((value for value in state.values() if isinstance(value, torch.Tensor)), key=torch.numel).dtype
    except Exception:  # Loading the model reads the same file and reports what is wrong with it.
        return None


def _converted_bytes(model: Any) -> int:
    """Size of the weights that are stored in another form, of a model on the meta device."""
    _, direct = saved_form(model)
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in direct)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros in memory of their own, whose pages are not there until they are written."""
    if like.nbytes < _LARGE_BYTES:
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    region = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(region, dtype=like.dtype).view(like.shape)
