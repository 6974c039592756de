"""What a recovery reads, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .written_text import AT_ONCE, write_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_SEQUENCES, TEXT_LENGTH = 2048, 256
"""Pieces of the calibration text to train on at most, where nothing else is said."""


@dataclass(frozen=True)
class WrittenText:
    """Text that the teacher writes as it is read: as much as the budget takes, none of it twice.

    Attributes:
        start: token id that every sequence follows (:func:`~ace_triton.written_text.start_token`).
        length: tokens of a sequence.
    """

    start: int
    length: int = TEXT_LENGTH


class Batches(ABC):
    """The sequences of each step.

    Args:
        length: tokens of a sequence.
        tokens_per_step: rounded to whole sequences.
        seed: of what is read, or of its order.
    """

    def __init__(self, length: int, tokens_per_step: int, seed: int) -> None:
        self.length, self._seed = length, seed
        self._sequences = max(1, round(tokens_per_step / length))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self._sequences * self.length

    def of(self, step: int) -> torch.Tensor:
        """int64 [n_sequences, length]; the same whenever it is asked for."""
        places = range(step * self._sequences, (step + 1) * self._sequences)
        return torch.stack([self._sequence(place) for place in places])

    @abstractmethod
    def passes(self, steps: int) -> float:
        """How often so many steps read the text."""

    @abstractmethod
    def digest(self) -> bytes:
        """What tells this text from another."""

    @abstractmethod
    def _sequence(self, place: int) -> torch.Tensor:
        """int64 [length], of the place-th that is read."""


class GivenBatches(Batches):
    """All sequences of ``ids``, int64 [n_sequences, length], in a random order, then again in another."""

    def __init__(self, ids: torch.Tensor, tokens_per_step: int, seed: int) -> None:
        super().__init__(ids.shape[1], tokens_per_step, seed)
        self._ids = ids

    def passes(self, steps: int) -> float:
        return steps * self.tokens / self._ids.numel()

    def digest(self) -> bytes:
        return self._ids.cpu().numpy().tobytes()

    def _sequence(self, place: int) -> torch.Tensor:
        epoch, place = divmod(place, len(self._ids))
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._ids), generator=generator, device="cpu")
        return self._ids[order[place]]


class WrittenBatches(Batches):
    """What ``teacher`` writes, ``AT_ONCE`` sequences at a time, when the first of them is read."""

    def __init__(self, text: WrittenText, teacher: PreTrainedModel, tokens_per_step: int, seed: int) -> None:
        super().__init__(text.length, tokens_per_step, seed)
        self._text, self._teacher = text, teacher
        self._place, self._batch = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def passes(self, steps: int) -> float:
        return 1.0

    def digest(self) -> bytes:
        return repr(self._text).encode()

    def _sequence(self, place: int) -> torch.Tensor:
        batch, place = divmod(place, AT_ONCE)
        if batch != self._place:
            self._batch = write_batch(
                self._teacher, self._text.start, self.length, seed=self._seed, place=batch, sequences=AT_ONCE
            )
            self._place = batch
        return self._batch[place]
