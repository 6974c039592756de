"""What a study measures, as the records of its journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ..recovery.settings import RecoveryReport
from ..timing import Seconds
from .cells import Cell

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Record(Protocol):
    """A line of the journal."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a study have in common; a different setting needs a study of its own.

    Attributes:
        model: its name, without folders.
        weights_sha256: digest of all its tensors.
        dtype: type of weights and forwards.
        calibration, evaluation: names of the texts, without folders.
        calibration_sha256, evaluation_sha256: digests of the texts.
        samples: calibration sequences.
        windows, window_length: of the evaluation.
        further_window_lengths: of further evaluations over the same tokens.
        bos: what sequences and windows begin with, as "each (1)" with the token id; None if the tokenizer has no
            beginning of its own and none was asked for.
    """

    model: str
    weights_sha256: str
    dtype: str
    calibration: str
    calibration_sha256: str
    evaluation: str
    evaluation_sha256: str
    samples: int
    windows: int
    window_length: int
    further_window_lengths: tuple[int, ...] = ()
    bos: str | None = None

    @property
    def window_lengths(self) -> tuple[int, ...]:
        """The first window length and the further ones."""
        return self.window_length, *self.further_window_lengths

    def with_windows(self, further: Sequence[int]) -> Setting:
        """The same setting with further window lengths added, ascending."""
        lengths = {*self.further_window_lengths, *further} - {self.window_length}
        return replace(self, further_window_lengths=tuple(sorted(lengths)))

    def windows_of(self, length: int) -> int:
        """Number of windows of a length: the same number of tokens for every length, and at least one window."""
        return max(1, self.windows * self.window_length // length)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; empty fields are left out."""
        return without_empty(asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Setting:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**record, "further_window_lengths": tuple(record.get("further_window_lengths", ()))})


@dataclass(frozen=True)
class Run:
    """A call that measured part of a study.

    Attributes:
        date: UTC, as "2026-11-28".
        version: of ace_triton.
        command: what was typed, with the last part of each path; "" if no command was involved.
    """

    date: str
    version: str
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Run:
        """The inverse of :meth:`to_dict`."""
        return cls(**record)


def without_empty(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without None and empty tuples, so that a new optional field leaves old records as they are."""
    return {name: value for name, value in record.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Evaluation:
    """A perplexity over windows of ``length`` tokens."""

    length: int
    perplexity: float


def evaluations(record: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """The ``further`` evaluations of a record as JSON types; empty if the record has none."""
    return tuple(Evaluation(**entry) for entry in record.get("further", ()))


@dataclass(frozen=True)
class DenseResult:
    """The unpruned model's perplexity.

    Attributes:
        perplexity: over windows of the setting's first length.
        further: over windows of its further lengths.
    """

    perplexity: float
    further: tuple[Evaluation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return without_empty(asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DenseResult:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**record, "further": evaluations(record)})


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a pruning: calibration forwards, statistics, score and mask with update and rounding, and all."""

    calibration: float
    statistics: float
    select: float
    total: float

    @classmethod
    def of(cls, seconds: Seconds) -> StageSeconds:
        """What a report says."""
        solved = seconds.select + seconds.update + seconds.quantize
        return cls(seconds.calibration, seconds.statistics, solved, seconds.total)


@dataclass(frozen=True)
class RecoveryCost:
    """Cost of a recovery.

    Attributes:
        steps, tokens: number of optimizer steps, and of tokens read.
        seconds: wall clock.
        cpu_seconds: CPU time of the process in that time, all threads together.
    """

    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, report: RecoveryReport) -> RecoveryCost:
        """What a report says."""
        return cls(report.steps, report.tokens, report.seconds, report.cpu_seconds)


@dataclass(frozen=True)
class CellResult:
    """One cell, measured.

    Attributes:
        cell: what was run.
        perplexity: at the end, over windows of the setting's first length.
        kept: mean share of the pruned layers' weights that is kept.
        seconds: wall clock of pruning by stage, without loading and evaluation.
        cpu_seconds: CPU time of the process in that time, all threads together.
        processor: name of the processor.
        threads: number of torch's threads.
        further: perplexity over windows of the setting's further lengths.
        recovery: cost of the training afterwards; None without any.
    """

    cell: Cell
    perplexity: float
    kept: float
    seconds: StageSeconds
    cpu_seconds: float
    processor: str
    threads: int
    further: tuple[Evaluation, ...] = ()
    recovery: RecoveryCost | None = None

    @property
    def cpu_seconds_in_all(self) -> float:
        """CPU seconds of pruning and recovery."""
        return self.cpu_seconds + (0.0 if self.recovery is None else self.recovery.cpu_seconds)

    @property
    def seconds_in_all(self) -> float:
        """Wall-clock seconds of pruning and recovery."""
        return self.seconds.total + (0.0 if self.recovery is None else self.recovery.seconds)

    def perplexity_over(self, further_length: int) -> float:
        """Perplexity over windows of a further length; NaN if it was not measured."""
        return next((found.perplexity for found in self.further if found.length == further_length), math.nan)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; empty fields are left out."""
        return {**without_empty(asdict(self)), "cell": self.cell.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CellResult:
        """The inverse of :meth:`to_dict`."""
        recovery = record.get("recovery")
        typed = {
            "cell": Cell.from_dict(record["cell"]),
            "seconds": StageSeconds(**record["seconds"]),
            "further": evaluations(record),
            "recovery": None if recovery is None else RecoveryCost(**recovery),
        }
        return cls(**{**record, **typed})


@dataclass(frozen=True)
class Pole:
    """How near VarP's 1 / (1 - y) comes to its pole over one input.

    Attributes:
        norm: the normalizer.
        largest: the largest f_j = mean_s 1 / (1 - y_sj) of a channel.
        channels: channels with f_j of 10 or more, as a steady channel has at y = 0.9.
    """

    norm: str
    largest: float
    channels: int


@dataclass(frozen=True)
class InputNorms:
    """Norms n_j of the channels of one distinct input, over the calibration set in the dense model.

    Attributes:
        block: index of the decoder block.
        layers: names of the layers that read it, within the block.
        channels: number of channels.
        median, largest: of n_j.
        histogram: number of channels by log10 n_j, in the bins of :data:`~ace_triton.study.norms.BIN_EDGES`; the
            end bins take what lies outside.
        poles: one for each normalizer of VarP.
    """

    block: int
    layers: tuple[str, ...]
    channels: int
    median: float
    largest: float
    histogram: tuple[int, ...]
    poles: tuple[Pole, ...]


@dataclass(frozen=True)
class ModelNorms:
    """All inputs of the dense model, at one calibration length."""

    length: int
    inputs: tuple[InputNorms, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelNorms:
        """The inverse of :meth:`to_dict`."""
        inputs = tuple(
            InputNorms(
                **{
                    **entry,
                    "layers": tuple(entry["layers"]),
                    "histogram": tuple(entry["histogram"]),
                    "poles": tuple(Pole(**pole) for pole in entry["poles"]),
                }
            )
            for entry in record["inputs"]
        )
        return cls(record["length"], inputs)


@dataclass(frozen=True)
class Divergence:
    """How far a pruned model's next-token distributions lie from the dense model's.

    Attributes:
        mean: mean KL(dense || pruned) over positions, in nats.
        quantiles: its quantiles, at :data:`QUANTILES`.
        agreement: share of positions where both rank the same token first.
        tokens: number of positions.
    """

    mean: float
    quantiles: tuple[float, ...]
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Sample:
    """What a model writes.

    Attributes:
        cell: the pruning; None for the dense model.
        prompts, texts: the prompts, and the model's greedy continuations.
        divergence: from the dense model; None for the dense model itself.
    """

    cell: Cell | None
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "cell": None if self.cell is None else self.cell.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sample:
        """The inverse of :meth:`to_dict`."""
        far = record["divergence"]
        return cls(
            None if record["cell"] is None else Cell.from_dict(record["cell"]),
            tuple(record["prompts"]),
            tuple(record["texts"]),
            None if far is None else Divergence(**{**far, "quantiles": tuple(far["quantiles"])}),
        )
