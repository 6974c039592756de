"""What is sparse in a checkpoint on disk, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..inputs.model_source import open_safetensors, reason, safetensors_files
from ..kernels.select_nm import GROUP_SIZES
from .manifest import TENSORS_FILE, Manifest, PackedEntry, is_packed

DENSE = 0.99

FULL_GROUPS = 1.1
"""A pattern counts only where it keeps at most this many times what is there: any matrix obeys some 30:32."""


@dataclass(frozen=True)
class TensorSparsity:
    """One matrix of a checkpoint, or a stack of experts' matrices.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        zeros: share of exact zeros.
        pattern: the narrowest "n:m" that every group along the last axis obeys; with " along outputs"
            where only groups along a matrix's first axis do (of a stack: " along the middle axis");
            "dense" below 1 % zeros or without elements; else "unstructured".
        packed: whether it is a packed layer's, and not a tensor of the file itself.
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    pattern: str
    packed: bool = False


def inspect_checkpoint(folder: str | Path) -> list[TensorSparsity]:
    """All matrices, and stacks of them, of the safetensors files in a folder, in order of name.

    Of a packed checkpoint the packed layers are shown as the weights that they stand for.

    Raises:
        CheckpointError: if there is no safetensors file, if one that the index names is missing, or one cannot be
            read.
    """
    if is_packed(folder):
        manifest = Manifest.read(folder)
        manifest.check_files(Path(folder))
        files, layers = [Path(folder) / TENSORS_FILE], manifest.layers
    else:
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder; name the folder of a saved model")
        files, layers = safetensors_files(Path(folder)), {}
    if not files:
        raise CheckpointError(f"{folder}: holds no .safetensors file; name the folder of a saved model")
    inside = {f"{name}.{part}" for name in layers for part in ("values", "meta")}
    found = []
    for path in files:
        try:
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in inside and len(file.get_slice(name).get_shape()) in (2, 3):
                        found.append(_look_at(name, file.get_tensor(name)))
                for name, entry in layers.items():
                    found.append(_look_at_packed(f"{name}.weight", entry, file.get_tensor(f"{name}.values")))
        except NotImplementedError as error:  # torch does not compare numbers of a few dtypes, fp4 for example.
            raise CheckpointError(f"{path}: holds numbers that torch does not compare ({reason(error)})") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); the file may be damaged") from error
    return sorted(found, key=lambda tensor: tensor.name)


def find_pattern(weight: torch.Tensor) -> str:
    """The pattern of a matrix [rows, cols] or of a stack of them, as :class:`TensorSparsity` words it."""
    kept = weight != 0
    if kept.numel() == 0 or float(kept.sum()) > DENSE * kept.numel():
        return "dense"
    along_last = _narrowest(kept.flatten(0, -2))
    if along_last:
        return along_last
    along_other = _narrowest(kept.mT.flatten(0, -2))
    other = "outputs" if weight.dim() == 2 else "the middle axis"
    return f"{along_other} along {other}" if along_other else "unstructured"


def _look_at(name: str, weight: torch.Tensor) -> TensorSparsity:
    zeros = float((weight == 0).sum()) / max(weight.numel(), 1)
    return TensorSparsity(name, tuple(weight.shape), zeros, find_pattern(weight))


def _look_at_packed(name: str, entry: PackedEntry, values: torch.Tensor) -> TensorSparsity:
    zeros = 1 - float((values != 0).sum()) / max(entry.shape[0] * entry.shape[1], 1)
    return TensorSparsity(name, entry.shape, zeros, f"{entry.n}:{entry.m}", packed=True)


def _narrowest(kept: torch.Tensor) -> str | None:
    """The n:m with the smallest share kept, and of those the smallest m."""
    best: tuple[float, int, int] | None = None
    most = FULL_GROUPS * float(kept.sum()) / kept.numel()
    for m in GROUP_SIZES:
        if kept.shape[1] % m:
            continue
        n = int(kept.reshape(kept.shape[0], -1, m).sum(-1).max())
        if 0 < n < m and n / m <= most and (best is None or n / m < best[0]):
            best = (n / m, n, m)
    return f"{best[1]}:{best[2]}" if best else None
