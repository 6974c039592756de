"""Runs the package under another default dtype of torch than its tests.

Tests, their models and their layers find float32, as ever. So every test holds as it is, unless the package takes a
dtype from torch's default.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor")
OTHERS = ("get_default_dtype", "scalar_tensor", "zeros")


def use_default_dtype(dtype: torch.dtype) -> None:
    """From now on, ``dtype`` is the default inside the package, for the whole process."""
    seen_by_tests = torch.float32
    set_default_dtype = torch.set_default_dtype

    def seen_outside(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if _called_by_the_package():
                return function(*args, **kwargs)
            inside = own_default()
            set_default_dtype(seen_by_tests)
            try:
                return function(*args, **kwargs)
            finally:
                set_default_dtype(inside)

        return called

    def change(chosen: torch.dtype) -> None:
        """What others set, transformers for one, holds for all; what they put back is what it was."""
        nonlocal seen_by_tests
        put_back = chosen is (dtype if _called_by_the_package() else torch.float32)
        seen_by_tests = torch.float32 if put_back else chosen
        set_default_dtype(dtype if put_back else chosen)

    own_default = torch.get_default_dtype
    set_default_dtype(dtype)
    for name in (*FACTORIES, *OTHERS):
        setattr(torch, name, seen_outside(getattr(torch, name)))
    torch.set_default_dtype = change


def _called_by_the_package() -> bool:
    """Whether the package, rather than a test, made the call, directly or through a library; not to print a tensor."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if "test" in name or name == "torch._tensor_str":
            return False
        if name.startswith("ace_triton"):
            return True
        frame = frame.f_back
    return False
