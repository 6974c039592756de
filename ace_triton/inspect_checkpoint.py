"""What is sparse in a checkpoint on disk, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import CheckpointError
from .kernels.select_nm import GROUP_SIZES

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
            "dense" below 1 % zeros; else "unstructured".
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    pattern: str


def inspect_checkpoint(folder: str | Path) -> list[TensorSparsity]:
    """All matrices, and stacks of them, of the safetensors files in a folder, in order of name.

    Raises:
        CheckpointError: no safetensors file there, or one that cannot be read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no .safetensors file; name the folder of a saved model")
    found = []
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if len(file.get_slice(name).get_shape()) in (2, 3):
                        found.append(_look_at(name, file.get_tensor(name)))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); the file may be damaged") from error
    return sorted(found, key=lambda tensor: tensor.name)


def find_pattern(weight: torch.Tensor) -> str:
    """The pattern of a matrix [rows, cols] or of a stack of them, as :class:`TensorSparsity` words it."""
    kept = weight != 0
    if float(kept.sum()) > DENSE * kept.numel():
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
