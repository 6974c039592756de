"""Version counters: they tell autograd of the kernels' in-place writes, and show whether a tensor was changed."""

from __future__ import annotations

import torch


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Increment the version counters of tensors that a kernel writes in place; None entries are ignored.

    If autograd saved such a tensor for a backward pass, that pass raises an error, as after an in-place torch
    operation, instead of using the new numbers. Tensors created under ``torch.inference_mode()`` have no counter and
    are skipped.
    """
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def version_of(tensor: torch.Tensor) -> int:
    """The version counter of a tensor, which each in-place change increments; 0 for an inference tensor, without one.

    Outside inference mode torch refuses to change an inference tensor, so its version is constant there.
    """
    return 0 if tensor.is_inference() else tensor._version
