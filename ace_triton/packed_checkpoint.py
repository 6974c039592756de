"""Packed checkpoints: plain tensors in one safetensors file, a small JSON beside it, config and tokenizer as ever.

A model is loaded from one without its dense weights ever being built: its parameters start on the meta device
(buffers that no file holds, rotary tables for example, are computed as ever) and the file's tensors take their place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import checkpoint
from .blocks import stacks_of
from .checkpoint import CheckpointError, replacing
from .expert_stack import ExpertStack, stores_transposed
from .kernels.pack_nm import PatternError
from .nm_linear import NMLinear
from .packed_manifest import (
    CHECKED_FILES,
    DTYPES,
    TENSORS_FILE,
    FileMark,
    Manifest,
    PackedEntry,
    PackedError,
    is_packed,
)
from .prune import linear_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 16 * 2**20
"""Bytes read of a file before it is opened anew."""


def save_packed(
    model: PreTrainedModel,
    tokenizer: Any,
    out: str | Path,
    *,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a model with packed layers (:func:`~ace_triton.sparsify.sparsify`), all or nothing.

    Args:
        model: a Hugging Face causal decoder, its weights in memory.
        tokenizer: saved beside it; None for none.
        out: the folder; made, with its parents.
        report: the pruning report, written as ``ace_triton.json``.
        overwrite: replace ``out`` where it is there already.

    Raises:
        CheckpointError: no packed layer, a dtype that packed checkpoints do not have, ``out`` is there and
            ``overwrite`` is not set, or it cannot be written.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in modules if isinstance(layer, NMLinear)}
    if not layers:
        raise CheckpointError("the model has no packed layer: call ace_triton.sparsify(model) first")
    dtype = next((name for name, known in DTYPES.items() if known == model.dtype), None)
    if dtype is None:
        raise CheckpointError(f"packed checkpoints hold {', '.join(DTYPES)}, the model is {model.dtype}: convert it")
    tensors, tied = _distinct(model.state_dict())
    with replacing(out, overwrite=overwrite) as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if report is not None:
            (folder / checkpoint.REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        entries = {name: _entry_of(layer) for name, layer in layers.items()}
        manifest = Manifest(dtype, entries, tied, {name: FileMark.of(folder / name) for name in CHECKED_FILES})
        manifest.write(folder)
    return manifest


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of a packed checkpoint, in eval mode; its dense weights are never built.

    Args:
        folder: what ``ace-triton pack``, ``prune --packed`` or :func:`save_packed` wrote.
        device: where to.
        dtype: to convert to; None for the checkpoint's own.

    Raises:
        PackedError: the folder holds no packed checkpoint, or one that is truncated, altered or of a newer
            version.
        CheckpointError: transformers cannot make a causal language model of its configuration.
    """
    path = Path(folder)
    manifest = Manifest.read(path)
    manifest.check_files(path)
    model = _without_weights(path, manifest, dtype or DTYPES[manifest.dtype])
    _put_stacks(model, manifest)
    for name, entry in manifest.layers.items():
        _put_packed(model, name, entry, dtype or DTYPES[manifest.dtype])
    tensors = _read_tensors(path / TENSORS_FILE, model, manifest, torch.device(device), dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    for alias, name in manifest.tied.items():
        _tie(model, alias, name)
    for name, layer in model.named_modules():
        if isinstance(layer, NMLinear):
            _check_layer(name, layer)
    return model.to(device).eval()


def load_model(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """A model and its tokenizer from a packed checkpoint, or from whatever :func:`ace_triton.checkpoint.load` takes."""
    if not is_packed(source):
        return checkpoint.load(source, dtype=dtype, device=device)
    from transformers import AutoTokenizer

    model = load(source, device=device, dtype=None if isinstance(dtype, str) else dtype)
    try:
        return model, AutoTokenizer.from_pretrained(str(source))
    except Exception as error:
        raise CheckpointError(f"{source}: its tokenizer cannot be loaded ({error})") from error


def _entry_of(layer: NMLinear) -> PackedEntry:
    return PackedEntry(layer.n, layer.m, (layer.out_features, layer.in_features), layer.bias is not None)


def _distinct(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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


def _without_weights(folder: Path, manifest: Manifest, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(folder))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be made into a causal language model ({error})") from error
    return model


def _put_stacks(model: nn.Module, manifest: Manifest) -> None:
    """A layer for each expert of every stack that has packed ones."""
    packed = {name.rpartition(".")[0] for name in manifest.layers}
    for stack in stacks_of(model):
        if stack.name in packed:
            experts, _ = _owner(model, stack.name)
            transposed = stores_transposed(experts)
            if transposed is None:
                raise PackedError(
                    f"{stack.name}: its experts are packed, and this {type(experts).__name__} does not multiply by "
                    "them one by one; was it packed with another transformers?"
                )
            ExpertStack.take_place(experts, stack, stack.linears(transposed=transposed).values())


def _put_packed(model: nn.Module, name: str, entry: PackedEntry, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise PackedError(
            f"{name} is no layer of {type(model).__name__}; was it packed with another transformers?"
        ) from None
    weight = linear_weight(layer)
    if not leaf or weight is None or tuple(weight.shape) != entry.shape:
        raise PackedError(f"{name}: packed as a linear layer {entry.shape}, the model has {layer} there")
    if entry.shape[1] % entry.m:
        raise PackedError(f"{name}: its {entry.shape[1]} inputs are no multiple of {entry.m}")
    packed = NMLinear.empty(entry.shape, entry.n, entry.m, bias=entry.bias, dtype=dtype)
    setattr(model.get_submodule(parent), leaf, packed)


def _read_tensors(
    path: Path, model: nn.Module, manifest: Manifest, device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    expected = model.state_dict()
    stored = DTYPES[manifest.dtype]
    tensors = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
        _check_names(path, set(names), set(expected), manifest.tied)
        for name, tensor in _each_tensor(path, names):
            wanted = expected[name]
            if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
                raise PackedError(
                    f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the model takes {wanted.dtype} "
                    f"{tuple(wanted.shape)}; pack it again with this transformers"
                )
            convert = dtype if dtype is not None and tensor.dtype == stored else tensor.dtype
            tensors[name] = tensor.to(device, convert, copy=True)
    except (OSError, SafetensorError) as error:
        raise PackedError(f"{path}: cannot be read ({error}); the file is damaged, pack the model again") from error
    return tensors


def _each_tensor(path: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, which is opened anew every AT_ONCE bytes: the pages of those already copied would stay in
    memory until it is closed."""
    waiting = list(reversed(names))
    while waiting:
        with safe_open(str(path), framework="pt") as file:
            read = 0
            while waiting and read < AT_ONCE:
                name = waiting.pop()
                tensor = file.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor


def _check_names(path: Path, there: set[str], expected: set[str], tied: dict[str, str]) -> None:
    missing, unexpected = expected - there - set(tied), there - expected
    dangling = (set(tied) - expected) | (set(tied.values()) - there) | (set(tied) & there)
    if missing or unexpected or dangling:
        found = [
            f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrongly tied", dangling))
            if names
        ]
        raise PackedError(f"{path}: tensors do not fit the model: {'; '.join(found)}; pack it with this transformers")


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Let ``alias`` be the very parameter or buffer that ``name`` is."""
    target, taken = _owner(model, alias)
    source, given = _owner(model, name)
    for theirs, ours in ((source._parameters, target._parameters), (source._buffers, target._buffers)):
        tensor, replaced = theirs.get(given), ours.get(taken)
        if tensor is not None and replaced is not None and tensor.shape == replaced.shape:
            ours[taken] = tensor  # type: ignore[assignment]
            return
    raise PackedError(f"{alias} cannot be tied to {name}: they differ in shape or kind; pack the model again")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _check_layer(name: str, layer: NMLinear) -> None:
    try:
        layer.packed.check()
    except PatternError as error:
        raise PackedError(f"{name}: {error}") from error
    except ValueError as error:
        raise PackedError(f"{name}: {error}; the file is damaged, pack the model again") from error
