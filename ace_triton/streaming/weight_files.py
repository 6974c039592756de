"""Safetensors files that are created at their full size, and whose tensors are then written in place.

The files get the names, the order and the header that ``save_pretrained`` would give them, so a model that was written
block by block has the same files as one that was saved whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..inputs.model_source import INDEX_FILE
from ..process_memory import map_file, reserve_space

LARGEST_FILE = "50GB"
"""Largest weight file, as in transformers."""

# In the order in which safetensors sorts the tensors of a file, the last dtype first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class _Region:
    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFiles:
    """The weight files of a checkpoint, mapped into memory: a write to one of their tensors goes to its file.

    Args:
        folder: folder of the files.
        regions: place of each tensor, by name.
    """

    def __init__(self, folder: Path, regions: Mapping[str, _Region]) -> None:
        self.folder = folder
        self._regions = dict(regions)
        self._maps: dict[Path, torch.UntypedStorage] = {}

    @classmethod
    def create(cls, folder: Path, tensors: Mapping[str, torch.Tensor], *, existing: bool = False) -> WeightFiles:
        """Create the files for these tensors (on the meta device) and their index; their contents are undefined.

        Args:
            folder: folder of the files.
            tensors: the tensors by name.
            existing: the files exist, and keep their contents.

        Raises:
            CheckpointError: if a dtype cannot be saved, or files that must exist are not those of these tensors.
            OSError: if the disk has too little space.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        if unknown := sorted({str(t.dtype) for t in tensors.values() if t.dtype not in _DTYPES}):
            raise CheckpointError(f"weights in {unknown[0]} cannot be streamed: convert them with --dtype")
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=LARGEST_FILE)
        regions: dict[str, _Region] = {}
        for name, members in split.filename_to_tensors.items():
            regions |= _create(folder / name, {member: tensors[member] for member in members}, existing)
        if split.is_sharded:
            total = sum(tensor.numel() for tensor in tensors.values())
            index = {
                "metadata": {"total_parameters": total, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        return cls(folder, regions)

    @classmethod
    def create_one_each(
        cls, folder: Path, tensors: Mapping[str, torch.Tensor], *, existing: bool = False
    ) -> WeightFiles:
        """As :meth:`create`, with a file for each tensor and without an index."""
        regions: dict[str, _Region] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            regions |= _create(folder / f"{number:05d}.safetensors", {name: tensor}, existing)
        return cls(folder, regions)

    @classmethod
    def create_one(cls, path: Path, tensors: Mapping[str, torch.Tensor]) -> WeightFiles:
        """As :meth:`create`, with a single file for all tensors and without an index."""
        return cls(path.parent, _create(path, tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    @property
    def names(self) -> set[str]:
        """Names of the files, and of the index that belongs to several."""
        return {INDEX_FILE, *(region.path.name for region in self._regions.values())}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the files, mapped for reading and writing."""
        region = self._regions[name]
        if region.path not in self._maps:
            size = region.path.stat().st_size
            self._maps[region.path] = map_file(region.path, size)
        start = region.offset // region.dtype.itemsize
        view, storage = torch.empty(0, dtype=region.dtype, device="cpu"), self._maps[region.path]
        strides = torch.empty(region.shape, dtype=region.dtype, device="meta").stride()
        return view.set_(storage, start, region.shape, strides)  # type: ignore[call-overload]

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the files that contain these tensors are on disk."""
        for path in sorted({self._regions[name].path for name in names}):
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _create(path: Path, tensors: Mapping[str, torch.Tensor], existing: bool = False) -> dict[str, _Region]:
    """Create a file of the right size with its header, or check it; returns the place of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        places[name] = start
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    content = struct.pack("<Q", len(content)) + content
    if existing:
        _check(path, content, len(content) + end)
    descriptor = os.open(path, os.O_RDWR | (0 if existing else os.O_CREAT | os.O_TRUNC), 0o666)
    try:
        reserve_space(descriptor, len(content) + end)
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)
    return {
        name: _Region(path, len(content) + start, tensors[name].dtype, tuple(tensors[name].shape))
        for name, start in places.items()
    }


def _check(path: Path, header: bytes, size: int) -> None:
    """CheckpointError unless a file has this header and size."""
    try:
        with path.open("rb") as file:
            intact = file.read(len(header)) == header and path.stat().st_size == size
    except OSError:
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: the state of the interrupted run is damaged: add --restart")
