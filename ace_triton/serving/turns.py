"""Several threads that decode one token each in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..linears import linear_weight
from ..packed.packed_linear import PackedLinear

MOST_BYTES = 1.25
"""Bytes of a weight, as the mean of all linear layers, up to which several texts are decoded in turn: about 8 bits."""


class Turns:
    """Threads of which one runs at a time: each runs until it gives up its turn, in the order in which they came.

    Each thread has torch's random state of the CPU for itself, so it draws what it would draw alone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[Any] = deque()

    @contextmanager
    def member(self) -> Iterator[None]:
        """This thread takes part, from its first turn until the block ends."""
        own = object()
        self._enter(own)
        try:
            yield
        finally:
            self._leave()

    def pass_on(self) -> None:
        """Let the other threads have a turn each; returns at the next turn of this one."""
        if len(self._line) == 1:
            return
        random = torch.get_rng_state()
        own = self._line[0]
        with self._changed:
            self._line.rotate(-1)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._line[0] is own)
        torch.set_rng_state(random)

    def _enter(self, own: object) -> None:
        with self._changed:
            self._line.append(own)
            self._changed.wait_for(lambda: self._line[0] is own)

    def _leave(self) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()


def pays_in_turn(model: nn.Module) -> bool:
    """True if the compiled step decodes several texts in turn faster than transformers decodes them as one batch.

    In turn, the weights are read once for each text, and as one batch once for several. So the weights must be so small
    that reading them takes less time than everything else in a forward of transformers.
    """
    size = elements = 0
    for layer in model.modules():
        weight = linear_weight(layer)
        if isinstance(layer, PackedLinear):
            size += layer.packed.packed_bytes
            elements += layer.in_features * layer.out_features
        elif weight is not None:
            size += weight.nbytes
            elements += weight.numel()
    return size <= MOST_BYTES * elements
