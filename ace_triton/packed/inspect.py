"""Read the sparsity and the pattern of every matrix in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..inputs.model_source import open_safetensors, reason, safetensors_files
from ..kernels.packed_rows import UNSTRUCTURED
from .manifest import DENSE, TENSORS_FILE, DenseEntry, LayerEntry, Manifest, PackedEntry, RowsEntry
from .pattern import find_pattern


@dataclass(frozen=True)
class TensorSparsity:
    """Sparsity of one matrix of a checkpoint, or of a stack of experts' matrices.

    Attributes:
        name: name of the tensor.
        shape: shape of the tensor.
        zeros: share of exact zeros.
        pattern: :class:`~ace_triton.packed.pattern.FoundPattern` as a string.
        packed: True for the weight of a packed layer, which is not a tensor of the file itself.
        bits: bits of a packed value, if it is quantized.
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    pattern: str
    packed: bool = False
    bits: int | None = None


def inspect_packed(folder: str | Path) -> list[TensorSparsity]:
    """Inspect all matrices of a packed checkpoint.

    A packed layer is listed as ``<layer>.weight``, with the shape of its dense weight.

    Returns:
        One entry per matrix or stack, sorted by name.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    manifest = Manifest.read(folder)
    manifest.check_files(Path(folder))
    return _inspect_files([Path(folder) / TENSORS_FILE], manifest.layers)


def inspect_dense(folder: str | Path) -> list[TensorSparsity]:
    """Inspect all matrices, and stacks of matrices, in the safetensors files of a folder.

    Returns:
        One entry per matrix or stack, sorted by name.

    Raises:
        CheckpointError: if the folder has no safetensors file, a file that its index names is missing, or a file cannot
            be read.
    """
    if not Path(folder).is_dir():
        what = "is a file" if Path(folder).exists() else "no such folder"
        plan = "; ace-triton plan shows the layers of a GGUF file" if Path(folder).suffix.lower() == ".gguf" else ""
        raise CheckpointError(f"{folder}: {what}; name the folder of a saved model{plan}")
    files = safetensors_files(Path(folder))
    if not files:
        raise CheckpointError(f"{folder}: has no .safetensors file; name the folder of a saved model")
    return _inspect_files(files, {})


def surely_not_pruned(folder: str | Path, least: float) -> bool:
    """True if the safetensors files of a folder show that no matrix in them is pruned.

    Reading stops at the first matrix that may be pruned, so it is quick for a pruned model.

    Args:
        folder: a folder, or anything else, for which the answer is False.
        least: share of exact zeros from which a matrix may be pruned. A matrix of integers may be too.

    Returns:
        False also if there are no such files, or one cannot be read.
    """
    try:
        files = safetensors_files(Path(folder)) if Path(folder).is_dir() else []
        return bool(files) and not any(_may_be_pruned(path, least) for path in files)
    except (OSError, SafetensorError, CheckpointError, NotImplementedError):
        return False


def _may_be_pruned(path: Path, least: float) -> bool:
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            if len(file.get_slice(name).get_shape()) in (2, 3):
                weight = file.get_tensor(name)
                if not weight.is_floating_point() or _zeros(weight) >= least:
                    return True
    return False


def _inspect_files(files: Sequence[Path], layers: Mapping[str, LayerEntry]) -> list[TensorSparsity]:
    packed_tensors = {f"{name}.{part}" for name in layers for part in ("values", "meta", "absmax", "starts")}
    found = []
    for path in files:
        try:
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in packed_tensors and len(file.get_slice(name).get_shape()) in (2, 3):
                        found.append(_inspect(name, file.get_tensor(name)))
                for name, entry in layers.items():
                    if isinstance(entry, DenseEntry) and entry.tied is not None:
                        continue  # It has no tensor of its own.
                    found.append(_inspect_packed(f"{name}.weight", entry, file.get_tensor(f"{name}.values")))
        except NotImplementedError as error:  # torch does not compare numbers of a few dtypes, fp4 for example.
            raise CheckpointError(f"{path}: holds numbers that torch does not compare ({reason(error)})") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); the file may be damaged") from error
    return sorted(found, key=lambda tensor: tensor.name)


def _inspect(name: str, weight: torch.Tensor) -> TensorSparsity:
    return TensorSparsity(name, tuple(weight.shape), _zeros(weight), str(find_pattern(weight)))


def _zeros(weight: torch.Tensor) -> float:
    """Share of exact zeros."""
    return float((weight == 0).sum()) / max(weight.numel(), 1)


def _inspect_packed(name: str, entry: LayerEntry, values: torch.Tensor) -> TensorSparsity:
    """``values``: the stored values; a kept weight that was rounded to 0 counts as a zero."""
    bits = None if isinstance(entry, RowsEntry) else entry.bits
    steps = values if bits != 4 else torch.stack((values & 15, values >> 4), -1).flatten(1)
    zeros = 1 - float((steps != 0).sum()) / max(entry.shape[0] * entry.shape[1], 1)
    pattern = UNSTRUCTURED if isinstance(entry, RowsEntry) else DENSE
    if isinstance(entry, PackedEntry):
        pattern = f"{entry.n}:{entry.m}"
    return TensorSparsity(name, entry.shape, zeros, pattern, packed=True, bits=bits)
