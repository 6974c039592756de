"""The manifest of a packed checkpoint: a JSON file with the packed layers, their layout, and checksums of all files."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import PackedError
from ..inputs.output_folder import files_in
from ..inputs.report_file import MANIFEST_FILE
from ..kernels.few_bits import check_bits
from ..kernels.packed_nm import FEW_BITS_LAYOUT_VERSION, LAYOUT_VERSION
from ..kernels.packed_rows import UNSTRUCTURED
from ..sparsity import Sparsity

TENSORS_FILE = "packed.safetensors"
NEEDED_FILES = (TENSORS_FILE, "config.json")
LARGEST_MANIFEST = 2**26
"""Largest accepted size of a manifest in bytes; enough for 300,000 packed layers."""

FORMAT = "ace-triton packed n:m"
NEWEST_VERSION = 4
"""Version 4 has quantized layers and embeddings that are not pruned."""

SPARSE_VERSION = 3
"""Version 3 has quantized n:m layers and layers with row starts. A folder is written in the oldest version that can
hold its layers, so that older readers can read it."""

CHECKSUMS_VERSION = 2
OLDEST_VERSION = 1
"""Version 1 has checksums of NEEDED_FILES only."""

QUANTIZATION_METHOD = "ace_triton"
"""Name of the method in the ``quantization_config`` of a packed checkpoint.

transformers names the method in its error if it does not know it, so the method has the package's name.
"""

DENSE = "dense"
"""The pattern of quantized weights that are not pruned."""

UNMARKED = (MANIFEST_FILE, "README.md")
"""Files without a checksum."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PackedEntry:
    """One packed layer of a checkpoint.

    Attributes:
        n, m: n of every m consecutive inputs are kept.
        shape: (out_features, in_features) of the dense weight.
        bias: True if the layer has a bias.
        bits: bits of a quantized value; None if the layer is not quantized.
        group: number of inputs that share a scale; 0 if the layer is not quantized.
    """

    n: int
    m: int
    shape: tuple[int, int]
    bias: bool
    bits: int | None = None
    group: int = 0

    @property
    def since(self) -> int:
        """The oldest version that has such layers."""
        return CHECKSUMS_VERSION if self.bits is None else SPARSE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        few = {} if self.bits is None else {"bits": self.bits, "group": self.group}
        return {"pattern": f"{self.n}:{self.m}", "shape": list(self.shape), "bias": self.bias, **few}


@dataclass(frozen=True)
class RowsEntry:
    """One packed layer whose zeros follow no pattern.

    Attributes:
        n_values: number of kept weights.
        shape: (out_features, in_features) of the dense weight.
        bias: True if the layer has a bias.
    """

    n_values: int
    shape: tuple[int, int]
    bias: bool

    since = SPARSE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"pattern": UNSTRUCTURED, "values": self.n_values, "shape": list(self.shape), "bias": self.bias}


@dataclass(frozen=True)
class DenseEntry:
    """One quantized layer that is not pruned, or an embedding.

    Attributes:
        bits: bits of a value.
        group: number of inputs that share a scale.
        shape: (out_features, in_features) of the dense weight; of an embedding (num_embeddings, embedding_dim).
        bias: True if the layer has a bias.
        embedding: True for an embedding.
        tied: name of the embedding whose weight the layer has; None if it has its own.
    """

    bits: int
    group: int
    shape: tuple[int, int]
    bias: bool
    embedding: bool = False
    tied: str | None = None

    since = NEWEST_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        fields: dict[str, Any] = {"pattern": DENSE, "shape": list(self.shape), "bias": self.bias}
        fields |= {"bits": self.bits, "group": self.group}
        if self.embedding:
            fields["embedding"] = True
        return fields if self.tied is None else {**fields, "tied": self.tied}


LayerEntry = PackedEntry | RowsEntry | DenseEntry


@dataclass(frozen=True)
class FileMark:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileMark:
        """Read a file and compute both."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Content of a packed checkpoint.

    Attributes:
        dtype: dtype of the model: "float32", "float16" or "bfloat16".
        layers: the packed layers by dotted name.
        tied: tied tensors, which are not in the file: the name of each, and the name of the tensor it is tied to.
        files: size and checksum of every file of the checkpoint, by relative path. Files that were added later are
            not covered.
        version: format version that was read, or that is written; 0 for the oldest version that can hold the layers.
    """

    dtype: str
    layers: dict[str, LayerEntry]
    tied: dict[str, str]
    files: dict[str, FileMark]
    version: int = 0

    def __post_init__(self) -> None:
        if not self.version:
            since = max((entry.since for entry in self.layers.values()), default=CHECKSUMS_VERSION)
            object.__setattr__(self, "version", since)

    @property
    def layout(self) -> int:
        """The newest n:m layout among the layers."""
        return _layout(self.layers.values())

    @staticmethod
    def marks(folder: Path) -> dict[str, FileMark]:
        """Sizes and checksums of all files in a folder, except the manifest and the model card, which users edit."""
        return {name: FileMark.of(folder / name) for name in files_in(folder) if name not in UNMARKED}

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "layout": self.layout,
            "dtype": self.dtype,
            "layers": {name: entry.to_dict() for name, entry in self.layers.items()},
            "tied": self.tied,
            "files": {name: {"bytes": mark.size, "sha256": mark.sha256} for name, mark in self.files.items()},
        }
        content["sha256"] = _digest(content)
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read and check the manifest of a folder.

        Raises:
            PackedError: if the manifest is missing, damaged or altered, or was written by a newer ace-triton.
        """
        path = Path(folder) / MANIFEST_FILE
        if not Path(folder).is_dir():
            what = "is a file" if Path(folder).exists() else "no such folder"
            raise PackedError(f"{folder}: {what}; name a folder that ace-triton pack wrote")
        if not path.is_file():
            raise PackedError(f"{folder}: has no {MANIFEST_FILE}; name a folder that ace-triton pack wrote")
        try:
            if path.stat().st_size > LARGEST_MANIFEST:
                raise PackedError(f"larger than {LARGEST_MANIFEST:,} bytes")
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise PackedError(f"{path}: cannot be read ({error}): the file is damaged; pack the model again") from error
        _check_version(path, content)
        if content.get("sha256") != _digest(content):
            raise PackedError(f"{path}: does not match its checksum: it was altered or damaged; pack the model again")
        try:
            return cls._parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackedError(
                f"{path}: is malformed ({type(error).__name__}: {error}); pack the model again"
            ) from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> Manifest:
        if content["dtype"] not in DTYPES:
            raise PackedError(f"dtype must be one of {', '.join(DTYPES)}, got {content['dtype']!r}")
        layers = {name: _entry(fields) for name, fields in content["layers"].items()}
        for name, entry in layers.items():
            if CHECKSUMS_VERSION < entry.since > content["version"]:
                raise PackedError(f"version {content['version']} has no layers like {name}; version {entry.since} has")
            _check_tie(name, entry, layers)
        if content["layout"] != _layout(layers.values()):
            raise PackedError(f"its layers have layout {_layout(layers.values())}, it says {content['layout']}")
        files = {name: FileMark(_size(mark["bytes"]), str(mark["sha256"])) for name, mark in content["files"].items()}
        if not set(NEEDED_FILES) <= set(files):
            raise PackedError(f"files must include {', '.join(NEEDED_FILES)}, got {', '.join(files)}")
        outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if outside:
            raise PackedError(f"{outside[0]!r} is not a file in the folder")
        tied = {str(name): str(other) for name, other in content["tied"].items()}
        return cls(content["dtype"], layers, tied, files, content["version"])

    def check_files(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Raise PackedError if a file is missing, has the wrong size, or was altered.

        Args:
            folder: the checkpoint.
            names: the files to check; None for all.

        Warns if the manifest is of version 1, which has no checksums of the tokenizer and the generation config.
        """
        if self.version < CHECKSUMS_VERSION:
            warnings.warn(
                f"{folder}: was packed by an older ace-triton, without checksums of the tokenizer and the generation "
                "config; pack the model again to add them",
                stacklevel=3,
            )
        for name in self.files if names is None else names:
            path, mark = folder / name, self.files[name]
            if not path.is_file():
                raise PackedError(f"{path}: is missing; copy or pack the model again")
            size = path.stat().st_size
            if size != mark.size:
                raise PackedError(
                    f"{path}: has {size} bytes instead of {mark.size}: it is truncated or altered; copy or pack the "
                    "model again"
                )
            if FileMark.of(path) != mark:
                raise PackedError(
                    f"{path}: does not match its checksum: it was altered or damaged; copy or pack the model again"
                )


def is_packed(folder: str | Path) -> bool:
    """True if a folder has the manifest of a packed checkpoint, valid or not."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def _check_version(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PackedError(f"{path}: is not the manifest of a packed checkpoint; pack the model again")
    for field, oldest, newest in (
        ("version", OLDEST_VERSION, NEWEST_VERSION),
        ("layout", LAYOUT_VERSION, FEW_BITS_LAYOUT_VERSION),
    ):
        given = content.get(field)
        if not isinstance(given, int) or isinstance(given, bool) or given < oldest:
            raise PackedError(f"{path}: {field} must be {oldest} or newer, got {given!r}; pack the model again")
        if given > newest:
            raise PackedError(
                f"{path}: {field} {given} is newer than {newest}, the newest one that this ace-triton reads; upgrade "
                "ace-triton"
            )


def _layout(entries: Iterable[LayerEntry]) -> int:
    """The newest n:m layout among the layers."""
    quantized = any(not isinstance(entry, RowsEntry) and entry.bits is not None for entry in entries)
    return FEW_BITS_LAYOUT_VERSION if quantized else LAYOUT_VERSION


def _entry(fields: dict[str, Any]) -> LayerEntry:
    rows, cols = (_size(size) for size in fields["shape"])
    if not isinstance(fields["bias"], bool):
        raise TypeError(f"bias must be true or false, got {fields['bias']!r}")
    if fields["pattern"] == UNSTRUCTURED:
        n_values = _size(fields["values"])
        if n_values > rows * cols:
            raise PackedError(f"a weight of shape [{rows}, {cols}] cannot have {n_values} values")
        return RowsEntry(n_values, (rows, cols), fields["bias"])
    if fields["pattern"] == DENSE:
        return _dense_entry(fields, (rows, cols))
    if not re.fullmatch(r"\d+:\d+", fields["pattern"]):
        raise PackedError(f"pattern must be n:m, {UNSTRUCTURED} or {DENSE}, got {fields['pattern']!r}")
    pattern = Sparsity(fields["pattern"])
    assert pattern.n is not None
    assert pattern.m is not None
    if "bits" not in fields and "group" not in fields:
        return PackedEntry(pattern.n, pattern.m, (rows, cols), fields["bias"])
    check_bits(fields["bits"], fields["group"])
    return PackedEntry(pattern.n, pattern.m, (rows, cols), fields["bias"], fields["bits"], fields["group"])


def _dense_entry(fields: dict[str, Any], shape: tuple[int, int]) -> DenseEntry:
    check_bits(fields["bits"], fields["group"])
    embedding, tied = fields.get("embedding", False), fields.get("tied")
    if not isinstance(embedding, bool):
        raise TypeError(f"embedding must be true or false, got {embedding!r}")
    if not (tied is None or isinstance(tied, str)) or (embedding and (tied is not None or fields["bias"])):
        raise PackedError(f"an embedding has no bias and is tied to no other, got {fields!r}")
    return DenseEntry(fields["bits"], fields["group"], shape, fields["bias"], embedding, tied)


def _check_tie(name: str, entry: LayerEntry, layers: dict[str, LayerEntry]) -> None:
    """Raise PackedError if a layer is tied to something other than a quantized embedding of its shape."""
    if not isinstance(entry, DenseEntry) or entry.tied is None:
        return
    other = layers.get(entry.tied)
    alike = isinstance(other, DenseEntry) and (other.bits, other.group, other.shape) == (
        entry.bits,
        entry.group,
        entry.shape,
    )
    if not alike or not isinstance(other, DenseEntry) or not other.embedding:
        raise PackedError(f"{name} is tied to {entry.tied}, which is no embedding of the same shape and bits")


def _size(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise PackedError(f"expected a whole number, 0 or more; got {number!r}")
    return number


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of all fields except the digest. White space in the file does not matter."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
