"""Reads the metadata of GGUF files quickly for transformers, which reads it anew for each object that it loads.

Nearly all metadata is the vocabulary. The package gguf opens several views of the mapped file for each of its
entries; here an entry has one view, of plain memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import numpy as np

_CUT = "the file ends within its metadata"

_lock = threading.Lock()
_entered = 0
_own: list[tuple[Any, str, Any]] = []
"""What modules have under the names that :func:`fast_gguf_metadata` replaces, while ``_entered`` is not 0."""


@cache
def metadata_reader() -> Any:
    """The class GGUFReader of the package gguf, with a fast path for arrays of strings and of numbers.

    ``parts`` of an array of strings leaves out their lengths. ``data`` has the indices of the entries, as always.
    """
    import gguf

    kinds = gguf.GGUFValueType

    class MetadataReader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kind = kinds(self._get(orig_offs, np.uint32)[0]) if raw_type == kinds.ARRAY else None
            number = None if kind is None else self.gguf_scalar_to_np.get(kind)
            if kind != kinds.STRING and number is None:
                return super()._get_field_parts(orig_offs, raw_type)
            count, start = self._get(orig_offs + 4, np.uint64), orig_offs + 12
            if number is None:
                entries, end = _strings(self, start, int(count[0]))
            else:
                numbers = self._get(start, number, count[0]).view(np.ndarray)
                entries, end = [numbers[at : at + 1] for at in range(len(numbers))], start + numbers.nbytes
                if len(entries) < count[0]:
                    raise ValueError(_CUT)
            parts = [self._get(orig_offs, np.uint32), count, *entries]
            return end - orig_offs, parts, list(range(2, len(parts))), [kinds.ARRAY, *([kind] if entries else [])]

    return MetadataReader


def _strings(reader: Any, start: int, count: int) -> tuple[list[np.ndarray], int]:
    """The strings of an array whose first entry starts at byte ``start`` of the file, and the byte after the last.

    Raises:
        ValueError: if the file ends before the array does.
    """
    data, found = reader.data.view(np.ndarray), []
    raw, native = memoryview(data), reader.byte_order != "S"
    order: Any = "little" if native == (sys.byteorder == "little") else "big"
    for _ in range(count):
        end = start + 8 + int.from_bytes(raw[start : start + 8], order)
        if end > len(raw):
            raise ValueError(_CUT)
        found.append(data[start + 8 : end])
        start = end
    return found, start


def _read_once(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``load_gguf_checkpoint`` of transformers, which reads the metadata of a file only once."""
    known: dict[str, dict[str, Any]] = {}

    @wraps(load)
    def loaded(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
        if return_tensors:
            return load(path, return_tensors=True, **options)
        if str(path) not in known:
            known[str(path)] = load(path, **options)
        return {part: copy(content) for part, content in known[str(path)].items()}

    return loaded


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Modules, names in them, and what takes the place of these names."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loading

    package: Any = gguf
    yield package, "GGUFReader", metadata_reader()
    # transformers asks for the same map of names once for each module of a model.
    yield package, "get_tensor_name_map", cache(package.get_tensor_name_map)
    yield loading, "load_gguf_checkpoint", _read_once(loading.load_gguf_checkpoint)


@contextmanager
def fast_gguf_metadata() -> Iterator[None]:
    """A context in which transformers reads GGUF files with the class of :func:`metadata_reader`, and their metadata
    once for the configuration and the tokenizer.

    Contexts may overlap, in one thread or in several; both packages are as before after the last has ended.
    """
    global _entered, _own
    if find_spec("gguf") is None:
        yield  # transformers says that the package is missing.
        return
    with _lock:
        if not _entered:
            new = list(_replacements())
            _own = [(module, name, getattr(module, name)) for module, name, _ in new]
            for module, name, replacement in new:
                setattr(module, name, replacement)
        _entered += 1
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                for module, name, own in _own:
                    setattr(module, name, own)
