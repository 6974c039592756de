"""What the kernels run on, in one line."""

from __future__ import annotations

import os

import torch

from .kernels import cpu, cpu_library
from .kernels.backend import ENVIRONMENT_VARIABLE, HAS_TRITON


def describe_backend(device: str | torch.device = "cpu") -> str:
    """ "CPU: avx512, 2 threads", "CUDA: NVIDIA H100, Triton", or why plain torch does the work."""
    where = torch.device(device)
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    suffix = f" ({ENVIRONMENT_VARIABLE}={forced})" if forced else ""
    if where.type == "cuda":
        body = "Triton" if HAS_TRITON else "Triton is not installed: plain torch, slow"
        return f"CUDA: {torch.cuda.get_device_name(where)}, {body}{suffix}"
    if where.type != "cpu":
        return f"{where.type}: plain torch, slow{suffix}"
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' * (threads != 1)}{suffix}"
    if cpu_library.available():
        return f"CPU: {cpu_library.isa()}, {counted}"
    why = cpu_library.why_unavailable()
    return f"CPU: no compiled library, so plain torch, slow; {counted} ({why})"


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether a device has instructions for products of bf16, so that forwards in it are not slower than in fp32."""
    on_cpu = torch.device(device).type == "cpu"
    return cpu_library.available() and cpu.has_gram_product() if on_cpu else True
