"""The training text of a recovery, in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ..inputs.written_text import AT_ONCE, WrittenText, write_batch
from ..processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_SEQUENCES = 2048
"""Default for the largest number of sequences to train on."""


class Batches(ABC):
    """The sequences for each optimizer step.

    Args:
        length: number of tokens in a sequence.
        tokens_per_step: number of tokens in a step, rounded to whole sequences.
        seed: random seed of the text, or of the order of its sequences.

    Attributes:
        sequences: number of sequences in a step.
    """

    def __init__(self, length: int, tokens_per_step: int, seed: int) -> None:
        self.length, self._seed = length, seed
        self.sequences = max(1, round(tokens_per_step / length))

    @property
    def tokens(self) -> int:
        """Number of tokens in a step."""
        return self.sequences * self.length

    def of(self, step: int) -> torch.Tensor:
        """The sequences of a step, int64 [n_sequences, length]; every call gives the same."""
        places = range(step * self.sequences, (step + 1) * self.sequences)
        return torch.stack([self._sequence(place) for place in places])

    @abstractmethod
    def passes(self, steps: int) -> float:
        """Number of epochs that this many steps take."""

    @abstractmethod
    def digest(self) -> bytes:
        """Bytes that identify the text."""

    @abstractmethod
    def _sequence(self, place: int) -> torch.Tensor:
        """The sequence at a position of the training, int64 [length]."""


class GivenBatches(Batches):
    """Each sequence of ``ids``, int64 [n_sequences, length], once per epoch, in a new random order."""

    def __init__(self, ids: torch.Tensor, tokens_per_step: int, seed: int) -> None:
        super().__init__(ids.shape[1], tokens_per_step, seed)
        self._ids = ids
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def passes(self, steps: int) -> float:
        return steps * self.tokens / self._ids.numel()

    def digest(self) -> bytes:
        return self._ids.cpu().numpy().tobytes()

    def _sequence(self, place: int) -> torch.Tensor:
        epoch, place = divmod(place, len(self._ids))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = torch.randperm(len(self._ids), generator=generator, device="cpu")
            self._epoch = epoch
        return self._ids[self._order[place]]


class WrittenBatches(Batches):
    """Sequences that ``teacher`` writes on demand, ``AT_ONCE`` at a time in each process.

    If several processes share the work, all must ask for the same steps. The text is that of one process.
    """

    def __init__(
        self,
        text: WrittenText,
        teacher: PreTrainedModel,
        tokens_per_step: int,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(text.length, tokens_per_step, seed)
        self._text, self._teacher, self._processes = text, teacher, processes or Processes()
        self._turn, self._batches = -1, list[torch.Tensor]()

    def passes(self, steps: int) -> float:
        return 1.0

    def digest(self) -> bytes:
        return repr(self._text).encode()

    def _sequence(self, place: int) -> torch.Tensor:
        batch, place = divmod(place, AT_ONCE)
        turn, writer = divmod(batch, self._processes.size)
        if turn != self._turn:
            own = turn * self._processes.size + self._processes.rank
            written = write_batch(self._teacher, self._text, seed=self._seed, place=own, sequences=AT_ONCE)
            self._turn, self._batches = turn, self._processes.gather(written)
        return self._batches[writer][place]


def batches_of(
    text: torch.Tensor | WrittenText,
    teacher: PreTrainedModel,
    tokens_per_step: int,
    seed: int,
    processes: Processes | None = None,
) -> Batches:
    """The batches of a text, as :func:`~ace_triton.recovery.train.recover` takes it."""
    if isinstance(text, WrittenText):
        return WrittenBatches(text, teacher, tokens_per_step, seed, processes)
    return GivenBatches(text, tokens_per_step, seed)
