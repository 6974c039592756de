"""Reads the signatures and structures of the compiled CPU library from its C header, ``kernels/cpu/abi.h``."""

from __future__ import annotations

import ctypes
import re
from typing import Any, NamedTuple

from .cpu_sources import FOLDER

HEADER = FOLDER / "abi.h"

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FUNCTION = re.compile(r"^ACE_EXPORT ([^(]*\W)(\w+)\(([^)]*)\);", re.MULTILINE)
_STRUCTURE = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^\s*(.*\W)(\w+);", re.MULTILINE)
_PARAMETER = re.compile(r"(.*\W)\w+", re.DOTALL)

_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "const char*": ctypes.c_char_p,
}


class Signature(NamedTuple):
    """The ctypes of a function's result and of its parameters."""

    result: Any
    parameters: list[Any]


def signatures(header: str) -> dict[str, Signature]:
    """The exported functions of a C header, by name; a pointer is a ``void*``, except for ``const char*``."""
    found = _FUNCTION.findall(_COMMENT.sub("", header))
    return {name: Signature(_type(result), _parameters(listed)) for result, name, listed in found}


def structures(header: str) -> dict[str, type[ctypes.Structure]]:
    """The structures of a C header, by name, with one field a line; a pointer is a ``void*``."""
    found = _STRUCTURE.findall(_COMMENT.sub("", header))
    return {
        name: _structure(name, [(field, _type(kind)) for kind, field in _FIELD.findall(body)]) for name, body in found
    }


def _structure(name: str, fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _parameters(listed: str) -> list[Any]:
    if listed == "void":
        return []
    return [_type(_PARAMETER.fullmatch(parameter.strip())[1]) for parameter in listed.split(",")]  # type: ignore[index]


def _type(written: str) -> Any:
    written = written.strip()
    return _TYPES[written] if written in _TYPES or not written.endswith("*") else ctypes.c_void_p
