"""Tells autograd what a kernel writes, since the kernel itself only has an address."""

from __future__ import annotations

import torch


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Move the version counters of tensors that are written in place; None entries are passed over.

    A backward that saved one of them before then raises, as after an in-place operation of torch, and does not use
    the new numbers. Tensors made under ``torch.inference_mode()`` have no counter, and are left alone.
    """
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])
