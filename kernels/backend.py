"""Dispatch: chooses Triton, the compiled CPU library or plain torch for the tensors of an operation."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterable
from typing import Literal

import torch

from . import cpu_library
from .errors import ArgumentError, BackendError
from .memory import why_no_memory, why_not_plain

Backend = Literal["triton", "cpu", "reference"]

ENVIRONMENT_VARIABLE = "ACE_TRITON_BACKEND"

_PLAIN = (torch.Tensor, torch.nn.Parameter)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if Triton kernels run in Triton's own interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def choose_backend(*tensors: torch.Tensor | None) -> Backend:
    """The backend for an operation on these tensors (None entries are ignored).

    CUDA and HIP tensors use Triton, CPU tensors use the compiled library. If the one that is needed is not available,
    the plain-torch reference runs. ``ACE_TRITON_BACKEND=triton|cpu|reference`` forces one of them.

    Raises:
        BackendError: if the forced backend is unknown or cannot run on these tensors.
        ArgumentError: if the tensors are on different devices, or if a tensor has no memory that a kernel can read.
    """
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN and (why := why_not_plain(tensor)) is not None:
            raise ArgumentError(f"a {_shape_of(tensor)} tensor {why}")
        its_device = tensor.device
        if its_device != device:
            if device is not None:
                where = sorted({str(t.device) for t in tensors if t is not None})
                raise ArgumentError(
                    f"all tensors of an operation must be on one device, but these are on {where}: "
                    "move them with .to(device)"
                )
            device = its_device
    assert device is not None
    backend = backend_of_device(device)
    if backend == "triton":
        _check_memory(tensors)
    return backend


def _check_memory(tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise ArgumentError if a tensor's numbers are not at its address, so that Triton would read other memory."""
    for tensor in tensors:
        if tensor is not None and (why := why_no_memory(tensor)) is not None:
            raise ArgumentError(f"a {_shape_of(tensor)} tensor {why}")


def _shape_of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def backend_of_device(device: torch.device) -> Backend:
    """The backend that :func:`choose_backend` returns for tensors on ``device``; warns once if that backend is slow.

    Raises:
        BackendError: if the forced backend is unknown or cannot run on ``device``.
    """
    forced = os.environ[ENVIRONMENT_VARIABLE].strip() if ENVIRONMENT_VARIABLE in os.environ else ""
    if forced:
        return _forced(forced.lower(), device)
    kind = device.type
    if kind == "cuda" and HAS_TRITON:
        return "triton"
    if kind == "cpu" and cpu_library.available():
        return "cpu"
    if kind in SLOW:
        warn_of_slow_backend(kind)
    return "reference"


class SlowBackendWarning(UserWarning):
    """Operations run in plain torch because the compiled library or Triton is missing."""


SLOW = {
    "cpu": "no compiled CPU library ({why}): on the CPU, pruning takes up to 60 times as long, and a packed layer "
    "about 40 times as long as a dense one. Install a C++ compiler (g++ or clang++) and reinstall ace_triton",
    "cuda": "Triton is not installed: on the GPU, operations run in plain torch and are slow. Install triton",
}


@functools.cache
def warn_of_slow_backend(device_type: str) -> None:
    """Warn, once per process, that operations on this type of device run in plain torch."""
    why = cpu_library.why_unavailable() if device_type == "cpu" else ""
    warnings.warn(SLOW[device_type].format(why=why), SlowBackendWarning, stacklevel=4)


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
                f"{ENVIRONMENT_VARIABLE}=cpu, but the compiled library is not available "
                f"({cpu_library.why_unavailable()}): install a C++ compiler and reinstall ace_triton, "
                f"or unset {ENVIRONMENT_VARIABLE}"
            )
        return "cpu"
    if name == "triton":
        if not HAS_TRITON:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}=triton, but triton is not installed: install it, "
                f"or unset {ENVIRONMENT_VARIABLE}"
            )
        if device.type == "cpu" and not interpreting():
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}=triton, but the tensors are on the CPU: move them to a GPU, or "
                "set TRITON_INTERPRET=1 before the first import to run the kernels in the interpreter"
            )
        return "triton"
    raise BackendError(f"{ENVIRONMENT_VARIABLE}={name!r} is not a backend: use 'triton', 'cpu' or 'reference'")
