"""Makes Triton's interpreter faster without changing what it computes.

Before each launch and each call of a device function, Triton lists all members of ``triton.language`` to find the
builtins that it replaces. With small tensors this takes as long as the kernel. The names never change, so they are
listed once. A device function inside a launch finds the builtins replaced already.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_before_a_launch = interpreter._patch_lang


@cache
def _builtin_names(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # False if an outer call has replaced it.
            interpreter._patch_attr(package, name, member, builder, scope)


def _patch_lang(function: Any) -> Any:
    if any(map(tl.core.is_builtin, (tl.load, tl.core.load))):
        return _patch_before_a_launch(function)
    return interpreter._LangPatchScope()


def search_builtins_once() -> None:
    """Replace the interpreter's search for builtins. Call this before the first launch."""
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _patch_lang
