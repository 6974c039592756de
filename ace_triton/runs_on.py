"""Describe the backend and device that operations run on."""

from __future__ import annotations

import torch

from .kernels import cpu, cpu_library
from .kernels.backend import SLOW, SlowBackendWarning, backend_of_device, interpreting

__all__ = ["SlowBackendWarning", "describe_backend", "multiplies_bfloat16", "warn_if_slow"]


def describe_backend(device: torch.device | str = "cpu") -> str:
    """The backend for tensors on ``device`` in words, for example "compiled CPU library (avx2), 2 threads".

    The name in parentheses is the instruction set. "bf16 products" follows it if the library multiplies bf16 tokens
    with the processor's own instructions.

    Raises:
        BackendError: ``ACE_TRITON_BACKEND`` names a backend that does not support ``device``.
    """
    device = torch.device(device)
    backend = backend_of_device(device)
    if backend == "triton":
        return "Triton's interpreter" if interpreting() else f"Triton kernels on {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    thread_count = f"{threads} thread" if threads == 1 else f"{threads} threads"
    if backend == "cpu":
        products = ", bf16 products" if cpu.has_gram_product() else ""
        return f"compiled CPU library ({cpu_library.isa()}{products}), {thread_count}"
    why = f" (no compiled CPU library: {cpu_library.why_unavailable()})" if cpu_library.why_unavailable() else ""
    return f"plain torch, slow{why}, {thread_count}" if device.type == "cpu" else "plain torch, slow"


def warn_if_slow(device: torch.device | str = "cpu") -> None:
    """Warn, once per process, if operations on ``device`` run in plain torch since no faster backend is installed."""
    device = torch.device(device)
    if device.type in SLOW:
        backend_of_device(device)


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """True if a device has bf16 matrix instructions, so that a forward in bf16 is not slower than in fp32."""
    on_cpu = torch.device(device).type == "cpu"
    return cpu_library.available() and cpu.has_gram_product() if on_cpu else True
