"""The record of the machine-code report: the code of each kernel, and a digest of everything that decides it.

A run compiles the kernels whose digest changed. The others are read from the record.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITCallable, JITFunction

from . import disassembly
from .disassembly import MachineCode
from .jit_launches import JitLaunch, Specialised


class CodeRecord:
    """Machine code by kernel, kept in a JSON file with one line for each.

    Args:
        path: the file. It need not exist.

    Raises:
        ValueError: if the file is not a record.

    Attributes:
        compiled: kernels that were compiled.
        reused: kernels that were read from the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compiled = self.reused = 0
        self._entries = _entries_of(path) if path.exists() else {}
        self._asked: set[str] = set()

    def code(self, label: str, launch: JitLaunch, target: GPUTarget) -> MachineCode:
        """The machine code of a launch on ``target``. ``label`` names the kernel in the file, unique to it."""
        specialised = launch.specialise(target)
        digest = digest_of(launch.kernel, specialised, target)
        entry = self._entries.get(label)
        if entry is None or entry["digest"] != digest:
            code = disassembly.read(triton.compile(specialised.source, target=target, options=specialised.options))
            entry = self._entries[label] = {"digest": digest, **_to_json(code)}
            self.compiled += 1
        elif label not in self._asked:
            self.reused += 1
        self._asked.add(label)
        return _from_json(entry)

    def write(self) -> None:
        """Write the file, with the entries of earlier runs."""
        lines = (f"{json.dumps(label)}: {json.dumps(entry)}" for label, entry in sorted(self._entries.items()))
        partial = self.path.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        partial.replace(self.path)

    def forget_others(self) -> None:
        """Drop the entries that this run did not ask for."""
        self._entries = {label: self._entries[label] for label in self._asked}


def digest_of(kernel: JITFunction, specialised: Specialised, target: GPUTarget) -> str:
    """A digest of what decides the machine code of a kernel and its reading.

    These are the Triton version, the target, the source of the kernel and of the functions that it calls, the signature
    with its constants and alignment, the options, and the source of :mod:`.disassembly`. Comments, docstrings and line
    numbers have no part in it.
    """
    source = specialised.source
    parts = [
        triton.__version__,
        target,
        source.signature,
        source.constants,
        source.attrs,
        sorted(specialised.options.items()),
        without_comments(Path(disassembly.__file__).read_text()),
        *sources(kernel),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def sources(kernel: JITFunction) -> Iterator[str]:
    """Source of a kernel and of every function of ours that it calls, each once, and the constants that they name.

    Functions that compute constants while a kernel is compiled are among them.
    """
    found: set[object] = set()
    left: list[object] = [kernel]
    while left:
        value = left.pop()
        if isinstance(value, tl.constexpr):
            yield str(value)
        elif isinstance(value, JITCallable) and id(value) not in found and not _is_tritons(value):
            found.add(id(value))
            yield without_comments(value.src)
            left += _named_in(value)


def without_comments(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def _named_in(function: JITCallable) -> Iterator[object]:
    """The globals that a function names, and attributes of modules."""
    for node in ast.walk(ast.parse(function.src)):
        if isinstance(node, ast.Name):
            yield function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = function.__globals__.get(node.value.id)
            if isinstance(module, ModuleType):
                yield getattr(module, node.attr, None)


def _is_tritons(function: JITCallable) -> bool:
    """True for a function of Triton itself, whose version is in the digest."""
    return function.__module__.partition(".")[0] == "triton"


def _entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a record by kernel; ValueError if the file is damaged."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for entry in entries.values():
            _from_json(entry)
            entry["digest"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a record of machine code ({error}): restore it, or remove it to compile all kernels again"
        ) from error
    return entries


def _to_json(code: MachineCode) -> dict[str, Any]:
    return vars(code) | {"occupancy": None if math.isnan(code.occupancy) else code.occupancy}


def _from_json(entry: dict[str, Any]) -> MachineCode:
    values = {name: value for name, value in entry.items() if name != "digest"}
    for name in ("loop", "rest"):
        values[name] = Counter(values[name])
    for name in ("loads", "stores"):  # JSON has text for keys.
        values[name] = Counter({int(bits): n for bits, n in values[name].items()})
    values["occupancy"] = math.nan if values["occupancy"] is None else values["occupancy"]
    return MachineCode(**values)
