"""Tells autograd about in-place writes of kernels, which it cannot see."""

from __future__ import annotations

import torch


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Increment the version counters of tensors that a kernel writes in place; None entries are ignored.

    If autograd saved such a tensor for a backward pass, that pass raises an error, as after an in-place torch
    operation, instead of using the new numbers. Tensors created under ``torch.inference_mode()`` have no counter and
    are skipped.
    """
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])
