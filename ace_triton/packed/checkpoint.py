"""Load packed checkpoints: tensors in one safetensors file, a JSON manifest, and the usual config and tokenizer.

Loading builds no dense weights. The model is created on the meta device, and then the tensors of the file replace its
parameters. Buffers that are not in the file, such as rotary tables, are computed as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..decoders.blocks import stacks_of
from ..errors import CheckpointError, PackedError
from ..inputs.checked_model import check_config, check_depth, loading_message
from ..inputs.model_source import check_device, open_safetensors
from ..inputs.model_task import TEXT_GENERATION, find_task
from ..kernels.pack_nm import PatternError
from ..kernels.packed_dense import PackedDense
from ..linears import linear_weight
from ..structures.uneven import resize
from .expert_stack import ExpertStack, stores_transposed
from .fused import fuse_products, none_to_fuse
from .keep_dense import Keep, check_keep, keep_dense
from .manifest import DTYPES, TENSORS_FILE, DenseEntry, LayerEntry, Manifest, RowsEntry
from .nm_linear import NMLinear
from .packed_linear import PackedLinear
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import QuantizedLinear, TiedLinear
from .rows_linear import RowsLinear
from .saving import SavePretrained, save_packed
from .tables import PACKED_MODULES, forget_ties

__all__ = ["load", "save_packed"]

REOPEN_BYTES = 16 * 2**20
"""A file is closed and opened again after this many bytes were read."""


@torch.inference_mode(False)  # In it the weights would be inference tensors, whose dense copies are not kept.
def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fuse: bool = False,
    keep: Keep = "auto",
) -> Any:
    """Load a packed checkpoint.

    A model that generates text multiplies by its packed weights, and its dense weights are never built. Other models on
    a CPU also keep dense copies of their weights, because most of their calls have many rows
    (:func:`~ace_triton.keep_dense`).

    ``save_pretrained`` of the loaded model writes the packed format
    (:class:`~ace_triton.packed.saving.SavePretrained`).

    Args:
        folder: a folder that ``ace-triton pack``, ``prune --packed`` or :func:`save_packed` wrote.
        device: device of the weights.
        dtype: float32, float16 or bfloat16 to convert the weights to; None keeps the dtype of the checkpoint.
        trust_remote_code: run Python code that comes with the checkpoint. Without it such code is never run.
        fuse: fuse the products of queries, keys and values, and of gate and up, in memory
            (:func:`~ace_triton.packed.fused.fuse_products`).
        keep: "auto"; "packed" for the least memory; "fast" for dense copies of any model.
            :func:`~ace_triton.dense_copies` says how much memory they take.

    Returns:
        The model, in eval mode.

    Raises:
        ArgumentError: if ``keep`` is unknown.
        PackedError: if the folder has no packed checkpoint, the checkpoint is truncated, altered or of a newer
            version, or ``fuse`` is True and no products fit together.
        CheckpointError: if transformers cannot build a model from the configuration, or the device or the dtype is not
            available.
    """
    check_device(device)
    check_keep(keep)
    if dtype is not None and dtype not in DTYPES.values():
        raise CheckpointError(f"dtype {dtype}: packed checkpoints can be loaded as {', '.join(DTYPES)}")
    path = Path(folder)
    manifest = Manifest.read(path)
    manifest.check_files(path)
    model = _without_weights(path, manifest, dtype or DTYPES[manifest.dtype], trust_remote_code)
    put_layers(model, manifest, dtype or DTYPES[manifest.dtype])
    check_tensors(path / TENSORS_FILE, model, manifest)
    tensors = _read_tensors(path / TENSORS_FILE, manifest, torch.device(device), dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    finish(model, manifest)
    model = model.to(device).eval()
    if fuse and not fuse_products(model):
        raise PackedError(f"{folder}: {none_to_fuse('fuse=True')}: leave it out")
    keep_dense(model, keep)
    return model


def put_layers(model: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
    """Replace the layers that a manifest lists by packed layers on the meta device.

    Raises:
        PackedError: if the model does not have these layers.
    """
    _put_stacks(model, manifest)
    tied = {name: entry for name, entry in manifest.layers.items() if isinstance(entry, DenseEntry) and entry.tied}
    for name, entry in manifest.layers.items():
        if name not in tied:
            _put_packed(model, name, entry, dtype)
    for name, entry in tied.items():
        _put_packed(model, name, entry, dtype)
    forget_ties(model)


def finish(model: nn.Module, manifest: Manifest) -> None:
    """Tie and check a model after its tensors are loaded, and let ``save_pretrained`` write the packed format.

    Raises:
        PackedError: if a tie is impossible, or the metadata of a layer are damaged.
    """
    for alias, name in manifest.tied.items():
        _tie(model, alias, name)
    for name, layer in model.named_modules():
        if isinstance(layer, PACKED_MODULES) and not isinstance(layer, TiedLinear):
            _check_layer(name, layer)
    SavePretrained.attach(model)


def _without_weights(folder: Path, manifest: Manifest, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with open_safetensors(folder / TENSORS_FILE) as file:
        names = {*file.keys(), *manifest.tied}
    try:
        config = AutoConfig.from_pretrained(str(folder), **options)
        task = find_task(str(folder), config, None, trusted=trust_remote_code)
        if task.name == TEXT_GENERATION:
            check_config(folder, config, names, trust_remote_code)
        else:
            check_depth(folder, config, names)
        if hasattr(config, "quantization_config"):  # It speaks of the folder, not of the model in memory.
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = task.loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            resize(model)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(loading_message(folder, error)) from error
    return model


def _put_stacks(model: nn.Module, manifest: Manifest) -> None:
    """Replace each stack that has packed experts by one layer per expert."""
    packed = {name.rpartition(".")[0] for name in manifest.layers}
    for stack in stacks_of(model):
        if stack.name in packed:
            experts, _ = _owner(model, stack.name)
            transposed = stores_transposed(experts)
            if transposed is None:
                raise PackedError(
                    f"{stack.name}: its experts are packed, but this {type(experts).__name__} does not multiply by "
                    "them one by one; use the version of transformers that packed the model"
                )
            ExpertStack.take_place(experts, stack, stack.linears(transposed=transposed).values())


def _put_packed(model: nn.Module, name: str, entry: LayerEntry, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise PackedError(
            f"{name} is not a layer of {type(model).__name__}; use the version of transformers that packed the model"
        ) from None
    if isinstance(entry, DenseEntry) and entry.embedding:
        if not isinstance(layer, nn.Embedding) or tuple(layer.weight.shape) != entry.shape:
            raise PackedError(f"{name}: packed as an embedding {entry.shape}, but the model has {layer}")
        packed_embedding = PackedDense.empty(entry.shape, entry.bits, entry.group, dtype=dtype, device="meta")
        setattr(model.get_submodule(parent), leaf, QuantizedEmbedding(packed_embedding, layer.padding_idx))
        return
    weight = linear_weight(layer)
    if not leaf or weight is None or tuple(weight.shape) != entry.shape:
        raise PackedError(f"{name}: packed as a linear layer {entry.shape}, but the model has {layer}")
    if isinstance(entry, RowsEntry):
        packed: PackedLinear = RowsLinear.empty(entry.shape, entry.n_values, bias=entry.bias, dtype=dtype)
    elif isinstance(entry, DenseEntry):
        packed = _dense_layer(model, entry, dtype)
    elif entry.shape[1] % entry.m:
        raise PackedError(f"{name}: its {entry.shape[1]} inputs are not a multiple of {entry.m}; pack the model again")
    else:
        packed = NMLinear.empty(
            entry.shape, entry.n, entry.m, bias=entry.bias, dtype=dtype, bits=entry.bits, group=entry.group
        )
    setattr(model.get_submodule(parent), leaf, packed)


def _dense_layer(model: nn.Module, entry: DenseEntry, dtype: torch.dtype) -> PackedLinear:
    """An empty layer in few bits, or a head that multiplies by the embedding, which is there already."""
    if entry.tied is None:
        return QuantizedLinear.empty(entry.shape, entry.bits, entry.group, bias=entry.bias, dtype=dtype)
    embedding = model.get_submodule(entry.tied)
    assert isinstance(embedding, QuantizedEmbedding)
    bias = nn.Parameter(torch.empty(entry.shape[0], dtype=dtype, device="meta")) if entry.bias else None
    return TiedLinear(embedding, bias)


def check_tensors(path: Path, model: nn.Module, manifest: Manifest) -> None:
    """Compare the tensors of a file with the model, without reading them.

    Raises:
        PackedError: if a tensor is missing, unexpected, or of another shape or kind; or if the file cannot be read.
    """
    expected = model.state_dict()
    with _readable(path), safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        _check_names(path, names, set(expected), manifest.tied)
        for name in sorted(names):
            stored, wanted = file.get_slice(name), expected[name]
            kind = stored.get_dtype()
            fits = wanted.is_floating_point() if kind.startswith(("F", "BF")) else _fits(kind, wanted.dtype)
            if tuple(stored.get_shape()) != wanted.shape or not fits:
                tensor = file.get_tensor(name)
                raise PackedError(
                    f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the model needs {wanted.dtype} "
                    f"{tuple(wanted.shape)}; pack the model again with this version of transformers"
                )


INTEGERS = {"I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
"""Dtypes of metadata and quantized values, by their names in a safetensors file."""


def _fits(kind: str, wanted: torch.dtype) -> bool:
    """True if a tensor that is not floating-point has the dtype that the model needs."""
    return INTEGERS.get(kind) == wanted if wanted in INTEGERS.values() else not wanted.is_floating_point


def _read_tensors(
    path: Path, manifest: Manifest, device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    stored = DTYPES[manifest.dtype]
    tensors = {}
    with _readable(path):
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
        for name, tensor in _each_tensor(path, names):
            convert = dtype if dtype is not None and tensor.dtype == stored else tensor.dtype
            tensors[name] = tensor.to(device, convert, copy=True)
    return tensors


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A context in which a file that cannot be read becomes a PackedError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PackedError(f"{path}: cannot be read ({error}): the file is damaged; pack the model again") from error


def _each_tensor(path: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of a file one by one.

    The file is opened again after every REOPEN_BYTES, because its pages stay in memory until it is closed.
    """
    waiting = list(reversed(names))
    while waiting:
        with safe_open(str(path), framework="pt") as file:
            read = 0
            while waiting and read < REOPEN_BYTES:
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
        raise PackedError(
            f"{path}: tensors do not fit the model: {'; '.join(found)}; pack the model again with this version of "
            "transformers"
        )


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Make ``alias`` the same parameter or buffer as ``name``."""
    target, taken = _owner(model, alias)
    source, given = _owner(model, name)
    for theirs, ours in ((source._parameters, target._parameters), (source._buffers, target._buffers)):
        tensor, replaced = theirs.get(given), ours.get(taken)
        if tensor is not None and replaced is not None and tensor.shape == replaced.shape:
            ours[taken] = tensor  # type: ignore[assignment]
            return
    raise PackedError(f"{alias} cannot be tied to {name}: they differ in shape or kind; pack the model again")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a tensor belongs to, and the tensor's name in that module."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _check_layer(name: str, layer: PackedLinear | QuantizedEmbedding) -> None:
    try:
        layer.packed.check()
    except PatternError as error:
        raise PackedError(f"{name}: {error}") from error
    except ValueError as error:
        raise PackedError(f"{name}: {error}: the file is damaged; pack the model again") from error
