"""Which body of an operation serves a tensor: Triton, the compiled CPU library, or plain torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Literal

import torch

from . import cpu_library
from .memory import why_no_memory, why_not_plain

Backend = Literal["triton", "cpu", "reference"]

ENVIRONMENT_VARIABLE = "ACE_TRITON_BACKEND"

_PLAIN = (torch.Tensor, torch.nn.Parameter)

HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this tensor."""


def interpreting() -> bool:
    """True where Triton kernels run in Triton's own interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def choose_backend(*tensors: torch.Tensor | None) -> Backend:
    """The backend for an operation on these tensors (None entries are passed over).

    Triton for CUDA and HIP tensors, the compiled library for CPU tensors, the plain-torch reference
    where neither is there. ``ACE_TRITON_BACKEND=triton|cpu|reference`` forces one.

    Raises:
        BackendError: the forced backend is unknown or cannot serve these tensors.
        ValueError: the tensors lie on different devices, or one has no memory of its own.
    """
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN and (why := why_not_plain(tensor)) is not None:
            raise ValueError(f"a {_shape_of(tensor)} tensor {why}")
        its_device = tensor.device
        if its_device != device:
            if device is not None:
                where = sorted({str(t.device) for t in tensors if t is not None})
                raise ValueError(
                    f"all tensors of one operation must be on one device, these are on {where}: "
                    "move them with .to(device)"
                )
            device = its_device
    assert device is not None
    forced = os.environ[ENVIRONMENT_VARIABLE].strip() if ENVIRONMENT_VARIABLE in os.environ else ""
    if forced:
        backend = _forced(forced.lower(), device)
    elif device.type == "cuda" and HAS_TRITON:
        backend = "triton"
    elif device.type == "cpu" and cpu_library.available():
        return "cpu"
    else:
        return "reference"
    if backend == "triton":
        _check_memory(tensors)
    return backend


def _check_memory(tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise ValueError for a tensor that Triton would read elsewhere than where its numbers lie."""
    for tensor in tensors:
        if tensor is not None and (why := why_no_memory(tensor)) is not None:
            raise ValueError(f"a {_shape_of(tensor)} tensor {why}")


def _shape_of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _forced(name: str, device: torch.device) -> Backend:
    if name == "reference":
        return "reference"
    if name == "cpu":
        if device.type != "cpu":
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}=cpu, but the tensors are on {device}: move them to the CPU "
                f"or unset {ENVIRONMENT_VARIABLE}"
            )
        if not cpu_library.available():
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}=cpu, but the compiled library is not there "
                f"({cpu_library.why_unavailable()}): install a C++ compiler and reinstall ace_triton, "
                f"or unset {ENVIRONMENT_VARIABLE}"
            )
        return "cpu"
    if name == "triton":
        if not HAS_TRITON:
            raise BackendError(f"{ENVIRONMENT_VARIABLE}=triton, but triton is not installed")
        if device.type == "cpu" and not interpreting():
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}=triton, but the tensors are on the CPU: move them to a GPU, or "
                "set TRITON_INTERPRET=1 before the first import to run the kernels in the interpreter"
            )
        return "triton"
    raise BackendError(f"{ENVIRONMENT_VARIABLE}={name!r} is not a backend: use 'triton', 'cpu' or 'reference'")
