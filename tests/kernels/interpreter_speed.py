"""Makes Triton's interpreter faster without changing what it computes.

Triton lists all members of ``triton.language`` before each launch and each call of a device function, to find the
builtins that it replaces. With small tensors this takes as long as the kernel. The names never change, so they are
listed once.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def _builtin_names(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # False if an outer call has replaced it.
            interpreter._patch_attr(package, name, member, builder, scope)


def list_builtins_once() -> None:
    """Replace the interpreter's search for builtins. Call this before the first launch."""
    interpreter._patch_builtin = _patch_builtin
