"""Finds out whether a parameter serves more than one module."""

from __future__ import annotations

import gc
import sys

import torch
from torch import nn

_REFERENCES_OF_AN_OWNED_PARAMETER = 3
"""The module's dict, this function's argument and getrefcount's own."""


def other_owners(layer: nn.Module, parameter: torch.Tensor) -> list[nn.Module]:
    """Modules other than ``layer`` that hold ``parameter`` itself (an embedding tied to a head, say).

    Cheap where nothing else refers to the parameter; otherwise it walks the interpreter's objects.
    """
    if sys.getrefcount(parameter) <= _REFERENCES_OF_AN_OWNED_PARAMETER:
        return []
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module) and thing is not layer]
    return [module for module in modules if any(p is parameter for p in module.__dict__["_parameters"].values())]
