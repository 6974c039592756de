"""Finds out whether a parameter serves more than one module."""

from __future__ import annotations

import gc
import sys

import torch
from torch import nn

_REFERENCES_OF_AN_OWNED_PARAMETER = 4
"""The module's dict, the caller's variable, this function's and getrefcount's own."""


def other_owners(layer: nn.Module, parameter: torch.Tensor) -> list[nn.Module]:
    """Modules other than ``layer`` that hold ``parameter`` itself (an embedding tied to a head, say).

    Cheap where nothing else refers to the parameter; otherwise it walks the interpreter's objects.
    """
    if sys.getrefcount(parameter) <= _REFERENCES_OF_AN_OWNED_PARAMETER:
        return []
    owners = []
    for referrer in gc.get_referrers(parameter):
        if not isinstance(referrer, dict):
            continue
        for holder in gc.get_referrers(referrer):
            module = holder if isinstance(holder, nn.Module) else None
            if module is not None and module is not layer and module._parameters is referrer:
                owners.append(module)
    return owners
